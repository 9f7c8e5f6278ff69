"""Operators that read elements at positions given as data."""

from __future__ import annotations

import numpy as np
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map
from mmopt.backends.expressions import simplify
from mmopt.lowering.ops.extents import axis_attr, i64, integers, known, named, nonnegative, settled
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import MAX_ELEMENTS, NotLowered, Quantized, Value, from_elements


def bounded(position: Expr, extent: Expr) -> Expr:
    """A position counted from the end when negative; one out of range is moved to the nearest element, never read."""
    value, size = known(position), known(extent)
    if value is not None and size is not None and -size <= value < size:
        return i64(value % size)
    front = position if nonnegative(position) else tirx.Select(position < i64(0), position + extent, position)
    return simplify(tirx.max(tirx.min(front, extent - 1), i64(0)))


@lowers("Gather")
def gather(node: OpNode) -> Value:
    """Slices of the first operand at the indices along an axis."""
    data, indices = node.input(0), node.input(1)
    axis = axis_attr(node, data.ndim, 0)
    shape = (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
    positions, values = indices.elements, data.elements
    if positions is not None and values is not None and all(known(e) is not None for e in positions.flat):
        picked = np.array([int(e.value) for e in positions.flat], dtype=int).reshape(positions.shape)
        if values.size // max(values.shape[axis], 1) * picked.size <= MAX_ELEMENTS:
            return from_elements(np.take(values, picked, axis=axis), data.dtype)
    stored = data.quantized
    if stored is not None and stored.value.constant is not None and indices.constant is None:
        data = _halves(node, stored) or data  # what is looked up is dequantized, and nothing else
    elif data.deferred and not node.context.lazy:
        node.context.realize([data], "operand")
    if indices.deferred and not node.context.lazy:
        node.context.realize([indices], "operand")
    for value in (data, indices):
        node.context.tensor(value)
    single = positions.flat[0] if positions is not None and positions.size == 1 else None
    last = axis + indices.ndim

    def body(*at: Expr) -> Expr:
        position = i64(indices.tensor[tuple(at[axis:last])]) if single is None else single
        return data.tensor[(*at[:axis], bounded(position, data.shape[axis]), *at[last:])]

    return Value(Map(shape, data.dtype, body, "gather"), name=node.name)


def _halves(node: OpNode, known: Quantized) -> Value | None:
    """A table of 4-bit integers, two to a byte in memory, dequantized where it is read.

    Returns:
        ``None`` for other tables: they are read as they are stored.
    """
    data, scale = known.value.constant, known.scale
    if known.value.bits != 4 or data is None or data.ndim != 2 or data.shape[1] % 2 or data.dtype != np.int8:
        return None
    if not known.block or known.axis != 1 or (known.zero is not None and not _is_zero(known.zero)):
        return None
    pairs = lambda table: (table.view(np.uint8)[:, ::2] & 15) | (table.view(np.uint8)[:, 1::2] << 4)  # noqa: E731
    table = node.context.program.packed(known.value, "pairs", pairs)
    node.context.tensor(scale)

    def body(row: Expr, column: Expr) -> Expr:
        byte = table[row, tirx.floordiv(column, i64(2))].astype("int32")
        half = tirx.bitwise_and(tirx.shift_right(byte, (tirx.floormod(column, i64(2)) * 4).astype("int32")), 15)
        signed = tirx.bitwise_xor(half, tirx.const(8, "int32")) - tirx.const(8, "int32")
        return signed.astype("float32") * scale.tensor[row, tirx.floordiv(column, i64(known.block))]

    return Value(Map(data.shape, "float32", body, "table"), name=known.value.name)


def _is_zero(zero: Value) -> bool:
    return zero.constant is not None and not zero.constant.any()


@lowers("GatherElements")
def gather_elements(node: OpNode) -> Value:
    """Elements whose index along one axis is given for each."""
    data, indices = node.input(0), node.input(1)
    axis = axis_attr(node, data.ndim, 0)
    for value in (data, indices):
        node.context.tensor(value)

    def body(*at: Expr) -> Expr:
        position = bounded(i64(indices.tensor[at]), data.shape[axis])
        return data.tensor[(*at[:axis], position, *at[axis + 1 :])]

    return Value(Map(indices.shape, data.dtype, body, "gather"), name=node.name)


@lowers("ArrayFeatureExtractor", domain="ai.onnx.ml")
def array_feature_extractor(node: OpNode) -> Value:
    """Columns along the last axis."""
    data, columns = node.input(0), node.input(1)
    if data.ndim == 1:
        data = node.context.reshape(data, [i64(1), data.shape[0]])
    for value in (data, columns):
        node.context.tensor(value)
    first = (i64(0),) * (columns.ndim - 1)
    body = lambda *at: data.tensor[(*at[:-1], bounded(i64(columns.tensor[(*first, at[-1])]), data.shape[-1]))]  # noqa: E731
    return Value(Map([*data.shape[:-1], columns.shape[-1]], data.dtype, body, "columns"), name=node.name)


@lowers("GatherND")
def gather_nd(node: OpNode) -> Value:
    """Slices at index tuples along the last axis of the second operand."""
    data, indices = node.input(0), node.input(1)
    batch = node.attr("batch_dims", 0)
    depth = known(indices.shape[-1])
    if depth is None:
        raise NotLowered("the length of the index tuples is only known at run time")
    outer = indices.ndim - 1
    shape = (*indices.shape[:-1], *data.shape[batch + depth :])
    for value in (data, indices):
        node.context.tensor(value)

    def body(*at: Expr) -> Expr:
        tuple_ = [i64(indices.tensor[(*at[:outer], i64(n))]) for n in range(depth)]
        inner = [bounded(t, data.shape[batch + n]) for n, t in enumerate(tuple_)]
        return data.tensor[(*at[:batch], *inner, *at[outer:])]

    return Value(Map(shape, data.dtype, body, "gather"), name=node.name)


@lowers("OneHot")
def one_hot(node: OpNode) -> Value:
    """``on`` where the position along the new axis equals the index, ``off`` elsewhere."""
    indices, depth, values = node.input(0), node.input(1), node.input(2)
    if "float" in depth.dtype and depth.constant is None:
        tensor = node.context.tensor(depth)
        depth = Value(Map(depth.shape, "int64", lambda *at: tensor[tuple(at)].astype("int64"), "depth"))
    elif depth.constant is not None:
        depth = node.context.constant(depth.constant.astype("int64"))
    size = integers(node, depth, "depth")
    axis = node.attr("axis", -1)
    axis += indices.ndim + 1 if axis < 0 else 0
    shape = [*indices.shape[:axis], size.items[0], *indices.shape[axis:]]
    shape = named(node, shape, "depth") if size.data else settled(node, shape)
    for value in (indices, values):
        node.context.tensor(value)

    def body(*at: Expr) -> Expr:
        position = indices.tensor[(*at[:axis], *at[axis + 1 :])].astype("int64")
        hot = tirx.Select(position < i64(0), position + shape[axis], position)
        return tirx.Select(tirx.EQ(hot, at[axis]), values.tensor[i64(1)], values.tensor[i64(0)])

    return Value(Map(shape, values.dtype, body, "one_hot"), name=node.name)
