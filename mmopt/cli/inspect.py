"""``mmopt inspect``: what is in a model or an artifact."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from mmopt.cli.output import JsonFile, Output, Quiet, Verbose
from mmopt.errors import UserError
from mmopt.runtime.store import is_artifact

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def inspect(
    what: Annotated[str, typer.Argument(metavar="MODEL|ARTIFACT", help="What to look at.")],
    target: Annotated[str, typer.Option(metavar="NAME|FILE.toml", help="Hardware to ask about.")] = "cpu",
    shape: Annotated[
        list[str] | None, typer.Option(metavar="NAME:1x128", help="Shape of an input, for figures that depend on it.")
    ] = None,
    modality: Annotated[list[str] | None, typer.Option(metavar="NAME=image", help="Say what an input is.")] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Of an artifact: every kernel, its parameters and its speed here.")
    ] = False,
    inputs: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="FILE.npz", help="What --kernels runs on. Default: made from the model."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads --kernels runs with. Default: one per core.")
    ] = None,
    why: Annotated[
        str | None,
        typer.Option(metavar="NODE|PATTERN", help="Of a model: what passes did there, or what stopped them."),
    ] = None,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Allow .pt2 and module:function.")] = False,
    json: JsonFile = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Show towers, parameters and FLOPs, operators, and what runs natively and what does not, with the reason."""
    show = Output(verbose, quiet, json)
    path = pathlib.Path(what)
    artifact = path.is_dir() or what.endswith((".mmopt", ".zip")) or is_artifact(path)
    if artifact and kernels:
        from mmopt.cli.inspecting_kernels import inspect_kernels

        inspect_kernels(path, show, inputs=inputs, shapes=tuple(shape or ()), threads=threads)
        return
    if kernels:
        raise UserError(f"{what} is not an artifact", where="--kernels", hint="compile it first: mmopt optimize MODEL")
    if why is not None:
        _explain(what, why, artifact, target, tuple(shape or ()), tuple(modality or ()), trust_code, show)
        return
    if artifact:
        from mmopt.cli.inspecting_artifact import inspect_artifact

        inspect_artifact(path, show)
        return
    from mmopt.cli.inspecting_model import inspect_model

    inspect_model(what, target, tuple(shape or ()), tuple(modality or ()), trust_code, show)


def _explain(
    what: str,
    why: str,
    artifact: bool,
    target: str,
    shapes: tuple[str, ...],
    modalities: tuple[str, ...],
    trust_code: bool,
    show: Output,
) -> None:
    from mmopt.cli.inspecting_why import inspect_why

    if artifact:
        raise UserError(f"{what} is an artifact", where="--why", hint="ask about the model that it was made from")
    inspect_why(what, why, target, shapes, modalities, trust_code, show)
