"""How much the outputs of a model move when a part of one group goes, on all inputs and with one modality alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmopt.ir.evaluate import Outputs, ReferenceRunner
from mmopt.ir.module import Module
from mmopt.transforms.prune.curves import Curve
from mmopt.transforms.prune.modalities import Blanks

if TYPE_CHECKING:
    from mmopt.analysis.axes import Group

Array = np.ndarray[Any, Any]

SAMPLES = 32
"""Samples to run for each group, at each of its sizes."""

PARTS = (0.75, 0.5, 0.25)
"""Parts of a group that are left when it is measured."""

MakeUp = Callable[[Module, "Group", Sequence[int]], None]
"""Changes a module that only these units of a group are left of, in place."""

_LEAST = 1e-6
"""Damage below this is noise: groups that move nothing are told apart by the order of their units alone."""


def outputs_moved(after: Sequence[Outputs], before: Sequence[Outputs], *, centered: bool = False) -> float:
    """Mean squared error of the outputs, of their variance across samples, averaged over outputs.

    Args:
        after: Outputs on some sets of inputs.
        before: What they were.
        centered: Compare only how they differ from sample to sample, not their means.
    """
    found = []
    for name, first in before[0].items():
        if not isinstance(first, np.ndarray) or first.dtype.kind != "f":
            continue
        wanted = np.concatenate([np.asarray(one[name], np.float64).reshape(-1, _width(one[name])) for one in before])
        actual = np.concatenate([np.asarray(one[name], np.float64).reshape(-1, _width(one[name])) for one in after])
        finite = np.isfinite(wanted) & np.isfinite(actual)
        spread = np.where(finite, wanted - wanted.mean(axis=0, where=finite), 0.0)
        error = np.where(finite, actual - wanted, 0.0)
        if centered:
            error = np.where(finite, error - error.mean(axis=0), 0.0)
        found.append(float((error**2).sum() / max(float((spread**2).sum()), 1e-30)))
    return float(np.mean(found)) if found else 0.0


def _width(array: Array) -> int:
    return array.shape[-1] if array.ndim else 1


class Sensitivity:
    """Measures groups one at a time.

    Args:
        module: The module.
        groups: All groups of the module.
        batches: Sets of inputs.
        runner: An open runner.
    """

    def __init__(
        self, module: Module, groups: Sequence[Group], batches: Sequence[Mapping[str, Array]], runner: ReferenceRunner
    ) -> None:
        self._module, self._groups, self._runner = module, groups, runner
        blanks = Blanks(module, batches)
        self._sets: list[tuple[str | None, list[Mapping[str, Any]]]] = [(None, list(batches))]
        self._sets += [(tower, [blanks.alone(feeds, tower) for feeds in batches]) for tower in blanks.towers]
        self._before = [runner.run_all(module, feeds) for _, feeds in self._sets]

    def moved(self, group: Group, kept: Sequence[int], make_up: MakeUp) -> float:
        """How much the outputs move when only these units of a group are kept: the mean over all inputs and the tower.

        A modality that decides little moves the outputs little, and would be cut away where it has to decide alone.
        """
        from mmopt.transforms.prune.slicing import slice_units

        def change(cut: Module) -> None:
            slice_units(cut, self._groups, {group.name: kept})
            make_up(cut, group, kept)

        return self.moved_by(change, group.tower)

    def moved_by(self, change: Callable[[Module], object], tower: str | None) -> float:
        """The same for any change that is made to the module in place."""
        changed = self._module.clone()
        change(changed)
        sets = [
            (feeds, before)
            for (name, feeds), before in zip(self._sets, self._before, strict=True)
            if name is None or name == tower
        ]
        run = self._runner.prepare(changed)
        return float(np.mean([outputs_moved([run(one) for one in feeds], before) for feeds, before in sets]))


def measured(
    curves: Mapping[str, Curve],
    module: Module,
    groups: Sequence[Group],
    batches: Sequence[Mapping[str, Array]],
    runner: ReferenceRunner,
    make_up: MakeUp = lambda cut, group, kept: None,
) -> dict[str, Curve]:
    """Curves whose damage is that of the outputs: through what is measured with :data:`PARTS` of each group left.

    Args:
        curves: By name of the group, as the criterion has them.
        module: The module; it is left as it is.
        groups: All groups of the module.
        batches: Sets of inputs.
        runner: An open runner.
        make_up: Fits what reads a group to the loss of units before the outputs are looked at.

    Raises:
        BackendError: The model does not run on them.
    """
    sensitivity = Sensitivity(module, groups, batches, runner)
    known = {group.name: group for group in groups}
    result = {}
    for name, curve in curves.items():
        group = known[name]
        counts = {max(group.multiple, int(group.units * part) // group.multiple * group.multiple) for part in PARTS}
        moved = {count: max(sensitivity.moved(group, curve.kept(count), make_up), _LEAST) for count in counts}
        result[name] = curve.through(moved)
    return result
