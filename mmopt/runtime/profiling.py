"""How long each kernel of an artifact takes, inside real runs of the whole model."""

from __future__ import annotations

import collections
import dataclasses
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmopt.runtime.artifact import MAIN
from mmopt.runtime.session import Entry, Session

_BUILTIN = "vm.builtin."

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


class _Stopwatch:
    """Collects the time of every call of one run: of functions the virtual machine calls, and of kernels inside them.

    A function of the library calls many kernels in a row, and adds the cycles each takes to a clock. The time of these
    functions tells how long a cycle of that counter is.

    Args:
        kernels: Names of the kernels in the order of the clock.
    """

    def __init__(self, kernels: Sequence[str]) -> None:
        self.names = kernels
        self.clock = np.zeros((len(kernels), 2), np.int64)
        self.calls: dict[str, list[int]] = collections.defaultdict(list)
        self._begun: list[int] = []

    def __call__(self, function: Any, name: str, before: bool, *rest: Any) -> int:
        now = time.perf_counter_ns()
        if not before:
            self.calls[name].append(now - self._begun.pop())
        else:
            self._begun.append(time.perf_counter_ns())
        return 0

    def reset(self) -> None:
        """Begin a new run."""
        self.calls.clear()
        self.clock[...] = 0

    def kernels(self) -> dict[str, tuple[int, float]]:
        """Calls and seconds of each kernel. What observing itself takes is left out: the shortest built-in call."""
        trivial = min((min(times) for name, times in self.calls.items() if name.startswith(_BUILTIN)), default=0)
        spent = {
            name: (len(times), max(0, sum(times) - trivial * len(times)) / 1e9) for name, times in self.calls.items()
        }
        found = {name: spent[name] for name in self.names if name in spent}
        cycles = int(self.clock[:, 0].sum())
        if cycles:
            cycle = sum(seconds for name, (_, seconds) in spent.items() if _RUN.search(name)) / cycles
            for name, (ticks, calls) in zip(self.names, self.clock.tolist(), strict=True):
                before, seconds = found.get(name, (0, 0.0))
                if calls:
                    found[name] = before + calls, seconds + ticks * cycle
        return found


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
    watch = _Stopwatch([str(kernel["name"]) for kernel in session.manifest.kernels])
    with session.native.observed(watch, watch.clock):
        target.run(inputs)  # the first run of a virtual machine takes memory from the system
        for _ in range(_TURN):
            watch.reset()
            target.run(inputs)
            yield watch.kernels()
