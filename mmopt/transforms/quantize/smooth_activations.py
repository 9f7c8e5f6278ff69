"""Moves scales from activations to weights, where a norm stands between: both get easier to quantize.

    y = W · norm(x; g, b)    =    (W S) · norm(x; g/S, b/S)        S = diag(s)

Nothing changes but rounding. s = max|x|^α / max|w|^(1-α) balances activations against weights (SmoothQuant: Xiao et
al., 2023).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from mmopt.errors import UserError
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.quantize.calibrating import calibration_of
from mmopt.transforms.quantize.scales import Writer, after_norms, limited, magnitudes


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
        groups = list(after_norms(module))
        if not groups:
            return False
        calibration = calibration_of(self, self.stats, module, context)
        writer = Writer(module)
        done = 0
        for norm, readers in groups:
            value = norm.outputs[0]
            found = calibration.tensors.get(str(value.name))
            if found is None or found.channels is None:
                self.remark(context, "missed", str(norm.name), f"no statistics of {value.name!r} by channel")
                continue
            activations = np.maximum(np.abs(found.channels.low), np.abs(found.channels.high))
            weights = np.max([magnitudes(layer) for layer in readers], axis=0)
            scales = limited(activations**self.alpha / np.maximum(weights, 1e-12) ** (1 - self.alpha))
            writer.scale_norm(norm, scales)
            for layer in readers:
                writer.scale_depth(layer, scales)
            done += 1
        self.remark(context, "applied", "", f"{done} norms hand scales over to the layers that read them.")
        return bool(done)
