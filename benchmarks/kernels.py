"""Every matrix product and convolution of five models, one by one: its rate and share of the peak, both measured here.

Weights are cold: every call reads another copy, and all copies together are larger than the last-level cache (at most
512 MB). The kernel is the one mmopt compiles into a model that has this layer, with its bias and ReLU; in int8 it reads
and writes eight bits, as layers between quantized ones do. Each is measured a second time with weights that stay where
they are, so that what is lost to memory can be told from what is lost to caches and to the kernel.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

import mmopt
from benchmarks.zoo.layers import MODELS, Layer, Product
from mmopt.autotune.build import Builders
from mmopt.autotune.lowered import KernelCode, LoweredModel
from mmopt.autotune.measuring import Supervisor, cold_bytes
from mmopt.autotune.peak import Peaks, kind_of, measure_peaks
from mmopt.backends.profile import native_profile
from mmopt.bench import machine
from mmopt.bench.render import Sheet, quantity
from mmopt.bench.stats import geometric_mean
from mmopt.errors import MmoptError, UserError
from mmopt.frontends.onnx import module_from_proto
from mmopt.runtime.cpu import default_threads, request_permissions

SCHEMA_VERSION = 1
KINDS = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
"""Precisions, and the kind of arithmetic whose peak they are compared with."""

ITEM_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
TASKS = "kernels.json"
SLOW, HEAVY = 0.65, 0.03
"""A layer below this share of the peak that takes more than this share of its model's time is pointed out."""


@dataclasses.dataclass
class Case:
    """One layer in one precision.

    Attributes:
        model: Name of the model.
        layer: What is computed.
        precision: A key of :data:`KINDS`.
        problem: Why there is no time, or why the time is not of this precision; "" when all is well.
        template: Template and workload of the kernel.
        parameters: What the template chose.
        seconds: Time of one call.
        spread: Median deviation of that, as a fraction.
        warm_seconds: Time of one call whose weights are those of the call before.
    """

    model: str
    layer: Layer
    precision: str
    problem: str = ""
    template: str = ""
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    spread: float = 0.0
    warm_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.layer.operations / self.seconds if self.seconds else 0.0

    @property
    def total(self) -> float:
        """Seconds in one run of the model."""
        return self.layer.calls * self.seconds

    def of_peak(self, peaks: Peaks) -> float | None:
        """Share of the arithmetic peak."""
        peak = peaks.operations.get(KINDS[self.precision])
        return self.rate / peak if peak and self.seconds else None

    def warm_of_peak(self, peaks: Peaks) -> float | None:
        """Share of the arithmetic peak when the weights stay in a cache, if they fit one."""
        peak = peaks.operations.get(KINDS[self.precision])
        return self.layer.operations / self.warm_seconds / peak if peak and self.warm_seconds else None

    def of_bound(self, peaks: Peaks) -> float | None:
        """Share of what bounds it: arithmetic, or reading its weights from memory, whichever takes longer."""
        peak = peaks.operations.get(KINDS[self.precision])
        if not peak or not self.seconds:
            return None
        reading = self.layer.weights * ITEM_BYTES[self.precision] / peaks.bandwidth
        return max(self.layer.operations / peak, reading) / self.seconds

    def to_json(self, peaks: Peaks) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            **dataclasses.asdict(self),
            "label": self.layer.label,
            "operations": self.layer.operations,
            "rate": self.rate,
            "share_of_peak": self.of_peak(peaks),
            "share_of_bound": self.of_bound(peaks),
            "warm_share_of_peak": self.warm_of_peak(peaks),
        }


def onnx_of(layer: Layer, precision: str) -> onnx.ModelProto:
    """The layer, its bias and a ReLU as a model; for int8 with quantized operands and results, scales per channel."""
    rng = np.random.default_rng(0)
    if isinstance(layer, Product):
        shape, out = [layer.m, layer.k], [layer.m, layer.n]
        weight, axis, bias = rng.standard_normal((layer.k, layer.n)), 1, layer.n
    else:
        shape, out = [1, layer.channels, *layer.space], [1, layer.filters, *layer.outputs]
        window = [layer.window] * len(layer.space)
        weight = rng.standard_normal((layer.filters, layer.channels // layer.groups, *window))
        axis, bias = 0, layer.filters
    weights = {"bias": rng.standard_normal(bias).astype(np.float32)}
    nodes: list[onnx.NodeProto] = []
    if precision == "int8":
        weights |= {
            "x_scale": np.array(0.02, np.float32),
            "x_zero": np.array(128, np.uint8),
            "w": rng.integers(-127, 128, weight.shape, np.int8),
            "w_scale": rng.uniform(0.01, 0.02, bias).astype(np.float32),
            "w_zero": np.zeros(bias, np.int8),
            "y_scale": np.array(0.05, np.float32),
            "y_zero": np.array(0, np.uint8),
        }
        nodes.append(helper.make_node("DequantizeLinear", ["x", "x_scale", "x_zero"], ["xf"]))
        nodes.append(helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wf"], axis=axis))
    else:
        weights["w"] = weight.astype(np.float32)
    x, w = ("xf", "wf") if precision == "int8" else ("x", "w")
    if isinstance(layer, Product):
        nodes.append(helper.make_node("MatMul", [x, w], ["product"]))
        nodes.append(helper.make_node("Add", ["product", "bias"], ["sum"]))
    else:
        attributes: dict[str, Any] = {
            "pads": [layer.pads] * (2 * len(layer.space)),
            "strides": [layer.stride] * len(layer.space),
        }
        nodes.append(helper.make_node("Conv", [x, w, "bias"], ["sum"], group=layer.groups, **attributes))
    nodes.append(helper.make_node("Relu", ["sum"], ["r" if precision == "int8" else "y"]))
    if precision == "int8":
        nodes.append(helper.make_node("QuantizeLinear", ["r", "y_scale", "y_zero"], ["y"]))
    element = TensorProto.UINT8 if precision == "int8" else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", element, shape)],
        [helper.make_tensor_value_info("y", element, out)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def lower(case: Case) -> KernelCode | None:
    """The kernel of the layer's template; None, with the problem noted, when there is none."""
    precision = case.precision if case.precision == "bf16" else "fp32"
    module = mmopt.optimize(
        module_from_proto(onnx_of(case.layer, case.precision)), precision=precision, validate="off"
    ).module
    model = LoweredModel({"main": module}, native_profile())
    heaviest = max(model.spaces.values(), key=lambda space: space.weight, default=None)
    if heaviest is None:
        case.problem = "no template chose among candidates"
        return None
    chosen = heaviest.predicted.parameters
    case.template, case.parameters = heaviest.workload.key(), dict(chosen)
    kind = kind_of(heaviest.workload.dtypes)
    if kind != KINDS[case.precision]:
        case.problem = f"computed in {kind}"
    kernels = model.kernels(case.template, chosen)
    return kernels[0] if kernels else None


def prepare(cases: Sequence[Case], folder: pathlib.Path, jobs: int, console: Console) -> None:
    """Compile the kernels of ``cases`` into ``folder``, with a list of what to measure."""
    console.print(f"compiling {len(cases)} layers", markup=False)
    codes = [lower(case) for case in cases]
    with Builders(native_profile(), folder, jobs) as builders:
        built = iter(builders.build([code.function for code in codes if code is not None]))
    kernels: list[dict[str, Any] | None] = []
    for case, code in zip(cases, codes, strict=True):
        library, why = next(built) if code is not None else ("", case.problem)
        case.problem = why or case.problem
        found = {"library": library, "function": "kernel", "calls": 1, "arguments": code.arguments if code else []}
        kernels.append(found if library else None)
    known = [{"problem": c.problem, "template": c.template, "parameters": c.parameters} for c in cases]
    tasks = [{**fields, "kernel": kernel} for fields, kernel in zip(known, kernels, strict=True)]
    (folder / TASKS).write_text(json.dumps({"cases": _names(cases), "tasks": tasks}), encoding="utf-8")


def _names(cases: Iterable[Case]) -> list[list[str]]:
    return [[case.model, case.layer.label, case.precision] for case in cases]


def measure(cases: Sequence[Case], folder: pathlib.Path, threads: int, console: Console) -> Peaks:
    """Measure what :func:`prepare` left, one after the other, peaks before and after; times go into the cases."""
    profile = native_profile()
    request_permissions(profile.features, where="the benchmark")
    kinds = [KINDS[case.precision] for case in cases]
    prepared = json.loads((folder / TASKS).read_text(encoding="utf-8"))
    if prepared["cases"] != _names(cases):
        raise UserError("holds other layers", where=str(folder), hint="give the same options, or leave out --reuse")
    console.print("measuring", markup=False)
    before = measure_peaks(profile, threads, kinds)
    supervisor = Supervisor(folder)
    try:
        for case, task in zip(cases, prepared["tasks"], strict=True):
            case.problem, case.template, case.parameters = task["problem"], task["template"], task["parameters"]
            if task["kernel"] is not None:
                found = _timed(supervisor, task["kernel"], threads)
                case.seconds, case.spread = found.get("seconds", 0.0), found.get("spread", 0.0)
                case.problem = case.problem or found.get("error", "")
                case.warm_seconds = _timed(supervisor, warm(task["kernel"]), threads).get("seconds", 0.0)
    finally:
        supervisor.close()
    return better(before, measure_peaks(profile, threads, kinds))


def _timed(supervisor: Supervisor, kernel: dict[str, Any], threads: int) -> dict[str, Any]:
    (found,) = supervisor.measure({"threads": threads, "candidates": [{"kernels": [kernel]}]})
    return found


def warm(kernel: dict[str, Any]) -> dict[str, Any]:
    """The same kernel, with weights that are the same in every call."""
    roles = {"weight": "input"}
    arguments = [{**a, "role": roles.get(a["role"], a["role"])} if "role" in a else a for a in kernel["arguments"]]
    return {**kernel, "arguments": arguments}


def better(one: Peaks, other: Peaks) -> Peaks:
    """The higher of two measurements of the same peaks."""
    operations = {kind: max(rate, other.operations[kind]) for kind, rate in one.operations.items()}
    cycles = max(one.cycles, other.cycles)
    return Peaks(operations, max(one.bandwidth, other.bandwidth), cycles, one.threads)


def means(cases: Iterable[Case], peaks: Peaks) -> dict[str, float | None]:
    """Geometric means over the layers that were measured in their own precision."""
    good = [case for case in cases if case.seconds and not case.problem]
    of_peak = [share for case in good if (share := case.of_peak(peaks))]
    of_bound = [share for case in good if (share := case.of_bound(peaks))]
    warmed = [share for case in good if (share := case.warm_of_peak(peaks))]
    return {
        "share_of_peak": geometric_mean(of_peak) if of_peak else None,
        "share_of_bound": geometric_mean(of_bound) if of_bound else None,
        "warm_share_of_peak": geometric_mean(warmed) if warmed else None,
    }


def sheet(model: str, precision: str, cases: Sequence[Case], peaks: Peaks) -> Sheet:
    """One row a layer."""
    whole = sum(case.total for case in cases)
    rows = []
    for case in cases:
        share = case.total / whole if whole else 0.0
        shares = (case.of_peak(peaks), case.of_bound(peaks), case.warm_of_peak(peaks))
        percent = ["-" if value is None else f"{value:.0%}" for value in shares]
        time = quantity(case.seconds, "s") if case.seconds else "-"
        rate = f"{case.rate / 1e9:.0f} Gop/s" if case.seconds else "-"
        rows.append(
            [case.layer.label, str(case.layer.calls), time, rate, *percent, f"{share:.0%}", remark(case, peaks, share)]
        )
    found = means(cases, peaks)
    shown = ["-" if share is None else f"{share:.0%}" for share in found.values()]
    rows.append(["geometric mean", "", quantity(whole, "s"), "", *shown, "", ""])
    return Sheet(
        f"{model}, {precision}",
        ("layer", "calls", "time", "rate", "of peak", "of bound", "warm, of peak", "of time", "remark"),
        rows,
    )


def remark(case: Case, peaks: Peaks, share: float) -> str:
    """What a reader must not miss."""
    if case.problem:
        return case.problem
    of_peak = case.of_peak(peaks)
    return "SLOW" if of_peak is not None and of_peak < SLOW and share > HEAVY else ""


def as_json(cases: Sequence[Case], peaks: Peaks) -> dict[str, Any]:
    """Everything, for a file."""
    groups = dict.fromkeys((case.model, case.precision) for case in cases)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "mmopt-kernels",
        "machine": machine.facts(),
        "peaks": peaks.to_json(),
        "weights_cycled_bytes": cold_bytes(),
        "means": [
            {"model": model, "precision": precision, **means(_of(cases, model, precision), peaks)}
            for model, precision in groups
        ],
        "overall": {
            precision: means([case for case in cases if case.precision == precision], peaks)
            for precision in dict.fromkeys(case.precision for case in cases)
        },
        "layers": [case.to_json(peaks) for case in cases],
    }


def _of(cases: Iterable[Case], model: str, precision: str) -> list[Case]:
    return [case for case in cases if (case.model, case.precision) == (model, precision)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), metavar="NAMES", help="with commas (%(default)s)")
    parser.add_argument("--precision", default="fp32,bf16,int8", metavar="NAMES", help="with commas (%(default)s)")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of the kernels (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="kernels compiled at a time (%(default)s)")
    parser.add_argument("--work", type=pathlib.Path, metavar="FOLDER", help="keep the compiled kernels there")
    parser.add_argument("--reuse", action="store_true", help="take the kernels that --work holds from an earlier run")
    parser.add_argument("--compile-only", action="store_true", help="fill --work, and measure nothing")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything as JSON")
    return parser


def _check(parser: argparse.ArgumentParser, names: Sequence[str], known: Iterable[str]) -> None:
    listed = list(known)
    for name in names:
        if name not in listed:
            parser.error(f"{name!r} is none of {', '.join(listed)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = _parser()
    options = parser.parse_args(arguments)
    models, precisions = options.models.split(","), options.precision.split(",")
    _check(parser, models, MODELS)
    _check(parser, precisions, KINDS)
    cases = [Case(m, layer, p) for m in models for p in precisions for layer in MODELS[m]]
    if (options.reuse or options.compile_only) and options.work is None:
        parser.error("--reuse and --compile-only need --work")
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with tempfile.TemporaryDirectory(prefix="mmopt-kernels-") as temporary:
        folder = options.work or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not options.reuse:
            prepare(cases, folder, options.jobs, console)
        if options.compile_only:
            return 0
        try:
            peaks = measure(cases, folder, options.threads, console)
        except (MmoptError, OSError) as error:
            console.print(f"error: {error}", markup=False)
            return 2
    show(cases, peaks)
    if options.json:
        options.json.write_text(json.dumps(as_json(cases, peaks), indent=2) + "\n", encoding="utf-8")
    return 0


def show(cases: Sequence[Case], peaks: Peaks) -> None:
    """Print the tables and the means."""
    out = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for model, precision in dict.fromkeys((case.model, case.precision) for case in cases):
        table = sheet(model, precision, _of(cases, model, precision), peaks)
        out.print(table.title)
        out.print(table.rich())
    for precision in dict.fromkeys(case.precision for case in cases):
        found = means([case for case in cases if case.precision == precision], peaks)
        of_peak, of_bound, warmed = found.values()
        if of_peak is not None and of_bound is not None and warmed is not None:
            out.print(
                f"{precision}: {of_peak:.0%} of the peak, {of_bound:.0%} of the bound, with warm weights {warmed:.0%} "
                "of the peak (geometric means)"
            )
    rates = ", ".join(f"{kind} {rate / 1e9:.0f} Gop/s" for kind, rate in peaks.operations.items())
    out.print(f"peak with {peaks.threads} threads: {rates}; reading memory {peaks.bandwidth / 1e9:.1f} GB/s")


if __name__ == "__main__":
    sys.exit(main())
