"""Quantization: scales and zero points per channel go along with it."""

from __future__ import annotations

import onnx_ir as ir

from mmopt.analysis.axes.group import Role
from mmopt.analysis.axes.rules.registry import axis_rule, present
from mmopt.analysis.axes.space import Space


@axis_rule("QuantizeLinear", "DequantizeLinear")
def linear(node: ir.Node, space: Space) -> None:
    """Per tensor, per axis, or per block of an axis, which is then not cut."""
    x, y = space.operand(node, 0), space.of(node.outputs[0])
    space.same_all(x, y)
    axis = node.attributes.get_int("axis", 1)
    for index in (1, 2):
        if not present(node, index):
            continue
        scale = space.operand(node, index)
        if len(scale) == 1 and len(x) > 0:
            space.same(scale[0], x[axis % len(x)])
            space.reads(node, index, 0, Role.PARAMETER)
        elif len(scale) > 1:
            _blocked(scale, x, axis % len(x), space)


def _blocked(scale: list[int], x: list[int], axis: int, space: Space) -> None:
    for position, (a, b) in enumerate(zip(scale, x, strict=True)):
        if position == axis:
            space.freeze_all((a, b), "blocks of it share a scale")
        else:
            space.same(a, b)


@axis_rule("DynamicQuantizeLinear")
def dynamic(node: ir.Node, space: Space) -> None:
    """The scale comes from all elements, so that leaving some out would change it."""
    space.unknown(node, "DynamicQuantizeLinear takes its scale from all elements")
