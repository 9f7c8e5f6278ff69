"""What a timing depends on besides the program: the machine, its settings and the versions of the libraries."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
from typing import Any

from mmopt.runtime.cpu import default_threads

DISTRIBUTIONS = ("mmopt", "apache-tvm", "apache-tvm-ffi", "numpy", "onnxruntime", "openvino", "torch")
IDENTITY = ("cpu", "architecture", "cores", "governor")
"""Facts that must agree before times of two runs may be compared."""


def facts() -> dict[str, Any]:
    """CPU model, cores this process may use, frequency governor, memory in bytes, operating system, versions."""
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cores": default_threads(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "unknown",
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": versions(),
    }


def cpu_model() -> str:
    """The processor's marketing name, or the best the system tells."""
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of the distributions that take part, those installed."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_memory() -> int:
    """Greatest resident size of this process so far, in bytes.

    Linux: ``VmHWM``, because ``ru_maxrss`` there is inherited from the process that started this one.
    """
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def describe(machine: dict[str, Any]) -> str:
    """One line for the head of a table."""
    listed = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    memory = machine["memory_bytes"] / 1e9
    return (
        f"{machine['cpu']}, {machine['cores']} cores, governor {machine['governor']}, {memory:.0f} GB, "
        f"{machine['system']}, Python {machine['python']}; {listed}"
    )


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text().strip()
    except OSError:
        return ""
