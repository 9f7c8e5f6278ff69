"""Whether two models or artifacts compute the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmopt.errors import UserError, VerifyError, did_you_mean
from mmopt.ir.evaluate import ReferenceRunner, is_random
from mmopt.ir.module import Module
from mmopt.loading import Shapes, symbol_sizes
from mmopt.pipeline.base import Fidelity
from mmopt.pipeline.validation import (
    OutputComparison,
    Tolerance,
    compare_outputs,
    tolerance_for,
    working_precision,
    worst,
)
from mmopt.runnable import Inputs, Runnable

_PROBES = 2
_COARSEST = ("float64", "float32", "float16", "bfloat16", "8-bit", "4-bit")


@dataclasses.dataclass(frozen=True)
class Verification:
    """How two runnables agree.

    Attributes:
        actual: What was checked.
        reference: What it was checked against.
        outputs: The worst comparison of each output over all sets of inputs, by name.
        inputs_from: ``given`` or ``probes``.
        sets: Sets of inputs.
        precision: The coarsest number format either of them computes in, from which the tolerance follows.
        notes: What a reader must know.
    """

    actual: str
    reference: str
    outputs: dict[str, OutputComparison]
    inputs_from: str
    sets: int
    precision: str = "float32"
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all outputs agree."""
        return all(output.ok for output in self.outputs.values())

    @property
    def max_relative_error(self) -> float:
        """Largest error of any output, as a fraction of that output's range."""
        return max((output.relative_error for output in self.outputs.values()), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, with ``schema_version``."""
        return {
            "schema_version": 1,
            "ok": self.ok,
            "actual": self.actual,
            "reference": self.reference,
            "inputs": self.inputs_from,
            "sets": self.sets,
            "precision": self.precision,
            "max_relative_error": self.max_relative_error if math.isfinite(self.max_relative_error) else None,
            "outputs": {name: output.to_dict() for name, output in self.outputs.items()},
            "notes": list(self.notes),
        }

    def check(self) -> None:
        """Raise :class:`VerifyError` unless everything agrees."""
        bad = [output for output in self.outputs.values() if not output.ok]
        if bad:
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise VerifyError(
                f"output {bad[0].name!r} of {self.actual} disagrees with {self.reference}: {bad[0].reason}{more}"
            )


def compare_runnables(
    actual: Runnable,
    reference: Runnable,
    *,
    inputs: Inputs | Sequence[Inputs] | None = None,
    seed: int = 0,
    tolerance: float | None = None,
    shapes: Shapes | None = None,
) -> Verification:
    """Run both on the same inputs and compare every output.

    Args:
        actual: What is checked.
        reference: What is right.
        inputs: One set of inputs or several; probes are made from the model when None.
        seed: Seed of the probes.
        tolerance: Largest error as a fraction of an output's range; by default it follows from the coarsest number
            format either of them computes in.
        shapes: Shapes of probes, by input name.

    Raises:
        UserError: The two do not take the same inputs or give the same outputs, or no inputs can be made up.
    """
    _check_names(actual, reference)
    modules = [module for module in (reference.module(), actual.module()) if module is not None]
    notes: list[str] = []
    batches = [inputs] if isinstance(inputs, Mapping) else inputs
    if batches is None:
        batches = _probes(modules, seed, shapes or {})
    precision = _coarsest(modules)
    bound = _tolerance(precision, tolerance)
    if any(is_random(module) for module in modules):
        notes.append("the model draws random numbers: only shapes and dtypes were compared")
        bound = dataclasses.replace(bound, relative=math.inf)
    found: dict[str, list[OutputComparison]] = {}
    for expected, got in zip(reference.run_all(batches), actual.run_all(batches), strict=True):
        for comparison in compare_outputs(expected, got, bound):
            found.setdefault(comparison.name, []).append(comparison)
    return Verification(
        actual=actual.label,
        reference=reference.label,
        outputs={name: output for name, group in found.items() if (output := worst(group)) is not None},
        inputs_from="probes" if inputs is None else "given",
        sets=len(batches),
        precision=precision,
        notes=tuple(notes),
    )


def _check_names(actual: Runnable, reference: Runnable) -> None:
    for kind in ("inputs", "outputs"):
        mine = [spec.name for spec in getattr(actual, kind)]
        theirs = [spec.name for spec in getattr(reference, kind)]
        for name in [*mine, *theirs]:
            if name not in mine or name not in theirs:
                other, names = (actual, mine) if name not in mine else (reference, theirs)
                raise UserError(f"has no {kind[:-1]} {name!r}", where=other.label, hint=did_you_mean(name, names))


def _probes(modules: Sequence[Module], seed: int, shapes: Shapes) -> Sequence[Inputs]:
    if not modules:
        raise UserError("neither side holds a model from which inputs could be made", hint="give --inputs FILE.npz")
    from mmopt.analysis.probes import probe_inputs

    with ReferenceRunner(seed=seed) as runner:
        return probe_inputs(
            modules[0],
            seeds=range(seed, seed + _PROBES),
            sizes=symbol_sizes(modules[0], shapes),
            runner=runner,
        )


def _coarsest(modules: Sequence[Module]) -> str:
    return max((working_precision(module) for module in modules), key=_COARSEST.index, default="float32")


def _tolerance(precision: str, relative: float | None) -> Tolerance:
    bound = tolerance_for(Fidelity.ROUNDING, precision)
    return bound if relative is None else dataclasses.replace(bound, relative=relative)
