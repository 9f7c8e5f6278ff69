"""Code quality on Arm processors without one: inner loops of matrix products and convolutions, by llvm-mca.

For every layer the innermost loop of its kernel is taken from the assembly: how many of its instructions multiply, and
for which part of the cycles that llvm-mca predicts the multiply pipes are busy, which is how long the multiplies alone
would take. Data is taken to be in the first-level cache. LLVM predicts for Cortex-A76 with its model of Cortex-A57.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tvm
from rich.console import Console

import mmopt
from benchmarks.kernels import onnx_of
from benchmarks.zoo.layers import MODELS, Layer
from mmopt.autotune.lowered import KernelCode, LoweredModel
from mmopt.backends.cpu import intrinsics
from mmopt.backends.cpu.pipeline import code_generation, target_of
from mmopt.backends.profile import Profile, load_profile
from mmopt.bench.render import Sheet
from mmopt.errors import MmoptError, UserError
from mmopt.frontends.onnx import module_from_proto

SCHEMA_VERSION = 1
TARGETS = ("cortex-a76", "neoverse-n1")
MULTIPLIES = re.compile(r"\t(?:(fmla|sdot|smlal2?)\s.*\[\d\]|(smmla|usmmla|bfmmla)\s.*)$")
"""Multiplies by an element or of matrices, as only products do."""

ITERATIONS = 100
FREE = 24
"""Sums that take turns in multiplies that nothing holds up."""

BARS = {"fp32": 0.85, "int8": 0.80}
"""Part of the cycles in which the pipes have to be busy."""

MOST = 1.25
"""Instructions for each multiply at most, in the mean over layers."""


@dataclasses.dataclass
class Loop:
    """The innermost loop of a kernel with the most multiplies.

    Attributes:
        lines: Its instructions, as assembly.
    """

    lines: list[str]

    @property
    def products(self) -> list[str]:
        return [line for line in self.lines if MULTIPLIES.match(line)]

    @property
    def multiplies(self) -> int:
        return len(self.products)

    @property
    def overhead(self) -> float:
        """Instructions for each multiply."""
        return len(self.lines) / self.multiplies

    def busy(self, profile: Profile) -> float:
        """Part of the predicted cycles that as many multiplies take that nothing holds up."""
        free = [
            re.sub(r"v\d+(\.\w+), v\d+(\.\w+), v\d+", rf"v{number % FREE}\1, v30\2, v31", line)
            for number, line in enumerate(self.products)
        ]
        return cycles(free, profile) / cycles(self.lines, profile)


def cycles(lines: Sequence[str], profile: Profile) -> float:
    """Cycles that llvm-mca predicts for a round of a loop.

    Raises:
        MmoptError: It cannot read the loop.
    """
    command = [predictor(), "-mtriple=aarch64", f"-mcpu={profile.mcpu}", f"-iterations={ITERATIONS}"]
    text = "\n".join(lines) + "\n"
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if found is None:
        raise MmoptError(f"llvm-mca failed: {done.stderr.strip()[:500]}")
    return int(found[1]) / ITERATIONS


def predictor() -> str:
    """The newest llvm-mca there is.

    Raises:
        UserError: There is none.
    """
    for name in (*(f"llvm-mca-{version}" for version in range(29, 13, -1)), "llvm-mca"):
        if path := shutil.which(name):
            return path
    raise UserError("llvm-mca is not installed", hint="Debian: apt install llvm-19")


def innermost(assembly: str) -> Loop | None:
    """The loop with the most multiplies among those that have no other inside; ``None`` when none multiplies."""
    lines = assembly.splitlines()
    labels: dict[str, int] = {}
    found: list[Loop] = []
    last_back = -1
    for number, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = number
        back = re.match(r"\t(?:b\.\w+|b|cbn?z|tbn?z)\b.*?(\.L\w+)$", line)
        if back and back[1] in labels:
            start = labels[back[1]]
            if start > last_back:
                found.append(Loop([text for text in lines[start : number + 1] if re.match(r"\t[a-z]", text)]))
            last_back = number
    best = max(found, key=lambda loop: loop.multiplies, default=None)
    return best if best is not None and best.multiplies else None


def kernel_of(layer: Layer, precision: str, profile: Profile) -> tuple[str, KernelCode]:
    """Workload and kernel of a layer, as it is in a model.

    Raises:
        MmoptError: No template takes the layer.
    """
    module = mmopt.optimize(module_from_proto(onnx_of(layer, precision)), validate="off").module
    model = LoweredModel({"main": module}, profile)
    heaviest = max(model.spaces.values(), key=lambda space: space.weight, default=None)
    if heaviest is None:
        raise MmoptError("no template chose among candidates", where=layer.label)
    workload = heaviest.workload.key()
    (code, *_) = model.kernels(workload, heaviest.predicted.parameters)
    return workload, code


def compiled(code: KernelCode, profile: Profile) -> tvm.runtime.Executable:
    """The kernel alone, under the name ``kernel``."""
    intrinsics.register()
    with target_of(profile) as target, code_generation():
        return tvm.compile(tvm.IRModule({"kernel": tvm.ir.load_json(code.function)}), target=target)


def examine(
    models: Sequence[str], targets: Sequence[str], precisions: Sequence[str], limit: int | None = None
) -> Iterator[dict[str, Any]]:
    """One record a layer, target and precision; of each model the first ``limit`` layers."""
    layers = {layer.label: layer for model in models for layer in MODELS[model][:limit]}
    for target in targets:
        profile = load_profile(target)
        for precision in precisions:
            for layer in layers.values():
                workload, code = kernel_of(layer, precision, profile)
                loop = innermost(str(compiled(code, profile).mod.inspect_source("s")))
                if loop is None:
                    continue
                yield {
                    "target": target,
                    "precision": precision,
                    "layer": layer.label,
                    "workload": workload,
                    "instructions": len(loop.lines),
                    "multiplies": loop.multiplies,
                    "overhead": loop.overhead,
                    "busy": loop.busy(profile),
                    "assembly": loop.lines,
                }


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means and worst cases of each target and precision, beside what they have to be."""
    groups = dict.fromkeys((record["target"], record["precision"]) for record in records)
    made = []
    for target, precision in groups:
        mine = [r for r in records if (r["target"], r["precision"]) == (target, precision)]
        made.append(
            {
                "target": target,
                "precision": precision,
                "layers": len(mine),
                "busy": sum(r["busy"] for r in mine) / len(mine),
                "least_busy": min(r["busy"] for r in mine),
                "overhead": sum(r["overhead"] for r in mine) / len(mine),
                "bar": BARS[precision],
            }
        )
    return made


def sheets(records: Sequence[dict[str, Any]]) -> Iterator[Sheet]:
    """A table for each target and precision."""
    for found in summary(records):
        key = (found["target"], found["precision"])
        rows = [
            [r["layer"], str(r["instructions"]), str(r["multiplies"]), f"{r['overhead']:.2f}", f"{r['busy']:.0%}"]
            for r in records
            if (r["target"], r["precision"]) == key
        ]
        rows.append(["mean", "", "", f"{found['overhead']:.2f}", f"{found['busy']:.0%}"])
        yield Sheet(", ".join(key), ("layer", "instructions", "multiplies", "of one", "pipes busy"), rows)


def parser_for(script: str, description: str, precisions: Iterable[str]) -> argparse.ArgumentParser:
    """Options of a script that goes through layers of models for Arm processors.

    Args:
        script: Its name in this folder.
        description: Its docstring.
        precisions: What it looks at unless told otherwise.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{script}", description=description.split("\n")[0])
    parser.add_argument("--models", default="bert-base,resnet-50", metavar="NAMES", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--targets", default=",".join(TARGETS), metavar="NAMES", help="with commas (%(default)s)")
    parser.add_argument("--precision", default=",".join(precisions), metavar="NAMES", help="with commas (%(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="layers of each model at most")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables. Gives 7 when a mean misses what it has to be."""
    options = parser_for("arm", __doc__, BARS).parse_args(arguments)
    out = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    try:
        version = subprocess.run([predictor(), "--version"], capture_output=True, text=True, check=True).stdout
        models, targets, precisions = (
            words.split(",") for words in (options.models, options.targets, options.precision)
        )
        records = list(examine(models, targets, precisions, options.limit))
    except MmoptError as error:
        out.print(f"error: {error}", markup=False)
        return error.exit_code
    found = re.search(r"version (\S+)", version)
    out.print(f"llvm-mca {found[1] if found else '?'}, {ITERATIONS} iterations")
    for sheet in sheets(records):
        out.print(sheet.title)
        out.print(sheet.rich())
    means = summary(records)
    if options.json:
        text = json.dumps({"schema_version": SCHEMA_VERSION, "means": means, "loops": records}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")
    missed = [m for m in means if m["busy"] < m["bar"] or m["overhead"] > MOST]
    for mean in missed:
        out.print(f"MISSED: {mean['target']} {mean['precision']}: {mean['busy']:.0%} busy, {mean['overhead']:.2f}")
    return 7 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
