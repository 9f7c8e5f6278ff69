"""Puts QuantizeLinear and DequantizeLinear into a graph."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from mmopt.transforms.canonicalize import editing
from mmopt.transforms.canonicalize.editing import Array, Names
from mmopt.transforms.quantize.encoding import Encoding

BLOCKED_OPSET = 21
"""The first operator set with 4-bit integers, 16-bit activations and one scale for each block."""


class Quantizer:
    """Makes the nodes and constants of quantization in one model.

    Args:
        model: The model.
    """

    def __init__(self, model: ir.Model) -> None:
        self._names = Names(model)

    def activation(self, value: ir.Value, encoding: Encoding, users: Iterable[ir.Node]) -> None:
        """Have ``users`` read ``value`` through a pair of QuantizeLinear and DequantizeLinear."""
        graph, first = _place(value)
        parameters = self._parameters(graph, value, encoding)
        quantized = self._node("QuantizeLinear", [value, *parameters], value, encoding)
        quantized.outputs[0].type = ir.TensorType(encoding.dtype)
        wide = self._node("DequantizeLinear", [quantized.outputs[0], *parameters], value, encoding)
        wide.outputs[0].type = value.type
        for user in users:
            redirect(user, value, wide.outputs[0])
        if first is None:
            assert value.producer() is not None
            graph.insert_after(value.producer(), [quantized, wide])  # type: ignore[arg-type]
        else:
            graph.insert_before(first, [quantized, wide])

    def dynamic(self, value: ir.Value, users: Iterable[ir.Node]) -> None:
        """Have ``users`` read ``value`` rounded to 8 bits over the range that it has at run time."""
        graph, first = _place(value)
        names = [self._names.fresh(f"{value.name}_{part}") for part in ("quantized", "scale", "zero_point")]
        outputs = [ir.Value(name=name) for name in names]
        types = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
        for output, dtype, shape in zip(outputs, types, (value.shape, ir.Shape([]), ir.Shape([])), strict=True):
            output.type, output.shape = ir.TensorType(dtype), shape
        node = ir.Node(
            "", "DynamicQuantizeLinear", [value], outputs=outputs, name=self._names.fresh(f"{value.name}_quantize")
        )
        wide = self._node("DequantizeLinear", outputs, value, None)
        wide.outputs[0].type = value.type
        for user in users:
            redirect(user, value, wide.outputs[0])
        if first is None:
            graph.insert_after(value.producer(), [node, wide])  # type: ignore[arg-type]
        else:
            graph.insert_before(first, [node, wide])

    def constant(self, value: ir.Value, integers: Array, encoding: Encoding, users: Iterable[ir.Node]) -> None:
        """Have ``users`` read the constant ``value`` as ``integers`` that a DequantizeLinear widens.

        The constant itself goes when nothing else reads it.
        """
        users = list(users)
        graph = users[0].graph
        assert graph is not None
        data = integers.astype(encoding.dtype.numpy())
        name = self._names.fresh(f"{value.name}_quantized")
        source = editing.new_initializer(graph, ir.Tensor(data, dtype=encoding.dtype, name=name), name)
        wide = self._node("DequantizeLinear", [source, *self._parameters(graph, value, encoding)], value, encoding)
        wide.outputs[0].type = value.type
        graph.insert_before(users[0], wide)
        for user in users:
            redirect(user, value, wide.outputs[0])
        editing.drop_unused(value)

    def _parameters(self, graph: ir.Graph, value: ir.Value, encoding: Encoding) -> list[ir.Value]:
        name = self._names.fresh(f"{value.name}_scale")
        scale = editing.new_initializer(graph, ir.tensor(encoding.scale.astype(np.float32)), name)
        zero = np.zeros(encoding.scale.shape) if encoding.zero_point is None else encoding.zero_point
        # The zero point is written even where it is 0, because it is what says the type.
        data = np.asarray(zero).astype(encoding.dtype.numpy())
        name = self._names.fresh(f"{value.name}_zero_point")
        return [scale, editing.new_initializer(graph, ir.Tensor(data, dtype=encoding.dtype, name=name), name)]

    def _node(self, op_type: str, inputs: list[ir.Value], value: ir.Value, encoding: Encoding | None) -> ir.Node:
        attributes = []
        if encoding is not None and encoding.scale.ndim:
            attributes.append(ir.AttrInt64("axis", encoding.axis))
        if encoding is not None and encoding.block:
            attributes.append(ir.AttrInt64("block_size", encoding.block))
        suffix = "quantized" if op_type == "QuantizeLinear" else "dequantized"
        output = ir.Value(name=self._names.fresh(f"{value.name}_{suffix}"), shape=value.shape)
        name = self._names.fresh(f"{value.name}_{suffix}_node")
        return ir.Node("", op_type, inputs, attributes, outputs=[output], name=name)


def _place(value: ir.Value) -> tuple[ir.Graph, ir.Node | None]:
    """The graph of ``value``, and the node to insert before where no node makes it."""
    producer = value.producer()
    if producer is not None:
        assert producer.graph is not None
        return producer.graph, None
    assert value.graph is not None
    return value.graph, next(iter(value.graph))


def redirect(user: ir.Node, old: ir.Value, new: ir.Value) -> None:
    """Have ``user`` read ``new`` wherever it reads ``old``."""
    for position, operand in enumerate(user.inputs):
        if operand is old:
            user.replace_input_with(position, new)
