"""Times of kernels as measured, and by them times of kernels that were not measured.

Templates predict which of two sizes is faster better than how fast it is: caches, threads and short loops take their
part. So a kernel takes what its template predicts, times what was measured over what was predicted of the kernels most
like it: of the same template, operands and number formats, the nearest sizes counting most. What is between kernels
(the caller, memory, threads that wait for each other) is a constant and a share of what the kernels take, as measured.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mmopt.backends.profile import Profile
from mmopt.ir.module import Module
from mmopt.lowering.prediction import kernels_of
from mmopt.runtime.profiling import ModelTime, time_kernels
from mmopt.runtime.session import Session

Record = Mapping[str, Any]
"""What a program or a manifest says about one kernel."""

_DIM = re.compile(r"(\w+)=([\w?.\-]+)")

_CALL, _BYTE = 1000.0, 0.1
"""Cycles of a kernel for its call, and, where its template predicts nothing, for each byte that it reads or writes.

Templates predict what a kernel computes. The call, and handing work out to threads, does not shrink with it.
"""

_CALLING = 15e-6
"""Seconds for calling a model, as long as one alone does not tell them from what grows with its kernels."""

_NEAR = 0.02
"""Squared distance, in powers of two, below which sizes count as equally near."""

_LANES = 16
_CHANNELS = ("c", "o", "n", "k", "hidden")
_RAGGED, _TILED, _OTHER = 8.0, 2.0, 100.0
"""Squared distances besides: of an extent that fills its vectors from one that does not, of tiles of other widths, and
of kernels that work on something else."""


@dataclasses.dataclass(frozen=True)
class _Likeness:
    """What tells how alike two kernels are.

    Attributes:
        template: The template.
        kind: What is no size: operands' forms and number formats, extents known only at run time.
        sizes: Logarithms of extents by name.
        ragged: Names of extents that leave vectors part empty.
        vectors: Width of the register tile in vectors; 0 where there is none.
    """

    template: str
    kind: tuple[str, ...]
    sizes: Mapping[str, float]
    ragged: frozenset[str]
    vectors: int

    @classmethod
    def of(cls, record: Record) -> _Likeness:
        workload = str(record.get("workload", ""))
        dims = dict(_DIM.findall(workload))
        sizes = {name: math.log2(1 + int(text)) for name, text in dims.items() if text.isdigit()}
        if not workload and (moved := _moved(record)):
            sizes = {"bytes": math.log2(1 + moved)}
        kind = [f"{name}={text}" for name, text in dims.items() if not text.isdigit()]
        ragged = {name for name in _CHANNELS if dims.get(name, "?").isdigit() and int(dims[name]) % _LANES}
        vectors = int(record.get("choice", {}).get("vectors", 0))
        formats = workload.rpartition(":")[2]
        return cls(str(record["template"]), (*kind, formats), sizes, frozenset(ragged), vectors)

    def distance(self, other: _Likeness) -> float:
        """Squared distance of sizes; large where they are not of the same kind."""
        names = self.sizes.keys() | other.sizes.keys()
        apart = sum((self.sizes.get(name, 0.0) - other.sizes.get(name, 0.0)) ** 2 for name in names)
        apart += _RAGGED * len(self.ragged ^ other.ragged) + _TILED * (self.vectors != other.vectors)
        return apart + _OTHER * (self.kind != other.kind)


_WARM, _SECONDS = 0.1, 0.2
_LEAST_RUNS, _MOST_RUNS = 20, 1000
"""How long a model runs before it is observed, and for how long and how often it is: a short one, just loaded, may seem
to take half as long again in twenty runs as it does."""


class TimeTable:
    """What kernels take, learned from runs of models."""

    def __init__(self) -> None:
        self._known: list[tuple[_Likeness, float]] = []
        self._runs: list[tuple[float, float]] = []

    def between(self, seconds: float) -> float:
        """Seconds of a run that are not spent in kernels: a constant, and a share of what its kernels take.

        The constant is for calling; the share for waiting at the ends of kernels and for memory, both of which grow
        with them. They are fitted to the models that were measured, neither being below 0.

        Args:
            seconds: What the kernels take.
        """
        if not self._runs:
            return 0.0
        constant, share = _line(self._runs)
        return constant + share * seconds

    def learn(self, kernels: Iterable[Record], measured: ModelTime) -> None:
        """Take the times of one model in.

        Args:
            kernels: Records of its kernels.
            measured: Their times.
        """
        times = {kernel.name: kernel for kernel in measured.kernels}
        for record in kernels:
            found = times.get(str(record["name"]))
            if found is not None and found.seconds > 0:
                each = found.seconds / found.calls
                self._known.append((_Likeness.of(record), math.log(each / _cycles(record))))
        spent = sum(kernel.seconds for kernel in measured.kernels)
        self._runs.append((spent, max(0.0, measured.seconds - spent)))

    def observe(self, session: Session, inputs: Mapping[str, Any]) -> ModelTime:
        """Measure the kernels of a loaded artifact and take them in; see :func:`mmopt.runtime.profiling.time_kernels`.

        Args:
            session: What to run.
            inputs: On what.
        """
        measured = time_kernels(session, inputs, runs=_runs(session, inputs))
        self.learn(session.manifest.kernels, measured)
        return measured

    def seconds(self, kernels: Iterable[Record]) -> float:
        """The time of one run of a model with these kernels."""
        spent = sum(self._seconds_of(record) * int(record["calls"]) for record in kernels)
        return spent + self.between(spent)

    def predict(self, module: Module, profile: Profile) -> float:
        """The time of one run of a module, in seconds, without generating code for it.

        Args:
            module: The module, as it would be compiled.
            profile: What it would be compiled for: what was learned from ran on it.

        Raises:
            UnsupportedError: A node runs neither natively nor in onnxruntime.
        """
        return self.seconds(kernels_of(module, profile))

    def _seconds_of(self, record: Record) -> float:
        known = _Likeness.of(record)
        alike = [(other, ratio) for other, ratio in self._known if other.template == known.template] or self._known
        if not alike:
            return 0.0
        weights = [1 / (_NEAR + known.distance(other)) for other, _ in alike]
        mean = sum(weight * ratio for weight, (_, ratio) in zip(weights, alike, strict=True)) / sum(weights)
        return _cycles(record) * math.exp(mean)


def _runs(session: Session, inputs: Mapping[str, Any]) -> int:
    """How many runs make :data:`_SECONDS`, after some that bring clock rate, threads and caches to where they stay."""
    count, begun = 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < _WARM or not count:
        session.run(inputs)
        count += 1
    return int(min(_MOST_RUNS, max(_LEAST_RUNS, _SECONDS * count / spent)))


def _cycles(record: Record) -> float:
    """Cycles of a call, and as the template predicts them, or as the data that is moved suggests."""
    return _CALL + (float(record.get("cycles", 0.0)) or _BYTE * _moved(record))


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Constant and slope, neither below 0, of the line nearest to points (x, y)."""
    x, y = (np.array(column) for column in zip(*points, strict=True))
    if np.ptp(x) <= 1e-6 * x.max():
        constant = min(float(y.mean()), _CALLING)
        return constant, (float(y.mean()) - constant) / max(float(x.mean()), 1e-12)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    constant = float(y.mean() - slope * x.mean())
    if slope < 0:
        return float(y.mean()), 0.0
    return (constant, slope) if constant >= 0 else (0.0, float((x * y).sum() / (x * x).sum()))


def _moved(record: Record) -> int:
    """Bytes that a kernel reads and writes; with plausible sizes where they are known only at run time."""
    return int(record.get("bytes") or record.get("plausible_bytes") or 0)


def within(predicted: Sequence[float], measured: Sequence[float], part: float) -> float:
    """The share of predictions that are at most ``part`` off what was measured."""
    off = [abs(guess / real - 1) for guess, real in zip(predicted, measured, strict=True)]
    return sum(one <= part for one in off) / max(1, len(off))
