"""Exponentials by the instructions of AVX-512 that take numbers apart, and rounding of two vectors at once."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.cpu.avx512 import Rounding, bfloat16_bits, has_bfloat16, has_scaling
from mmopt.backends.cpu.dot import importing
from mmopt.backends.cpu.intrinsics import exp2_below_zero
from mmopt.backends.cpu.loops import keep, loop, seq
from mmopt.backends.cpu.pipeline import code_generation, target_of
from mmopt.backends.profile import native_profile

needs_scaling = pytest.mark.skipif(not has_scaling(native_profile()), reason="no AVX-512 with DQ here")
needs_bfloat16 = pytest.mark.skipif(not has_bfloat16(native_profile()), reason="no AVX512-BF16 here")

Rule = Callable[[Expr, Callable[[Expr], Expr]], Expr]


def compiled(rule: Rule, count: int, lanes: int, dtype: str) -> tvm.runtime.Executable:
    """``rule`` over ``count`` float32, ``lanes`` at a time and what is left over in one shorter vector."""
    source, result = tirx.decl_buffer((count,), "float32", "x"), tirx.decl_buffer((count,), dtype, "y")

    def one(at: Expr) -> Stmt:
        statements: list[Stmt] = []

        def stored(value: Expr) -> Expr:
            statement, kept = keep(value, "part")
            statements.append(statement)
            return kept

        value = rule(source[at], stored)
        return seq(*statements, tirx.BufferStore(result, value, [at]))

    whole, rest = divmod(count, lanes)
    body = seq(
        loop(whole, lambda n: loop(lanes, lambda v: one(n * lanes + v), "vectorized")),
        loop(rest, lambda v: one(whole * lanes + v), "vectorized") if rest else None,
    )
    body = importing([Rounding()], body) if has_bfloat16(native_profile()) else body
    function = tirx.PrimFunc([source, result], body).with_attr({"s_tir": True, "global_symbol": "f"})
    target = target_of(native_profile())
    with target, code_generation():
        return tvm.compile(tvm.IRModule({"f": function}), target=target)


def run(executable: tvm.runtime.Executable, x: np.ndarray, dtype: str) -> np.ndarray:
    y = tvm.runtime.tensor(np.zeros(x.shape, dtype))
    executable["f"](tvm.runtime.tensor(x), y)
    return y.numpy()


@needs_scaling
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("lanes", [16, 32])
def test_powers_of_two(lanes: int, coarse: bool) -> None:
    special = np.array([0.0, -1.0, -125.0, -126.0, -151.0, -1e4, -3e38, -np.inf, np.nan], np.float32)
    x = np.concatenate([special, np.linspace(-126, 0, 20_000, dtype=np.float32), -np.geomspace(1e-30, 120, 20_007)])
    x = np.concatenate([x, special]).astype(np.float32)  # once more where no whole vector is left
    program = compiled(lambda v, kept: exp2_below_zero(v, kept, coarse=coarse, scaling=True), len(x), lanes, "float32")
    y = run(program, x, "float32")
    exact = np.exp2(x.astype(np.float64))
    normal = x >= -126
    relative = np.abs(y[normal] / exact[normal] - 1).max()
    assert relative <= (1.1e-4 if coarse else 2.4e-7)
    assert (y[x < -150] == 0).all()
    assert np.isnan(y[np.isnan(x)]).all()
    if not coarse:
        assert (y[x == 0] == 1).all()
    text = program.mod.inspect_source("asm")
    assert "vscalefps" in text
    assert "vreduceps" in text


@needs_bfloat16
@pytest.mark.parametrize(("lanes", "instruction"), [(16, "vcvtneps2bf16"), (32, "vcvtne2ps2bf16")])
def test_rounding_whole_vectors(lanes: int, instruction: str) -> None:
    x = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    x[:4] = 1.00390625, 1.01171875, np.inf, -np.inf  # two halves: to even
    program = compiled(lambda v, _: bfloat16_bits(v), len(x), lanes, "uint16")
    want = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(run(program, x, "uint16"), want)
    assert instruction in program.mod.inspect_source("asm")
