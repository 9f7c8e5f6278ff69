"""Moves scales between what makes a tensor and the layers that read it, so that both are easier to quantize.

    y = W · norm(x; g, b)    =    (W S) · norm(x; g/S, b/S)            S = diag(s), for norms
    y = V · relu(W x + c)    =    (V S) · relu((S⁻¹W) x + S⁻¹c)        s > 0, for layers in a row

Nothing changes but rounding. After a norm, s balances activations against weights (SmoothQuant: Xiao et al., 2023):
s = max|x|^α / max|w|^(1-α). Between layers, it balances the weights of both (Nagel et al., 2019):
s = √(max|w| · max|v|) / max|v|, per channel. For weight-only quantization, s = mean|x|^α spares the weights of the
channels that carry most (AWQ: Lin et al., 2024), with the α that leaves the least error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from mmopt.errors import UserError
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.editing import Array, Names, integer, is_onnx, new_initializer, tensor_of
from mmopt.transforms.quantize.calibrating import calibration_of
from mmopt.transforms.quantize.encoding import encode_weight
from mmopt.transforms.quantize.gptq import output_error
from mmopt.transforms.quantize.layers import Layer, layers

_NORMS = ("LayerNormalization", "RMSNormalization")
_BETWEEN = ("Relu", "Identity", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Dropout")
"""What a positive scale of a channel goes through unchanged."""

LIMITS = (1e-4, 1e4)
"""Scales outside of this are cut: a channel that is (nearly) always 0 must not blow up weights."""


@dataclasses.dataclass(frozen=True)
class SmoothActivations(Pass):
    """Hand scales of activations over to the weights after norms, before static quantization.

    Attributes:
        alpha: How much of the range goes to the weights: 0 none of it, 1 all.
        stats: File of statistics (``mmopt calibrate``); the calibration samples of the run when empty.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    alpha: float = 0.5
    stats: str = ""

    def run(self, module: Module, context: PassContext) -> bool:
        """Rescale every norm that only layers read.

        Raises:
            UserError: ``alpha`` is no share, or there is nothing to calibrate on.
        """
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha is {self.alpha:g}", where=self.name, hint="give a share from 0 to 1")
        groups = list(_after_norms(module))
        if not groups:
            return False
        calibration = calibration_of(self, self.stats, module, context)
        writer = _Writer(module)
        done = 0
        for norm, readers in groups:
            value = norm.outputs[0]
            found = calibration.tensors.get(str(value.name))
            if found is None or found.channels is None:
                self.remark(context, "missed", str(norm.name), f"no statistics of {value.name!r} by channel")
                continue
            activations = np.maximum(np.abs(found.channels.low), np.abs(found.channels.high))
            weights = np.max([_magnitudes(layer) for layer in readers], axis=0)
            scales = _limited(activations**self.alpha / np.maximum(weights, 1e-12) ** (1 - self.alpha))
            writer.scale_norm(norm, scales)
            for layer in readers:
                writer.scale_depth(layer, scales)
            done += 1
        self.remark(context, "applied", "", f"{done} norms hand scales over to the layers that read them.")
        return bool(done)


@dataclasses.dataclass(frozen=True)
class ProtectWeights(Pass):
    """Scale up the weights of the channels that carry most, before weight-only quantization.

    Attributes:
        bits: Bits that the weights will have.
        block: Weights along the depth that will share a scale; 0 for one scale an output channel.
        steps: Exponents that are tried, between 0 and 1.
        stats: File of statistics with Gram matrices; the calibration samples of the run when empty.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    bits: Literal[4, 8] = 4
    block: int = 32
    steps: int = 10
    stats: str = ""

    def run(self, module: Module, context: PassContext) -> bool:
        """Rescale every norm that only layers read.

        Raises:
            UserError: There is nothing to calibrate on.
        """
        groups = list(_after_norms(module))
        if not groups:
            return False
        names = [str(norm.outputs[0].name) for norm, _ in groups]
        calibration = calibration_of(self, self.stats, module, context, gram=names)
        writer = _Writer(module)
        for norm, readers in groups:
            found = calibration.tensors.get(str(norm.outputs[0].name))
            if found is None or found.channels is None or found.gram is None:
                self.remark(context, "missed", str(norm.name), "no Gram matrix of what it gives")
                continue
            scales = self._best(readers, found.channels.mean_magnitude, found.gram)
            writer.scale_norm(norm, scales)
            for layer in readers:
                writer.scale_depth(layer, scales)
        return writer.changed

    def _best(self, readers: list[Layer], magnitudes: Array, gram: Array) -> Array:
        """The scales that leave the least error in what the readers give."""
        matrices = [_weight(layer) if layer.depth_axis == 0 else _weight(layer).T for layer in readers]
        best, least = np.ones_like(magnitudes), np.inf
        for alpha in np.linspace(0, 1, self.steps + 1)[:-1]:
            scales = np.maximum(magnitudes, 1e-8) ** alpha
            scales = _limited(scales / np.sqrt(scales.max() * scales.min()))
            error = sum(output_error(w, self._rounded(w * scales[:, None]) / scales[:, None], gram) for w in matrices)
            if error < least:
                best, least = scales, error
        return best

    def _rounded(self, weight: Array) -> Array:
        dtype = {4: ir.DataType.INT4, 8: ir.DataType.INT8}[self.bits]
        block = self.block if 0 < self.block < len(weight) else 0
        encoding = encode_weight(weight, dtype, 0 if block else 1, block=block)
        return encoding.dequantize(encoding.quantize(weight))


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
        writer = _Writer(module)
        pairs: list[tuple[ir.Node, ir.Node]] = []
        for _ in range(self.rounds):
            found = list(_in_a_row(module))
            pairs = pairs or [(a.node, b.node) for a, b in found]
            for first, second in found:
                rows, columns = _magnitudes(first, out=True), _magnitudes(second)
                used = (rows > 0) & (columns > 0)
                scales = np.ones_like(rows)
                scales[used] = np.sqrt(rows[used] * columns[used]) / columns[used]
                scales = _limited(scales)
                writer.scale_outputs(first, 1 / scales)
                writer.scale_depth(second, scales)
        if pairs:
            self.remark(context, "applied", "", f"{len(pairs)} pairs of layers are balanced.")
        return writer.changed


def _limited(scales: Array) -> Array:
    return np.clip(np.where(np.isfinite(scales) & (scales > 0), scales, 1.0), *LIMITS)


def _weight(layer: Layer) -> Array:
    tensor = tensor_of(layer.weight)
    assert tensor is not None
    return np.asarray(tensor.numpy()).astype(np.float64)


def _magnitudes(layer: Layer, *, out: bool = False) -> Array:
    """Largest |w| of each channel of input, or of output."""
    weight, axis = np.abs(_weight(layer)), layer.out_axis if out else layer.depth_axis
    return np.asarray(weight.max(axis=tuple(n for n in range(weight.ndim) if n != axis)))


def _after_norms(module: Module) -> Iterator[tuple[ir.Node, list[Layer]]]:
    """Norms over the last axis, with constant weights, that layers read and nothing else."""
    found = {layer.node: layer for layer in layers(module) if not is_onnx(layer.node, "Conv")}
    for node in module.graph:
        if not is_onnx(node, *_NORMS) or any(tensor_of(value) is None for value in node.inputs[1:]):
            continue
        value = node.outputs[0]
        users = list(dict.fromkeys(use.node for use in value.uses()))
        readers = [found[user] for user in users if user in found and found[user].data is value]
        scale = tensor_of(node.inputs[1])
        if not users or len(readers) != len(users) or value.is_graph_output() or scale is None or len(scale.shape) != 1:
            continue
        if all(_weight(layer).shape[layer.depth_axis] == scale.shape[0] for layer in readers):
            yield node, readers


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
    same = _weight(first).shape[first.out_axis] == _weight(second).shape[second.depth_axis]
    kinds = is_onnx(first.node, "Conv") == is_onnx(second.node, "Conv")
    bias = first.node.inputs[2] if len(first.node.inputs) > 2 else None
    scalable = bias is None or ((tensor := tensor_of(bias)) is not None and len(tensor.shape) == 1)
    return ungrouped and same and kinds and scalable


class _Writer:
    """Gives operators scaled copies of their constants."""

    def __init__(self, module: Module) -> None:
        self._names = Names(module.model)
        self._graph = module.graph
        self.changed = False

    def scale_norm(self, norm: ir.Node, scales: Array) -> None:
        """Divide what a norm gives by ``scales``."""
        for position in range(1, len(norm.inputs)):
            self._replace(norm, position, lambda data: data / scales)

    def scale_depth(self, layer: Layer, scales: Array) -> None:
        """Multiply the weights of each channel of input."""
        self._replace(layer.node, 1, lambda data: data * _along(scales, data.ndim, layer.depth_axis))

    def scale_outputs(self, layer: Layer, scales: Array) -> None:
        """Multiply what each channel of output gives."""
        self._replace(layer.node, 1, lambda data: data * _along(scales, data.ndim, layer.out_axis))
        if len(layer.node.inputs) > 2 and layer.node.inputs[2] is not None:
            self._replace(layer.node, 2, lambda data: data * scales)

    def _replace(self, node: ir.Node, position: int, change: Callable[[Array], Array]) -> None:
        value = node.inputs[position]
        tensor = tensor_of(value)
        if value is None or tensor is None:
            return
        data = np.asarray(tensor.numpy())
        changed = change(data.astype(np.float64)).astype(data.dtype)
        if np.array_equal(changed, data):
            return
        name = self._names.fresh(f"{value.name}_rescaled")
        node.replace_input_with(position, new_initializer(self._graph, ir.tensor(changed), name))
        self.changed = True


def _along(scales: Array, rank: int, axis: int) -> Array:
    shape = [1] * rank
    shape[axis] = -1
    return scales.reshape(shape)
