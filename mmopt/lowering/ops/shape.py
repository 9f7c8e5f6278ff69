"""Operators about shapes: they move no data, or read no data at all."""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.expressions import simplify
from mmopt.backends.cpu.loops import product
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import NotLowered, Value, from_elements, known_extents


@lowers("Shape")
def shape(node: OpNode) -> Value:
    """Extents of the input, sliced by ``start`` and ``end``."""
    return from_elements(list(node.input(0).shape)[slice(node.attr("start", 0), node.attr("end"))])


@lowers("Reshape")
def reshape(node: OpNode) -> Value:
    """New extents; 0 copies the input's, -1 takes what is left."""
    data = node.input(0)
    wanted = known_extents(node.input(1), "shape")
    extents: list[Expr] = []
    open_axis: int | None = None
    for axis, extent in enumerate(wanted):
        if isinstance(extent, tirx.IntImm) and int(extent.value) == -1:
            open_axis = axis
            extents.append(tirx.const(1, "int64"))
        elif isinstance(extent, tirx.IntImm) and int(extent.value) == 0 and not node.attr("allowzero", 0):
            extents.append(data.shape[axis])
        else:
            extents.append(extent)
    if open_axis is not None:
        extents[open_axis] = simplify(tirx.floordiv(product(data.shape), product(extents)))
    return node.context.reshape(data, extents)
