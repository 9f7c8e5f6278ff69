"""A quick measurement after ``mmopt optimize``: the artifact and onnxruntime, turn by turn on the same inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from mmopt.bench.measure import Plan, take_turns
from mmopt.bench.peers import Spec
from mmopt.bench.worker import Worker
from mmopt.errors import MmoptError
from mmopt.frontends.onnx import save_onnx
from mmopt.ir.module import Module
from mmopt.runnable import Inputs

PLAN = Plan(rounds=4, seconds=1.2)


@dataclasses.dataclass(frozen=True)
class Speed:
    """Median times of one run in seconds.

    Attributes:
        artifact: The artifact.
        peer: onnxruntime in fp32 on the model as it was.
        threads: Threads of both.
        reason: Why nothing was measured, or "".
    """

    artifact: float = 0.0
    peer: float = 0.0
    threads: int = 0
    reason: str = ""

    @property
    def ratio(self) -> float:
        """How many times faster the artifact is; below 1 it is slower."""
        return self.peer / self.artifact if self.artifact else 0.0


def measure(artifact: pathlib.Path, original: Module, inputs: Inputs, threads: int) -> Speed:
    """Measure both, each in a process of its own; what cannot be measured is said, not raised."""
    arrays: dict[str, Any] = dict(inputs)
    if not all(isinstance(value, np.ndarray) for value in arrays.values()):
        return Speed(reason="not all inputs are tensors")
    try:
        with _on_disk(original) as model, contextlib.ExitStack() as stack:
            specs = [Spec("mmopt", "mmopt", str(artifact), threads)]
            specs.append(Spec("onnxruntime", "onnxruntime", str(model), threads))
            workers = [stack.enter_context(Worker(spec, arrays, timeout=120.0)) for spec in specs]
            timed = take_turns(workers, PLAN)
    except MmoptError as error:
        return Speed(reason=error.what)
    medians = {name: statistics.median(time for turn in rounds for time in turn) for name, rounds in timed.items()}
    return Speed(medians["mmopt"], medians["onnxruntime"], threads)


@contextlib.contextmanager
def _on_disk(module: Module) -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory(prefix="mmopt-") as folder:
        path = pathlib.Path(folder) / "original.onnx"
        save_onnx(module, path)
        yield path
