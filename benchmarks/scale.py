"""How the exact rewrites scale: seconds over the number of nodes, and memory over the size of the weights.

    python -m benchmarks.scale --json out.json                    nodes only, under two minutes
    python -m benchmarks.scale --gigabytes 3 --json out.json      also a model of that size, through -O1 to ONNX

Two claims are checked, and a miss exits 7. A graph of 20,000 nodes passes -O1 (validation off) in 60 s, with time (of
the processor, so that other programs do not count) growing no faster than n log n from 2,000. A model with external
weights needs no more than 1.5 times its size in memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

import mmopt
from mmopt.bench import machine
from mmopt.frontends.onnx import load_onnx, save_onnx
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize import Canonicalize
from tests.scale import GraphBuilder, scale_model

SIZES = (2_000, 5_000, 10_000, 20_000)
SECONDS = 60.0
NOISE = 1.25
"""Timings on a shared machine vary by so much; growth beyond n log n times this is a miss."""
MEMORY_FACTOR = 1.5
_LINE = (
    "{nodes:>7} nodes, {after:>6} left: canonical form {canonicalize_s:.2f} s (CPU {canonicalize_cpu_s:.2f}),"
    " -O1 {o1_s:.2f} s (CPU {o1_cpu_s:.2f})"
)
_SIDE = 4096


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and judge.

    Returns:
        0, or 7 when a claim does not hold.
    """
    options = _parser().parse_args(arguments)
    facts = machine.facts()
    print(machine.describe(facts))
    report: dict[str, Any] = {"schema_version": 1, "machine": facts, "nodes": [], "size": None}
    for nodes in options.nodes:
        report["nodes"].append(_measure_nodes(nodes, options.repeats))
        print(_LINE.format(**report["nodes"][-1]))
    misses = _judge_nodes(report["nodes"])
    if options.gigabytes:
        report["size"] = _measure_size(options.gigabytes)
        print(
            "{gigabytes:.2f} GB model: peak {peak_gb:.2f} GB ({factor:.2f}×), {seconds:.1f} s".format(**report["size"])
        )
        if report["size"]["factor"] > MEMORY_FACTOR:
            misses.append(f"peak memory is {report['size']['factor']:.2f} times the model, limit {MEMORY_FACTOR}")
    report["misses"] = misses
    for miss in misses:
        print(f"missed: {miss}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 7 if misses else 0


def _measure_nodes(nodes: int, repeats: int) -> dict[str, Any]:
    """Best of ``repeats`` for one size, each on a graph of its own."""
    best: dict[str, Any] = {}
    for _ in range(repeats):
        module = Module(scale_model(nodes))
        row: dict[str, Any] = {"nodes": len(module.graph)}
        _, row["canonicalize_s"], row["canonicalize_cpu_s"] = _timed(Canonicalize().run, module, PassContext())
        module = Module(scale_model(nodes))
        result, row["o1_s"], row["o1_cpu_s"] = _timed(mmopt.optimize, module, level=1, validate="off", strict=True)
        row["after"] = len(result.module.graph)
        best = {key: min(value, best.get(key, value)) for key, value in row.items()}
    return best


def _timed(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, float, float]:
    """The result, seconds on the clock, and seconds of the processor."""
    gc.collect()
    clock, processor = time.perf_counter(), time.process_time()
    result = function(*arguments, **options)
    return result, time.perf_counter() - clock, time.process_time() - processor


def _judge_nodes(rows: Sequence[dict[str, Any]]) -> list[str]:
    misses = [f"{row['nodes']} nodes take {row['o1_s']:.1f} s" for row in rows if row["o1_s"] > SECONDS]
    first = rows[0]
    for row in rows[1:]:
        growth = row["nodes"] * math.log(row["nodes"]) / (first["nodes"] * math.log(first["nodes"]))
        for key in ("canonicalize_cpu_s", "o1_cpu_s"):
            if row[key] > NOISE * growth * first[key]:
                misses.append(
                    f"{key} grows {row[key] / first[key]:.1f} times to {row['nodes']} nodes, n log n {growth:.1f}"
                )
    return misses


def _measure_size(gigabytes: float) -> dict[str, Any]:
    """Load, optimize and save a large model in a process of its own, so that its peak is nobody else's."""
    with tempfile.TemporaryDirectory(prefix="mmopt-scale-") as folder:
        source = pathlib.Path(folder) / "large.onnx"
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            size = pool.apply(_write_large, (str(source), gigabytes))
        with context.Pool(1) as pool:
            seconds, peak = pool.apply(_optimize_file, (str(source), str(source.with_name("small.onnx"))))
    return {"gigabytes": size / 1e9, "peak_gb": peak / 1e9, "factor": peak / size, "seconds": seconds}


def _write_large(path: str, gigabytes: float) -> int:
    """A chain of matrix products; every second weight is stored transposed."""
    builder, random = GraphBuilder(), np.random.default_rng(0)
    x = ir.Value(name="x", shape=ir.Shape(["batch", _SIDE]), type=ir.TensorType(ir.DataType.FLOAT))
    count = max(1, round(gigabytes * 1e9 / (4 * _SIDE * _SIDE)))
    y = x
    data = pathlib.Path(path).with_suffix(".data")
    with data.open("wb") as file:
        for i in range(count):
            offset = file.tell()
            array = random.standard_normal((_SIDE, _SIDE), dtype=np.float32) / math.sqrt(_SIDE)
            file.write(array.tobytes())
            tensor = ir.ExternalTensor(
                data.name,
                offset,
                array.nbytes,
                ir.DataType.FLOAT,
                shape=ir.Shape(array.shape),
                name=f"w{i}",
                base_dir=data.parent,
            )
            weight = ir.Value(
                name=f"w{i}", shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor
            )
            builder.weights.append(weight)
            y = builder.op(
                "Tanh", builder.op("MatMul", y, builder.op("Transpose", weight, perm=[1, 0]) if i % 2 else weight)
            )
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", _SIDE])
    ir.save(builder.model([x], [y]), path)
    return pathlib.Path(path).stat().st_size + data.stat().st_size


def _optimize_file(source: str, target: str) -> tuple[float, int]:
    start = time.perf_counter()
    result = mmopt.optimize(load_onnx(source), level=1, strict=True, validate="off")
    save_onnx(result.module, target)
    return time.perf_counter() - start, machine.peak_memory()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--nodes", type=int, nargs="+", default=list(SIZES), help="numbers of nodes to measure")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each size; the best counts")
    parser.add_argument("--gigabytes", type=float, default=0.0, help="also measure memory on a model of this size")
    parser.add_argument("--json", type=pathlib.Path, help="write everything to this file")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
