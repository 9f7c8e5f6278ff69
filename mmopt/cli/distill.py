"""``mmopt distill``: train one model to answer as another does."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from mmopt.cli.output import JsonFile, Output, Quiet, Verbose
from mmopt.errors import UserError

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def distill(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="What to train: a pruned or other .onnx, .pt2, ….")],
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="What is right: usually the original.")],
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE.npz|DIR", help="Samples by input name; the leading axis counts. No labels needed."),
    ] = None,
    output: Annotated[
        pathlib.Path | None,
        typer.Option("-o", "--output", metavar="OUT.onnx", help="File to write. Default: STUDENT.distilled.onnx here."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="NAME", help="Array in the samples that holds labels; integers are classes.")
    ] = None,
    labelled: Annotated[
        str | None, typer.Option(metavar="OUTPUT", help="Output that labels are about. Default: the first.")
    ] = None,
    outputs: Annotated[
        list[str] | None, typer.Option("--output-name", metavar="OUTPUT", help="Imitate these outputs only.")
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(metavar="OUTPUT", help="These outputs are logits: imitate shares, by divergence, not values."),
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(metavar="TOWER|none", help="Imitate the features of these towers. Default: of all that pair up."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Divides logits before they become shares.")] = 2.0,
    feature_weight: Annotated[
        float, typer.Option(min=0, help="Weight of features in the loss; of outputs it is 1.")
    ] = 0.5,
    task_weight: Annotated[float, typer.Option(min=0, help="Weight of labels in the loss.")] = 1.0,
    epochs: Annotated[float | None, typer.Option(metavar="N", help="Passes over the samples. Default: 3.")] = None,
    minutes: Annotated[float | None, typer.Option(metavar="M", help="Train for about so long.")] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Samples of a step.")] = 16,
    rate: Annotated[
        float, typer.Option(metavar="R", help="Largest step, as a part of each weight's size; falls along a cosine.")
    ] = 5e-3,
    freeze: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave weights with such names alone: 'encoder.*'.")
    ] = None,
    held_out: Annotated[float, typer.Option(metavar="PART", help="Part of the samples kept to judge by.")] = 0.1,
    patience: Annotated[int, typer.Option(min=0, help="Epochs without progress before it stops; 0: never.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the order of samples and what is held out.")] = 0,
    checkpoint: Annotated[
        pathlib.Path | None, typer.Option(metavar="FILE", help="State of the run. Default: OUT.onnx.checkpoint.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint, to the same bits.")] = False,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Allow .pt2 and module:function.")] = False,
    json: JsonFile = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Train STUDENT to answer as TEACHER does, on samples without labels; with labels, on these too.

    A part of the samples is held out; the weights that do best on it are written, and the student is never made worse.
    """
    show = Output(verbose, quiet, json)
    from mmopt.cli.distilling import Request, run
    from mmopt.training import Distillation

    if data is None:
        raise UserError("there are no samples", where="--data", hint="mmopt distill STUDENT TEACHER --data samples.npz")
    settings = Distillation(
        epochs=epochs,
        minutes=minutes,
        batch=batch,
        rate=rate,
        outputs=tuple(outputs) if outputs else None,
        features=None if not features else () if features == ["none"] else tuple(features),
        classes=tuple(classes or ()),
        temperature=temperature,
        labelled=labelled,
        feature_weight=feature_weight,
        task_weight=task_weight,
        freeze=tuple(freeze or ()),
        held_out=held_out,
        patience=patience,
        seed=seed,
    )
    run(Request(student, teacher, pathlib.Path(data), output, labels, settings, checkpoint, resume, trust_code), show)
