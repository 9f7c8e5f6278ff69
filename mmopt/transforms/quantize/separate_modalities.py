"""Lets tokens of each modality have a scale of their own in the layers that they share.

    x = … Concat(picture, words) …
    y = MatMul(x, w)    →    a, b = Split(x)    y = Concat(MatMul(a, w), MatMul(b, w))

Tokens of pictures and words that lie beside each other differ in range, often by much, and one scale wastes most of its
steps on the smaller ones. The rows of a product are independent, so nothing changes; ``quantize-static`` after this
gives each part its own range, in pairs that any runtime reads, and the integers of the weight are shared.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mmopt.analysis.shapes import ShapeFacts, infer_shapes
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.editing import Names, integer, is_onnx, new_initializer, tensor_of
from mmopt.transforms.quantize.layers import Layer, layers

_UNARY = (
    "Abs", "Cast", "Elu", "Erf", "Exp", "Gelu", "HardSwish", "Identity", "LeakyRelu", "Mish", "Neg", "Relu", "Sigmoid",
    "Softplus", "Softsign", "Sqrt", "Swish", "Tanh",
)  # fmt: skip
_BINARY = ("Add", "Sub", "Mul", "Div", "Pow")
_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")

AXIS = 1
"""Axis of the tokens in ``[batch, tokens, channels]``."""


@dataclasses.dataclass(frozen=True)
class SeparateModalities(Pass):
    """Cut layers that tokens of several modalities share into one product for each, before static quantization.

    Attributes:
        smallest: Tokens that a part must have.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    smallest: int = 1

    def run(self, module: Module, context: PassContext) -> bool:
        """Cut every layer that reads joined tokens."""
        facts = infer_shapes(module.model)
        joined = _joined(module, facts)
        names = Names(module.model)
        done = 0
        for layer in list(layers(module)):
            sizes = joined.get(layer.data)
            if sizes is None or not is_onnx(layer.node, "MatMul"):
                continue
            if min(sizes) < self.smallest:
                self.remark(context, "missed", layer.name, f"a part of it has {min(sizes)} tokens only")
                continue
            _cut(layer, sizes, names)
            done += 1
        if done:
            self.remark(context, "applied", "", f"{done} layers compute tokens of each modality by themselves.")
        return bool(done)


def _joined(module: Module, facts: ShapeFacts) -> dict[ir.Value, tuple[int, ...]]:
    """Tensors whose tokens come from several inputs, with the number of tokens of each, in order."""
    found: dict[ir.Value, tuple[int, ...]] = {}
    origins: dict[ir.Value, frozenset[str]] = {}
    for node in module.graph:
        own = [origins.get(v, _origin(v)) for v in node.inputs if v is not None]
        for value in node.outputs:
            origins[value] = frozenset().union(*own)
        sizes = _starts(node, facts, origins) or _passes_on(node, facts, found)
        if sizes is not None:
            found[node.outputs[0]] = sizes
    return found


def _origin(value: ir.Value) -> frozenset[str]:
    given = value.is_graph_input() and not value.is_initializer()
    return frozenset({str(value.name)}) if given else frozenset()


def _starts(node: ir.Node, facts: ShapeFacts, origins: dict[ir.Value, frozenset[str]]) -> tuple[int, ...] | None:
    """The tokens that a Concat joins, when they come from different inputs."""
    if not is_onnx(node, "Concat") or integer(node, "axis", 0) not in (AXIS, AXIS - 3) or len(node.inputs) < 2:
        return None
    sizes, sources = [], []
    for value in node.inputs:
        shape = None if value is None else facts.shape(value)
        size = None if shape is None or len(shape) != 3 else shape[AXIS]
        if value is None or not isinstance(size, int):
            return None
        sizes.append(size)
        sources.append(origins.get(value, _origin(value)))
    # A learned token (of the class, for example) comes from no input: it goes with its neighbour.
    parts: list[tuple[frozenset[str], int]] = []
    for source, size in zip(sources, sizes, strict=True):
        if parts and (source == parts[-1][0] or not source or not parts[-1][0]):
            parts[-1] = (parts[-1][0] | source, parts[-1][1] + size)
        else:
            parts.append((source, size))
    different = len({source for source, _ in parts}) > 1
    return tuple(size for _, size in parts) if different else None


def _passes_on(node: ir.Node, facts: ShapeFacts, found: dict[ir.Value, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The parts of what ``node`` gives, when it treats each token alone or adds tensors with the same parts."""
    known = [(place, found[value]) for place, value in enumerate(node.inputs) if value in found]
    if not known:
        return None
    shape, sizes = facts.shape(node.outputs[0]), known[0][1]
    if shape is None or len(shape) != 3 or shape[AXIS] != sum(sizes):
        return None
    first = known[0][0] == 0
    if is_onnx(node, *_UNARY):
        return sizes
    if is_onnx(node, *_NORMS):
        return sizes if first and integer(node, "axis", -1) in (-1, 2) else None
    if is_onnx(node, "MatMul"):
        tensor = tensor_of(node.inputs[1])
        return sizes if first and tensor is not None and len(tensor.shape) == 2 else None
    if is_onnx(node, *_BINARY) and all(parts == sizes for _, parts in known):
        return sizes
    return None


def _cut(layer: Layer, sizes: tuple[int, ...], names: Names) -> None:
    """One product for each part of the tokens, and their results side by side."""
    node, graph, data, output = layer.node, layer.node.graph, layer.data, layer.node.outputs[0]
    assert graph is not None
    split = new_initializer(graph, ir.tensor(np.array(sizes, np.int64)), names.fresh(f"{data.name}_sizes"))
    parts = [ir.Value(name=names.fresh(f"{data.name}_part"), type=data.type) for _ in sizes]
    nodes = [
        ir.Node(
            "",
            "Split",
            [data, split],
            [ir.AttrInt64("axis", AXIS)],
            outputs=parts,
            name=names.fresh(f"{node.name}_split"),
        )
    ]
    results = []
    for part in parts:
        result = ir.Value(name=names.fresh(f"{output.name}_part"), type=output.type)
        nodes.append(
            ir.Node("", "MatMul", [part, layer.weight], outputs=[result], name=names.fresh(f"{node.name}_part"))
        )
        results.append(result)
    join = ir.Node(
        "", "Concat", results, [ir.AttrInt64("axis", AXIS)], num_outputs=1, name=names.fresh(f"{node.name}_join")
    )
    nodes.append(join)
    graph.insert_before(node, nodes)
    joined = join.outputs[0]
    joined.type, joined.shape = output.type, output.shape
    output.replace_all_uses_with(joined, replace_graph_outputs=True)
    name = output.name
    graph.remove(node, safe=True)
    joined.name = name
