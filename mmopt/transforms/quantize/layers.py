"""The layers that quantization is about: linear operators with constant weights, and what to leave alone."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from mmopt.ir.module import Module
from mmopt.transforms.canonicalize.editing import integer, is_onnx, tensor_of

KINDS = ("MatMul", "Gemm", "Conv")
"""Operators that have integer kernels."""

_MOVEMENT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Softmax", "LogSoftmax", "Sigmoid")
"""What a logit may still go through on its way out."""

SMALLEST_DEPTH = 16
"""Products summed over less than this gain nothing from integers."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear operator with a constant weight.

    Attributes:
        node: The operator.
        data: What it reads.
        weight: The constant.
        out_axis: Axis of the weight that its output channels go along.
        depth_axis: Axis of the weight that is summed over (of input channels, for a convolution).
    """

    node: ir.Node
    data: ir.Value
    weight: ir.Value
    out_axis: int
    depth_axis: int

    @property
    def name(self) -> str:
        """Name of the node."""
        return str(self.node.name)

    @property
    def weights(self) -> tuple[ir.Value, ...]:
        """All its constants that are quantized."""
        return (self.weight,)


def layers(module: Module) -> Iterator[Layer]:
    """Every layer of the main graph, in order of execution."""
    for node in module.graph:
        if not is_onnx(node, *KINDS) or node.inputs[0] is None or len(node.inputs) < 2:
            continue
        weight, data = node.inputs[1], node.inputs[0]
        tensor = tensor_of(weight)
        if weight is None or tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor_of(data) is not None:
            continue
        if is_onnx(node, "Conv"):
            yield Layer(node, data, weight, 0, 1)
        elif len(tensor.shape) == 2:
            transposed = is_onnx(node, "Gemm") and bool(integer(node, "transB", 0))
            yield Layer(node, data, weight, *((0, 1) if transposed else (1, 0)))


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which layers to quantize.

    Attributes:
        kinds: Operators; all that have integer kernels when empty.
        include: Patterns of node names (``*attention*``); all when empty.
        exclude: Patterns of node names to leave alone.
        logits: Whether layers whose result leaves the model are quantized too.
    """

    kinds: Sequence[str] = ()
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    logits: bool = False

    def refusal(self, layer: Layer) -> str:
        """Why ``layer`` stays as it is, or "" when it is quantized."""
        if reason := self.unwanted(layer.node):
            return reason
        if not self.logits and _leaves(layer.node):
            return "its result leaves the model"
        return _too_small(layer)

    def unwanted(self, node: ir.Node) -> str:
        """Why ``node`` was not asked for, or "" when it was."""
        name = str(node.name)
        if self.kinds and node.op_type not in self.kinds:
            return f"{node.op_type} was not asked for"
        if self.include and not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.include):
            return "its name was not asked for"
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude):
            return "its name was excluded"
        return ""


def _too_small(layer: Layer) -> str:
    tensor = tensor_of(layer.weight)
    assert tensor is not None
    shape = tuple(int(size) for size in tensor.shape.numpy())
    depth = shape[layer.depth_axis]
    if is_onnx(layer.node, "Conv"):
        for size in shape[2:]:
            depth *= size
        if shape[1] == 1:
            return "a depthwise convolution is not limited by arithmetic"
    return f"it sums over {depth} numbers only" if depth < SMALLEST_DEPTH else ""


def _leaves(node: ir.Node) -> bool:
    """Whether the result is an output, up to movement, a bias and a final softmax."""
    output = node.outputs[0]
    while not output.is_graph_output():
        users = list(output.uses())
        if len(users) != 1:
            return False
        follower = users[0].node
        others = [v for v in follower.inputs if v is not None and v is not output]
        bias = is_onnx(follower, "Add", "Mul", "Div") and all(tensor_of(v) is not None for v in others)
        if not bias and not is_onnx(follower, *_MOVEMENT):
            return False
        output = follower.outputs[0]
    return True
