"""Conversions between element types, quantization and integer products."""

from __future__ import annotations

import numpy as np
import pytest

from tests.operators import example, numbers
from tests.programs import check

PROFILE = "x86-64-v3"
CODES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11}


@pytest.mark.parametrize("source", ["float32", "float64", "float16", "int32", "int64", "uint8", "bool"])
def test_casts(source: str) -> None:
    low = 0 if source == "uint8" else -100
    x = numbers(37, dtype=source, low=low, high=100)
    check(
        [
            example(f"y = Cast<to = {code}>(x)", {"x": x}, want=[x.astype(target)])
            for target, code in CODES.items()
            if not (target == "uint8" and low < 0)
        ],
        PROFILE,
    )


def test_casts_of_special_numbers() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-8, 70000.0], dtype="float32")
    with np.errstate(over="ignore"):
        half = x.astype("float16")
    check(
        [
            example("y = Cast<to = 9>(x)", {"x": x}, want=[x.astype(bool)]),
            example("y = Cast<to = 10>(x)", {"x": x}, want=[half]),
            example("b = Cast<to = 16>(x) y = Cast<to = 1>(b)", {"x": numbers(50)}),
            example("y = CastLike(x, z)", {"x": numbers(9), "z": np.zeros(1, "int64")}),
        ],
        PROFILE,
    )


def test_negative_floats_wrap_into_unsigned_types() -> None:
    x = np.array([-1.0, -200.0, 300.0, 255.9], dtype="float32")
    want = np.array([255, 56, 44, 255], dtype="uint8")
    check([example("y = Cast<to = 2>(x)", {"x": x}, want=[want])], PROFILE)


def test_bits_as_another_type() -> None:
    x = np.array([0.0, -0.0, 1.5, np.inf], dtype="float32")
    flags = np.array([True, False])
    check(
        [
            example("y = BitCast<to = 6>(x)", {"x": x}, want=[x.view("int32")], opset=26),
            example("y = BitCast<to = 2>(x)", {"x": flags}, want=[flags.view("uint8")], opset=26),
        ],
        PROFILE,
    )


def constant_of(name: str, kind: str, *values: float) -> str:
    return f"{name} = Constant<value = {kind}[{len(values)}] {{{', '.join(map(str, values))}}}>() "


def test_quantizing() -> None:
    x = np.array([[0.5, 1.5, 2.5, -0.5], [1e9, -1e9, 127.4, -3.7]], dtype="float32")
    step, zero = np.array(1.0, "float32"), np.array(3, "uint8")
    per_axis = {"x": x, "s": np.array([0.5, 2.0], "float32"), "z": np.array([-3, 5], "int8")}
    q = numbers(2, 8, dtype="int8", low=-128, high=127)
    blocks = {"q": q, "s": numbers(2, 2, low=0.1, high=1), "z": numbers(2, 2, dtype="int8")}
    check(
        [
            example("y = QuantizeLinear(x, s, z)", {"x": x, "s": step, "z": zero}),
            example("y = QuantizeLinear<axis = 0>(x, s, z)", per_axis),
            example("y = DequantizeLinear<axis = 0>(q, s, z)", {**per_axis, "q": q}, symbolic={"q": [2, "N"]}),
            example("y = DequantizeLinear<axis = 1, block_size = 4>(q, s, z)", blocks),
            example("y, s, z = DynamicQuantizeLinear(x)", {"x": numbers(4, 9)}, outputs=["y", "s", "z"]),
            example("y, s, z = DynamicQuantizeLinear(x)", {"x": numbers(4, 9, low=1)}, outputs=["y", "s", "z"]),
        ],
        PROFILE,
    )


def test_integer_products() -> None:
    a = numbers(2, 5, 7, dtype="uint8", low=0, high=255)
    b = numbers(7, 6, dtype="int8", low=-128, high=127, seed=1)
    zeros = constant_of("p", "uint8", 7).replace("[1]", "") + constant_of("r", "int8", 1, -2, 3, 0, 5, -6)
    image = numbers(1, 2, 6, 7, dtype="uint8", low=0, high=255)
    filters = numbers(4, 1, 3, 3, dtype="uint8", low=0, high=255, seed=1)
    conv = (
        "z = Constant<value = uint8 {9}>() y = ConvInteger<pads = [1, 1, 1, 1], strides = [2, 1], group = 2>(x, w, z)"
    )
    want = np.matmul(a.astype("int32") - 7, b.astype("int32") - np.array([1, -2, 3, 0, 5, -6]))
    check(
        [
            example(zeros + "y = MatMulInteger(a, b, p, r)", {"a": a, "b": b}, want=[want.astype("int32")]),
            example("y = MatMulInteger(a, b)", {"a": a, "b": b}, symbolic={"a": ["N", "S", 7]}),
            example(conv, {"x": image, "w": filters}),
        ],
        PROFILE,
    )


def test_quantized_products() -> None:
    scalars = (
        "sa = Constant<value = float {0.02}>() za = Constant<value = uint8 {120}>() "
        "sb = Constant<value = float {0.03}>() zb = Constant<value = uint8 {10}>() "
        "sy = Constant<value = float {0.5}>() zy = Constant<value = uint8 {100}>() "
    )
    a = numbers(5, 7, dtype="uint8", low=0, high=255)
    b = numbers(7, 6, dtype="uint8", low=0, high=255, seed=1)
    image = numbers(1, 2, 6, 7, dtype="uint8", low=0, high=255)
    filters = numbers(4, 2, 3, 3, dtype="uint8", low=0, high=255, seed=1)
    check(
        [
            example(scalars + "y = QLinearMatMul(a, sa, za, b, sb, zb, sy, zy)", {"a": a, "b": b}),
            example(scalars + "y = QLinearConv(x, sa, za, w, sb, zb, sy, zy)", {"x": image, "w": filters}),
        ],
        PROFILE,
    )
