"""Ways to quantize a model after training: mmopt's passes, onnxruntime's ``quantize_static``, NNCF."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

import mmopt
from mmopt.pipeline.base import Pass
from mmopt.transforms.quantize import (
    CompressWeights,
    EqualizeLayers,
    ProtectWeights,
    Quantize,
    QuantizeDynamic,
    QuantizeStatic,
    QuantizeWeights,
    SmoothActivations,
)
from mmopt.transforms.quantize.layers import SMALLEST_DEPTH

Arrays = dict[str, np.ndarray[Any, Any]]
Method = Callable[[pathlib.Path, Arrays, pathlib.Path], None]
"""``method(float model, calibration inputs, file to write)``."""

LINEAR = ("Conv", "MatMul", "Gemm")


def by_mmopt(*passes: Pass) -> Method:
    """``-O2`` with these passes, as ONNX."""

    def run(source: pathlib.Path, calibration: Arrays, target: pathlib.Path) -> None:
        module = mmopt.load(source)
        samples = {name: array[:, None] for name, array in calibration.items()}
        result = mmopt.optimize(module, passes=list(passes), samples=samples, validate="end", threads=1)
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


def by_onnxruntime(method: str, *, same_layers: bool = False) -> Method:
    """``quantize_static`` to QDQ, weights by channel, with one of its calibration methods.

    Args:
        method: ``MinMax``, ``Entropy``, ``Percentile`` or ``Distribution``.
        same_layers: Quantize the layers that ``quantize-static`` does; by default all that onnxruntime would.
    """

    def run(source: pathlib.Path, calibration: Arrays, target: pathlib.Path) -> None:
        from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self._left = batches(calibration)

            def get_next(self) -> Arrays | None:
                return next(self._left, None)

        prepared = target.with_name("prepared.onnx")
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        limits: dict[str, Any] = {}
        if same_layers:
            model = onnx.load(prepared)
            limits = {"op_types_to_quantize": list(LINEAR), "nodes_to_exclude": _others(model)}
        quantize_static(
            str(prepared), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            calibrate_method=getattr(CalibrationMethod, method), **limits,
        )  # fmt: skip

    return run


def by_nncf(*, same_layers: bool = False, transformer: bool = False) -> Method:
    """NNCF's post-training quantization of the ONNX model.

    Args:
        same_layers: Quantize the layers that ``quantize-static`` does; by default all that NNCF would.
        transformer: Tell it that the model is a transformer, which turns its smoothing on.
    """

    def run(source: pathlib.Path, calibration: Arrays, target: pathlib.Path) -> None:
        import nncf

        model = onnx.load(source)
        ignored = None
        if same_layers:
            kinds = sorted({node.op_type for node in model.graph.node} - set(LINEAR))
            ignored = nncf.IgnoredScope(names=_others(model), types=kinds, validate=False)
        quantized = nncf.quantize(
            model,
            nncf.Dataset(list(batches(calibration))),
            subset_size=len(next(iter(calibration.values()))),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            ignored_scope=ignored,
        )
        onnx.save(quantized, target)

    return run


def _others(model: onnx.ModelProto) -> list[str]:
    """Linear operators that ``quantize-static`` leaves in float: products of activations, small ones, logits."""
    constants = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    outputs = {value.name for value in model.graph.output}
    found = []
    for node in model.graph.node:
        if node.op_type in LINEAR:
            shape = constants.get(node.input[1])
            depth = 0 if shape is None else int(np.prod(shape[1:])) if node.op_type == "Conv" else min(shape)
            if depth < SMALLEST_DEPTH or outputs & set(node.output) or (shape is not None and len(shape) == 1):
                found.append(node.name)
    return found


def batches(arrays: Arrays) -> Iterator[Arrays]:
    """One sample after the other, each as a batch of one."""
    count = len(next(iter(arrays.values())))
    return ({name: array[n : n + 1] for name, array in arrays.items()} for n in range(count))


METHODS: dict[str, Method] = {
    "mmopt w8a8": by_mmopt(QuantizeStatic(balance=True)),
    "mmopt w8a8 minmax": by_mmopt(QuantizeStatic()),
    "mmopt w8a8 percentile": by_mmopt(QuantizeStatic(method="percentile")),
    "mmopt w8a8 mse": by_mmopt(QuantizeStatic(method="mse")),
    "mmopt w8a8 entropy": by_mmopt(QuantizeStatic(method="entropy")),
    "mmopt w8a8 smooth": by_mmopt(SmoothActivations(), EqualizeLayers(), QuantizeStatic()),
    "mmopt w8a8 smooth gptq": by_mmopt(SmoothActivations(), EqualizeLayers(), QuantizeStatic(rounding="gptq")),
    "mmopt w8a8 smooth adaround": by_mmopt(SmoothActivations(), EqualizeLayers(), QuantizeStatic(rounding="adaround")),
    "mmopt w8a8 dynamic": by_mmopt(QuantizeDynamic()),
    "mmopt w8": by_mmopt(QuantizeWeights(bits=8)),
    "mmopt w4 round": by_mmopt(QuantizeWeights(bits=4, block=32)),
    "mmopt w4 gptq": by_mmopt(QuantizeWeights(bits=4, block=32, method="gptq")),
    "mmopt w4 adaround": by_mmopt(QuantizeWeights(bits=4, block=32, method="adaround")),
    "mmopt w4 awq + gptq": by_mmopt(ProtectWeights(), QuantizeWeights(bits=4, block=32, method="gptq")),
    "mmopt w4 gptq everywhere": by_mmopt(
        CompressWeights(bits=4, block=32),
        QuantizeWeights(bits=4, block=32, method="gptq", kinds=("MatMul", "Gemm", "Conv"), logits=True),
    ),
    "mmopt w4 adaround everywhere": by_mmopt(
        CompressWeights(bits=4, block=32),
        QuantizeWeights(bits=4, block=32, method="adaround", kinds=("MatMul", "Gemm", "Conv"), logits=True),
    ),
    "mmopt w4 recovered": by_mmopt(QuantizeWeights(bits=4, block=32, recover=True)),
    "mmopt hierarchical": by_mmopt(Quantize(preset="hierarchical")),
    "onnxruntime MinMax": by_onnxruntime("MinMax"),
    "onnxruntime Entropy": by_onnxruntime("Entropy"),
    "onnxruntime Percentile": by_onnxruntime("Percentile"),
    "onnxruntime Distribution": by_onnxruntime("Distribution"),
    "onnxruntime MinMax same layers": by_onnxruntime("MinMax", same_layers=True),
    "onnxruntime Entropy same layers": by_onnxruntime("Entropy", same_layers=True),
    "onnxruntime Percentile same layers": by_onnxruntime("Percentile", same_layers=True),
    "NNCF": by_nncf(),
    "NNCF transformer": by_nncf(transformer=True),
    "NNCF same layers": by_nncf(same_layers=True),
}
