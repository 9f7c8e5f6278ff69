"""Solves which positions of which axes go together.

Every position of every axis carries a *label*: a set of elements. A position is cut when any of its elements is. The
position ``64 h + d`` of an axis that is reshaped to ``[12, 64]`` carries ``{h, d}``, so that it goes with head ``h`` or
with coordinate ``d`` of all heads. That two positions are coupled is an equation between labels:

    {a} = {b}          a and b are one element
    {a} = {c, d}       a stands for c or d
    {a, b} = {c, d}    a = c and b = d, what both sides share aside

This is unification over sets. It may tie more than it must, never less. A frozen element is never cut, so that it drops
out of every label that has another: ``{i, frozen}`` is ``{i}``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

Label = tuple[int, ...]
"""Elements, those of outer axes first."""


class Elements:
    """Elements, what they stand for, and which are frozen."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._bound: dict[int, Label] = {}
        self._reason: dict[int, str] = {}

    def fresh(self, count: int = 1) -> range:
        """New elements."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return range(start, start + count)

    def find(self, element: int) -> int:
        """The representative of an element."""
        parent = self._parent
        while parent[element] != element:
            parent[element] = parent[parent[element]]
            element = parent[element]
        return element

    def reason(self, element: int) -> str:
        """Why an element is frozen, or ""."""
        return self._reason.get(self.find(element), "")

    def resolve(self, label: Label) -> Label:
        """The label in terms of representatives that stand for themselves; one frozen element when all are frozen."""
        free: dict[int, None] = {}
        frozen = -1
        stack = list(reversed(label))
        while stack:
            root = self.find(stack.pop())
            bound = self._bound.get(root)
            if bound is not None:
                stack.extend(reversed(bound))
            elif root in self._reason:
                frozen = root
            else:
                free[root] = None
        return tuple(free) if free else (frozen,)

    def is_frozen(self, label: Label) -> bool:
        """Whether a resolved label can never be cut."""
        return len(label) == 1 and label[0] in self._reason

    def freeze(self, label: Label, reason: str) -> None:
        """Never cut any element of a label; the first reason stays."""
        for element in self.resolve(label):
            self._reason.setdefault(element, reason)

    def equate(self, left: Label, right: Label) -> None:
        """Cut two positions together or not at all."""
        a, b = self.resolve(left), self.resolve(right)
        if set(a) == set(b):
            return
        if self.is_frozen(a) or self.is_frozen(b):
            fixed, other = (a, b) if self.is_frozen(a) else (b, a)
            self.freeze(other, self._reason[fixed[0]])
            return
        only_a, only_b = [e for e in a if e not in b], [e for e in b if e not in a]
        if not only_a or not only_b:
            self.freeze(tuple(only_a or only_b), "its positions are coupled to some of each other's")
        elif len(only_a) == 1 or len(only_b) == 1:
            single, several = (only_a, only_b) if len(only_a) == 1 else (only_b, only_a)
            self._bind(single[0], several)
        else:
            self._pair(only_a, only_b)

    def _bind(self, element: int, label: Sequence[int]) -> None:
        if len(label) == 1:
            self._parent[element] = label[0]
        else:
            self._bound[element] = tuple(label)

    def _pair(self, a: Sequence[int], b: Sequence[int]) -> None:
        short = min(len(a), len(b))
        for x, y in itertools.zip_longest(a, b):
            left = a[short - 1] if x is None else x
            right = b[short - 1] if y is None else y
            self.equate((left,), (right,))


def outer(parts: Iterable[Sequence[Label]]) -> list[Label]:
    """Labels of a row-major product of axes."""
    result: list[Label] = [()]
    for labels in parts:
        result = [(*a, *b) for a in result for b in labels]
    return result
