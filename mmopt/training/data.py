"""Samples on their way into training: which belong together in a batch, which are held out, in what order they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmopt.analysis.calibration.collect import Batches
from mmopt.analysis.shapes import infer_shapes
from mmopt.errors import UserError
from mmopt.ir.module import Module

Array = np.ndarray[Any, Any]
Feed = tuple[dict[str, Array], Array | None]


class Data:
    """Samples, a part of them held out, in batches that a model takes.

    A model whose inputs and outputs all have one symbolic size in front gets a whole batch at a time; any other (the
    batch fixed at 1, two kinds of batches, a state in front of it) gets sample by sample, and gradients are added up.

    Args:
        modules: The models that take the samples.
        samples: Arrays by input name with a leading axis of samples.
        labels: One row for each sample, or None.
        batch: Samples of a step.
        held_out: Part of the samples kept for judging; at least one is held out, and one is not.
        seed: Seed of what is held out and of the order.

    Raises:
        UserError: Samples that do not fit, labels of another number, or too few samples.
    """

    def __init__(
        self,
        modules: Sequence[Module],
        samples: Mapping[str, Array],
        labels: Array | None,
        *,
        batch: int,
        held_out: float,
        seed: int,
    ) -> None:
        self._sets = [Batches(module, samples) for module in modules]
        count = len(self._sets[0])
        if labels is not None and len(labels) != count:
            raise UserError(f"there are {len(labels)} labels for {count} samples", hint="one row for each sample")
        if count < 2:
            raise UserError("training needs two samples at least: one is held out to judge by")
        self._labels, self._seed = labels, seed
        self.batch = max(1, batch)
        self.stacked = all(_stacks(module) for module in modules)
        order = np.random.default_rng([seed, 0]).permutation(count)
        kept = min(count - 1, max(1, round(count * held_out)))
        self.held, self.taught = np.sort(order[:kept]), np.sort(order[kept:])

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.taught) // self.batch)

    def chosen(self, step: int) -> list[int]:
        """Numbers of the samples of a step, counted from the first epoch on. Every epoch has an order of its own."""
        epoch, place = divmod(step, self.steps)
        order = np.random.default_rng([self._seed, 1, epoch]).permutation(self.taught)
        return [int(number) for number in order[place * self.batch : (place + 1) * self.batch]]

    def feeds(self, numbers: Sequence[int]) -> Iterator[Feed]:
        """Inputs and labels of these samples: together, or one after the other."""
        if not self.stacked:
            for number in numbers:
                yield self._one(number)
            return
        rows = [self._one(number) for number in numbers]
        inputs = {name: _joined([feeds[name] for feeds, _ in rows], name) for name in rows[0][0]}
        labels = [label for _, label in rows if label is not None]
        yield inputs, np.concatenate(labels) if labels else None

    def held_feeds(self) -> Iterator[Feed]:
        """What is held out, in batches."""
        for start in range(0, len(self.held), self.batch):
            yield from self.feeds([int(number) for number in self.held[start : start + self.batch]])

    def _one(self, number: int) -> Feed:
        inputs: dict[str, Array] = {}
        for batches in self._sets:
            inputs |= batches[number]
        if self._labels is None:
            return inputs, None
        row = self._labels[number : number + 1]
        # A model whose batch is fixed at several takes that many rows as one sample, with as many labels.
        return inputs, row[0] if row.ndim > 1 and not self.stacked and _rows(inputs) == row.shape[1] > 1 else row


def _rows(inputs: Mapping[str, Array]) -> int:
    first = next(iter(inputs.values()))
    return int(first.shape[0]) if first.ndim else 1


def _joined(arrays: Sequence[Array], name: str) -> Array:
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1:
        raise UserError(f"samples of {name!r} have different shapes", hint="pad them, or use a batch of 1")
    return np.concatenate(arrays)


def _stacks(module: Module) -> bool:
    """Whether all inputs and outputs have the same symbolic size in front."""
    facts = infer_shapes(module.model)
    inputs = [value for value in module.graph.inputs if not value.is_initializer()]
    fronts = set()
    for value in (*inputs, *module.graph.outputs):
        shape = facts.shape(value)
        if not shape or shape[0] is None or isinstance(shape[0], int):
            return False
        fronts.add(str(shape[0]))
    return len(fronts) == 1
