"""Between ONNX tensors, numpy arrays and torch tensors."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.training.lazy import torch

D = ir.DataType

BOUNDS: dict[ir.DataType, tuple[int, int]] = {
    D.INT2: (-2, 1),
    D.UINT2: (0, 3),
    D.INT4: (-8, 7),
    D.UINT4: (0, 15),
    D.INT8: (-128, 127),
    D.UINT8: (0, 255),
    D.INT16: (-32768, 32767),
    D.UINT16: (0, 65535),
    D.INT32: (-(1 << 31), (1 << 31) - 1),
    D.UINT32: (0, (1 << 32) - 1),
}
"""Lowest and highest value of integer types."""

_BYTES = {1: np.uint8, 2: np.uint16}
_WIDER = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}


@functools.cache
def dtypes() -> dict[ir.DataType, torch.dtype]:
    """torch's type for each of ONNX. Integers that torch has no arithmetic for are held in the next wider ones (64 bits
    without a sign in those with one)."""
    return {
        D.FLOAT: torch.float32,
        D.DOUBLE: torch.float64,
        D.FLOAT16: torch.float16,
        D.BFLOAT16: torch.bfloat16,
        D.INT8: torch.int8,
        D.INT16: torch.int16,
        D.INT32: torch.int32,
        D.INT64: torch.int64,
        D.UINT8: torch.uint8,
        D.UINT16: torch.int32,
        D.UINT32: torch.int64,
        D.UINT64: torch.int64,
        D.BOOL: torch.bool,
        D.COMPLEX64: torch.complex64,
        D.COMPLEX128: torch.complex128,
        D.INT4: torch.int8,
        D.UINT4: torch.uint8,
        D.INT2: torch.int8,
        D.UINT2: torch.uint8,
        D.FLOAT8E4M3FN: torch.float8_e4m3fn,
        D.FLOAT8E5M2: torch.float8_e5m2,
        D.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
        D.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    }


def to_torch(tensor: ir.TensorProtocol) -> torch.Tensor:
    """A copy of an ONNX tensor.

    Raises:
        ValueError: torch has nothing for its type.
    """
    dtype = dtypes().get(tensor.dtype)
    if dtype is None:
        raise ValueError(f"torch has no tensors of {tensor.dtype.name}")
    return from_numpy(tensor.numpy(), dtype)


def from_numpy(array: np.ndarray[Any, Any], dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor with a copy of ``array``, types of ml_dtypes included; as ``dtype`` when given.

    Raises:
        ValueError: torch has nothing for its type.
    """
    array = np.asarray(array)
    exotic = _exotic(array.dtype)
    if exotic is not None:
        carrier = np.array(array.view(_BYTES[array.dtype.itemsize]), order="C")
        found = torch.from_numpy(carrier).view(exotic)
    elif array.dtype.name in ("int4", "uint4", "int2", "uint2"):
        found = torch.from_numpy(array.astype(np.int8 if array.dtype.name.startswith("int") else np.uint8))
    elif array.dtype.kind not in "biufc":
        raise ValueError(f"torch has no tensors of {array.dtype.name}")
    else:
        found = torch.from_numpy(np.array(array, _WIDER.get(array.dtype.name, array.dtype), order="C"))
    return found if dtype is None or found.dtype == dtype else found.to(dtype)


def _exotic(dtype: np.dtype[Any]) -> torch.dtype | None:
    found = getattr(torch, dtype.name, None) if dtype.name == "bfloat16" or dtype.name.startswith("float8") else None
    return found if isinstance(found, torch.dtype) else None


def to_numpy(tensor: torch.Tensor, dtype: ir.DataType | None = None) -> np.ndarray[Any, Any]:
    """The tensor as an array; of ONNX type ``dtype`` when given."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in (torch.bfloat16, *(t for d, t in dtypes().items() if d.name.startswith("FLOAT8"))):
        own = next(d for d, t in dtypes().items() if t == tensor.dtype)
        array = tensor.view(torch.uint8 if tensor.itemsize == 1 else torch.uint16).numpy().view(own.numpy())
    else:
        array = tensor.resolve_conj().resolve_neg().numpy()
    return np.asarray(array if dtype is None or array.dtype == dtype.numpy() else array.astype(dtype.numpy()))


def feed(graph_module: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``graph_module.forward`` for inputs by their ONNX names, arrays or tensors."""
    names: Mapping[str, str] = graph_module.meta["inputs"]
    return {argument: _tensors(inputs[name]) for argument, name in names.items() if name in inputs}


def _tensors(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_tensors(item) for item in value]
    return value if isinstance(value, torch.Tensor) or value is None else from_numpy(np.asarray(value))
