"""Arithmetic, comparison, logic, activations: broadcasting, types, NaN, symbolic extents."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special

from tests.operators import example, numbers
from tests.programs import Example, Programs, check, grouped

PROFILE = "x86-64-v3"
SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.5, -2.5, 3.0], dtype="float32")


def test_broadcasting_with_constant_and_symbolic_extents() -> None:
    x, row, column = numbers(3, 4, 5), numbers(5, seed=1), numbers(3, 1, 5, seed=2)
    names = {"x": ["N", 4, 5], "c": ["N", 1, 5]}
    examples = [
        example(f"y = {op}(x, r)", {"x": x, "r": row}, symbolic={"x": ["N", 4, "D"], "r": ["D"]})
        for op in ("Add", "Sub", "Mul", "Div")
    ]
    examples += [example("y = Add(x, c)", {"x": x, "c": column}, symbolic=names)]
    examples += [example("y = Max(x, r, c)", {"x": x, "r": row, "c": column}, symbolic=names)]
    check(examples, PROFILE)


def test_extents_with_different_names_may_be_one_at_run_time() -> None:
    wide, one = numbers(3, 4), numbers(1, 4, seed=1)
    names = {"x": ["N", 4], "z": ["M", 4]}
    check(
        [
            example("y = Add(x, z)", {"x": x, "z": z}, symbolic=names)
            for x, z in ((wide, one), (one, wide), (wide, wide), (one, one))
        ],
        PROFILE,
    )


def test_a_symbolic_extent_against_a_constant_may_be_one() -> None:
    names = {"z": ["M", 4]}
    check(
        [example("y = Mul(x, z)", {"x": numbers(3, 4), "z": numbers(m, 4, seed=1)}, symbolic=names) for m in (1, 3)],
        PROFILE,
    )


def test_empty_tensors_and_scalars() -> None:
    check(
        [
            example("y = Add(x, z)", {"x": numbers(0, 3), "z": numbers(3)}),
            example("y = Add(x, z)", {"x": numbers(0, 3), "z": numbers(3)}, symbolic={"x": ["N", 3]}),
            example("y = Sub(x, z)", {"x": numbers(), "z": numbers(seed=1)}),
            example("y = Exp(x)", {"x": numbers()}),
        ],
        PROFILE,
    )


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_integers_divide_towards_zero_and_wrap(dtype: str) -> None:
    a = np.array([7, -7, 7, -7, 0, 100], dtype=dtype)
    b = np.array([2, 2, -2, -2, 5, 7], dtype=dtype)
    feeds = {"a": a, "b": b}
    quotient = (np.trunc(a / b)).astype(dtype)
    check(
        [
            example("y = Div(a, b)", feeds, want=[quotient]),
            example("y = Mod(a, b)", feeds, want=[np.mod(a, b)]),
            example("y = Mod<fmod = 1>(a, b)", feeds, want=[np.fmod(a, b)]),
            example("y = Pow(a, c)", {"a": a, "c": np.array([2, 3, 2, 3, 0, 2], dtype=dtype)}),
            example("y = Neg(a)", feeds, want=[-a]),
            example("y = Abs(a)", feeds, want=[np.abs(a)]),
        ],
        PROFILE,
    )


def test_remainders_of_floats_follow_the_divisor_or_the_dividend() -> None:
    a = np.array([5.5, -5.5, 5.5, -5.5, -0.5, 6.0], dtype="float32")
    b = np.array([2.0, 2.0, -2.0, -2.0, 2.0, 3.0], dtype="float32")
    check(
        [
            example("y = Mod<fmod = 1>(a, b)", {"a": a, "b": b}, want=[np.fmod(a, b)]),
            example("y = Mod(a, b)", {"a": a, "b": b}, want=[np.mod(a, b)], opset=28),
        ],
        PROFILE,
    )


def test_nan_passes_through_and_compares_false() -> None:
    z = np.array([1.0, np.nan, 2.0, np.nan, 1.0, 1.5, np.inf, -1.0], dtype="float32")
    feeds = {"x": SPECIAL, "z": z}
    with np.errstate(invalid="ignore"):
        examples = [
            example("y = Max(x, z)", feeds, want=[np.maximum(SPECIAL, z)]),
            example("y = Min(x, z)", feeds, want=[np.minimum(SPECIAL, z)]),
            example("y = Relu(x)", {"x": SPECIAL}, want=[np.maximum(SPECIAL, 0)]),
            example("y = Less(x, z)", feeds, want=[z > SPECIAL]),
            example("y = GreaterOrEqual(x, z)", feeds, want=[z <= SPECIAL]),
            example("y = Equal(x, z)", feeds, want=[z == SPECIAL]),
            example("y = IsNaN(x)", {"x": SPECIAL}, want=[np.isnan(SPECIAL)]),
            example("y = IsInf(x)", {"x": SPECIAL}, want=[np.isinf(SPECIAL)]),
            example("y = IsInf<detect_negative = 0>(x)", {"x": SPECIAL}, want=[np.isposinf(SPECIAL)]),
            example("y = Sign(x)", {"x": SPECIAL}, want=[np.sign(SPECIAL)]),
        ]
    check(examples, PROFILE)


def test_rounding_is_half_to_even() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2.4, 2.6], dtype="float32")
    check([example("y = Round(x)", {"x": x}, want=[np.rint(x)])], PROFILE)


@pytest.mark.parametrize("operator", ["And", "Or", "Xor"])
def test_logic(operator: str) -> None:
    feeds = {"a": numbers(3, 4, dtype="bool"), "b": numbers(4, dtype="bool", seed=1)}
    rule = {"And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor}[operator]
    check([example(f"y = {operator}(a, b)", feeds, want=[rule(feeds["a"], feeds["b"])])], PROFILE)


def test_choosing_and_bounding() -> None:
    x = numbers(2, 3, 4)
    feeds = {"c": numbers(3, 1, dtype="bool"), "x": x, "z": numbers(4, seed=1)}
    low, high = np.float32(-1), np.float32(2)
    check(
        [
            example("y = Where(c, x, z)", feeds),
            example(
                "l = Constant<value = float {-1.0}>() h = Constant<value = float {2.0}>() y = Clip(x, l, h)", {"x": x}
            ),
            example("h = Constant<value = float {2.0}>() y = Clip(x, , h)", {"x": x}),
            example("y = Clip(x, l, h)", {"x": x, "l": np.array(low), "h": np.array(high)}),
            example(
                "y = Clip(x, l, h)", {"x": x, "l": np.array(high), "h": np.array(low)}, want=[np.full_like(x, low)]
            ),
        ],
        PROFILE,
    )


ACTIVATIONS = {
    "Sigmoid(x)": scipy.special.expit,
    "Softplus(x)": lambda x: np.logaddexp(x, 0),
    "Gelu(x)": lambda x: x * scipy.special.ndtr(x),
    'Gelu<approximate = "tanh">(x)': lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "HardSigmoid(x)": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "HardSwish(x)": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "Mish(x)": lambda x: x * np.tanh(np.logaddexp(x, 0)),
    "Elu<alpha = 1.5>(x)": lambda x: np.where(x < 0, 1.5 * np.expm1(np.minimum(x, 0)), x),
    "LeakyRelu<alpha = 0.2>(x)": lambda x: np.where(x < 0, 0.2 * x, x),
    "ThresholdedRelu<alpha = 1.0>(x)": lambda x: np.where(x > 1, x, 0),
    "Softsign(x)": lambda x: x / (1 + np.abs(x)),
    "Erf(x)": scipy.special.erf,
    "Tanh(x)": np.tanh,
    "Shrink<bias = 0.5, lambd = 1.0>(x)": lambda x: np.where(x < -1, x + 0.5, np.where(x > 1, x - 0.5, 0)),
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_activations(dtype: str) -> None:
    x = numbers(5, 7, dtype=dtype, low=-20, high=20)
    wide = x.astype("float64")
    examples = [
        example(f"y = {text}", {"x": x}, want=[np.asarray(rule(wide)).astype(dtype)])
        for text, rule in ACTIVATIONS.items()
    ]
    check(examples, PROFILE, 2e-6 if dtype != "float16" else None)


@pytest.mark.parametrize("text", ["Gelu(x)", 'Gelu<approximate = "tanh">(x)'])
def test_gelu_keeps_its_digits_below_zero(text: str) -> None:
    """Where ½ + ½ erf and ½ + ½ tanh have none left."""
    x = np.linspace(-5, -2, 1000).astype(np.float32)
    wide = x.astype("float64")
    inner = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    want = wide * (scipy.special.expit(2 * inner) if "tanh" in text else scipy.special.ndtr(wide))
    (got,) = Programs([grouped(example(f"y = {text}", {"x": x}, want=[want]).model)], PROFILE).run(0, {"x": x})
    np.testing.assert_allclose(got, want, rtol=2e-4 if text == "Gelu(x)" else 3e-6)


def test_functions_of_one_operand() -> None:
    rules = {
        "Sinh": np.sinh, "Cosh": np.cosh, "Asinh": np.arcsinh, "Atan": np.arctan, "Exp": np.exp,
        "Floor": np.floor, "Ceil": np.ceil, "Reciprocal": np.reciprocal, "Sin": np.sin, "Cos": np.cos, "Tan": np.tan,
    }  # fmt: skip
    x = numbers(40)
    examples = [example(f"y = {op}(x)", {"x": x}, want=[rule(x)]) for op, rule in rules.items()]
    inner = numbers(40, low=-0.99, high=0.99)
    for op, rule in {"Asin": np.arcsin, "Acos": np.arccos, "Atanh": np.arctanh}.items():
        examples.append(example(f"y = {op}(x)", {"x": inner}, want=[rule(inner)]))
    positive = numbers(40, low=1.01, high=9)
    for op, rule in {"Log": np.log, "Sqrt": np.sqrt, "Acosh": np.arccosh}.items():
        examples.append(example(f"y = {op}(x)", {"x": positive}, want=[rule(positive)]))
    check(examples, PROFILE)


def test_values_that_may_be_absent() -> None:
    x = numbers(3)
    check(
        [
            example("y = OptionalHasElement(x)", {"x": x}, want=[np.array(True)]),
            example("y = OptionalHasElement()", {"x": x}, want=[np.array(False)]),
            example("y = OptionalGetElement(x)", {"x": x}, want=[x]),
        ],
        PROFILE,
    )


def bits(body: str, want: np.ndarray, **feeds: np.ndarray) -> Example:
    """An example over unsigned or signed integers."""
    return example(body, feeds, want=[want])


def test_bits() -> None:
    a = np.array([16, 255, 1, 128], dtype="uint8")
    b = np.array([1, 4, 8, 200], dtype="uint8")
    left = np.array([32, 240, 0, 0], dtype="uint8")
    right = np.array([8, 15, 0, 0], dtype="uint8")
    s = np.array([5, -6, 127], dtype="int8")
    check(
        [
            bits('y = BitShift<direction = "LEFT">(a, b)', left, a=a, b=b),
            bits('y = BitShift<direction = "RIGHT">(a, b)', right, a=a, b=b),
            bits("y = BitwiseAnd(a, b)", a & b, a=a, b=b),
            bits("y = BitwiseOr(a, b)", a | b, a=a, b=b),
            bits("y = BitwiseXor(a, b)", a ^ b, a=a, b=b),
            bits("y = BitwiseNot(s)", ~s, s=s),
        ],
        PROFILE,
    )
