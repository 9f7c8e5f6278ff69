"""Whether two contenders answer alike. A fast wrong answer is no result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

TOLERANCE = 1e-3
"""Default bound on the greatest error, as a fraction of the range of the reference output."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How one contender's outputs compare with those of the first.

    Attributes:
        reference: Name of the contender compared with.
        ok: Whether every output agrees within the tolerance.
        error: Greatest error over all outputs, as a fraction of each output's range.
        detail: What disagrees, in a sentence; "" when nothing does.
    """

    reference: str
    ok: bool
    error: float
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """The form a result file holds; an infinite error is written as null."""
        return {**dataclasses.asdict(self), "error": self.error if np.isfinite(self.error) else None}


def compare_answers(
    reference: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], against: str, tolerance: float = TOLERANCE
) -> Agreement:
    """Compare outputs by name, or by position when the two name them differently.

    Args:
        reference: Outputs of the first contender, in order.
        other: Outputs of another.
        against: Name of the first contender.
        tolerance: Greatest error allowed, as a fraction of the reference output's range.
    """
    if len(reference) != len(other):
        return Agreement(against, False, float("inf"), f"{len(other)} outputs instead of {len(reference)}")
    by_name = set(reference) == set(other)
    worst, detail = 0.0, ""
    for position, (name, expected) in enumerate(reference.items()):
        got = other[name] if by_name else list(other.values())[position]
        error, reason = output_error(np.asarray(expected), np.asarray(got))
        if not error <= tolerance and not detail:
            detail = f"output {name!r}: {reason or f'off by {error:.2g} of its range, allowed are {tolerance:.2g}'}"
        worst = max(worst, error)
    return Agreement(against, not detail, worst, detail)


def output_error(expected: np.ndarray, got: np.ndarray) -> tuple[float, str]:
    """Greatest absolute error over the range (max − min) of ``expected``, and the reason when there is none to give.

    Where ``expected`` is constant its magnitude stands for the range, or 1 when it is zero. NaN and infinities must
    stand in the same places. Anything but numbers must be equal.
    """
    if expected.shape != got.shape:
        return float("inf"), f"shape {list(got.shape)} instead of {list(expected.shape)}"
    if expected.dtype.kind in "OSU" or got.dtype.kind in "OSU":
        same = bool(np.array_equal(expected, got))
        return (0.0, "") if same else (float("inf"), "different text")
    wide = (np.float64, np.complex128)[expected.dtype.kind == "c"]
    expected, got = expected.astype(wide), got.astype(wide)
    finite = np.isfinite(expected)
    special = np.array_equal(expected[~finite], got[~finite], equal_nan=True)
    if not special or not np.isfinite(got[finite]).all():
        return float("inf"), "NaN or infinity in other places"
    if not finite.any():
        return 0.0, ""
    kept = expected[finite]
    span = abs(kept.max() - kept.min()) or abs(kept).max() or 1.0
    return float(abs(got[finite] - kept).max() / span), ""
