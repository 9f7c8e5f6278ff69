"""Shows that slicing a module does what masking it does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mmopt.analysis.axes import Group
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.transforms.prune.choice import Keep
from mmopt.transforms.prune.masking import mask_units
from mmopt.transforms.prune.slicing import slice_units


def prove(module: Module, groups: Iterable[Group], keep: Keep, inputs: Mapping[str, Any]) -> float:
    """Slice one copy, mask another, and run both.

    Args:
        module: The module that ``groups`` were found in; it is not changed.
        groups: Result of :func:`mmopt.analysis.axes.find_groups`.
        keep: Units to keep by name of the group.
        inputs: One set of inputs by name.

    Returns:
        The largest difference of any output, as a fraction of the largest magnitude in the masked module's output;
        infinite where one has numbers and the other has not.

    Raises:
        UserError: As :func:`mmopt.transforms.prune.slicing.slice_units`.
        BackendError: One of the two cannot be run.
    """
    listed = tuple(groups)
    sliced, masked = module.clone(), module.clone()
    slice_units(sliced, listed, keep)
    mask_units(masked, listed, keep)
    with ReferenceRunner() as runner:
        expected, found = runner.run(masked, inputs), runner.run(sliced, inputs)
    return max((difference(found[name], expected[name]) for name in expected), default=0.0)


def difference(found: Any, expected: Any) -> float:
    """Largest difference of two arrays, as a fraction of the largest finite magnitude in the second."""
    left, right = np.asarray(found), np.asarray(expected)
    if left.shape != right.shape:
        return float("inf")
    if left.dtype.kind not in "fiub" or not left.size:
        return 0.0 if np.array_equal(left, right) else float("inf")
    left, right = left.astype(np.float64), right.astype(np.float64)
    finite = np.isfinite(right)
    if not np.array_equal(left[~finite], right[~finite], equal_nan=True) or not np.isfinite(left[finite]).all():
        return float("inf")
    scale = float(np.abs(right[finite]).max(initial=0.0)) or 1.0
    return float(np.abs(left[finite] - right[finite]).max(initial=0.0)) / scale
