"""The axes of all tensors of a graph, and what rules say about them.

Axes that are equal position by position are one: :meth:`Space.same` joins them at once. Everything else that rules say
(this axis is the product of those, these positions are that axis) is kept for :mod:`mmopt.analysis.axes.equations`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.analysis.axes.group import Mixing, Role
from mmopt.analysis.dims import Size
from mmopt.analysis.shapes import ShapeFacts

_UNIFORM_LIMIT = 1 << 20
_VARIES = "its size is not fixed"
_MERGED = "it is merged with an axis whose size is not fixed"


@dataclasses.dataclass(frozen=True)
class Product:
    """Axis ``whole`` is the row-major product of ``parts``."""

    whole: int
    parts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """Positions ``indices`` of axis ``whole`` are the positions of axis ``piece``, in order."""

    whole: int
    indices: tuple[int, ...]
    piece: int


@dataclasses.dataclass(frozen=True)
class Holder:
    """One axis of one value, as the outside sees it.

    Attributes:
        value: The value.
        axis: Which of its axes.
        reader: The operator this reading of the value belongs to; ``None`` when all readings are one.
    """

    value: ir.Value
    axis: int
    reader: ir.Node | None = None


@dataclasses.dataclass(frozen=True)
class Reading:
    """What an operator does with an axis of an operand."""

    node: ir.Node
    operand: int
    axis: int
    what: Role | Mixing


class Space:
    """Axes by number, joined where they are equal.

    Args:
        facts: Inferred shapes.
    """

    def __init__(self, facts: ShapeFacts) -> None:
        self.facts = facts
        self.products: list[Product] = []
        self.parts: list[Part] = []
        self.holders: list[tuple[int, Holder]] = []
        self.readings: list[tuple[int, Reading]] = []
        self.counts: list[tuple[int, ir.Node, str]] = []
        self.kinds: list[tuple[int, str]] = []
        self.frozen: list[tuple[int, tuple[int, ...] | None, str]] = []
        self.factors: dict[int, tuple[int, ...]] = {}
        self._parent: list[int] = []
        self._sizes: list[Size | None] = []
        self._axes: dict[tuple[ir.Value, ir.Node | None], list[int] | None] = {}
        self._private: dict[ir.Value, bool] = {}

    # -- axes ------------------------------------------------------------------------------------------------------

    def new(self, size: Size | None) -> int:
        """A new axis, of no tensor yet."""
        axis = len(self._parent)
        self._parent.append(axis)
        self._sizes.append(size)
        if not isinstance(size, int):
            self.freeze(axis, _VARIES)
        return axis

    def find(self, axis: int) -> int:
        """The axis that stands for all that are equal to ``axis``."""
        parent = self._parent
        while parent[axis] != axis:
            parent[axis] = parent[parent[axis]]
            axis = parent[axis]
        return axis

    def size(self, axis: int) -> Size | None:
        """How many positions there are."""
        return self._sizes[self.find(axis)]

    def own_size(self, axis: int) -> Size | None:
        """How many positions an axis of one tensor has in the terms of its own shape."""
        return self._sizes[axis]

    def extent(self, axis: int) -> int | None:
        """How many positions there are, where that is a fixed number."""
        size = self.size(axis)
        return size if isinstance(size, int) else None

    def of(self, value: ir.Value) -> list[int]:
        """The axes of a tensor; none when its rank is not known."""
        return self._of(value, None)

    def operand(self, node: ir.Node, index: int) -> list[int]:
        """The axes of an operand. A vector that several operators read has axes of its own for each: to cut it in one
        place says nothing about the others, as copies cost nothing."""
        value = node.inputs[index]
        if value is None:
            return []
        return self._of(value, node if self._is_private(value) else None)

    def _of(self, value: ir.Value, reader: ir.Node | None) -> list[int]:
        key = (value, reader)
        if key not in self._axes:
            shape = self.facts.shape(value)
            axes = None if shape is None else [self.new(size) for size in shape]
            self._axes[key] = axes
            for position, axis in enumerate(axes or ()):
                self.holders.append((axis, Holder(value, position, reader)))
        return self._axes[key] or []

    def knows(self, value: ir.Value) -> bool:
        """Whether the rank of a value is known."""
        return self.facts.shape(value) is not None

    def _is_private(self, value: ir.Value) -> bool:
        known = self._private.get(value)
        if known is None:
            known = self._private[value] = has_copies(value)
        return known

    # -- what rules say --------------------------------------------------------------------------------------------

    def same(self, left: int, right: int) -> None:
        """Two axes are equal, position by position. Axes of one position say nothing."""
        a, b = self.find(left), self.find(right)
        if a == b:
            return
        sizes = (self._sizes[a], self._sizes[b])
        if 1 in sizes:
            return
        if sizes[0] != sizes[1] and None not in sizes and all(isinstance(s, int) for s in sizes):
            self.freeze(a, "two shapes disagree on its size")
            self.freeze(b, "two shapes disagree on its size")
            return
        self._parent[b] = a
        self._same_factors(a, b)
        if not isinstance(sizes[0], int) and isinstance(sizes[1], int):
            self._sizes[a] = sizes[1]

    def _same_factors(self, left: int, right: int) -> None:
        """Factors of an axis of varying size that is joined with another."""
        factors = [self.factors.get(left), self.factors.pop(right, None)]
        if factors[0] is None or factors[1] is None:
            known = factors[0] or factors[1]
            if known is not None:
                self.factors[left] = known
        elif [self.size(a) for a in factors[0]] == [self.size(a) for a in factors[1]]:
            self.same_all(factors[0], factors[1])
        else:
            self.freeze_all((*factors[0], *factors[1]), _MERGED)

    def factors_of(self, axis: int) -> tuple[int, ...]:
        """What an axis of varying size was merged from; the axis itself where that is not known."""
        return self.factors.get(self.find(axis), (axis,))

    def merge(self, whole: int, parts: Sequence[int]) -> None:
        """Axis ``whole`` is the row-major product of ``parts``, some of varying size, and is only ever cut apart again.

        Anything else that an operator does with it freezes its parts, see :meth:`close`.
        """
        root = self.find(whole)
        if root not in self.factors:
            self.factors[root] = tuple(parts)
        elif [self.size(a) for a in self.factors[root]] == [self.size(a) for a in parts]:
            self.same_all(self.factors[root], parts)
        else:
            self.freeze_all((*parts, *self.factors[root]), _MERGED)

    def close(self) -> None:
        """Freeze what was merged into axes of varying size that operators do more with than to pass them on."""
        reasons = {self.find(axis): reason for axis, _, reason in self.frozen if reason != _VARIES}
        for product in self.products:
            reasons.update(dict.fromkeys(map(self.find, (product.whole, *product.parts)), _MERGED))
        for part in self.parts:
            reasons.update(dict.fromkeys(map(self.find, (part.whole, part.piece)), _MERGED))
        reasons.update(
            {self.find(axis): _MERGED for axis, reading in self.readings if reading.what is not Role.PARAMETER}
        )
        for whole, parts in self.factors.items():
            if whole in reasons:
                self.freeze_all(parts, reasons[whole])

    def same_all(self, left: Sequence[int], right: Sequence[int]) -> None:
        """Axes are equal in pairs."""
        for a, b in zip(left, right, strict=True):
            self.same(a, b)

    def broadcast(self, operand: Sequence[int], result: Sequence[int]) -> None:
        """Axes of an operand are those of the result, aligned at the last; those of one position are stretched."""
        for a, b in zip(reversed(operand), reversed(result), strict=False):
            self.same(a, b)

    def product(self, whole: int, parts: Sequence[int]) -> None:
        """Axis ``whole`` is the row-major product of ``parts``."""
        real = tuple(p for p in parts if self.size(p) != 1)
        if len(real) == 1:
            self.same(whole, real[0])
        elif real and all(isinstance(self.size(p), int) for p in (whole, *real)):
            self.products.append(Product(whole, real))
        else:
            for axis in (whole, *real):
                self.freeze(axis, _MERGED)

    def part(self, whole: int, indices: Iterable[int], piece: int) -> None:
        """Positions ``indices`` of ``whole`` are the positions of ``piece``."""
        listed = tuple(indices)
        if self.size(whole) == self.size(piece) and listed == tuple(range(len(listed))):
            self.same(whole, piece)
        else:
            self.parts.append(Part(whole, listed, piece))

    def freeze(self, axis: int, reason: str, positions: Iterable[int] | None = None) -> None:
        """Never cut an axis, or some of its positions."""
        self.frozen.append((axis, None if positions is None else tuple(positions), reason))

    def freeze_all(self, axes: Iterable[int], reason: str) -> None:
        """Never cut any of these axes."""
        for axis in axes:
            self.freeze(axis, reason)

    def reads(self, node: ir.Node, operand: int, axis: int, what: Role | Mixing) -> None:
        """Operator ``node`` uses axis number ``axis`` of an operand in a certain way."""
        axes = self.operand(node, operand)
        if axis < len(axes):
            self.readings.append((axes[axis], Reading(node, operand, axis, what)))

    def count(self, axis: int, node: ir.Node, attribute: str) -> None:
        """An attribute of ``node`` is the number of positions of ``axis``."""
        self.counts.append((axis, node, attribute))

    def kind(self, axis: int, kind: str) -> None:
        """What units on an axis are called."""
        self.kinds.append((axis, kind))

    def unknown(self, node: ir.Node, reason: str) -> None:
        """Freeze everything an operator touches."""
        for index in range(len(node.inputs)):
            self.freeze_all(self.operand(node, index), reason)
        for output in node.outputs:
            self.freeze_all(self.of(output), reason)

    # -- constants -------------------------------------------------------------------------------------------------

    def integers(self, node: ir.Node, index: int) -> list[int] | None:
        """Elements of a small operand of whole numbers, when every one is a known number."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return None
        elements = self.facts.elements(value)
        if elements is None:
            return _constant_integers(value)
        return [e for e in elements if isinstance(e, int)] if all(isinstance(e, int) for e in elements) else None


def _constant_integers(value: ir.Value) -> list[int] | None:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or len(tensor.shape) > 1 or tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    return [int(i) for i in np.asarray(tensor.numpy()).reshape(-1)]


def has_copies(value: ir.Value) -> bool:
    """Whether every reader of a constant gets axes, and where they are cut a copy, of its own."""
    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and len(value.uses()) > 1 and not value.is_graph_output() and _is_plain(tensor)


def _is_plain(tensor: ir.TensorProtocol) -> bool:
    """Whether copies of a constant cost next to nothing: a vector, or one number all over."""
    shape = [int(d) for d in tensor.shape.numpy()]
    if sum(d != 1 for d in shape) <= 1:
        return True
    if tensor.size > _UNIFORM_LIMIT:
        return False
    array: np.ndarray[Any, Any] = np.asarray(tensor.numpy())
    return bool((array == array.reshape(-1)[0]).all())
