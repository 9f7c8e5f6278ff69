"""``mmopt optimize``: load, optimize, compile, verify."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from mmopt.cli.output import JsonFile, Output, Quiet, Verbose
from mmopt.errors import UserError, did_you_mean

app = typer.Typer(rich_markup_mode=None, add_completion=False)

EMIT = ("artifact", "onnx")


@app.command()
def optimize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=".onnx, .pt2, or package.module:function.")],
    output: Annotated[
        pathlib.Path | None,
        typer.Option(
            "-o", "--output", metavar="OUT", help="Folder, .zip or .onnx to write. Default: MODEL.mmopt here."
        ),
    ] = None,
    target: Annotated[str | None, typer.Option(metavar="NAME|FILE.toml", help="Hardware; see `mmopt targets`.")] = None,
    multi_isa: Annotated[
        bool,
        typer.Option(
            "--multi-isa",
            help="Compile for older instruction sets, or GPUs, too; loading picks.",
        ),
    ] = False,
    level: Annotated[
        int, typer.Option("-O", "--level", min=0, max=3, help="0 correct only, 1 exact rewrites, 2 rounding, 3 tuned.")
    ] = 2,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME|FILE.toml", help="Pipeline instead of the level's.")
    ] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option("--pass", metavar="NAME{OPTION=VALUE}", help="Further pass; also module:Class or file.py:Class."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="fp32|bf16|fp16|int8", help="Format of weights and of what products, convolutions, … read."
        ),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(metavar="FILE.npz|DIR|random", help="Calibration samples; the leading axis counts."),
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            metavar="full|hierarchical|mixed[=SHARE|Nbits|metrics]",
            help="Quantize layer by layer; SHARE: bytes of weights that mixed may keep, of those in fp32; "
            "metrics: as small as --metrics allow.",
        ),
    ] = None,
    recover: Annotated[
        bool,
        typer.Option(
            "--recover", help="Reconstruct what --quant or int8 lost, layer by layer, on the samples of --calib."
        ),
    ] = False,
    prune: Annotated[
        str | None,
        typer.Option(
            metavar="40%|towers.NAME=30%,…",
            help="Cut units until so much less is computed; repaired with --calib. By tower as well.",
        ),
    ] = None,
    prune_to: Annotated[
        str | None,
        typer.Option(metavar="1.6x", help="Cut units until the model is so many times faster, measured here."),
    ] = None,
    evaluator: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="MODULE:FUNCTION",
            help="Function that gets the model as a function and returns metrics; needs --trust-code.",
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=-0.003|+2%|0.95..|..0.3",
            help="Limit of a metric: how far it may fall or rise, or its bounds. Exit code 6 when missed.",
        ),
    ] = None,
    inputs: Annotated[
        list[pathlib.Path] | None,
        typer.Option(metavar="FILE.npz", help="Inputs to validate and measure on. Default: made from the model."),
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="NAME:1x3x224x224", help="Fix the shape of an input.")
    ] = None,
    modality: Annotated[list[str] | None, typer.Option(metavar="NAME=image", help="Say what an input is.")] = None,
    validate: Annotated[
        str | None, typer.Option(metavar="each|end|off", help="When passes are checked by running the model.")
    ] = None,
    strict: Annotated[bool | None, typer.Option("--strict", help="A pass that fails its check is an error.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0.0, help="Error allowed to the artifact, of an output's range.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Cores to use. Default: all.")] = None,
    tune_minutes: Annotated[
        float | None, typer.Option(metavar="M", help="Time -O3 spends on measuring kernels. Default: 5.")
    ] = None,
    tune_trials: Annotated[
        int | None, typer.Option(metavar="N", help="Candidates -O3 measures at most. Default: no limit.")
    ] = None,
    database: Annotated[
        pathlib.Path | None, typer.Option(metavar="FILE", help="Where -O3 keeps what it measures; see `mmopt tune`.")
    ] = None,
    emit: Annotated[str | None, typer.Option(metavar="artifact|onnx", help="What to write.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")] = False,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Write the result even when it does not agree with the model.")
    ] = False,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Allow .pt2 and module:function.")] = False,
    dump_dir: Annotated[
        pathlib.Path | None, typer.Option(metavar="DIR", help="Write the model as text after every pass.")
    ] = None,
    json: JsonFile = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Optimize a model and compile it to a verified artifact."""
    show = Output(verbose, quiet, json)
    if emit is not None and emit not in EMIT:
        raise UserError(f"nothing called {emit!r} can be written", where="--emit", hint=did_you_mean(emit, EMIT))
    from mmopt.cli.optimizing import Job
    from mmopt.cli.pruning import pruning, speedup
    from mmopt.cli.quantizing import quantization
    from mmopt.cli.request import Request, tuning_options

    if prune is not None and prune_to is not None:
        raise UserError("how much to cut is given twice", where="--prune, --prune-to", hint="give one of them")
    Job(
        Request(
            model=model,
            output=output,
            target=target,
            multi_isa=multi_isa,
            level=level,
            recipe=recipe,
            passes=(
                *pruning(prune, repair=calib is not None),
                *(passes or ()),
                *quantization(quant, precision, recover=recover),
            ),
            prune_to=None if prune_to is None else speedup(prune_to),
            precision=precision,
            calib=calib,
            evaluator=evaluator,
            metrics=tuple(metrics or ()),
            inputs=tuple(inputs or ()),
            shapes=tuple(shape or ()),
            modalities=tuple(modality or ()),
            validate=validate,
            strict=strict,
            tolerance=tolerance,
            seed=seed,
            jobs=jobs,
            tuning=tuning_options(level, tune_minutes, tune_trials, database, jobs),
            emit=emit,
            allow_mismatch=allow_mismatch,
            trust_code=trust_code,
            dump_dir=dump_dir,
        ),
        show,
    ).run(dry=dry_run)
