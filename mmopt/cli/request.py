"""The options of ``mmopt optimize``, and what they stand for."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from mmopt.api import Tuning
from mmopt.errors import UserError
from mmopt.evaluation import Evaluation, load_evaluation
from mmopt.ir.module import Module
from mmopt.loading import load_samples
from mmopt.pipeline.recipe import PORTABLE
from mmopt.runtime import atomic
from mmopt.runtime.writer import check_output


@dataclasses.dataclass(frozen=True)
class Request:
    """The options of one ``mmopt optimize``, as given."""

    model: str
    output: pathlib.Path | None
    target: str | None
    level: int
    recipe: str | None
    passes: tuple[str, ...]
    prune_to: float | None
    precision: str | None
    calib: str | None
    inputs: tuple[pathlib.Path, ...]
    shapes: tuple[str, ...]
    modalities: tuple[str, ...]
    validate: str | None
    strict: bool | None
    tolerance: float | None
    seed: int | None
    jobs: int | None
    tuning: Tuning | None
    emit: str | None
    allow_mismatch: bool
    trust_code: bool
    dump_dir: pathlib.Path | None
    evaluator: str | None = None
    metrics: tuple[str, ...] = ()
    multi_isa: bool = False


def tuning_options(
    level: int, minutes: float | None, trials: int | None, database: pathlib.Path | None, jobs: int | None
) -> Tuning | None:
    """How -O3 tunes; None at other levels.

    Raises:
        UserError: A limit makes no sense, or is given at another level.
    """
    if level < 3:
        given = {"--tune-minutes": minutes, "--tune-trials": trials, "--database": database}
        for name, value in given.items():
            if value is not None:
                raise UserError("only -O3 tunes", where=name, hint="add -O3")
        return None
    options = Tuning(Tuning.minutes if minutes is None and trials is None else minutes, trials, database, jobs)
    _ = options.budget
    return options


def evaluation(evaluator: str | None, metrics: Sequence[str], *, trust_code: bool) -> Evaluation | None:
    """What ``--eval`` and ``--metrics`` stand for.

    Raises:
        UserError: Limits without an evaluator, or an evaluator that cannot be had.
    """
    if evaluator is not None:
        return load_evaluation(evaluator, metrics, trust_code=trust_code)
    if metrics:
        raise UserError("there is nothing that gives metrics", where="--metrics", hint="add --eval module:function")
    return None


def calibration_samples(calib: str | None, module: Module) -> dict[str, Any] | Literal["random"] | None:
    """What ``--calib`` stands for."""
    if calib is None:
        return None
    if calib == "random":
        return "random"
    return load_samples(pathlib.Path(calib), module)


def emitted(request: Request) -> str:
    named = "onnx" if request.output is not None and request.output.suffix == ".onnx" else "artifact"
    if request.emit == "artifact" and named == "onnx":
        raise UserError(
            "an artifact is a folder or a .zip", where="--output", hint="leave out --emit, or name it .mmopt"
        )
    return request.emit or named


def portable_recipe(request: Request) -> str | None:
    """The recipe for other runtimes, where nothing else is asked for and no integers or narrow floats are measured."""
    quantized = request.precision not in (None, "fp32") or any(name.startswith("quantize") for name in request.passes)
    return PORTABLE if emitted(request) == "onnx" and request.level >= 2 and not quantized else None


def output_path(request: Request, emit: str) -> pathlib.Path:
    """Where to write, after making sure that it is possible."""
    name = pathlib.Path(request.model.rpartition(":")[2]).name
    stem = name.removesuffix(".onnx").removesuffix(".pt2")
    output = request.output or pathlib.Path(f"{stem}.mmopt" if emit == "artifact" else f"{stem}.optimized.onnx")
    if emit == "artifact":
        return check_output(output)
    output = output.expanduser().resolve()
    atomic.check_parent(output)
    if output.is_dir():
        raise UserError("is a folder", where=str(output), hint="give the name of the .onnx file to write")
    if output.exists() and pathlib.Path(request.model).exists() and output.samefile(request.model):
        raise UserError("the model would be overwritten by its own result", where=str(output), hint="choose another -o")
    return output
