"""Accuracy after pruning, on networks trained on real data: beside other ways to choose, and by speed-up.

``python -m benchmarks.pruning_accuracy FOLDER [--data ../shared/data] [--networks digits] [--parts choices,speed]``

FOLDER holds the networks of ``benchmarks.trained``, which are trained when missing. Parts:

*choices*: what is cut is chosen by mmopt, uniformly, at random, by the global magnitude of weights, or by Torch-Pruning
(``pip install torch-pruning``); the same multiply-accumulates go, the same least-squares repair on the same unlabelled
samples follows, and optionally the same distillation. Accuracy, and decisions as before: mean and range over seeds; the
same, and the error of the outputs, on samples of the training data, without labels, that nothing was fitted to.
*speed*: ``--prune-to`` by least squares alone and with distillation: measured time, accuracy, and how long it took.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import mmopt
from benchmarks.models import chosen
from benchmarks.trained import CALIBRATION, NETWORKS, DigitData, prepare, sentences
from mmopt.analysis.axes import find_groups
from mmopt.api import predictor
from mmopt.bench import machine
from mmopt.errors import MmoptError, UserError
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.pipeline.recipe import load_recipe
from mmopt.pruning import share_for_speedup
from mmopt.transforms.prune import PruneStructured, RepairLeastSquares, costs
from mmopt.transforms.prune.prune_structured import cut_units

Arrays = dict[str, np.ndarray[Any, Any]]
PARTS = ("choices", "speed")
SHARES = (0.5, 0.7)
SEEDS = 3
SAMPLES = 192
"""Samples that a seed draws from the calibration set."""

EPOCHS = 6.0
"""Of distillation, where it is asked for."""

UNLABELLED = 2048
"""Samples of the training data, without their labels, that distillation learns from where speed is measured."""

OTHERS = 1500
"""Samples of the training data, without their labels, to compare on what nothing was fitted to."""

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

    def logits(self, module: Module, feeds: Arrays, change: Callable[[Arrays], Arrays] = lambda feeds: feeds) -> Any:
        """What a module gives for each sample."""
        found: list[Any] = []
        size = 100
        with ReferenceRunner() as runner:
            run = runner.prepare(module)
            for start in range(0, len(next(iter(feeds.values()))), size):
                found += run(change({name: array[start : start + size] for name, array in feeds.items()})).values()
        return np.concatenate(found)

    def decisions(self, module: Module, change: Callable[[Arrays], Arrays] = lambda feeds: feeds) -> Any:
        """The class that a module decides for, by sample of the test set."""
        return self.logits(module, self.test, change).argmax(axis=1)

    def accuracy(self, module: Module, change: Callable[[Arrays], Arrays] = lambda feeds: feeds) -> float:
        """Percent of the test set that is right."""
        return 100 * float((self.decisions(module, change) == self.labels).mean())


def repaired(
    network: Network, module: Module, samples: Arrays, seed: int, *, distilled: bool, more: Arrays | None = None
) -> Module:
    """``module`` after the repair that all ways get; distillation learns from ``more`` where it is given."""
    RepairLeastSquares().run(module, PassContext(inputs=samples, seed=seed))
    if not distilled:
        return module
    from mmopt.training import Distillation, distill

    settings = Distillation(epochs=EPOCHS, seed=seed, classes=("logits",), rate=3e-4)
    return distill(module, network.module, more or samples, settings=settings).module


def unlabelled(network: Network, data: pathlib.Path) -> Arrays:
    """Inputs of the training data; what is kept for calibration, of networks that come trained."""
    if network.name == "digits":
        return DigitData(data, test=False, seed=5).draw(UNLABELLED)[0]
    if network.name == "polarity":
        arrays, _, test = sentences(data)
        return {name: array[~test][:UNLABELLED] for name, array in arrays.items()}
    return network.calibration


def others(network: Network, data: pathlib.Path) -> Arrays:
    """Inputs of the training data that are not kept for calibration; none of networks that come trained."""
    if network.name == "digits":
        return DigitData(data, test=False, seed=9).draw(OTHERS)[0]
    if network.name == "polarity":
        arrays, _, test = sentences(data)
        return {name: array[~test][CALIBRATION:][:OTHERS] for name, array in arrays.items()}
    return {}


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
    ways = {name: way for name, way in ways.items() if name in options.ways}
    rows = []
    judge = _Judge(network, others(network, options.data))
    print(f"\n{network.name}: {judge.right:.2f} % before")
    for share in options.shares:
        for name, way in ways.items():
            found: list[dict[str, float]] = []
            for seed in range(options.seeds):
                samples = network.drawn(seed)
                try:
                    cut = way(samples, seed, share)
                except MmoptError as error:
                    print(f"{share:.0%} {name}: {error.what}")
                    break
                found.append(judge(repaired(network, cut, samples, seed, distilled=options.distill)))
            if not found:
                continue
            columns = {key: [one[key] for one in found] for key in found[0]}
            rows.append({"network": network.name, "share": share, "way": name, **columns})
            texts = (
                f"{key} {statistics.mean(v):.{d}f} ({min(v):.{d}f}–{max(v):.{d}f})"
                for (key, v), d in zip(columns.items(), (2, 2, 2, 3), strict=False)
            )
            print(f"{share:.0%} {name:22} {', '.join(texts)}", flush=True)
    return rows


class _Judge:
    """Compares modules with a network as it was, in percent.

    Args:
        network: The network.
        others: Inputs that nothing was fitted to; none where there are none.

    Attributes:
        right: How much of the test set the network is right about.
    """

    def __init__(self, network: Network, others: Arrays) -> None:
        self._network, self._others = network, others
        self._before = network.decisions(network.module)
        self._wanted = network.logits(network.module, others) if others else None
        self.right = 100 * float((self._before == network.labels).mean())

    def __call__(self, module: Module) -> dict[str, float]:
        """Accuracy and decisions as before; on other inputs these, and the error, of the variance of the outputs."""
        after = self._network.decisions(module)
        found = {"accuracy": 100 * float((after == self._network.labels).mean())}
        found["same"] = 100 * float((after == self._before).mean())
        if self._wanted is not None:
            now, wanted = self._network.logits(module, self._others), self._wanted
            found["same elsewhere"] = 100 * float((now.argmax(axis=1) == wanted.argmax(axis=1)).mean())
            spread = ((wanted - wanted.mean(axis=0)) ** 2).sum()
            found["error elsewhere"] = 100 * float(((now - wanted) ** 2).sum() / spread)
        return found


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
        context = PassContext(inputs=network.calibration, predict=predictor("cpu"))
        module = network.module.clone()
        PruneStructured(share=f"{found.share:.4f}", measure="time").run(module, context)
        more = unlabelled(network, options.data) if distilled else None
        module = repaired(network, module, network.calibration, 0, distilled=distilled, more=more)
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
    ways = (*PASSES, *TORCH_PRUNING)
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways, metavar="WAY", help="; ".join(ways))
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N")
    parser.add_argument("--distill", action="store_true", help="distillation after least squares, for all choices")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args(arguments)
    functions = {"choices": choices, "speed": speed}
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
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
