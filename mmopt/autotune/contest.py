"""The last word of tuning: the whole model with measured parameters against the whole model with predicted ones.

Kernels that win alone may lose together (a tile that suits a kernel may suit the caches of the next one less), so both
models are compiled and run in turns, and the faster one is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import statistics
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from mmopt.analysis.probes import probe_inputs
from mmopt.autotune.database import Database, Scope
from mmopt.autotune.runner import Budget, Progress, TuningReport, tune
from mmopt.backends.cpu.choosing import Chooser
from mmopt.backends.profile import Profile
from mmopt.errors import BackendError, UnsupportedError
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.lowering.compiler import CompileOptions, compile_module
from mmopt.runtime import Session, load_artifact
from mmopt.runtime.artifact import MAIN
from mmopt.runtime.cpu import check_target, default_threads
from mmopt.runtime.writer import write_artifact

TURNS = 15
TURN_SECONDS = 0.3
PAUSE = 0.02
SECONDS = 45.0
"""A contest takes up to :data:`TURNS` turns of each side, each of some :data:`TURN_SECONDS`, and ends after
:data:`SECONDS`."""


@dataclasses.dataclass(frozen=True)
class Contest:
    """Two ways to compile one model, measured in turns.

    Attributes:
        predicted: Median seconds of a run with the parameters that templates predict to be best.
        tuned: The same with measured parameters.
        ratio: Median over turns of ``tuned`` / ``predicted``.
        turns: Turns of each side.
    """

    predicted: float
    tuned: float
    ratio: float
    turns: int

    @property
    def keep_tuned(self) -> bool:
        """Whether measured parameters are faster."""
        return self.ratio < 1.0


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a model is compiled with, and why.

    Attributes:
        chooser: Picks its parameters.
        report: What the search found; None when nothing could be measured here.
        contest: How both ways compare; None when there was nothing to compare.
        reason: In a sentence, for reports.
    """

    chooser: Chooser
    report: TuningReport | None
    contest: Contest | None
    reason: str

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        contest = None if self.contest is None else dataclasses.asdict(self.contest)
        report = None if self.report is None else self.report.to_json()
        return {"reason": self.reason, "contest": contest, "search": report}


def scope_threads(profile: Profile) -> int:
    """Threads that kernels for ``profile`` are measured with: as many as a session takes; one launches on a GPU."""
    if profile.kind == "cuda":
        return 1
    return default_threads() if fits_here(profile) else profile.cores


def fits_here(profile: Profile) -> bool:
    """Whether code for ``profile`` runs on this machine."""
    try:
        check_target(profile.to_dict(), where=f"target {profile.name}")
    except UnsupportedError:
        return False
    return True


def decide(
    modules: Mapping[str, Module],
    profile: Profile,
    database: Database,
    budget: Budget,
    *,
    inputs: Mapping[str, Any] | None = None,
    jobs: int | None = None,
    progress: Progress = lambda done, total, text: None,
) -> Decision:
    """Tune a model and decide what to compile it with. The result is never slower than what is predicted to be best.

    Args:
        modules: Entry points by name; ``main`` is the one that is compared.
        profile: What to compile for. When that is another machine, the database is all there is to go by.
        database: What is known already, and where results are kept.
        budget: When to stop searching; the comparison comes after it.
        inputs: What to compare on; made from the model when None.
        jobs: Kernels compiled at the same time.
        progress: Told how far the search is.
    """
    threads = scope_threads(profile)
    tuned = Chooser(database.known(Scope.of(profile, threads)))
    if not fits_here(profile):
        return Decision(tuned, None, None, f"nothing measured: target {profile.name} is not this machine")
    report = tune(modules, profile, database, budget, threads=threads, jobs=jobs, progress=progress)
    if not report.changed:
        return Decision(Chooser(), report, None, "no measured parameters are better than the predicted ones")
    progress(0, 1, "the whole model, tuned against predicted")
    try:
        found = contest(modules[MAIN], profile, tuned, inputs=inputs, threads=threads)
    except BackendError as error:
        return Decision(Chooser(), report, None, f"predicted parameters are kept: {error.what}")
    if found.keep_tuned:
        return Decision(tuned, report, found, "measured parameters are kept: the whole model is faster with them")
    return Decision(Chooser(), report, found, "predicted parameters are kept: the whole model is no faster when tuned")


def contest(
    module: Module, profile: Profile, tuned: Chooser, *, inputs: Mapping[str, Any] | None = None, threads: int
) -> Contest:
    """Compile ``module`` with predicted and with measured parameters and run both in turns.

    Raises:
        BackendError: Compiling or running failed, or no inputs were found.
    """
    values = inputs if inputs is not None else _made_up(module)
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mmopt-contest-")))
        sides = [
            stack.enter_context(compiled(module, profile, chooser, folder / name, threads))
            for name, chooser in (("predicted.mmopt", Chooser()), ("tuned.mmopt", tuned))
        ]
        times: list[list[float]] = [[], []]
        repeats = [repeats_of(side, values) for side in sides]
        started = time.monotonic()
        while len(times[0]) < TURNS and (len(times[0]) < 3 or time.monotonic() - started < SECONDS):
            for side in (0, 1) if len(times[0]) % 2 == 0 else (1, 0):
                times[side].append(turn(sides[side], values, repeats[side]))
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    return Contest(statistics.median(times[0]), statistics.median(times[1]), ratio, len(times[0]))


@contextlib.contextmanager
def compiled(module: Module, profile: Profile, chooser: Chooser, path: pathlib.Path, threads: int) -> Any:
    """A session of ``module``, compiled to ``path``; unverified, for measuring."""
    program = compile_module(module, profile, options=CompileOptions(chooser=chooser))
    with write_artifact(path) as writer:
        writer.add_program(program)
        writer.seal()
        del program
        session: Session = load_artifact(writer.folder, threads, verify_hashes="size")
        with session:
            yield session


def repeats_of(session: Session, values: Mapping[str, Any]) -> int:
    """How many runs make a turn of some :data:`TURN_SECONDS`."""
    session.run(values)
    return max(1, min(1000, int(TURN_SECONDS / max(turn(session, values, 1), 1e-6))))


def turn(session: Session, values: Mapping[str, Any], repeats: int) -> float:
    """Median seconds of a run, after a pause and an unmeasured run."""
    time.sleep(PAUSE)
    session.run(values)
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        session.run(values)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _made_up(module: Module) -> Mapping[str, Any]:
    firsts = [value.shape[0] for value in module.graph.inputs if value.shape is not None and len(value.shape)]
    single = {str(dim.value): 1 for dim in firsts if not isinstance(dim, int) and dim.value is not None}
    with ReferenceRunner() as runner:
        try:
            return probe_inputs(module, seeds=(0,), sizes=single, runner=runner)[0]
        except BackendError:
            return probe_inputs(module, seeds=(0,), runner=runner)[0]
