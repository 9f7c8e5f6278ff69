"""Predicted against measured time of pruned models, as a table and a plot.

``python -m benchmarks.pruning_latency FOLDER [--data ../shared/data] [--networks digits,sentiment] [--write]``

Each network is compiled whole, cut to half everywhere, and cut at random: by 20 to 70 %, each group by a quarter more
or less. Kernels of the first two are timed, and from these the whole models of the others are predicted, without
running or compiling them, as ``--prune-to`` does; then they are measured. FOLDER keeps what is compiled and measured:
what is there is not done again. ``--prefix`` goes before the command that measures (``taskset -c 2,3``).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import mmopt
from benchmarks.models import chosen
from benchmarks.trained import TRAINED, prepare
from benchmarks.zoo import ZOO
from mmopt.analysis.axes import Group, find_groups
from mmopt.autotune.timetable import TimeTable, within
from mmopt.backends.cpu.choosing import Chooser
from mmopt.backends.profile import load_profile
from mmopt.errors import BackendError, MmoptError
from mmopt.ir.module import Module
from mmopt.lowering.compiler import CompileOptions, compile_module
from mmopt.pipeline.recipe import FUSION, load_recipe
from mmopt.runtime import load_artifact
from mmopt.runtime.profiling import KernelTime, ModelTime, time_kernels
from mmopt.runtime.writer import write_artifact
from mmopt.transforms.prune.prune_structured import cut_units
from mmopt.transforms.prune.separate_fills import separate_fills

Arrays = dict[str, np.ndarray[Any, Any]]

NETWORKS = ("digits", "polarity", "fusion-attention", "siamese", "fusion-deep", "sentiment", "hci", "cnn-rnn")
SHARES = (0.2, 0.4, 0.55, 0.7)
LEARNED = 2
"""Of each network, so many models are learned from: the whole one, and the one that is cut to half."""

ROUNDS, ROUND_SECONDS = 5, 0.25
CLOSE = 0.15

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PLOT = DOCS / "pruning-latency.svg"
PAGE = DOCS / "pruning.md"
_TABLE = re.compile(r"(<!-- latency: begin -->\n).*?(<!-- latency: end -->)", re.DOTALL)
_COLORS = (
    *("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf", "#7f7f7f", "#bcbd22"),
    *("#000000", "#aec7e8", "#98df8a", "#ff9896", "#ffbb78", "#c5b0d5", "#9edae5", "#c49c94", "#f7b6d2"),
)


@dataclasses.dataclass(frozen=True)
class Point:
    """One pruned model.

    Attributes:
        network: What it was cut from.
        measured: Seconds of a run.
        predicted: The same as predicted from the kernels of two others.
        templates: The same in proportion to what the templates alone predict.
    """

    network: str
    measured: float
    predicted: float
    templates: float


def compile_cuts(name: str, folder: pathlib.Path, options: argparse.Namespace) -> list[pathlib.Path]:
    """The artifacts of one network: whole, cut to half, cut at random."""
    paths = [folder / f"{name}-{number}.mmopt" for number in range(LEARNED + len(SHARES))]
    if all(path.exists() for path in paths):
        return paths
    source, inputs = _source(name, options)
    np.savez(folder / f"{name}.inputs.npz", **inputs)  # type: ignore[arg-type]
    recipe = load_recipe("o2")
    before = tuple(phase for phase in recipe.phases if phase.name != FUSION)
    module = mmopt.optimize(
        mmopt.load(source), recipe=dataclasses.replace(recipe, phases=before), validate="off"
    ).module
    separate_fills(module)
    groups = [group for group in find_groups(module) if not group.frozen]
    random = np.random.default_rng(sum(name.encode()))
    sizes = [{}, _sizes(groups, 0.5, 0.0, random), *(_sizes(groups, share, 0.25, random) for share in SHARES)]
    for path, kept in zip(paths, sizes, strict=True):
        if not path.exists():
            print(f"{name}: compile {path.name}", file=sys.stderr, flush=True)
            _compile(module, kept, path)
    return paths


def _source(name: str, options: argparse.Namespace) -> tuple[pathlib.Path, Arrays]:
    if name in TRAINED:
        prepare(name, options.folder, options.data)
        arrays = dict(np.load(options.folder / f"{name}.test.npz"))
        return options.folder / f"{name}.onnx", {key: array[:1] for key, array in arrays.items() if key != "labels"}
    return ZOO[name].export(options.folder / "models"), ZOO[name].inputs(1)


def _sizes(groups: Sequence[Group], share: float, spread: float, random: np.random.Generator) -> dict[str, int]:
    found = {}
    for group in groups:
        step = 1 if group.kind in ("heads", "groups") else next((s for s in (16, 8, 4) if group.units >= 4 * s), 1)
        part = float(np.clip(1 - share + random.uniform(-spread, spread), 0.15, 1))
        found[group.name] = min(group.units, max(step, round(group.units * part / step) * step))
    return found


def _compile(module: Module, kept: Mapping[str, int], path: pathlib.Path) -> None:
    cut = module.clone()
    groups = find_groups(cut)
    keep = {g.name: range(kept[g.name]) for g in groups if kept.get(g.name, g.units) < g.units}
    if keep:
        cut_units(cut, groups, keep)
    fused = mmopt.optimize(cut, recipe=load_recipe("o2"), validate="off").module
    program = compile_module(fused, load_profile("cpu"), options=CompileOptions(chooser=Chooser()))
    with write_artifact(path) as writer:
        writer.add_program(program)
        writer.commit()


def measure(paths: Sequence[pathlib.Path], inputs: Arrays, threads: int) -> list[ModelTime]:
    """Times of artifacts and their kernels, in turns."""
    sessions = [load_artifact(path, threads, verify_hashes="size") for path in paths]
    found: list[list[ModelTime]] = [[] for _ in sessions]
    for _ in range(ROUNDS):
        for session, times in zip(sessions, found, strict=True):
            time.sleep(0.02)
            times.append(time_kernels(session, inputs, runs=200, seconds=ROUND_SECONDS))
    return [_median(times) for times in found]


def _median(times: Sequence[ModelTime]) -> ModelTime:
    kernels: dict[str, list[KernelTime]] = {}
    for one in times:
        for kernel in one.kernels:
            kernels.setdefault(kernel.name, []).append(kernel)
    medians = [
        KernelTime(name, each[0].calls, statistics.median(k.seconds for k in each)) for name, each in kernels.items()
    ]
    return ModelTime(statistics.median(one.seconds for one in times), medians, sum(one.runs for one in times))


def points(name: str, paths: Sequence[pathlib.Path], times: Sequence[ModelTime]) -> list[Point]:
    """Predictions for all models of a network but those that are learned from."""
    records = [json.loads((path / "manifest.json").read_text())["kernels"] for path in paths]
    table = TimeTable()
    for kernels, measured in list(zip(records, times, strict=True))[:LEARNED]:
        table.learn(kernels, measured)
    cycles = [sum(record.get("cycles", 0.0) * record["calls"] for record in kernels) for kernels in records]
    return [
        Point(name, measured.seconds, table.seconds(kernels), times[0].seconds * spent / cycles[0])
        for kernels, measured, spent in list(zip(records, times, cycles, strict=True))[LEARNED:]
    ]


def summary(found: Sequence[Point]) -> str:
    """The table of the docs."""
    lines = ["| network | whole cut models, ms | median error | largest | by templates alone, largest |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for name in (*dict.fromkeys(point.network for point in found), ""):
        some = [point for point in found if name in ("", point.network)]
        off = [abs(point.predicted / point.measured - 1) for point in some]
        plain = max(abs(point.templates / point.measured - 1) for point in some)
        low, high = (f"{1e3 * pick(point.measured for point in some):.2g}" for pick in (min, max))
        title = name or f"all {len(some)}"
        lines.append(f"| {title} | {low} to {high} | {statistics.median(off):.1%} | {max(off):.1%} | {plain:.0%} |")
    close = within([point.predicted for point in found], [point.measured for point in found], CLOSE)
    lines += ["", f"{close:.0%} of {len(found)} predictions are within {CLOSE:.0%} of what was measured."]
    return "\n".join(lines)


def plot(found: Sequence[Point]) -> str:
    """Predicted against measured time on logarithmic axes, as SVG, with lines 15 % to either side."""
    values = [value for point in found for value in (point.measured, point.predicted)]
    low, high = math.log10(min(values) * 800), math.log10(max(values) * 1250)
    size, edge = 420, 50

    def at(milliseconds: float) -> float:
        return (math.log10(milliseconds) - low) / (high - low) * size

    def place(x: float, y: float) -> tuple[float, float]:
        return round(edge + at(x), 1), round(edge / 2 + size - at(y), 1)

    box = f'viewBox="0 0 {size + edge + 150} {size + edge + 25}" font-family="sans-serif" font-size="12"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {box}>']
    parts.append(f'<rect x="{edge}" y="{edge / 2}" width="{size}" height="{size}" fill="white" stroke="#999"/>')
    for slope, dash in ((1.0, "none"), (1 - CLOSE, "4"), (1 + CLOSE, "4")):
        first, last = 10**low / min(slope, 1), 10**high / max(slope, 1)
        (x1, y1), (x2, y2) = place(first, first * slope), place(last, last * slope)
        parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#999" stroke-dasharray="{dash}"/>')
    for tick in (n * 10.0**power for power in range(-3, 4) for n in (1, 2, 5)):
        if low <= math.log10(tick) <= high:
            x, y = place(tick, tick)
            parts.append(f'<text x="{x}" y="{size + edge / 2 + 16}" text-anchor="middle">{tick:g}</text>')
            parts.append(f'<text x="{edge - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    colors = dict(zip(dict.fromkeys(point.network for point in found), itertools.cycle(_COLORS), strict=False))
    for point in found:
        x, y = place(1e3 * point.measured, 1e3 * point.predicted)
        parts.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colors[point.network]}"/>')
    for number, (name, color) in enumerate(colors.items()):
        left, line = size + edge + 14, edge + 20 * number
        parts.append(f'<circle cx="{left}" cy="{line - 4}" r="4" fill="{color}"/>')
        parts.append(f'<text x="{left + 10}" y="{line}">{name}</text>')
    middle = edge / 2 + size / 2
    parts.append(f'<text x="{edge + size / 2}" y="{size + edge + 12}" text-anchor="middle">measured, ms</text>')
    turn = f'text-anchor="middle" transform="rotate(-90 12 {middle})"'
    parts.append(f'<text x="12" y="{middle}" {turn}>predicted, ms</text>')
    return "\n".join([*parts, "</svg>", ""])


def _times(
    name: str, paths: Sequence[pathlib.Path], work: pathlib.Path, options: argparse.Namespace
) -> list[ModelTime]:
    """What a process of its own measures, or has measured before."""
    file = work / f"{name}.times.json"
    if not file.exists():
        command = [sys.executable, "-m", "benchmarks.pruning_latency", str(options.folder), "--measure", name]
        command = [*shlex.split(options.prefix), *command, "--threads", str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackendError(f"measuring failed: {done.stderr.strip()[-500:]}", where=name)
        file.write_text(done.stdout.splitlines()[-1])
    return [
        ModelTime(one["seconds"], [KernelTime(**kernel) for kernel in one["kernels"]], one["runs"])
        for one in json.loads(file.read_text())
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; the exit code of an error.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pruning_latency", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"), metavar="FOLDER")
    parser.add_argument("--networks", default=",".join(NETWORKS), metavar="NAMES", help="trained ones and of the zoo")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--prefix", default="", metavar="COMMAND", help="before the command that measures")
    parser.add_argument("--write", action="store_true", help="write docs/pruning-latency.svg and its table")
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    work = options.folder / "latency"
    work.mkdir(parents=True, exist_ok=True)
    if options.measure:
        paths = sorted(work.glob(f"{options.measure}-?.mmopt"))
        inputs = dict(np.load(work / f"{options.measure}.inputs.npz"))
        print(json.dumps([dataclasses.asdict(one) for one in measure(paths, inputs, options.threads)]))
        return 0
    found: list[Point] = []
    try:
        for name in chosen(options.networks, (*TRAINED, *ZOO), "--networks"):
            paths = compile_cuts(name, work, options)
            found += points(name, paths, _times(name, paths, work, options))
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(summary(found))
    if options.write:
        PLOT.write_text(plot(found))
        PAGE.write_text(_TABLE.sub(lambda match: f"{match[1]}{summary(found)}\n{match[2]}", PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
