"""Weights in 8 or 4 bits, arithmetic in float: what is limited by reading weights gets faster and smaller.

y = MatMul(x, w)    →    y = MatMul(x, Dequantize(w'))        w' = w in int4, one scale for each block of 32
"""

from __future__ import annotations

import collections
import dataclasses
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.editing import is_onnx, tensor_of
from mmopt.transforms.quantize.calibrating import calibration_of
from mmopt.transforms.quantize.encoding import Array, Encoding, encode_weight, squared_error
from mmopt.transforms.quantize.layers import Layer, Selection, layers
from mmopt.transforms.quantize.qdq import BLOCKED_OPSET, Quantizer
from mmopt.transforms.quantize.recovery import recover_quantized
from mmopt.transforms.quantize.rounding import grams_wanted, round_weight

_SIGNED = {8: ir.DataType.INT8, 4: ir.DataType.INT4}
_UNSIGNED = {8: ir.DataType.UINT8, 4: ir.DataType.UINT4}

_RATIOS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.8)
"""Parts of the extremes that are tried: clipping the largest weights leaves finer steps for the rest."""


@dataclasses.dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Store the weights of linear layers in 4 or 8 bits and compute in float.

    Attributes:
        bits: Bits of a weight.
        block: Weights along the depth that share a scale; 0 for one scale an output channel.
        symmetric: Whether steps are symmetric around 0; otherwise each block has a zero point of its own.
        search: Whether to clip extremes where that lessens the squared error, when integers are the nearest.
        method: ``round`` to the nearest, or ``gptq`` or ``adaround``: choose integers for what the layer gives on
            calibration samples.
        recover: Whether integers and biases are chosen once more, layer after layer, so that each gives what it gave in
            float although what it reads has changed.
        stats: File of statistics with Gram matrices (``mmopt calibrate --gram``), for these two; the calibration
            samples of the run when empty.
        kinds: Operators to quantize.
        include: Patterns of names of nodes to quantize; all when empty.
        exclude: Patterns of names of nodes to leave alone.
        logits: Whether layers whose result leaves the model are quantized too.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    bits: Literal[4, 8] = 8
    block: int = 0
    symmetric: bool = True
    search: bool = True
    method: Literal["round", "gptq", "adaround"] = "round"
    recover: bool = False
    stats: str = ""
    kinds: tuple[str, ...] = ("MatMul", "Gemm")
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    logits: bool = False

    def run(self, module: Module, context: PassContext) -> bool:
        """Quantize what is selected; leave a remark for each layer that stays as it is."""
        if module.opset < (BLOCKED_OPSET if self.bits == 4 or self.block else 13):
            self.remark(context, "missed", "", f"opset {module.opset} is too old; it must be {BLOCKED_OPSET}")
            return False
        selection = Selection(self.kinds, self.include, self.exclude, self.logits)
        chosen: dict[ir.Value, list[Layer]] = collections.defaultdict(list)
        for layer in layers(module):
            if reason := selection.refusal(layer):
                self.remark(context, "missed", layer.name, f"{layer.node.op_type} keeps its weights: {reason}")
            else:
                chosen[layer.weight].append(layer)
        grams = self._grams(module, [layer for group in chosen.values() for layer in group], context)
        reference = module.clone() if self.recover else None
        quantizer = Quantizer(module.model)
        before = after = 0
        for weight, group in chosen.items():
            data = _data(weight)
            encoding = self.encoding(data, group[0])
            integers = self._integers(data, encoding, group, grams)
            quantizer.constant(weight, integers, encoding, [layer.node for layer in group])
            before += data.nbytes
            after += data.size * self.bits // 8 + encoding.scale.size * (5 if self.symmetric else 6)
        if reference is not None:
            recover_quantized(self, module, reference, context)
        if chosen:
            self.remark(
                context, "applied", "", f"{len(chosen)} weights in int{self.bits}: {before / 1e6:.1f} MB → "
                f"{after / 1e6:.1f} MB"
            )  # fmt: skip
        return bool(chosen)

    def _grams(self, module: Module, chosen: list[Layer], context: PassContext) -> dict[str, Array]:
        """Gram matrices of what the layers read, by the name of the value."""
        wanted = grams_wanted(chosen, self.method)
        if not wanted:
            return {}
        calibration = calibration_of(self, self.stats, module, context, gram=wanted)
        found = {name: one.gram for name, one in calibration.tensors.items() if one.gram is not None}
        for layer in chosen:
            if str(layer.data.name) not in found:
                message = "its integers are the nearest: there is no Gram matrix of what it reads"
                self.remark(context, "missed", layer.name, message)
        return found

    def _integers(self, data: Array, encoding: Encoding, group: list[Layer], grams: dict[str, Array]) -> Array:
        known = [grams[str(layer.data.name)] for layer in group if str(layer.data.name) in grams]
        return round_weight(data, group[0], encoding, np.sum(known, axis=0) if known else None, self.method)

    def encoding(self, weight: Array, layer: Layer) -> Encoding:
        """How ``weight`` is quantized."""
        dtype = (_SIGNED if self.symmetric else _UNSIGNED)[self.bits]
        depth = weight.shape[layer.depth_axis]
        block = self.block if 0 < self.block < depth else 0
        axis = layer.depth_axis if block else layer.out_axis
        # What GPTQ pushes from weight to weight needs the extremes; convolutions have no Gram matrix for it.
        nearest = self.method == "round" or is_onnx(layer.node, "Conv")
        ratios = _RATIOS if self.search and nearest else _RATIOS[:1]
        tried = [
            encode_weight(weight, dtype, axis, block=block, symmetric=self.symmetric, ratio=ratio) for ratio in ratios
        ]
        return min(tried, key=lambda encoding: squared_error(weight, encoding))


def _data(weight: ir.Value) -> Array:
    tensor = tensor_of(weight)
    assert tensor is not None
    return np.asarray(tensor.numpy())
