"""Taking turns: every contender measured in every round of one run.

A runtime's thread pool goes on spinning for some time after an inference and takes the cores from whoever comes next,
so a turn starts with a pause and an unmeasured run. Who goes first rotates from round to round.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mmopt.bench.peers import Contender, Values

PAUSE = 0.05
"""Seconds of rest before each turn; no runtime seen so far spins longer."""

MAX_RUNS = 1000
"""Most timed runs of one turn, so that a tiny model does not fill the result file."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long and how often to measure.

    Attributes:
        rounds: Turns each contender gets.
        seconds: Time budget of one contender, spread over its turns. Every turn times one run at least.
        pause: Seconds of rest before each turn.
    """

    rounds: int = 10
    seconds: float = 5.0
    pause: float = PAUSE

    @property
    def turn_seconds(self) -> float:
        """Time budget of one turn."""
        return self.seconds / self.rounds


class Racer(Protocol):
    """Someone who takes turns: a contender in this process, or one in another."""

    @property
    def name(self) -> str:
        """Its name in tables."""

    def turn(self, seconds: float) -> list[float]:
        """One unmeasured run, then timed runs until ``seconds`` have passed; the times in seconds."""


@dataclasses.dataclass
class LocalRacer:
    """A loaded contender of this process and the inputs it runs on."""

    contender: Contender
    inputs: Values

    @property
    def name(self) -> str:
        """The contender's name."""
        return self.contender.name

    def turn(self, seconds: float) -> list[float]:
        """See :class:`Racer`."""
        return timed_runs(lambda: self.contender.run(self.inputs), seconds)


def timed_runs(run: Callable[[], Any], seconds: float) -> list[float]:
    """One unmeasured run, then timed ones until ``seconds`` of wall time are used up; at least one.

    The last run may end after the deadline: a run that has started counts, or slow runs would be dropped more often.
    """
    run()
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < MAX_RUNS:
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        times.append(end - start)
        if end >= deadline:
            break
    return times


def turn_order(count: int, round_index: int) -> list[int]:
    """Who goes when in a round: rotated by one each round, and backwards in every second cycle of rotations.

    Rotation alone would leave everyone behind the same neighbour in nearly all rounds.
    """
    shift = round_index % count
    order = [*range(shift, count), *range(shift)]
    return order[::-1] if (round_index // count) % 2 else order


def take_turns(
    racers: Sequence[Racer],
    plan: Plan,
    *,
    sleep: Callable[[float], None] = time.sleep,
    progress: Callable[[int], None] = lambda round_index: None,
) -> dict[str, list[list[float]]]:
    """Measure all racers, interleaved.

    Args:
        racers: Who takes part, each ready to run, with different names.
        plan: Rounds, time budget and pause.
        sleep: What pauses.
        progress: Called before each round with its number, from 0.

    Returns:
        For each name its rounds: times of single runs in seconds.
    """
    rounds: dict[str, list[list[float]]] = {racer.name: [] for racer in racers}
    for index in range(plan.rounds):
        progress(index)
        for position in turn_order(len(racers), index):
            racer = racers[position]
            sleep(plan.pause)
            rounds[racer.name].append(racer.turn(plan.turn_seconds))
    return rounds
