"""Normalizations spelled out with statistics over the units that stay.

    m(x) = Σ x · mask / Σ mask;   y = (x - m(x)) / √(m((x - m(x))²) + ε) · scale + bias

over the axes of the normalization; without the mean for RMSNormalization.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import erase, new_node, replace
from mmopt.transforms.prune.constants import Array, Constants


def spell_out(node: ir.Node, masks: Mapping[int, Array], rank: int, dtype: ir.DataType, constants: Constants) -> None:
    """Replace a normalization.

    Args:
        node: The normalization.
        masks: What stays, by axis.
        rank: Rank of its operand.
        dtype: Type of its operand.
        constants: Where new constants go.
    """
    value = node.inputs[0]
    if value is None:
        return
    writer = _Writer(node, dtype, constants)
    if node.op_type == "GroupNormalization":
        result = _group(writer, value, rank, masks[1])
    else:
        result = _plain(writer, value, rank, masks)
    replace(node.outputs[0], result)
    erase([node])


class _Writer:
    """Puts operators in front of the normalization they replace."""

    def __init__(self, node: ir.Node, dtype: ir.DataType, constants: Constants) -> None:
        self.node, self._dtype, self._constants = node, dtype, constants
        self._axes_as_input = _opset(node) >= 18

    def number(self, array: Array | float) -> ir.Value:
        return self._constants.add(np.asarray(array).astype(self._dtype.numpy()), "norm_constant", self._dtype)

    def mask(self, array: Array) -> ir.Value:
        return self._constants.add(array, "norm_mask")

    def op(self, op_type: str, *inputs: ir.Value) -> ir.Value:
        return new_node(op_type, list(inputs), self.node, self._constants.names).outputs[0]

    def mean(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        if self._axes_as_input:
            return self.op("ReduceMean", value, self._constants.integers(list(axes), "norm_axes"))
        attributes = [ir.AttrInt64s("axes", list(axes))]
        return new_node("ReduceMean", [value], self.node, self._constants.names, attributes).outputs[0]

    def reshape(self, value: ir.Value, sizes: Sequence[int]) -> ir.Value:
        return self.op("Reshape", value, self._constants.integers(list(sizes), "norm_sizes"))

    def normalized(self, value: ir.Value, mask: Array, factor: Array | float, axes: Sequence[int]) -> ir.Value:
        """Zero where the mask is false; ``factor`` corrects means over all for means over what stays."""
        stays, zero, correction = self.mask(mask), self.number(0.0), self.number(factor)
        rms = "RMS" in self.node.op_type or self.node.op_type.startswith("Simplified")
        rest = self.op("Where", stays, value, zero)
        if not rms:
            mean = self.op("Mul", self.mean(rest, axes), correction)
            rest = self.op("Where", stays, self.op("Sub", value, mean), zero)
        variance = self.op("Mul", self.mean(self.op("Mul", rest, rest), axes), correction)
        epsilon = self.number(self.node.attributes.get_float("epsilon", 1e-5))
        return self.op("Div", rest, self.op("Sqrt", self.op("Add", variance, epsilon)))


def _opset(node: ir.Node) -> int:
    graph = node.graph
    return int(graph.opset_imports.get("", 1)) if isinstance(graph, ir.Graph) else 1


def _plain(writer: _Writer, value: ir.Value, rank: int, masks: Mapping[int, Array]) -> ir.Value:
    node = writer.node
    instance = node.op_type == "InstanceNormalization"
    first = 2 if instance else node.attributes.get_int("axis", -1) % rank
    mask = np.ones([1] * rank, dtype=bool)
    for axis, stays in masks.items():
        mask = mask & stays.reshape([-1 if k == axis else 1 for k in range(rank)])
    result = writer.normalized(value, mask, float(mask.size / mask.sum()), range(first, rank))
    return _affine(writer, result, [1, -1, *[1] * (rank - 2)] if instance else None)


def _affine(writer: _Writer, result: ir.Value, sizes: Sequence[int] | None) -> ir.Value:
    for op_type, parameter in zip(("Mul", "Add"), writer.node.inputs[1:3], strict=False):
        if parameter is not None:
            shaped = parameter if sizes is None else writer.reshape(parameter, sizes)
            result = writer.op(op_type, result, shaped)
    return result


def _group(writer: _Writer, value: ir.Value, rank: int, mask: Array) -> ir.Value:
    groups = writer.node.attributes.get_int("num_groups", 1)
    members = mask.reshape(1, groups, -1, 1)
    left = np.maximum(members.sum(axis=2, keepdims=True), 1)
    cut = writer.reshape(value, [0, groups, members.shape[2], -1])
    flat = writer.normalized(cut, members, members.shape[2] / left, (2, 3))
    scale = writer.node.inputs[1]
    per_group = scale is not None and scale.shape is not None and scale.shape[0] == groups != mask.size
    if per_group:
        flat = _affine(writer, flat, [1, groups, 1, 1])
    shape = writer.op("Shape", value)
    result = writer.op("Reshape", flat, shape)
    return result if per_group else _affine(writer, result, [1, -1, *[1] * (rank - 2)])
