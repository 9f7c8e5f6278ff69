"""Generated graphs of any size: transformer-like blocks as an exporter writes them, with everything it leaves behind.

A block of 61 nodes has decomposed layer normalization, attention and an MLP, the shape arithmetic of a dynamic export,
constants as nodes, casts there and back, transposes that cancel, Identity and Dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

HIDDEN, HEADS = 32, 4
_OPSET = 18


class GraphBuilder:
    """Builds a graph node by node; every ``Constant`` is a node, as in an export."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Append a node and give its output."""
        node = ir.node(op_type, list(inputs), attributes)
        node.outputs[0].name = f"v{len(self.nodes)}"
        node.name = f"n{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, numbers: Any, dtype: type = np.int64) -> ir.Value:
        """A ``Constant`` node."""
        return self.op("Constant", value=ir.tensor(np.array(numbers, dtype=dtype)))

    def weight(self, *shape: int) -> ir.Value:
        """A random initializer."""
        array = (self.random.standard_normal(shape) * 0.1).astype(np.float32)
        name = f"w{len(self.weights)}"
        value = ir.Value(
            name=name,
            shape=ir.Shape(shape),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=ir.tensor(array, name=name),
        )
        self.weights.append(value)
        return value

    def model(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
        """The finished model."""
        graph = ir.Graph(
            inputs, outputs, nodes=self.nodes, initializers=self.weights, opset_imports={"": _OPSET}, name="scale"
        )
        return ir.Model(graph, ir_version=10)


def scale_model(nodes: int, *, seed: int = 0, hidden: int = HIDDEN) -> ir.Model:
    """A model of about ``nodes`` nodes: ``x float[batch, seq, hidden]`` to ``y`` of the same shape."""
    builder = GraphBuilder(seed)
    x = ir.Value(name="x", shape=ir.Shape(["batch", "seq", hidden]), type=ir.TensorType(ir.DataType.FLOAT))
    y: ir.Value = x
    while len(builder.nodes) < nodes - 30:
        y = _block(builder, y, hidden)
    y = builder.op("Relu", y)
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "seq", hidden])
    return builder.model([x], [y])


def _block(b: GraphBuilder, x: ir.Value, hidden: int) -> ir.Value:
    normed = _layer_norm(b, x, hidden)
    query, key, value = (_heads(b, b.op("MatMul", normed, b.weight(hidden, hidden)), hidden) for _ in range(3))
    scores = b.op("MatMul", query, b.op("Transpose", key, perm=[0, 1, 3, 2]))
    scores = b.op("Div", scores, b.op("Sqrt", b.constant(float(hidden // HEADS), np.float32)))
    scores = b.op("Softmax", b.op("Cast", b.op("Cast", scores, to=11), to=1), axis=-1)
    mixed = b.op("Transpose", b.op("MatMul", scores, value), perm=[0, 2, 1, 3])
    merged = b.op("Reshape", mixed, b.op("Concat", *_lengths(b, x), b.constant([hidden]), axis=0))
    x = b.op("Add", x, b.op("Dropout", b.op("Identity", merged), b.constant(0.1, np.float32)))
    inner = b.op("Mul", b.op("Relu", b.op("MatMul", x, b.weight(hidden, hidden))), b.constant(1.0, np.float32))
    inner = b.op("Transpose", b.op("Transpose", inner, perm=[0, 2, 1]), perm=[0, 2, 1])
    return b.op("Add", x, b.op("Tanh", inner))


def _layer_norm(b: GraphBuilder, x: ir.Value, hidden: int) -> ir.Value:
    centred = b.op("Sub", x, b.op("ReduceMean", x, b.constant([-1])))
    square = b.op("Pow", centred, b.constant(2.0, np.float32))
    deviation = b.op("Sqrt", b.op("Add", b.op("ReduceMean", square, b.constant([-1])), b.constant(1e-5, np.float32)))
    return b.op("Mul", b.op("Div", centred, deviation), b.weight(hidden))


def _lengths(b: GraphBuilder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Batch and sequence length as one-element vectors, the way an exporter asks for them."""
    shape = b.op("Shape", x)
    batch, seq = (b.op("Unsqueeze", b.op("Gather", shape, b.constant(i), axis=0), b.constant([0])) for i in range(2))
    return batch, seq


def _heads(b: GraphBuilder, x: ir.Value, hidden: int) -> ir.Value:
    sizes = b.op("Concat", *_lengths(b, x), b.constant([HEADS]), b.constant([hidden // HEADS]), axis=0)
    return b.op("Transpose", b.op("Reshape", x, sizes), perm=[0, 2, 1, 3])
