"""Loads TVM's runtime without its compiler: ``tvm_ffi`` plus two shared libraries, never ``import tvm``."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import pathlib
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from mmopt.errors import BackendError

_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_PREFIX = "" if sys.platform == "win32" else "lib"
RUNTIME_LIBRARIES = tuple(f"{_PREFIX}{name}{_SUFFIX}" for name in ("tvm_runtime", "tvm_runtime_extra"))
"""File names of the libraries a native segment needs."""

_SPIN_VARIABLE, _SPINS = "TVM_THREAD_POOL_SPIN_COUNT", "1000"
"""How often a thread of TVM's pool looks for work before it sleeps: some 0.2 µs each time. TVM's own 300000 keep every
core busy for 60 ms after each run. The variable is TVM's; whoever sets it decides."""

_lock = threading.Lock()
_loaded: list[ctypes.CDLL] = []


class _NoTorch:
    """An import hook that hides torch from the thread that installed it."""

    def __init__(self) -> None:
        self._owner = threading.get_ident()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name == "torch" and threading.get_ident() == self._owner:
            raise ModuleNotFoundError("torch is not needed to run an artifact", name=name)
        return None


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """Hide torch from imports inside: tvm and tvm_ffi import it when they can, which takes seconds and much memory.

    Does nothing when torch has been imported already.
    """
    if "torch" in sys.modules:
        yield
        return
    hook = _NoTorch()
    sys.meta_path.insert(0, hook)
    try:
        yield
    finally:
        sys.meta_path.remove(hook)


def import_tvm_ffi() -> ModuleType:
    """``tvm_ffi``, imported so that it does not pull in torch."""
    with _lock:
        if "tvm_ffi" in sys.modules or "torch" in sys.modules:
            return importlib.import_module("tvm_ffi")
        with without_torch():
            return importlib.import_module("tvm_ffi")


def installed_libraries() -> list[pathlib.Path]:
    """The runtime libraries of the installed ``apache-tvm`` wheel; empty when it is not installed."""
    spec = importlib.util.find_spec("tvm")
    folders = [pathlib.Path(folder) / "lib" for folder in (spec.submodule_search_locations or ())] if spec else []
    return [folder / name for folder in folders for name in RUNTIME_LIBRARIES if (folder / name).exists()]


def load_runtime(carried: Sequence[pathlib.Path] = ()) -> ModuleType:
    """Make TVM's virtual machine available in this process.

    Args:
        carried: Runtime libraries an artifact brings along; used when none is loaded yet.

    Returns:
        The module ``tvm_ffi``.

    Raises:
        BackendError: No runtime library can be found or loaded.
    """
    os.environ.setdefault(_SPIN_VARIABLE, _SPINS)
    tvm_ffi = import_tvm_ffi()
    with _lock:
        # A second copy would register every function again, which aborts the process.
        if tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True) is None:
            _load([path for path in carried if path.name in RUNTIME_LIBRARIES] or installed_libraries())
    return tvm_ffi


def _load(paths: Sequence[pathlib.Path]) -> None:
    if not any(path.name == RUNTIME_LIBRARIES[0] for path in paths):
        raise BackendError(
            f"{RUNTIME_LIBRARIES[0]} is neither in the artifact nor installed",
            hint="install apache-tvm, or write the artifact with its runtime inside",
        )
    for path in sorted(paths, key=lambda path: RUNTIME_LIBRARIES.index(path.name)):
        try:
            _loaded.append(ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL))
        except OSError as error:
            raise BackendError(f"cannot load the runtime library: {error}", where=str(path)) from error
