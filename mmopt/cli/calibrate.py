"""``mmopt calibrate``: statistics of a model's tensors on samples, for quantization."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmopt.cli.output import JsonFile, Output, Quiet, Verbose, table
from mmopt.errors import UserError

if TYPE_CHECKING:
    from mmopt.analysis.calibration import Calibration

app = typer.Typer(rich_markup_mode=None, add_completion=False)

MADE_UP = "random"
"""What ``--calib`` says to have samples made up."""


@app.command()
def calibrate(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="What to run; left out with --merge.")] = None,
    output: Annotated[
        pathlib.Path | None, typer.Option("-o", "--output", metavar="OUT.stats", help="File to write.")
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(metavar="FILE.npz|DIR|random", help="Samples; the leading axis counts. 'random' makes some up."),
    ] = None,
    merge: Annotated[
        list[pathlib.Path] | None,
        typer.Option(metavar="A.stats", help="Join statistics of the same model instead; given once per file."),
    ] = None,
    gram: Annotated[
        list[str] | None, typer.Option(metavar="TENSOR", help="Also keep the Gram matrix of this tensor's channels.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many samples 'random' makes up.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of samples that are made up.")] = 0,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Allow .pt2 and module:function.")] = False,
    json: JsonFile = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Collect ranges, histograms and channel means of every tensor in one pass over samples, or merge such statistics.

    Memory does not grow with the number of samples. Padding, as the model's masks mark it, does not enter.
    """
    from mmopt.analysis.calibration import load, save

    show = Output(verbose, quiet, json)
    if output is None:
        raise UserError("there is no file to write", where="-o", hint="mmopt calibrate … -o model.stats")
    if merge:
        if model is not None or calib is not None:
            raise UserError("--merge joins files that exist", where="--merge", hint="leave out MODEL and --calib")
        found = load(merge[0])
        for path in merge[1:]:
            found.merge(load(path))
    else:
        found = _collect(model, calib, gram or [], count, seed, trust_code, show)
    save(found, output)
    show.result(_table(found))
    if found.source == MADE_UP:
        show.say("the samples were made up: ranges from them mean little, and everything made with them says so")
    show.result(f"{found.samples} samples, {len(found.tensors)} tensors: {output}")
    show.json(_to_dict(found, output))


def _collect(
    model: str | None, calib: str | None, gram: list[str], count: int, seed: int, trust_code: bool, show: Output
) -> Calibration:
    import mmopt
    from mmopt.analysis.calibration import GIVEN, RANDOM, collect, made_up
    from mmopt.loading import load_samples

    if model is None or calib is None:
        what = "MODEL" if model is None else "--calib"
        hint = "mmopt calibrate model.onnx --calib samples.npz -o model.stats"
        raise UserError(f"{what} is missing", hint=f"{hint}; --calib {MADE_UP} makes samples up")
    original = mmopt.load(model, trust_code=trust_code)
    module = mmopt.optimize(original, level=1).module
    if calib == MADE_UP:
        samples, source = made_up(module, seed, count), RANDOM
    else:
        samples, source = load_samples(pathlib.Path(calib), original), GIVEN
    return collect(module, samples, gram=gram, source=source, progress=_progress(show))


def _progress(show: Output) -> Any:
    def told(done: int, total: int) -> None:
        if done == total or done % max(1, total // 10) == 0:
            show.say(f"sample {done} of {total}")

    return told


def _table(found: Calibration) -> Any:
    rows = [
        (name, f"{one.low:.4g}", f"{one.high:.4g}", str(one.count), str(one.infinite or ""))
        for name, one in found.tensors.items()
    ]
    return table(("tensor", "lowest", "highest", "values", "infinite"), rows)


def _to_dict(found: Calibration, output: pathlib.Path) -> dict[str, Any]:
    tensors = {
        name: {"low": one.low, "high": one.high, "count": one.count, "infinite": one.infinite}
        for name, one in found.tensors.items()
    }
    return {"samples": found.samples, "source": found.source, "file": str(output), "tensors": tensors}
