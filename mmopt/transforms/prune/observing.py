"""Tensors of two versions of a model on the same samples, batch by batch, so that one can be fitted to the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from mmopt.analysis.calibration.collect import Batches
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module

Array = np.ndarray[Any, Any]

BATCH = 16
"""Samples that are run together where the model takes any number."""


def batches_of(module: Module, samples: Mapping[str, Array], *, most: int = 0) -> list[dict[str, Array]]:
    """The samples as sets of inputs; several samples in one where every input has a symbolic first size.

    Args:
        module: The module.
        samples: Arrays by input name with a leading axis of samples.
        most: Samples to take, spread over all; 0 for all.

    Raises:
        UserError: Samples that do not fit the inputs.
    """
    single = Batches(module, samples)
    count = min(most or len(single), len(single))
    chosen = [single[number * len(single) // count] for number in range(count)]
    if not _takes_any_number(module):
        return chosen
    groups = (chosen[start : start + BATCH] for start in range(0, count, BATCH))
    return [{name: np.concatenate([one[name] for one in group]) for name in group[0]} for group in groups]


def _takes_any_number(module: Module) -> bool:
    inputs = [value for value in module.graph.inputs if not value.is_initializer()]
    shapes = [value.shape for value in inputs]
    firsts = {str(shape[0]) for shape in shapes if shape is not None and len(shape) and not isinstance(shape[0], int)}
    return len(firsts) == 1 and all(shape is not None and str(shape[0]) in firsts for shape in shapes if shape != ())


def stream(
    module: Module, names: Sequence[str], batches: Iterable[Mapping[str, Array]], runner: ReferenceRunner
) -> Iterator[dict[str, Array]]:
    """Tensors of ``module`` by name, batch after batch. Only what they depend on is computed.

    Args:
        module: The module; it is left as it is.
        names: Names of inputs of the model and results of nodes of its main graph.
        batches: Sets of inputs.
        runner: An open runner.

    Raises:
        BackendError: The model does not run on them.
    """
    inputs = {str(value.name) for value in module.graph.inputs}
    computed = [name for name in dict.fromkeys(names) if name not in inputs]
    if not computed:
        for feeds in batches:
            yield {name: feeds[name] for name in names}
        return
    part = exposing(module, computed)
    kept = list(batches)
    for feeds, outputs in zip(kept, runner.stream(part, kept), strict=True):
        yield {name: feeds[name] if name in inputs else outputs[name] for name in names}


def exposing(module: Module, names: Sequence[str]) -> Module:
    """A copy of ``module`` whose outputs are these results of its nodes, without what they do not need."""
    copy = module.clone()
    values = {str(output.name): output for node in copy.graph for output in node.outputs if output.name}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[name] for name in names)
    common.RemoveUnusedNodesPass()(copy.model)
    return copy


def levels(graph: ir.Graph, nodes: Mapping[ir.Node, int]) -> dict[ir.Value, int]:
    """How many of ``nodes`` come before each value at most, where a node counts as often as its number says."""
    found: dict[ir.Value, int] = {}
    for node in graph:
        before = max((found.get(value, 0) for value in node.inputs if value is not None), default=0)
        for output in node.outputs:
            found[output] = before + nodes.get(node, 0)
    return found


class Sample:
    """Picks at most so many of the places that are valid: the same ones each time it is asked about as many.

    Args:
        valid: For each place whether it counts; None when all do.
        most: Places to pick.
        seed: What the choice follows from.
    """

    def __init__(self, valid: Array | None, most: int, seed: tuple[int, int]) -> None:
        self._valid, self._most, self._seed = valid, most, seed

    def __call__(self, count: int) -> Array:
        """Places, ascending, of ``count``."""
        valid = self._valid
        places = np.arange(count)
        if valid is not None and len(valid) == count and valid.any():
            places = np.flatnonzero(valid)
        if len(places) <= self._most:
            return places
        return np.sort(np.random.default_rng(self._seed).choice(places, self._most, replace=False))
