"""What mmopt's rewrites are worth elsewhere: the emitted ONNX against the exported one, in onnxruntime and OpenVINO.

``python -m benchmarks.portable [--models bert-base,…] [--runtimes onnxruntime,openvino] [--json FILE]``

Each runtime optimizes both files as far as it can (onnxruntime: ``ORT_ENABLE_ALL``) and runs them on the same inputs
with the same threads, in turns. A model counts only when the answers agree.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from benchmarks.models import TOLERANCES, chosen
from benchmarks.zoo import ZOO, ZooModel
from mmopt.bench import machine
from mmopt.bench.measure import Plan
from mmopt.bench.peers import Spec
from mmopt.bench.record import Report
from mmopt.bench.run import Options, benchmark
from mmopt.bench.stats import geometric_mean
from mmopt.errors import BackendError, MmoptError
from mmopt.runtime.cpu import default_threads

RUNTIMES = ("onnxruntime", "openvino")
REWRITTEN, EXPORTED = "rewritten", "exported"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 5 when an answer was wrong; the exit code of an error.
    """
    options = _parser().parse_args(arguments)
    try:
        names = chosen(options.models, ZOO, "--models")
        runtimes = chosen(options.runtimes, RUNTIMES, "--runtimes")
        print(machine.describe(machine.facts()), flush=True)
        with tempfile.TemporaryDirectory(prefix="mmopt-portable-") as folder:
            work = options.work or pathlib.Path(folder)
            reports = {name: measure(ZOO[name], runtimes, options, work) for name in names if _here(name)}
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for line in summary(reports, runtimes):
        print(line)
    if options.json is not None:
        runs = {name: {r: report.to_json() for r, report in found.items()} for name, found in reports.items()}
        content = {"schema_version": 1, "kind": "mmopt-portable", "machine": machine.facts(), "models": runs}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 5 if any(report.disagreements for found in reports.values() for report in found.values()) else 0


def _here(name: str) -> bool:
    missing = ZOO[name].missing()
    if missing:
        print(f"{name}: skipped, {missing} is missing", file=sys.stderr)
    return not missing


def measure(
    model: ZooModel, runtimes: Sequence[str], options: argparse.Namespace, work: pathlib.Path
) -> dict[str, Report]:
    """Measure one model in every runtime that runs it at all.

    Raises:
        BackendError: mmopt cannot rewrite it, or a runtime cannot run what mmopt emits.
    """
    print(f"{model.name} …", file=sys.stderr, flush=True)
    source = model.export(work / "models", batch=1)
    rewritten = work / "rewritten" / model.name / "model.onnx"
    if not (options.reuse and rewritten.exists()):
        rewrite(source, rewritten)
    plan = Options(Plan(options.rounds, options.time), 1, tolerance=TOLERANCES["fp32"])
    reports = {}
    for runtime in runtimes:
        files = {REWRITTEN: rewritten, EXPORTED: source}
        specs = [Spec(runtime, label, str(path), options.threads) for label, path in files.items()]
        try:
            reports[runtime] = benchmark(specs, model.inputs(1), plan, inputs_from="the zoo")
        except BackendError as error:
            print(f"{model.name}: {runtime} runs it neither as exported nor rewritten: {error.hint}", file=sys.stderr)
            continue
        if REWRITTEN in reports[runtime].left_out:
            problem = reports[runtime].left_out[REWRITTEN]
            raise BackendError(f"{runtime} runs it as exported, but not as rewritten: {problem}", where=model.name)
    return reports


def rewrite(source: pathlib.Path, target: pathlib.Path) -> None:
    """``mmopt optimize --emit onnx``, in a process of its own.

    Raises:
        BackendError: It failed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mmopt.cli.main", "optimize", str(source), "--emit", "onnx", "-o", str(target)]
    done = subprocess.run([*command, "-q"], capture_output=True, text=True)
    if done.returncode:
        raise BackendError(f"mmopt optimize exits {done.returncode}: {done.stderr.strip()[-2000:]}", where=str(source))


def gain(report: Report) -> float | None:
    """Time of the exported model over that of the rewritten one; ``None`` where one has none."""
    if report.disagreements or report.left_out:
        return None
    ratio = report.ratios().get(EXPORTED)
    return None if ratio is None else ratio.value


def _cell(report: Report | None) -> str:
    if report is None:
        return "does not run"
    if report.left_out:
        return "only rewritten"
    value = gain(report)
    return "WRONG" if value is None else f"{value:.2f}×"


def summary(reports: dict[str, dict[str, Report]], runtimes: Sequence[str]) -> list[str]:
    """A table of gains: above 1 the rewritten model is faster."""
    lines = [f"| model | {' | '.join(runtimes)} |", f"|{' --- |' * (len(runtimes) + 1)}"]
    for name, found in reports.items():
        lines.append(f"| {name} | {' | '.join(_cell(found.get(runtime)) for runtime in runtimes)} |")
    means = []
    for runtime in runtimes:
        ran = (found[runtime] for found in reports.values() if runtime in found)
        values = [value for report in ran if (value := gain(report)) is not None]
        means.append(f"{geometric_mean(values):.3f}×" if values else "–")
    return [*lines, f"| geometric mean | {' | '.join(means)} |"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.portable", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="", metavar="NAMES", help="with commas; default: the whole zoo")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), metavar="NAMES", help="with commas (%(default)s)")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of every contender (%(default)s)")
    parser.add_argument("--rounds", type=int, default=Plan.rounds, help="turns of every contender (%(default)s)")
    parser.add_argument("--time", type=float, default=Plan.seconds, metavar="SECONDS", help="measured (%(default)s)")
    parser.add_argument("--work", type=pathlib.Path, metavar="FOLDER", help="keep exports and rewritten models there")
    parser.add_argument("--reuse", action="store_true", help="take the rewritten models that --work holds already")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
