"""Cuts whole units (channels, neurons, heads, coordinates of heads, hidden units) out of a model.

Conv 64→128, Relu, Conv 128→128        Conv 64→96, Relu, Conv 96→128
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from mmopt.analysis.axes import Group, find_groups
from mmopt.errors import UserError
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.fingerprint import fingerprint
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.prune import costs, criteria
from mmopt.transforms.prune.budgets import check_towers, parse
from mmopt.transforms.prune.choice import Keep, plan_cut
from mmopt.transforms.prune.choose import Goal, Problem, choose
from mmopt.transforms.prune.curves import Curve, normalized
from mmopt.transforms.prune.latency import latency
from mmopt.transforms.prune.observing import batches_of
from mmopt.transforms.prune.reference import remember
from mmopt.transforms.prune.sensitivity import SAMPLES, measured
from mmopt.transforms.prune.separate_fills import separate_fills
from mmopt.transforms.prune.slicing import slice_units

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What can be cut of a module, at what damage, and what that saves.

    Attributes:
        groups: All groups of the module.
        usable: Those that may be cut.
        problem: Damage, sizes and cost.
        tower_floor: A tower keeps at least this part of what the whole model keeps.
        uniform: The same share of every group goes.
    """

    groups: tuple[Group, ...]
    usable: tuple[Group, ...]
    problem: Problem
    tower_floor: float
    uniform: bool

    def sizes(self, shares: Mapping[str | None, float]) -> dict[str, int]:
        """Units to keep of each usable group.

        Args:
            shares: Part of the cost to cut, by tower; of the whole model under None.

        Raises:
            UserError: That is more than can be cut, with how much can.
        """
        cost = self.problem.cost
        goals = [Goal(cost.total(None, tower) * (1 - share), tower) for tower, share in shares.items()]
        floors = {}
        if None in shares:
            kept = self.tower_floor * (1 - shares[None])
            floors = {tower: cost.total(None, tower) * kept for tower in cost.towers()}
        problem = dataclasses.replace(self.problem, floors=floors)
        return _uniform(problem, goals) if self.uniform else choose(problem, goals)

    def keep(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The units that stay of each group that is cut."""
        curves = self.problem.curves
        return {g.name: curves[g.name].kept(sizes[g.name]) for g in self.usable if sizes[g.name] < g.units}


_STEPS = {"heads": 1, "groups": 1}
"""Units that are cut one by one: each of them is wide in itself."""


_SIZES = 16
"""Sizes of a group that are looked at where time counts, and some more."""


@dataclasses.dataclass(frozen=True)
class PruneStructured(Pass):
    """Cut whole channels, neurons, heads and hidden units, the least important first, until the model costs less.

    Attributes:
        share: How much of the cost goes: ``40%``, or by tower: ``"towers.vision=30%,towers.text=10%"``.
        measure: What costs: ``macs``, ``parameters``, or ``time`` as the target's kernels are predicted to take.
        criterion: How units are judged: ``magnitude``, ``activation``, ``second-order``, ``taylor``, ``fisher``,
            ``cross-modal`` or ``random``; ``auto`` is ``second-order`` with calibration samples, else ``magnitude``.
        compare: How groups compare: ``outputs`` cuts half of each and measures how the outputs move, with all inputs
            and with each modality alone; ``scores`` goes by the criterion, normalized in each tower; ``uniform`` cuts
            the same share of each; ``global`` goes by the criterion alone. ``auto`` is ``outputs`` with samples, else
            ``scores``.
        step: Units at a time; by default what the target's kernels like.
        floor: Share of the units that each group keeps at least.
        tower_floor: A tower keeps at least this part of what the whole model keeps (of its own cost).
        include: Patterns of names of groups to cut (``vision/*``); all when empty.
        exclude: Patterns of names of groups to leave alone.
        kinds: Kinds of groups to cut; all when empty.
        samples: Calibration samples to use; 0 for all.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    share: str = "30%"
    measure: Literal["macs", "parameters", "time"] = "macs"
    criterion: Literal[
        "auto", "magnitude", "activation", "second-order", "taylor", "fisher", "cross-modal", "random"
    ] = "auto"
    compare: Literal["auto", "outputs", "scores", "uniform", "global"] = "auto"
    step: int = 0
    floor: float = 0.125
    tower_floor: float = 0.5
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    samples: int = 0

    def run(self, module: Module, context: PassContext) -> bool:
        """Cut, and remember what the module was, for passes that repair.

        Raises:
            UserError: A budget that cannot be met, an unknown tower, or a criterion without what it needs.
        """
        separated = separate_fills(module)
        plan = self.plan(module, context)
        shares = parse(self.share, f"{self.name}, share")
        check_towers(shares, plan.problem.cost.towers(), f"{self.name}, share")
        sizes = plan.sizes(shares)
        keep = plan.keep(sizes)
        if not keep:
            return separated
        cut_units(module, plan.groups, keep)
        self._tell(plan, sizes, context)
        return True

    def plan(self, module: Module, context: PassContext) -> Plan:
        """What can be cut of a module, at what damage and for what: all but how much.

        Args:
            module: The module, in which nothing changes; :func:`separate_fills` has been there.
            context: Samples, seed, and what predicts times.

        Raises:
            UserError: A criterion or measure without what it needs.
        """
        groups = find_groups(module)
        usable = self._usable(groups, context)
        cost = self._cost(module, usable, context)
        batches = [] if context.inputs is None else batches_of(module, context.inputs, most=self.samples)
        names = tuple(group.name for group in usable)
        key = (fingerprint(module.model), _digest(context.inputs), names, self.criterion, self.compare, self.samples)
        curves = _remembered((*key, context.seed), lambda: self._curves(module, groups, usable, batches, context))
        problem = Problem(curves, {g.name: self._options(g) for g in usable}, cost)
        return Plan(tuple(groups), tuple(usable), problem, self.tower_floor, uniform=self.compare == "uniform")

    def _usable(self, groups: Sequence[Group], context: PassContext) -> list[Group]:
        usable = []
        for group in groups:
            reason = group.frozen or self._refusal(group)
            if reason:
                self.remark(context, "missed", group.name, f"{group.units} {group.kind} stay: {reason}")
            elif group.units > group.multiple:
                usable.append(group)
        return usable

    def _refusal(self, group: Group) -> str:
        if self.kinds and group.kind not in self.kinds:
            return f"kinds does not list {group.kind!r}"
        if self.include and not any(fnmatch.fnmatchcase(group.name, pattern) for pattern in self.include):
            return "no pattern of include matches"
        if any(fnmatch.fnmatchcase(group.name, pattern) for pattern in self.exclude):
            return "a pattern of exclude matches"
        return ""

    def _cost(self, module: Module, usable: Sequence[Group], context: PassContext) -> costs.CostModel:
        owner = costs.owners(module)
        if self.measure == "parameters":
            return costs.parameters(module, usable, owner)
        binding = costs.binding_of(module, context.inputs)
        if self.measure == "time":
            if context.predict is None:
                raise UserError("no target predicts times here", where=f"{self.name}, measure", hint="use macs")
            return latency(module, usable, owner, context.predict, binding)
        return costs.macs(module, usable, owner, binding)

    def _curves(
        self,
        module: Module,
        groups: Sequence[Group],
        usable: Sequence[Group],
        batches: Sequence[Mapping[str, Array]],
        context: PassContext,
    ) -> dict[str, Curve]:
        criterion = self.criterion
        if criterion == "auto":
            criterion = "second-order" if batches else "magnitude"
        evidence = criteria.Evidence(module, batches, context.seed)
        found = criteria.curves(usable, criterion, evidence)
        compare = self.compare
        if compare == "auto":
            compare = "outputs" if batches else "scores"
        if compare == "global":
            return found
        if compare == "uniform":
            return {name: _even(curve) for name, curve in found.items()}
        if compare == "scores":
            return normalized(found, usable)
        if not batches:
            raise UserError(
                "comparing by outputs needs samples", where=f"{self.name}, compare", hint="give --calib, or use scores"
            )
        some = batches_of(module, context.inputs or {}, most=SAMPLES)
        with ReferenceRunner(seed=context.seed) as runner:
            if criterion != "second-order":
                return measured(found, module, groups, some, runner)
            # Its damage is what is left after the rest has made up for what goes.
            return measured(found, module, groups, some, runner, evidence.make_up)

    def _options(self, group: Group) -> list[int]:
        """Sizes a group may have, descending: all of it, and multiples of the step down to the floor."""
        step = self.step or liked_step(group, self.measure)
        step = -(-step // group.multiple) * group.multiple
        least = max(group.multiple, -(-int(np.ceil(group.units * self.floor)) // step) * step)
        return [group.units, *range((group.units - 1) // step * step, least - 1, -step)]

    def _tell(self, plan: Plan, sizes: Mapping[str, int], context: PassContext) -> None:
        usable, problem = plan.usable, plan.problem
        for group in usable:
            if sizes[group.name] < group.units:
                self.remark(context, "applied", group.name, f"{group.units} → {sizes[group.name]} {group.kind}.")
        counts = collections.Counter(group.kind for group in usable if sizes[group.name] < group.units)
        what = ", ".join(f"{kind} in {count} groups" for kind, count in counts.most_common())
        parts = [
            f"{'all' if tower is None else tower} {1 - problem.cost.total(sizes, tower) / whole:.0%}"
            for tower in (None, *problem.cost.towers())
            if (whole := problem.cost.total(None, tower))
        ]
        self.remark(context, "applied", "", f"cut {what}; less {self.measure}: {', '.join(parts)}.")


def cut_units(module: Module, groups: Sequence[Group], keep: Keep) -> None:
    """Take units out, in place, and remember what the module was for passes that repair.

    Args:
        module: The module that ``groups`` were found in.
        groups: What :func:`mmopt.analysis.axes.find_groups` found.
        keep: Units to keep by name of the group; groups that are not named stay whole.

    Raises:
        UserError: There is no such group, it is frozen, or the units are none, not ascending, or not its own.
    """
    original = module.clone()
    cut = plan_cut(module, groups, keep)
    slice_units(module, groups, keep)
    remember(module, original, cut)


_known: dict[Hashable, dict[str, Curve]] = {}
"""Curves found in this process: who searches for a share by measuring asks for the same ones again."""

_MOST = 4


def _remembered(key: Hashable, find: Callable[[], dict[str, Curve]]) -> dict[str, Curve]:
    if key not in _known:
        while len(_known) >= _MOST:
            del _known[next(iter(_known))]
        _known[key] = find()
    return _known[key]


def _digest(samples: Mapping[str, Array] | None) -> str:
    """Hex digest of the contents of samples."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in (samples or {}).items():
        digest.update(repr((name, array.dtype, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def liked_step(group: Group, measure: str = "time") -> int:
    """Units at a time that leave sizes which kernels like.

    Where time is what counts, channels of convolutions fill whole vectors if there are two of them or more: one that is
    part empty takes as long as a full one, and a copy of the image besides. Then large groups have some sixteen sizes,
    too, for the time of each is predicted together with those of the groups beside it.

    Args:
        group: What is cut.
        measure: What costs.
    """
    if group.kind in _STEPS:
        return _STEPS[group.kind]
    fewest = 2 if group.kind == "channels" and measure == "time" else 4
    step = next((step for step in (16, 8, 4, 2) if group.units >= fewest * step), 1)
    return step * (-(-group.units // (_SIZES * step)) if measure == "time" else 1)


def _even(curve: Curve) -> Curve:
    units = len(curve.order)
    return Curve(curve.order, np.arange(units + 1) / units)


def _uniform(problem: Problem, goals: Sequence[Goal]) -> dict[str, int]:
    """The largest share of every group at which all goals are met."""
    shares = sorted({count / listed[0] for listed in problem.options.values() for count in listed}, reverse=True)
    sizes: dict[str, int] = {}
    for share in shares:
        sizes = {
            name: next((count for count in listed if count <= share * listed[0] + 1e-9), listed[-1])
            for name, listed in problem.options.items()
        }
        if all(problem.cost.total(sizes, goal.tower) <= goal.cost for goal in goals):
            return sizes
    return choose(problem, goals)
