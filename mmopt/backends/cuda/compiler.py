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

from mmopt.backends.cuda.resources import Resources, parse_resources
from mmopt.errors import BackendError, UserError

_INSTALL = "run: pip install 'mmopt[cuda]'  (NVIDIA's compiler and headers; no GPU is needed)"


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


def disassembled(compiled: Compiled) -> dict[str, str] | None:
    """Instructions of each kernel of a cubin, as text; None where NVIDIA's disassembler is not installed.

    Raises:
        BackendError: It cannot read the cubin.
    """
    program = toolkit() / "bin" / "nvdisasm"
    if not program.is_file():
        return None
    with tempfile.NamedTemporaryFile(prefix="mmopt-", suffix=".cubin") as file:
        file.write(compiled.cubin)
        file.flush()
        done = subprocess.run([str(program), file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"nvdisasm failed: {done.stderr.strip()[:2000]}")
    _, *sections = re.split(r"^\s*\.section\s+\.text\.(\w+),.*$", done.stdout, flags=re.MULTILINE)
    return dict(zip(sections[::2], sections[1::2], strict=True))


def texts(compiled: Compiled) -> dict[str, str]:
    """PTX of each kernel."""
    _, *parts = re.split(r"^\.visible \.entry (\w+)\($", compiled.ptx.decode(), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def tensor_instructions(compiled: Compiled) -> dict[str, int]:
    """Tensor-core instructions of each kernel: in the machine code or, where nothing here reads that, in PTX."""
    code = disassembled(compiled)
    if code is None:
        return {name: text.count("mma.sync.") for name, text in texts(compiled).items()}
    return {name: len(re.findall(r"\s[HIQ]G?MMA\b", text)) for name, text in code.items()}
