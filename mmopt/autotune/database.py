"""What has been measured: one JSON object a line in a file that is only ever appended to.

Two runs may write at the same time, and a run may be killed at any moment: lines are appended whole, under a lock, and
a line that is damaged all the same is reported and passed over; nothing is ever rewritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmopt.autotune.measuring import append_line
from mmopt.backends.cpu.choosing import Known, Parameter
from mmopt.backends.profile import Profile
from mmopt.errors import UserError

FORMAT = 1
VARIABLE = "MMOPT_TUNING_DATABASE"
"""Environment variable that names another file."""

WORTH = 0.98
"""A measured candidate replaces the predicted one when it takes at most this fraction of its time."""

Parameters = Mapping[str, Parameter]


@dataclasses.dataclass(frozen=True)
class Scope:
    """What measurements hold for.

    Attributes:
        profile: Digest of the target profile.
        kernels: Version of the kernel templates and of the code generator.
        threads: Threads that were used.
    """

    profile: str
    kernels: str
    threads: int

    @classmethod
    def of(cls, profile: Profile, threads: int) -> Scope:
        """The scope of measurements made now."""
        return cls(profile_digest(profile), kernel_version(), threads)


def profile_digest(profile: Profile) -> str:
    """Short text that is equal for equal profiles."""
    text = json.dumps(dataclasses.asdict(profile), sort_keys=True)
    return f"{profile.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@functools.cache
def kernel_version() -> str:
    """Short text that changes whenever a kernel may: with the source of the backend, and with TVM."""
    digest = hashlib.sha256(importlib.metadata.version("apache-tvm").encode())
    backend = pathlib.Path(__file__).resolve().parent.parent / "backends"
    for path in sorted((*backend.rglob("*.py"), *backend.rglob("*.cuh"))):
        digest.update(path.relative_to(backend).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Record:
    """One measured candidate.

    Attributes:
        scope: What it holds for.
        workload: Key of the workload.
        parameters: The candidate.
        seconds: Time of one call; None when it failed.
        relative: ``seconds`` over that of the predicted candidate, measured in turns with it.
        error: Why it failed, or "".
        spread: Median deviation of the turns' means, as a fraction.
        machine: Processor it was measured on.
    """

    scope: Scope
    workload: str
    parameters: Parameters
    seconds: float | None
    relative: float | None
    error: str = ""
    spread: float = 0.0
    machine: str = ""

    def to_json(self) -> dict[str, Any]:
        """The form of a line."""
        return {"format": FORMAT, **dataclasses.asdict(self), "parameters": dict(self.parameters)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """Inverse of :meth:`to_json`.

        Raises:
            KeyError, TypeError, ValueError: It is not a record.
        """
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, and this mmopt reads {FORMAT}")
        fields = {field.name: data[field.name] for field in dataclasses.fields(cls) if field.name in data}
        record = cls(**{**fields, "scope": Scope(**data["scope"])})
        if not isinstance(record.parameters, dict) or not isinstance(record.workload, str):
            raise TypeError("parameters or workload of a wrong type")
        for value in (record.seconds, record.relative):
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise ValueError(f"{value!r} is not a time")
        return record


def identity(parameters: Parameters) -> str:
    """Text that is equal for equal parameters."""
    return json.dumps(dict(parameters), sort_keys=True)


def default_path() -> pathlib.Path:
    """The database's file: what :data:`VARIABLE` says, or in the user's cache folder as the platform has it."""
    if given := os.environ.get(VARIABLE):
        return pathlib.Path(given).expanduser()
    if sys.platform == "darwin":
        cache = pathlib.Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        cache = pathlib.Path(os.environ.get("LOCALAPPDATA") or pathlib.Path.home() / "AppData" / "Local")
    else:
        given = os.environ.get("XDG_CACHE_HOME", "")
        cache = pathlib.Path(given) if os.path.isabs(given) else pathlib.Path.home() / ".cache"
    return cache / "mmopt" / "tuning.jsonl"


class Database:
    """Records in a file.

    Args:
        path: The file; :func:`default_path` when None. It need not exist.

    Attributes:
        path: The file.
        damaged: What was wrong with lines that could not be read.

    Raises:
        UserError: The file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = default_path() if path is None else pathlib.Path(path).expanduser()
        self.damaged: list[str] = []
        self._records: dict[tuple[Scope, str], dict[str, list[Record]]] = {}
        for number, line in enumerate(self._lines(), 1):
            if not line.strip():
                continue
            try:
                self._remember(Record.from_json(json.loads(line)))
            except (KeyError, TypeError, ValueError) as error:
                self.damaged.append(f"{self.path}, line {number} is passed over: {type(error).__name__}: {error}")

    def _lines(self) -> list[str]:
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"the tuning database cannot be read: {error.strerror}", where=str(self.path)) from error
        return text.split("\n")

    def _remember(self, record: Record) -> None:
        found = self._records.setdefault((record.scope, record.workload), {})
        found.setdefault(identity(record.parameters), []).append(record)

    def add(self, records: Sequence[Record]) -> None:
        """Append ``records``, and have them reach the disk.

        Raises:
            UserError: The file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path):
                for record in records:
                    append_line(self.path, json.dumps(record.to_json()))
        except OSError as error:
            hint = f"give another file with --database or {VARIABLE}"
            raise UserError(
                f"the tuning database cannot be written: {error.strerror}", where=str(self.path), hint=hint
            ) from error
        for record in records:
            self._remember(record)

    def measured(self, scope: Scope, workload: str) -> dict[str, float | None]:
        """Time relative to the predicted candidate of all that was measured, by :func:`identity`; None for failures.

        What was measured more than once counts with its median.
        """
        times = {}
        for key, records in self._records.get((scope, workload), {}).items():
            good = [record.relative for record in records if record.relative is not None]
            times[key] = statistics.median(good) if good else None
        return times

    def best(self, scope: Scope, workload: str) -> Parameters | None:
        """The quickest parameters, or the predicted ones when that is hardly worth it; None when nothing is known."""
        found = self._records.get((scope, workload), {})
        times = {key: time for key, time in self.measured(scope, workload).items() if time is not None}
        if not times:
            return None
        quickest = min(times, key=lambda key: times[key])
        if times[quickest] > WORTH:
            quickest = min(times, key=lambda key: abs(times[key] - 1.0))
        return found[quickest][0].parameters

    def known(self, scope: Scope) -> Known:
        """What a :class:`~mmopt.backends.cpu.choosing.Chooser` asks."""
        return lambda workload: self.best(scope, workload.key())

    def __len__(self) -> int:
        return sum(len(records) for found in self._records.values() for records in found.values())


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Keep other processes from appending meanwhile, where the system has file locks."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        os.fsync(file)
