"""What ``mmopt tune`` does, and what ``mmopt optimize -O3`` says about tuning."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from mmopt.api import Tuning, load, tune
from mmopt.api import entry_points as entry_points_of
from mmopt.api import optimize as optimize_module
from mmopt.autotune.database import Database
from mmopt.autotune.export import export, import_results
from mmopt.autotune.runner import Budget, TuningReport
from mmopt.backends.profile import load_profile
from mmopt.cli.output import Output, table
from mmopt.cli.request import calibration_samples
from mmopt.ir.module import Module
from mmopt.loading import parse_shapes
from mmopt.runtime.writer import installed_versions


@dataclasses.dataclass(frozen=True)
class Request:
    """The model of one ``mmopt tune``, and how it is optimized first."""

    model: str
    target: str
    recipe: str | None
    passes: tuple[str, ...]
    precision: str | None
    calib: str | None
    shapes: tuple[str, ...]
    jobs: int | None
    trust_code: bool


def search(
    request: Request, minutes: float | None, trials: int | None, database: pathlib.Path | None, show: Output
) -> None:
    """Measure within the budget. Without any limit given, five minutes."""
    wanted = Tuning.minutes if minutes is None and trials is None else minutes
    tuning = Tuning(wanted, trials, database, request.jobs)
    Budget(tuning.minutes, tuning.trials)
    _warn_damaged(Database(database), show)
    module = _optimized(request, show)
    with show.steps("tune") as steps:
        report = tune(module, target=request.target, tuning=tuning, progress=steps.at)
    tell(report, show)


def tell(report: TuningReport, show: Output) -> None:
    """Print and write what a search found."""
    rows = [
        (
            tuned.workload,
            tuned.calls,
            f"{tuned.measured} of {tuned.candidates}",
            _text(tuned.predicted),
            "as predicted" if tuned.best == tuned.predicted else _text(tuned.best),
            "-" if tuned.relative is None else f"{1 / tuned.relative:.2f}x",
        )
        for tuned in report.workloads
    ]
    show.result(table(("workload", "calls", "measured", "predicted best", "measured best", "gain"), rows))
    for tuned in report.workloads:
        for parameters, why in tuned.failed.items():
            show.say(f"{tuned.workload} {parameters}: {why}", level=1)
    failed = sum(len(tuned.failed) for tuned in report.workloads)
    show.result(
        f"{report.trials} candidates measured in {report.seconds:.0f} s, until {report.stopped}; "
        f"{report.changed} of {len(report.workloads)} workloads do better than predicted"
        + (f"; {failed} candidates failed (-v says why)" if failed else "")
    )
    show.result(f"database: {report.database}; mmopt optimize -O3 uses it")
    show.json({"versions": installed_versions(), **report.to_json()})


def export_candidates(request: Request, folder: pathlib.Path, trials: int | None, show: Output) -> None:
    """Compile candidates into ``folder``."""
    Budget(None, trials)
    profile = load_profile(request.target)
    module = _optimized(request, show)
    modules = {"main": module, **entry_points_of(module)}
    with show.steps("export") as steps:
        made = export(modules, profile, folder, trials=trials, jobs=request.jobs, progress=steps.at)
    for name, why in made.failed.items():
        show.warn(f"{name}: {why}")
    show.result(f"{made.candidates} candidates for {made.workloads} workloads, compiled for {profile.name}")
    show.result(f"written: {made.folder}; on such a machine run python measure.py there, then mmopt tune --import")
    show.json({**dataclasses.asdict(made), "target": profile.to_dict()})


def import_measured(path: pathlib.Path, database: pathlib.Path | None, target: str | None, show: Output) -> None:
    """Take results into the database."""
    kept = Database(database)
    _warn_damaged(kept, show)
    found = import_results(path, kept, target)
    for line in found.damaged:
        show.warn(line)
    show.result(f"{found.records} results for {found.workloads} workloads, measured on {found.machine}")
    show.result(f"database: {kept.path}; mmopt optimize -O3 uses it")
    show.json({**dataclasses.asdict(found), "database": str(kept.path)})


def _optimized(request: Request, show: Output) -> Module:
    """The model as ``mmopt optimize`` would compile it."""
    module = load(request.model, shapes=parse_shapes(request.shapes), trust_code=request.trust_code)
    samples = calibration_samples(request.calib, module)
    with show.steps("optimize") as steps:
        result = optimize_module(
            module,
            target=request.target,
            level=3,
            precision=request.precision,
            recipe=request.recipe,
            passes=request.passes,
            samples=samples,
            progress=lambda at: steps.at(at.index, at.total, at.name) if at.record is None else None,
        )
    for record in result.report.failed:
        show.warn(f"pass {record.name} was rolled back: {record.reason}")
    return result.module


def _warn_damaged(database: Database, show: Output) -> None:
    for line in database.damaged:
        show.warn(line)


def _text(parameters: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in parameters.items())


def summary_line(tuning: Mapping[str, Any]) -> str:
    """The line of ``mmopt optimize -O3`` about tuning."""
    contest, search_ = tuning["contest"], tuning["search"]
    text = str(tuning["reason"])
    if contest is not None:
        before, after, ratio = contest["predicted"] * 1e3, contest["tuned"] * 1e3, contest["ratio"]
        text += f" ({before:.2f} ms predicted, {after:.2f} ms measured, {1 / ratio:.3f}x)"
    if search_ is not None:
        text += f"; {search_['trials']} candidates measured in {search_['seconds']:.0f} s"
    return text
