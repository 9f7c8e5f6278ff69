"""``mmopt verify``: numerical agreement of two models or artifacts."""

from __future__ import annotations

import pathlib
from typing import Annotated, Any

import typer

from mmopt.cli.arrays import read_arrays
from mmopt.cli.output import JsonFile, Output, Quiet, Verbose, table
from mmopt.errors import UserError

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def verify(
    actual: Annotated[str, typer.Argument(metavar="A", help="What is checked: an artifact or a model.")],
    reference: Annotated[str, typer.Argument(metavar="B", help="What is right: an artifact or a model.")],
    inputs: Annotated[
        list[pathlib.Path] | None,
        typer.Option(
            metavar="FILE.npz", help="Inputs by name; may be given several times. Default: made from the model."
        ),
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="NAME:1x128", help="Shape of an input that is made from the model.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0.0, help="Largest error, of an output's range. Default: by the coarsest number format."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default one per core.")] = None,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Allow .pt2 and module:function.")] = False,
    json: JsonFile = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Compare every output of A with B on the same inputs. Exit 5 when they disagree."""
    from mmopt.loading import parse_shapes
    from mmopt.runnable import as_runnable
    from mmopt.verification import compare_runnables

    show = Output(verbose, quiet, json)
    if inputs and shape:
        raise UserError("the inputs have shapes of their own", where="--shape", hint="leave out --shape or --inputs")
    shapes = parse_shapes(shape or [])
    first = as_runnable(actual, threads=threads, seed=seed, trust_code=trust_code)
    second = as_runnable(reference, threads=threads, seed=seed, trust_code=trust_code)
    batches = [read_arrays(path, second.inputs) for path in inputs] if inputs else None
    found = compare_runnables(first, second, inputs=batches, seed=seed, tolerance=tolerance, shapes=shapes)
    show.result(comparison_table(found))
    for note in found.notes:
        show.say(note)
    verdict = "agree" if found.ok else "DISAGREE"
    show.result(
        f"{verdict}: largest error {found.max_relative_error:.2g} of an output's range in {found.precision}, "
        f"{found.sets} sets of inputs"
    )
    show.json(found.to_dict())
    found.check()


def comparison_table(found: Any) -> Any:
    """One row an output."""
    rows = [
        (
            output.name,
            output.dtype,
            "x".join(map(str, output.shape)) or "scalar",
            f"{output.max_abs_error:.3g}",
            f"{output.relative_error:.3g}",
            f"{output.tolerance:.3g}",
            "ok" if output.ok else output.reason,
        )
        for output in found.outputs.values()
    ]
    return table(("output", "dtype", "shape", "max error", "of range", "allowed", ""), rows)
