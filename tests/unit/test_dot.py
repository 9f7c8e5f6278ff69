"""Micro-kernels of dot-product instructions: exact sums on every instruction set, and the instructions themselves."""

from __future__ import annotations

import dataclasses
import functools
import re

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import tirx

from mmopt.backends.cpu.dot import (
    Dot,
    MicroKernel,
    TilePanels,
    address,
    configure_tiles,
    dot_for,
    importing,
    pack,
    release_tiles,
)
from mmopt.backends.cpu.loops import i64, seq
from mmopt.backends.cpu.pipeline import code_generation, target_of
from mmopt.backends.profile import Profile, load_profile
from mmopt.runtime.cpu import missing_features, request_permissions, running_features

LEVELS = ["x86-64-v3", "skylake-avx512", "icelake", "znver4", "sapphirerapids"]
LEVELS += ["armv8.0", "cortex-a76", "neoverse-v1"]
PAIRS = [
    ("uint8", "int8"),
    ("int8", "int8"),
    ("bfloat16", "bfloat16"),
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("float16", "float16"),
    ("float32", "int8"),
]
INSTRUCTIONS = {
    ("x86-64-v3", "uint8"): r"vpmaddwd\b.*%ymm",
    ("skylake-avx512", "int8"): r"vpmaddwd\b.*%zmm",
    ("icelake", "uint8"): r"vpdpbusd\b.*%zmm",
    ("znver4", "uint8"): r"vpdpbusd\b.*%zmm",
    ("znver4", "bfloat16"): r"vdpbf16ps\b.*%zmm",
    ("sapphirerapids", "uint8"): r"tdpbusd\b.*%tmm",
    ("sapphirerapids", "int8"): r"tdpbssd\b.*%tmm",
    ("sapphirerapids", "bfloat16"): r"tdpbf16ps\b.*%tmm",
    ("x86-64-v3", "bfloat16"): r"vfmadd\d+ps\b.*%ymm",
    ("armv8.0", "int8"): r"smlal2?\s+v\d+\.4s, v\d+\.[48]h, v\d+\.h\[\d\]",
    ("armv8.0", "uint8"): r"smlal2?\s+v\d+\.4s, v\d+\.[48]h, v\d+\.h\[\d\]",
    ("armv8.0", "bfloat16"): r"fmla\s+v\d+\.4s, v\d+\.4s, v\d+\.s\[\d\]",
    ("cortex-a76", "int8"): r"sdot\s+v\d+\.4s, v\d+\.16b, v\d+\.4b\[\d\]",
    ("cortex-a76", "uint8"): r"sdot\s+v\d+\.4s, v\d+\.16b, v\d+\.4b\[\d\]",
    ("neoverse-v1", "int8"): r"\bsmmla\s+v\d+\.4s, v\d+\.16b, v\d+\.16b",
    ("neoverse-v1", "uint8"): r"\busmmla\s+v\d+\.4s, v\d+\.16b, v\d+\.16b",
    ("neoverse-v1", "bfloat16"): r"\bbfmmla\s+v\d+\.4s, v\d+\.8h, v\d+\.8h",
}
"""What the code for a target must contain, by the type of the left operand."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One call of a micro-kernel: its size, and how many segments A is read in (spread out when more than one)."""

    kernel: MicroKernel
    steps: int
    segments: int = 1

    @property
    def depth(self) -> int:
        return self.steps * self.kernel.dot.step

    def function(self, name: str) -> tirx.PrimFunc:
        """A function of (A, B, C, offsets)."""
        kernel, dot = self.kernel, self.kernel.dot
        width = self.segments * self.depth
        buffers = [
            tirx.decl_buffer((i64(kernel.rows), i64(width)), stored(dot.a), "A"),
            tirx.decl_buffer((i64(width // dot.group), i64(kernel.columns), i64(dot.group)), stored(dot.b), "B"),
            tirx.decl_buffer((i64(kernel.rows), i64(kernel.columns)), dot.total, "C"),
            tirx.decl_buffer((i64(self.segments),), "int64", "O"),
        ]
        a, b, c, o = (address(x[tuple(i64(0) for _ in x.shape)]) for x in buffers)
        stride = width * np.dtype(stored(dot.a)).itemsize
        call = kernel.call(c, kernel.columns * 4, a, stride, b, self.steps, segments=self.segments, offsets=o)
        body = seq(configure_tiles(kernel.rows), call, release_tiles()) if dot.tiled else call
        attributes = {"tirx.noalias": True, "s_tir": True, "tirx.is_scheduled": True, "global_symbol": name}
        return tirx.PrimFunc(buffers, importing([kernel], body)).with_attr(attributes)


def stored(dtype: str) -> str:
    return "uint16" if dtype == "bfloat16" else dtype


def numbers(random: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Data over the whole range of eight-bit integers; standard normal floats."""
    if dtype == "int16":  # holds either kind of eight-bit integers
        return random.integers(-128, 256, shape).astype(dtype)
    if "int" in dtype:
        info = np.iinfo(dtype)
        return random.integers(info.min, info.max + 1, shape).astype(dtype)
    data = random.standard_normal(shape)
    return data.astype(ml_dtypes.bfloat16).view(np.uint16) if dtype == "bfloat16" else data.astype(dtype)


def exact(data: np.ndarray, dtype: str) -> np.ndarray:
    """As float64, in which all sums of these tests are exact or nearly so."""
    return (data.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else data).astype(np.float64)


def blocks(dot: Dot) -> list[Block]:
    """The smallest, the largest, several segments, adding to what is there, fetching ahead."""
    rows = dot.most_rows
    made = [
        Block(MicroKernel(dot, 1, 1), 1),
        Block(MicroKernel(dot, rows[-1], dot.vectors), 5),
        Block(MicroKernel(dot, 3, 1, indexed=True), 2, segments=3),
        Block(MicroKernel(dot, rows[0], 1, accumulate=True, prefetch=2), 3),
        Block(MicroKernel(dot, rows[1] - 1, 2, accumulate=True, indexed=True), 1, segments=2),
    ]
    for step in range(dot.group, dot.deepest + 1, dot.group):  # segments are cut into steps that fit them
        shorter = dataclasses.replace(dot, step=step)
        vectors = step // dot.group % dot.vectors + 1
        made.append(Block(MicroKernel(shorter, rows[vectors - 1], vectors, indexed=True), 2, segments=2))
    return made


@functools.cache
def dot_of(level: str, a: str, b: str) -> Dot:
    found = dot_for(load_profile(level), a, b)
    assert found is not None
    return found


def compiled(level: str, chosen: list[Block]) -> tvm.runtime.Module:
    functions = {f"f{n}": block.function(f"f{n}") for n, block in enumerate(chosen)}
    with code_generation():
        return tvm.compile(tvm.IRModule(functions), target=target_of(load_profile(level)))


@pytest.mark.parametrize("level", LEVELS)
def test_sums_are_right(level: str) -> None:
    profile = load_profile(level)
    if missing := missing_features(profile.features, running_features()):
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    request_permissions(profile.features, where=level)
    cases = [block for a, b in PAIRS for block in blocks(dot_of(level, a, b))]
    module = compiled(level, cases)
    random = np.random.default_rng(0)
    for n, block in enumerate(cases):
        kernel, dot = block.kernel, block.kernel.dot
        width = block.segments * block.depth
        a = numbers(random, dot.a, (kernel.rows, width))
        b = numbers(random, dot.b, (width, kernel.columns))
        c = numbers(random, "int8", (kernel.rows, kernel.columns)).astype(dot.total)
        begun = c.astype(np.float64) if kernel.accumulate else 0.0
        # The segments are read last to first, so that their offsets matter; B comes in the order they are read.
        size = block.depth * a.itemsize
        offsets = np.arange(block.segments)[::-1].astype(np.int64) * size
        order = b.reshape(block.segments, block.depth, -1)[::-1].reshape(b.shape) if kernel.indexed else b
        out = tvm.runtime.tensor(c)
        module[f"f{n}"](*map(tvm.runtime.tensor, (a, pack(order, dot, kernel.columns)[0])), out, offsets_of(offsets))
        want = begun + exact(a, dot.a) @ exact(b, dot.b)
        bound = 0 if dot.total == "int32" else 1e-5 * (np.abs(exact(a, dot.a)) @ np.abs(exact(b, dot.b)) + 128)
        assert np.all(np.abs(out.numpy() - want) <= bound), f"{kernel.name} with {block.segments} segments"


def offsets_of(offsets: np.ndarray) -> tvm.runtime.Tensor:
    return tvm.runtime.tensor(np.ascontiguousarray(offsets))


@pytest.mark.parametrize(("level", "a"), INSTRUCTIONS)
def test_a_target_uses_its_instruction(level: str, a: str) -> None:
    dot = dot_of(level, a, "bfloat16" if a == "bfloat16" else "int8")
    text = compiled(level, [blocks(dot)[1]]).mod.inspect_source("asm")
    assert re.search(INSTRUCTIONS[level, a], text), f"{dot.name} not in the code for {level}"
    assert "vpmaddubsw" not in text


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_kernels_fit_the_registers(level: str, a: str, b: str) -> None:
    dot, profile = dot_of(level, a, b), load_profile(level)
    for vectors, rows in enumerate(dot.most_rows, 1):
        assert dot.tiled or rows * vectors + vectors + 1 <= profile.registers
    assert dot.depth(1) == dot.step
    assert dot.step % dot.group == 0


def test_two_profiles_never_share_a_wrong_kernel() -> None:
    names: dict[str, str] = {}
    for level in LEVELS:
        for a, b in PAIRS:
            for block in blocks(dot_of(level, a, b)):
                kernel = block.kernel
                assert names.setdefault(kernel.name, kernel.llvm()) == kernel.llvm()


def test_what_has_no_instruction() -> None:
    wide = load_profile("sapphirerapids")
    assert dot_for(wide, "float16", "bfloat16") is None
    assert dot_for(load_profile("cortex-a76"), "float16", "bfloat16") is None
    narrow = Profile("narrow", vector_bytes=16)
    assert dot_for(narrow, "uint8", "int8") is None


@pytest.mark.parametrize(("level", "group"), [("x86-64-v3", 2), ("icelake", 4), ("sapphirerapids", 4)])
def test_packed_panels_hold_groups_of_depth(level: str, group: int) -> None:
    dot = dot_of(level, "uint8", "int8")
    b = np.arange(5 * 18, dtype=np.int8).reshape(5, 18)
    panels = pack(b, dot, 16)
    assert dot.group == group
    assert panels.shape == (2, dot.depth(5) // group, 16, group)
    for k in range(dot.depth(5)):
        for n in range(32):
            want = b[k, n] if k < 5 and n < 18 else 0
            assert panels[n // 16, k // group, n % 16, k % group] == want


AMX = "sapphirerapids"


@pytest.mark.parametrize(
    ("rows", "steps", "panels", "accumulate"), [(32, 2, 3, False), (9, 1, 2, False), (20, 3, 2, True)]
)
def test_panels_of_amx(rows: int, steps: int, panels: int, accumulate: bool) -> None:
    """All panels of a product in one call, for each of two types."""
    profile = load_profile(AMX)
    if missing := missing_features(profile.features, running_features()):
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    request_permissions(profile.features, where=AMX)
    random = np.random.default_rng(0)
    for dot in (dot_of(AMX, "bfloat16", "bfloat16"), dot_of(AMX, "uint8", "int8")):
        kernel = TilePanels(dot, rows, steps, accumulate)
        depth, columns = steps * dot.step, 32 * panels
        a, b = numbers(random, dot.a, (rows, depth)), numbers(random, dot.b, (depth, columns))
        c = numbers(random, "int8", (rows, columns)).astype(dot.total)
        want = (c.astype(np.float64) if accumulate else 0) + exact(a, dot.a) @ exact(b, dot.b)
        packed = pack(b, dot, 32)
        shapes = [(a.shape, stored(dot.a)), (packed.shape, stored(dot.b)), (c.shape, dot.total)]
        buffers = [tirx.decl_buffer([i64(n) for n in shape], dtype) for shape, dtype in shapes]
        x, y, z = (address(buffer[tuple(i64(0) for _ in buffer.shape)]) for buffer in buffers)
        call = kernel.call(z, columns * 4, x, a.nbytes // rows, y, packed[0].nbytes, panels)
        body = importing([kernel], seq(configure_tiles(rows), call, release_tiles()))
        attributes = {"tirx.noalias": True, "s_tir": True, "tirx.is_scheduled": True, "global_symbol": "f"}
        function = tirx.PrimFunc(buffers, body).with_attr(attributes)
        with code_generation():
            module = tvm.compile(tvm.IRModule({"f": function}), target=target_of(profile))
        out = tvm.runtime.tensor(c)
        module["f"](tvm.runtime.tensor(a), tvm.runtime.tensor(packed), out)
        np.testing.assert_allclose(out.numpy(), want, rtol=1e-5, atol=1e-4 * depth**0.5)


def test_the_next_panel_is_loaded_before_this_one_is_stored() -> None:
    dot = dot_of(AMX, "bfloat16", "bfloat16")
    for kernel in (TilePanels(dot, 32, 2), TilePanels(dot, 32, 4, accumulate=True)):
        panel = kernel.llvm().split("panel:")[1]
        ahead, stored_at = panel.rindex("llvm.x86.tileload"), panel.rindex("llvm.x86.tilestored64(i8")
        assert "%bnext, i64" in panel[:stored_at]
        assert ahead < stored_at
