"""How long each kernel of an artifact takes, inside real runs of the whole model."""

from __future__ import annotations

import collections
import dataclasses
import re
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

from mmopt.runtime.artifact import MAIN
from mmopt.runtime.session import Entry, Session

_RUN = re.compile(r"_run\d*$")
"""How functions that call many kernels in a row are named."""

_TURN = 4
"""Runs in a row that are observed, or not."""


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """Time of one kernel in one run of the model.

    Attributes:
        name: Its function in the library.
        calls: Calls in one run.
        seconds: Time of all its calls in one run.
    """

    name: str
    calls: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class ModelTime:
    """Time of one run of a model, and where it goes.

    Attributes:
        seconds: Median of runs in which nothing is observed.
        kernels: Median of each kernel over observed runs, the longest first.
        runs: How many runs of either sort were timed.
    """

    seconds: float
    kernels: list[KernelTime]
    runs: int


def time_kernels(
    session: Session, inputs: Mapping[str, Any], *, entry: str = MAIN, runs: int = 20, seconds: float = 3.0
) -> ModelTime:
    """Run an entry point and time each of its kernels with the data, and the state of the caches, of the real run.

    Observed and plain runs alternate, so a slow phase of the machine meets both.

    Args:
        session: A loaded artifact.
        inputs: What :meth:`Session.run` takes.
        entry: Entry point.
        runs: Most runs of either sort.
        seconds: Time to stop after, with one turn of either sort at least.

    Raises:
        UserError: The inputs do not fit.
        BackendError: A segment failed.
    """
    target = session.entry(entry)
    target.run(inputs)
    plain: list[float] = []
    observed: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    native = any(segment.kind == "native" for segment in session.manifest.entries[entry].segments)
    started = time.perf_counter()
    while len(plain) < runs and (not plain or time.perf_counter() - started < seconds):
        plain += [_timed(target, inputs) for _ in range(_TURN)]
        for kernels in _observe(session, target, inputs) if native else ():
            for name, timed in kernels.items():
                observed[name].append(timed)
    found = [
        KernelTime(name, times[-1][0], statistics.median(spent for _, spent in times))
        for name, times in observed.items()
    ]
    found.sort(key=lambda kernel: -kernel.seconds)
    return ModelTime(statistics.median(plain), found, len(plain))


def _timed(target: Entry, inputs: Mapping[str, Any]) -> float:
    begun = time.perf_counter()
    target.run(inputs)
    return time.perf_counter() - begun


def _observe(session: Session, target: Entry, inputs: Mapping[str, Any]) -> Iterator[dict[str, tuple[int, float]]]:
    """Calls and seconds by kernel, of each run of one turn."""
    names = [str(kernel["name"]) for kernel in session.manifest.kernels]
    readings: list[dict[str, tuple[int, int]]] = []
    with session.native.clocked(len(names)) as clock:
        target.run(inputs)  # the first run of a virtual machine takes memory from the system
        began, first = time.perf_counter(), int(clock[-1])
        for _ in range(_TURN):
            clock[:-1] = 0
            target.run(inputs)
            spent = clock[:-1].reshape(-1, 2)
            readings.append({name: (int(n), int(c)) for name, (c, n) in zip(names, spent, strict=True) if n})
        cycles = int(clock[-1]) - first
        second = cycles / (time.perf_counter() - began)
    for reading in readings:
        yield {name: (calls, ticks / second) for name, (calls, ticks) in reading.items()}
