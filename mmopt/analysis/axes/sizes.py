"""Follows sizes of axes through the arithmetic of shapes.

``Shape`` of a tensor that is cut gives other numbers. Where they end up as the sizes of another tensor, these are known
and written down. Where anything else is computed from them, nothing says what it should become: the axis is frozen.
"""

from __future__ import annotations

import onnx_ir as ir

from mmopt.analysis.axes.space import Space
from mmopt.analysis.shape_rules import ONNX_DOMAINS

_PLUMBING = frozenset({"Cast", "Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Unsqueeze"})
_ARITHMETIC = frozenset({"Abs", "Add", "Div", "Max", "Min", "Mod", "Mul", "Neg", "Sub"})
_TARGETS = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0, "Resize": 3}

Axis = tuple[ir.Value, int]
"""An axis of a tensor."""

Origins = list[frozenset[Axis]]
"""Whose sizes went into each element of a tensor of sizes."""


def follow_sizes(graph: ir.Graph, space: Space) -> None:
    """Freeze axes whose sizes end up in anything but the sizes of another tensor."""
    known: dict[ir.Value, Origins] = {}
    for node in graph:
        _visit(node, known, space)


def origins_of(graph: ir.Graph, space: Space) -> dict[ir.Value, Origins]:
    """Whose sizes went into the elements of tensors of sizes."""
    known: dict[ir.Value, Origins] = {}
    for node in graph:
        _follow(node, known, space)
    return known


def _visit(node: ir.Node, known: dict[ir.Value, Origins], space: Space) -> None:
    if node.domain in ONNX_DOMAINS and node.op_type == "Size" and node.inputs[0] is not None:
        space.freeze_all(space.of(node.inputs[0]), "Size counts its elements")
    if _follow(node, known, space):
        return
    for index, value in enumerate(node.inputs):
        if value is not None and value in known and _TARGETS.get(node.op_type) != index:
            for origin, axis in {pair for pairs in known[value] for pair in pairs}:
                space.freeze(space.of(origin)[axis], f"{node.op_type} computes with its size")


def _follow(node: ir.Node, known: dict[ir.Value, Origins], space: Space) -> bool:
    """Whether the results of an operator are tensors of sizes, whose origins are then known."""
    if node.domain not in ONNX_DOMAINS or not node.inputs:
        return False
    first = node.inputs[0]
    if node.op_type == "Shape" and first is not None:
        every: Origins = [frozenset({(first, axis)}) for axis in range(len(space.of(first)))]
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(every))
        known[node.outputs[0]] = every[start:end]
        return True
    tracked = [index for index, value in enumerate(node.inputs) if value is not None and value in known]
    result = None
    if node.op_type in _ARITHMETIC and tracked:
        result = _computed(node, known, space)
    elif node.op_type in _PLUMBING and tracked and (tracked == [0] or node.op_type == "Concat"):
        result = _moved(node, known, space)
    known.update(result or {})
    return result is not None


def _computed(node: ir.Node, known: dict[ir.Value, Origins], space: Space) -> dict[ir.Value, Origins] | None:
    length = _length(node.outputs[0], space)
    if length is None:
        return None
    result: Origins = [frozenset()] * length
    for value in node.inputs:
        if value is None or value not in known:
            continue
        if len(known[value]) not in (1, length):
            return None
        result = [a | known[value][k if len(known[value]) > 1 else 0] for k, a in enumerate(result)]
    return {node.outputs[0]: result}


def _length(value: ir.Value | None, space: Space) -> int | None:
    """Number of elements of a tensor of rank 0 or 1."""
    shape = space.facts.shape(value) if value is not None else None
    if shape is None or len(shape) > 1:
        return None
    size = shape[0] if shape else 1
    return size if isinstance(size, int) else None


def _moved(node: ir.Node, known: dict[ir.Value, Origins], space: Space) -> dict[ir.Value, Origins] | None:
    """Origins of the results of an operator that only moves numbers."""
    if node.op_type == "Concat":
        return _joined(node, known, space)
    first = known[node.inputs[0]] if node.inputs[0] is not None else []
    if node.op_type == "Split":
        return _split(node, first, space)
    if node.op_type == "Gather":
        indices = space.integers(node, 1)
        return None if indices is None else {node.outputs[0]: [first[i] for i in indices]}
    if node.op_type == "Slice":
        bounds = [space.integers(node, index) for index in (1, 2, 4) if index < len(node.inputs)]
        if any(not bound for bound in bounds):
            return None
        return {node.outputs[0]: first[slice(*(bound[0] for bound in bounds if bound))]}
    return {node.outputs[0]: first} if _length(node.outputs[0], space) == len(first) else None


def _joined(node: ir.Node, known: dict[ir.Value, Origins], space: Space) -> dict[ir.Value, Origins] | None:
    joined: Origins = []
    for value in node.inputs:
        length = _length(value, space)
        if value is None or length is None:
            return None
        joined += known.get(value, [frozenset()] * length)
    return {node.outputs[0]: joined}


def _split(node: ir.Node, first: Origins, space: Space) -> dict[ir.Value, Origins] | None:
    result: dict[ir.Value, Origins] = {}
    start = 0
    for output in node.outputs:
        length = _length(output, space)
        if length is None:
            return None
        result[output] = first[start : start + length]
        start += length
    return result
