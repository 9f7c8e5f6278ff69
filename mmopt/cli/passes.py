"""``mmopt passes``: what passes there are, with their options."""

from __future__ import annotations

from typing import Annotated

import typer

from mmopt.cli.output import JsonFile, Output, Quiet, Verbose, table
from mmopt.errors import UserError, did_you_mean

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def passes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this one, with its options.")] = None,
    json: JsonFile = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """List passes, built in and from installed packages, and the recipes that use them."""
    from mmopt.pipeline.recipe import recipe_names
    from mmopt.pipeline.registry import all_passes

    show = Output(verbose, quiet, json)
    known = all_passes()
    if name is not None and name not in known:
        raise UserError(f"there is no pass {name!r}", hint=did_you_mean(name, known))
    chosen = [info for key, info in known.items() if name in (None, key)]
    rows = [(info.name, info.family or info.source, info.fidelity, info.doc) for info in chosen]
    show.result(table(("pass", "family", "fidelity", "what it does"), rows))
    options = [
        (info.name, option.name, option.type, "required" if option.default is None else option.default, option.doc)
        for info in chosen
        for option in info.options
    ]
    if options:
        show.result("")
        show.result(table(("pass", "option", "type", "default", "what it does"), options))
    recipes = recipe_names()
    if name is None:
        show.result("")
        show.result(table(("recipe", "what it runs"), list(recipes.items())))
    show.json({"passes": [info.to_dict() for info in chosen], "recipes": recipes})
