"""Balances the weights of layers in a row, channel by channel, so that one scale fits all of a tensor.

    y = V · relu(W x + c)    =    (V S) · relu((S⁻¹W) x + S⁻¹c)        S = diag(s), s > 0

Nothing changes but rounding. s = √(max|w| · max|v|) / max|v|, per channel (Nagel et al., 2019).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.editing import integer, is_onnx, tensor_of
from mmopt.transforms.quantize.layers import Layer, layers
from mmopt.transforms.quantize.scales import Writer, limited, magnitudes, weight_of

_BETWEEN = ("Relu", "Identity", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Dropout")
"""What a positive scale of a channel goes through unchanged."""


@dataclasses.dataclass(frozen=True)
class EqualizeLayers(Pass):
    """Balance the weights of layers in a row, channel by channel, so that one scale fits all of a tensor.

    Attributes:
        rounds: Times that all pairs are balanced; a layer belongs to two of them.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    rounds: int = 3

    def run(self, module: Module, context: PassContext) -> bool:
        """Balance every pair of layers with nothing but a rectifier or pooling in between."""
        writer = Writer(module)
        pairs: list[tuple[ir.Node, ir.Node]] = []
        for _ in range(self.rounds):
            found = list(_in_a_row(module))
            pairs = pairs or [(a.node, b.node) for a, b in found]
            for first, second in found:
                rows, columns = magnitudes(first, out=True), magnitudes(second)
                used = (rows > 0) & (columns > 0)
                scales = np.ones_like(rows)
                scales[used] = np.sqrt(rows[used] * columns[used]) / columns[used]
                scales = limited(scales)
                writer.scale_outputs(first, 1 / scales)
                writer.scale_depth(second, scales)
        if pairs:
            self.remark(context, "applied", "", f"{len(pairs)} pairs of layers are balanced.")
        return writer.changed


def _in_a_row(module: Module) -> Iterator[tuple[Layer, Layer]]:
    found = {layer.node: layer for layer in layers(module)}
    for second in found.values():
        value: ir.Value | None = second.data
        while value is not None and len(value.uses()) == 1 and not value.is_graph_output():
            producer = value.producer()
            if producer is None:
                break
            first = found.get(producer)
            if first is not None:
                if _fit(first, second):
                    yield first, second
                break
            value = producer.inputs[0] if is_onnx(producer, *_BETWEEN) else None


def _fit(first: Layer, second: Layer) -> bool:
    """Whether the channels of one are those of the other, and its bias can be scaled."""
    ungrouped = all(integer(layer.node, "group", 1) == 1 for layer in (first, second))
    same = weight_of(first).shape[first.out_axis] == weight_of(second).shape[second.depth_axis]
    kinds = is_onnx(first.node, "Conv") == is_onnx(second.node, "Conv")
    bias = first.node.inputs[2] if len(first.node.inputs) > 2 else None
    scalable = bias is None or ((tensor := tensor_of(bias)) is not None and len(tensor.shape) == 1)
    return ungrouped and same and kinds and scalable
