"""LSTM and GRU in integers: mmopt's artifacts in fp32 and int8 beside onnxruntime and OpenVINO, in turns.

Single layers with weights as torch draws them. mmopt int8 is what ``quantize-static`` makes of them, whether it would
choose to or not: states and inputs in 8 bits, sums of 32, gates in float32. onnxruntime's int8 is its own
``quantize_dynamic``, which finds the ranges of inputs at run time and covers LSTM only. The last column is the root
mean square error of all states, of their standard deviation, against onnxruntime in float.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

import mmopt
from benchmarks.models import chosen
from mmopt.bench import machine
from mmopt.bench.measure import Plan
from mmopt.bench.peers import Spec, open_contender
from mmopt.bench.record import Report
from mmopt.bench.render import Sheet, quantity
from mmopt.bench.run import Options, benchmark
from mmopt.errors import MmoptError
from mmopt.runtime.cpu import default_threads
from mmopt.transforms.quantize import QuantizeStatic

SCHEMA_VERSION = 1
TOLERANCE = 0.25
"""Largest difference allowed between two answers, of the range: a wrong kernel differs more."""

GATES = {"LSTM": 4, "GRU": 3}
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A recurrent layer."""

    op: str
    steps: int
    batch: int
    depth: int
    hidden: int
    directions: int = 1

    def inputs(self, seed: int) -> Arrays:
        """Seeded inputs."""
        data = np.random.default_rng(seed).standard_normal((self.steps, self.batch, self.depth))
        return {"x": data.astype(np.float32)}

    def model(self) -> onnx.ModelProto:
        """As ONNX; GRU with the reset behind the product, as torch has it."""
        random, bound, rows = np.random.default_rng(0), self.hidden**-0.5, GATES[self.op] * self.hidden
        shapes = {"w": (rows, self.depth), "r": (rows, self.hidden), "b": (2 * rows,)}
        weights = {
            name: random.uniform(-bound, bound, (self.directions, *shape)).astype(np.float32)
            for name, shape in shapes.items()
        }
        attributes: dict[str, Any] = {"linear_before_reset": 1} if self.op == "GRU" else {}
        attributes["direction"] = "bidirectional" if self.directions == 2 else "forward"
        node = helper.make_node(
            self.op, ["x", *weights], ["y"], name="layer", hidden_size=self.hidden, **attributes
        )  # fmt: skip
        shape_in = (self.steps, self.batch, self.depth)
        shape_out = (self.steps, self.directions, self.batch, self.hidden)
        graph = helper.make_graph(
            [node],
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape_in)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape_out)],
            [numpy_helper.from_array(array, name) for name, array in weights.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


LAYERS = {
    "bilstm-256": Layer("LSTM", 100, 1, 256, 256, 2),
    "bilstm-256-b16": Layer("LSTM", 100, 16, 256, 256, 2),
    "bigru-256": Layer("GRU", 100, 1, 256, 256, 2),
    "bigru-256-b16": Layer("GRU", 100, 16, 256, 256, 2),
    "lstm-1024": Layer("LSTM", 20, 1, 1024, 1024),
    "digits-lstm": Layer("LSTM", 32, 1, 128, 96, 2),
    "digits-gru": Layer("GRU", 8, 1, 32, 64),
    "silero-lstm": Layer("LSTM", 1, 1, 128, 128),
}
"""The last three have the sizes of the network of digits and of silero-vad."""

CONTENDERS = {
    "mmopt int8": ("mmopt", "int8.mmopt"),
    "mmopt fp32": ("mmopt", "float.mmopt"),
    "onnxruntime int8": ("onnxruntime", "dynamic.onnx"),
    "onnxruntime fp32": ("onnxruntime", "float.onnx"),
    "openvino fp32": ("openvino", "float.onnx"),
}
"""Runtime and file of each contender by its name in the table."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 5 when answers are further apart than :data:`TOLERANCE`; the exit code of an error.
    """
    options = _parser().parse_args(arguments)
    try:
        names = chosen(options.layers, LAYERS, "--layers")
        contenders = chosen(options.contenders, CONTENDERS, "--contenders")
        print(machine.describe(machine.facts()), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            work = options.folder or pathlib.Path(folder)
            made = {name: list(specs(name, work / name, contenders, options.threads)) for name in names}
            if options.prepare:
                return 0
            reports = {name: measure(LAYERS[name], made[name], options) for name in names}
            errors = {name: deviations(LAYERS[name], made[name]) for name in names}
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
    table = sheet(reports, errors)
    console.print(table.title)
    console.print(table.rich())
    if options.json is not None:
        runs = {name: report.to_json() for name, report in reports.items()}
        content = {"schema_version": SCHEMA_VERSION, "kind": "mmopt-recurrence", "layers": runs, "errors": errors}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 5 if any(report.disagreements for report in reports.values()) else 0


def specs(name: str, folder: pathlib.Path, contenders: Sequence[str], threads: int) -> Iterator[Spec]:
    """Make what the contenders run, unless it is there."""
    layer = LAYERS[name]
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "float.onnx"
    if not source.exists():
        onnx.save(layer.model(), source)
    for label in contenders:
        kind, file = CONTENDERS[label]
        if label == "onnxruntime int8" and layer.op != "LSTM":
            continue
        if not (folder / file).exists():
            print(f"{name}: {file} …", file=sys.stderr, flush=True)
            _make(layer, source, folder / file)
        yield Spec(kind, label, str(folder / file), threads, "fp32")


def _make(layer: Layer, source: pathlib.Path, target: pathlib.Path) -> None:
    if target.suffix == ".onnx":
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(source, target, op_types_to_quantize=["LSTM"], per_channel=True)
        return
    samples = {"x": np.stack([layer.inputs(seed)["x"] for seed in range(1, 5)])}
    passes = [QuantizeStatic(recurrent_work=0)] if target.name.startswith("int8") else []
    result = mmopt.optimize(mmopt.load(source), passes=passes, samples=samples, validate="off")
    mmopt.compile(result.module, output=target, entries={}, inputs=layer.inputs(0), tolerance=TOLERANCE)


def measure(layer: Layer, made: Sequence[Spec], options: argparse.Namespace) -> Report:
    """Take turns on one input."""
    plan = Plan(options.rounds, options.time)
    return benchmark(made, layer.inputs(0), Options(plan, 1, tolerance=TOLERANCE), inputs_from="seeded")


def deviations(layer: Layer, made: Sequence[Spec]) -> dict[str, float]:
    """Root mean square error of each contender, of the standard deviation of what onnxruntime gives in float."""
    source = pathlib.Path(made[0].source).with_name("float.onnx")
    want = _states(Spec("onnxruntime", "float", str(source), 1), layer)
    return {spec.label: float(np.sqrt(((_states(spec, layer) - want) ** 2).mean()) / want.std()) for spec in made}


def _states(spec: Spec, layer: Layer) -> np.ndarray[Any, Any]:
    contender = open_contender(spec)
    contender.load()
    (states,) = (np.array(value) for value in contender.run(layer.inputs(0)).values())
    contender.unload()
    return states


def sheet(reports: Mapping[str, Report], errors: Mapping[str, Mapping[str, float]]) -> Sheet:
    """One row a contender of each layer."""
    rows = []
    for name, report in reports.items():
        found = report.ratios()
        for result in report.results:
            ratio = found.get(result.label)
            cells = "1" if ratio is None else f"{ratio.value:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"
            median = quantity(result.summary()["p50_ms"] / 1e3, "s")
            rows.append([name, result.label, median, cells, f"{errors[name][result.label]:.2%}"])
    return Sheet("ratio: its time over the first one's", ("layer", "contender", "median", "ratio", "error"), rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recurrence", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?", type=pathlib.Path, metavar="FOLDER", help="keeps what is compiled")
    parser.add_argument("--layers", default="", metavar="NAMES", help="with commas; default: all")
    parser.add_argument("--contenders", default="", metavar="NAMES", help="with commas; default: all")
    parser.add_argument("--prepare", action="store_true", help="compile, measure nothing")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of every contender (%(default)s)")
    parser.add_argument("--rounds", type=int, default=Plan.rounds, help="turns of every contender (%(default)s)")
    parser.add_argument(
        "--time", type=float, default=Plan.seconds, metavar="SECONDS", help="measured time (%(default)s)"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
