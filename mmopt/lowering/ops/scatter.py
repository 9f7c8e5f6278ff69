"""Operators that write elements at positions given as data."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map
from mmopt.backends.cpu.kernels.scatter import Merge, Scatter
from mmopt.backends.cpu.loops import product
from mmopt.backends.expressions import simplify
from mmopt.lowering.ops.elementwise import larger, smaller, widened
from mmopt.lowering.ops.extents import axis_attr, i64, integers, known, named, settled
from mmopt.lowering.ops.indexing import bounded
from mmopt.lowering.ops.padding import padded
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import NotLowered, Value

_MERGES: dict[str, Merge | None] = {
    "none": None,
    "add": widened(lambda a, b: a + b),
    "mul": widened(lambda a, b: a * b),
    "max": widened(larger),
    "min": widened(smaller),
}


def _merge(node: OpNode) -> Merge | None:
    name = node.attr("reduction", "none")
    if name not in _MERGES:
        raise NotLowered(f"scatter reduction {name}")
    return _MERGES[name]


@lowers("ScatterElements", "Scatter")
def scatter_elements(node: OpNode) -> Value:
    """Elements whose index along one axis is given for each."""
    data, indices, updates = (node.input(n) for n in range(3))
    axis = axis_attr(node, data.ndim, 0)
    where = node.context.tensor(indices)

    def target(at: Sequence[Expr]) -> tuple[Expr, ...]:
        return (*at[:axis], bounded(i64(where[tuple(at)]), data.shape[axis]), *at[axis + 1 :])

    nest = Scatter(node.context.tensor(data), node.context.tensor(updates), [where], target, _merge(node))
    return Value(nest.output, name=node.name)


@lowers("ScatterND")
def scatter_nd(node: OpNode) -> Value:
    """Slices at index tuples along the last axis of the second operand."""
    data, indices, updates = (node.input(n) for n in range(3))
    depth = known(indices.shape[-1])
    if depth is None:
        raise NotLowered("the length of the index tuples is only known at run time")
    where, outer = node.context.tensor(indices), indices.ndim - 1

    def target(at: Sequence[Expr]) -> tuple[Expr, ...]:
        chosen = [bounded(i64(where[(*at[:outer], i64(n))]), data.shape[n]) for n in range(depth)]
        return (*chosen, *at[outer:])

    slices = updates.ndim - outer
    nest = Scatter(node.context.tensor(data), node.context.tensor(updates), [where], target, _merge(node), slices)
    return Value(nest.output, name=node.name)


@lowers("TensorScatter")
def tensor_scatter(node: OpNode) -> Value:
    """New entries written into a cache from a position given for each batch entry, round the end when circular."""
    cache, update, starts = node.input(0), node.input(1), node.optional(2)
    axis = axis_attr(node, cache.ndim, -2)
    circular = node.attr("mode", "linear") == "circular"
    where = node.context.tensor(starts) if starts is not None else None

    def target(at: Sequence[Expr]) -> tuple[Expr, ...]:
        start = i64(where[at[0]]) if where is not None else i64(0)
        position = start + at[axis]
        place = tirx.floormod(position, cache.shape[axis]) if circular else bounded(position, cache.shape[axis])
        return (*at[:axis], place, *at[axis + 1 :])

    reads = [where] if where is not None else []
    slices = cache.ndim - axis - 1
    nest = Scatter(node.context.tensor(cache), node.context.tensor(update), reads, target, None, slices)
    return Value(nest.output, name=node.name)


@lowers("MaxUnpool")
def max_unpool(node: OpNode) -> Value:
    """Elements put back where max pooling took them from, zeros elsewhere."""
    data, indices, wanted = node.input(0), node.input(1), node.optional(2)
    shape = _unpooled_shape(node, data)
    if wanted is None:
        shape = settled(node, shape)
    total, count = simplify(product(shape)), simplify(product(data.shape))
    values, where = node.context.reshape(data, [count]), node.context.reshape(indices, [count])
    node.context.realize([values, where], "unpool")
    empty = Map([total], data.dtype, lambda _: tirx.const(0, data.dtype), "zeros")
    target = lambda at: (bounded(i64(where.tensor[at[0]]), total),)  # noqa: E731
    done = Value(Scatter(empty, values.tensor, [where.tensor], target, None).output, name=node.name)
    node.context.realize([done], node.op_type)
    small = node.context.reshape(done, shape)
    if wanted is None:
        return small
    sizes = integers(node, wanted, "shape")
    outer = named(node, sizes.items, "shape") if sizes.data else settled(node, sizes.items)
    return padded(node, small, [i64(0)] * data.ndim, outer, tirx.const(0, data.dtype))


def _unpooled_shape(node: OpNode, data: Value) -> list[Expr]:
    kernel = node.attr("kernel_shape")
    strides = node.attr("strides") or [1] * len(kernel)
    pads = node.attr("pads") or [0] * (2 * len(kernel))
    shape = list(data.shape[:2])
    for d, extent in enumerate(data.shape[2:]):
        shape.append(simplify((extent - 1) * strides[d] + (kernel[d] - pads[d] - pads[len(kernel) + d])))
    return shape
