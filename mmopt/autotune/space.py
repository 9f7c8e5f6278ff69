"""What can be measured for one workload, and in which order.

A small space is measured whole, the best predictions first. Of a large one the best predictions are the seeds, and from
then on the neighbours of the best so far, which differ from it in one parameter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mmopt.autotune.database import Parameters, identity
from mmopt.backends.cpu.choosing import Candidate, Choice, Workload

WHOLE = 24
"""Candidates up to which a space is measured whole."""

BATCH = 8
"""Candidates measured in turns with each other."""


@dataclasses.dataclass
class Space:
    """The candidates of one workload.

    Attributes:
        workload: What they compute.
        candidates: As the template offers them.
        calls: Calls in one run of the model.
        missing: Candidates that cannot be had, with the reason, by :func:`identity`.
    """

    workload: Workload
    candidates: tuple[Candidate, ...]
    calls: int = 0
    missing: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, choice: Choice) -> Space:
        """The space a choice was made from."""
        return cls(choice.workload, choice.candidates)

    @property
    def predicted(self) -> Candidate:
        """What is chosen without measuring."""
        return min(self.candidates, key=lambda candidate: candidate.cycles)

    @property
    def weight(self) -> float:
        """Predicted cycles in one run of the model."""
        return self.calls * self.predicted.cycles

    def next(self, measured: Mapping[str, float | None], size: int = BATCH) -> list[Parameters]:
        """What to measure next, at most ``size``: the predicted candidate first, as the one to compare with.

        Args:
            measured: Time relative to the predicted candidate, by :func:`identity`; None where it failed.

        Returns:
            Nothing when the space is exhausted.
        """
        left = [c for c in self._worth_measuring(measured) if self._open(c, measured)]
        first = self.predicted
        fresh = [c for c in sorted(left, key=lambda c: c.cycles) if c.parameters != first.parameters]
        if not fresh and (len(self.candidates) == 1 or not self._open(first, measured)):
            return []
        base = [] if identity(first.parameters) in self.missing else [first]
        return [c.parameters for c in (*base, *fresh)][:size]

    def _open(self, candidate: Candidate, measured: Mapping[str, float | None]) -> bool:
        key = identity(candidate.parameters)
        return key not in measured and key not in self.missing

    def _worth_measuring(self, measured: Mapping[str, float | None]) -> Sequence[Candidate]:
        times = {key: time for key, time in measured.items() if time is not None}
        if len(self.candidates) <= WHOLE or not times:
            return self.candidates
        best = min(times, key=lambda key: times[key])
        centre = next((c for c in self.candidates if identity(c.parameters) == best), None)
        return [] if centre is None else [c for c in self.candidates if _distance(c, centre) == 1]


def _distance(one: Candidate, other: Candidate) -> int:
    """In how many parameters two candidates differ."""
    names = {*one.parameters, *other.parameters}
    return sum(one.parameters.get(name) != other.parameters.get(name) for name in names)
