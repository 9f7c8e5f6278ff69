"""Speed of W8A8 whole models: mmopt's artifacts against OpenVINO on NNCF's copy and onnxruntime on its own, in turns.

``python -m benchmarks.quantized_speed FOLDER [--models bert-base,…] [--json FILE]``

Everyone quantizes the same exported model on the same calibration samples with the tool made for it: ``mmopt optimize
--precision int8``, NNCF's ``quantize`` and onnxruntime's ``quantize_static`` (QDQ, weights by channel). Two further
contenders run mmopt's emitted ONNX in those runtimes, and mmopt's own fp32 artifact takes part. FOLDER keeps all
copies: what is there is not made again. What is not in integers is fp32, but for attention in mmopt's artifact, which
reads bfloat16 where the processor multiplies it; so OpenVINO runs a second time with its hint for bfloat16.

Answers of quantized models differ by what each tool rounds; the last column says by how much, of the float model's
range, against onnxruntime on the exported model.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.models import chosen
from benchmarks.zoo import ZOO, ZooModel
from mmopt.bench import machine
from mmopt.bench.measure import Plan
from mmopt.bench.peers import Spec, open_contender
from mmopt.bench.record import Report
from mmopt.bench.render import Sheet, quantity
from mmopt.bench.run import Options, benchmark
from mmopt.bench.stats import geometric_mean
from mmopt.errors import BackendError, MmoptError
from mmopt.runtime.cpu import default_threads

SCHEMA_VERSION = 1
MODELS = ("bert-base", "clip-vit-b32", "whisper-tiny-encoder", "resnet-50")
OURS, FLOAT = "mmopt int8", "mmopt fp32"
SAMPLES = 8
TOLERANCE = 0.5
"""Largest difference allowed between the answers of two quantized copies, of the range: a wrong kernel differs more."""

CONTENDERS: dict[str, tuple[str, str, str]] = {
    OURS: ("mmopt", "mmopt.mmopt", "fp32"),
    FLOAT: ("mmopt", "float.mmopt", "fp32"),
    "openvino NNCF": ("openvino", "nncf.onnx", "fp32"),
    "openvino NNCF bf16": ("openvino", "nncf.onnx", "bf16"),
    "onnxruntime QDQ": ("onnxruntime", "ort.onnx", "fp32"),
    "openvino mmopt": ("openvino", "mmopt.onnx", "fp32"),
    "onnxruntime mmopt": ("onnxruntime", "mmopt.onnx", "fp32"),
}
"""Runtime, file, and precision of what is not in integers, of each contender by its name in the table."""

Arrays = dict[str, np.ndarray[Any, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 5 when answers are further apart than :data:`TOLERANCE`; the exit code of an error.
    """
    options = _parser().parse_args(arguments)
    try:
        names = chosen(options.models, MODELS, "--models")
        contenders = chosen(options.contenders, CONTENDERS, "--contenders")
        print(machine.describe(machine.facts()), flush=True)
        sources = {name: prepare(ZOO[name], options.folder) for name in names}
        if options.prepare:
            return 0
        reports = {name: measure(ZOO[name], sources[name], contenders, options) for name in names}
        errors = {name: deviations(ZOO[name], sources[name], contenders, options.threads) for name in names}
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
    made = sheet(reports, errors)
    console.print(made.title)
    console.print(made.rich())
    if options.json is not None:
        runs = {name: report.to_json() for name, report in reports.items()}
        content = {"schema_version": SCHEMA_VERSION, "kind": "mmopt-quantized-speed", "models": runs, "errors": errors}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 5 if any(report.disagreements for report in reports.values()) else 0


# -- copies ----------------------------------------------------------------------------------------------------


def prepare(model: ZooModel, folder: pathlib.Path) -> pathlib.Path:
    """Export a model and make every quantized copy that is not there yet; returns their folder.

    Each copy is made in a process of its own, so that its memory is gone before the next.

    Raises:
        BackendError: A tool failed.
    """
    source = model.export(folder / "models")
    work = folder / model.name
    work.mkdir(parents=True, exist_ok=True)
    samples = work / "samples.npz"
    if not samples.exists():
        np.savez(samples, **calibration(model))  # type: ignore[arg-type]
    given = work / "inputs.npz"
    if not given.exists():
        np.savez(given, **model.inputs(1))  # type: ignore[arg-type]
    int8 = ["--precision", "int8", "--calib", str(samples), "--inputs", str(given), "--allow-mismatch"]
    commands = {
        "float.mmopt": ["mmopt.cli.main", "optimize", str(source), "-q"],
        "mmopt.onnx": ["mmopt.cli.main", "optimize", str(source), "-q", *int8],
        "mmopt.mmopt": ["mmopt.cli.main", "optimize", str(source), "-q", *int8],
        "nncf.onnx": [__spec__.name, str(folder), "--copy", f"nncf:{model.name}"],
        "ort.onnx": [__spec__.name, str(folder), "--copy", f"onnxruntime:{model.name}"],
    }
    for name, command in commands.items():
        if (work / name).exists():
            continue
        print(f"{model.name}: {name} …", file=sys.stderr, flush=True)
        output = [] if "--copy" in command else ["-o", str(work / name)]
        done = subprocess.run([sys.executable, "-m", *command, *output], capture_output=True, text=True)
        if done.returncode and not (
            done.returncode == 5 and (work / name).exists()
        ):  # networks of random weights differ
            raise BackendError(f"making {name} failed: {done.stderr.strip()[-2000:]}", where=model.name)
    return work


def calibration(model: ZooModel, count: int = SAMPLES) -> Arrays:
    """Seeded samples in batches of one, stacked; none of them is what is measured on."""
    each = [model.inputs(1, seed=seed) for seed in range(1, count + 1)]
    return {name: np.stack([arrays[name] for arrays in each]) for name in each[0]}


def _samples(work: pathlib.Path) -> Iterator[Arrays]:
    arrays = dict(np.load(work / "samples.npz"))
    count = len(next(iter(arrays.values())))
    return ({name: array[n] for name, array in arrays.items()} for n in range(count))


def by_nncf(source: pathlib.Path, work: pathlib.Path) -> None:
    """NNCF's copy, with its model type for transformers where there is attention."""
    import nncf
    import onnx

    kind = None if "resnet" in work.name else nncf.ModelType.TRANSFORMER
    dataset = nncf.Dataset(list(_samples(work)))
    quantized = nncf.quantize(onnx.load(source), dataset, subset_size=SAMPLES, model_type=kind)
    onnx.save(quantized, work / "nncf.onnx")


def by_onnxruntime(source: pathlib.Path, work: pathlib.Path) -> None:
    """onnxruntime's static QDQ copy of the model as its own preprocessing leaves it."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = _samples(work)

        def get_next(self) -> Arrays | None:
            return next(self._left, None)

    whole, prepared = work / "whole.onnx", work / "prepared.onnx"
    onnx.save(onnx.load(source), whole)  # the preprocessing loses weights that lie in a file of their own
    quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(work / "ort.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    whole.unlink()
    prepared.unlink()


TOOLS = {"nncf": by_nncf, "onnxruntime": by_onnxruntime}


# -- measuring -------------------------------------------------------------------------------------------------


def measure(model: ZooModel, work: pathlib.Path, contenders: Sequence[str], options: argparse.Namespace) -> Report:
    """Take turns on one input."""
    print(f"{model.name} …", file=sys.stderr, flush=True)
    plan = Plan(options.rounds, options.time)
    return benchmark(
        [_spec(work, label, options.threads) for label in contenders],
        model.inputs(1),
        Options(plan, options.starts, tolerance=TOLERANCE),
        inputs_from="the zoo",
    )


def _spec(work: pathlib.Path, label: str, threads: int) -> Spec:
    kind, file, precision = CONTENDERS[label]
    return Spec(kind, label, str(work / file), threads, precision)


def deviations(model: ZooModel, work: pathlib.Path, contenders: Sequence[str], threads: int) -> dict[str, float]:
    """Root mean square error of each contender's worst output, of the float model's standard deviation."""
    inputs = model.inputs(1)
    exported = work.parent / "models" / model.name / "b1.onnx"
    want = _answer(Spec("onnxruntime", "float", str(exported), threads), inputs)
    return {
        label: _deviation(_answer(_spec(work, label, threads), inputs), want) for label in contenders if label != FLOAT
    }


def _answer(spec: Spec, inputs: Mapping[str, Any]) -> dict[str, Any]:
    contender = open_contender(spec)
    contender.load()
    outputs = {name: np.array(value) for name, value in contender.run(inputs).items()}
    contender.unload()
    return outputs


def _deviation(found: Mapping[str, Any], want: Mapping[str, Any]) -> float:
    pairs = zip(found.values(), want.values(), strict=True)
    return max(float(np.sqrt(((a - b) ** 2).mean()) / max(float(b.std()), 1e-12)) for a, b in pairs if b.size > 1)


def sheet(reports: Mapping[str, Report], errors: Mapping[str, Mapping[str, float]]) -> Sheet:
    """One row a contender of each model, and geometric means."""
    rows, ratios = [], dict[str, list[float]]()
    for name, report in reports.items():
        found = report.ratios()
        for result in report.results:
            ratio, error = found.get(result.label), errors[name].get(result.label)
            if ratio is not None:
                ratios.setdefault(result.label, []).append(ratio.value)
            cells = "1" if ratio is None else f"{ratio.value:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"
            median = quantity(result.summary()["p50_ms"] / 1e3, "s")
            rows.append([name, result.label, median, cells, "" if error is None else f"{error:.1%}"])
    rows += [["geometric mean", label, "", f"{geometric_mean(found):.2f}", ""] for label, found in ratios.items()]
    return Sheet("ratio: its time over the first one's", ("model", "contender", "median", "ratio", "error"), rows)


def _copy(text: str, folder: pathlib.Path) -> int:
    tool, _, name = text.partition(":")
    TOOLS[tool](folder / "models" / name / "b1.onnx", folder / name)
    return 0


class _Copy(argparse.Action):
    """``--copy TOOL:MODEL``: what :func:`prepare` runs in a process of its own."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, _: Any = None
    ) -> None:
        sys.exit(_copy(value, namespace.folder))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantized_speed", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--copy", action=_Copy, help=argparse.SUPPRESS)
    parser.add_argument("--models", default="", metavar="NAMES", help="with commas; default: all")
    parser.add_argument("--contenders", default="", metavar="NAMES", help="with commas; default: all")
    parser.add_argument("--prepare", action="store_true", help="make the copies, measure nothing")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of every contender (%(default)s)")
    parser.add_argument("--rounds", type=int, default=Plan.rounds, help="turns of every contender (%(default)s)")
    parser.add_argument(
        "--time", type=float, default=Plan.seconds, metavar="SECONDS", help="measured time (%(default)s)"
    )
    parser.add_argument("--starts", type=int, default=1, help="fresh processes of every contender (%(default)s)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
