"""Runs cases in forked workers: many cases a worker, and a dead or stuck worker costs one case."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.compat.cases import Case
from tests.compat.judge import CRASHED, judge

CASES_PER_WORKER = 150
"""A worker is replaced after so many cases, as compiled libraries stay in its memory."""

_FORK = multiprocessing.get_context("fork")


class _Worker:
    """A forked process that judges one case at a time."""

    def __init__(self, cases: Sequence[Case], work: Callable[[Case], dict[str, Any]]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        self.pipe, theirs = _FORK.Pipe()
        self.process = _FORK.Process(target=_serve, args=(cases, theirs, self._log.fileno(), work), daemon=True)
        self.process.start()
        theirs.close()
        self.case: int | None = None
        self.started, self.done = 0.0, 0

    def assign(self, number: int) -> None:
        """Start a case."""
        self.case, self.started, self.done = number, time.monotonic(), self.done + 1
        self.pipe.send(number)

    def end(self) -> str:
        """Stop the process; what it last wrote to stderr."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self._log.seek(0)
        text = self._log.read().decode(errors="replace")
        self._log.close()
        return text[-1500:]


def _serve(cases: Sequence[Case], pipe: Connection, log: int, work: Callable[[Case], dict[str, Any]]) -> None:
    os.dup2(log, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            pipe.send(work(cases[pipe.recv()]))


def warm_up() -> None:
    """Import what every case needs, so that workers inherit it."""
    import onnxruntime  # noqa: F401

    import mmopt.analysis.towers
    import mmopt.lowering.compiler
    import mmopt.pipeline.manager  # noqa: F401
    from mmopt.lowering.registry import lowered_operators

    lowered_operators()


def run_cases(
    cases: Sequence[Case], jobs: int, timeout: float, work: Callable[[Case], dict[str, Any]] = judge
) -> Iterator[dict[str, Any]]:
    """Judge ``cases``, in no particular order.

    Args:
        cases: What to run.
        jobs: Processes at a time.
        timeout: Seconds a case may take.
        work: Gives the record of a case; it must not return for one that kills its process.
    """
    waiting = list(range(len(cases)))[::-1]
    workers: list[_Worker] = []
    try:
        while waiting or any(w.case is not None for w in workers):
            workers = [w for w in workers if w.case is not None or not _worn_out(w)]
            while waiting and len(workers) < jobs:
                workers.append(_Worker(cases, work))
            for worker in workers:
                if worker.case is None and waiting:
                    worker.assign(waiting.pop())
            wait([w.pipe for w in workers if w.case is not None], timeout=1.0)
            for worker in list(workers):
                record = _collected(worker, cases, timeout)
                if record is None:
                    continue
                yield record
                if not worker.process.is_alive():
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.end()


def _worn_out(worker: _Worker) -> bool:
    if worker.done < CASES_PER_WORKER:
        return False
    worker.end()
    return True


def _collected(worker: _Worker, cases: Sequence[Case], timeout: float) -> dict[str, Any] | None:
    """The record of a worker that is done, dead or late."""
    if worker.case is None:
        return None
    case, late = cases[worker.case], time.monotonic() - worker.started > timeout
    if worker.pipe.poll():
        with contextlib.suppress(EOFError, ConnectionError):
            record: dict[str, Any] = worker.pipe.recv()
            worker.case = None
            return record
    elif worker.process.is_alive() and not late:
        return None
    worker.process.join(0 if late else 10)
    code = worker.process.exitcode
    reason = f"took longer than {timeout:g} s" if late else f"the process ended with {code}"
    log = worker.end()
    worker.case = None
    return {
        "name": case.name,
        "family": case.family,
        "operators": case.operators,
        "status": CRASHED,
        "reason": reason,
        "trace": log,
        "seconds": round(time.monotonic() - worker.started, 3),
    }


def code_digest(root: pathlib.Path) -> str:
    """Hash of everything that decides a result: the package, its data and the versions of what it is built on."""
    import hashlib
    import importlib.metadata

    digest = hashlib.sha256()
    files = [*root.glob("mmopt/**/*.py"), *root.glob("passes/recipes/*"), *root.glob("targets/*")]
    for path in sorted([*files, *root.glob("tests/compat/*.py")]):
        digest.update(path.read_bytes())
    for package in ("apache-tvm", "numpy", "onnx", "onnx-ir", "onnxruntime"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()[:16]
