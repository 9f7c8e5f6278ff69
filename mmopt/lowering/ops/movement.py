"""Operators that move elements without looking at them: transposing, slicing, joining, padding, repeating."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map, Tensor
from mmopt.backends.cpu.kernels.join import Join
from mmopt.backends.expressions import simplify
from mmopt.lowering.ops.dequantized import dequantized, shared_encoding
from mmopt.lowering.ops.extents import (
    axis_attr,
    choose,
    constant_axes,
    declared,
    i64,
    integers,
    is_axis,
    known,
    named,
    nonnegative,
    optional_integers,
    pick,
    settled,
)
from mmopt.lowering.ops.products import transposed_origin
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import MAX_ELEMENTS, NotLowered, Value, from_elements

FAR = 2**31 - 1
"""Slice bounds from here on mean "to the end"."""


@lowers("Transpose")
def transpose(node: OpNode) -> Value:
    """Axes in another order."""
    data = node.input(0)
    order = constant_axes(node.attr("perm", list(range(data.ndim))[::-1]), data.ndim)
    return transposed(node, data, order)


def transposed(node: OpNode, data: Value, order: Sequence[int]) -> Value:
    """``data`` with its axes in ``order``; free where only axes of extent one move."""
    extents = [data.shape[a] for a in order]
    moved = [a for a in order if known(data.shape[a]) != 1]
    if moved == sorted(moved):
        return node.context.reshape(data, extents)
    if data.elements is not None:
        return from_elements(data.elements.transpose(order), data.dtype)
    node.context.tensor(data)
    inverse = [list(order).index(a) for a in range(data.ndim)]
    body = lambda *at: data.tensor[tuple(at[p] for p in inverse)]  # noqa: E731
    made = Value(Map(extents, data.dtype, body, "transpose"), name=node.name)
    transposed_origin(data, made, order)
    return made


# -- joining and splitting -------------------------------------------------------------------------------------


@lowers("Concat")
def concat(node: OpNode) -> Value:
    """Operands one after another along an axis."""
    values = [v for v in node.inputs if v is not None]
    axis = axis_attr(node, values[0].ndim, 1)
    if (known := shared_encoding(values)) is not None:
        return dequantized(node, joined(node, [one.value for one in known], axis), known[0])
    if not node.context.lazy:
        node.context.realize([v for v in values if v.deferred], "operand")
    return joined(node, values, axis)


def joined(node: OpNode, values: Sequence[Value], axis: int) -> Value:
    """``values`` one after another along ``axis``."""
    parts = [v.elements for v in values if v.elements is not None]
    if len(parts) == len(values) and sum(p.size for p in parts) <= MAX_ELEMENTS:
        return from_elements(np.concatenate(parts, axis=axis), values[0].dtype)
    filled = [v for v in values if known(v.shape[axis]) != 0] or [values[0]]
    if len(filled) == 1:
        return filled[0]
    tensors = [node.context.tensor(v) for v in filled]
    if (blocks := _all_in_blocks(filled)) is not None:
        return Value.in_blocks(Join(blocks, axis).output, node.name)
    return Value(Join(tensors, axis).output, name=node.name)


def _all_in_blocks(values: Sequence[Value]) -> list[Tensor] | None:
    """``values`` in the blocked layout of the first, where all have it; see ``Value.blocked``."""
    first = values[0].blocked
    lanes = None if first is None else known(first.shape[-1])
    if lanes is None:
        return None
    found = [v.in_blocks_of(lanes) for v in values]
    return None if any(b is None for b in found) else [b for b in found if b is not None]


@lowers("Split")
def split(node: OpNode) -> list[Value]:
    """Pieces along an axis, of given or of equal sizes."""
    data = node.input(0)
    axis = axis_attr(node, data.ndim, 0)
    sizes = _split_sizes(node, data.shape[axis], axis)
    node.context.tensor(data)
    start: Expr = i64(0)
    pieces: list[Value] = []
    for extent in sizes:
        whole = _channels_in_blocks(node, data, start, extent) if axis == 1 else None
        pieces.append(whole or piece(node, data, {axis: (start, i64(1), extent)}))
        start = simplify(start + extent)
    return pieces


def _channels_in_blocks(node: OpNode, data: Value, start: Expr, extent: Expr) -> Value | None:
    """Some channels of a value in a blocked layout, where they are whole blocks."""
    lanes = None if data.blocked is None else known(data.blocked.shape[-1])
    first, count = known(start), known(extent)
    if data.blocked is None or not lanes or first is None or not count or first % lanes or count % lanes:
        return None
    blocks, shift = data.blocked, first // lanes

    def body(n: Expr, c: Expr, *rest: Expr) -> Expr:
        return blocks[(n, c + shift, *rest)]

    shape = (blocks.shape[0], i64(count // lanes), *blocks.shape[2:])
    return Value.in_blocks(Map(shape, blocks.dtype, body, "split"), node.name)


def _split_sizes(node: OpNode, extent: Expr, axis: int) -> list[Expr]:
    sizes = optional_integers(node, 1, "split")
    if sizes is not None:
        return named(node, sizes.items, "split", _stated_pieces(node, axis)) if sizes.data else sizes.items
    count = node.attr("num_outputs", node.n_outputs)
    chunk = simplify(tirx.floordiv(extent + (count - 1), i64(count)))
    return [*[chunk] * (count - 1), simplify(extent - chunk * (count - 1))]


def _stated_pieces(node: OpNode, axis: int) -> list[int | None]:
    shapes = [declared(node, n) for n in range(node.n_outputs)]
    return [None if s is None else s[axis] for s in shapes]


# -- slicing ---------------------------------------------------------------------------------------------------


def piece(node: OpNode, data: Value, parts: dict[int, tuple[Expr, Expr, Expr]]) -> Value:
    """Part of ``data``: (start, step, extent) for some axes, all of the others."""
    shape = tuple(parts[d][2] if d in parts else e for d, e in enumerate(data.shape))
    if all(known(s) == 0 and known(t) == 1 and e.same_as(data.shape[d]) for d, (s, t, e) in parts.items()):
        return data
    values = data.elements
    if values is not None and all(known(e) is not None for p in parts.values() for e in p):
        axes = [np.arange(int(e.value)) for e in shape]
        for d, (start, step, _) in parts.items():
            axes[d] = int(start.value) + int(step.value) * axes[d]
        return from_elements(values[np.ix_(*axes)] if axes else values, data.dtype)
    node.context.tensor(data)

    def body(*at: Expr) -> Expr:
        indices = [parts[d][0] + parts[d][1] * i if d in parts else i for d, i in enumerate(at)]
        return data.tensor[tuple(indices)]

    return Value(Map(shape, data.dtype, body, "slice"), name=node.name)


@lowers("Slice")
def slice_(node: OpNode) -> Value:
    """Part of each axis: starts, ends and steps may be negative."""
    data = node.input(0)
    given = [_slice_input(node, n, name) for n, name in enumerate(("starts", "ends", "axes", "steps"), start=1)]
    if given[0] is None or given[1] is None:
        raise NotLowered("starts or ends are missing")
    count = known(given[0].shape[0])
    if count is None:
        raise NotLowered("the number of sliced axes is only known at run time")
    starts, ends = given[0], given[1]
    axes = given[2] if given[2] is not None else node.context.constant(np.arange(count))
    steps = given[3] if given[3] is not None else node.context.constant(np.ones(count, dtype="int64"))
    if axes.constant is None or any(v.elements is None for v in (starts, ends, steps)):
        return piece(node, data, _data_parts(node, data, (starts, ends, axes, steps), count))
    first, last, step = (integers(node, v, "slice").items for v in (starts, ends, steps))
    parts: dict[int, tuple[Expr, Expr, Expr]] = {}
    for n, axis in enumerate(constant_axes([int(a) for a in axes.constant.reshape(-1)], data.ndim)):
        parts[axis] = _bounds(data.shape[axis], first[n], last[n], step[n])
    extents = settled(node, [parts[d][2] if d in parts else e for d, e in enumerate(data.shape)])
    return piece(node, data, {d: (start, step, extents[d]) for d, (start, step, _) in parts.items()})


def _slice_input(node: OpNode, position: int, attribute: str) -> Value | None:
    """An input, or the attribute it was before opset 10."""
    value = node.optional(position)
    given = node.attr(attribute)
    return node.context.constant(np.array(given, dtype="int64")) if value is None and given is not None else value


def _data_parts(
    node: OpNode, data: Value, given: tuple[Value, Value, Value, Value], count: int
) -> dict[int, tuple[Expr, Expr, Expr]]:
    """Parts whose starts, ends, steps or axes are data: a small kernel finds the bounds of every axis."""
    rank = data.ndim
    for value in given:
        node.context.tensor(value)
    starts, ends, axes, steps = given

    def chosen(value: Value, d: Expr, default: Expr) -> Expr:
        for n in range(count):
            here = is_axis([i64(axes.tensor[i64(n)])], rank, d)
            default = tirx.Select(here, i64(value.tensor[i64(n)]), default)
        return default

    def vector(body: Callable[[Expr], Expr], name: str) -> Map:
        return Map([rank], "int64", body, name)

    size = vector(lambda d: pick(d, data.shape), "size")
    step = vector(lambda d: chosen(steps, d, i64(1)), "step")
    raw = (vector(lambda d: chosen(starts, d, i64(0)), "start"), vector(lambda d: chosen(ends, d, size[d]), "end"))
    front = [vector(lambda d, r=r: tirx.Select(r[d] < i64(0), r[d] + size[d], r[d]), "front") for r in raw]  # type: ignore[misc]
    last = vector(lambda d: tirx.Select(step[d] > i64(0), size[d], size[d] - 1), "last")
    least = vector(lambda d: tirx.Select(step[d] > i64(0), i64(0), i64(-1)), "least")
    begin = vector(lambda d: tirx.max(tirx.min(tirx.max(front[0][d], i64(0)), last[d]), i64(0)), "begin")
    end = vector(lambda d: tirx.min(tirx.max(front[1][d], least[d]), last[d]), "end")

    def length(d: Expr) -> Expr:
        up = step[d] > i64(0)
        width = tirx.max(tirx.Select(up, step[d], -step[d]), i64(1))
        distance = tirx.Select(up, end[d] - begin[d], begin[d] - end[d])
        return tirx.max(tirx.floordiv(distance + width - 1, width), i64(0))

    results = [Value(begin), Value(step), Value(vector(length, "length"))]
    node.context.realize(results, "bounds")
    first = node.context.runtime_extents(results[0], "slice")
    stride = integers(node, results[1], "slice").items
    extents = named(node, node.context.runtime_extents(results[2], "slice"), "slice")
    return {d: (first[d], stride[d], extents[d]) for d in range(rank)}


def _bounds(extent: Expr, start: Expr, end: Expr, step: Expr) -> tuple[Expr, Expr, Expr]:
    """(first index, step, number of elements) of one axis."""
    stride = known(step)
    if stride == 0:
        raise NotLowered("a slice with step zero")
    first, last = _from_front(start, extent), _from_front(end, extent)
    if stride is not None and stride > 0:
        first, last = _clamp(first, 0, extent), _clamp(last, 0, extent)
    elif stride is not None:
        first, last = _clamp(first, 0, extent - 1), _clamp(last, -1, extent - 1)
    else:
        up = step > i64(0)
        first = choose(up, _clamp(first, 0, extent), _clamp(first, 0, extent - 1))
        last = choose(up, _clamp(last, 0, extent), _clamp(last, -1, extent - 1))
    count = _ceildiv(last - first, step)
    return first, step, simplify(count) if nonnegative(simplify(count)) else simplify(tirx.max(count, i64(0)))


def _ceildiv(length: Expr, step: Expr) -> Expr:
    if known(step) == 1:
        return simplify(length)
    if known(step) is not None and known(step) < 0:  # type: ignore[operator]
        return simplify(tirx.floordiv(-length - step - i64(1), -step))
    if known(step) is not None:
        return simplify(tirx.floordiv(length + step - i64(1), step))
    safe = choose(tirx.EQ(step, i64(0)), 1, step)
    return choose(step > i64(0), tirx.floordiv(length + safe - 1, safe), tirx.floordiv(-length - safe - 1, -safe))


def _from_front(position: Expr, extent: Expr) -> Expr:
    """A position counted from the end when negative."""
    value = known(position)
    if value is not None:
        return position if value >= 0 else simplify(extent + position)
    if nonnegative(position):
        return position
    return choose(position < i64(0), position + extent, position)


def _clamp(position: Expr, low: int, high: Expr) -> Expr:
    value = known(position)
    if value is not None and value >= FAR:
        return simplify(high)
    if value is not None and value <= low:
        return i64(low)
    if value is not None and known(high) is None:
        return simplify(tirx.min(position, high))
    return simplify(tirx.min(tirx.max(position, i64(low)), high))


# -- repeating and rearranging ---------------------------------------------------------------------------------


@lowers("Tile")
def tile(node: OpNode) -> Value:
    """The operand repeated along each axis."""
    data = node.input(0)
    repeats = integers(node, node.input(1), "repeats")
    counts = repeats.items
    if data.elements is not None and repeats.constants is not None:
        return from_elements(np.tile(data.elements, repeats.constants), data.dtype)
    if repeats.data:
        shape = named(node, [e * r for e, r in zip(data.shape, counts, strict=True)], "tile")
        node.context.tensor(data)
        body = lambda *at: data.tensor[tuple(tirx.floormod(i, e) for i, e in zip(at, data.shape, strict=True))]  # noqa: E731
        return Value(Map(shape, data.dtype, body, "tile"), name=node.name)
    node.context.tensor(data)
    spread = [e for pair in zip(counts, data.shape, strict=True) for e in pair]
    wide = Value(Map(spread, data.dtype, lambda *at: data.tensor[tuple(at[1::2])], "tile"), name=node.name)
    return node.context.reshape(wide, [simplify(e * r) for e, r in zip(data.shape, counts, strict=True)])


@lowers("DepthToSpace")
def depth_to_space(node: OpNode) -> Value:
    """Channels moved into blocks of pixels."""
    data, block = node.input(0), node.attr("blocksize")
    n, c, *spatial = data.shape
    rank = len(spatial)
    depth = simplify(tirx.floordiv(c, i64(block**rank)))
    blocks = [i64(block)] * rank
    if node.attr("mode", "DCR") == "DCR":
        split_, channel, first = [n, *blocks, depth, *spatial], 1 + rank, 1
    else:
        split_, channel, first = [n, depth, *blocks, *spatial], 1, 2
    order = [0, channel, *[a for d in range(rank) for a in (2 + rank + d, first + d)]]
    wide = transposed(node, node.context.reshape(data, split_), order)
    return node.context.reshape(wide, [n, depth, *[simplify(s * block) for s in spatial]])


@lowers("SpaceToDepth")
def space_to_depth(node: OpNode) -> Value:
    """Blocks of pixels moved into channels."""
    data, block = node.input(0), node.attr("blocksize")
    n, c, *spatial = data.shape
    rank = len(spatial)
    small = [simplify(tirx.floordiv(s, i64(block))) for s in spatial]
    split_ = [n, c, *[e for s in small for e in (s, i64(block))]]
    inner = [3 + 2 * d for d in range(rank)]
    outer = [2 + 2 * d for d in range(rank)]
    order = [0, *inner, 1, *outer] if node.attr("mode", "DCR") == "DCR" else [0, 1, *inner, *outer]
    wide = transposed(node, node.context.reshape(data, split_), order)
    return node.context.reshape(wide, [n, simplify(c * block**rank), *small])


@lowers("ReverseSequence")
def reverse_sequence(node: OpNode) -> Value:
    """The first ``sequence_lens[b]`` steps of each batch entry in reverse order."""
    data, lengths = node.input(0), node.input(1)
    batch, time = axis_attr(node, data.ndim, 1, "batch_axis"), axis_attr(node, data.ndim, 0, "time_axis")
    for value in (data, lengths):
        node.context.tensor(value)

    def body(*at: Expr) -> Expr:
        length = i64(lengths.tensor[at[batch]])
        step = tirx.Select(at[time] < length, length - 1 - at[time], at[time])
        return data.tensor[(*at[:time], step, *at[time + 1 :])]

    return Value(Map(data.shape, data.dtype, body, "reverse"), name=node.name)


@lowers("Trilu")
def trilu(node: OpNode) -> Value:
    """The upper or lower triangle of each matrix, the rest zero."""
    data = node.input(0)
    offset = node.optional(1)
    k = integers(node, offset, "k").items[0] if offset is not None else i64(0)
    upper = node.attr("upper", 1)
    node.context.tensor(data)

    def body(*at: Expr) -> Expr:
        distance = at[-1] - at[-2]
        keep = distance >= k if upper else distance <= k
        return tirx.Select(keep, data.tensor[at], tirx.const(0, data.dtype))

    return Value(Map(data.shape, data.dtype, body, "trilu"), name=node.name)
