"""Measuring on a machine without a compiler: compiled candidates leave in a folder, and results come back.

The folder holds ``measure.py`` (needs numpy, tvm_ffi and TVM's runtime libraries), the libraries of all candidates,
``tasks.jsonl`` with what to run, and ``meta.json`` with what the results will hold for. Each line of ``results.jsonl``
says that again, so the file can travel alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmopt.autotune import measuring
from mmopt.autotune.build import Builders
from mmopt.autotune.contest import fits_here, scope_threads
from mmopt.autotune.database import FORMAT, Database, Record, Scope, kernel_version, profile_digest
from mmopt.autotune.lowered import LoweredModel
from mmopt.autotune.runner import build_candidates, device_of, records_of
from mmopt.autotune.space import BATCH, WHOLE, Space
from mmopt.backends.linking import architecture
from mmopt.backends.profile import Profile, load_profile
from mmopt.errors import MmoptError, UserError
from mmopt.ir.module import Module
from mmopt.runtime import atomic
from mmopt.runtime.cpu import machine
from mmopt.runtime.device import CUDA_LIBRARY
from mmopt.runtime.libraries import installed_libraries

README = """\
Candidates of kernels, compiled by mmopt for {target}.

Run them on a machine of that kind, with nothing else going on:

    pip install numpy apache-tvm-ffi=={ffi}{more}
    python measure.py

Results are appended to results.jsonl; an interrupted run goes on where it was. Then, where mmopt is:

    mmopt tune --import results.jsonl

TVM's runtime libraries are taken from runtime/ here when it exists, from an installed apache-tvm, or from --runtime.
"""

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        folder: Where.
        workloads: Workloads with more than one candidate that compiles.
        candidates: Compiled candidates.
        failed: Why others are not there, by workload and parameters.
    """

    folder: pathlib.Path
    workloads: int
    candidates: int
    failed: dict[str, str]


def export(
    modules: Mapping[str, Module],
    profile: Profile,
    folder: str | os.PathLike[str],
    *,
    trials: int | None = None,
    jobs: int | None = None,
    progress: Progress = lambda done, total, text: None,
) -> Exported:
    """Compile the candidates of a model's kernels into ``folder``.

    Args:
        modules: Entry points by name.
        profile: What to compile for; any machine.
        folder: Is made; must not exist, or be empty.
        trials: Most candidates; None for all.
        jobs: Kernels compiled at the same time.
        progress: Told candidates compiled, candidates there are, and the workload.

    Raises:
        UserError: The folder is in use, or cannot be made.
    """
    output = pathlib.Path(folder).expanduser().resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError("is in use", where=str(output), hint="give a folder that does not exist yet")
    with atomic.staging(output) as staged:
        result = _Export(modules, profile, staged, trials, progress).write(jobs or os.cpu_count() or 1)
        atomic.sync_tree(staged)
        if output.exists():
            output.rmdir()
        atomic.publish(staged, output)
    return dataclasses.replace(result, folder=output)


class _Export:
    """One export."""

    def __init__(
        self,
        modules: Mapping[str, Module],
        profile: Profile,
        folder: pathlib.Path,
        trials: int | None,
        progress: Progress,
    ) -> None:
        self._model = LoweredModel(modules, profile)
        self._profile, self._folder, self._trials, self._progress = profile, folder, trials, progress
        self._scope = Scope.of(profile, scope_threads(profile))
        self._tasks: list[dict[str, Any]] = []
        self._failed: dict[str, str] = {}
        self._count = 0

    def write(self, jobs: int) -> Exported:
        (self._folder / "libraries").mkdir()
        with Builders(self._profile, self._folder / "libraries", jobs) as builders:
            for space in sorted(self._model.spaces.values(), key=lambda space: -space.weight):
                self._space(space, builders)
        shutil.copyfile(measuring.__file__, self._folder / "measure.py")
        lines = "".join(json.dumps(task) + "\n" for task in self._tasks)
        (self._folder / "tasks.jsonl").write_text(lines, encoding="utf-8")
        scope = dataclasses.asdict(self._scope)
        meta = {"format": FORMAT, "scope": scope, "target": self._profile.to_dict()}
        (self._folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        more = " nvidia-cuda-runtime" if self._profile.kind == "cuda" else ""
        readme = README.format(target=self._profile.name, ffi=_ffi_version(), more=more)
        (self._folder / "README.txt").write_text(readme, encoding="utf-8")
        self._carry_runtime()
        return Exported(self._folder, len({task["workload"] for task in self._tasks}), self._count, self._failed)

    def _carry_runtime(self) -> None:
        """TVM's runtime libraries come along when they are of the right kind: those installed here."""
        cuda = self._profile.kind == "cuda"
        fits = architecture(self._profile) == machine() if cuda else fits_here(self._profile)
        libraries = installed_libraries() if fits else []
        if cuda:
            libraries += [path for f in {path.parent for path in libraries} if (path := f / CUDA_LIBRARY).is_file()]
        if libraries:
            (self._folder / "runtime").mkdir()
        for path in libraries:
            shutil.copyfile(path, self._folder / "runtime" / path.name)

    def _space(self, space: Space, builders: Builders) -> None:
        """Tasks of one workload: batches, each with the predicted candidate as the one to compare with."""
        key = space.workload.key()
        ordered = sorted(space.candidates, key=lambda candidate: candidate.cycles)[:WHOLE]
        if self._trials is not None:
            ordered = ordered[: max(0, self._trials - self._count)]
        kernels = [(c.parameters, codes) for c in ordered if (codes := self._model.kernels(key, c.parameters))]
        built = build_candidates(kernels, builders) if len(kernels) > 1 else []
        for candidate in built:
            if candidate["error"]:
                self._failed[f"{key} {json.dumps(candidate['parameters'])}"] = candidate["error"]
        good = [candidate for candidate in built if not candidate.pop("error")]
        for candidate in good:
            for kernel in candidate["kernels"]:
                kernel["library"] = f"libraries/{kernel['library']}"
        total = sum(min(WHOLE, len(other.candidates)) for other in self._model.spaces.values())
        self._count += len(good)
        self._progress(min(self._count, total), total, key)
        for start in range(1, len(good), BATCH - 1):
            batch = [good[0], *good[start : start + BATCH - 1]]
            self._tasks.append(
                {
                    "task": len(self._tasks),
                    "workload": key,
                    "device": device_of(self._profile),
                    "threads": self._scope.threads,
                    "candidates": batch,
                }
            )


def _ffi_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("apache-tvm-ffi")


@dataclasses.dataclass(frozen=True)
class Imported:
    """What came back.

    Attributes:
        records: Results that are in the database now.
        workloads: Workloads they belong to.
        machine: Processor they were measured on.
        damaged: Lines that could not be read, with the reason.
    """

    records: int
    workloads: int
    machine: str
    damaged: list[str]


def import_results(path: str | os.PathLike[str], database: Database, target: str | None = None) -> Imported:
    """Take results of an exported folder into ``database``.

    Args:
        path: The folder, or its ``results.jsonl``.
        database: Where they go.
        target: The target they must be for, by name or file; any known one when None.

    Raises:
        UserError: No results, results of other kernels or of another target; nothing is imported then.
    """
    file = pathlib.Path(path)
    file = file / measuring.RESULTS if file.is_dir() else file
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        hint = "run measure.py in the exported folder first"
        raise UserError(f"there are no results: {error.strerror}", where=str(file), hint=hint) from error
    found: list[Record] = []
    damaged: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found += _records(json.loads(line))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            damaged.append(f"{file}, line {number} is passed over: {type(error).__name__}: {error}")
    if not found:
        raise UserError("there are no results in it", where=str(file), hint="; ".join(damaged[:1]) or "measure first")
    for scope in {record.scope for record in found}:
        _check(scope, target, str(file))
    database.add(found)
    return Imported(len(found), len({record.workload for record in found}), found[-1].machine, damaged)


def _records(line: Mapping[str, Any]) -> list[Record]:
    if line["format"] != FORMAT:
        raise ValueError(f"format {line['format']}, and this mmopt reads {FORMAT}")
    scope = dataclasses.replace(Scope(**line["scope"]), threads=int(line["threads"]))
    results: Sequence[Mapping[str, Any]] = line["results"]
    made = records_of(scope, line["workload"], results, results, str(line["machine"]))
    return [Record.from_json(record.to_json()) for record in made]


def _check(scope: Scope, target: str | None, where: str) -> None:
    if scope.kernels != kernel_version():
        raise UserError(
            f"the results are for version {scope.kernels} of the kernels, and this is {kernel_version()}",
            where=where,
            hint="export and measure again with this mmopt",
        )
    known = _profiles(scope, target)
    if scope.profile not in {profile_digest(profile) for profile in known}:
        names = ", ".join(sorted({profile.name for profile in known})) or "none"
        raise UserError(
            f"the results are for the target profile {scope.profile}, which is not what is known here by that name",
            where=where,
            hint=f"give the profile they were exported with as --target (looked at: {names})",
        )


def _profiles(scope: Scope, target: str | None) -> list[Profile]:
    """Profiles the results may be for."""
    if target is not None:
        return [load_profile(target)]
    found = []
    for name in ("cpu", scope.profile.rpartition("-")[0]):
        try:
            found.append(load_profile(name))
        except MmoptError:
            continue
    return found
