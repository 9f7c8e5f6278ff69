"""CUDA C++ to machine code, with NVIDIA's compiler from pip packages; no GPU, driver or toolkit is needed.

A fat binary holds a cubin for each architecture asked for, and PTX of the last one, which the driver compiles on GPUs
that came later. ``cuModuleLoadData`` picks what fits.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from mmopt.errors import BackendError, UserError

_INSTALL = "run: pip install 'mmopt[cuda]'  (NVIDIA's compiler and headers; no GPU is needed)"


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


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Machine code of one architecture.

    Attributes:
        sm: The architecture, as 10 · major + minor.
        cubin: An ELF file.
        ptx: The same as text for later architectures.
        resources: By name of the kernel.
    """

    sm: int
    cubin: bytes
    ptx: bytes
    resources: dict[str, Resources]


@functools.lru_cache(maxsize=1)
def toolkit() -> pathlib.Path:
    """Folder of the pip packages that holds NVIDIA's headers and programs.

    Raises:
        UserError: They are not installed.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = [pathlib.Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        for found in sorted(folder.glob("cu*"), reverse=True):
            if (found / "include" / "cuda_fp16.h").is_file() and (found / "bin" / "fatbinary").is_file():
                return found
    raise UserError("NVIDIA's compiler is not installed", where="target cuda", hint=_INSTALL)


def _nvrtc() -> Any:
    try:
        return importlib.import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        raise UserError("NVIDIA's compiler is not installed", where="target cuda", hint=_INSTALL) from error


def compile_source(source: str, sm: int) -> Compiled:
    """Compile CUDA C++ for one architecture.

    Args:
        source: The whole translation unit.
        sm: 80 for ``sm_80``.

    Raises:
        UserError: The compiler is not installed.
        BackendError: It refuses the source.
    """
    nvrtc, include = _nvrtc(), toolkit() / "include"
    options = [
        f"--gpu-architecture=sm_{sm}",
        "--std=c++17",
        "--ptxas-options=-v",
        "--disable-warnings",
        "--extra-device-vectorization",
        f"-I{include}",
        f"-I{include / 'cccl'}",
    ]
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], [])
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _fetched(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BackendError(f"CUDA C++ for sm_{sm} does not compile: {log.strip()[:2000]}")
        cubin = _fetched(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
        ptx = _fetched(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program).rstrip(b"\0")
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Compiled(sm, cubin, ptx, parse_resources(log))


def _fetched(size: Any, get: Any, program: Any) -> bytes:
    _, count = size(program)
    buffer: bytes = b" " * count
    get(program, buffer)
    return buffer


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


def fat_binary(compiled: Sequence[Compiled]) -> bytes:
    """One image with the machine code of every architecture, and PTX of the highest.

    Raises:
        BackendError: The program that packs it fails.
    """
    with tempfile.TemporaryDirectory(prefix="mmopt-") as name:
        folder = pathlib.Path(name)
        images: list[str] = []
        for one in compiled:
            path = folder / f"sm_{one.sm}.cubin"
            path.write_bytes(one.cubin)
            images.append(f"--image3=kind=elf,sm={one.sm},file={path}")
        last = max(compiled, key=lambda one: one.sm)
        text = folder / f"compute_{last.sm}.ptx"
        text.write_bytes(last.ptx)
        images.append(f"--image3=kind=ptx,sm={last.sm},file={text}")
        out = folder / "kernels.fatbin"
        command = [str(toolkit() / "bin" / "fatbinary"), "--64", "--compress=true", f"--create={out}", *images]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackendError(f"fatbinary failed: {(done.stderr or done.stdout).strip()[:2000]}")
        return out.read_bytes()


def occupancy(resources: Resources, threads: int, *, registers: int, shared: int, most_threads: int) -> float:
    """Part of a multiprocessor's threads that blocks of a kernel can fill, by the rules of its allocator.

    Registers are given out to warps in units of 256, shared memory to blocks in units of 128 bytes with 1 KiB for the
    system (CUDA C++ Programming Guide, compute capabilities).

    Args:
        resources: What the kernel takes.
        threads: Threads of a block.
        registers: Registers of a multiprocessor.
        shared: Bytes of shared memory of a multiprocessor.
        most_threads: Threads that fit on a multiprocessor.
    """
    warps = -(-threads // 32)
    by_threads = most_threads // (warps * 32)
    by_registers = registers // (-(-resources.registers * 32 // 256) * 256 * warps)
    by_shared = shared // (-(-resources.shared // 128) * 128 + 1024)
    blocks = min(by_threads, by_registers, by_shared, 32)
    return blocks * warps * 32 / most_threads
