"""Calibration: what the tensors of a model look like on real data, in bounded memory."""

from __future__ import annotations

from mmopt.analysis.calibration.collect import GIVEN, MADE_UP, RANDOM, Calibration, collect
from mmopt.analysis.calibration.made_up import made_up
from mmopt.analysis.calibration.ranges import choose_range
from mmopt.analysis.calibration.statistics import Histogram, TensorStatistics
from mmopt.analysis.calibration.store import load, save

__all__ = [
    "GIVEN", "MADE_UP", "RANDOM", "Calibration", "Histogram", "TensorStatistics", "choose_range", "collect", "load",
    "made_up", "save",
]  # fmt: skip
