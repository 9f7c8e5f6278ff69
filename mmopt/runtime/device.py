"""Runs native segments on a GPU: weights, workspace and results live in its memory, inputs are copied there.

Only this file knows about devices; everything else of a session is the same as on a CPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import pathlib
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np

from mmopt.errors import BackendError
from mmopt.runtime.artifact import Segment
from mmopt.runtime.graphs import GraphRuntime, Recording
from mmopt.runtime.libraries import installed_libraries, load_runtime
from mmopt.runtime.native import Machine, NativeEngine
from mmopt.runtime.tensors import Array, Converter

CUDA_LIBRARY = "libtvm_runtime_cuda.so"
"""TVM's runtime for NVIDIA GPUs, which comes with the wheel ``apache-tvm``."""

CUDART = "libcudart.so.13"
"""NVIDIA's runtime that TVM's is linked with."""

RECORDED = 16
"""Recordings that a virtual machine keeps, one for each function and shapes of inputs."""

_CPU, _CUDA, _POOLED = 1, 2, 2
_LOADER = "ffi.Module.load_from_bytes.cuda"
_INSTALL = "install apache-tvm, nvidia-cuda-runtime and NVIDIA's driver: pip install 'mmopt[cuda]'"


def load_cuda_runtime(carried: Sequence[pathlib.Path] = ()) -> ModuleType:
    """Make TVM's runtime for GPUs available in this process.

    Args:
        carried: Runtime libraries an artifact brings along.

    Returns:
        The module ``tvm_ffi``.

    Raises:
        BackendError: It, or NVIDIA's own runtime or driver, cannot be loaded.
    """
    tvm_ffi = load_runtime(carried)
    if tvm_ffi.get_global_func(_LOADER, allow_missing=True) is not None:
        return tvm_ffi
    folders = [path.parent for path in (*carried, *installed_libraries())]
    library = next((f / CUDA_LIBRARY for f in folders if (f / CUDA_LIBRARY).is_file()), None)
    if library is None:
        raise BackendError(f"{CUDA_LIBRARY} is neither in the artifact nor installed", hint=_INSTALL)
    try:
        for dependency in _cuda_libraries():
            ctypes.CDLL(str(dependency), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise BackendError(f"cannot load the runtime for GPUs: {error}", where=str(library), hint=_INSTALL) from error
    return tvm_ffi


def _cuda_libraries() -> list[pathlib.Path]:
    """NVIDIA's runtime where pip has put it, in a place that the system does not search."""
    spec = importlib.util.find_spec("nvidia")
    folders = [pathlib.Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    return [path for folder in folders for path in sorted(folder.glob("cu*/lib/libcudart.so.*"))[:1]]


class DeviceConverter(Converter):
    """Turns arrays into tensors in a GPU's memory and back."""

    def __init__(self, tvm_ffi: ModuleType) -> None:
        super().__init__(tvm_ffi)
        self._allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._copy = tvm_ffi.get_global_func("runtime.TVMTensorCopyFromTo")
        self._wait = tvm_ffi.get_global_func("runtime.Device_StreamSync")
        self.device, self._host = tvm_ffi.device("cuda", 0), tvm_ffi.device("cpu", 0)

    def empty(self, shape: Sequence[int], dtype: Any, device: Any) -> Any:
        """A new tensor on ``device``."""
        return self._allocate(self._ffi.Shape([int(d) for d in shape]), dtype, device, None)

    def synchronize(self) -> None:
        """Wait until the GPU has done everything it was told."""
        self._wait(self.device, 0)

    def to_tvm(self, array: Array) -> Any:
        """A tensor in the GPU's memory with the content of ``array``."""
        return self.copied(super().to_tvm(array))

    def copied(self, tensor: Any) -> Any:
        """A tensor of its own in the GPU's memory with the content of ``tensor``, wherever that is."""
        there = self.empty(tensor.shape, tensor.dtype, self.device)
        self._fill(there, tensor)
        return there

    def fill(self, there: Any, value: Any) -> None:
        """Give a tensor in the GPU's memory the content of an array or tensor of the same shape."""
        self._fill(there, super().to_tvm(value) if isinstance(value, np.ndarray) else value)

    def _fill(self, there: Any, tensor: Any) -> None:
        if 0 in tuple(tensor.shape):
            return
        self._copy(tensor, there)
        if tensor.device.dlpack_device_type() == _CPU:  # the memory it was in is not ours
            self.synchronize()

    def to_numpy(self, tensor: Any, dtype: np.dtype[Any] | None = None, *, copy: bool = True) -> Array:
        """An array with the content of ``tensor``, wherever that is."""
        if 0 in tuple(tensor.shape) or tensor.device.dlpack_device_type() == _CPU:
            return super().to_numpy(tensor, dtype, copy=copy)
        here = self.empty(tensor.shape, tensor.dtype, self._host)
        self._copy(tensor, here)
        self.synchronize()
        return super().to_numpy(here, dtype, copy=False)


@dataclasses.dataclass
class _Recorded:
    """A call that is recorded: fill ``inputs``, run ``recording``, take what is in ``results``."""

    recording: Recording
    inputs: list[Any]
    results: list[Any]


class DeviceEngine(NativeEngine):
    """As :class:`NativeEngine`, on a GPU.

    The second time that a function is called with inputs of the same shapes its launches are recorded, and repeated
    from then on.

    Attributes:
        records: Whether to do so.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.records = True
        self._recording = threading.Lock()

    def _runtime(self, carried: Sequence[pathlib.Path]) -> tuple[ModuleType, Converter]:
        tvm_ffi = load_cuda_runtime(carried)
        return tvm_ffi, DeviceConverter(tvm_ffi)

    @functools.cached_property
    def _graphs(self) -> GraphRuntime:
        return GraphRuntime(ctypes.CDLL(CUDART))

    @functools.cached_property
    def _recorder(self) -> ThreadPoolExecutor:
        """The thread that records. It lasts as long as recordings: temporaries are in memory that belongs to it."""
        return ThreadPoolExecutor(1, "mmopt-record")

    def _call(self, segment: Segment, machine: Machine, values: Sequence[Any]) -> list[Any]:
        if not (self.records and segment.repeats):
            return super()._call(segment, machine, values)
        key = (segment.function, *((tuple(value.shape), str(value.dtype)) for value in values))
        if key not in machine.recorded:
            machine.recorded[key] = None
            while len(machine.recorded) > RECORDED:
                del machine.recorded[next(iter(machine.recorded))]
            return super()._call(segment, machine, values)
        if machine.recorded[key] is None:
            try:
                with self._recording:
                    machine.recorded[key] = self._record(segment, machine, values)
            except BackendError as error:
                warnings.warn(f"{segment.function} is launched kernel by kernel: {error}", RuntimeWarning, stacklevel=2)
                self.records = False
                return super()._call(segment, machine, values)
        return self._repeat(machine.recorded[key], values)

    def _record(self, segment: Segment, machine: Machine, values: Sequence[Any]) -> _Recorded:
        converter = self.convert
        assert isinstance(converter, DeviceConverter)
        inputs = [converter.to_tvm(v) if isinstance(v, np.ndarray) else converter.copied(v) for v in values]
        plain = super()._call

        def launch() -> list[Any]:
            with self._ffi.use_raw_stream(converter.device, self._graphs.stream):
                return plain(segment, machine, inputs)

        work = self._recorder.submit(lambda: self._graphs.record(launch, segment.order))
        recording, results = work.result()
        return _Recorded(recording, inputs, results)

    def _repeat(self, recorded: _Recorded, values: Sequence[Any]) -> list[Any]:
        """Copies are ordered with the recording, for the stream that it runs on waits for the one that copies do."""
        converter = self.convert
        assert isinstance(converter, DeviceConverter)
        for there, value in zip(recorded.inputs, values, strict=True):
            converter.fill(there, value)
        recorded.recording.run()
        return [converter.copied(result) for result in recorded.results]

    def _machine(self) -> Machine:
        return Machine(self._load_vm(), (_CUDA, 0, _POOLED, _CPU, 0, _POOLED))

    def _argument(self, segment: Segment, machine: Machine, position: int, value: Array) -> Any:
        return self.convert.to_tvm(value)

    def _addresses(self, segment: Segment, machine: Machine, tensors: Sequence[Any]) -> Any:
        converter = self.convert
        assert isinstance(converter, DeviceConverter)
        if machine.device_workspace is None or machine.device_workspace.shape[0] < segment.workspace:
            size = max(segment.workspace, 1)
            machine.device_workspace = converter.empty((size,), self._ffi.dtype("uint8"), converter.device)
        room = machine.device_workspace.data_ptr()
        table = np.array([0, room, *(t.data_ptr() for t in tensors)], np.int64)
        return labelled(self._ffi, table, converter.device.dlpack_device_type())


# -- memory of the host that is passed as if it were the device's ------------------------------------------------


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("number", ctypes.c_int32))


class _DType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_KEPT: list[object] = []


class _Labelled:
    """Gives a DLPack capsule of host memory that says it is on another device."""

    def __init__(self, array: Array, device: int) -> None:
        shape, strides = (ctypes.c_int64 * 1)(array.size), (ctypes.c_int64 * 1)(1)
        tensor = _Tensor(array.ctypes.data, _Device(device, 0), 1, _DType(0, 64, 1), shape, strides, 0)
        self._managed = _Managed(tensor, None, None)
        self._device = device
        # The capsule has no deleter, so what it points to stays for good: one small table a machine and function.
        _KEPT.append((array, shape, strides, self._managed))

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device, 0

    def __dlpack__(self, **_: object) -> object:
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        capsule: object = make(ctypes.addressof(self._managed), b"dltensor", None)
        return capsule


def labelled(tvm_ffi: ModuleType, table: Array, device: int) -> Any:
    """The int64 vector ``table`` as a tensor of a kind of device, though it stays in the host's memory.

    Compiled functions take all their tensors from one device. The table of addresses is read by their host part only.
    """
    return tvm_ffi.from_dlpack(_Labelled(table, device))
