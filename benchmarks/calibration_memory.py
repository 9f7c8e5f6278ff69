"""Peak memory of calibrating, by number of samples: it must not grow with them.

``python -m benchmarks.calibration_memory [--model bert-base] [--samples 64,512] [--json FILE]``

Each count runs in a process of its own, which prints the largest resident size it has had. Samples take memory too,
being read from a file as a whole: a few kilobytes each for text.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import mmopt
from benchmarks.models import chosen
from benchmarks.zoo import ZOO
from mmopt.analysis.calibration import collect
from mmopt.bench import machine
from mmopt.errors import BackendError, MmoptError

LIMIT, GROWTH = 3e9, 1.1
"""Most bytes, and the most that the largest number of samples may take of what the smallest does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 7 when a bound is missed; the exit code of an error.
    """
    options = _parser().parse_args(arguments)
    if options.measure:
        source, samples = options.measure
        print(json.dumps(measure(pathlib.Path(source), pathlib.Path(samples), options.threads)))
        return 0
    try:
        (name,) = chosen(options.model, ZOO, "--model")
        counts = sorted(int(count) for count in options.samples.split(","))
        print(machine.describe(machine.facts()), flush=True)
        with tempfile.TemporaryDirectory(prefix="mmopt-calibration-") as folder:
            work = options.work or pathlib.Path(folder)
            rows = [run(name, count, work, options.threads) for count in counts]
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    grown = rows[-1]["peak_bytes"] / rows[0]["peak_bytes"]
    print(f"peak with {counts[-1]} samples is {grown:.2f} of that with {counts[0]}")
    if options.json is not None:
        content = {"schema_version": 1, "kind": "mmopt-calibration-memory", "model": name, "rows": rows}
        options.json.write_text(json.dumps({**content, "machine": machine.facts()}, indent=1) + "\n")
    return 7 if grown > GROWTH or any(row["peak_bytes"] > LIMIT for row in rows) else 0


def run(name: str, count: int, work: pathlib.Path, threads: int) -> dict[str, Any]:
    """Calibrate on ``count`` seeded samples in a process of its own.

    Raises:
        BackendError: It failed.
    """
    source = ZOO[name].export(work / "models")
    samples = work / f"{name}-{count}.npz"
    each = [ZOO[name].inputs(1, seed=seed) for seed in range(count)]
    np.savez(samples, **{key: np.stack([one[key] for one in each]) for key in each[0]})  # type: ignore[arg-type]
    command = [sys.executable, "-m", __spec__.name, "--threads", str(threads), "--measure", str(source), str(samples)]
    done = subprocess.run(command, capture_output=True, text=True)
    samples.unlink()
    if done.returncode:
        raise BackendError(f"calibrating failed: {done.stderr.strip()[-1000:]}", where=name)
    row = {"samples": count, **json.loads(done.stdout.splitlines()[-1])}
    print(f"{name}: {count} samples, {row['tensors']} tensors: peak {row['peak_bytes'] / 1e9:.2f} GB, "
          f"{row['seconds']:.0f} s", flush=True)  # fmt: skip
    return row


def measure(source: pathlib.Path, samples: pathlib.Path, threads: int) -> dict[str, Any]:
    """Calibrate in this process."""
    module = mmopt.load(source)
    with np.load(samples) as arrays:
        given = dict(arrays)
    start = time.monotonic()
    found = collect(module, given, threads=threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tensors": len(found.tensors), "peak_bytes": peak, "seconds": time.monotonic() - start}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration_memory", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", default="bert-base", metavar="NAME", help="one of the zoo (%(default)s)")
    parser.add_argument("--samples", default="64,512", metavar="COUNTS", help="with commas (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of the reference runtime; 0 for all cores")
    parser.add_argument("--work", type=pathlib.Path, metavar="FOLDER", help="keep the export there")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
