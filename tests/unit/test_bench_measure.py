"""Taking turns: order, pauses, budgets, and a contender that sleeps as one with a known ratio."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest

from mmopt.bench import measure, stats
from mmopt.bench.measure import LocalRacer, Plan, take_turns, timed_runs, turn_order


class Sleeper:
    """A contender that takes a known time."""

    version = "1"

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds, self.runs = name, seconds, 0

    def load(self) -> None:
        """Nothing to load."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.runs += 1
        time.sleep(self.seconds)
        return dict(inputs)

    def unload(self) -> None:
        """Nothing to unload."""


class Recorder:
    """A racer that writes down when it was called."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def turn(self, seconds: float) -> list[float]:
        self.log.append(f"{self.name} {seconds:g}")
        return [1.0]


def test_the_ratio_of_two_sleepers_is_found() -> None:
    racers = [LocalRacer(Sleeper("short", 0.002), {}), LocalRacer(Sleeper("long", 0.006), {})]
    rounds = take_turns(racers, Plan(rounds=6, seconds=0.12, pause=0.001))
    ratio = stats.paired_ratio(rounds["long"], rounds["short"])
    assert ratio.certain
    assert 2.0 < ratio.value < 3.2


def test_every_turn_pauses_then_warms_up_then_counts() -> None:
    sleeper, pauses = Sleeper("a", 0.001), []
    rounds = take_turns([LocalRacer(sleeper, {})], Plan(rounds=4, seconds=0.02, pause=0.123), sleep=pauses.append)
    timed = sum(map(len, rounds["a"]))
    assert pauses == [0.123] * 4
    assert sleeper.runs == timed + 4
    assert min(min(times) for times in rounds["a"]) >= 0.001


def test_a_turn_pauses_before_each_contender_and_splits_the_budget() -> None:
    log: list[str] = []
    racers = [Recorder("a", log), Recorder("b", log)]
    take_turns(racers, Plan(rounds=4, seconds=2.0), sleep=lambda seconds: log.append("pause"))
    assert log[::2] == ["pause"] * 8
    assert log[1::2] == ["a 0.5", "b 0.5", "b 0.5", "a 0.5", "b 0.5", "a 0.5", "a 0.5", "b 0.5"]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_everyone_goes_once_a_round_and_first_equally_often(count: int) -> None:
    orders = [turn_order(count, index) for index in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert Counter(order[0] for order in orders) == {position: 2 for position in range(count)}


def test_nobody_always_follows_the_same_neighbour() -> None:
    followers = {tuple(order[i : i + 2]) for order in (turn_order(3, r) for r in range(6)) for i in range(2)}
    assert len(followers) == 6


def test_a_slow_contender_is_timed_once_a_turn_whatever_the_budget() -> None:
    assert len(timed_runs(lambda: time.sleep(0.002), 0.0)) == 1


def test_runs_fill_the_time_budget() -> None:
    start = time.perf_counter()
    times = timed_runs(lambda: time.sleep(0.001), 0.03)
    assert 0.03 <= time.perf_counter() - start < 1.0
    assert len(times) > 3
    assert sum(times[:-1]) < 0.03


def test_a_tiny_model_does_not_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MAX_RUNS", 7)
    assert len(timed_runs(lambda: None, 10.0)) == 7


def test_progress_counts_rounds() -> None:
    said: list[int] = []
    take_turns([Recorder("a", []), Recorder("b", [])], Plan(3, 0.0, 0.0), progress=said.append)
    assert said == [0, 1, 2]
