"""How long ``mmopt optimize --prune-to`` takes on a network of ten million parameters, and what comes out.

``python -m benchmarks.pruning_time FOLDER [--data ../shared/data] [--speedup 1.6] [--json FILE]``

The network is that of digits (``benchmarks.trained``) with wider layers, trained on the same real data for two minutes
or so; FOLDER keeps it. The whole command is timed from its start to its end in a process of its own: choosing units,
compiling and measuring, repairing on 256 unlabelled samples, looking at every modality alone, compiling the result and
checking it. Besides the time on the clock, the time of all its processors, which other work on the machine changes
little: half of it is the least that two cores can take. ``--prefix`` goes before the command (``taskset -c 0,1``).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

import mmopt
from benchmarks.trained import CALIBRATION, DigitData, Digits, save, train
from mmopt.bench import machine
from mmopt.errors import BackendError, MmoptError
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.runtime import load_artifact

Arrays = dict[str, np.ndarray[Any, Any]]

NAME = "wide-digits"
WIDTHS = {"width": 128, "heard": 640, "spelled": 512, "joined": 2048}
STEPS, RATE, BATCH, TESTED = 160, 1.5e-3, 32, 1000
SECONDS = 180.0
"""The bar, on two cores."""


def prepare(folder: pathlib.Path, data: pathlib.Path) -> None:
    """Train the wide network and write it with its data, unless it is there."""
    if (folder / f"{NAME}.test.npz").exists():
        return
    torch.manual_seed(0)
    network, source = Digits(**WIDTHS), DigitData(data, test=False, seed=0)
    print(f"train {NAME} …", file=sys.stderr, flush=True)
    train(network, iter(lambda: source.draw(BATCH), None), STEPS, RATE)
    calibration, _ = source.draw(CALIBRATION)
    test, labels = DigitData(data, test=True, seed=1).draw(TESTED)
    folder.mkdir(parents=True, exist_ok=True)
    save(folder, NAME, network, calibration, test, labels)


def parameters(module: Module) -> int:
    """Numbers in all weights."""
    tensors = (value.const_value for value in module.graph.initializers.values())
    return sum(tensor.size for tensor in tensors if tensor is not None and tensor.dtype.is_floating_point())


def right(run: Callable[[Arrays], Mapping[str, Any]], test: Arrays, labels: np.ndarray[Any, Any]) -> float:
    """Percent of the test that is decided as labelled."""
    size = 50
    parts = [{name: array[n : n + size] for name, array in test.items()} for n in range(0, len(labels), size)]
    found = np.concatenate([next(iter(run(part).values())).argmax(axis=1) for part in parts])
    return 100 * float((found == labels).mean())


def optimize(folder: pathlib.Path, speedup: float, prefix: str) -> tuple[pathlib.Path, dict[str, Any]]:
    """Run the command; returns what it wrote and what it took.

    Raises:
        BackendError: It failed.
    """
    result = folder / f"{NAME}.mmopt"
    shutil.rmtree(result, ignore_errors=True)
    program = [sys.executable, "-m", "mmopt.cli.main"]
    given = ["--prune-to", f"{speedup:g}x", "--calib", str(folder / f"{NAME}.calibration.npz")]
    command = [*shlex.split(prefix), *program, "optimize", str(folder / f"{NAME}.onnx"), "-o", str(result)]
    command += given
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise BackendError(f"the command failed: {done.stderr.strip()[-1000:]}", where=shlex.join(command))
    found = re.search(r"cutting ([\d.]+)% makes it ([\d.]+) times faster", done.stderr + done.stdout)
    took = {"seconds": seconds, "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}
    took |= {"share": float(found[1]) / 100, "speedup": float(found[2])} if found else {}
    return result, {**took, "told": (done.stderr + done.stdout).splitlines()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 7 when it takes longer than three minutes; the exit code of an error.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pruning_time", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"), metavar="FOLDER")
    parser.add_argument("--speedup", type=float, default=1.6, metavar="X")
    parser.add_argument("--prefix", default="", metavar="COMMAND", help="before the command that is timed")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        prepare(options.folder, options.data)
        original = mmopt.load(options.folder / f"{NAME}.onnx")
        result, row = optimize(options.folder, options.speedup, options.prefix)
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    test = dict(np.load(options.folder / f"{NAME}.test.npz"))
    labels = test.pop("labels")
    with ReferenceRunner() as runner, load_artifact(result) as session:
        row["right"] = [right(run, test, labels) for run in (runner.prepare(original), session.run)]
    row["parameters"] = parameters(original)
    print(machine.describe(machine.facts()))
    print("\n".join(line for line in row["told"] if not re.match(r"\w+ \[", line)))
    print(
        f"{row['parameters'] / 1e6:.1f} M parameters, {row.get('speedup', 0):.2f} times faster, "
        f"{row['right'][0]:.2f} → {row['right'][1]:.2f} % right; {row['seconds']:.0f} s on the clock, "
        f"{row['cpu_seconds']:.0f} s of all processors"
    )
    if options.json is not None:
        options.json.write_text(json.dumps({"schema_version": 1, "machine": machine.facts(), **row}, indent=1) + "\n")
    return 7 if row["seconds"] > SECONDS else 0


if __name__ == "__main__":
    sys.exit(main())
