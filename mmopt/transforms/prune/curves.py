"""What it costs to do without units: an order to go in, and the damage after each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mmopt.analysis.axes import Group

Array = np.ndarray[Any, Any]


_NEARLY_ALL = 0.999
"""Nothing left of a group would cost without bound."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """The units of one group from the least important to the most.

    Attributes:
        order: Units in the order they go.
        damage: float64 ``[units + 1]``: what it costs when the first n are gone. Starts with 0 and never falls.
    """

    order: Array
    damage: Array

    def kept(self, count: int) -> tuple[int, ...]:
        """The ``count`` units that stay, ascending."""
        return tuple(int(unit) for unit in np.sort(self.order[len(self.order) - count :]))

    def through(self, measured: Mapping[int, float]) -> Curve:
        """The same order at the damage that was measured.

        Args:
            measured: Damage by number of units left. Between two of these, what it was in proportion to the damage here
                goes from the one to the other, and beyond all it stays as at the last.
        """
        known = sorted(count for count in measured if self.damage[-1 - count] > 0)
        if not known:
            return self
        ratios = [np.log(measured[count] / self.damage[-1 - count]) for count in known]
        left = np.arange(len(self.order), -1, -1)
        return Curve(self.order, np.maximum.accumulate(self.damage * np.exp(np.interp(left, known, ratios))))


def from_scores(scores: Array, bundle: Sequence[Sequence[int]] | None = None) -> Curve:
    """The curve whose damage is the sum of the scores of the units gone.

    Args:
        scores: A number of at least 0 for each unit.
        bundle: Units that can only go together, each unit in one of them; every unit alone when None.
    """
    bundles = [[unit] for unit in range(len(scores))] if bundle is None else [list(units) for units in bundle]
    ranked = sorted(bundles, key=lambda units: (float(scores[units].mean()), units))
    order = np.array([unit for units in ranked for unit in units], dtype=np.int64)
    return Curve(order, np.concatenate([[0.0], np.cumsum(np.maximum(scores[order], 0).astype(np.float64))]))


def normalized(
    curves: Mapping[str, Curve], groups: Sequence[Group], weight: Callable[[Group], float] = lambda group: 1.0
) -> dict[str, Curve]:
    """Curves that compare across groups, and towers that compare with each other.

    The damage of a group is the logarithm of what its scores lose, so that it grows the faster the less is left, and
    counts by its part in its tower, by ``weight``: every tower as a whole costs the same.

    Args:
        curves: By name of the group.
        groups: The groups that they are of.
        weight: What a group counts in its tower.
    """
    known = {group.name: group for group in groups}
    totals: dict[str | None, float] = {}
    for name in curves:
        tower = known[name].tower
        totals[tower] = totals.get(tower, 0.0) + weight(known[name])
    result = {}
    for name, curve in curves.items():
        whole = float(curve.damage[-1])
        part = weight(known[name]) / max(totals[known[name].tower], 1e-30)
        lost = -np.log1p(-_NEARLY_ALL * curve.damage / whole) if whole > 0 else np.zeros_like(curve.damage)
        result[name] = Curve(curve.order, part * lost)
    return result
