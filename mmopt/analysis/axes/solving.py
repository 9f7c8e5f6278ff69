"""From what rules said of axes to labels of every position."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mmopt.analysis.axes.equations import Elements, Label, outer
from mmopt.analysis.axes.space import Part, Product, Space

EMPTIES = "without it nothing would be left of an axis"


class Solution:
    """Labels of all positions of all axes.

    Args:
        space: Axes and what rules said of them.
    """

    def __init__(self, space: Space) -> None:
        self.elements = Elements()
        self._space = space
        self._labels: dict[int, list[Label]] = {}
        self._whole_frozen: dict[int, str] = {}
        _join_equal(space)
        self._freeze_axes()
        self._defined = {p.whole: p for p in reversed([self._rooted(p) for p in space.products])}
        self._solve()
        self._keep_something()

    def labels(self, axis: int) -> list[Label]:
        """The resolved label of every position of an axis of fixed size."""
        return [self.elements.resolve(label) for label in self._label(self._space.find(axis))]

    def axes(self) -> Iterable[int]:
        """All axes that have labels, one number each."""
        return self._labels.keys()

    def _rooted(self, product: Product) -> Product:
        find = self._space.find
        return Product(find(product.whole), tuple(find(p) for p in product.parts))

    def _freeze_axes(self) -> None:
        """Spread frozen axes over products and parts, so that positions need not be looked at one by one."""
        space = self._space
        for axis, positions, reason in space.frozen:
            if positions is None:
                self._whole_frozen.setdefault(space.find(axis), reason)
        products = [self._rooted(p) for p in space.products]
        pieces = [(space.find(p.whole), space.find(p.piece)) for p in space.parts]
        changed = True
        while changed:
            before = len(self._whole_frozen)
            for product in products:
                self._spread_product(product)
            for whole, piece in pieces:
                if whole in self._whole_frozen:
                    self._whole_frozen.setdefault(piece, self._whole_frozen[whole])
            changed = len(self._whole_frozen) > before

    def _spread_product(self, product: Product) -> None:
        frozen = self._whole_frozen
        if product.whole in frozen:
            for part in product.parts:
                frozen.setdefault(part, frozen[product.whole])
        elif all(part in frozen for part in product.parts):
            frozen[product.whole] = frozen[product.parts[0]]

    def _label(self, axis: int) -> list[Label]:
        labels = self._labels.get(axis)
        if labels is not None:
            return labels
        extent = self._space.extent(axis) or 0
        reason = self._whole_frozen.get(axis)
        definition = self._defined.pop(axis, None)
        if reason is not None or extent == 1:
            element = (self.elements.fresh()[0],)
            self.elements.freeze(element, reason or "there is only one")
            labels = [element] * extent
        elif definition is not None:
            labels = outer([self._label(part) for part in definition.parts])
            labels = self._labels.get(axis, labels)
        else:
            labels = [(element,) for element in self.elements.fresh(extent)]
        self._labels[axis] = labels
        return labels

    def _solve(self) -> None:
        space = self._space
        for axis, _ in space.holders:
            if space.extent(axis) is not None:
                self._label(space.find(axis))
        for axis, positions, reason in space.frozen:
            if positions is not None and space.extent(axis) is not None:
                self._freeze_positions(axis, positions, reason)
        products = [self._rooted(p) for p in space.products]
        for product in products:
            self._freeze_blocks(product)
        for product in products:
            self._equate(self._label(product.whole), outer([self._label(part) for part in product.parts]))
        for part in space.parts:
            self._equate_part(part)

    def _freeze_positions(self, axis: int, positions: Iterable[int], reason: str) -> None:
        labels = self._label(self._space.find(axis))
        for position in positions:
            self.elements.freeze(labels[position], reason)

    def _freeze_blocks(self, product: Product) -> None:
        """Freeze coordinates of a factor that some part of the whole lies in: nothing of that part would be left."""
        space = self._space
        sizes = [space.extent(part) or 1 for part in product.parts]
        for part in space.parts:
            if space.find(part.whole) == product.whole:
                for factor, coordinates in zip(product.parts, np.unravel_index(part.indices, sizes), strict=True):
                    if len(set(coordinates.tolist())) == 1:
                        self._freeze_positions(factor, [int(coordinates[0])], EMPTIES)

    def _equate_part(self, part: Part) -> None:
        whole, piece = self._label(self._space.find(part.whole)), self._label(self._space.find(part.piece))
        self._equate([whole[i] for i in part.indices], piece)

    def _equate(self, left: list[Label], right: list[Label]) -> None:
        if left is right:
            return
        for a, b in zip(left, right, strict=True):
            if a != b:
                self.elements.equate(a, b)

    def _keep_something(self) -> None:
        """Freeze elements that all positions of an axis carry."""
        changed = True
        while changed:
            changed = False
            for axis, labels in self._labels.items():
                if self._space.extent(axis) in (None, 0, 1):
                    continue
                everywhere = self._common(labels)
                if everywhere:
                    self.elements.freeze(tuple(everywhere), EMPTIES)
                    changed = True

    def _common(self, labels: list[Label]) -> set[int]:
        common: set[int] | None = None
        for label in labels:
            resolved = self.elements.resolve(label)
            if self.elements.is_frozen(resolved):
                return set()
            common = set(resolved) if common is None else common & set(resolved)
            if not common:
                return set()
        return common or set()


def _join_equal(space: Space) -> None:
    """Join axes that are the same factors, or the same positions, of one axis."""
    changed = True
    while changed:
        changed = False
        factors: dict[tuple[int, tuple[object, ...]], tuple[int, ...]] = {}
        for product in space.products:
            sizes = tuple(space.size(part) for part in product.parts)
            first = factors.setdefault((space.find(product.whole), sizes), product.parts)
            changed |= _join(space, zip(first, product.parts, strict=True))
        pieces: dict[tuple[int, tuple[int, ...]], int] = {}
        for part in space.parts:
            first_piece = pieces.setdefault((space.find(part.whole), part.indices), part.piece)
            changed |= _join(space, [(first_piece, part.piece)])


def _join(space: Space, pairs: Iterable[tuple[int, int]]) -> bool:
    """Join axes in pairs; whether any were apart. Axes of one position stay apart for good."""
    apart = [(a, b) for a, b in pairs if space.find(a) != space.find(b)]
    for a, b in apart:
        space.same(a, b)
    return any(space.find(a) == space.find(b) for a, b in apart)
