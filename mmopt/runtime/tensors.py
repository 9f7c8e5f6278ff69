"""Arrays as the runtime passes them on: dtype names, checked inputs, tensors of TVM and back."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmopt.errors import LoadError, UserError

ALIGNMENT = 64
"""Bytes. Compiled kernels use aligned vector loads on everything they are given."""

Array = NDArray[Any]

_ML_DTYPES = {
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn",
    "int4",
    "uint4",
    "int2",
    "uint2",
}
_CPU_DEVICES = (1, 3)  # kDLCPU and kDLCUDAHost of DLPack
_NUMPYS_OWN = 1  # dtype.isbuiltin of the dtypes that numpy itself exchanges through DLPack
_WHOLE_BYTE = {"int4": "int8", "int2": "int8", "uint4": "uint8", "uint2": "uint8"}


@functools.cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype for the dtype name of a :class:`~mmopt.runtime.artifact.TensorSpec`.

    Raises:
        LoadError: There is none.
    """
    if name == "string":
        return np.dtype(object)
    try:
        if name in _ML_DTYPES:
            name = getattr(importlib.import_module("ml_dtypes"), name)
        dtype: np.dtype[Any] = np.dtype(name)
    except (TypeError, AttributeError) as error:
        raise LoadError(f"unknown dtype {name!r} in the artifact") from error
    return dtype


def dtype_name(array: Array) -> str:
    """Dtype name of ``array``; text of any kind is ``string``."""
    return _name(array.dtype)


@functools.cache
def _name(dtype: np.dtype[Any]) -> str:
    return "string" if dtype.kind in "OUST" else dtype.newbyteorder("=").name


def as_array(value: Any, what: str) -> Array:
    """``value`` as a numpy array that shares its memory where that is possible.

    Args:
        value: A numpy array or scalar, or anything with ``__dlpack__`` on the CPU, also of ``bfloat16`` or ``float8``.
        what: Name for errors.

    Raises:
        UserError: Not an array, or one that is not in CPU memory.
    """
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    if not hasattr(value, "__dlpack__"):
        raise UserError(
            f"{what} is a {type(value).__name__}, not an array",
            hint="pass a numpy array or a CPU tensor with __dlpack__ (numpy.asarray(…) makes one of a list)",
        )
    if int(value.__dlpack_device__()[0]) not in _CPU_DEVICES:
        raise UserError(f"{what} lies in the memory of another device", hint="copy it to the CPU first")
    try:
        return _from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{what} cannot be read through DLPack: {error}") from error


def _from_dlpack(value: Any) -> Array:
    from mmopt.runtime.libraries import import_tvm_ffi

    tensor = import_tvm_ffi().from_dlpack(value)
    dtype = numpy_dtype(str(tensor.dtype))
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
    # numpy refuses DLPack tensors of dtypes it does not know; sharing the bytes works for all of them.
    raw = share_memory(tensor.data_ptr(), tuple(tensor.shape), strides, np.dtype(f"V{dtype.itemsize}"), tensor)
    typed: Array = raw.view(dtype)
    return typed


class _Memory:
    def __init__(self, interface: dict[str, Any], owner: object) -> None:
        self.__array_interface__ = interface
        self.owner = owner


def share_memory(
    address: int, shape: Sequence[int], strides: Sequence[int], dtype: np.dtype[Any], owner: object
) -> Array:
    """An array over memory at ``address`` that ``owner`` keeps alive. Strides are in bytes."""
    if 0 in shape:
        return np.empty(tuple(shape), dtype)
    interface = {"version": 3, "shape": tuple(shape), "strides": tuple(strides), "typestr": dtype.str}
    shared: Array = np.asarray(_Memory({**interface, "data": (address, False)}, owner))
    return shared


def aligned_empty(nbytes: int) -> NDArray[np.uint8]:
    """Uninitialized bytes that start at a multiple of :data:`ALIGNMENT`."""
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -_address(raw) % ALIGNMENT
    return raw[start : start + nbytes]


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def compact(array: Array) -> Array:
    """``array`` itself when it is contiguous, aligned for kernels and in native byte order, else a copy that is."""
    if array.dtype.isnative and array.flags.c_contiguous and _address(array) % ALIGNMENT == 0:
        return array
    dtype = array.dtype if array.dtype.isnative else array.dtype.newbyteorder("=")
    copy: Array = aligned_empty(array.size * dtype.itemsize).view(dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _whole_bytes(array: Array) -> Array:
    """Values of less than a byte as native code takes them: integers widened, ``float4`` as its bits."""
    name = dtype_name(array)
    if name == "float4_e2m1fn":
        return array.view(np.uint8)
    return array.astype(_WHOLE_BYTE[name]) if name in _WHOLE_BYTE else array


def _from_whole_bytes(array: Array, dtype: np.dtype[Any]) -> Array:
    return array.view(dtype) if dtype.name == "float4_e2m1fn" else array.astype(dtype)


class Converter:
    """Turns arrays into TVM tensors and back. Needs the runtime to be loaded.

    numpy's own DLPack knows neither ``bfloat16`` nor ``float8``, refuses read-only arrays and gives empty ones strides
    that TVM does not accept; these go through their bytes and a typed view of them.
    """

    def __init__(self, tvm_ffi: ModuleType) -> None:
        self._ffi = tvm_ffi
        self._view = tvm_ffi.get_global_func("runtime.TVMTensorCreateView")

    def to_tvm(self, array: Array) -> Any:
        """A TVM tensor with the memory of ``array`` where :func:`compact` leaves it as it is, else with a copy."""
        array = compact(_whole_bytes(array))
        if array.dtype.isbuiltin == _NUMPYS_OWN and array.size and array.flags.writeable:
            return self._ffi.from_dlpack(array)
        if array.size:
            flat = share_memory(_address(array), (array.nbytes,), (1,), np.dtype(np.uint8), array)
        else:
            flat = aligned_empty(1)
        return self._view(self._ffi.from_dlpack(flat), array.shape, self._ffi.dtype(dtype_name(array)), 0)

    def to_numpy(self, tensor: Any, dtype: np.dtype[Any] | None = None, *, copy: bool = True) -> Array:
        """An array with the content of ``tensor``.

        Args:
            tensor: A TVM tensor.
            dtype: What to make of types that kernels know under another name.
            copy: False only for memory that belongs to nobody else. Other tensors may be an input, a weight or a
                constant of the library, or be used again by the next run.
        """
        stored = numpy_dtype(str(tensor.dtype))
        shape = tuple(tensor.shape)
        fresh: Array
        if 0 in shape:
            return np.empty(shape, dtype or stored)
        if stored.isbuiltin == _NUMPYS_OWN:
            fresh = np.from_dlpack(tensor)
        else:
            raw = self._view(tensor, (math.prod(shape) * stored.itemsize,), self._ffi.dtype("uint8"), 0)
            fresh = np.from_dlpack(raw).view(stored).reshape(shape)
        if copy or not fresh.flags.writeable:
            fresh = fresh.copy()
        return fresh if dtype is None or dtype == stored else _from_whole_bytes(fresh, dtype)
