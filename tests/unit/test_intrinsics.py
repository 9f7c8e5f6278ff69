"""Vector polynomials against float64, in units in the last place."""

from __future__ import annotations

import functools
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import scipy.special
import tvm
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import Map, Source
from mmopt.backends.cpu import intrinsics
from mmopt.backends.cpu.avx512 import has_bfloat16, has_scaling
from mmopt.backends.cpu.emit import KernelEmitter
from mmopt.backends.cpu.loops import keep, loop, seq
from mmopt.backends.cpu.pipeline import code_generation, target_of
from mmopt.backends.profile import Profile, load_profile, native_profile
from mmopt.runtime.cpu import missing_features, running_features

ORACLES = {
    "exp": np.exp,
    "tanh": np.tanh,
    "erf": scipy.special.erf,
    "sigmoid": scipy.special.expit,
    "log": np.log,
}


QUOTIENTS: dict[str, tuple[Callable[..., tuple[Expr, Expr]], float]] = {
    "sigmoid": (intrinsics.sigmoid_quotient, 3.0),
    "tanh": (intrinsics.tanh_quotient, 4.0),
}


Evaluate = Callable[[Callable[[Expr], Expr], np.ndarray], np.ndarray]


@pytest.fixture(params=["cpu", "x86-64-v3"])
def evaluate(request: pytest.FixtureRequest) -> Evaluate:
    """What this machine's vectors give for a function, and what those of 32 bytes do."""
    profile = load_profile(request.param)
    if missing := missing_features(profile.features, running_features()):
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    return functools.partial(evaluated, profile)


def evaluated(profile: Profile, function: Callable[[Expr], Expr], x: np.ndarray) -> np.ndarray:
    intrinsics.register()
    source = Source(x.shape, str(x.dtype), "x")
    result = Map(x.shape, str(x.dtype), lambda i: function(source[i]), "y")
    kernel = KernelEmitter([result], profile).build()
    module = tvm.IRModule({"f": kernel.function.with_attr("global_symbol", "f")})
    target = target_of(profile)
    with target:
        compiled = tvm.compile(module, target=target)
    y = tvm.runtime.tensor(np.zeros_like(x))
    compiled["f"](tvm.runtime.tensor(x), y)
    return y.numpy()


def samples(count: int = 400_000) -> np.ndarray:
    """Floats of every exponent, dense around the ranges where the formulas switch."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, count, dtype=np.uint32)
    every = bits.view(np.float32)
    every = every[np.isfinite(every)]
    dense = np.concatenate([rng.uniform(-110, 110, count), rng.uniform(-5, 5, count), rng.uniform(0.5, 1.5, count)])
    return np.concatenate([every, dense.astype(np.float32)])


def assert_close(name: str, x: np.ndarray, y: np.ndarray, units: float) -> None:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        exact = ORACLES[name](x.astype(np.float64))
        got = y.astype(np.float64)
        rounded = exact.astype(np.float32)
        unit = np.spacing(np.maximum(np.abs(rounded), np.finfo(np.float32).tiny)).astype(np.float64)
        same = rounded.astype(np.float64) == got
        error = np.where(same, 0.0, np.abs(got - exact) / unit)
    worst = int(np.argmax(error))
    report = f"{name}({x[worst]!r}) = {got[worst]!r}, exactly {exact[worst]!r}: {error[worst]:.2f} ulp"
    assert error[worst] <= units, report


def evaluate_quotient(name: str, x: np.ndarray) -> np.ndarray:
    lanes = 16
    padded = np.resize(x, (-(-len(x) // lanes), lanes))
    source, result = (tirx.decl_buffer(padded.shape, "float32", buffer) for buffer in "xy")

    def one(row: Expr, lane: Expr) -> Stmt:
        statements: list[Stmt] = []

        def stored(value: Expr) -> Expr:
            statement, kept = keep(value, "part")
            statements.append(statement)
            return kept

        top, bottom = QUOTIENTS[name][0](source[row, lane], stored)
        return seq(*statements, tirx.BufferStore(result, top / bottom, [row, lane]))

    body = loop(len(padded), lambda row: loop(lanes, lambda lane: one(row, lane), "vectorized"))
    function = tirx.PrimFunc([source, result], body).with_attr({"s_tir": True, "global_symbol": "f"})
    with code_generation():
        compiled = tvm.compile(tvm.IRModule({"f": function}), target=target_of(native_profile()))
    y = tvm.runtime.tensor(np.zeros_like(padded))
    compiled["f"](tvm.runtime.tensor(padded), y)
    return y.numpy().ravel()[: len(x)]


@pytest.mark.parametrize("name", sorted(QUOTIENTS))
def test_quotients(name: str) -> None:
    x = samples()
    x = x[x > -87.0] if name == "sigmoid" else x
    assert_close(name, x, evaluate_quotient(name, x), QUOTIENTS[name][1])


@pytest.mark.parametrize("name", sorted(QUOTIENTS))
def test_quotients_of_special_values(name: str) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 3e38, -3e38] * 7, np.float32)
    with np.errstate(all="ignore"):
        expected = ORACLES[name](x)
    np.testing.assert_allclose(evaluate_quotient(name, x), expected, rtol=0, atol=1e-38)


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_error_is_at_most_two_units_in_the_last_place(name: str, evaluate: Evaluate) -> None:
    x = samples()
    if name == "log":
        x = x[x > 0]
    assert_close(name, x, evaluate(getattr(tirx, name), x), 2.0)


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_special_values(name: str, evaluate: Evaluate) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0] * 7, np.float32)
    with np.errstate(all="ignore"):
        expected = ORACLES[name](x)
    np.testing.assert_array_equal(evaluate(getattr(tirx, name), x), expected)


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_float64_uses_the_library(name: str, evaluate: Evaluate) -> None:
    x = np.linspace(0.1, 3, 37)
    np.testing.assert_allclose(evaluate(getattr(tirx, name), x), ORACLES[name](x), rtol=1e-14)


def gelu_errors(evaluate: Evaluate, *, coarse: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Floats, absolute errors of Gelu on them, and exact results."""
    rng = np.random.default_rng(0)
    near = rng.uniform(-15, 15, 300_000), rng.uniform(-1, 1, 100_000), -np.logspace(-37, 0, 5000)
    x = np.concatenate([samples(100_000).astype(np.float64), *near]).astype(np.float32)
    exact = x.astype(np.float64) * scipy.special.ndtr(x.astype(np.float64))
    return x, np.abs(evaluate(lambda v: intrinsics.gelu(v, coarse), x).astype(np.float64) - exact), exact


def test_gelu(evaluate: Evaluate) -> None:
    x, error, exact = gelu_errors(evaluate, coarse=False)
    unit = np.spacing(np.maximum(np.abs(exact), np.finfo(np.float32).tiny).astype(np.float32)).astype(np.float64)
    assert (error / unit)[x > 0].max() <= 4
    assert (error / unit)[(x < 0) & (x > -3)].max() <= 14
    deep = (x < -3) & (x > -5.5)
    assert (error[deep] / np.abs(exact[deep])).max() <= 3e-4
    assert error[x < 3].max() <= 2.5e-7


def test_exponents_are_put_in_by_the_instruction_for_it() -> None:
    source = Source((64,), "float32", "x")
    target = target_of(native_profile())
    for function in (tirx.exp, tirx.sigmoid, intrinsics.gelu):
        result = Map((64,), "float32", lambda i, function=function: function(source[i]), "y")  # type: ignore[misc]
        kernel = KernelEmitter([result], native_profile()).build()
        with target:
            compiled = tvm.compile(tvm.IRModule({"f": kernel.function.with_attr("global_symbol", "f")}), target=target)
        assert ("vscalefps" in compiled.mod.inspect_source("asm")) == has_scaling(native_profile())


def test_coarse_gelu(evaluate: Evaluate) -> None:
    x, error, exact = gelu_errors(evaluate, coarse=True)
    there = (x > -4) & (np.abs(x) > 1e-37)
    assert (error[there] / np.abs(exact[there])).max() <= 3e-4
    assert error[x < 0].max() <= 4e-5


def test_gelu_of_what_is_no_number(evaluate: Evaluate) -> None:
    x = np.array([np.inf, np.nan, 0.0, -0.0, 1e30, -1e30], np.float32)
    for coarse in (False, True):
        y = evaluate(lambda v, coarse=coarse: intrinsics.gelu(v, coarse), x)  # type: ignore[misc]
        np.testing.assert_array_equal(y, np.array([np.inf, np.nan, 0, 0, 1e30, 0], np.float32))


def test_rounding_to_bfloat16() -> None:
    """On whole vectors and on what is left of them, halves to even, infinities and NaN as they are."""
    special = [np.inf, -np.inf, np.nan, 0.0, 3.4e38, -3.4e38, 1.00390625, 1.01171875, 2.0**-126]
    x = np.concatenate([np.resize(np.array(special, np.float32), 37), samples(1000)])
    x = x[~(np.abs(x) < 2.0**-126) | (x == 0)]
    x = x[: len(x) // 16 * 16 + 5]
    source = Source(x.shape, "float32", "x")
    result = Map(x.shape, "bfloat16", lambda i: source[i].astype("bfloat16"), "y")
    kernel = KernelEmitter([result], native_profile()).build()
    module = tvm.IRModule({"f": kernel.function.with_attr("global_symbol", "f")})
    compiled = tvm.compile(module, target=target_of(native_profile()))
    y = tvm.runtime.tensor(np.zeros(x.shape, ml_dtypes.bfloat16))
    compiled["f"](tvm.runtime.tensor(x), y)
    np.testing.assert_array_equal(y.numpy().astype(np.float32), x.astype(ml_dtypes.bfloat16).astype(np.float32))
    if has_bfloat16(native_profile()):
        assert "vcvtneps2bf16" in compiled.mod.inspect_source("asm")
