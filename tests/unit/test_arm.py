"""Compiling for Arm processors on another machine: what comes out, and what is said when something is missing."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re
import shutil
import struct

import numpy as np
import pytest
import tvm

from benchmarks.arm import Loop, compiled, innermost, kernel_of
from benchmarks.zoo.layers import Product
from mmopt.backends import linking, runner
from mmopt.backends.cpu import intrinsics
from mmopt.backends.cpu.emit import KernelEmitter
from mmopt.backends.cpu.pipeline import code_generation, target_of
from mmopt.backends.linking import Zig, linker_for
from mmopt.backends.profile import load_profile
from mmopt.cli import main
from mmopt.errors import BackendError, UserError
from mmopt.runtime import load_artifact
from tests.kernels import Arrays
from tests.small_models import two_layers
from tests.unit.test_kernel_matmul import blocking_for, packed, product

needs_zig = pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None, reason="ziglang is not installed (pip install 'mmopt[arm]')"
)

AARCH64, X86_64 = 183, 62
"""ELF's numbers of machines."""


def machine_of(library: pathlib.Path) -> int:
    """The machine in the header of an ELF shared library."""
    header = library.read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    kind, machine = struct.unpack("<HH", header[16:20])
    assert kind == 3, "not a shared library"
    return int(machine)


@needs_zig
def test_an_artifact_for_another_machine(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = tmp_path / "a.mmopt"
    model = two_layers(tmp_path / "model.onnx")
    assert main.run(["optimize", str(model), "--target", "cortex-a76", "-o", str(artifact)]) == 0
    assert machine_of(artifact / "lib.so") == AARCH64
    target = json.loads((artifact / "manifest.json").read_text())["target"]
    assert target["kind"] == "arm"
    assert {"asimd", "asimddp", "asimdhp", "atomics"} <= set(target["features"])
    assert "cannot run here" in capsys.readouterr().out
    assert main.run(["run", str(artifact), "--inputs", str(tmp_path / "none.npz")]) != 0


@needs_zig
def test_a_library_for_macos(tmp_path: pathlib.Path) -> None:
    artifact = tmp_path / "a.mmopt"
    model = two_layers(tmp_path / "model.onnx")
    assert main.run(["optimize", str(model), "--target", "apple-m1", "-o", str(artifact), "-q"]) == 0
    magic, cpu = struct.unpack("<II", (artifact / "lib.so").read_bytes()[:8])
    assert (magic, cpu) == (0xFEEDFACF, 0x0100000C)  # 64-bit Mach-O, ARM64


@needs_zig
def test_zig_links_where_there_is_no_compiler(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(linking.shutil, "which", lambda name: None)
    assert isinstance(linker_for(load_profile("cpu")), Zig)
    model = two_layers(tmp_path / "model.onnx")
    assert main.run(["optimize", str(model), "-o", str(tmp_path / "a.mmopt"), "-q"]) == 0
    with load_artifact(tmp_path / "a.mmopt", threads=1) as session:
        assert session.run({"x": np.ones((3, 16), np.float32)})["y"].shape == (3, 4)


@needs_zig
def test_what_the_linker_says_is_passed_on(tmp_path: pathlib.Path) -> None:
    with pytest.raises(BackendError, match=r"nothing\.o"):
        Zig(load_profile("cortex-a76"))(str(tmp_path / "lib.so"), [str(tmp_path / "nothing.o")])


@pytest.mark.parametrize("target", ["cortex-a76", "apple-m1", "cpu"])
def test_without_a_linker_it_says_what_to_install(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(linking.shutil, "which", lambda name: None)
    monkeypatch.setattr(linking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mmopt\[arm\]'"):
        linker_for(load_profile(target))


def test_the_runner_is_built_by_zig_only(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mmopt\[arm\]'"):
        runner.build_runner(load_profile("cortex-a76"), tmp_path)


def assembly(target: str, rows: int = 128) -> str:
    """Code of a product with a packed constant."""
    intrinsics.register()
    profile = load_profile(target)
    data = Arrays()
    a, b = data.source((rows, 256)), data.data((256, 96), "float32")
    blocking = blocking_for(profile, a, 96)
    nest = product(a, packed(data, b, blocking.tile.columns), blocking, columns=96)
    function = KernelEmitter([nest.output], profile).build().function.with_attr("global_symbol", "kernel")
    with target_of(profile) as built_for, code_generation():
        return str(tvm.compile(tvm.IRModule({"kernel": function}), target=built_for).mod.inspect_source("s"))


@pytest.mark.parametrize("target", ["cortex-a76", "armv8.0"])
def test_products_multiply_by_elements(target: str) -> None:
    text = assembly(target)
    loop = innermost(text)
    assert loop is not None
    assert re.search(r"fmla\s+v\d+\.4s, v\d+\.4s, v\d+\.s\[3\]", "\n".join(loop.products))
    assert loop.multiplies >= 60, "a tile that fills the registers"
    assert loop.overhead <= 1.25
    words = {line.split()[0] for line in loop.lines}
    assert not words & {"dup", "ld1r", "prfm"}, "nothing is copied to lanes, or fetched ahead"
    assert "sdot" not in text


def test_products_of_bytes_execute_little_but_products() -> None:
    """Four registers of B at a time, two of a row of A, and pointers that move on with the loads."""
    profile = load_profile("cortex-a76")
    _, code = kernel_of(Product(1, 36, 256, 64), "int8", profile)
    text = str(compiled(code, profile).mod.inspect_source("s"))
    loop = innermost(text)
    assert loop is not None
    assert loop.multiplies == 128, "a tile of four rows by four vectors, 32 deep"
    assert loop.overhead <= 1.12
    words = {line.split()[0] for line in loop.lines}
    assert {"ldp", "ld1"} < words
    assert not words & {"add", "movi", "ldr", "prfm"}, "pointers move by themselves"
    _, end = text.split(loop.lines[-1])
    hand_over = end[: end.index("b.ne")]
    assert "fmax" in hand_over, "a rectifier is one instruction"
    assert not re.search(r"\[sp", hand_over), "sums do not pass through memory"


@pytest.mark.skipif(not any(map(shutil.which, ("llvm-mca", "llvm-mca-19"))), reason="llvm-mca is not installed")
def test_pipes_are_busy() -> None:
    loop = innermost(assembly("neoverse-n1"))
    assert loop is not None
    assert loop.busy(load_profile("neoverse-n1")) >= 0.85
    slowed = Loop([line for line in loop.lines for line in (line, "\tfdiv\tv0.4s, v0.4s, v0.4s")])
    assert slowed.busy(load_profile("neoverse-n1")) < 0.3
