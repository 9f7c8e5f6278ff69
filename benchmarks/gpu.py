"""mmopt on an NVIDIA GPU: answers of every reference model, and speed against torch.compile and cuBLAS, in one command.

``python -m benchmarks.gpu [--answers NAMES] [--models NAMES] [--batches 1,32] [--dry-run] [--json FILE]``

Answers: every reference model in float32, float16 and 8-bit integers, compiled for the GPU and compared with its own
optimized ONNX in onnxruntime, which rounds at the same places; in float32 with the model as it was exported.

Speed: inputs and results stay in the GPU's memory on both sides. torch runs ``torch.compile(mode="max-autotune")`` in
the same precision; the product of two 4096 × 4096 matrices in float16 is compared with cuBLAS through ``torch.matmul``.
A contender whose answers differ has no speed. Every model is also run without CUDA graphs, to tell what they bring.

``--dry-run`` does all that needs no GPU: it exports and compiles, and runs torch's side on the CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

import mmopt
from benchmarks.models import chosen
from benchmarks.zoo import ZOO, TorchModel, ZooModel
from mmopt.bench import machine
from mmopt.errors import MmoptError, UserError
from mmopt.runtime.device import DeviceEngine
from mmopt.runtime.gpu import present_gpu

MODELS = ("clip-vit-b32", "bert-base", "resnet-50", "whisper-tiny-encoder")
BARS = {1: 1.2, 32: 0.8}
"""Least speed against torch.compile, by batch size."""

MATMUL, MATMUL_BAR = 4096, 0.7
PRECISIONS = ("fp32", "fp16", "int8")
"""Formats in which answers are compared."""

SAMPLES = 8
"""Inputs that ranges of 8-bit integers are taken from."""

TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 6e-2, "int8": 1e-1}
"""Largest difference between contenders, as a fraction of an output's range."""

Arrays = Mapping[str, np.ndarray]
Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Line:
    """One comparison.

    Attributes:
        name: What was run.
        ours: Seconds of mmopt.
        theirs: Seconds of the other.
        error: Largest difference of answers, as a fraction of the range.
        agrees: Whether that is within the tolerance.
        bar: Least speed against the other.
        unrecorded: Seconds of mmopt without CUDA graphs.
    """

    name: str
    ours: float
    theirs: float
    error: float
    agrees: bool
    bar: float | None
    unrecorded: float | None = None

    @property
    def speed(self) -> float:
        """How many times as fast as the other."""
        return self.theirs / self.ours

    @property
    def passes(self) -> bool:
        """Whether the bar is reached with right answers."""
        return self.agrees and (self.bar is None or self.speed >= self.bar)

    def __str__(self) -> str:
        verdict = "WRONG" if not self.agrees else "ok" if self.passes else "missed"
        bar = "" if self.bar is None else f", bar {self.bar}×"
        times = f"{self.ours * 1e3:.3f} ms against {self.theirs * 1e3:.3f} ms"
        return f"{self.name}: {times}, {self.speed:.2f}×{bar}, error {self.error:.1e}: {verdict}"


@dataclasses.dataclass(frozen=True)
class Answer:
    """How a model answers.

    Attributes:
        model: Its name.
        precision: In which format.
        error: Largest difference as a fraction of an output's range; None where nothing could run.
        agrees: Whether that is within what the format allows.
        native: Whether all of it runs on the GPU.
        problem: Why there is no answer, or "".
    """

    model: str
    precision: str
    error: float | None = None
    agrees: bool = True
    native: bool = False
    problem: str = ""

    @property
    def passes(self) -> bool:
        """Whether there is an answer, and a right one; without a GPU, whether there is code for one."""
        return self.agrees and not self.problem

    def __str__(self) -> str:
        said = self.problem or ("compiled" if self.error is None else f"error {self.error:.1e}")
        verdict = "ok" if self.passes else "FAILED" if self.problem else "WRONG"
        return f"{self.model}, {self.precision}: {said}{'' if self.native else ', partly on the host'}: {verdict}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 5 when an answer was wrong; 7 when a bar was missed; the exit code of an error.
    """
    options = _parser().parse_args(arguments)
    try:
        names = chosen(options.models, MODELS, "--models") if options.models else []
        asked = chosen(options.answers, sorted(ZOO), "--answers") if options.answers else []
        if not options.dry_run and present_gpu() is None:
            raise UserError("there is no NVIDIA GPU here", hint="--dry-run does everything else")
        print(machine.describe(machine.facts()), flush=True)
        with tempfile.TemporaryDirectory(prefix="mmopt-gpu-") as folder:
            work = options.work or pathlib.Path(folder)
            answers = [answer(ZOO[n], p, options, work) for n in asked for p in options.answer_precisions.split(",")]
            lines = run(names, options, work)
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.json is not None:
        content = [{**dataclasses.asdict(line), "speed": line.speed, "passes": line.passes} for line in lines]
        facts = {"schema_version": 1, "kind": "mmopt-gpu", "machine": machine.facts(), "gpu": present_gpu()}
        said = [dataclasses.asdict(one) | {"passes": one.passes} for one in answers]
        options.json.write_text(json.dumps({**facts, "answers": said, "lines": content}, indent=1) + "\n")
    right, fast = sum(one.passes for one in answers), sum(line.passes for line in lines)
    print(
        f"{right} of {len(answers)} models right{' (compiled)' if options.dry_run else ''}, {fast} of {len(lines)} bars"
    )
    if not all(one.passes for one in answers) or not all(line.agrees for line in lines):
        return 5
    return 0 if all(line.passes for line in lines) else 7


def answer(model: ZooModel, precision: str, options: argparse.Namespace, work: pathlib.Path) -> Answer:
    """One model in one format."""
    if model.missing():
        made = Answer(model.name, precision, problem=f"{model.missing()} is missing")
    else:
        try:
            made = _answered(model, precision, options, work)
        except MmoptError as error:
            made = Answer(model.name, precision, problem=str(error))
    print(made, flush=True)
    return made


def _answered(model: ZooModel, precision: str, options: argparse.Namespace, work: pathlib.Path) -> Answer:
    module = mmopt.load(model.export(work / "models"))
    rewritten = mmopt.optimize(
        module,
        target=options.target,
        precision=precision,
        samples=calibration_samples(model, precision),
        validate="end",
    ).module
    result = mmopt.compile(
        rewritten,
        output=work / f"{model.name}-{precision}.mmopt",
        target=options.target,
        entries={},
        reference=module if precision == "fp32" else None,
        inputs=model.inputs(1),
        allow_mismatch=True,
    )
    shutil.rmtree(result.path)  # 72 of them would fill a disk
    if options.dry_run and not result.checks:
        return Answer(model.name, precision, native=result.native)
    check = result.checks["main"]
    return Answer(model.name, precision, check.max_relative_error, check.ok, result.native)


def calibration_samples(model: ZooModel, precision: str) -> dict[str, np.ndarray] | None:
    """Inputs for calibration, with a leading axis of samples."""
    if precision != "int8":
        return None
    every = [model.inputs(1, seed=seed) for seed in range(1, SAMPLES + 1)]
    return {name: np.stack([one[name] for one in every]) for name in every[0]}


def run(names: Sequence[str], options: argparse.Namespace, work: pathlib.Path) -> list[Line]:
    """Every comparison; none in a dry run."""
    lines: list[Line] = []
    if not options.skip_matmul:
        lines += matmul(options, work)
    for name in names:
        model = ZOO[name]
        if not isinstance(model, TorchModel) or model.missing():
            print(f"{name}: skipped, {model.missing() or 'torch has no such model'} is missing", file=sys.stderr)
            continue
        for batch in map(int, options.batches.split(",")):
            lines += whole(model, batch, options, work)
    return lines


def whole(model: TorchModel, batch: int, options: argparse.Namespace, work: pathlib.Path) -> list[Line]:
    """A reference model, in both."""
    label = f"{model.name}, batch {batch}, {options.precision}"
    inputs = model.inputs(batch)
    artifact = compiled(model.export(work / "models", batch=batch), options, work / f"{model.name}-{batch}.mmopt")
    module = model.build().module
    if options.dry_run:
        kept = _torch_call(module, inputs, "fp32", "cpu", compile_=False)()
        print(f"{label}: compiled, {artifact.size >> 20} MiB; torch gives {len(_leaves(kept))} outputs", flush=True)
        return []
    theirs = _torch_call(module, inputs, options.precision, "cuda", compile_=True)
    return [compare(label, artifact.path, inputs, theirs, options, BARS.get(batch))]


def matmul(options: argparse.Namespace, work: pathlib.Path) -> list[Line]:
    """A large product in float16, against cuBLAS."""
    import torch

    size, label = options.size, f"matmul {options.size}³ fp16"
    random = np.random.default_rng(0)
    x, w = ((random.random((size, size), np.float32) - 0.5).astype(np.float16) for _ in range(2))
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float16[{size},{size}] x) => (y) {{ y = MatMul (x, w) }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    path = work / "matmul.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    artifact = compiled(path, options, work / "matmul.mmopt", precision="fp32")
    if options.dry_run:
        print(f"{label}: compiled, {artifact.size >> 20} MiB", flush=True)
        return []
    left, right = (torch.from_numpy(a).cuda() for a in (x, w))
    return [compare(label, artifact.path, {"x": x}, lambda: torch.matmul(left, right), options, MATMUL_BAR)]


def compiled(source: pathlib.Path, options: argparse.Namespace, target: pathlib.Path, precision: str = "") -> Any:
    """The artifact of an ONNX file."""
    module = mmopt.load(source)
    asked = precision or options.precision
    result = mmopt.optimize(module, target=options.target, precision=asked)
    return mmopt.compile(result.module, output=target, target=options.target, entries={}, reference=None)


def compare(
    label: str, artifact: pathlib.Path, inputs: Arrays, theirs: Call, options: argparse.Namespace, bar: float | None
) -> Line:
    """Answers and times of both, in turns."""
    import torch

    with mmopt.load_artifact(artifact) as session:
        ours = resident(session, inputs)
        got, want = session.run(inputs), _leaves(theirs())
        error = max(map(_difference, got.values(), want))
        synchronize = session.native.convert.synchronize
        unrecorded = _unrecorded(session, ours, synchronize, options.time / options.rounds)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(options.rounds):
            times[0].append(_timed(ours, synchronize, options.time / options.rounds))
            times[1].append(_timed(theirs, torch.cuda.synchronize, options.time / options.rounds))
    medians = [statistics.median(found) for found in times]
    line = Line(label, medians[0], medians[1], error, error <= TOLERANCE[options.precision], bar)
    print(f"{line}; {unrecorded * 1e3:.3f} ms without CUDA graphs", flush=True)
    return dataclasses.replace(line, unrecorded=unrecorded)


def _unrecorded(session: mmopt.Session, call: Call, synchronize: Call, seconds: float) -> float:
    """Seconds of a call that launches kernel by kernel."""
    engine = session.native
    assert isinstance(engine, DeviceEngine)
    engine.records = False
    try:
        return _timed(call, synchronize, seconds)
    finally:
        engine.records = True


def resident(session: mmopt.Session, inputs: Arrays) -> Call:
    """A run with inputs and results in the GPU's memory.

    Raises:
        UserError: Part of the model runs elsewhere.
    """
    segments = session.entry("main")._segments
    if [segment.kind for segment in segments] != ["native"]:
        raise UserError("part of the model does not run on the GPU")
    engine = session.native
    values = [engine.convert.to_tvm(inputs[name]) for name in segments[0].inputs]
    return lambda: engine.run(segments[0], values)


def _torch_call(module: Any, inputs: Arrays, precision: str, device: str, *, compile_: bool) -> Call:
    import torch

    narrow = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    module = module.eval().to(device, narrow)
    tensors = {n: torch.from_numpy(a).to(device) for n, a in inputs.items()}
    tensors = {n: t.to(narrow) if t.is_floating_point() else t for n, t in tensors.items()}
    call = torch.compile(module, mode="max-autotune") if compile_ else module

    def run() -> Any:
        with torch.inference_mode():
            return call(**tensors)

    return run


def _leaves(result: Any) -> list[np.ndarray]:
    import torch

    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf.float().cpu().numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _difference(got: np.ndarray, want: np.ndarray) -> float:
    scale = max(float(np.abs(want).max(initial=0)), 1e-12)
    return float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max(initial=0)) / scale


def _timed(call: Call, synchronize: Call, seconds: float) -> float:
    """Seconds of one call, over as many as fit."""
    call()
    synchronize()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            call()
        synchronize()
        count += 4
    return (time.perf_counter() - start) / count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--models", default=",".join(MODELS), metavar="NAMES", help='to measure, with commas (%(default)s; "": none)'
    )
    parser.add_argument(
        "--answers", default=",".join(sorted(ZOO)), metavar="NAMES", help='models to compare ("": none)'
    )
    parser.add_argument("--answer-precisions", default=",".join(PRECISIONS), metavar="NAMES", help="(%(default)s)")
    parser.add_argument("--batches", default="1,32", metavar="SIZES", help="with commas (%(default)s)")
    parser.add_argument("--precision", default="fp16", choices=sorted(TOLERANCE), help="of both (%(default)s)")
    parser.add_argument("--target", default="cuda", help="profile to compile for (%(default)s: the GPU here)")
    parser.add_argument("--size", type=int, default=MATMUL, help="of the matrices (%(default)s)")
    parser.add_argument("--skip-matmul", action="store_true", help="whole models only")
    parser.add_argument("--rounds", type=int, default=10, help="turns of both (%(default)s)")
    parser.add_argument("--time", type=float, default=4.0, metavar="SECONDS", help="measured each (%(default)s)")
    parser.add_argument("--work", type=pathlib.Path, metavar="FOLDER", help="keep exports and artifacts there")
    parser.add_argument("--dry-run", action="store_true", help="everything that needs no GPU")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
