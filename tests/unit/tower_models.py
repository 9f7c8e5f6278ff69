"""Small multimodal models, built node by node, for the tests of tower discovery."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from mmopt.analysis.shape_rules.types import to_ir_shape
from mmopt.analysis.shapes import infer_shapes
from mmopt.ir.module import Module, save_model

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
WIDTH = 8
VOCAB = 50


class Net:
    """A graph in the making; every method adds nodes and returns values."""

    def __init__(self, opset: int = 18, seed: int = 0):
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="net")
        self.rng = np.random.default_rng(seed)
        self.count = 0

    def input(self, name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def constant(self, array: Any) -> ir.Value:
        self.count += 1
        tensor = ir.tensor(np.asarray(array), name=f"c{self.count}")
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def weight(self, *shape: int) -> ir.Value:
        return self.constant(self.rng.normal(0, 0.3, shape).astype(np.float32))

    def ints(self, *numbers: int) -> ir.Value:
        return self.constant(np.array(numbers, np.int64))

    def ops(self, op: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        self.count += 1
        attrs = ir.convenience.convert_attributes(attributes)
        node = ir.Node(domain, op, inputs, attrs, num_outputs=outputs, name=f"n{self.count}")
        for k, value in enumerate(node.outputs):
            value.name = f"v{self.count}_{k}"
        self.graph.append(node)
        return node.outputs

    def op(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self.ops(op, *inputs, **attributes)[0]

    def output(self, value: ir.Value, name: str = "", dtype: ir.DataType = FLOAT) -> None:
        if name:
            value.name = name
        value.type = ir.TensorType(dtype)
        self.graph.outputs.append(value)

    def module(self) -> Module:
        model = ir.Model(self.graph, ir_version=9)
        facts = infer_shapes(model)
        for value in self.graph.outputs:
            shape = facts.shape(value)
            value.shape = None if shape is None else to_ir_shape(shape)
        return Module(model)

    def linear(self, x: ir.Value, before: int, after: int) -> ir.Value:
        return self.op("Add", self.op("MatMul", x, self.weight(before, after)), self.weight(after))

    def embed(self, ids: ir.Value, rows: int = VOCAB, width: int = WIDTH) -> ir.Value:
        return self.op("Gather", self.weight(rows, width), ids)

    def last_state(self, x: ir.Value, features: int, hidden: int = WIDTH, **more: ir.Value) -> ir.Value:
        """LSTM over ``[B, T, features]``; the last hidden state ``[B, hidden]``."""
        steps = self.op("Transpose", x, perm=[1, 0, 2])
        parts = [self.weight(1, 4 * hidden, features), self.weight(1, 4 * hidden, hidden), self.weight(1, 8 * hidden)]
        state = more.get("initial")
        outputs = self.ops("LSTM", steps, *parts, more.get("lengths"), state, state, outputs=3, hidden_size=hidden)
        return self.op("Squeeze", outputs[1], self.ints(0))

    def pooled_image(self, pixels: ir.Value, channels: int = 3, width: int = WIDTH) -> ir.Value:
        """Two convolutions and an average: ``[B, C, H, W]`` to ``[B, width]``."""
        x = self.op("Relu", self.op("Conv", pixels, self.weight(width, channels, 3, 3), pads=[1, 1, 1, 1]))
        x = self.op("Relu", self.op("Conv", x, self.weight(width, width, 3, 3), strides=[2, 2]))
        return self.op("Flatten", self.op("GlobalAveragePool", x))

    def patches(self, pixels: ir.Value, width: int = WIDTH) -> ir.Value:
        """Patches as tokens ``[B, P, width]``, with a layer of feed-forward and residual."""
        x = self.op("Conv", pixels, self.weight(width, 3, 4, 4), strides=[4, 4])
        x = self.op("Transpose", self.op("Reshape", x, self.ints(0, 0, -1)), perm=[0, 2, 1])
        return self.op("Add", x, self.linear(self.op("Relu", self.linear(x, width, width)), width, width))

    def attention(self, query: ir.Value, memory: ir.Value, bias: ir.Value | None = None) -> ir.Value:
        """One head of attention over ``[B, S, WIDTH]``; ``bias`` is added to the scores."""
        q, k, v = (self.linear(x, WIDTH, WIDTH) for x in (query, memory, memory))
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 2, 1]))
        scores = self.op("Mul", scores, self.constant(np.float32(0.35)))
        if bias is not None:
            scores = self.op("Add", scores, bias)
        return self.linear(self.op("MatMul", self.op("Softmax", scores, axis=-1), v), WIDTH, WIDTH)

    def mask_bias(self, mask: ir.Value) -> ir.Value:
        """A mask ``[B, S]`` of ones and zeros as ``[B, 1, S]`` to add to scores."""
        one = self.constant(np.float32(1))
        inverse = self.op("Sub", one, self.op("Cast", self.op("Unsqueeze", mask, self.ints(1)), to=1))
        return self.op("Mul", inverse, self.constant(np.float32(-1e9)))

    def text(self, ids: ir.Value, mask: ir.Value | None = None) -> ir.Value:
        """Tokens ``[B, S, WIDTH]`` after self-attention with a residual."""
        x = self.embed(ids)
        return self.op("Add", x, self.attention(x, x, self.mask_bias(mask) if mask is not None else None))

    def normalized(self, x: ir.Value) -> ir.Value:
        return self.op("Div", x, self.op("ReduceL2", x, self.ints(-1), keepdims=1))


def run(module: Module, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of a module by name, computed by onnxruntime without rewriting anything."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.onnx"
        save_model(module.model, path, external=True)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        given = {i.name: feeds[i.name] for i in session.get_inputs()}
        return dict(zip([o.name for o in session.get_outputs()], session.run(None, given), strict=True))


def sample(module: Module, seed: int = 1, **sizes: int) -> dict[str, np.ndarray]:
    """Random inputs; symbolic dimensions are taken from ``sizes``, else 3."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in module.graph.inputs:
        shape = [d if isinstance(d, int) else sizes.get(str(d.value), 3) for d in value.shape or ()]
        dtype = value.dtype.numpy()
        if dtype == np.bool_:
            feeds[value.name] = np.asarray(rng.random(shape) < 0.7)
        elif np.issubdtype(dtype, np.integer):
            feeds[value.name] = rng.integers(0, 2 if "mask" in value.name else 12, shape).astype(dtype)
        else:
            feeds[value.name] = rng.normal(size=shape).astype(dtype)
    return feeds
