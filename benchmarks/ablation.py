"""What each family of rewrites is worth in mmopt's own artifacts: every reference model with one family left out.

``python -m benchmarks.ablation [--models bert-base,…] [--json FILE]``

A variant is compiled for each family of passes of ``-O2`` (all its passes left out of the recipe), and all variants of
a model take turns with the full artifact on the same inputs. Canonicalization is no variant: the rest builds on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence

import mmopt
from benchmarks.models import TOLERANCES, chosen
from benchmarks.zoo import ZOO, ZooModel
from mmopt.bench import machine
from mmopt.bench.measure import Plan
from mmopt.bench.peers import Spec
from mmopt.bench.record import Report
from mmopt.bench.run import Options, benchmark
from mmopt.bench.stats import geometric_mean
from mmopt.errors import MmoptError
from mmopt.pipeline.recipe import Recipe, load_recipe
from mmopt.pipeline.registry import all_passes
from mmopt.runtime.cpu import default_threads

FULL = "full"
ALWAYS = ("canonicalize",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 5 when an answer was wrong; the exit code of an error.
    """
    options = _parser().parse_args(arguments)
    try:
        names = chosen(options.models, ZOO, "--models")
        print(machine.describe(machine.facts()), flush=True)
        with tempfile.TemporaryDirectory(prefix="mmopt-ablation-") as folder:
            work = options.work or pathlib.Path(folder)
            reports = {name: measure(ZOO[name], options, work) for name in names if not ZOO[name].missing()}
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for line in summary(reports):
        print(line)
    if options.json is not None:
        runs = {name: report.to_json() for name, report in reports.items()}
        content = {"schema_version": 1, "kind": "mmopt-ablation", "machine": machine.facts(), "models": runs}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 5 if any(report.disagreements for report in reports.values()) else 0


def families() -> list[str]:
    """Families of the passes of ``-O2`` that can be left out."""
    known = all_passes()
    used = dict.fromkeys(known[pass_.name].family for phase in load_recipe("o2").phases for pass_ in phase.passes)
    return [family for family in used if family not in ALWAYS]


def without(family: str) -> Recipe:
    """``-O2`` with the passes of one family left out; what is in no family stays."""
    recipe, known = load_recipe("o2"), all_passes()
    phases = [
        dataclasses.replace(phase, passes=tuple(p for p in phase.passes if known[p.name].family != family))
        for phase in recipe.phases
    ]
    return dataclasses.replace(recipe, phases=tuple(phase for phase in phases if phase.passes))


def measure(model: ZooModel, options: argparse.Namespace, work: pathlib.Path) -> Report:
    """Compile and measure all variants of one model.

    Raises:
        BackendError: A variant cannot be compiled or run.
    """
    source = model.export(work / "models", batch=1)
    recipes: dict[str, Recipe | None] = {FULL: None, **{f"without {family}": without(family) for family in families()}}
    specs = []
    for label, recipe in recipes.items():
        print(f"{model.name}: {label} …", file=sys.stderr, flush=True)
        artifact = work / "artifacts" / f"{model.name}-{label.replace(' ', '-')}.mmopt"
        artifact.parent.mkdir(parents=True, exist_ok=True)
        if not (options.reuse and artifact.exists()):
            module = mmopt.load(source)
            optimized = mmopt.optimize(module, recipe=recipe, validate="end").module
            mmopt.compile(optimized, output=artifact, reference=module, entries={})
        specs.append(Spec("mmopt", label, str(artifact), options.threads))
    plan = Options(Plan(options.rounds, options.time), 1, tolerance=TOLERANCES["fp32"])
    return benchmark(specs, model.inputs(1), plan, inputs_from="the zoo")


def summary(reports: dict[str, Report]) -> list[str]:
    """A table of times over the full artifact's: above 1 the family makes the model faster."""
    labels = [f"without {family}" for family in families()]
    lines = [f"| model | {' | '.join((FULL, *labels))} |", f"|{' --- |' * (len(labels) + 2)}"]
    columns: dict[str, list[float]] = {label: [] for label in labels}
    for name, report in reports.items():
        full = next(result.summary()["p50_ms"] for result in report.results if result.label == FULL)
        ratios = {label: report.ratios()[label].value for label in labels}
        for label, value in ratios.items():
            columns[label].append(value)
        lines.append(f"| {name} | {full:.3g} ms | {' | '.join(f'{value:.2f}×' for value in ratios.values())} |")
    means = (f"{geometric_mean(values):.2f}×" if values else "–" for values in columns.values())
    return [*lines, f"| geometric mean | | {' | '.join(means)} |"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="", metavar="NAMES", help="with commas; default: the whole zoo")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of every variant (%(default)s)")
    parser.add_argument("--rounds", type=int, default=Plan.rounds, help="turns of every variant (%(default)s)")
    parser.add_argument("--time", type=float, default=Plan.seconds, metavar="SECONDS", help="measured (%(default)s)")
    parser.add_argument("--work", type=pathlib.Path, metavar="FOLDER", help="keep exports and artifacts there")
    parser.add_argument("--reuse", action="store_true", help="take the artifacts that --work holds already")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
