"""``mmopt bench ARTIFACT…`` measures, ``mmopt bench compare BASE NEW`` judges two results."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from mmopt.cli.arrays import read_arrays
from mmopt.cli.output import JsonFile, Output, Quiet, Verbose
from mmopt.errors import UserError, VerifyError

if TYPE_CHECKING:
    from mmopt.bench.compare import Comparison
    from mmopt.bench.record import Report
    from mmopt.runtime.store import Store


_Context: Any = TyperCommand.context_class  # click's, which newer typer carries inside and older typer imports


class _MeasureContext(_Context):  # type: ignore[misc]
    """Shows the measuring command under the group's name, which is what the user typed."""

    @property
    def command_path(self) -> str:
        return str(self.parent.command_path)


class _MeasureCommand(TyperCommand):
    context_class = _MeasureContext


class _BenchGroup(TyperGroup):
    """Takes everything but the name of a subcommand as the arguments of the command that measures."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] == "compare" else ["artifacts", *args])


app = typer.Typer(cls=_BenchGroup, rich_markup_mode=None)

MarkdownFile = Annotated[
    pathlib.Path | None,
    typer.Option("--markdown", metavar="FILE", help="Write the tables as Markdown, for a pull request."),
]
JunitFile = Annotated[
    pathlib.Path | None, typer.Option("--junit", metavar="FILE", help="Write verdicts as JUnit XML, for CI.")
]


@app.callback()
def bench() -> None:
    """Measure artifacts in turns with each other and their peers, or compare two results."""


@app.command(
    "artifacts",
    cls=_MeasureCommand,
    hidden=True,
    epilog="`mmopt bench compare BASE.json NEW.json` judges two results of --json.",
)
def artifacts_command(
    artifacts: Annotated[list[str], typer.Argument(metavar="ARTIFACT…", help="Artifacts; the first is the base.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="PEERS",
            help="onnxruntime, openvino, torch, torch.compile, with commas; or none. Default: those that can run.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="What peers run: a .onnx file; for torch a .pt2 or module:function. Default: the optimized.onnx in "
            "the first artifact.",
        ),
    ] = None,
    inputs: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="FILE.npz", help="Inputs by name. Default: made from the model."),
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="NAME:1x128", help="Shape of an input that is made from the model.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of every contender. Default: one per core.")
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Bind each thread of an artifact to a CPU of its own.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every contender.")] = 10,
    time: Annotated[float, typer.Option(min=0.0, metavar="SECONDS", help="Measured time of every contender.")] = 5.0,
    starts: Annotated[
        int, typer.Option(min=1, help="Fresh processes of every contender, for load time and memory.")
    ] = 5,
    isolate: Annotated[bool, typer.Option("--isolate", help="Measure every contender in its own process.")] = False,
    precision: Annotated[str, typer.Option(help="What OpenVINO and torch compute in: fp32, bf16 or fp16.")] = "fp32",
    tolerance: Annotated[float, typer.Option(min=0.0, help="Error allowed between answers, of the range.")] = 1e-3,
    fail_over: Annotated[
        str | None,
        typer.Option(metavar="FRACTION", help="Exit 7 when a later artifact is worse than the first by more: 5%."),
    ] = None,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Allow .pt2 and module:function.")] = False,
    json: JsonFile = None,
    markdown: MarkdownFile = None,
    junit: JunitFile = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Measure artifacts in turns with each other and with onnxruntime, OpenVINO and torch.

    A contender whose answers differ from the first one's makes the run fail (exit 5).
    """
    from mmopt.bench.compare import FAIL_OVER, compare_in_run
    from mmopt.bench.measure import Plan
    from mmopt.bench.request import contenders, parse_fraction
    from mmopt.bench.run import Options, benchmark
    from mmopt.runtime.cpu import default_threads
    from mmopt.runtime.store import open_store

    show = Output(verbose, quiet, json)
    _check_folders(markdown, junit)
    limit = None if fail_over is None else parse_fraction(fail_over)
    if limit is not None and len(artifacts) < 2:
        raise UserError("one artifact cannot be judged", where="--fail-over", hint="give the base artifact first")
    store = open_store(artifacts[0])
    specs, left_out = contenders(
        artifacts,
        store,
        against=against,
        models=model or [],
        threads=threads or default_threads(),
        precision=precision,
        trust_code=trust_code,
        pin=pin,
    )
    values, origin = _inputs(store, inputs, shape or [], seed)
    options = Options(Plan(rounds, time), starts, isolate, tolerance)
    with show.steps("bench") as steps:
        report = benchmark(
            specs,
            values,
            options,
            left_out=left_out,
            inputs_from=origin,
            progress=lambda kind, index, count, name: steps.at(index, count, f"{kind} {name}".strip()),
        )
    comparison = compare_in_run(report, FAIL_OVER if limit is None else limit) if len(artifacts) > 1 else None
    _publish(show, report, comparison, markdown, junit)
    _check_answers(report)
    if limit is not None and comparison is not None:
        comparison.check()


@app.command("compare")
def compare_command(
    base: Annotated[pathlib.Path, typer.Argument(metavar="BASE.json", help="The older result.")],
    new: Annotated[pathlib.Path, typer.Argument(metavar="NEW.json", help="The newer result.")],
    fail_over: Annotated[
        str, typer.Option(metavar="FRACTION", help="Change that counts as a regression, beyond the noise.")
    ] = "5%",
    json: JsonFile = None,
    markdown: MarkdownFile = None,
    junit: JunitFile = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Judge two results of `mmopt bench --json`. Exit 7 when something regressed, 2 when nothing can be compared."""
    from mmopt.bench.compare import compare_reports
    from mmopt.bench.record import read_report
    from mmopt.bench.request import parse_fraction

    show = Output(verbose, quiet, json)
    _check_folders(markdown, junit)
    limit = parse_fraction(fail_over)
    comparison = compare_reports(read_report(base), read_report(new), limit)
    _publish(show, None, comparison, markdown, junit)
    comparison.check()


def _inputs(store: Store, path: pathlib.Path | None, shapes: list[str], seed: int) -> tuple[dict[str, Any], str]:
    """Inputs, and where they come from."""
    from mmopt.bench.inputs import made_up_inputs
    from mmopt.frontends.onnx import load_onnx
    from mmopt.loading import parse_shapes
    from mmopt.runnable import OPTIMIZED

    if path is not None and shapes:
        raise UserError("the inputs have shapes of their own", where="--shape", hint="leave out --shape or --inputs")
    if path is not None:
        return read_arrays(path, store.manifest.entries["main"].inputs), path.name
    if OPTIMIZED not in store.manifest.files:
        raise UserError(f"there is no {OPTIMIZED} to make inputs from", where=str(store.location), hint="give --inputs")
    module = load_onnx(store.file(OPTIMIZED))
    return made_up_inputs(module, parse_shapes(shapes), seed), f"made from the model (seed {seed})"


def _publish(
    show: Output,
    report: Report | None,
    comparison: Comparison | None,
    markdown: pathlib.Path | None,
    junit: pathlib.Path | None,
) -> None:
    from mmopt.bench import render

    sheets = render.report_sheets(report) if report else []
    lines = render.report_lines(report) if report else []
    if comparison is not None:
        sheets.append(render.comparison_sheet(comparison))
        lines += render.comparison_lines(comparison)
    for sheet in sheets:
        show.result(sheet.title)
        show.result(sheet.rich())
        show.result("")
    for line in lines:
        show.result(line)
    if markdown is not None:
        items = "".join(f"- {line}\n" for line in lines)
        markdown.write_text("\n".join(sheet.markdown() for sheet in sheets) + "\n" + items, encoding="utf-8")
    if junit is not None:
        junit.write_text(render.junit("mmopt bench", comparison, report), encoding="utf-8")
    data = report.to_json() if report else {}
    if comparison is not None:
        data = {**data, "comparison": comparison.to_json()} if data else comparison.to_json()
    show.json(data)


def _check_folders(*paths: pathlib.Path | None) -> None:
    """Refuse before measuring what could not be written after it."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise UserError(f"there is no folder {path.parent}", where=str(path), hint="create it first")


def _check_answers(report: Report) -> None:
    for result in report.disagreements:
        if result.agreement is not None:
            what = f"disagrees with {result.agreement.reference}: {result.agreement.detail}"
            hint = "a time for a wrong answer means nothing; see --tolerance, and mmopt verify"
            raise VerifyError(what, where=result.label, hint=hint)
