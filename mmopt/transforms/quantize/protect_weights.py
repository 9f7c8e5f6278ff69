"""Scales up the weights of the channels that carry most, so that rounding spares them.

    y = W · norm(x; g, b)    =    (W S) · norm(x; g/S, b/S)        S = diag(s), s = mean|x|^α

Nothing changes but rounding. α is the one that leaves the least error in what the layers give (AWQ: Lin et al., 2024).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.editing import Array
from mmopt.transforms.quantize.calibrating import calibration_of
from mmopt.transforms.quantize.encoding import encode_weight
from mmopt.transforms.quantize.gptq import output_error
from mmopt.transforms.quantize.layers import Layer
from mmopt.transforms.quantize.scales import Writer, after_norms, limited, weight_of


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
        groups = list(after_norms(module))
        if not groups:
            return False
        names = [str(norm.outputs[0].name) for norm, _ in groups]
        calibration = calibration_of(self, self.stats, module, context, gram=names)
        writer = Writer(module)
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
        matrices = [weight_of(layer) if layer.depth_axis == 0 else weight_of(layer).T for layer in readers]
        best, least = np.ones_like(magnitudes), np.inf
        for alpha in np.linspace(0, 1, self.steps + 1)[:-1]:
            scales = np.maximum(magnitudes, 1e-8) ** alpha
            scales = limited(scales / np.sqrt(scales.max() * scales.min()))
            error = sum(output_error(w, self._rounded(w * scales[:, None]) / scales[:, None], gram) for w in matrices)
            if error < least:
                best, least = scales, error
        return best

    def _rounded(self, weight: Array) -> Array:
        dtype = {4: ir.DataType.INT4, 8: ir.DataType.INT8}[self.bits]
        block = self.block if 0 < self.block < len(weight) else 0
        encoding = encode_weight(weight, dtype, 0 if block else 1, block=block)
        return encoding.dequantize(encoding.quantize(weight))
