"""Errors that the reference's own rounding explains, and those that it does not."""

from __future__ import annotations

import numpy as np
import pytest

from mmopt.conditioning import rounding_noise
from mmopt.ir.module import Module
from mmopt.runnable import ModelRunnable
from mmopt.verification import compare_runnables
from tests.canonical import module_from


def _runnable(
    body: str, weights: str = "float one = {1.0}, float many = {1000.0}", inputs: str = "float[4] x"
) -> ModelRunnable:
    return ModelRunnable(module_from(f"g ({inputs}) => (float[4] y) <{weights}> {{ {body} }}"), "model", threads=1)


def _noise(body: str, **inputs: np.ndarray) -> float:
    return rounding_noise(_runnable(body), inputs)["y"]


def test_noise_is_what_one_unit_in_the_last_place_does() -> None:
    x = np.array([1.0, 1.5, -1.25, 1.75], np.float32)
    assert _noise("y = Identity(x)", x=x) == 2.0**-23
    assert _noise("y = Mul(x, many)", x=x) == pytest.approx(1000 * 2.0**-23, rel=0.6)
    assert _noise("y = Identity(x)", x=np.array([0.0, np.inf, -np.inf, np.nan], np.float32)) == 0
    assert _noise("d = Sub(x, one) e = Abs(d) y = Log(e)", x=np.ones(4, np.float32)) == np.inf


def test_integers_are_not_nudged() -> None:
    runnable = _runnable("y = Cast<to = 1>(i)", inputs="int64[4] i")
    assert rounding_noise(runnable, {"i": np.arange(4)}) == {"y": 0.0}


X = [1000.1, 1000.2, 1000.3, 1000.4]


def test_an_error_below_the_noise_is_accepted_and_told() -> None:
    # Both are x - 1000 to within 6e-5, the distance of numbers near 1000; that is 2e-4 of the range of 0.3.
    split = "k = Mul(x, third) l = Sub(x, k) m = Add(k, l) y = Sub(m, far)"
    weights = "float third = {0.3333333}, float far = {1000.0}"
    actual = _runnable(split, weights)
    exact = _runnable("y = Sub(x, far)", weights)
    found = compare_runnables(actual, exact, inputs={"x": np.array(X, np.float32)})
    output = found.outputs["y"]
    assert output.relative_error > output.tolerance
    assert found.ok
    assert "no more than it moves by" in found.notes[0]


@pytest.mark.parametrize(
    ("actual", "x"),
    [
        ("z = Add(x, off) y = Sub(z, far)", X),  # beyond the noise
        ("z = Sub(x, far) y = Mul(z, twice)", X),  # far beyond the tolerance
        ("z = Sub(x, far) y = Sqrt(z)", [999.9, 1000.1, 1000.2, 1000.3]),  # NaN where there was none
    ],
)
def test_real_errors_are_not(actual: str, x: list[float]) -> None:
    weights = "float off = {0.0002}, float far = {1000.0}, float twice = {2.0}"
    reference = _runnable("y = Sub(x, far)", weights)
    found = compare_runnables(_runnable(actual, weights), reference, inputs={"x": np.array(x, np.float32)})
    assert not found.ok
    assert found.notes == ()


def test_a_missing_pattern_of_nan_is_no_rounding() -> None:
    module = module_from("g (float[2] x) => (float[2] y, int64[1] n) { y = Log(x) n = Shape<start = 0>(x) }")
    other = module_from("g (float[2] x) => (float[2] y, int64[1] n) { z = Abs(x) y = Log(z) n = Shape<start = 0>(x) }")
    assert isinstance(module, Module)
    inputs = {"x": np.array([-1.0, 2.0], np.float32)}
    found = compare_runnables(
        ModelRunnable(other, "b", threads=1), ModelRunnable(module, "a", threads=1), inputs=inputs
    )
    assert not found.outputs["y"].ok
    assert found.outputs["y"].misplaced == 1
