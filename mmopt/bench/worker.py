"""A process that holds one contender: to see its start and its memory alone, or to measure it apart from the others.

``python -m mmopt.bench.worker`` reads one JSON line, ``{"spec": …, "inputs": FILE.npz, "outputs": FILE.npz}``, loads
the contender, runs it once and answers with one line. After that every line ``{"entry": NAME, "seconds": S}`` is one
turn, answered with ``{"times": […]}``. It ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from mmopt import errors
from mmopt.bench.arrays import load_values, save_values
from mmopt.bench.machine import peak_memory
from mmopt.bench.measure import LocalRacer
from mmopt.bench.peers import Spec, Values, open_contender
from mmopt.bench.towers import tower_racers
from mmopt.errors import BackendError, MmoptError


class Worker:
    """The parent's side: starts the process, and is a :class:`~mmopt.bench.measure.Racer` once it has answered.

    Attributes:
        name: The contender's label.
        start: What the process said of its start: ``load_s``, ``first_answer_s``, ``peak_bytes``, ``baseline_bytes``,
            ``version``, ``towers``, ``towers_left_out``.
        outputs: The contender's first answer.
    """

    def __init__(self, spec: Spec, inputs: Values, timeout: float = 600.0) -> None:
        """Start the process and wait for its first answer.

        Raises:
            UserError: The inputs, or the artifact, are not what they should be.
            BackendError: The contender failed, or took longer than ``timeout`` seconds; the hint holds the last lines
                of what its process printed.
        """
        self.name, self._timeout = spec.label, timeout
        self._folder = tempfile.TemporaryDirectory(prefix="mmopt-bench-")
        self._log = open(Path(self._folder.name) / "log", "w+b")  # noqa: SIM115 (closed with the worker)
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "mmopt.bench.worker"],  # what a dying process printed is not lost
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
        )
        try:
            given, made = Path(self._folder.name) / "inputs.npz", Path(self._folder.name) / "outputs.npz"
            save_values(given, inputs)
            self.start = self._ask({"spec": spec.to_json(), "inputs": str(given), "outputs": str(made)})
            self.outputs = load_values(made)
        except BaseException:
            self.close()
            raise

    def turn(self, seconds: float, entry: str = "main") -> list[float]:
        """One turn in the process; see :func:`~mmopt.bench.measure.timed_runs`."""
        return [float(t) for t in self._ask({"entry": entry, "seconds": seconds})["times"]]

    def towers(self) -> dict[str, RemoteTower]:
        """The contender's other entry points, as racers."""
        return {entry: RemoteTower(f"{self.name}:{entry}", self, entry) for entry in self.start["towers"]}

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._folder.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        sender, receiver = self._process.stdin, self._process.stdout
        if sender is None or receiver is None:
            raise BackendError("the measuring process has no pipes", where=self.name)
        started = time.monotonic()
        watch = threading.Timer(self._timeout, self._process.kill)
        watch.start()
        try:
            sender.write(json.dumps(request).encode() + b"\n")
            sender.flush()
            line = receiver.readline()
        except BrokenPipeError:
            line = b""
        finally:
            watch.cancel()
        if not line:
            raise self._died(time.monotonic() - started >= self._timeout)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._error(**answer["error"])
        return answer

    def _error(self, kind: str, what: str, where: str, hint: str) -> MmoptError:
        """The error the process reports: a user's mistake stays one, all else is a failing backend."""
        if kind in ("UserError", "LoadError"):
            return getattr(errors, kind)(what, where=where or self.name, hint=hint)  # type: ignore[no-any-return]
        return BackendError(f"{where}: {what}" if where else what, where=self.name, hint=hint)

    def _died(self, late: bool) -> BackendError:
        code = self._process.wait()
        self._log.seek(0)
        tail = self._log.read()[-2000:].decode(errors="replace").strip()
        what = f"no answer within {self._timeout:g} s" if late else f"its process ended with code {code}"
        return BackendError(what, where=self.name, hint=tail)


class RemoteTower:
    """One entry point of a contender in another process, as a racer."""

    def __init__(self, name: str, worker: Worker, entry: str) -> None:
        self.name, self._worker, self._entry = name, worker, entry

    def turn(self, seconds: float) -> list[float]:
        """See :class:`~mmopt.bench.measure.Racer`."""
        return self._worker.turn(seconds, self._entry)


def _begin(request: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, LocalRacer]]:
    """Load, give the first answer, and get ready for turns."""
    contender = open_contender(Spec(**request["spec"]))
    inputs = load_values(Path(request["inputs"]))
    baseline = peak_memory()
    start = time.perf_counter()
    contender.load()
    loaded = time.perf_counter()
    outputs = contender.run(inputs)
    answered = time.perf_counter()
    contender.run(inputs)
    facts: dict[str, Any] = {
        "version": contender.version,
        "load_s": loaded - start,
        "first_answer_s": answered - start,
        "peak_bytes": peak_memory(),
        "baseline_bytes": baseline,
    }
    save_values(Path(request["outputs"]), outputs)
    towers, skipped = tower_racers(contender, inputs)
    facts.update(towers=list(towers), towers_left_out=skipped)
    return facts, {"main": LocalRacer(contender, inputs), **towers}


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    racers: dict[str, LocalRacer] = {}
    for line in requests:
        request = json.loads(line)
        try:
            if "spec" in request:
                answer, racers = _begin(request)
            else:
                answer = {"times": racers[request["entry"]].turn(request["seconds"])}
        except MmoptError as error:
            kind = type(error).__name__
            answer = {"error": {"kind": kind, "what": error.what, "where": error.where, "hint": error.hint}}
        except Exception as error:  # whatever a runtime raises is told to the parent, which decides
            what = f"{type(error).__name__}: {error}"
            answer = {"error": {"kind": "BackendError", "what": what, "where": "", "hint": ""}}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def main() -> None:
    """Serve one parent. What libraries print goes to stderr, so that answers stay clean."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
