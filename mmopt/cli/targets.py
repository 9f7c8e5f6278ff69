"""``mmopt targets``: what hardware can be compiled for."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from mmopt.cli.output import JsonFile, Output, Quiet, Verbose, table
from mmopt.errors import UnsupportedError
from mmopt.runtime.cpu import check_target

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def targets(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME|FILE.toml]", help="Only this one, with everything it says.")
    ] = None,
    json: JsonFile = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """List target profiles. `cpu` is the machine this runs on; your own hardware is a TOML file."""
    from mmopt.backends.profile import load_profile, profile_names

    show = Output(verbose, quiet, json)
    found = {key: load_profile(key) for key in ([name] if name else profile_names())}
    data = [
        {"target": key, **dataclasses.asdict(profile), "runs_here": _runs_here(profile)}
        for key, profile in found.items()
    ]
    if name:
        show.result(table(("key", "value"), [(key, _text(value)) for key, value in data[0].items()]))
    else:
        columns = ("target", "kind", "mcpu", "cores", "features", "runs_here")
        rows = [[_text(row[column]) for column in columns] for row in data]
        show.result(table(("target", "kind", "cpu", "cores", "needs", "runs here"), rows))
    show.json({"targets": data})


def _runs_here(profile: Any) -> bool:
    try:
        check_target(profile.to_dict(), where=profile.name)
    except UnsupportedError:
        return False
    return True


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
