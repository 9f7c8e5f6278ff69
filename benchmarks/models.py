"""Whole reference models: mmopt's artifacts against onnxruntime, OpenVINO and torch.compile, in turns, all in fp32,
or all in bf16.

``python -m benchmarks.models [--models bert-base,…] [--against onnxruntime,openvino,torch.compile] [--json FILE]``

Every peer runs the model as it was exported, not what mmopt made of it, on the same inputs with the same number of
threads. With ``--precision bf16`` OpenVINO gets its hint for that, and torch its autocast; onnxruntime, which has no
such arithmetic on CPUs, is left out. A model is measured only when all answers agree.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console

from benchmarks.zoo import ZOO, FileModel, ZooModel
from mmopt.bench import machine
from mmopt.bench.measure import Plan
from mmopt.bench.peers import PEERS, Spec, peer_specs
from mmopt.bench.record import Report
from mmopt.bench.render import Sheet, quantity, speed
from mmopt.bench.run import Options, benchmark
from mmopt.bench.stats import geometric_mean
from mmopt.errors import BackendError, MmoptError, UserError, did_you_mean
from mmopt.runtime.cpu import default_threads

SCHEMA_VERSION = 1
OURS = "mmopt"
TOLERANCES = {"fp32": 1e-3, "bf16": 8e-2}
"""Error allowed between answers by precision, of the range; in bf16 both sides round in places of their own."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
BUILDER = "build_"


def __getattr__(name: str) -> Callable[[], Any]:
    """``build_NAME`` builds a model of the zoo: the function that torch contenders are told to call."""
    model = ZOO.get(name.removeprefix(BUILDER)) if name.startswith(BUILDER) else None
    if model is None or isinstance(model, FileModel):
        raise AttributeError(name)
    return model.build  # type: ignore[attr-defined, no-any-return]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; the exit code of the first model that failed; 5 when an answer was wrong.
    """
    options = _parser().parse_args(arguments)
    try:
        names = chosen(options.models, ZOO, "--models")
        peers = chosen(options.against, PEERS, "--against")
        print(machine.describe(machine.facts()), flush=True)
        if options.work is not None:
            return _measure_all(names, peers, options, options.work)
        with tempfile.TemporaryDirectory(prefix="mmopt-models-") as folder:
            return _measure_all(names, peers, options, pathlib.Path(folder))
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def chosen(text: str, known: Iterable[str], where: str) -> list[str]:
    """Names separated by commas.

    Raises:
        UserError: One of them is not known.
    """
    listed = list(known)
    names = [name.strip() for name in text.split(",") if name.strip()] or listed
    for name in names:
        if name not in listed:
            raise UserError(f"there is no {name!r}", where=where, hint=did_you_mean(name, listed))
    return names


def _measure_all(names: Sequence[str], peers: Sequence[str], options: argparse.Namespace, work: pathlib.Path) -> int:
    reports: dict[str, Report] = {}
    failed: dict[str, str] = {}
    code = 0
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            reports[name] = measure(ZOO[name], peers, options, work)
        except MmoptError as error:
            failed[name] = str(error)
            code = code or error.exit_code
    _print(reports, peers, failed)
    if options.json is not None:
        options.json.write_text(
            json.dumps(as_json(reports, failed, options.threads, options.precision), indent=1) + "\n"
        )
    return code or (5 if any(report.disagreements for report in reports.values()) else 0)


def measure(model: ZooModel, peers: Sequence[str], options: argparse.Namespace, work: pathlib.Path) -> Report:
    """Export, optimize and measure one model.

    Raises:
        UnsupportedError: The model cannot be had here.
        BackendError: mmopt cannot compile or run it.
    """
    source = model.export(work / "models", batch=options.batch)
    suffix = "" if options.precision == "fp32" else f"-{options.precision}"
    artifact = work / "artifacts" / f"{model.name}-b{options.batch}{suffix}.mmopt"
    if not (options.reuse and artifact.exists()):
        _optimize(source, artifact, options.precision)
    sources = {"onnx": str(source)}
    if not isinstance(model, FileModel):
        sources["torch"] = f"{__spec__.name}:{BUILDER}{model.name}"
    able = [peer for peer in peers if peer != "onnxruntime" or options.precision == "fp32"]
    others, left_out = peer_specs(able, sources, options.threads, options.precision)
    left_out.update({peer: f"it has no {options.precision} arithmetic on CPUs" for peer in peers if peer not in able})
    if isinstance(model, FileModel):
        left_out.update({peer: "the model is an ONNX file" for peer in left_out if peer.startswith("torch")})
    return benchmark(
        [Spec("mmopt", OURS, str(artifact), options.threads), *others],
        model.inputs(options.batch),
        Options(Plan(options.rounds, options.time), options.starts, tolerance=TOLERANCES[options.precision]),
        left_out=left_out,
        inputs_from="the zoo",
    )


def _optimize(source: pathlib.Path, artifact: pathlib.Path, precision: str) -> None:
    """As a user would, in a process of its own, so that the compiler's memory is gone before anything is measured."""
    artifact.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mmopt.cli.main", "optimize", str(source), "-o", str(artifact), "-q"]
    command += ["--precision", precision]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BackendError(f"mmopt optimize exits {done.returncode}: {done.stderr.strip()[-2000:]}", where=str(source))


def geometric_means(reports: Iterable[Report]) -> dict[str, tuple[float, int]]:
    """For each peer: geometric mean of its time over mmopt's, and over how many models. Wrong answers do not count."""
    ratios: dict[str, list[float]] = {}
    for report in reports:
        wrong = {result.label for result in report.disagreements}
        for label, ratio in report.ratios().items():
            if label not in wrong:
                ratios.setdefault(label, []).append(ratio.value)
    return {label: (geometric_mean(values), len(values)) for label, values in ratios.items()}


def as_json(
    reports: dict[str, Report], failed: dict[str, str], threads: int, precision: str = "fp32"
) -> dict[str, Any]:
    """Everything, for a file."""
    means = {
        label: {"ratio": ratio, "models": count} for label, (ratio, count) in geometric_means(reports.values()).items()
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "mmopt-models",
        "machine": machine.facts(),
        "threads": threads,
        "dtype": DTYPES[precision],
        "models": {name: report.to_json() for name, report in reports.items()},
        "geometric_means": means,
        "failed": failed,
    }


def sheet(reports: dict[str, Report], peers: Sequence[str]) -> Sheet:
    """One row a model: mmopt's median, and for each peer its median and its time over mmopt's."""
    rows = [[name, *_cells(report, peers)] for name, report in reports.items()]
    means = geometric_means(reports.values())
    rows.append(["geometric mean", "", *(f"{means[peer][0]:.2f}×" if peer in means else "–" for peer in peers)])
    return Sheet(
        "median time; × is the peer's time over mmopt's: above 1 mmopt is faster", ("model", OURS, *peers), rows
    )


def _cells(report: Report, peers: Sequence[str]) -> list[str]:
    medians = {result.label: quantity(result.summary()["p50_ms"] / 1e3, "s") for result in report.results}
    wrong = {result.label for result in report.disagreements}
    ratios = report.ratios()
    cells = [
        f"{medians[p]} {'WRONG' if p in wrong else f'{ratios[p].value:.2f}×'}" if p in ratios else "–" for p in peers
    ]
    return [medians[OURS], *cells]


def notes(reports: dict[str, Report], failed: dict[str, str]) -> list[str]:
    """What a reader must not miss: where mmopt is slower, what is wrong, who is missing and why."""
    lines = []
    for name, report in reports.items():
        wrong = {result.label for result in report.disagreements}
        for label, ratio in report.ratios().items():
            if label not in wrong and ratio.high < 1:
                lines.append(f"slower: on {name} mmopt is {speed(ratio)} {label}")
        for result in report.disagreements:
            lines.append(
                f"WRONG: {name}: {result.label} against {OURS}: {result.agreement and result.agreement.detail}"
            )
        lines += [f"left out: {name}: {peer}: {reason}" for peer, reason in report.left_out.items()]
    return lines + [f"failed: {name}: {reason}" for name, reason in failed.items()]


def _print(reports: dict[str, Report], peers: Sequence[str], failed: dict[str, str]) -> None:
    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
    if reports:
        table = sheet(reports, peers)
        console.print(table.title)
        console.print(table.rich())
    for line in notes(reports, failed):
        console.print(line, markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="", metavar="NAMES", help="with commas; default: the whole zoo")
    parser.add_argument("--against", default="onnxruntime,openvino,torch.compile", metavar="PEERS", help="with commas")
    parser.add_argument("--precision", default="fp32", choices=TOLERANCES, help="of every contender (%(default)s)")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of every contender (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="batch size (%(default)s)")
    parser.add_argument("--rounds", type=int, default=Plan.rounds, help="turns of every contender (%(default)s)")
    parser.add_argument(
        "--time", type=float, default=Plan.seconds, metavar="SECONDS", help="measured time (%(default)s)"
    )
    parser.add_argument("--starts", type=int, default=3, help="fresh processes of every contender (%(default)s)")
    parser.add_argument("--work", type=pathlib.Path, metavar="FOLDER", help="keep exports and artifacts there")
    parser.add_argument("--reuse", action="store_true", help="take the artifacts that --work holds from an earlier run")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
