"""``mmopt bench ARTIFACT…`` measures, ``mmopt bench compare BASE NEW`` judges two results."""

from __future__ import annotations

import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from mmopt.bench import render
from mmopt.bench.answers import TOLERANCE
from mmopt.bench.compare import FAIL_OVER, Comparison, compare_in_run, compare_reports
from mmopt.bench.inputs import made_up_inputs, parse_shapes, read_inputs
from mmopt.bench.measure import Plan
from mmopt.bench.peers import Spec
from mmopt.bench.record import Report, read_report, write_json
from mmopt.bench.request import artifact_specs, model_sources, parse_fraction, peers
from mmopt.bench.run import Options, benchmark
from mmopt.errors import UserError, VerifyError
from mmopt.runtime.cpu import default_threads
from mmopt.runtime.store import open_store

PRECISIONS = ("fp32", "bf16", "fp16")


class _BenchGroup(TyperGroup):
    """Takes everything but the name of a subcommand as the arguments of the command that measures."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] == "compare" else ["artifacts", *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return ("" if name == "artifacts" else name), command, rest


app = typer.Typer(cls=_BenchGroup, rich_markup_mode=None)

JsonFile = Annotated[pathlib.Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")]
MarkdownFile = Annotated[
    pathlib.Path | None,
    typer.Option("--markdown", metavar="FILE", help="Write the tables as Markdown, for a pull request."),
]
JunitFile = Annotated[
    pathlib.Path | None,
    typer.Option("--junit", metavar="FILE", help="Write verdicts as JUnit XML, for CI."),
]


@app.callback()
def bench() -> None:
    """Measure artifacts and their peers in turns, or compare two results."""


@app.command("artifacts", hidden=True, epilog="`mmopt bench compare BASE.json NEW.json` judges two results of --json.")
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
        typer.Option(metavar="FILE.npz", help="Inputs by name. Default: random, of the right dtypes and shapes."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:1x128", help="Shape of a made-up input; symbolic sizes are 1 otherwise."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of made-up inputs.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of every contender. Default: one per physical core.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every contender.")] = Plan.rounds,
    time: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="Measured time of every contender.")
    ] = Plan.seconds,
    starts: Annotated[
        int, typer.Option(min=1, help="Fresh processes of every contender, for load time and memory.")
    ] = Options.starts,
    isolate: Annotated[bool, typer.Option("--isolate", help="One process for every contender.")] = False,
    precision: Annotated[str, typer.Option(help="What OpenVINO computes in: fp32, bf16, fp16.")] = "fp32",
    tolerance: Annotated[float, typer.Option(min=0.0, help="Error allowed between answers, of the range.")] = TOLERANCE,
    fail_over: Annotated[
        str | None,
        typer.Option(metavar="FRACTION", help="Exit 7 when a later artifact is worse than the first by more: 5%."),
    ] = None,
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Allow module:function to run.")] = False,
    json: JsonFile = None,
    markdown: MarkdownFile = None,
    junit: JunitFile = None,
) -> None:
    """Measure artifacts in turns with each other and with onnxruntime, OpenVINO and torch.

    A contender whose answers differ from the first one's makes the run fail (exit 5).
    """
    limit = None if fail_over is None else parse_fraction(fail_over)
    if precision not in PRECISIONS:
        raise UserError(f"no precision {precision!r}", where="--precision", hint=f"one of {', '.join(PRECISIONS)}")
    if limit is not None and len(artifacts) < 2:
        raise UserError("one artifact cannot be judged", where="--fail-over", hint="give the base artifact first")
    threads = threads or default_threads()
    store = open_store(artifacts[0])
    others, left_out = peers(against, model_sources(model or [], store, trust_code=trust_code), threads, precision)
    if inputs is not None and shape:
        raise UserError("the inputs have shapes of their own", where="--shape", hint="leave out --shape or --inputs")
    main = store.manifest.entries["main"]
    arrays = read_inputs(inputs) if inputs else made_up_inputs(main.inputs, parse_shapes(shape or []), seed)
    origin = inputs.name if inputs else f"random (seed {seed})"
    specs = [*artifact_specs(artifacts, threads), *others]
    options = Options(Plan(rounds, time), starts, isolate, tolerance)
    with _progress(specs, options) as progress:
        report = benchmark(specs, arrays, options, left_out=left_out, inputs_from=origin, progress=progress)
    comparison = compare_in_run(report, FAIL_OVER if limit is None else limit) if len(artifacts) > 1 else None
    _publish(report, comparison, json, markdown, junit)
    _check_answers(report)
    if limit is not None and comparison is not None:
        comparison.check()


@app.command("compare")
def compare_command(
    base: Annotated[pathlib.Path, typer.Argument(metavar="BASE.json", help="The older result.")],
    new: Annotated[pathlib.Path, typer.Argument(metavar="NEW.json", help="The newer result.")],
    fail_over: Annotated[
        str, typer.Option(metavar="FRACTION", help="Change that counts as a regression, beyond the noise.")
    ] = f"{FAIL_OVER:.0%}",
    json: JsonFile = None,
    markdown: MarkdownFile = None,
    junit: JunitFile = None,
) -> None:
    """Judge two results of `mmopt bench --json`. Exit 7 when something regressed, 2 when nothing can be compared."""
    limit = parse_fraction(fail_over)
    comparison = compare_reports(read_report(base), read_report(new), limit)
    _publish(None, comparison, json, markdown, junit)
    comparison.check()


def _publish(
    report: Report | None,
    comparison: Comparison | None,
    json: pathlib.Path | None,
    markdown: pathlib.Path | None,
    junit: pathlib.Path | None,
) -> None:
    sheets = render.report_sheets(report) if report else []
    lines = render.report_lines(report) if report else []
    if comparison is not None:
        sheets.append(render.comparison_sheet(comparison))
        lines += [*comparison.notes, render.comparison_line(comparison)]
    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
    for sheet in sheets:
        console.print(sheet.rich())
    for line in lines:
        console.print(line, markup=False)
    if markdown is not None:
        items = "".join(f"- {line}\n" for line in lines)
        _write(markdown, "\n".join(sheet.markdown() for sheet in sheets) + "\n" + items)
    if junit is not None:
        _write(junit, render.junit("mmopt bench", comparison, report))
    if json is not None:
        data = report.to_json() if report else comparison.to_json() if comparison else {}
        if report and comparison:
            data["comparison"] = comparison.to_json()
        write_json(json, data)


def _write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _check_answers(report: Report) -> None:
    for result in report.disagreements:
        if result.agreement is not None:
            what = f"disagrees with {result.agreement.reference}: {result.agreement.detail}"
            hint = "a time for a wrong answer means nothing; see --tolerance, and mmopt verify"
            raise VerifyError(what, where=result.label, hint=hint)


@contextlib.contextmanager
def _progress(specs: list[Spec], options: Options) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; without a terminal, a line for each start and each round."""
    if not sys.stderr.isatty():
        yield _log_lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=len(specs) * (options.starts + options.plan.rounds))
        yield lambda message: bar.update(task, description=message, advance=1)


def _log_lines() -> Callable[[str], None]:
    said: set[str] = set()

    def log(message: str) -> None:
        line = message.partition(":")[0]
        if line not in said:
            said.add(line)
            print(line, file=sys.stderr)

    return log
