"""The grid of kernel shapes, compiled for Arm processors and run under emulation."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import tirx

from mmopt.backends.cpu.dot import dot_for, pack
from mmopt.backends.cpu.kernels.tile import lanes_of
from mmopt.backends.cpu.pipeline import code_generation, target_of
from mmopt.backends.linking import Zig
from mmopt.backends.profile import Profile, load_profile
from tests.arm.emulation import check_kernels, emulate, needs_emulation
from tests.kernels import Case
from tests.unit import (
    test_compute,
    test_conv_narrow,
    test_kernel_attention,
    test_kernel_conv,
    test_kernel_matmul,
    test_kernel_winograd,
)
from tests.unit.test_dot import PAIRS, Block, blocks, exact, numbers

pytestmark = [pytest.mark.arm, needs_emulation]

TARGETS = ["cortex-a76", "armv8.0"]


def _attention(profile: Profile) -> list[Case]:
    layers = [*test_kernel_attention.own_choice(), *test_kernel_attention.masks()]
    return test_kernel_attention.cases(layers, profile.name)


FAMILIES: dict[str, Callable[[Profile], list[Case]]] = {
    **{f"matmul-{f.__name__}": f for f in test_kernel_matmul.FAMILIES},
    **{f"maps-{f.__name__}": lambda profile, f=f: f() for f in test_compute.FAMILIES},  # type: ignore[misc]
    "conv": lambda profile: test_kernel_conv.cut_up(profile, 60),
    "winograd": lambda profile: test_kernel_winograd.grid(lanes_of(profile, "float32")),
    "attention": _attention,
    "conv-int8": lambda profile: test_conv_narrow.bare(profile.name),
}


@pytest.fixture(autouse=True)
def known_to_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families that take the name of a profile find those of these tests."""
    profiles = {target: load_profile(target) for target in TARGETS}
    monkeypatch.setattr(test_kernel_attention, "profiles", lambda: profiles)
    monkeypatch.setattr(test_conv_narrow, "profiles", lambda: profiles)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_results(family: str, target: str) -> None:
    check_kernels(FAMILIES[family](load_profile(target)), target)


def _with_results_last(function: tirx.PrimFunc) -> tirx.PrimFunc:
    a, b, c, offsets = function.params
    return tirx.PrimFunc([a, b, offsets, c], function.body).with_attr(dict(function.attrs))


@pytest.mark.parametrize("target", ["cortex-a76", "armv8.0", "neoverse-v1"])
def test_sums_of_dot_products(target: str, tmp_path: pathlib.Path) -> None:
    """Integers exactly; the data covers their whole range."""
    profile = load_profile(target)
    dots = [dot for a, b in PAIRS if (dot := dot_for(profile, a, b)) is not None]
    assert len(dots) == len(PAIRS)
    calls = [block for dot in dots for block in blocks(dot)]
    functions = {f"f{n}": _with_results_last(block.function(f"f{n}")) for n, block in enumerate(calls)}
    with target_of(profile) as built_for, code_generation():
        compiled = tvm.compile(tvm.IRModule(functions), target=built_for)
    compiled.export_library(str(tmp_path / "dot.so"), fcompile=Zig(profile))
    random = np.random.default_rng(0)
    wanted = [_save(tmp_path, number, block, random) for number, block in enumerate(calls)]
    (tmp_path / "cases.txt").write_text("".join(f"f{n} 3 0 1\n" for n in range(len(calls))))
    done = emulate(target, "kernel_driver", str(tmp_path / "dot.so"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    for number, (block, (want, bound)) in enumerate(zip(calls, wanted, strict=True)):
        got = np.load(tmp_path / f"{number}.out0.npy")
        assert np.all(np.abs(got - want) <= bound), f"{block.kernel.name} with {block.segments} segments"


def _save(
    folder: pathlib.Path, number: int, block: Block, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Save the arguments of a call; what it has to give, and how far from that it may be."""
    kernel, dot = block.kernel, block.kernel.dot
    width = block.segments * block.depth
    a, b = numbers(random, dot.a, (kernel.rows, width)), numbers(random, dot.b, (width, kernel.columns))
    c = numbers(random, "int8", (kernel.rows, kernel.columns)).astype(dot.total)
    offsets = np.arange(block.segments)[::-1].astype(np.int64) * (block.depth * a.itemsize)
    order = b.reshape(block.segments, block.depth, -1)[::-1].reshape(b.shape) if kernel.indexed else b
    for n, array in enumerate((a, pack(order, dot, kernel.columns)[0], np.ascontiguousarray(offsets))):
        np.save(folder / f"{number}.in{n}.npy", array)
    np.save(folder / f"{number}.out0.npy", c)
    begun = c.astype(np.float64) if kernel.accumulate else 0.0
    size = np.abs(exact(a, dot.a)) @ np.abs(exact(b, dot.b)) + 128
    return begun + exact(a, dot.a) @ exact(b, dot.b), np.zeros(1) if dot.total == "int32" else 1e-5 * size
