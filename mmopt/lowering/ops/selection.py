"""Operators whose results depend on the order or the truth of elements: sorting, selecting, and sizes that are data."""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import SUM, Map, Reduction, Tensor
from mmopt.backends.cpu.kernels.scan import Scan
from mmopt.backends.cpu.kernels.scatter import Positions, Scatter
from mmopt.backends.cpu.kernels.sort import Sort
from mmopt.backends.cpu.kernels.suppress import Limits, Suppress
from mmopt.backends.cpu.loops import product, split_index
from mmopt.backends.expressions import simplify
from mmopt.lowering.ops.elementwise import truth
from mmopt.lowering.ops.extents import Integers, axis_attr, i64, integers, named, scalar, settled
from mmopt.lowering.ops.movement import transposed
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import Value


@lowers("TopK")
def top_k(node: OpNode) -> list[Value]:
    """The ``k`` largest or smallest elements along an axis in order, and their positions; the first of equals first."""
    data = node.input(0)
    axis = axis_attr(node, data.ndim, -1)
    wanted = node.optional(1)
    count = integers(node, wanted, "k") if wanted is not None else Integers([i64(node.attr("k"))], data=False)
    shape = [*data.shape[:axis], count.items[0], *data.shape[axis + 1 :]]
    shape = named(node, shape, "k") if count.data else settled(node, shape)
    last = [*[d for d in range(data.ndim) if d != axis], axis]
    keys = transposed(node, data, last)
    outer = keys.shape[:-1]
    rows = node.context.reshape(keys, [simplify(product(outer)), keys.shape[-1], i64(1)])
    node.context.realize([rows], "keys")
    order = Value(Sort(rows.tensor, descending=bool(node.attr("largest", 1))).output)
    node.context.realize([order], "sort")
    places = node.context.reshape(order, keys.shape)

    def position(*at: Expr) -> Expr:
        return places.tensor[(*at[:axis], *at[axis + 1 :], at[axis])]

    def value(*at: Expr) -> Expr:
        return data.tensor[(*at[:axis], position(*at), *at[axis + 1 :])]

    node.context.tensor(data)
    values = Value(Map(shape, data.dtype, value, "top"), name=node.name)
    return [values, Value(Map(shape, "int64", position, "positions"), name=node.name)]


def selected(node: OpNode, mask: Value, hint: str, stated: int | None) -> Value:
    """Positions of the true elements of a 1-D mask; how many is known at run time."""
    node.context.realize([mask], "mask")
    tensor = node.context.tensor(mask)
    counted = Value(Reduction([1], mask.shape, ("int64",), lambda _, i: tensor[i].astype("int64"), SUM))
    (count,) = named(node, node.context.runtime_extents(counted, hint), hint, [stated])
    found = Value(Positions(tensor, count).output)
    node.context.realize([found], "positions")
    return found


def _stated(node: OpNode, axis: int, position: int = 0) -> int | None:
    shape = node.node.outputs[position].shape
    extent = shape[axis] if shape is not None and len(shape) > axis else None
    return extent if isinstance(extent, int) else None


@lowers("Compress")
def compress(node: OpNode) -> Value:
    """Slices along an axis (or elements of the flattened operand) where the condition is true."""
    data, condition = node.input(0), node.input(1)
    if node.attr("axis") is None:
        data = node.context.reshape(data, [simplify(product(data.shape))])
    axis = axis_attr(node, data.ndim, 0)
    found = selected(node, condition, "compress", _stated(node, axis))
    node.context.tensor(data)
    shape = [*data.shape[:axis], found.shape[0], *data.shape[axis + 1 :]]

    def body(*at: Expr) -> Expr:
        return data.tensor[(*at[:axis], found.tensor[at[axis]], *at[axis + 1 :])]

    return Value(Map(shape, data.dtype, body, "compress"), name=node.name)


@lowers("NonZero")
def non_zero(node: OpNode) -> Value:
    """Coordinates of the elements that are not zero, one column each."""
    data = node.input(0)
    flat = node.context.reshape(data, [simplify(product(data.shape))])
    tensor = node.context.tensor(flat)
    mask = Value(Map(flat.shape, "bool", lambda i: truth(tensor[i]), "mask"))
    found = selected(node, mask, "nonzero", _stated(node, 1))
    rank = data.ndim

    def body(axis: Expr, n: Expr) -> Expr:
        coordinates = split_index(found.tensor[n], data.shape)
        chosen = coordinates[-1]
        for d in range(rank - 2, -1, -1):
            chosen = tirx.Select(tirx.EQ(axis, i64(d)), coordinates[d], chosen)
        return chosen

    shape = [i64(rank), found.shape[0]]
    return Value(Map(shape, "int64", body if rank else lambda *_: i64(0), "nonzero"), name=node.name)


@lowers("Unique")
def unique(node: OpNode) -> list[Value]:
    """Different slices along an axis (or elements), where each is first, which one each is, and how often it comes."""
    data = node.input(0)
    axis = axis_attr(node, data.ndim, 0) if node.attr("axis") is not None else None
    if axis is None:
        data, axis = node.context.reshape(data, [simplify(product(data.shape))]), 0
    count = data.shape[axis]
    keys = _slices(node, data, axis)
    order = _sorted(node, keys)
    start = _realized(node, _group_starts(node, keys, order), "starts")
    heads = selected(node, start, "unique", _stated(node, 0, 1) if node.n_outputs > 1 else None)
    first = _realized(
        node, Value(Map(heads.shape, "int64", lambda g: order.tensor[i64(0), heads.tensor[g]], "first")), "first"
    )
    rank = _ranks(node, first, in_order=bool(node.attr("sorted", 1)))
    ordered = _scattered(node, rank, first)
    group = _groups(node, start, order, rank, count)
    repeats = _histogram(node, group, heads.shape[0])

    def picked(*at: Expr) -> Expr:
        return data.tensor[(*at[:axis], ordered.tensor[at[axis]], *at[axis + 1 :])]

    shape = [*data.shape[:axis], heads.shape[0], *data.shape[axis + 1 :]]
    return [Value(Map(shape, data.dtype, picked, "unique"), name=node.name), ordered, group, repeats][: node.n_outputs]


def _realized(node: OpNode, value: Value, hint: str) -> Value:
    node.context.realize([value], hint)
    return value


def _slices(node: OpNode, data: Value, axis: int) -> Value:
    """``[1, n, length]``: the slices along ``axis`` as rows."""
    order = [axis, *[d for d in range(data.ndim) if d != axis]]
    moved = transposed(node, data, order)
    length = simplify(product(moved.shape[1:]))
    return _realized(node, node.context.reshape(moved, [i64(1), data.shape[axis], length]), "slices")


def _sorted(node: OpNode, keys: Value) -> Value:
    return _realized(node, Value(Sort(keys.tensor, descending=False).output), "sort")


def _group_starts(node: OpNode, keys: Value, order: Value) -> Value:
    """Whether each item in sorted order differs from the one in front of it."""
    items, length = keys.shape[1], keys.shape[2]

    def differs(i: Expr, e: Expr) -> Expr:
        here, before = order.tensor[i64(0), i], order.tensor[i64(0), tirx.max(i - 1, i64(0))]
        changed = tirx.NE(keys.tensor[i64(0), here, e], keys.tensor[i64(0), before, e])
        return tirx.Select(tirx.any(tirx.EQ(i, i64(0)), changed), i64(1), i64(0))

    changes = Reduction([items], [length], ("int64",), differs, SUM)
    return Value(Map([items], "bool", lambda i: changes[i] > i64(0), "start"))


def _ranks(node: OpNode, first: Value, *, in_order: bool) -> Value:
    """Place of each group in the result: in sorted order, or by where it comes first."""
    if in_order:
        return _realized(node, Value(Map(first.shape, "int64", lambda g: g, "rank")), "rank")
    keys = _realized(node, node.context.reshape(first, [i64(1), first.shape[0], i64(1)]), "keys")
    order = _sorted(node, keys)
    numbers = Map(first.shape, "int64", lambda g: g, "numbers")
    return _inverse(node, Value(Map(first.shape, "int64", lambda g: order.tensor[i64(0), g], "order")), Value(numbers))


def _inverse(node: OpNode, places: Value, values: Value) -> Value:
    """A tensor with ``values[i]`` at ``places[i]``."""
    node.context.realize([places, values], "places")
    empty = Map(places.shape, "int64", lambda _: i64(0), "zeros")
    nest = Scatter(empty, values.tensor, [places.tensor], lambda at: (places.tensor[at[0]],), None)
    return _realized(node, Value(nest.output), "inverse")


def _scattered(node: OpNode, rank: Value, first: Value) -> Value:
    return _inverse(node, rank, first)


def _groups(node: OpNode, start: Value, order: Value, rank: Value, count: Expr) -> Value:
    """Which result slice each slice of the operand is."""
    marks = Map([i64(1), count, i64(1)], "int64", lambda _, i, __: start.tensor[i].astype("int64"), "marks")
    upto = Scan(marks, product=False, exclusive=False, reverse=False, accumulator="int64").output
    running = _realized(node, Value(upto), "groups")
    number = Value(Map([count], "int64", lambda i: rank.tensor[running.tensor[i64(0), i, i64(0)] - 1], "group"))
    places = Value(Map([count], "int64", lambda i: order.tensor[i64(0), i], "places"))
    return _inverse(node, places, number)


def _histogram(node: OpNode, group: Value, groups: Expr) -> Value:
    empty = Map([groups], "int64", lambda _: i64(0), "zeros")
    ones = Map(group.shape, "int64", lambda _: i64(1), "ones")
    nest = Scatter(empty, ones, [group.tensor], lambda at: (group.tensor[at[0]],), lambda a, b: a + b)
    return Value(nest.output, name=node.name)


@lowers("NonMaxSuppression")
def non_max_suppression(node: OpNode) -> Value:
    """Boxes that overlap no better box of their class too much."""
    boxes, scores = node.input(0), node.input(1)
    batches, classes, count = scores.shape
    node.context.realize([boxes, scores], "boxes")
    keys = node.context.reshape(scores, [simplify(batches * classes), count, i64(1)])
    node.context.realize([keys], "keys")
    order = _realized(node, Value(Sort(keys.tensor, descending=True).output), "sort")
    limits = Limits(
        _scalar(node, 2), _scalar(node, 3), _scalar(node, 4), centres=bool(node.attr("center_point_box", 0))
    )
    nest = Suppress(
        node.context.tensor(boxes),
        node.context.tensor(scores),
        order.tensor,
        limits,
    )
    rows, found = Value(nest.rows), Value(nest.count)
    node.context.realize([rows, found], "suppress")
    (kept,) = named(node, node.context.runtime_extents(found, "boxes"), "boxes", [_stated(node, 0)])
    return Value(Map([kept, i64(3)], "int64", lambda r, c: rows.tensor[r, c], "selected"), name=node.name)


def _scalar(node: OpNode, position: int) -> Tensor | None:
    value = node.optional(position)
    if value is None:
        return None
    return node.context.tensor(scalar(node, value))
