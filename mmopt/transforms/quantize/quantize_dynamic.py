"""Weights in integers ahead of time, activations at run time by the range that each tensor turns out to have.

    y = MatMul(x, w)    →    y = MatMul(Dequantize(DynamicQuantize(x)), Dequantize(w'))        w' = w in int8

LSTM and GRU too: the range of their states is known anyway. Needs no calibration. The range is taken over a whole
tensor, so one outlier costs every row its precision.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import ClassVar

import onnx_ir as ir

from mmopt.analysis.calibration import Calibration
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.editing import Names
from mmopt.transforms.quantize.layers import Layer, Selection, layers
from mmopt.transforms.quantize.qdq import Quantizer
from mmopt.transforms.quantize.quantize_static import quantize_weight
from mmopt.transforms.quantize.recurrent_layers import LEAST_WORK, RECURRENT, quantize_recurrent, wanted_recurrent


@dataclasses.dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Compute products in integers: int8 weights, activations by their range at run time.

    Attributes:
        include: Patterns of names of nodes to quantize; all when empty.
        exclude: Patterns of names of nodes to leave alone.
        logits: Whether layers whose result leaves the model are quantized too.
        recurrent_work: Multiply-adds of states, over all steps, from which LSTM and GRU are quantized.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    logits: bool = False
    recurrent_work: int = LEAST_WORK

    def run(self, module: Module, context: PassContext) -> bool:
        """Quantize what is selected; leave a remark for each layer that stays as it is."""
        if module.opset < 13:
            self.remark(context, "missed", "", f"opset {module.opset} is too old to quantize in")
            return False
        selection = Selection(("MatMul", "Gemm", *RECURRENT), self.include, self.exclude, self.logits)
        chosen: dict[ir.Value, list[Layer]] = collections.defaultdict(list)
        recurrent = wanted_recurrent(self, module, context, selection, self.recurrent_work)
        for layer in layers(module):
            if reason := selection.refusal(layer):
                self.remark(context, "missed", layer.name, f"{layer.node.op_type} stays in float: {reason}")
            else:
                chosen[layer.data].append(layer)
        quantizer, names = Quantizer(module.model), Names(module.model)
        for value in dict.fromkeys((*chosen, *recurrent)):
            group, readers = chosen.get(value, []), recurrent.get(value, [])
            quantizer.dynamic(value, [*(layer.node for layer in group), *readers])
            for layer in group:
                quantize_weight(quantizer, layer)
            for node in readers:
                quantize_recurrent(quantizer, node, Calibration(), names)
        count, more = (sum(map(len, groups.values())) for groups in (chosen, recurrent))
        if count or more:
            what = f"{count} products" + (f", {more} recurrent layers" if more else "")
            self.remark(context, "applied", "", f"in int8, with ranges found at run time: {what}")
        return bool(count or more)
