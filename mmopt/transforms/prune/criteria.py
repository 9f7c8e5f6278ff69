"""How much each unit matters, by weights, activations, gradients, or what could make up for it.

====================  =================================================================================================
``magnitude``         Σ w² of everything that belongs to the unit
``activation``        Σ E[x²] w² of what reads it: what its loss takes from the results of its readers (after Wanda)
``second-order``      the same after the other units have made up for it as well as they can (OBS with the Gram matrix)
``taylor``            E[(Σ x · ∂f/∂x)²]: what its loss takes from the outputs, to first order
``fisher``            Σ w² E[(∂f/∂w)²]: the same from the diagonal of the Fisher information
``cross-modal``       ``taylor`` with the tensor where the towers meet in place of the outputs
``random``            nothing; to compare with
====================  =================================================================================================

The last three but one need torch. None needs labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from mmopt.errors import UserError
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.transforms.canonicalize.editing import tensor_of
from mmopt.transforms.prune.curves import Curve, from_scores
from mmopt.transforms.prune.linear_maps import LinearMap, linear_maps
from mmopt.transforms.prune.observing import stream
from mmopt.transforms.prune.padding import valid_rows

if TYPE_CHECKING:
    from mmopt.analysis.axes import Group

Array = np.ndarray[Any, Any]
Criterion = Literal["magnitude", "activation", "second-order", "taylor", "fisher", "cross-modal", "random"]

_Key = tuple[str, str]

NEEDS_SAMPLES = ("activation", "second-order", "taylor", "fisher", "cross-modal")
DAMPING = 0.01
"""Part of the mean diagonal added to a Gram matrix, which few samples leave singular."""

_ROWS = 20000
"""Rows of a tensor that go into its Gram matrix."""

_ROUNDS = 32
"""Steps in which the second-order criterion takes all units of a group away."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """A product that reads the units of a group.

    Attributes:
        weight: Its weight with the depth first: ``[depth, results]``; taps of a convolution count as results.
        gram: ``XᵀX / rows`` of what it reads, ``[depth, depth]``.
        positions: Places along the depth of each unit.
    """

    weight: Array
    gram: Array
    positions: Sequence[Array]

    @property
    def power(self) -> float:
        """Mean square of its results."""
        return float(np.einsum("dr,dr->", self.weight, self.gram @ self.weight))

    def without(self, places: Array) -> Array:
        """The weight that comes nearest to its results when it reads these places of the depth only.

        Args:
            places: Places that are left, ascending.

        Returns:
            ``[places, results]``.
        """
        gram = _damped(self.gram)
        return np.linalg.solve(gram[np.ix_(places, places)], gram[places] @ self.weight)


class Evidence:
    """What criteria go by.

    Args:
        module: The module.
        batches: Sets of inputs; none for criteria that need no samples.
        seed: Seed of everything random.
    """

    def __init__(self, module: Module, batches: Sequence[Mapping[str, Array]], seed: int = 0) -> None:
        self.module, self.batches, self.seed = module, batches, seed
        self._maps = _keyed(module)
        self._grams: dict[str, Array] = {}

    def readers(self, group: Group) -> dict[_Key, Reader]:
        """The products that read the units of ``group``, by operator and weight."""
        found: dict[_Key, Reader] = {}
        for place in group.weights:
            key = (str(place.node), place.value)
            map_ = self._maps.get(key)
            if map_ is None or map_.groups > 1 or place.axis != map_.depth_axis or place.role.name != "CONSUMER":
                continue
            tensor = tensor_of(map_.weight)
            assert tensor is not None
            weight = np.moveaxis(tensor.numpy().astype(np.float64), map_.depth_axis, 0)
            positions = [np.array(place.positions[unit], dtype=np.int64) for unit in range(group.units)]
            if key in found:  # that it reads in several parts
                positions = [np.union1d(*both) for both in zip(found[key].positions, positions, strict=True)]
            found[key] = Reader(weight.reshape(len(weight), -1), self.gram(map_), positions)
        return found

    def make_up(self, cut: Module, group: Group, kept: Sequence[int]) -> None:
        """Fit what reads the units of a group to the loss of all but ``kept``, by the Gram matrices alone.

        Args:
            cut: The module without the other units; the weights of products that read the group change in place.
            group: The group, as it was.
            kept: Units that are left.
        """
        maps = _keyed(cut)
        for key, reader in self.readers(group).items():
            found = maps.get(key)
            if found is None or len(list(found.weight.uses())) > 1:
                continue
            tensor = tensor_of(found.weight)
            assert tensor is not None
            turned = np.moveaxis(np.asarray(tensor.numpy()), found.depth_axis, 0)
            gone = np.concatenate([reader.positions[unit] for unit in set(range(group.units)) - set(kept)])
            fitted = reader.without(np.setdiff1d(np.arange(len(reader.weight)), gone))
            if fitted.size == turned.size:  # a recurrence makes the units that it reads: its results are fewer as well
                array = np.moveaxis(fitted.reshape(turned.shape), 0, found.depth_axis).astype(np.float32)
                found.weight.const_value = ir.tensor(np.ascontiguousarray(array), name=found.weight.name)

    def gram(self, map_: LinearMap) -> Array:
        """The Gram matrix of the channels that a product reads."""
        if not self._grams:
            self._collect()
        return self._grams[str(map_.data.name)]

    def _collect(self) -> None:
        maps = {str(found.data.name): found for found in self._maps.values() if found.groups == 1}
        valid, count = valid_rows(self.module), 0
        totals: dict[str, Array] = {}
        seen = dict.fromkeys(maps, 0)
        with ReferenceRunner(seed=self.seed) as runner:
            for values in stream(self.module, list(maps), self.batches, runner):
                feeds = self.batches[count]
                for name, found in maps.items():
                    rows = np.moveaxis(values[name], found.channel_axis, -1).reshape(
                        -1, values[name].shape[found.channel_axis]
                    )
                    mask = valid(found, values[name], feeds)
                    rows = rows if mask is None else rows[mask]
                    most = _ROWS // len(self.batches) + 1
                    if len(rows) > most:
                        rows = rows[np.random.default_rng((self.seed, count)).choice(len(rows), most, replace=False)]
                    wide = rows.astype(np.float64)
                    totals[name] = totals.get(name, 0.0) + wide.T @ wide
                    seen[name] += len(rows)
                count += 1
        self._grams = {name: total / max(1, seen[name]) for name, total in totals.items()}


def _keyed(module: Module) -> dict[_Key, LinearMap]:
    return {(str(found.node.name), str(found.weight.name)): found for found in linear_maps(module.graph)}


def curves(groups: Sequence[Group], criterion: Criterion, evidence: Evidence) -> dict[str, Curve]:
    """In what order the units of each group go, and at what damage.

    Args:
        groups: Groups that can be cut.
        criterion: How units are judged.
        evidence: The module and samples.

    Returns:
        Curves by name of the group. ``second-order`` and ``activation`` give the error of what reads the units, as a
        part of its power; others give numbers that mean something within one group only.

    Raises:
        UserError: The criterion needs samples, or torch, and there is none.
    """
    if criterion in NEEDS_SAMPLES and not evidence.batches:
        raise UserError(
            f"the criterion {criterion!r} needs samples", where="criterion", hint="give --calib, or use magnitude"
        )
    if criterion == "second-order":
        return {group.name: _second_order(group, evidence) for group in groups}
    if criterion in ("taylor", "cross-modal", "fisher"):
        from mmopt.transforms.prune.gradient_criteria import gradient_scores

        found = gradient_scores(groups, criterion, evidence)
    else:
        found = {group.name: _SIMPLE[criterion](group, evidence) for group in groups}
    return {name: from_scores(scores) for name, scores in found.items()}


def _magnitude(group: Group, evidence: Evidence) -> Array:
    scores = np.zeros(group.units)
    initializers = evidence.module.graph.initializers
    for place in group.weights:
        value = initializers.get(place.value)
        tensor = tensor_of(value)
        if tensor is None or not tensor.dtype.is_floating_point():
            continue
        array = tensor.numpy().astype(np.float64)
        power = (np.moveaxis(array, place.axis, 0).reshape(array.shape[place.axis], -1) ** 2).sum(axis=1)
        scores += [power[list(place.positions[unit])].sum() for unit in range(group.units)]
    return scores


def _activation(group: Group, evidence: Evidence) -> Array:
    readers = evidence.readers(group)
    if not readers:
        return _magnitude(group, evidence)
    scores = np.zeros(group.units)
    for reader in readers.values():
        lost = np.diag(reader.gram) * (reader.weight**2).sum(axis=1) / max(reader.power, 1e-30)
        scores += [lost[places].sum() for places in reader.positions]
    return scores


def _random(group: Group, evidence: Evidence) -> Array:
    seed = (evidence.seed, *group.name.encode())
    return np.random.default_rng(seed).random(group.units)


_SIMPLE = {"magnitude": _magnitude, "activation": _activation, "random": _random}


def _second_order(group: Group, evidence: Evidence) -> Curve:
    readers = evidence.readers(group)
    if not readers:
        return from_scores(_magnitude(group, evidence))
    states = [_Elimination(reader) for reader in readers.values()]
    left = list(range(group.units))
    order: list[int] = []
    damage = [0.0]
    step = -(-group.units // _ROUNDS)
    while left:
        costs = np.sum([state.costs(left) for state in states], axis=0)
        gone = [left[place] for place in np.argsort(costs, kind="stable")[:step]]
        lost = sum(state.remove(gone) for state in states)
        damage += list(damage[-1] + lost * np.arange(1, len(gone) + 1) / len(gone))
        order += gone
        left = [unit for unit in left if unit not in set(gone)]
    return Curve(np.array(order), np.maximum.accumulate(np.array(damage)))


def _damped(gram: Array) -> Array:
    damped = gram.copy()
    damped[np.diag_indices_from(damped)] += DAMPING * max(float(np.diag(gram).mean()), 1e-30)
    return damped


class _Elimination:
    """Takes units from what one product reads, with the rest of its weight fitted again after each.

    Without rows R, the best weight is B − H⁻¹[:, R] (H⁻¹[R, R])⁻¹ B[R], and the error grows by
    tr(B[R]ᵀ (H⁻¹[R, R])⁻¹ B[R]) (Hassibi and Stork, 1993; Frantar and Alistarh, 2022).
    """

    def __init__(self, reader: Reader) -> None:
        inverse = np.linalg.inv(_damped(reader.gram))
        self._inverse, self._weight = (inverse + inverse.T) / 2, reader.weight.copy()
        self._positions, self._power = reader.positions, max(reader.power, 1e-30)

    def costs(self, units: Sequence[int]) -> Array:
        """Error, as a part of the power of the results, when one unit alone goes."""
        if all(len(self._positions[unit]) == 1 for unit in units):
            places = np.array([self._positions[unit][0] for unit in units])
            lost = (self._weight[places] ** 2).sum(axis=1) / self._inverse[places, places]
            return np.asarray(lost / self._power)
        return np.array([self._lost(self._positions[unit])[0] for unit in units])

    def remove(self, units: Sequence[int]) -> float:
        """Take units away; returns the error that this adds."""
        places = np.concatenate([self._positions[unit] for unit in units])
        lost, solved = self._lost(places)
        self._weight -= self._inverse[:, places] @ solved
        self._inverse -= self._inverse[:, places] @ np.linalg.solve(
            self._inverse[np.ix_(places, places)], self._inverse[places]
        )
        # What is gone stays gone, and does not divide by zero where it is looked at again.
        self._weight[places] = 0.0
        self._inverse[places, :] = self._inverse[:, places] = 0.0
        self._inverse[places, places] = 1.0
        return lost

    def _lost(self, places: Array) -> tuple[float, Array]:
        rows = self._weight[places]
        solved = np.linalg.solve(self._inverse[np.ix_(places, places)], rows)
        return float(np.einsum("dr,dr->", rows, solved)) / self._power, solved
