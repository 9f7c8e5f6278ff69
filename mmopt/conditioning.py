"""How far a model's outputs move when its inputs move by rounding: no comparison of results can be finer than that."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmopt.runnable import Inputs, Runnable

_TRIALS = 3
_NUDGED = ("float32", "float64")


def rounding_noise(runnable: Runnable, inputs: Inputs, *, seed: int = 0) -> dict[str, float]:
    """The largest change of each output when every input element moves to a neighbouring number, up or down by chance.

    Args:
        runnable: The model.
        inputs: One set of inputs.
        seed: Seed of the directions.

    Returns:
        By output name, the largest absolute change of an element over three trials; 0 for outputs that are not floats
        or that the inputs leave alone, and infinity where elements turn into NaN or infinity or back.
    """
    random = np.random.default_rng(seed)
    nudged = [{name: _neighbours(value, random) for name, value in inputs.items()} for _ in range(_TRIALS)]
    first, *moved = runnable.run_all([inputs, *nudged])
    return {name: max(_distance(value, other[name]) for other in moved) for name, value in first.items()}


def _neighbours(value: Any, random: np.random.Generator) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype.name not in _NUDGED:
        return value
    upwards = random.random(value.shape) < 0.5
    moved = np.nextafter(value, np.where(upwards, np.inf, -np.inf).astype(value.dtype))
    # Zeros stay: they say that something is absent, in masks and padding.
    return np.where((value == 0) | ~np.isfinite(value), value, moved)


def _distance(a: Any, b: Any) -> float:
    if not isinstance(a, np.ndarray) or a.dtype.name not in _NUDGED or a.shape != b.shape or a.size == 0:
        return 0.0
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    return float(np.abs(a[finite].astype(np.float64) - b[finite]).max(initial=0.0))
