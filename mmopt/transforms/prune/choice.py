"""What a choice of units to keep means for every tensor: positions that go, value by value and axis by axis."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from mmopt.analysis.axes import Group, Place
from mmopt.analysis.axes.space import has_copies
from mmopt.errors import UserError, did_you_mean
from mmopt.ir.module import Module

Keep = Mapping[str, Sequence[int]]
"""Units to keep, ascending, by name of the group. Groups that are not named stay as they are."""

Axes = dict[int, frozenset[int]]
"""Positions that go, by axis."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """A choice, place by place.

    Attributes:
        groups: The groups that lose units, with the units that go.
        tensors: What goes of tensors and of weights, by name.
        copies: What goes of vectors that several operators read, by name and by name of the reader.
    """

    groups: tuple[tuple[Group, frozenset[int]], ...]
    tensors: Mapping[str, Axes]
    copies: Mapping[tuple[str, str], Axes]

    def removed(self, value: ir.Value | None, axis: int) -> frozenset[int]:
        """Positions that go on an axis of a tensor."""
        return self.tensors.get(str(value.name), {}).get(axis, frozenset()) if value is not None else frozenset()

    def touches(self, value: ir.Value | None) -> bool:
        """Whether anything of a tensor goes."""
        return value is not None and str(value.name) in self.tensors


def plan_cut(module: Module, groups: Iterable[Group], keep: Keep) -> Cut:
    """Check a choice and spell it out.

    Raises:
        UserError: There is no such group, it is frozen, or the units are none, not ascending, or not its own.
    """
    by_name = {group.name: group for group in groups}
    chosen = []
    for name, units in keep.items():
        group = by_name.get(name)
        if group is None:
            raise UserError(f"there is no group {name!r} to cut", hint=did_you_mean(name, by_name))
        gone = frozenset(range(group.units)) - _checked(group, units)
        if gone and group.frozen:
            raise UserError(
                f"the group {name!r} cannot be cut: {group.frozen}", hint="keep all of its units, or leave it out"
            )
        if gone:
            chosen.append((group, gone))
    tensors: dict[str, dict[int, set[int]]] = collections.defaultdict(lambda: collections.defaultdict(set))
    copies: dict[tuple[str, str], dict[int, set[int]]] = collections.defaultdict(lambda: collections.defaultdict(set))
    copied = {str(v.name) for v in constants_of(module) if has_copies(v)}
    for group, gone in chosen:
        for place in group.activations:
            _add(tensors[place.value], place, gone)
        for place in group.weights:
            own = place.value in copied and place.node is not None
            _add(copies[place.value, str(place.node)] if own else tensors[place.value], place, gone)
    return Cut(
        tuple(chosen),
        {name: _frozen(axes) for name, axes in tensors.items()},
        {key: _frozen(axes) for key, axes in copies.items()},
    )


def _checked(group: Group, units: Sequence[int]) -> frozenset[int]:
    kept = [int(unit) for unit in units]
    where = f"units to keep of the group {group.name!r}"
    if not kept:
        raise UserError("none are left", where=where, hint="keep at least one")
    if any(b <= a for a, b in itertools.pairwise(kept)):
        raise UserError("they are not in ascending order, each once", where=where, hint="sort them")
    if kept[0] < 0 or kept[-1] >= group.units:
        bad = kept[0] if kept[0] < 0 else kept[-1]
        raise UserError(f"{bad} is none of them", where=where, hint=f"they go from 0 to {group.units - 1}")
    if len(kept) % group.multiple:
        raise UserError(f"{len(kept)} is no multiple of {group.multiple}", where=where, hint="keep more or fewer")
    return frozenset(kept)


def _add(axes: dict[int, set[int]], place: Place, gone: frozenset[int]) -> None:
    for unit in gone:
        axes[place.axis].update(place.positions[unit])


def _frozen(axes: Mapping[int, set[int]]) -> Axes:
    return {axis: frozenset(positions) for axis, positions in axes.items()}


def constants_of(module: Module) -> list[ir.Value]:
    """Initializers of the main graph, and what its ``Constant`` operators give."""
    given = [node.outputs[0] for node in module.graph if node.op_type == "Constant"]
    return [*module.graph.initializers.values(), *given]
