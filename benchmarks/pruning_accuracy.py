"""Accuracy after pruning, on networks trained on real data: beside other ways to choose, by speed-up, and by modality.

``python -m benchmarks.pruning_accuracy FOLDER [--data ../shared/data] [--networks digits] [--parts choices,speed]``

FOLDER holds the networks of ``benchmarks.trained``, which are trained when missing. Parts:

*choices*: what is cut is chosen by mmopt, uniformly, at random, by the global magnitude of weights, or by Torch-Pruning
(``pip install torch-pruning``); the same multiply-accumulates go, the same least-squares repair on the same unlabelled
samples follows, and optionally the same distillation. Accuracy, and decisions as before: mean and range over seeds.
*speed*: ``--prune-to`` by least squares alone and with distillation: measured time, accuracy, and how long it took.
*modalities*: half of the three-modal network goes; accuracy with one modality alone, the others blank. *latency*:
predicted against measured time of models cut by various shares, with a plot (``--plot FILE.svg``).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import mmopt
from benchmarks.models import chosen
from benchmarks.trained import NETWORKS, prepare
from mmopt.analysis.axes import find_groups
from mmopt.bench import machine
from mmopt.errors import MmoptError, UserError
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.pipeline.recipe import load_recipe
from mmopt.pruning import share_for_speedup
from mmopt.transforms.prune import PruneStructured, RepairLeastSquares, costs
from mmopt.transforms.prune.modalities import Blanks
from mmopt.transforms.prune.observing import batches_of
from mmopt.transforms.prune.prune_structured import cut_units

Arrays = dict[str, np.ndarray[Any, Any]]
PARTS = ("choices", "speed", "modalities", "latency")
SHARES = (0.5, 0.7)
SEEDS = 3
SAMPLES = 192
"""Samples that a seed draws from the calibration set."""

EPOCHS = 6.0
"""Of distillation, where it is asked for."""

PASSES: dict[str, dict[str, Any]] = {
    "mmopt": {},
    "uniform, L2": {"criterion": "magnitude", "compare": "uniform"},
    "uniform, random": {"criterion": "random", "compare": "uniform"},
    "global, L2": {"criterion": "magnitude", "compare": "global", "tower_floor": 0.0},
}
TORCH_PRUNING = {"Torch-Pruning, L2": "l2", "Torch-Pruning, Taylor": "taylor"}


@dataclasses.dataclass
class Network:
    """A trained network, rewritten but not fused.

    Attributes:
        name: ``digits`` or ``polarity``.
        path: The ONNX file.
        module: The rewritten module.
        calibration: Unlabelled samples.
        test: Inputs of the test set.
        labels: Its labels.
    """

    name: str
    path: pathlib.Path
    module: Module
    calibration: Arrays
    test: Arrays
    labels: np.ndarray[Any, Any]

    @classmethod
    def load(cls, folder: pathlib.Path, name: str) -> Network:
        """Read what ``benchmarks.trained`` wrote."""
        path = folder / f"{name}.onnx"
        recipe = load_recipe("o2")
        phases = tuple(phase for phase in recipe.phases if phase.name != "fuse")
        module = mmopt.optimize(mmopt.load(path), recipe=dataclasses.replace(recipe, phases=phases)).module
        calibration, test = (dict(np.load(folder / f"{name}.{part}.npz")) for part in ("calibration", "test"))
        labels = test.pop("labels")
        return cls(name, path, module, calibration, test, labels)

    def drawn(self, seed: int) -> Arrays:
        """Samples of one seed."""
        count = len(next(iter(self.calibration.values())))
        places = np.random.default_rng(seed).permutation(count)[:SAMPLES]
        return {name: array[places] for name, array in self.calibration.items()}

    def decisions(self, module: Module, change: Callable[[Arrays], Arrays] = lambda feeds: feeds) -> Any:
        """The class that a module decides for, by sample of the test set."""
        found, size = [], 100
        with ReferenceRunner() as runner:
            run = runner.prepare(module)
            for start in range(0, len(self.labels), size):
                feeds = change({name: array[start : start + size] for name, array in self.test.items()})
                (logits,) = run(feeds).values()
                found.append(logits.argmax(axis=1))
        return np.concatenate(found)

    def accuracy(self, module: Module, change: Callable[[Arrays], Arrays] = lambda feeds: feeds) -> float:
        """Percent of the test set that is right."""
        return 100 * float((self.decisions(module, change) == self.labels).mean())


def repaired(network: Network, module: Module, samples: Arrays, seed: int, *, distilled: bool) -> Module:
    """``module`` after the repair that all ways get."""
    RepairLeastSquares().run(module, PassContext(inputs=samples, seed=seed))
    if not distilled:
        return module
    from mmopt.training import Distillation, distill

    settings = Distillation(epochs=EPOCHS, seed=seed, classes=("logits",), rate=3e-4)
    return distill(module, network.module, samples, settings=settings).module


def by_pass(network: Network, samples: Arrays, seed: int, share: float, options: dict[str, Any]) -> Module:
    """The network cut by ``prune-structured``."""
    module = network.module.clone()
    PruneStructured(share=f"{share:.4f}", **options).run(module, PassContext(inputs=samples, seed=seed))
    return module


def by_torch_pruning(network: Network, samples: Arrays, seed: int, share: float, criterion: str) -> Module:
    """The network with what Torch-Pruning chooses cut."""
    from benchmarks.pruning_peers.choices import by_torch_pruning as choose

    module = network.module.clone()
    groups = find_groups(module)
    usable = [group for group in groups if not group.frozen]
    cost = costs.macs(module, usable, costs.owners(module), costs.binding_of(module, samples))
    keep = choose(network.name, network.path, usable, samples, cost, cost.total() * (1 - share), criterion, seed)
    if not keep:
        raise UserError("Torch-Pruning does not get there with what it can cut")
    cut_units(module, groups, keep)
    return module


def choices(network: Network, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy by way of choosing and share."""
    ways: dict[str, Callable[[Arrays, int, float], Module]] = {
        name: lambda samples, seed, share, given=given: by_pass(network, samples, seed, share, given)
        for name, given in PASSES.items()
    }
    for name, criterion in TORCH_PRUNING.items():
        ways[name] = lambda samples, seed, share, c=criterion: by_torch_pruning(network, samples, seed, share, c)
    rows = []
    before = network.decisions(network.module)
    print(f"\n{network.name}: {100 * (before == network.labels).mean():.2f} % before")
    for share in options.shares:
        for name, way in ways.items():
            found: list[tuple[float, float]] = []
            for seed in range(options.seeds):
                samples = network.drawn(seed)
                try:
                    cut = way(samples, seed, share)
                except MmoptError as error:
                    print(f"{share:.0%} {name}: {error.what}")
                    break
                module = repaired(network, cut, samples, seed, distilled=options.distill)
                after = network.decisions(module)
                found.append((100 * (after == network.labels).mean(), 100 * (after == before).mean()))
            if not found:
                continue
            accuracy, same = zip(*found, strict=True)
            rows.append({"network": network.name, "share": share, "way": name, "accuracy": accuracy, "same": same})
            texts = [f"{statistics.mean(v):6.2f} ({min(v):.2f}–{max(v):.2f})" for v in (accuracy, same)]
            print(f"{share:.0%} {name:22} accuracy {texts[0]}, decides as before {texts[1]}", flush=True)
    return rows


def speed(network: Network, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Speed-up, accuracy and time taken."""
    rows = []
    before = network.accuracy(network.module)
    inputs = {name: array[:1] for name, array in network.test.items()}
    for wanted, distilled in ((1.6, False), (2.0, True)):
        started = time.perf_counter()
        found = share_for_speedup(
            mmopt.load(network.path), wanted, inputs=inputs, samples=network.calibration, validate="off"
        )
        context = PassContext(inputs=network.calibration, predict=_predictor())
        module = network.module.clone()
        PruneStructured(share=f"{found.share:.4f}", measure="time").run(module, context)
        module = repaired(network, module, network.calibration, 0, distilled=distilled)
        seconds = time.perf_counter() - started
        row = {"network": network.name, "wanted": wanted, "distilled": distilled, "share": found.share}
        row |= {"speedup": found.speedup, "milliseconds": [1e3 * found.before, 1e3 * found.after]}
        row |= {"accuracy": [before, network.accuracy(module)], "seconds": seconds}
        rows.append(row)
        how = "least squares + distillation" if distilled else "least squares"
        times = f"{1e3 * found.before:.3f} → {1e3 * found.after:.3f} ms"
        accuracy = f"accuracy {before:.2f} → {row['accuracy'][1]:.2f} %"
        print(f"{network.name} {how:28} {found.speedup:.2f}× ({times}), {accuracy}, {seconds:.0f} s", flush=True)
    return rows


def modalities(network: Network, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy with one modality alone, at half of the multiply-accumulates."""
    blanks = Blanks(network.module, batches_of(network.module, network.calibration))
    rows = []
    for name, given in {"before": None, "mmopt": {}, "global magnitude": PASSES["global, L2"]}.items():
        module = network.module
        if given is not None:
            module = by_pass(network, network.calibration, 0, 0.5, given)
            module = repaired(network, module, network.calibration, 0, distilled=False)
        alone = {tower: network.accuracy(module, lambda f, t=tower: blanks.alone(f, t)) for tower in blanks.towers}
        rows.append({"network": network.name, "way": name, "all": network.accuracy(module), "alone": alone})
        parts = ", ".join(f"{tower} {value:.1f}" for tower, value in alone.items())
        print(f"{network.name} {name:18} all {rows[-1]['all']:.2f}; alone: {parts}", flush=True)
    return rows


def _predictor() -> Callable[[Module], float]:
    from mmopt.backends.profile import load_profile
    from mmopt.lowering.prediction import predicted_cycles

    profile = load_profile("cpu")
    return lambda module: predicted_cycles(module, profile)


def latency(network: Network, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Predicted against measured time; the prediction is set right once, by the network as it is."""
    from mmopt.transforms.prune.latency import latency as model_of

    groups = [group for group in find_groups(network.module) if not group.frozen]
    binding = costs.binding_of(network.module, network.calibration)
    model = model_of(network.module, groups, costs.owners(network.module), _predictor(), binding)
    inputs = {name: array[:1] for name, array in network.test.items()}
    random = np.random.default_rng(0)
    sizes = [{group.name: group.units for group in groups}]
    for share in np.linspace(0.15, 0.75, options.points):
        tilt = {group.name: float(np.clip(1 - share + random.uniform(-0.2, 0.2), 0.2, 1)) for group in groups}
        step = {group.name: 16 if group.units >= 64 else 8 if group.units >= 32 else 1 for group in groups}
        sizes.append({g.name: max(1, round(g.units * tilt[g.name] / step[g.name]) * step[g.name]) for g in groups})
    modules = []
    for one in sizes:
        module = network.module.clone()
        keep = {g.name: range(one[g.name]) for g in groups if one[g.name] < g.units}
        if keep:
            cut_units(module, find_groups(module), keep)
        modules.append(mmopt.optimize(module, recipe=load_recipe("o2"), validate="off").module)
    times = measured(modules, inputs)
    factor = times[0] / model.total(sizes[0])
    rows = [
        {"network": network.name, "predicted": 1e3 * factor * model.total(one), "measured": 1e3 * spent}
        for one, spent in zip(sizes, times, strict=True)
    ]
    off = [abs(row["predicted"] / row["measured"] - 1) for row in rows[1:]]
    print(f"{network.name}: predicted times are off by {statistics.median(off):.1%} (median), {max(off):.1%} (most)")
    return rows


def measured(modules: Sequence[Module], inputs: Arrays) -> list[float]:
    """Median seconds of a run of each, compiled, in turns."""
    from mmopt.autotune.contest import TURNS, compiled, repeats_of, turn
    from mmopt.backends.cpu.choosing import Chooser
    from mmopt.backends.profile import load_profile

    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mmopt-latency-")))
        sides = [
            stack.enter_context(compiled(module, load_profile("cpu"), Chooser(), folder / f"{number}.mmopt", 2))
            for number, module in enumerate(modules)
        ]
        repeats = [max(1, repeats_of(side, inputs) // 3) for side in sides]
        times: list[list[float]] = [[] for _ in sides]
        for _ in range(TURNS // 2):
            for spent, side, count in zip(times, sides, repeats, strict=True):
                spent.append(turn(side, inputs, count))
    return [statistics.median(spent) for spent in times]


def plot(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Predicted against measured, as SVG, with lines 15 % to either side."""
    top = 1.05 * max(max(row["predicted"], row["measured"]) for row in rows)
    size, edge = 420, 50

    def x(value: float) -> float:
        return round(edge + value / top * size, 1)

    def y(value: float) -> float:
        return round(edge / 2 + size - value / top * size, 1)

    size_of = f'viewBox="0 0 {size + edge + 110} {size + edge + 25}" font-family="sans-serif" font-size="12"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size_of}>']
    parts.append(f'<rect x="{edge}" y="{edge / 2}" width="{size}" height="{size}" fill="white" stroke="#999"/>')
    for slope, dash in ((1.0, "none"), (0.85, "4"), (1.15, "4")):
        end = top / max(slope, 1)
        ends = f'x1="{x(0)}" y1="{y(0)}" x2="{x(end)}" y2="{y(end * slope)}"'
        parts.append(f'<line {ends} stroke="#999" stroke-dasharray="{dash}"/>')
    colors = dict(zip(dict.fromkeys(row["network"] for row in rows), ("#1f77b4", "#d62728", "#2ca02c"), strict=False))
    for row in rows:
        place = f'cx="{x(row["measured"])}" cy="{y(row["predicted"])}"'
        parts.append(f'<circle {place} r="3.5" fill="{colors[row["network"]]}"/>')
    for number, (name, color) in enumerate(colors.items()):
        left, line = size + edge + 14, edge + 20 * number
        parts.append(f'<circle cx="{left}" cy="{line - 4}" r="4" fill="{color}"/>')
        parts.append(f'<text x="{left + 10}" y="{line}">{name}</text>')
    for step in range(5):
        value = top * step / 4
        parts.append(f'<text x="{x(value)}" y="{size + edge / 2 + 16}" text-anchor="middle">{value:.2f}</text>')
        parts.append(f'<text x="{edge - 6}" y="{y(value) + 4}" text-anchor="end">{value:.2f}</text>')
    middle = edge / 2 + size / 2
    parts.append(f'<text x="{edge + size / 2}" y="{size + edge + 10}" text-anchor="middle">measured, ms</text>')
    turn = f'text-anchor="middle" transform="rotate(-90 12 {middle})"'
    parts.append(f'<text x="12" y="{middle}" {turn}>predicted, ms</text>')
    path.write_text("\n".join([*parts, "</svg>", ""]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; the exit code of an error.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pruning_accuracy", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"), metavar="FOLDER")
    parser.add_argument("--networks", default="", metavar="NAMES", help="with commas; default: all")
    parser.add_argument("--parts", default="", metavar="NAMES", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, metavar="SHARE", help="of MACs to cut")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N")
    parser.add_argument("--points", type=int, default=10, metavar="N", help="models to measure for latency")
    parser.add_argument("--distill", action="store_true", help="distillation after least squares, for all choices")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE.svg")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args(arguments)
    functions = {"choices": choices, "speed": speed, "modalities": modalities, "latency": latency}
    results: dict[str, Any] = {"schema_version": 1, "machine": machine.facts()}
    try:
        networks = []
        for name in chosen(options.networks, NETWORKS, "--networks"):
            prepare(name, options.folder, options.data)
            networks.append(Network.load(options.folder, name))
        for part in chosen(options.parts, functions, "--parts"):
            results[part] = [row for network in networks for row in functions[part](network, options)]
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.plot is not None and "latency" in results:
        plot(results["latency"], options.plot)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
