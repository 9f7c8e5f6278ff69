"""Samples that mean nothing, for those who ask for them."""

from __future__ import annotations

import numpy as np

from mmopt.analysis.calibration.statistics import Array
from mmopt.analysis.probes import probe_inputs
from mmopt.ir.module import Module


def made_up(module: Module, seed: int = 0, count: int = 16) -> dict[str, Array]:
    """Legal inputs with a leading axis of ``count`` samples, all of the same shapes."""
    sets = [probe_inputs(module, seeds=[seed + number])[0] for number in range(count)]
    return {name: np.stack([feeds[name] for feeds in sets]) for name in sets[0]}
