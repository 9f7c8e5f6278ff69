"""What ``mmopt distill`` does."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from mmopt.api import load
from mmopt.cli.optimizing import write_onnx
from mmopt.cli.output import Output, size_text, table
from mmopt.errors import UserError
from mmopt.loading import load_samples
from mmopt.runtime import atomic
from mmopt.training import Distillation, DistillResult
from mmopt.training import distill as train


@dataclasses.dataclass(frozen=True)
class Request:
    """One ``mmopt distill``."""

    student: str
    teacher: str
    data: pathlib.Path
    output: pathlib.Path | None
    labels: str | None
    settings: Distillation
    checkpoint: pathlib.Path | None
    resume: bool
    trust_code: bool


def run(request: Request, show: Output) -> None:
    """Load, train, write."""
    from mmopt.training.requirement import require_torch

    require_torch("distillation")
    request.settings.check()
    output = _output(request)
    checkpoint = request.checkpoint or output.with_name(f"{output.name}.checkpoint")
    atomic.check_parent(checkpoint.resolve())
    student, teacher = (load(name, trust_code=request.trust_code) for name in (request.student, request.teacher))
    extra = [request.labels] if request.labels else []
    samples = load_samples(request.data, student, extra=extra)
    labels = samples.pop(request.labels) if request.labels else None
    try:
        with show.steps("distill") as steps:
            result = train(
                student,
                teacher,
                samples,
                labels=labels,
                settings=request.settings,
                checkpoint=checkpoint,
                resume=request.resume,
                progress=lambda done, total, text: steps.at(done - 1, total, text),
            )
    except KeyboardInterrupt:
        if checkpoint.is_file():
            show.say(f"the state is in {checkpoint}; the same command with --resume goes on from there")
        raise
    size = write_onnx(result.module, output)
    checkpoint.unlink(missing_ok=True)
    _tell(result, output, size, show)


def _output(request: Request) -> pathlib.Path:
    """Where to write, after making sure that it is possible."""
    stem = pathlib.Path(request.student.rpartition(":")[2]).name.removesuffix(".onnx").removesuffix(".pt2")
    output = (request.output or pathlib.Path(f"{stem}.distilled.onnx")).expanduser().resolve()
    if output.suffix != ".onnx":
        raise UserError(
            "what is trained is written as .onnx", where=str(output), hint="then mmopt optimize compiles it"
        )
    atomic.check_parent(output)
    if output.is_dir():
        raise UserError("is a folder", where=str(output), hint="give the name of the .onnx file to write")
    for model in (request.student, request.teacher):
        if output.exists() and pathlib.Path(model).exists() and output.samefile(model):
            raise UserError("a model would be overwritten by the result", where=str(output), hint="choose another -o")
    return output


def _tell(result: DistillResult, output: pathlib.Path, size: int, show: Output) -> None:
    before, best = result.before, result.best
    rows = [(name, f"{before.parts[name]:.4g}", f"{best.parts[name]:.4g}") for name in before.parts]
    rows.append(("whole loss", f"{before.loss:.4g}", f"{best.loss:.4g}"))
    show.result(table(("on held-out samples", "before", "after"), rows))
    taught, held = result.samples
    passes = "in batches" if result.stacked else "sample by sample, as the batch of the model is fixed"
    show.result(
        f"{result.steps} steps on {taught} samples {passes}, {held} held out, until {result.stopped}; "
        f"the best was after step {best.step}"
    )
    if best.step == 0:
        show.warn("training found nothing better on the held-out samples: the weights are those of the student")
    show.result(f"written: {output} ({size_text(size)})")
    show.json(_to_dict(result, output))


def _to_dict(result: DistillResult, output: pathlib.Path) -> dict[str, Any]:
    return {
        "file": str(output),
        "before": dataclasses.asdict(result.before),
        "best": dataclasses.asdict(result.best),
        "history": [dataclasses.asdict(one) for one in result.history],
        "steps": result.steps,
        "stopped": result.stopped,
        "trained": list(result.trained),
        "samples": {"taught": result.samples[0], "held_out": result.samples[1]},
        "batched": result.stacked,
    }
