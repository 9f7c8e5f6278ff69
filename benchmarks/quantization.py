"""Accuracy after quantization: mmopt's passes beside onnxruntime's static quantization and NNCF, on trained networks.

``python -m benchmarks.quantization FOLDER [--data ../shared/data] [--networks digits,polarity] [--json FILE]``

FOLDER holds the networks of ``benchmarks.trained``, which are trained when missing. Every method gets the same 256
calibration samples and is judged by onnxruntime on the same test set: accuracy with its 95 % interval (Wilson), the
samples on which it decides otherwise than the float network, and the size of the file.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

import mmopt
from benchmarks.models import chosen
from benchmarks.trained import NETWORKS, prepare
from mmopt.bench import machine
from mmopt.errors import MmoptError
from mmopt.pipeline.base import Pass
from mmopt.transforms.quantize import (
    EqualizeLayers,
    ProtectWeights,
    Quantize,
    QuantizeDynamic,
    QuantizeStatic,
    QuantizeWeights,
    SmoothActivations,
)

Arrays = dict[str, np.ndarray[Any, Any]]
Method = Callable[[pathlib.Path, Arrays, pathlib.Path], None]
"""``method(float model, calibration inputs, file to write)``."""


def by_mmopt(*passes: Pass) -> Method:
    """``-O2`` with these passes, as ONNX."""

    def run(source: pathlib.Path, calibration: Arrays, target: pathlib.Path) -> None:
        module = mmopt.load(source)
        samples = {name: array[:, None] for name, array in calibration.items()}
        result = mmopt.optimize(module, passes=list(passes), samples=samples, validate="end")
        failed = [f"{record.name}: {record.reason}" for record in result.report.failed]
        if failed:
            raise RuntimeError("; ".join(failed))
        save(result.module.model, target)

    return run


def save(model: ir.Model, target: pathlib.Path) -> None:
    """Write a model without the calls of fused functions."""
    import onnx_ir.passes.common as common

    copy = model.clone()
    common.InlinePass()(copy)
    ir.external_data.load_to_model(copy)
    ir.save(copy, target)


def by_onnxruntime(method: str) -> Method:
    """``quantize_static`` to QDQ, weights by channel, with one of its calibration methods."""

    def run(source: pathlib.Path, calibration: Arrays, target: pathlib.Path) -> None:
        from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self._left = _batches(calibration)

            def get_next(self) -> Arrays | None:
                return next(self._left, None)

        prepared = target.with_name("prepared.onnx")
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        kind = getattr(CalibrationMethod, method)
        quantize_static(
            str(prepared), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, calibrate_method=kind
        )

    return run


def by_nncf(source: pathlib.Path, calibration: Arrays, target: pathlib.Path) -> None:
    """NNCF's post-training quantization of the ONNX model."""
    import nncf
    import onnx

    dataset = nncf.Dataset(list(_batches(calibration)))
    quantized = nncf.quantize(onnx.load(source), dataset, subset_size=len(next(iter(calibration.values()))))
    onnx.save(quantized, target)


def _batches(arrays: Arrays) -> Iterator[Arrays]:
    count = len(next(iter(arrays.values())))
    return ({name: array[n : n + 1] for name, array in arrays.items()} for n in range(count))


METHODS: dict[str, Method] = {
    "mmopt w8a8 minmax": by_mmopt(QuantizeStatic()),
    "mmopt w8a8 percentile": by_mmopt(QuantizeStatic(method="percentile")),
    "mmopt w8a8 mse": by_mmopt(QuantizeStatic(method="mse")),
    "mmopt w8a8 entropy": by_mmopt(QuantizeStatic(method="entropy")),
    "mmopt w8a8 smooth + equalize": by_mmopt(SmoothActivations(), EqualizeLayers(), QuantizeStatic()),
    "mmopt w8a8 dynamic": by_mmopt(QuantizeDynamic()),
    "mmopt w8": by_mmopt(QuantizeWeights(bits=8)),
    "mmopt w4 round": by_mmopt(QuantizeWeights(bits=4, block=32)),
    "mmopt w4 gptq": by_mmopt(QuantizeWeights(bits=4, block=32, method="gptq")),
    "mmopt w4 awq + gptq": by_mmopt(ProtectWeights(), QuantizeWeights(bits=4, block=32, method="gptq")),
    "mmopt hierarchical": by_mmopt(Quantize(preset="hierarchical")),
    "onnxruntime MinMax": by_onnxruntime("MinMax"),
    "onnxruntime Entropy": by_onnxruntime("Entropy"),
    "onnxruntime Percentile": by_onnxruntime("Percentile"),
    "NNCF": by_nncf,
}


def predictions(model: pathlib.Path, inputs: Arrays) -> np.ndarray[Any, Any]:
    """The class that the model decides for, sample by sample."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    # In batches of one: ranges found at run time are those of a sample, as in use.
    return np.concatenate([session.run(None, feeds)[0].argmax(axis=1) for feeds in _batches(inputs)])


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.96, right / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - spread) / (1 + z * z / count), (middle + spread) / (1 + z * z / count)


def judge(name: str, folder: pathlib.Path, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Quantize one network by every method and measure it."""
    source = folder / f"{name}.onnx"
    calibration, test = (dict(np.load(folder / f"{name}.{part}.npz")) for part in ("calibration", "test"))
    labels = test.pop("labels")
    plain = predictions(source, test)
    rows = [_row(name, "float", plain, plain, labels, _bytes(source))]
    for method in methods:
        print(f"{name}: {method} …", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="mmopt-quantization-") as scratch:
            target = pathlib.Path(scratch) / "quantized.onnx"
            try:
                METHODS[method](source, calibration, target)
                found = predictions(target, test)
            except Exception as error:  # a peer may fail in any way; its row says so
                rows.append({"network": name, "method": method, "failed": str(error).splitlines()[0][:200]})
                continue
            rows.append(_row(name, method, found, plain, labels, _bytes(target)))
    return rows


def _bytes(model: pathlib.Path) -> int:
    """Bytes of the constants of a model, wherever they are kept."""
    tensors = (value.const_value for value in ir.load(model).graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _row(name: str, method: str, found: Any, plain: Any, labels: Any, nbytes: int) -> dict[str, Any]:
    right = int((found == labels).sum())
    low, high = interval(right, len(labels))
    return {
        "network": name,
        "method": method,
        "accuracy": right / len(labels),
        "low": low,
        "high": high,
        "changed": float((found != plain).mean()),
        "bytes": nbytes,
    }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows in Markdown."""
    lines = ["| network | method | accuracy | 95 % | decides otherwise | weights |", f"|{' --- |' * 6}"]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['network']} | {row['method']} | failed: {row['failed']} | | | |")
            continue
        span = f"{row['low']:.2%}–{row['high']:.2%}"
        lines.append(
            f"| {row['network']} | {row['method']} | {row['accuracy']:.2%} | {span} | {row['changed']:.2%} "
            f"| {row['bytes'] / 1e6:.2f} MB |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; the exit code of an error.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantization", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"), metavar="FOLDER")
    parser.add_argument("--networks", default="", metavar="NAMES", help="with commas; default: all")
    parser.add_argument("--methods", default="", metavar="NAMES", help="with commas; default: all")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows here")
    options = parser.parse_args(arguments)
    try:
        rows = []
        methods = chosen(options.methods, METHODS, "--methods")
        for name in chosen(options.networks, NETWORKS, "--networks"):
            prepare(name, options.folder, options.data)
            rows += judge(name, options.folder, methods)
    except MmoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(table(rows)))
    if options.json is not None:
        content = {"schema_version": 1, "kind": "mmopt-quantization", "machine": machine.facts(), "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
