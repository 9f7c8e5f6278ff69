"""Follows sizes of axes through the arithmetic of shapes.

``Shape`` of a tensor that is cut gives other numbers. Where such a number becomes the same axis of a reshaped tensor,
all is well. Where it is computed with, nothing says what the result should be, and the axis is frozen.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from mmopt.analysis.axes.space import Space
from mmopt.analysis.shape_rules import ONNX_DOMAINS

_PLUMBING = frozenset({"Cast", "Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Unsqueeze"})
_TARGETS = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0, "Resize": 3}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where one number of a tensor of sizes comes from.

    Attributes:
        value: The tensor whose size it is.
        axis: The axis.
    """

    value: ir.Value
    axis: int


Origins = list[Origin | None]
"""For every element; ``None`` for what no size of a tensor went into."""


def follow_sizes(graph: ir.Graph, space: Space) -> None:
    """Freeze axes whose sizes are computed with."""
    known: dict[ir.Value, Origins] = {}
    for node in graph:
        _visit(node, known, space)


def origins(graph: ir.Graph, space: Space) -> dict[ir.Value, Origins]:
    """Where the elements of tensors of sizes come from."""
    known: dict[ir.Value, Origins] = {}
    for node in graph:
        _visit(node, known, space, freezing=False)
    return known


def _visit(node: ir.Node, known: dict[ir.Value, Origins], space: Space, *, freezing: bool = True) -> None:
    if node.domain in ONNX_DOMAINS and node.op_type == "Shape" and node.inputs[0] is not None:
        value = node.inputs[0]
        every: Origins = [Origin(value, axis) for axis in range(len(space.of(value)))]
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(every))
        known[node.outputs[0]] = every[start:end]
        return
    if node.op_type == "Size" and node.inputs[0] is not None:
        space.freeze_all(space.of(node.inputs[0]), "Size counts its elements") if freezing else None
        return
    tracked = [(index, v) for index, v in enumerate(node.inputs) if v is not None and v in known]
    if not tracked:
        return
    if node.domain in ONNX_DOMAINS and node.op_type in _PLUMBING and _flows(node, tracked[0][0]):
        result = _moved(node, known, space)
        if result is not None:
            known.update(result)
            return
    for index, value in tracked:
        if freezing and _TARGETS.get(node.op_type) != index:
            for origin in known[value]:
                if origin is not None:
                    axis = space.of(origin.value)[origin.axis]
                    space.freeze(axis, f"{node.op_type} computes with its size")


def _flows(node: ir.Node, index: int) -> bool:
    """Whether the tracked operand is data, not a target or an index."""
    return index == 0 or node.op_type == "Concat"


def _moved(node: ir.Node, known: dict[ir.Value, Origins], space: Space) -> dict[ir.Value, Origins] | None:
    """Origins of the results of an operator that only moves numbers."""
    first = known.get(node.inputs[0]) if node.inputs[0] is not None else None
    if node.op_type == "Concat":
        joined: Origins = []
        for value in node.inputs:
            if value is None:
                return None
            shape = space.facts.shape(value)
            length = shape[0] if shape and len(shape) == 1 else None
            if not isinstance(length, int):
                return None
            joined += known.get(value, [None] * length)
        return {node.outputs[0]: joined}
    if first is None:
        return None
    if node.op_type == "Gather":
        indices = space.integers(node, 1)
        return None if indices is None else {node.outputs[0]: [first[i] for i in indices]}
    if node.op_type == "Slice":
        starts, ends = space.integers(node, 1), space.integers(node, 2)
        steps = space.integers(node, 4) if len(node.inputs) > 4 else [1]
        if not starts or not ends or not steps:
            return None
        return {node.outputs[0]: first[starts[0] : ends[0] : steps[0]]}
    if node.op_type == "Split":
        return _split(node, first, space)
    return {node.outputs[0]: first}


def _split(node: ir.Node, origins_in: Origins, space: Space) -> dict[ir.Value, Origins] | None:
    result: dict[ir.Value, Origins] = {}
    start = 0
    for output in node.outputs:
        shape = space.facts.shape(output)
        length = shape[0] if shape else None
        if not isinstance(length, int):
            return None
        result[output] = origins_in[start : start + length]
        start += length
    return result
