"""Reports with known timings, for tests of verdicts and tables."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmopt.bench.record import Report, Result, Start

MACHINE = {
    "cpu": "Some CPU",
    "architecture": "x86_64",
    "cores": 2,
    "governor": "performance",
    "memory_bytes": 2**34,
    "system": "Linux",
    "python": "3.12.1",
    "load_average": 0.1,
    "versions": {"mmopt": "0.1.0"},
}
SETTINGS = {"threads": 2, "rounds": 10, "isolate": False, "inputs_digest": "d" * 16, "inputs_from": "x.npz"}


def rounds(rng: np.random.Generator, level: float = 0.02, count: int = 10, runs: int = 20) -> list[list[float]]:
    """Timings of ``level`` seconds as machines give them: each round has its own pace, runs have a one-sided tail."""
    paces = level * np.exp(0.02 * rng.standard_normal(count))
    return [[float(t) for t in pace * (1 + 0.03 * rng.exponential(size=runs))] for pace in paces]


def starts(rng: np.random.Generator, level: float = 0.5, count: int = 5) -> list[Start]:
    """Starts of ``level`` seconds that scatter by 3 %, and memory that scatters by 0.5 %."""
    times = level * np.exp(0.03 * rng.standard_normal(count))
    sizes = 2e8 * np.exp(0.005 * rng.standard_normal(count))
    return [Start(float(t) / 2, float(t), int(size), 10**7) for t, size in zip(times, sizes, strict=True)]


def artifact(rng: np.random.Generator, level: float = 0.02, label: str = "clip", **changes: Any) -> Result:
    """An artifact that takes ``level`` seconds."""
    given = {"size_bytes": 10**6, "rounds": rounds(rng, level), "starts": starts(rng), **changes}
    return Result(label, "mmopt", "0.1.0", source=f"{label}.mmopt", **given)


def peer(rng: np.random.Generator, level: float = 0.03, **changes: Any) -> Result:
    """An onnxruntime that takes ``level`` seconds."""
    given = {"digest": "a" * 16, "rounds": rounds(rng, level), "starts": starts(rng), **changes}
    return Result("onnxruntime", "onnxruntime", "1.20.0", source="clip.onnx", **given)


def report(*results: Result, machine: dict[str, Any] | None = None, **settings: Any) -> Report:
    """A report of ``results``, on the usual machine unless facts are given."""
    return Report({**MACHINE, **(machine or {})}, {**SETTINGS, **settings}, list(results))
