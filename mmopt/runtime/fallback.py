"""Runs what has no native code: ONNX models inside the artifact, with onnxruntime."""

from __future__ import annotations

import importlib
import math
import pathlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmopt.errors import BackendError
from mmopt.runtime.artifact import Segment
from mmopt.runtime.tensors import Array, dtype_name, numpy_dtype, share_memory

# onnx.TensorProto's numbers of the element types that onnxruntime cannot exchange as numpy arrays, by dtype name.
_ONNX_TYPES = {
    "bfloat16": 16,
    "float8_e4m3fn": 17,
    "float8_e4m3fnuz": 18,
    "float8_e5m2": 19,
    "float8_e5m2fnuz": 20,
    "uint4": 21,
    "int4": 22,
    "float4_e2m1fn": 23,
    "float8_e8m0fnu": 24,
    "uint2": 25,
    "int2": 26,
}
_FOREIGN = {number: name for name, number in _ONNX_TYPES.items()}
_BITS = {"uint4": 4, "int4": 4, "float4_e2m1fn": 4, "uint2": 2, "int2": 2}
"""Bits of the element types of which several share a byte."""


class OnnxRuntimeEngine:
    """Sessions of onnxruntime, each made when its segment first runs."""

    def __init__(self, locate: Callable[[str], pathlib.Path], threads: int) -> None:
        self._locate, self._threads = locate, threads
        self._sessions: dict[str, Any] = {}
        self._lock = threading.Lock()

    def run(self, segment: Segment, values: Sequence[Any]) -> list[Any]:
        """Run the segment's model.

        Args:
            segment: An onnxruntime segment.
            values: Its inputs: numpy arrays, lists of them for sequences, None for an absent optional.

        Returns:
            The same kinds of values, in the order of the segment's outputs.

        Raises:
            BackendError: onnxruntime is missing, or refuses or fails on the model.
        """
        session = self._session(segment.model)
        feed = {name: _to_ort(value) for name, value in zip(segment.inputs, values, strict=True)}
        types = {output.name: output.type for output in session.get_outputs()}
        try:
            if any(_is_foreign(types[name]) for name in segment.outputs):
                return _run_ort_values(session, segment.outputs, feed)
            return list(session.run(list(segment.outputs), feed))
        except Exception as error:  # onnxruntime's exceptions have no common public base
            raise BackendError(f"onnxruntime failed: {error}", where=segment.model) from error

    def _session(self, model: str) -> Any:
        with self._lock:
            if model not in self._sessions:
                self._sessions[model] = self._create(model)
            return self._sessions[model]

    def _create(self, model: str) -> Any:
        try:
            ort = importlib.import_module("onnxruntime")
        except ImportError as error:
            raise BackendError(
                "a part of this artifact runs in onnxruntime, which is not installed",
                where=model,
                hint="pip install onnxruntime",
            ) from error
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            return ort.InferenceSession(str(self._locate(model)), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common public base
            raise BackendError(f"onnxruntime refuses the model: {error}", where=model) from error


def _is_foreign(ort_type: str) -> bool:
    """Whether numpy has no name for an element type that onnxruntime spells like ``tensor(float8e4m3fn)``."""
    names = ("bfloat16", "float8", "float4", "int4", "int2")
    return ort_type.startswith("tensor(") and any(name in ort_type for name in names)


def _to_ort(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    number = _ONNX_TYPES.get(value.dtype.name)
    if number is None:
        return value.astype(object) if dtype_name(value) == "string" else np.require(value, requirements="C")
    ort = importlib.import_module("onnxruntime")
    if value.dtype.name in _BITS:
        made = ort.OrtValue.ortvalue_from_shape_and_type(list(value.shape), number, "cpu")
        _bytes_of(made)[...] = _pack(value, _BITS[value.dtype.name])
        return made
    raw = np.require(value, requirements="C").view(f"u{value.dtype.itemsize}")
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, number)


def _run_ort_values(session: Any, outputs: Sequence[str], feed: dict[str, Any]) -> list[Any]:
    ort = importlib.import_module("onnxruntime")
    wrapped = {
        name: ort.OrtValue.ortvalue_from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in feed.items()
    }
    return [_from_ort(value) for value in session.run_with_ort_values(list(outputs), wrapped)]


def _from_ort(value: Any) -> Array:
    name = _FOREIGN.get(value.element_type())
    if name is None:
        plain: Array = value.numpy()
        return plain
    dtype, shape = numpy_dtype(name), tuple(value.shape())
    if 0 in shape:
        return np.empty(shape, dtype)
    raw = _bytes_of(value)
    flat = _unpack(raw, math.prod(shape), _BITS[name]) if name in _BITS else raw.copy()
    typed: Array = flat.view(dtype).reshape(shape)
    return typed


def _bytes_of(value: Any) -> Array:
    return share_memory(value.data_ptr(), (value.tensor_size_in_bytes(),), (1,), np.dtype(np.uint8), value)


def _pack(array: Array, bits: int) -> Array:
    """Several values a byte, the first in the lowest bits, as ONNX stores them."""
    count = 8 // bits
    values = np.ascontiguousarray(array).view(np.uint8).reshape(-1) & (1 << bits) - 1
    values = np.append(values, np.zeros(-values.size % count, np.uint8)).reshape(-1, count)
    packed: Array = np.bitwise_or.reduce(values << np.arange(count, dtype=np.uint8) * bits, axis=1, dtype=np.uint8)
    return packed


def _unpack(raw: Array, size: int, bits: int) -> Array:
    """Inverse of :func:`_pack`: one byte a value, of which the lowest bits count."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * bits
    return (raw[:, None] >> shifts & (1 << bits) - 1).astype(np.uint8).reshape(-1)[:size]
