"""Chooses how many units of each group to keep: the least damage at which the cost is met.

The cost is no sum over groups (both ends of a product count), so this goes step by step: of all groups and sizes, the
one whose damage for each unit of cost saved is least, with the cost of the model as it is by then. Looking at every
smaller size, not only at the next, gets over steps that save nothing, as kernels have them. At the end, what was cut
more than needed is given back, the most damage first. Several such descents aim lower and lower, since one that goes
too far and gives back often ends better than one that stops; the best of them counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence

from mmopt.errors import UserError
from mmopt.transforms.prune.costs import CostModel, Sizes
from mmopt.transforms.prune.curves import Curve

_TINY = 1e-12

_BEYOND = (0.02, 0.05, 0.1, 0.15, 0.2)
"""Parts of a cost by which descents go beyond the goal, besides the one that does not."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """A cost that is to be met.

    Attributes:
        cost: The most it may be.
        tower: Of which tower; of the whole model when None.
    """

    cost: float
    tower: str | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """What there is to choose from.

    Attributes:
        curves: Damage by group.
        options: Sizes that each group may have, in units kept, descending from all of them.
        cost: The cost of sizes.
        floors: The least cost that is left to each tower; towers that are not in it have none.
    """

    curves: Mapping[str, Curve]
    options: Mapping[str, Sequence[int]]
    cost: CostModel
    floors: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def damage(self, sizes: Sizes) -> float:
        """The damage of sizes: the sum over groups."""
        return sum(float(self.curves[name].damage[-1 - sizes[name]]) for name in self.options)


def choose(problem: Problem, goals: Sequence[Goal]) -> dict[str, int]:
    """Units to keep of each group.

    Args:
        problem: What there is to choose from.
        goals: Costs to be met, all of them.

    Raises:
        UserError: The goals cannot be met, with the least cost that can.
    """
    found = [_given_back(problem, _cut(problem, goals), goals)]
    for part in _BEYOND:
        lower = [dataclasses.replace(goal, cost=goal.cost * (1 - part)) for goal in goals]
        with contextlib.suppress(UserError):
            found.append(_given_back(problem, _cut(problem, lower), goals))
    return min(found, key=problem.damage)


def _cut(problem: Problem, goals: Sequence[Goal]) -> dict[str, int]:
    """One descent until all goals are met."""
    sizes = {name: listed[0] for name, listed in problem.options.items()}
    while unmet := [goal for goal in goals if not _is_met(problem, sizes, goal)]:
        moves = [move for goal in unmet for move in _moves(problem, sizes, goal)]
        if not moves:
            raise _impossible(problem, sizes, unmet[0])
        _, name, count = min(moves)
        sizes[name] = count
    return sizes


def _is_met(problem: Problem, sizes: Sizes, goal: Goal) -> bool:
    return problem.cost.total(sizes, goal.tower) <= goal.cost * (1 + 1e-9)


def _moves(problem: Problem, sizes: Sizes, goal: Goal) -> list[tuple[float, str, int]]:
    """Damage for each unit of cost saved, of every smaller size of every group."""
    found = []
    missing = problem.cost.total(sizes, goal.tower) - goal.cost
    left = {tower: problem.cost.total(sizes, tower) for tower in problem.floors}
    for name, listed in problem.options.items():
        damage = problem.curves[name].damage
        for count in listed:
            if count >= sizes[name]:
                continue
            saved = problem.cost.difference(sizes, name, count, goal.tower)
            if saved <= _TINY * max(goal.cost, 1.0) or not _keeps_floors(problem, sizes, name, count, left):
                continue
            # What is saved beyond the goal is of no use.
            useful = min(saved, missing)
            found.append((float(damage[-1 - count] - damage[-1 - sizes[name]]) / useful, name, count))
    return found


def _keeps_floors(problem: Problem, sizes: Sizes, name: str, count: int, left: Mapping[str, float]) -> bool:
    for tower, floor in problem.floors.items():
        saved = problem.cost.difference(sizes, name, count, tower)
        if saved > 0 and left[tower] - saved < floor * (1 - 1e-9):
            return False
    return True


def _given_back(problem: Problem, sizes: dict[str, int], goals: Sequence[Goal]) -> dict[str, int]:
    while True:
        gains = []
        for name, listed in problem.options.items():
            damage = problem.curves[name].damage
            for count in listed:
                less = float(damage[-1 - sizes[name]] - damage[-1 - count])
                if count > sizes[name] and less > 0 and _still_met(problem, {**sizes, name: count}, goals):
                    gains.append((less, name, count))
        if not gains:
            return sizes
        _, best, count = max(gains)
        sizes[best] = count


def _still_met(problem: Problem, sizes: Sizes, goals: Sequence[Goal]) -> bool:
    return all(_is_met(problem, sizes, goal) for goal in goals)


def _impossible(problem: Problem, sizes: Sizes, goal: Goal) -> UserError:
    whole, least = problem.cost.total(None, goal.tower), problem.cost.total(sizes, goal.tower)
    what = "the model" if goal.tower is None else f"the tower {goal.tower!r}"
    wanted, possible = (1 - cost / max(whole, _TINY) for cost in (goal.cost, least))
    return UserError(
        f"{what} cannot be made {wanted:.0%} cheaper: all that can be cut, down to the floors, is {possible:.0%}",
        where="--prune",
        hint="ask for less, lower the floors (prune-structured{floor=…,tower_floor=…}), or see what is frozen and why "
        "with -v",
    )
