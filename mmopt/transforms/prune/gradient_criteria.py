"""Scores that need gradients of the outputs: first-order Taylor, diagonal Fisher, and the effect where towers meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmopt.analysis.towers import analyze_towers
from mmopt.ir.module import Module
from mmopt.transforms.prune.observing import exposing

if TYPE_CHECKING:
    from mmopt.analysis.axes import Group
    from mmopt.transforms.prune.criteria import Evidence

Array = np.ndarray[Any, Any]

DRAWS = 4
"""Random directions among the outputs, for each batch."""


def gradient_scores(groups: Sequence[Group], criterion: str, evidence: Evidence) -> dict[str, Array]:
    """A score for each unit of each group.

    Args:
        groups: Groups to score.
        criterion: ``taylor``, ``fisher`` or ``cross-modal``.
        evidence: The module and samples.

    Raises:
        UserError: torch is not installed.
    """
    if criterion == "fisher":
        return _fisher(groups, evidence)
    scores = _taylor(groups, evidence.module, evidence)
    if criterion == "cross-modal":
        joined = meeting(evidence.module)
        before = [group for group in groups if joined and group.tower is not None]
        if before:
            scores.update(_taylor(before, exposing(evidence.module, joined), evidence))
    return scores


def meeting(module: Module) -> list[str]:
    """Names of the tensors in which towers are first joined; none when there is one tower."""
    nodes = {str(node.name): node for node in module.graph}
    first = [fusion for fusion in analyze_towers(module).fusions if fusion.depth == 0]
    names = [str(nodes[fusion.nodes[-1]].outputs[0].name) for fusion in first if fusion.nodes[-1] in nodes]
    return list(dict.fromkeys(names))


def _taylor(groups: Sequence[Group], module: Module, evidence: Evidence) -> dict[str, Array]:
    from mmopt.training import gradients

    computed = {str(output.name) for node in module.graph for output in node.outputs}
    observed = {
        group.name: place
        for group in groups
        if (place := next((p for p in group.activations if p.value in computed), None)) is not None
    }
    places = list(dict.fromkeys((place.value, place.axis) for place in observed.values()))
    found = gradients(module, _inputs_of(module, evidence), places=places, weights=(), draws=DRAWS, seed=evidence.seed)
    scores = {}
    for group in groups:
        if group.name not in observed:
            scores[group.name] = np.zeros(group.units)
            continue
        place = observed[group.name]
        products = found.products[place.value, place.axis]
        units = [products[:, list(positions)].sum(axis=1) for positions in place.positions]
        scores[group.name] = (np.stack(units, axis=1).astype(np.float64) ** 2).mean(axis=0)
    return scores


def _fisher(groups: Sequence[Group], evidence: Evidence) -> dict[str, Array]:
    from mmopt.training import gradients

    module = evidence.module
    places = {group.name: [p for p in group.weights if p.role.name != "CONSUMER"] for group in groups}
    names = {place.value for listed in places.values() for place in listed}
    weights = [name for name in names if _is_float(module, name)]
    found = gradients(module, _inputs_of(module, evidence), weights=weights, draws=DRAWS, seed=evidence.seed)
    scores = {}
    for group in groups:
        total = np.zeros(group.units)
        for place in places[group.name]:
            if place.value not in found.fisher:
                continue
            tensor = module.graph.initializers[place.value].const_value
            assert tensor is not None
            effect = tensor.numpy().astype(np.float64) ** 2 * found.fisher[place.value]
            along = np.moveaxis(effect, place.axis, 0).reshape(effect.shape[place.axis], -1).sum(axis=1)
            total += [along[list(positions)].sum() for positions in place.positions]
        scores[group.name] = total
    return scores


def _inputs_of(module: Module, evidence: Evidence) -> list[Mapping[str, Array]]:
    names = {str(value.name) for value in module.graph.inputs}
    return [{name: array for name, array in feeds.items() if name in names} for feeds in evidence.batches]


def _is_float(module: Module, name: str) -> bool:
    value = module.graph.initializers.get(name)
    return value is not None and value.const_value is not None and value.const_value.dtype.is_floating_point()
