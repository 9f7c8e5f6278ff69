"""Follows the axes of a tensor back through operators that only move elements: which source is this a view of?

Every axis of a value carries *atoms*, indivisible extents, outer to inner. A Transpose permutes axes, a Reshape cuts
the same row of atoms at other places and splits an atom where it must:

    x[B, S, H*D]  →  Reshape  →  [B, S, H, D]  →  Transpose  →  [B, H, S, D]
      (b)(s)(h d)                 (b)(s)(h)(d)                   (b)(h)(s)(d)

Axes of size 1 carry no atom, so it does not matter where an exporter puts them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from mmopt.analysis.dims import DimTooComplex, Size, floor_divide, product
from mmopt.transforms.canonicalize.editing import axes_of, constant, constant_ints, integer, is_onnx
from mmopt.transforms.canonicalize.rewriting import Rewriter

_MAX_STEPS = 32


@dataclasses.dataclass(frozen=True)
class Atom:
    """One indivisible extent.

    Attributes:
        role: What it is for: ``lead`` (batch and heads), ``row``, ``column`` or ``pick`` (one of several parts).
        path: Its place among the atoms of its role, outer to inner: parts of ``(0,)`` are ``(0, 0)`` and ``(0, 1)``.
        size: Its extent.
    """

    role: str
    path: tuple[int, ...]
    size: Size

    def split(self, outer: Size, inner: Size) -> tuple[Atom, Atom]:
        """The two atoms it consists of."""
        return Atom(self.role, (*self.path, 0), outer), Atom(self.role, (*self.path, 1), inner)


Group = tuple[Atom, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the axes of one value carry.

    Attributes:
        groups: Atoms of each axis, outer to inner.
        repeated: Atoms that an Expand on the way made out of nothing: the source has their content once.
        picked: Which part the value is, of each ``pick`` atom, in the order of their paths.
    """

    groups: tuple[Group, ...]
    repeated: Group = ()
    picked: tuple[int, ...] = ()

    @property
    def order(self) -> Group:
        """All atoms, outermost first: how the elements lie in memory."""
        return tuple(atom for group in self.groups for atom in group)


@dataclasses.dataclass(frozen=True)
class Source:
    """A value that another one is a view of, up to a factor.

    Attributes:
        value: The value.
        layout: Its axes.
        factor: What its elements are multiplied by on the way.
        moves: Transposes on the way.
    """

    value: ir.Value
    layout: Layout
    factor: float = 1.0
    moves: int = 0


def quotient(size: Size, divisor: Size) -> Size | None:
    """``size / divisor`` where that is exact for all named sizes."""
    try:
        found = floor_divide(size, divisor)
        return found if found * divisor == size and size != 0 else None
    except DimTooComplex:
        return None


def regroup(atoms: Sequence[Atom], sizes: Sequence[Size | None]) -> tuple[Group, ...] | None:
    """The same row of atoms cut into axes of ``sizes``, splitting atoms; ``None`` where they do not line up."""
    queue, groups = collections.deque(atoms), []
    for size in sizes:
        group: list[Atom] = []
        rest = size
        while rest != 1:
            if rest is None or not queue:
                return None
            atom = queue.popleft()
            left = quotient(rest, atom.size)
            if left is not None:
                group.append(atom)
                rest = left
                continue
            inner = quotient(atom.size, rest)
            if inner is None:
                return None
            outer, remainder = atom.split(rest, inner)
            group.append(outer)
            queue.appendleft(remainder)
            rest = 1
        groups.append(tuple(group))
    return None if queue else tuple(groups)


def extent(atoms: Sequence[Atom]) -> Size:
    """Product of the extents."""
    return product(atom.size for atom in atoms)


def sources(value: ir.Value, layout: Layout, rewriter: Rewriter) -> Iterator[Source]:
    """``value`` and what it is a view of, nearest first, as far as that can be followed."""
    at: Source | None = Source(value, layout)
    for _ in range(_MAX_STEPS):
        if at is None:
            return
        yield at
        at = _before(at, rewriter)


def _before(at: Source, rewriter: Rewriter) -> Source | None:
    node = at.value.producer()
    if node is None or not is_onnx(node, node.op_type) or not node.inputs or node.inputs[0] is None:
        return None
    scaled = scaling(node)
    if scaled is not None:
        return dataclasses.replace(at, value=scaled[0], factor=at.factor * scaled[1])
    layout = back(node, at.value, at.layout, rewriter)
    if layout is None:
        return None
    return Source(node.inputs[0], layout, at.factor, at.moves + (node.op_type == "Transpose"))


def scaling(node: ir.Node) -> tuple[ir.Value, float] | None:
    """``(x, factor)`` for multiplication by, or division by, one number that is not zero."""
    if not is_onnx(node, "Mul", "Div") or len(node.inputs) != 2:
        return None
    for position in (1, 0) if node.op_type == "Mul" else (1,):
        array, value = constant(node.inputs[position]), node.inputs[1 - position]
        if array is None or array.size != 1 or array.dtype.kind != "f" or value is None:
            continue
        if value.shape is not None and array.ndim > len(value.shape):
            continue
        number = float(array.reshape(-1)[0])
        if number == 0 or number - number != 0:
            return None
        return value, number if node.op_type == "Mul" else 1 / number
    return None


def back(node: ir.Node, output: ir.Value, layout: Layout, rewriter: Rewriter) -> Layout | None:
    """The layout of the first input of ``node``, given that of one of its outputs; ``None`` if it does more."""
    if is_onnx(node, "Identity"):
        return layout
    if is_onnx(node, "Transpose"):
        return _transpose(node, layout)
    if is_onnx(node, "Reshape", "Flatten", "Squeeze", "Unsqueeze"):
        before = rewriter.shape(node.inputs[0])
        groups = None if before is None else regroup(layout.order, before)
        return None if groups is None else dataclasses.replace(layout, groups=groups)
    if is_onnx(node, "Expand"):
        return _expand(node, layout, rewriter)
    if is_onnx(node, "Split", "Slice", "Gather"):
        return _pick(node, output, layout, rewriter)
    return None


def _transpose(node: ir.Node, layout: Layout) -> Layout | None:
    attribute = node.attributes.get("perm")
    if attribute is not None and attribute.is_ref():
        return None
    rank = len(layout.groups)
    perm = list(range(rank))[::-1] if attribute is None else list(attribute.as_ints())
    groups: list[Group] = [()] * rank
    for position, axis in enumerate(perm):
        groups[axis] = layout.groups[position]
    return dataclasses.replace(layout, groups=tuple(groups))


def _expand(node: ir.Node, layout: Layout, rewriter: Rewriter) -> Layout | None:
    before, after = rewriter.shape(node.inputs[0]), rewriter.shape(node.outputs[0])
    if before is None or after is None or len(after) != len(layout.groups):
        return None
    groups, repeated = [], list(layout.repeated)
    skipped = len(after) - len(before)
    for axis, group in enumerate(layout.groups):
        if axis < skipped:
            repeated += group
        elif before[axis - skipped] == after[axis] and after[axis] is not None:
            groups.append(group)
        elif before[axis - skipped] == 1:
            repeated += group
            groups.append(())
        else:
            return None
    return dataclasses.replace(layout, groups=tuple(groups), repeated=tuple(repeated))


def _pick(node: ir.Node, output: ir.Value, layout: Layout, rewriter: Rewriter) -> Layout | None:
    """One of several equal parts along an axis."""
    before, after = rewriter.shape(node.inputs[0]), rewriter.shape(output)
    found = None if before is None or after is None else _part(node, output, before, after)
    if before is None or found is None:
        return None
    axis, count, index = found
    if count == 1:
        return layout if node.op_type != "Gather" else _inserted(layout, axis, ())
    atom = Atom("pick", (len(layout.picked),), count)
    picked = (*layout.picked, index)
    if node.op_type == "Gather":
        return dataclasses.replace(_inserted(layout, axis, (atom,)), picked=picked)
    groups = list(layout.groups)
    groups[axis] = (atom, *groups[axis])
    return dataclasses.replace(layout, groups=tuple(groups), picked=picked)


def _inserted(layout: Layout, axis: int, group: Group) -> Layout:
    return dataclasses.replace(layout, groups=(*layout.groups[:axis], group, *layout.groups[axis:]))


def _part(
    node: ir.Node, output: ir.Value, before: Sequence[Size | None], after: Sequence[Size | None]
) -> tuple[int, int, int] | None:
    """Axis, number of parts and which of them ``output`` is."""
    if node.op_type == "Slice":
        return _slice_part(node, before, after)
    axis = integer(node, "axis", 0)
    if axis is None:
        return None
    axis %= len(before)
    if node.op_type == "Gather":
        index, count = constant(node.inputs[1]), before[axis]
        if index is None or index.ndim != 0 or not isinstance(count, int):
            return None
        return axis, count, int(index) % count
    if any(o.shape is not None and output.shape is not None and o.shape != output.shape for o in node.outputs):
        return None
    count = len(node.outputs)
    if before[axis] is None or after[axis] is None or quotient_is(before[axis], after[axis], count) is False:
        return None
    return axis, count, list(node.outputs).index(output)


def quotient_is(size: Size | None, part: Size | None, count: int) -> bool:
    """Whether ``size`` is ``count`` times ``part``."""
    return size is not None and part is not None and part * count == size


def _slice_part(
    node: ir.Node, before: Sequence[Size | None], after: Sequence[Size | None]
) -> tuple[int, int, int] | None:
    starts = constant_ints(node.inputs[1]) if len(node.inputs) > 2 else None
    axes = axes_of(node, 3) if len(node.inputs) > 3 else [0]
    steps = constant_ints(node.inputs[4]) if len(node.inputs) > 4 else [1]
    if starts is None or axes is None or steps != [1] or len(starts) != 1 or len(axes) != 1:
        return None
    axis = axes[0] % len(before)
    size, part = before[axis], after[axis]
    if not isinstance(size, int) or not isinstance(part, int) or part == 0 or size % part:
        return None
    start = starts[0] + size if starts[0] < 0 else starts[0]
    return None if start % part or start >= size else (axis, size // part, start // part)
