"""The NVIDIA GPU of this machine, as the driver knows it; nothing has to be installed to find that there is none."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Mapping
from typing import Any

from mmopt.errors import UnsupportedError

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_DRIVERS = {"win32": "nvcuda.dll"}


@functools.lru_cache(maxsize=1)
def present_gpu() -> int | None:
    """Compute capability of the first GPU, as 10 · major + minor; None where there is no GPU or no driver."""
    try:
        driver = ctypes.CDLL(_DRIVERS.get(sys.platform, "libcuda.so.1"))
    except OSError:
        return None
    device = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    for value, attribute in ((major, _MAJOR), (minor, _MINOR)):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return 10 * major.value + minor.value


def check_gpu(target: Mapping[str, Any], *, where: str) -> None:
    """Raise when an artifact needs a GPU that this machine does not have. Others pass.

    Machine code runs on later GPUs of the same major version; on newer ones the driver compiles what comes with it.

    Args:
        target: What the artifact is compiled for.
        where: The artifact, for the error.

    Raises:
        UnsupportedError: There is no NVIDIA GPU, or it is older.
    """
    if target.get("kind") != "cuda":
        return
    present, needed = present_gpu(), int(target.get("sm") or 0)
    hint = "compile it again with --target for this machine"
    if present is None:
        what = f"the artifact is compiled for {target.get('name')}; there is no NVIDIA GPU here, or no driver for it"
        raise UnsupportedError(what, where=where, hint=hint)
    if present < needed:
        what = f"the artifact is compiled for {target.get('name')} (sm_{needed}); the GPU here is sm_{present}"
        raise UnsupportedError(what, where=where, hint=hint)
