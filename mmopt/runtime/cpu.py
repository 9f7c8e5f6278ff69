"""What the running CPU can do: instruction sets, for the check before a library is loaded, and cores, for threads."""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any

from mmopt.errors import UnsupportedError
from mmopt.runtime.gpu import check_gpu

# LLVM's name of a feature, normalized → the kernel's name of it, where the two differ by more than punctuation.
_KERNEL_NAMES = {
    "x87": "fpu",
    "64bit": "lm",
    "evex512": "avx512f",
    "sse3": "pni",
    "lzcnt": "abm",
    "pclmul": "pclmulqdq",
    "rdrnd": "rdrand",
    "prfchw": "3dnowprefetch",
    "sahf": "lahflm",
    "crc32": "sse42",
    "sha": "shani",
    "neon": "asimd",
    "advsimd": "asimd",
    "fparmv8": "fp",
    "floatingpoint": "fp",
    "neonhpfp": "fphp",
    "dotprod": "asimddp",
    "fullfp16": "asimdhp",
    "fp16": "asimdhp",
    "fp16fml": "asimdfhm",
    "lse": "atomics",
    "rdm": "asimdrdm",
    "rcpc": "lrcpc",
    "crc": "crc32",
}
_SAME_MACHINE = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}

_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_TILE_DATA = 18


def _normalize(feature: str) -> str:
    return re.sub(r"[^a-z0-9]", "", feature.lower())


def machine() -> str:
    """Architecture of this process: ``x86_64``, ``aarch64``, …"""
    name = platform.machine().lower()
    return _SAME_MACHINE.get(name, name)


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return ""


@functools.lru_cache(maxsize=1)
def running_features() -> frozenset[str]:
    """Normalized names of the instruction-set features of this CPU; empty when the system does not tell."""
    if platform.system() == "Darwin":
        names = _darwin_features()
    else:
        match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
        names = match.group(1).split() if match else []
    return frozenset(_normalize(name) for name in names)


def _darwin_features() -> list[str]:
    keys = ["machdep.cpu.features", "machdep.cpu.leaf7_features", "hw.optional"]
    done = subprocess.run(["/usr/sbin/sysctl", *keys], capture_output=True, text=True, check=False)
    names: list[str] = []
    for line in done.stdout.splitlines():
        key, _, value = line.partition(": ")
        if key.startswith("machdep"):
            names += value.split()
        elif value.strip() == "1":
            name = _normalize(re.sub(r"^hw\.optional\.(arm\.FEAT_|arm\.)?", "", key))
            names.append(_KERNEL_NAMES.get(name, name))
    return names


def missing_features(required: Iterable[str], available: frozenset[str]) -> list[str]:
    """Those of ``required`` (LLVM's or the kernel's names, ``+`` allowed in front) that ``available`` lacks.

    A feature that is switched off (``-avx512f``) is never missing.
    """

    def present(feature: str) -> bool:
        name = _normalize(feature)
        return name in available or _KERNEL_NAMES.get(name, name) in available

    return [name for name in required if not name.startswith("-") and not present(name)]


def check_target(target: Mapping[str, Any], *, where: str) -> None:
    """Raise when code compiled for ``target`` cannot run here; loading it would end in an illegal instruction.

    Args:
        target: ``triple`` and ``features`` are looked at; what is absent is not checked.
        where: The artifact, for the error.

    Raises:
        UnsupportedError: Another architecture, or instruction sets this CPU does not have.
    """
    check_gpu(target, where=where)
    name = target.get("name") or "its target"
    wanted = str(target.get("triple") or "").split("-")[0].lower()
    wanted = _SAME_MACHINE.get(wanted, wanted)
    if wanted and wanted != machine():
        raise UnsupportedError(
            f"the artifact is compiled for {name} ({wanted}), this machine is {machine()}",
            where=where,
            hint="compile it again with --target for this machine",
        )
    available = running_features()
    features = target.get("features") or ()
    missing = missing_features(features, available) if available else []
    if missing:
        raise UnsupportedError(
            f"the artifact is compiled for {name}, which has {', '.join(missing)}; this CPU does not",
            where=where,
            hint="compile it again with --target for this machine",
        )
    request_permissions(features, where=where)


def request_permissions(features: Iterable[str], *, where: str) -> None:
    """Ask the system for what has to be asked for before code with ``features`` may run: AMX tiles, on Linux.

    It holds for all threads of the process. Asking again is harmless.

    Args:
        features: What the code needs.
        where: The artifact, for the error.

    Raises:
        UnsupportedError: The system refuses.
    """
    if "amxtile" not in {_normalize(feature) for feature in features} or platform.system() != "Linux":
        return
    if error := _ask_for_tiles():
        raise UnsupportedError(
            f"the system does not let this process use AMX tiles: {os.strerror(error)}",
            where=where,
            hint="Linux 5.16 or newer allows them; or compile again with --target icelake",
        )


def _ask_for_tiles() -> int:
    """Error number of the request, 0 when it is granted."""
    libc = ctypes.CDLL(None, use_errno=True)
    refused = libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA)
    return ctypes.get_errno() if refused else 0


def allowed_cpus() -> tuple[int, ...]:
    """Numbers of the logical CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def default_threads() -> int:
    """Threads to use when nobody says: one per physical core this process may use, within the cgroup's CPU quota."""
    cpus = allowed_cpus()
    cores = {_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        return max(1, min(len(cores), round(int(quota) / int(period))))
    return max(1, len(cores))
