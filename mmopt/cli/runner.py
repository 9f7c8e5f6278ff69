"""``mmopt runner``: the program that runs artifacts on a machine without Python."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from mmopt.cli.output import JsonFile, Output, Quiet, Verbose

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def runner(
    output: Annotated[pathlib.Path, typer.Option("--output", "-o", help="Folder to put the program into.")],
    target: Annotated[
        str, typer.Option("--target", "-t", help="What it has to run on, as for `mmopt optimize`.")
    ] = "cpu",
    json: JsonFile = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Build `mmopt-run`, which runs artifacts where there is no Python, and put the libraries it needs beside it."""
    from mmopt.backends.profile import load_profile
    from mmopt.backends.runner import build_runner

    show = Output(verbose, quiet, json)
    profile = load_profile(target)
    program = build_runner(profile, output)
    files = sorted(path for path in output.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    show.result(f"written: {program}, {size / 1e6:.1f} MB with its libraries")
    show.json({"program": str(program), "target": profile.name, "files": list(map(str, files)), "size": size})
