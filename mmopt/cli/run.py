"""``mmopt run``: an artifact or a model on inputs from a file."""

from __future__ import annotations

import pathlib
import time
from typing import Annotated, Any

import typer

from mmopt.cli.arrays import read_arrays, write_arrays
from mmopt.cli.output import JsonFile, Output, Quiet, Verbose, table, time_text
from mmopt.errors import UserError
from mmopt.runtime import atomic, load_artifact
from mmopt.runtime.session import check_inputs
from mmopt.runtime.store import is_artifact

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def run(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT|MODEL", help="What to run.")],
    inputs: Annotated[pathlib.Path, typer.Option(metavar="FILE.npz", help="Inputs by name.")],
    output: Annotated[pathlib.Path | None, typer.Option("-o", "--output", metavar="OUT.npz", help="Outputs.")] = None,
    entry: Annotated[str, typer.Option(metavar="NAME", help="Entry point of the artifact.")] = "main",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default one per core.")] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Bind each thread to a CPU of its own.")] = False,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Allow .pt2 and module:function.")] = False,
    json: JsonFile = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Run an artifact (or a model, in onnxruntime) once. Outputs are summarized, and written with -o."""
    show = Output(verbose, quiet, json)
    if output is not None:
        atomic.check_parent(output.resolve())
    begin = time.perf_counter()
    outputs = _run(artifact, inputs, entry, threads, pin, trust_code)
    seconds = time.perf_counter() - begin
    show.say(f"first answer after {time_text(seconds)}")
    rows = [row for name, value in outputs.items() for row in _rows(name, value)]
    show.result(table(("output", "dtype", "shape", "min", "max", "mean"), [list(row.values()) for row in rows]))
    if output is not None:
        for name in write_arrays(output, outputs):
            show.warn(f"{name} is stored as float32: .npz has no type for it")
        show.result(f"wrote {output}")
    show.json({"outputs": rows, "seconds": seconds, "file": None if output is None else str(output)})


def _run(
    source: str, inputs: pathlib.Path, entry: str, threads: int | None, pin: bool, trust_code: bool
) -> dict[str, Any]:
    path = pathlib.Path(source)
    if path.is_dir() or source.endswith((".mmopt", ".zip")) or is_artifact(path):
        target = load_artifact(path, threads, pin=pin).entry(entry)
        return target.run(read_arrays(inputs, target.inputs))
    from mmopt.runnable import as_runnable

    if entry != "main":
        raise UserError("a model has one entry point, main", where="--entry")
    if pin:
        raise UserError("only threads of an artifact are pinned", where="--pin")
    model = as_runnable(source, threads=threads, trust_code=trust_code)
    values = check_inputs(model.inputs, read_arrays(inputs, model.inputs), where=source)
    return model.run_all([values])[0]


def _rows(name: str, value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [row for index, item in enumerate(value) for row in _rows(f"{name}.{index}", item)]
    row = {"output": name, "dtype": "none", "shape": "", "min": "", "max": "", "mean": ""}
    if value is None:
        return [row]
    dtype = "string" if value.dtype == object else str(value.dtype)
    row |= {"dtype": dtype, "shape": str(list(value.shape))}
    if dtype != "string" and value.dtype.kind != "c" and value.size:
        numbers = value.astype("float64")
        row |= {key: f"{getattr(numbers, key)():.6g}" for key in ("min", "max", "mean")}
    return [row]
