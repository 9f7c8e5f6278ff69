"""Measures the candidates of a model's kernels, workload by workload, within a budget, and keeps what it finds."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmopt.autotune.build import Builders
from mmopt.autotune.database import Database, Parameters, Record, Scope, identity
from mmopt.autotune.lowered import KernelCode, LoweredModel
from mmopt.autotune.measuring import Supervisor, machine_name
from mmopt.autotune.space import Space
from mmopt.backends.profile import Profile
from mmopt.errors import UnsupportedError, UserError
from mmopt.ir.module import Module
from mmopt.runtime.cpu import check_target, default_threads
from mmopt.runtime.device import load_cuda_runtime
from mmopt.runtime.gpu import present_gpu

MINUTES = 5.0
"""Time to spend when nobody says."""

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Budget:
    """When to stop.

    Attributes:
        minutes: Time from the start on; None for no limit.
        trials: Candidates to measure; None for no limit.

    Raises:
        UserError: A limit is negative, or not a number.
    """

    minutes: float | None = MINUTES
    trials: int | None = None

    def __post_init__(self) -> None:
        if self.minutes is not None and not 0 <= self.minutes < float("inf"):
            raise UserError(f"a budget of {self.minutes} minutes makes no sense", hint="give 0 or more minutes")
        if self.trials is not None and self.trials < 0:
            raise UserError(f"a budget of {self.trials} trials makes no sense", hint="give 0 or more trials")


@dataclasses.dataclass
class Tuned:
    """What is known about one workload.

    Attributes:
        workload: Its key.
        calls: Calls in one run of the model.
        candidates: Size of its space.
        measured: Candidates that have a time.
        failed: Candidates that cannot be used, with the reason, by their parameters as text.
        predicted: Parameters that are chosen without measuring.
        best: Parameters that are chosen now.
        relative: Time of ``best`` over that of ``predicted``; None when nothing is measured.
    """

    workload: str
    calls: int
    candidates: int
    measured: int
    failed: dict[str, str]
    predicted: Parameters
    best: Parameters
    relative: float | None


@dataclasses.dataclass
class TuningReport:
    """What a search did.

    Attributes:
        workloads: What is known now, the heaviest first.
        trials: Candidates measured in this search.
        seconds: How long it took.
        stopped: Why it ended: ``everything is measured``, ``time``, ``trials`` or ``interrupted``.
        database: The database's file.
        scope: What the measurements hold for.
    """

    workloads: list[Tuned]
    trials: int
    seconds: float
    stopped: str
    database: pathlib.Path
    scope: Scope

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        data = dataclasses.asdict(self)
        for record, tuned in zip(data["workloads"], self.workloads, strict=True):
            record["predicted"], record["best"] = dict(tuned.predicted), dict(tuned.best)
        return {**data, "database": str(self.database)}

    @property
    def changed(self) -> int:
        """Workloads whose best candidate is not the predicted one."""
        return sum(tuned.best != tuned.predicted for tuned in self.workloads)


def tune(
    modules: Mapping[str, Module],
    profile: Profile,
    database: Database,
    budget: Budget,
    *,
    threads: int | None = None,
    jobs: int | None = None,
    progress: Progress = lambda done, total, text: None,
) -> TuningReport:
    """Search for better parameters of the kernels of a model on this machine.

    What ``database`` already knows is not measured again, so an interrupted search goes on where it was.

    Args:
        modules: Entry points by name, as they are compiled.
        profile: What to compile for; must fit this machine, and its GPU.
        database: Where results are kept.
        budget: When to stop.
        threads: Threads of the kernels; one per core when None.
        jobs: Kernels compiled at the same time; one per core when None.
        progress: Told candidates measured, candidates to measure (as far as known), and the best so far.

    Raises:
        UnsupportedError: The target is not this machine, or a GPU that is not there.
        BackendError: What a GPU needs besides is not installed.
    """
    _check_device(profile)
    check_target(profile.to_dict(), where=f"target {profile.name}")
    with tempfile.TemporaryDirectory(prefix="mmopt-tune-") as folder:
        search = _Search(modules, profile, database, budget, threads or default_threads(), pathlib.Path(folder))
        search.progress = progress
        return search.run(jobs or os.cpu_count() or 1)


def _check_device(profile: Profile) -> None:
    if profile.kind != "cuda":
        return
    if present_gpu() is None:
        raise UnsupportedError(
            f"candidates for {profile.name} are measured on a GPU; there is no NVIDIA GPU here, or no driver for it",
            where=f"target {profile.name}",
            hint="compile them here with --export FOLDER, measure there, and take the results over with --import",
        )
    load_cuda_runtime()  # what is missing here would look like bad candidates later


class _Search:
    """One search."""

    def __init__(
        self,
        modules: Mapping[str, Module],
        profile: Profile,
        database: Database,
        budget: Budget,
        threads: int,
        folder: pathlib.Path,
    ) -> None:
        self.progress: Progress = lambda done, total, text: None
        self._started = time.monotonic()
        self._profile, self._database, self._budget, self._folder = profile, database, budget, folder
        self._scope = Scope.of(profile, threads)
        self._model = LoweredModel(modules, profile)
        self._trials = 0

    def run(self, jobs: int) -> TuningReport:
        supervisor = Supervisor(self._folder)
        stopped = "everything is measured"
        try:
            with Builders(self._profile, self._folder, jobs) as builders:
                while (space := self._heaviest()) is not None:
                    if why := self._spent():
                        stopped = why
                        break
                    self._measure(space, builders, supervisor)
        except KeyboardInterrupt:
            stopped = "interrupted"
        finally:
            supervisor.close()
        spent = time.monotonic() - self._started
        tuned = [self._tuned(space) for space in sorted(self._model.spaces.values(), key=lambda space: -space.weight)]
        return TuningReport(tuned, self._trials, spent, stopped, self._database.path, self._scope)

    def _spent(self) -> str:
        """Which limit is reached, or ""."""
        minutes, trials = self._budget.minutes, self._budget.trials
        if minutes is not None and time.monotonic() - self._started >= 60 * minutes:
            return "time"
        return "trials" if trials is not None and self._trials >= trials else ""

    def _known(self, space: Space) -> dict[str, float | None]:
        return self._database.measured(self._scope, space.workload.key())

    def _heaviest(self) -> Space | None:
        """The workload to go on with: the one with most to gain among those that were measured least often."""
        open_ = [space for space in self._model.spaces.values() if space.next(self._known(space))]
        if not open_:
            return None
        return min(open_, key=lambda space: (len(self._known(space)) // 8, -space.weight))

    def _measure(self, space: Space, builders: Builders, supervisor: Supervisor) -> None:
        """Compile and measure one batch."""
        key = space.workload.key()
        wanted = space.next(self._known(space))
        if self._budget.trials is not None:
            wanted = wanted[: max(2, self._budget.trials - self._trials)]
        self._tell(space)
        kernels: list[tuple[Parameters, list[KernelCode]]] = []
        for parameters in wanted:
            if codes := self._model.kernels(key, parameters):
                kernels.append((parameters, codes))
            else:
                space.missing[identity(parameters)] = "the model does not use it this way"
        candidates = self._built(space, kernels, builders)
        if not candidates:
            return
        results = supervisor.measure(
            {"device": device_of(self._profile), "threads": self._scope.threads, "candidates": candidates}
        )
        self._trials += len(candidates)
        machine = machine_name(device_of(self._profile))
        self._database.add(records_of(self._scope, key, candidates, results, machine))
        self._tell(space)

    def _built(
        self, space: Space, kernels: Sequence[tuple[Parameters, list[KernelCode]]], builders: Builders
    ) -> list[dict[str, Any]]:
        candidates = build_candidates(kernels, builders)
        for candidate in candidates:
            if candidate["error"]:
                space.missing[identity(candidate["parameters"])] = candidate["error"]
        return [candidate for candidate in candidates if not candidate["error"]]

    def _tell(self, space: Space) -> None:
        spaces = self._model.spaces.values()
        total = sum(len(space.candidates) for space in spaces)
        done = sum(min(len(space.candidates), len(self._known(space)) + len(space.missing)) for space in spaces)
        tuned = self._tuned(space)
        best = ""
        if tuned.relative is not None:
            best = f": best {_text(tuned.best)}, {1 / tuned.relative:.2f}x the predicted one's speed"
        self.progress(done, total, f"{tuned.workload}{best}")

    def _tuned(self, space: Space) -> Tuned:
        key = space.workload.key()
        known = self._known(space)
        predicted = space.predicted.parameters
        best = self._database.best(self._scope, key) or predicted
        failed = {**space.missing, **{name: "failed before" for name, seconds in known.items() if seconds is None}}
        return Tuned(
            workload=key,
            calls=space.calls,
            candidates=len(space.candidates),
            measured=sum(seconds is not None for seconds in known.values()),
            failed=failed,
            predicted=predicted,
            best=best,
            relative=known.get(identity(best)),
        )


def device_of(profile: Profile) -> str:
    """Where kernels for ``profile`` are measured, as :mod:`mmopt.autotune.measuring` calls it."""
    return "cuda" if profile.kind == "cuda" else "cpu"


def build_candidates(
    kernels: Sequence[tuple[Parameters, list[KernelCode]]], builders: Builders
) -> list[dict[str, Any]]:
    """Compile kernels; one dict a candidate, as :mod:`mmopt.autotune.measuring` takes it, with ``error`` besides.

    Candidates that spill registers of a GPU are errors, but for the first: the others are compared with it.
    """
    flat = [code for _, codes in kernels for code in codes]
    first = range(len(kernels[0][1])) if kernels else ()
    built = iter(builders.build([code.function for code in flat], first))
    candidates = []
    for parameters, codes in kernels:
        made: dict[str, Any] = {"parameters": dict(parameters), "error": "", "kernels": []}
        for code in codes:
            library, why = next(built)
            made["error"] = made["error"] or why
            made["kernels"].append(
                {"library": library, "function": "kernel", "calls": code.calls, "arguments": code.arguments}
            )
        candidates.append(made)
    return candidates


def records_of(
    scope: Scope,
    workload: str,
    candidates: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    machine: str,
) -> list[Record]:
    """Records of candidates measured in turns with each other; the first is the predicted one, whose time is the base
    unless it failed."""
    times = [result["seconds"] for result in results if result.get("seconds")]
    base = results[0].get("seconds") or min(times, default=None) if results else None
    records = []
    for candidate, result in zip(candidates, results, strict=True):
        seconds = result.get("seconds")
        relative = seconds / base if seconds and base else None
        records.append(
            Record(
                scope=scope,
                workload=workload,
                parameters=dict(candidate["parameters"]),
                seconds=seconds,
                relative=relative,
                error=str(result.get("error", "")),
                spread=float(result.get("spread", 0.0)),
                machine=machine,
            )
        )
    return records


def _text(parameters: Parameters) -> str:
    return " ".join(f"{name}={value}" for name, value in parameters.items())
