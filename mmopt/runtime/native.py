"""Runs native segments: functions of ``lib.so`` in TVM's virtual machine."""

from __future__ import annotations

import contextlib
import os
import pathlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from mmopt.errors import BackendError
from mmopt.runtime.artifact import Segment
from mmopt.runtime.cpu import allowed_cpus
from mmopt.runtime.libraries import load_runtime
from mmopt.runtime.tensors import Array, Converter, aligned_empty

_CPU, _DEVICE_ID, _POOLED = 1, 0, 2
_SHARE_ALL_CORES = -3  # ThreadGroup::kSpecifyThreadShareAllCore of TVM: no thread is bound to one core
_ONE_CORE_EACH = -2  # ThreadGroup::kSpecifyOneCorePerThread: thread i is bound to CPU i of the list

STAGED = 1 << 18
"""Bytes of the largest input that is copied to memory of the session instead of wrapped where it lies."""

T = TypeVar("T")


class ThreadPoolSize:
    """Gives the calling thread's TVM thread pool a size.

    Every thread that runs compiled code has a pool of its own. Its largest size is fixed when it is made, so a pool
    someone else made smaller cannot grow; then the work is done on a thread of ours.

    Args:
        tvm_ffi: The module.
        threads: The size.
        pin: Bind every thread of the pool to a CPU of its own, and the calling thread to another while it works.
    """

    def __init__(self, tvm_ffi: ModuleType, threads: int, *, pin: bool = False) -> None:
        self.threads, self.pin = threads, pin
        self._configure = tvm_ffi.get_global_func("runtime.config_threadpool")
        self._count = tvm_ffi.get_global_func("runtime.NumThreads")
        cpus = [str(cpu) for cpu in allowed_cpus()]
        repeated = cpus * -(-threads // len(cpus))
        self._smallest, self._all = repeated[:threads], repeated[: max(threads, len(cpus))]
        self._mode, self._first = (_ONE_CORE_EACH if pin else _SHARE_ALL_CORES), {int(cpus[0])}
        self._here = threading.local()
        self._others: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def call(self, work: Callable[[], T]) -> T:
        """Run ``work`` with a pool of the right size."""
        if self._prepare():
            with self._bound():
                return work()
        with self._lock:
            if self._others is None:
                workers = os.cpu_count() or 1
                self._others = ThreadPoolExecutor(workers, "mmopt", initializer=self._prepare)
        return self._others.submit(self._alone, work).result()

    def _alone(self, work: Callable[[], T]) -> T:
        with self._bound():
            return work()

    @contextlib.contextmanager
    def _bound(self) -> Iterator[None]:
        """The calling thread stays on the first CPU, and may go where it could go before in the end."""
        if not self.pin:
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._first)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    def _prepare(self) -> bool:
        if not getattr(self._here, "configured", False):
            # The length of the list is the pool's largest size; the second call lets the threads use all cores.
            self._configure(self._mode, self.threads, self._smallest)
            self._here.configured = True
        elif self._count() == self.threads:
            return True
        self._configure(self._mode, self.threads, self._all)
        return bool(self._count() == self.threads)


class Machine:
    """A virtual machine and those of its functions that were called."""

    def __init__(
        self, module: Any, devices: tuple[int, ...] = (_CPU, _DEVICE_ID, _POOLED), clock: Array | None = None
    ) -> None:
        module["vm_initialization"](*devices)
        self._module = module
        self._functions: dict[str, Any] = {}
        self.clock = clock
        self.weights: dict[str, Any] = {}
        self.staged: dict[tuple[str, int], tuple[Array, Any]] = {}
        self.workspace = aligned_empty(0)
        self.device_workspace: Any = None
        self.recorded: dict[Hashable, Any] = {}

    def function(self, name: str) -> Any:
        if name not in self._functions:
            self._functions[name] = self._module[name]
        return self._functions[name]


class NativeEngine:
    """One loaded library, the weights its functions share, and as many virtual machines as run at the same time."""

    def __init__(
        self,
        library: pathlib.Path,
        weights: dict[str, Array],
        threads: int,
        carried: Sequence[pathlib.Path] = (),
        *,
        pin: bool = False,
    ) -> None:
        self._ffi, self.convert = self._runtime(carried)
        tvm_ffi = self._ffi
        self._pool_size = ThreadPoolSize(tvm_ffi, threads, pin=pin)
        self._weights = weights
        self._tensors: dict[str, Any] = {}
        self._idle: list[Machine] = []
        self._lock = threading.Lock()
        try:
            self._library = self._load(library)
            self._load_vm = self._library["vm_load_executable"]
        except (RuntimeError, ValueError, AttributeError, OSError) as error:
            raise BackendError(f"cannot load the compiled library: {error}", where=str(library)) from error

    def _runtime(self, carried: Sequence[pathlib.Path]) -> tuple[ModuleType, Converter]:
        tvm_ffi = load_runtime(carried)
        return tvm_ffi, Converter(tvm_ffi)

    def _load(self, library: pathlib.Path) -> Any:
        return self._ffi.load_module(str(library))

    def _machine(self) -> Machine:
        return Machine(self._load_vm())

    def run(self, segment: Segment, values: Sequence[Any]) -> list[Any]:
        """Call the segment's function.

        Args:
            segment: A native segment.
            values: Its inputs, numpy arrays or TVM tensors.

        Returns:
            TVM tensors, in the order of the segment's outputs.

        Raises:
            BackendError: The function failed.
        """
        return self._pool_size.call(lambda: self._invoke(segment, values))

    @contextlib.contextmanager
    def clocked(self, kernels: int) -> Iterator[Array]:
        """Runs inside use one virtual machine of their own, whose kernels measure themselves.

        Args:
            kernels: Kernels in the manifest.

        Yields:
            The clock of :class:`Segment`, for the caller to read and clear between runs.
        """
        clock = np.zeros(2 * kernels + 1, np.int64)
        machine = Machine(self._load_vm(), clock=clock)
        with self._lock:
            kept, self._idle = self._idle, [machine]
        try:
            yield clock
        finally:
            with self._lock:
                self._idle = kept

    def _invoke(self, segment: Segment, values: Sequence[Any]) -> list[Any]:
        machine = self._acquire()
        try:
            results = self._call(segment, machine, values)
        except BackendError:
            raise
        except Exception as error:  # tvm_ffi raises whatever type the kernel's check names
            raise BackendError(f"{segment.function} failed: {error}") from error
        # Only a machine that came through goes back: one that failed may hold half a call frame.
        with self._lock:
            self._idle.append(machine)
        if len(results) != len(segment.outputs):
            raise BackendError(f"{segment.function} gave {len(results)} values instead of {len(segment.outputs)}")
        return results

    def _call(self, segment: Segment, machine: Machine, values: Sequence[Any]) -> list[Any]:
        arguments = [
            self._argument(segment, machine, position, value) if isinstance(value, np.ndarray) else value
            for position, value in enumerate(values)
        ]
        if segment.params or segment.table:
            arguments.append(self._param_array(segment, machine))
        return list(machine.function(segment.function)(*arguments))

    def _acquire(self) -> Machine:
        with self._lock:
            return self._idle.pop() if self._idle else self._machine()

    def _argument(self, segment: Segment, machine: Machine, position: int, value: Array) -> Any:
        """An input as a TVM tensor. Small ones are copied to one that is there already, which takes least time."""
        if not segment.fresh or value.nbytes > STAGED or not value.size or value.dtype.isbuiltin != 1:
            return self.convert.to_tvm(value)
        array, tensor = machine.staged.get((segment.function, position), (None, None))
        if array is None or array.shape != value.shape or array.dtype != value.dtype:
            array = aligned_empty(value.nbytes).view(value.dtype.newbyteorder("=")).reshape(value.shape)
            tensor = self.convert.to_tvm(array)
            machine.staged[segment.function, position] = array, tensor
        np.copyto(array, value)
        return tensor

    def _param_array(self, segment: Segment, machine: Machine) -> Any:
        """The last argument of the segment's function, with memory that belongs to ``machine``."""
        key = segment.function
        if key not in machine.weights:
            with self._lock:
                tensors = [self._tensor(name) for name in segment.params]
            if segment.table:
                tensors.insert(0, self._addresses(segment, machine, tensors))
            machine.weights[key] = self._ffi.Array(tensors)
        return machine.weights[key]

    def _addresses(self, segment: Segment, machine: Machine, tensors: Sequence[Any]) -> Any:
        return self.convert.to_tvm(self._table(segment, machine, tensors))

    def _table(self, segment: Segment, machine: Machine, tensors: Sequence[Any]) -> Array:
        if machine.workspace.nbytes < segment.workspace:
            machine.workspace = aligned_empty(segment.workspace)
        clock = 0 if machine.clock is None else machine.clock.ctypes.data
        return np.array([clock, machine.workspace.ctypes.data, *(t.data_ptr() for t in tensors)], np.int64)

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            if name not in self._weights:
                raise BackendError(f"the artifact has no weight {name!r}")
            self._tensors[name] = self.convert.to_tvm(self._weights[name])
        return self._tensors[name]
