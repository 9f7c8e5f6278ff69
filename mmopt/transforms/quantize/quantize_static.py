"""Weights and activations in integers, with ranges from calibration.

    y = MatMul(x, w)    →    y = MatMul(Dequantize(Quantize(x)), Dequantize(w'))        w' = w in int8

Weights get one scale for each output channel, symmetric; activations one scale and zero point. A target with integer
kernels computes the product of the integers themselves.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from mmopt.analysis.calibration import Calibration, TensorStatistics, choose_range
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.deduplicate_initializers import DeduplicateInitializers
from mmopt.transforms.canonicalize.editing import Array, Names, is_onnx, tensor_of
from mmopt.transforms.quantize.bias import add_to_bias, mean_error
from mmopt.transforms.quantize.calibrating import calibration_of
from mmopt.transforms.quantize.encoding import Encoding, encode, encode_weight
from mmopt.transforms.quantize.layers import Layer, Selection, layers
from mmopt.transforms.quantize.placement import means, share_upwards, store_bias, stored_sums
from mmopt.transforms.quantize.qdq import BLOCKED_OPSET, Quantizer
from mmopt.transforms.quantize.recurrent_layers import (
    LEAST_WORK,
    quantize_recurrent,
    wanted_recurrent,
)
from mmopt.transforms.quantize.rounding import grams_wanted, round_weight
from mmopt.transforms.quantize.smooth_activations import SmoothActivations
from mmopt.transforms.quantize.split_channels import SplitChannels

_DTYPES = {8: ir.DataType.UINT8, 16: ir.DataType.UINT16}


@dataclasses.dataclass(frozen=True)
class QuantizeStatic(Pass):
    """Compute linear layers in integers: int8 weights, activations by their calibrated ranges.

    Attributes:
        stats: File of statistics (``mmopt calibrate``); the calibration samples of the run when empty.
        method: How ranges are chosen: ``minmax``, ``percentile``, ``mse`` or ``entropy``.
        activation_bits: Bits of activations: 8, or 16 for layers that 8 are too few for.
        rounding: Integers of weights: the ``nearest``, or ``gptq`` or ``adaround``: chosen for what the layer gives on
            calibration samples.
        balance: Whether ``split-channels`` and ``smooth-activations`` go first, with the same statistics. What they
            change keeps its whole range, whatever ``method`` is.
        correct_bias: Whether the mean error of rounded weights is taken out of the bias.
        kinds: Operators to quantize (``MatMul``, ``Gemm``, ``Conv``, ``LSTM``, ``GRU``, ``RNN``); all when empty.
        include: Patterns of names of nodes to quantize; all when empty.
        exclude: Patterns of names of nodes to leave alone.
        logits: Whether layers whose result leaves the model are quantized too.
        portable: Whether to put pairs where other runtimes look for them: biases as int32, integers on both sides of
            sums beside convolutions and of means over images, no zero points in what convolutions read, and recurrence
            in float.
        recurrent_work: Multiply-adds of states, over all steps, from which LSTM and GRU are quantized.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    stats: str = ""
    method: Literal["minmax", "percentile", "mse", "entropy"] = "minmax"
    activation_bits: Literal[8, 16] = 8
    rounding: Literal["nearest", "gptq", "adaround"] = "nearest"
    balance: bool = False
    correct_bias: bool = True
    kinds: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    logits: bool = False
    portable: bool = False
    recurrent_work: int = LEAST_WORK

    def run(self, module: Module, context: PassContext) -> bool:
        """Quantize what is selected; leave a remark for each layer that stays as it is.

        Raises:
            UserError: There is nothing to calibrate on.
        """
        return self.quantize(module, context, None)

    def quantize(self, module: Module, context: PassContext, calibration: Calibration | None) -> bool:
        """As :meth:`run`, with statistics that are there already."""
        if module.opset < (BLOCKED_OPSET if self.activation_bits == 16 else 13):
            self.remark(context, "missed", "", f"opset {module.opset} is too old to quantize in")
            return False
        chosen, recurrent = self._chosen(module, context), self._recurrent(module, context)
        if not chosen and not recurrent:
            return False
        grams = grams_wanted([layer for group in chosen.values() for layer in group], self.rounding)
        calibration = calibration or calibration_of(self, self.stats, module, context, gram=grams)
        if self.balance:
            balance(module, context, calibration)
            chosen = self._chosen(module, PassContext())
        quantizer, names = Quantizer(module.model), Names(module.model)
        done = collections.Counter[str]()
        for value in [*chosen, *(value for value in recurrent if value not in chosen)]:
            group, readers = chosen.get(value, []), recurrent.get(value, [])
            signed = self.portable and any(is_onnx(layer.node, "Conv") for layer in group)
            encoding = self._encoding(calibration.tensors.get(str(value.name)), signed=signed)
            if encoding is None:
                for node in (*(layer.node for layer in group), *readers):
                    message = f"{node.op_type} stays in float: no statistics of {value.name!r} in the calibration"
                    self.remark(context, "missed", str(node.name), message)
                continue
            self._quantize_group(quantizer, value, group, readers, encoding, calibration, chosen, names)
            done.update(node.op_type for node in (*(layer.node for layer in group), *readers))
        self._store_sums(module, quantizer, calibration, chosen)
        if self.portable:
            self._store_means(module, quantizer, calibration)
        weights = [layer.weight for group in chosen.values() for layer in group]
        if (
            len(set(weights)) < len(weights) or recurrent
        ):  # each layer has integers of its own, even where weights were shared
            DeduplicateInitializers().run(module, PassContext())
        counted = ", ".join(f"{kind} ×{count}" for kind, count in done.most_common())
        origin = f"{calibration.samples} {calibration.source} samples"
        self.remark(context, "applied", "", f"in int8: {counted}; ranges by {self.method} of {origin}")
        return bool(done)

    def _quantize_group(
        self,
        quantizer: Quantizer,
        value: ir.Value,
        group: list[Layer],
        recurrent: list[ir.Node],
        encoding: Encoding,
        calibration: Calibration,
        chosen: Mapping[ir.Value, Sequence[Layer]],
        names: Names,
    ) -> None:
        """Quantize what the layers and recurrent operators of a group read, and their weights, biases and states."""
        statistics = calibration.tensors[str(value.name)]
        quantizer.activation(value, encoding, [*(layer.node for layer in group), *recurrent, *_residuals(value, group)])
        share_upwards(quantizer, value, encoding, chosen)
        for layer in group:
            difference, weight = quantize_weight(quantizer, layer, statistics.gram, self.rounding)
            if self.correct_bias:
                _correct(layer, difference, statistics, names)
            if self.portable and self.activation_bits == 8:
                store_bias(quantizer, layer, encoding, weight)
        for node in recurrent:
            quantize_recurrent(quantizer, node, calibration, names)

    def _chosen(self, module: Module, context: PassContext) -> dict[ir.Value, list[Layer]]:
        """The layers to quantize, by what they read."""
        selection = Selection(self.kinds, self.include, self.exclude, self.logits)
        chosen: dict[ir.Value, list[Layer]] = collections.defaultdict(list)
        for layer in layers(module):
            if reason := selection.refusal(layer):
                self.remark(context, "missed", layer.name, f"{layer.node.op_type} stays in float: {reason}")
            else:
                chosen[layer.data].append(layer)
        return chosen

    def _recurrent(self, module: Module, context: PassContext) -> dict[ir.Value, list[ir.Node]]:
        """The recurrent operators to quantize, by what they read: those for whose kernels the encoding is."""
        if self.portable or self.activation_bits != 8:
            return {}
        selection = Selection(self.kinds, self.include, self.exclude, self.logits)
        return wanted_recurrent(self, module, context, selection, self.recurrent_work)

    def _store_sums(
        self,
        module: Module,
        quantizer: Quantizer,
        calibration: Calibration,
        chosen: Mapping[ir.Value, Sequence[Layer]],
    ) -> None:
        """Keep results of convolutions that are added up as integers, where they have to wait in memory."""
        convolutions = {layer.node for group in chosen.values() for layer in group if is_onnx(layer.node, "Conv")}
        for value, node in list(stored_sums(module.graph, convolutions, every=self.portable)):
            encoding = self._encoding(calibration.tensors.get(str(value.name)))
            if encoding is not None:
                quantizer.activation(value, encoding, [node])

    def _store_means(self, module: Module, quantizer: Quantizer, calibration: Calibration) -> None:
        """Have means over images read and give integers, where a quantized layer follows."""
        for node, reader, result in means(module.graph):
            data, mean = node.inputs[0], node.outputs[0]
            assert data is not None
            before, after = (self._encoding(calibration.tensors.get(str(v.name))) for v in (data, result))
            if before is not None and after is not None:
                quantizer.activation(data, before, [node])
                if not is_onnx(reader, "QuantizeLinear"):
                    quantizer.activation(mean, after, [reader])

    def _encoding(self, statistics: TensorStatistics | None, *, signed: bool = False) -> Encoding | None:
        """How to quantize a tensor; ``signed``: without a zero point, where it has numbers of both signs."""
        if statistics is None or not statistics.count:
            return None
        method = self.method if statistics.histogram.counts.any() else "minmax"
        low, high = choose_range(statistics, method, bits=self.activation_bits)
        signed = signed and low < 0 and self.activation_bits == 8
        dtype = ir.DataType.INT8 if signed else _DTYPES[self.activation_bits]
        return encode(np.array(low), np.array(high), dtype, symmetric=signed)


def balance(module: Module, context: PassContext, calibration: Calibration) -> None:
    """Have large channels computed in parts where that can be, and hand ranges over to weights where it cannot.

    ``calibration`` becomes that of the changed module.
    """
    SplitChannels().apply(module, context, calibration)
    SmoothActivations().apply(module, context, calibration)


def quantize_weight(
    quantizer: Quantizer, layer: Layer, gram: Array | None = None, rounding: str = "nearest"
) -> tuple[Array, Encoding]:
    """Store the weight of ``layer`` in int8, one symmetric scale for each output channel.

    Returns:
        What that loses, and how it is stored.
    """
    tensor = tensor_of(layer.weight)
    assert tensor is not None
    data = np.asarray(tensor.numpy())
    encoding = encode_weight(data, ir.DataType.INT8, layer.out_axis)
    integers = round_weight(data, layer, encoding, gram, rounding)
    quantizer.constant(layer.weight, integers, encoding, [layer.node])
    return np.asarray(data - encoding.dequantize(integers)), encoding


def _correct(layer: Layer, difference: Array, statistics: TensorStatistics, names: Names) -> None:
    channels = statistics.channels
    offset = None if channels is None else mean_error(layer, difference, channels.mean)
    if offset is not None and not _is_output(layer.node):
        add_to_bias(layer, offset, names)


def _is_output(node: ir.Node) -> bool:
    """Whether the result of a node that takes no bias is an output of the model, whose name must stay its own."""
    return is_onnx(node, "MatMul") and node.outputs[0].is_graph_output()


def _residuals(value: ir.Value, group: list[Layer]) -> list[ir.Node]:
    """Sums that read ``value`` beside convolutions: they may read it quantized, so that it is stored once."""
    if not group or not all(is_onnx(layer.node, "Conv") for layer in group):
        return []
    return [user for user in dict.fromkeys(use.node for use in value.uses()) if is_onnx(user, "Add")]
