"""What pruning does to each modality of a fused network, beside global magnitude.

``python -m benchmarks.pruning_modalities FOLDER [--data ../shared/data] [--json FILE]``

The network of digits (``benchmarks.trained``) is trained a little further, with modalities missing at random, so that
each tower alone decides something. Then 50 % and 80 % of it go, of its multiply-accumulates or of its weights, as mmopt
chooses and by the global magnitude of weights. Accuracy with everything, and with each modality alone, the others
blank: after the cut alone, which is what pruning by magnitude means elsewhere, and after the same least-squares repair.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.pruning_accuracy import PASSES, Arrays, Network, by_pass, repaired
from benchmarks.pruning_peers.choices import torch_network
from benchmarks.trained import CALIBRATION, DigitData, prepare, save, train
from mmopt.errors import MmoptError
from mmopt.transforms.prune.modalities import Blanks
from mmopt.transforms.prune.observing import batches_of

NAME = "robust-digits"
STEPS, RATE, BATCH = 150, 1e-3, 64
MISSING = 1 / 3
SHARES = (0.5, 0.8)
MEASURES = ("macs", "parameters")
WAYS: dict[str, dict[str, Any]] = {"mmopt": {}, "global magnitude": PASSES["global, L2"]}


def prepare_robust(folder: pathlib.Path, data: pathlib.Path) -> None:
    """Train the network of digits on with modalities missing, unless that was done."""
    if (folder / f"{NAME}.test.npz").exists():
        return
    prepare("digits", folder, data)
    torch.manual_seed(0)
    network, source = torch_network("digits", folder / "digits.onnx"), DigitData(data, test=False, seed=2)
    calibration, _ = source.draw(CALIBRATION)
    blank = {name: _typical(array) for name, array in calibration.items()}
    random = np.random.default_rng(0)

    def batch() -> tuple[Arrays, np.ndarray[Any, Any]]:
        arrays, labels = source.draw(BATCH)
        missing = random.random((BATCH, len(arrays))) < MISSING
        missing[missing.all(axis=1), random.integers(len(arrays))] = False
        for place, (name, array) in enumerate(arrays.items()):
            array[missing[:, place]] = blank[name]
        return arrays, labels

    train(network, iter(batch, None), STEPS, RATE)
    test, labels = DigitData(data, test=True, seed=1).draw(2000)
    save(folder, NAME, network, calibration, test, labels)


def _typical(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What stands for a missing modality: the mean of floats, what is most frequent of integers."""
    if array.dtype.kind == "f":
        return np.asarray(array.mean(axis=0))
    return np.array([np.bincount(column).argmax() for column in array.T])


def compare(network: Network, shares: Sequence[float], measures: Sequence[str]) -> list[dict[str, Any]]:
    """Accuracy with all modalities and with each alone, whole and pruned."""
    blanks = Blanks(network.module, batches_of(network.module, network.calibration))

    def row(way: str, what: str, module: Any) -> dict[str, Any]:
        alone = {t: network.accuracy(module, lambda feeds, t=t: blanks.alone(feeds, t)) for t in blanks.towers}
        parts = ", ".join(f"{tower} {value:.2f}" for tower, value in alone.items())
        found = {"way": way, "cut": what, "all": network.accuracy(module), "alone": alone}
        print(f"{way:18} {what:24} all {found['all']:.2f}; alone: {parts}", flush=True)
        return found

    rows = [row("before", "", network.module)]
    for share, measure in itertools.product(shares, measures):
        for way, given in WAYS.items():
            module = by_pass(network, network.calibration, 0, share, {**given, "measure": measure})
            rows.append(row(way, f"{share:.0%} {measure}, cut", module))
            module = repaired(network, module, network.calibration, 0, distilled=False)
            rows.append(row(way, f"{share:.0%} {measure}, repaired", module))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; the exit code of an error.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pruning_modalities", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"), metavar="FOLDER")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, metavar="SHARE")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=MEASURES)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        prepare_robust(options.folder, options.data)
        rows = compare(Network.load(options.folder, NAME), options.shares, options.measures)
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
