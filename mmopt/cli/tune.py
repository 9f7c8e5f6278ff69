"""``mmopt tune``: measure the candidates of a model's kernels."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from mmopt.cli.output import JsonFile, Output, Quiet, Verbose
from mmopt.errors import UserError

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def tune(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help=".onnx, .pt2, or package.module:function.")
    ] = None,
    target: Annotated[str | None, typer.Option(metavar="NAME|FILE.toml", help="Hardware; see `mmopt targets`.")] = None,
    recipe: Annotated[str | None, typer.Option(metavar="NAME|FILE.toml", help="Pipeline of the model.")] = None,
    passes: Annotated[
        list[str] | None, typer.Option("--pass", metavar="NAME{OPTION=VALUE}", help="Further pass, as for optimize.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="fp32|bf16|fp16|int8", help="Number format, as for optimize.")
    ] = None,
    calib: Annotated[
        str | None, typer.Option(metavar="FILE.npz|DIR|random", help="Calibration samples, as for optimize.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="NAME:1x3x224x224", help="Fix the shape of an input.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(metavar="M", help="Stop after M minutes. Default: 5.")] = None,
    trials: Annotated[int | None, typer.Option(metavar="N", help="Stop after N candidates. Default: no limit.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Kernels compiled at the same time. Default: one per core.")
    ] = None,
    database: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="FILE", help="Where results are kept. Default: in the user's cache folder."),
    ] = None,
    export: Annotated[
        pathlib.Path | None,
        typer.Option("--export", metavar="DIR", help="Compile only, into a folder that measures itself elsewhere."),
    ] = None,
    results: Annotated[
        pathlib.Path | None,
        typer.Option("--import", metavar="DIR|FILE", help="Take over what an exported folder has measured."),
    ] = None,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Allow .pt2 and module:function.")] = False,
    json: JsonFile = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Measure the candidates of a model's kernels, into a database that `mmopt optimize -O3` uses. Can be resumed."""
    show = Output(verbose, quiet, json)
    from mmopt.cli.tuning import Request, export_candidates, import_measured, search

    if results is not None:
        _alone(model is None and export is None)
        import_measured(results, database, target, show)
        return
    if model is None:
        raise UserError("which model?", hint="mmopt tune MODEL, or mmopt tune --import DIR")
    request = Request(
        model, target or "cpu", recipe, tuple(passes or ()), precision, calib, tuple(shape or ()), jobs, trust_code
    )
    if export is not None:
        if minutes is not None:
            raise UserError("exporting has no time limit", where="--minutes", hint="use --trials")
        export_candidates(request, export, trials, show)
    else:
        search(request, minutes, trials, database, show)


def _alone(alone: bool) -> None:
    if not alone:
        raise UserError("results are imported without a model", where="--import", hint="mmopt tune --import DIR|FILE")
