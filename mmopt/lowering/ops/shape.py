"""Operators about shapes: they move no data, or read no data at all."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map
from mmopt.backends.cpu.loops import product
from mmopt.backends.expressions import simplify
from mmopt.lowering.ops.elementwise import broadcast_shape, read
from mmopt.lowering.ops.extents import (
    Integers,
    computed,
    constant_axes,
    declared,
    i64,
    integers,
    known,
    named,
    optional_integers,
    pick,
    quotient,
    settled,
    with_axes,
    without_axes,
)
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import MAX_ELEMENTS, NotLowered, Value, dtype_name, from_elements


@lowers("Shape")
def shape(node: OpNode) -> Value:
    """Extents of the input, sliced by ``start`` and ``end``."""
    return from_elements(list(node.input(0).shape)[slice(node.attr("start", 0), node.attr("end"))])


@lowers("Size")
def size(node: OpNode) -> Value:
    """Number of elements."""
    return from_elements(simplify(product(node.input(0).shape)))


@lowers("Identity")
def identity(node: OpNode) -> Value:
    """The operand."""
    return node.input(0)


@lowers("OptionalHasElement")
def optional_has_element(node: OpNode) -> Value:
    """Whether the operand is there: a tensor always is."""
    return node.context.constant(np.array(node.optional(0) is not None))


@lowers("OptionalGetElement")
def optional_get_element(node: OpNode) -> Value:
    """The operand, which is a tensor."""
    return node.input(0)


@lowers("Reshape")
def reshape(node: OpNode) -> Value:
    """New extents; 0 copies the input's, -1 takes what is left."""
    data = node.input(0)
    wanted = optional_integers(node, 1, "shape")
    if wanted is None:
        raise NotLowered("the shape is missing")
    if wanted.data:
        return node.context.reshape(data, _data_extents(node, data, wanted))
    return node.context.reshape(data, settled(node, _extents(node, data, wanted)))


def _extents(node: OpNode, data: Value, wanted: Integers) -> list[Expr]:
    extents: list[Expr] = []
    open_axis: int | None = None
    for axis, extent in enumerate(wanted.items):
        if known(extent) == -1:
            open_axis = axis
            extents.append(i64(1))
        elif known(extent) == 0 and not node.attr("allowzero", 0):
            extents.append(data.shape[axis])
        else:
            extents.append(extent)
    if open_axis is not None:
        extents[open_axis] = quotient(data.shape, [e for n, e in enumerate(extents) if n != open_axis])
    return extents


def _data_extents(node: OpNode, data: Value, wanted: Integers) -> list[Expr]:
    """Extents where -1 and 0 are only seen at run time."""
    count, copies = len(wanted.items), not node.attr("allowzero", 0)

    def given(axis: Expr) -> Expr:
        extent = pick(axis, wanted.items)
        if not copies or not data.ndim:
            return extent
        return tirx.Select(tirx.EQ(extent, i64(0)), pick(axis, data.shape), extent)

    sizes = Map([count], "int64", given, "given")

    def body(axis: Expr) -> Expr:
        rest = product([tirx.max(sizes[i64(d)], i64(1)) for d in range(count)])
        left = tirx.floordiv(product(data.shape), rest)
        return tirx.Select(tirx.EQ(sizes[axis], i64(-1)), left, sizes[axis])

    return named(node, computed(node, count, body, "reshape"), "reshape")


@lowers("Flatten")
def flatten(node: OpNode) -> Value:
    """A matrix: axes before ``axis``, and the others."""
    data = node.input(0)
    axis = node.attr("axis", 1)
    axis += data.ndim if axis < 0 else 0
    return node.context.reshape(data, [simplify(product(data.shape[:axis])), simplify(product(data.shape[axis:]))])


@lowers("Squeeze")
def squeeze(node: OpNode) -> Value:
    """Axes of extent one are dropped: those given, or all."""
    data = node.input(0)
    axes = optional_integers(node, 1, "axes")
    if axes is None:
        wide = [d for d in data.shape if known(d) != 1]
        stated = declared(node)
        if any(known(d) is None for d in wide) and (stated is None or len(stated) != len(wide)):
            raise NotLowered("which axes are one is only known at run time")
        return node.context.reshape(data, wide)
    if axes.constants is None:
        return node.context.reshape(data, without_axes(node, data.shape, axes.items, "squeeze"))
    dropped = set(constant_axes(axes.constants, data.ndim))
    return node.context.reshape(data, [d for n, d in enumerate(data.shape) if n not in dropped])


@lowers("Unsqueeze")
def unsqueeze(node: OpNode) -> Value:
    """Axes of extent one are inserted."""
    data = node.input(0)
    axes = optional_integers(node, 1, "axes")
    if axes is None:
        raise NotLowered("the axes are missing")
    if axes.constants is None:
        return node.context.reshape(data, with_axes(node, data.shape, axes.items, "unsqueeze"))
    rank = data.ndim + len(axes.items)
    new = set(constant_axes(axes.constants, rank))
    rest = iter(data.shape)
    return node.context.reshape(data, [i64(1) if n in new else next(rest) for n in range(rank)])


@lowers("Expand")
def expand(node: OpNode) -> Value:
    """The operand broadcast to a shape, and the shape to the operand."""
    data = node.input(0)
    wanted = integers(node, node.input(1), "expand")
    extents = broadcast_shape([data.shape, wanted.items])
    shape_ = named(node, extents, "expand") if wanted.data else settled(node, extents)
    if data.elements is not None and all(known(e) is not None for e in shape_):
        sizes = [int(e.value) for e in shape_]
        if int(np.prod(sizes)) <= MAX_ELEMENTS:
            return from_elements(np.broadcast_to(data.elements, sizes), data.dtype)
    node.context.tensor(data)
    return Value(Map(shape_, data.dtype, lambda *at: read(data, at, shape_), "expand"), name=node.name)


@lowers("ConstantOfShape")
def constant_of_shape(node: OpNode) -> Value:
    """One value everywhere."""
    wanted = integers(node, node.input(0), "shape")
    fill = node.attr("value")
    value = np.zeros(1, dtype="float32") if fill is None else np.asarray(fill).reshape(-1)
    return filled(node, named(node, wanted.items, "shape") if wanted.data else wanted.items, value)


def filled(node: OpNode, extents: list[Expr], value: np.ndarray) -> Value:
    """A tensor of ``extents`` whose elements all are ``value``."""
    dtype = str(value.dtype)
    sizes = [known(e) for e in extents]
    if None not in sizes and value.dtype.kind in "iub" and int(np.prod(sizes)) <= MAX_ELEMENTS:  # type: ignore[arg-type]
        return node.context.constant(np.full(sizes, value[0], dtype=value.dtype))  # type: ignore[arg-type]
    constant_ = tirx.const(value[0].item(), dtype)
    return Value(Map(extents, dtype, lambda *_: constant_, "fill"), name=node.name)


@lowers("Constant")
def constant(node: OpNode) -> Value:
    """A constant written in the graph."""
    for name, dtype in (
        ("value_int", "int64"),
        ("value_ints", "int64"),
        ("value_float", "float32"),
        ("value_floats", "float32"),
    ):
        if node.attr(name) is not None:
            return node.context.constant(np.array(node.attr(name), dtype=dtype), node.name)
    attribute = node.node.attributes.get("value")
    if attribute is None or not isinstance(attribute.value, ir.TensorProtocol):
        raise NotLowered("a constant that is no dense tensor of numbers")
    dtype_name(attribute.value.dtype)
    return node.context.constant(np.asarray(attribute.value.numpy()), node.name)


@lowers("Dropout")
def dropout(node: OpNode) -> list[Value]:
    """Nothing is dropped outside training."""
    data = node.input(0)
    training, ratio = node.optional(2), node.optional(1)
    if training is not None and (training.constant is None or bool(training.constant.reshape(-1)[0])):
        chance = ratio.constant if ratio is not None else np.array(0.5)
        if chance is None or float(chance.reshape(-1)[0]) != 0:
            raise NotLowered("dropout in training mode draws random numbers")
    kept = Value(Map(data.shape, "bool", lambda *_: tirx.const(True, "bool"), "kept"), name=node.name)
    return [data, kept][: node.n_outputs]
