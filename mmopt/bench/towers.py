"""Inputs for an artifact's other entry points, so that every tower can be timed alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mmopt.bench.measure import LocalRacer
from mmopt.bench.peers import ArtifactContender, Contender, Values
from mmopt.errors import MmoptError


def tower_racers(contender: Contender, inputs: Values) -> tuple[dict[str, LocalRacer], dict[str, str]]:
    """Racers for the entry points besides ``main``; none for anything but an artifact.

    An entry point's inputs are found by name among the model's inputs and what earlier entry points gave (``fuse``
    takes what the towers make).

    Args:
        contender: A loaded contender.
        inputs: Inputs of the whole model by name.

    Returns:
        A racer for each entry point that can run, and the reason for each that cannot.
    """
    if not isinstance(contender, ArtifactContender):
        return {}, {}
    known = dict(inputs)
    racers: dict[str, LocalRacer] = {}
    left_out: dict[str, str] = {}
    waiting = {entry: contender.tower(entry) for entry in contender.towers()}
    while ready := [entry for entry, tower in waiting.items() if _names(tower.input_specs) <= known.keys()]:
        for entry in ready:
            tower = waiting.pop(entry)
            given = {name: known[name] for name in _names(tower.input_specs)}
            try:
                made = tower.run(given)
            except MmoptError as error:
                left_out[entry] = error.what
                continue
            known.update({name: array for name, array in made.items() if name not in known})
            racers[entry] = LocalRacer(tower, given)
    for entry, tower in waiting.items():
        missing = sorted(_names(tower.input_specs) - known.keys())
        left_out[entry] = f"its inputs are no inputs of the model: {', '.join(missing)}"
    return racers, left_out


def _names(specs: Iterable[Any]) -> set[str]:
    return {spec.name for spec in specs}
