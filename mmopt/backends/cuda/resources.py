"""What kernels take of a multiprocessor, read from the compiler: no GPU is needed to know it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from mmopt.backends.profile import Profile


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one kernel takes of a multiprocessor.

    Attributes:
        registers: 32-bit registers of a thread.
        shared: Bytes of shared memory of a block, known at compile time.
        stack: Bytes of local memory of a thread, for arrays that are not in registers.
        spills: Bytes that did not find a register, stored and loaded.
    """

    registers: int
    shared: int
    stack: int
    spills: int


_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse_resources(log: str) -> dict[str, Resources]:
    """What the assembler says about each kernel when it is asked to (``-v``)."""
    found: dict[str, Resources] = {}
    name, stack, spills = "", 0, 0
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            name, stack, spills = match.group(1), 0, 0
        elif match := _STACK.search(line):
            stack, spills = int(match.group(1)), int(match.group(2)) + int(match.group(3))
        elif (match := _USED.search(line)) and name:
            shared = _SHARED.search(line)
            found[name] = Resources(int(match.group(1)), int(shared.group(1)) if shared else 0, stack, spills)
    return found


def occupancy(resources: Resources, threads: int, profile: Profile) -> float:
    """Part of a multiprocessor's threads that blocks of a kernel can fill, by the rules of its allocator.

    Registers are given out to warps in units of 256, shared memory to blocks in units of 128 bytes with 1 KiB for the
    system (CUDA C++ Programming Guide, compute capabilities).

    Args:
        resources: What the kernel takes.
        threads: Threads of a block.
        profile: A ``cuda`` profile.
    """
    warps = -(-threads // 32)
    by_threads = profile.multiprocessor_threads // (warps * 32)
    by_registers = profile.multiprocessor_registers // (-(-resources.registers * 32 // 256) * 256 * warps)
    by_shared = profile.multiprocessor_shared_bytes // (-(-resources.shared // 128) * 128 + 1024)
    blocks = min(by_threads, by_registers, by_shared, 32)
    return blocks * warps * 32 / profile.multiprocessor_threads


_BOUNDS = re.compile(r"__launch_bounds__\((\d+)\) (\w+)\(")


def described(resources: Mapping[str, Resources], source: str, profile: Profile) -> dict[str, list[dict[str, Any]]]:
    """What is said of kernels in reports, by the name of the function that launches them.

    Args:
        resources: By name of the kernel.
        source: The text they are made from, which says how many threads their blocks have.
        profile: A ``cuda`` profile.
    """
    threads = {name: int(count) for count, name in _BOUNDS.findall(source)}
    found: dict[str, list[dict[str, Any]]] = {}
    for name, taken in resources.items():
        record: dict[str, Any] = dataclasses.asdict(taken)
        if name in threads:
            record |= {"threads": threads[name], "occupancy": round(occupancy(taken, threads[name], profile), 3)}
        found.setdefault(launcher(name), []).append(record)
    return found


def launcher(kernel: str) -> str:
    """Name of the function that launches a kernel."""
    return re.sub(r"(_bare)?_kernel(_\d+)?$", "", kernel)
