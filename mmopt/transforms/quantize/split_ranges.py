"""Two scales for a tensor of which a few values are far larger than the rest, as of what a Gelu or Softmax gives.

    y = MatMul(x, w)    →    y = MatMul(min(x, t), w) + MatMul(max(x − t, 0), w)

Nothing changes but rounding. ``quantize-static`` after this gives each part its own range, in pairs that any runtime
reads, and the integers of the weight are shared (after PTQ4ViT's twin uniform quantization: Yuan et al., 2022). It
computes a layer twice, so it is for those that lose most.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mmopt.analysis.calibration import TensorStatistics
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.editing import Array, Names, is_onnx, new_initializer
from mmopt.transforms.quantize.calibrating import calibration_of
from mmopt.transforms.quantize.layers import Layer, Selection, layers

_THRESHOLDS = 48
"""Thresholds that are tried, from a 255th of the largest value up to it."""


@dataclasses.dataclass(frozen=True)
class SplitRanges(Pass):
    """Compute layers that read a few large values among many small ones in two parts, before static quantization.

    Attributes:
        worth: Times that the rounding error of what a layer reads must fall.
        producers: Operators whose results are looked at; all when empty.
        stats: File of statistics (``mmopt calibrate``); the calibration samples of the run when empty.
        include: Patterns of names of nodes to look at; all when empty.
        exclude: Patterns of names of nodes to leave alone.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    worth: float = 3.0
    producers: tuple[str, ...] = ("Gelu", "Softmax")
    stats: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def run(self, module: Module, context: PassContext) -> bool:
        """Split what is worth it; leave a remark for what is not.

        Raises:
            UserError: There is nothing to calibrate on.
        """
        selection = Selection(("MatMul",), self.include, self.exclude)
        chosen: dict[ir.Value, list[Layer]] = collections.defaultdict(list)
        for layer in layers(module):
            if not selection.refusal(layer) and self._is_wanted(layer.data):
                chosen[layer.data].append(layer)
        if not chosen:
            return False
        calibration = calibration_of(self, self.stats, module, context)
        names, done = Names(module.model), 0
        for value, group in chosen.items():
            found = calibration.tensors.get(str(value.name))
            if found is None or found.high <= 0:
                continue
            threshold, gain = best_threshold(found)
            if gain < self.worth:
                message = f"two ranges would lessen its rounding error {gain:.1f} times only"
                self.remark(context, "missed", str(value.name), message)
                continue
            _split(value, group, threshold, names)
            self.remark(
                context, "note", str(value.name), f"in two parts at {threshold:.4g}: {gain:.1f} times less error"
            )
            done += len(group)
        if done:
            self.remark(context, "applied", "", f"{done} layers read two ranges.")
        return bool(done)

    def _is_wanted(self, value: ir.Value) -> bool:
        producer = value.producer()
        return not self.producers or (producer is not None and is_onnx(producer, *self.producers))


def best_threshold(statistics: TensorStatistics) -> tuple[float, float]:
    """The threshold with the least squared error of rounding both parts, and how many times less than of one range."""
    counts = statistics.histogram.counts
    used = np.flatnonzero(counts)
    edges = statistics.histogram.edges()
    centers, weights = (edges[used] + edges[used + 1]) / 2, counts[used]
    low, high = min(statistics.low, 0.0), statistics.high

    def error(threshold: float) -> float:
        small, large = np.minimum(centers, threshold), np.maximum(centers - threshold, 0.0)
        rounded = _rounded(small, low, threshold) + _rounded(large, 0.0, high - threshold)
        return float((weights * (rounded - centers) ** 2).sum())

    tried = np.geomspace(high / 255, high, _THRESHOLDS, endpoint=False)
    errors = [error(float(threshold)) for threshold in tried]
    plain = float((weights * (_rounded(centers, low, high) - centers) ** 2).sum())
    best = int(np.argmin(errors))
    return float(tried[best]), float(np.sqrt(plain / max(errors[best], 1e-300)))


def _rounded(values: Array, low: float, high: float) -> Array:
    step = (high - low) / 255
    return np.asarray(np.rint((np.clip(values, low, high) - low) / step) * step + low)


def _split(value: ir.Value, group: list[Layer], threshold: float, names: Names) -> None:
    """Have the layers of ``group`` compute what lies below the threshold and what lies above by themselves."""
    producer = value.producer()
    graph = group[0].node.graph
    assert graph is not None
    bound = new_initializer(graph, ir.tensor(np.float32(threshold)), names.fresh(f"{value.name}_threshold"))

    def node(op_type: str, inputs: list[ir.Value], like: ir.Value, suffix: str) -> ir.Node:
        result = ir.Value(name=names.fresh(f"{like.name}_{suffix}"), type=like.type, shape=like.shape)
        return ir.Node("", op_type, inputs, outputs=[result], name=names.fresh(f"{like.name}_{suffix}_node"))

    small = node("Min", [value, bound], value, "small")
    beyond = node("Sub", [value, bound], value, "beyond")
    large = node("Relu", [beyond.outputs[0]], value, "large")
    if producer is None:
        graph.insert_before(next(iter(graph)), [small, beyond, large])
    else:
        graph.insert_after(producer, [small, beyond, large])
    for layer in group:
        output = layer.node.outputs[0]
        further = node("MatMul", [large.outputs[0], layer.weight], output, "large")
        total = node("Add", [output, further.outputs[0]], output, "whole")
        layer.node.replace_input_with(0, small.outputs[0])
        name = output.name
        output.replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
        total.replace_input_with(0, output)
        output.name = names.fresh(f"{name}_small")
        total.outputs[0].name = name
        graph.insert_after(layer.node, [further, total])
