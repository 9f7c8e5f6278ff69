"""Whether two contenders answer alike. A fast wrong answer is no result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mmopt.pipeline.validation import Tolerance, compare, worst

TOLERANCE = 1e-3
"""Default bound on the greatest error, as a fraction of the range of the reference output."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How one contender's outputs compare with those of the first.

    Attributes:
        reference: Name of the contender compared with.
        ok: Whether every output agrees within the tolerance.
        error: Greatest error over all outputs, as a fraction of each output's range; infinite when outputs cannot be
            compared at all.
        detail: What disagrees, in a sentence; "" when nothing does.
    """

    reference: str
    ok: bool
    error: float
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """The form a result file holds; an infinite error is written as null."""
        return {**dataclasses.asdict(self), "error": self.error if math.isfinite(self.error) else None}


def compare_answers(
    reference: Mapping[str, Any], other: Mapping[str, Any], against: str, tolerance: float = TOLERANCE
) -> Agreement:
    """Compare outputs by name, or by position when the two name them differently.

    Args:
        reference: Outputs of the first contender, in order.
        other: Outputs of another.
        against: Name of the first contender.
        tolerance: Greatest error allowed, as a fraction of the reference output's range.
    """
    if len(reference) != len(other):
        return Agreement(against, False, math.inf, f"{len(other)} outputs instead of {len(reference)}")
    if set(reference) != set(other):
        other = dict(zip(reference, other.values(), strict=True))
    bound = Tolerance(tolerance, fraction=0.01)
    found = [compare(expected, other[name], bound, name=name) for name, expected in reference.items()]
    furthest = worst(found)
    if furthest is None:
        return Agreement(against, True, 0.0)
    detail = "" if furthest.ok else f"output {furthest.name!r}: {furthest.reason}"
    return Agreement(against, furthest.ok, max(c.relative_error for c in found), detail)
