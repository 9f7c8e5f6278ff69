"""Inputs in which one modality alone says anything, to see what each of them still does for the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmopt.analysis.towers import analyze_towers
from mmopt.ir.module import Module

Array = np.ndarray[Any, Any]

_DATA = ("ids", "image", "frames", "waveform", "spectrogram", "features")
"""Roles of inputs that say something; masks, lengths and the like only say where."""


class Blanks:
    """Values that stand for a missing modality: the mean of floats, what is most frequent of integers.

    Args:
        module: The module.
        batches: Sets of inputs to learn them from.
    """

    def __init__(self, module: Module, batches: Sequence[Mapping[str, Array]]) -> None:
        report = analyze_towers(module)
        data = {
            tower.name: tuple(name for name in tower.inputs if report.inputs[name].role in _DATA)
            for tower in report.towers
        }
        self._data = {name: inputs for name, inputs in data.items() if inputs}
        self._blank = {
            name: _typical([feeds[name] for feeds in batches]) for inputs in self._data.values() for name in inputs
        }

    @property
    def towers(self) -> list[str]:
        """Towers that can be looked at alone; none when there is but one."""
        return list(self._data) if len(self._data) > 1 else []

    def alone(self, feeds: Mapping[str, Any], tower: str) -> dict[str, Any]:
        """``feeds`` with everything but the inputs of ``tower`` blank."""
        blank = {name for other, inputs in self._data.items() if other != tower for name in inputs}
        return {
            name: np.broadcast_to(self._fitting(name, array), array.shape).astype(array.dtype)
            if name in blank else array
            for name, array in feeds.items()
        }  # fmt: skip

    def _fitting(self, name: str, array: Array) -> Array:
        blank = self._blank[name]
        return blank if blank.shape == array.shape[1:] else np.asarray(blank.reshape(-1)[:1].reshape(()))


def with_each_modality_alone(module: Module, batches: Sequence[Mapping[str, Array]]) -> list[Mapping[str, Array]]:
    """The sets of inputs, and a quarter of them again with each modality alone: what a fit has to hold for as well."""
    blanks = Blanks(module, batches)
    more = [blanks.alone(feeds, tower) for tower in blanks.towers for feeds in batches[::4]]
    # One after another in both halves of the data, as fits are judged by halves.
    return [*batches, *more] if len(batches) > 1 else list(batches)


def _typical(arrays: Sequence[Array]) -> Array:
    """The typical value of each element along the first axis; of all elements, where shapes differ."""
    same = len({array.shape[1:] for array in arrays}) == 1
    rows = np.concatenate(arrays) if same else np.concatenate([array.reshape(-1) for array in arrays])
    if rows.dtype.kind == "f":
        return np.asarray(rows.mean(axis=0))
    flat = rows.reshape(len(rows), -1)
    modes = [values[np.argmax(counts)] for values, counts in (np.unique(c, return_counts=True) for c in flat.T)]
    return np.array(modes, dtype=rows.dtype).reshape(rows.shape[1:])
