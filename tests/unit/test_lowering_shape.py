"""Shapes: reshaping, expanding, generating; sizes followed at compile time and read at run time."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mmopt.ir.module import Module
from tests.operators import example, numbers
from tests.programs import Programs, check

PROFILE = "x86-64-v3"


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype="int64")


def test_reshaping_with_zeros_open_axes_and_symbolic_extents() -> None:
    x = numbers(2, 3, 4)
    names = {"x": ["N", "S", 4]}
    bodies = [
        "s = Constant<value = int64[2] {0, -1}>() y = Reshape(x, s)",
        "s = Constant<value = int64[4] {0, -1, 2, 2}>() y = Reshape(x, s)",
        "s = Constant<value = int64[1] {-1}>() y = Reshape(x, s)",
        "y = Flatten<axis = 2>(x)",
        "y = Flatten<axis = -3>(x)",
        "a = Constant<value = int64[2] {0, -1}>() y = Unsqueeze(x, a)",
        "a = Constant<value = int64[2] {0, -1}>() u = Unsqueeze(x, a) y = Squeeze(u, a)",
        "n = Shape<end = 1>(x) m = Constant<value = int64[1] {-1}>() s = Concat<axis = 0>(n, m) y = Reshape(x, s)",
        "n = Shape(x) y = Reshape(x, n)",
        "y = Size(x)",
        "y = Shape<start = -2>(x)",
    ]
    examples = [example(body, {"x": x}, symbolic=names) for body in bodies]
    examples += [example(body, {"x": x}) for body in bodies]
    check(examples, PROFILE)


def test_an_empty_batch_reshapes() -> None:
    body = "n = Shape<end = 1>(x) m = Constant<value = int64[1] {-1}>() s = Concat<axis = 0>(n, m) y = Reshape(x, s)"
    want = numbers(0, 12)
    check([example(body, {"x": numbers(0, 3, 4)}, symbolic={"x": ["N", 3, 4]}, want=[want])], PROFILE)


def test_shapes_that_are_data() -> None:
    x = numbers(2, 3, 4)
    check(
        [
            example("y = Reshape(x, s)", {"x": x, "s": ints(4, -1)}),
            example("y = Reshape(x, s)", {"x": x, "s": ints(0, 2, -1)}),
            example("y = Reshape(x, s)", {"x": x, "s": ints(0, 2, -1)}, symbolic={"x": ["N", "S", "D"]}),
            example("y = Expand(x, s)", {"x": numbers(3, 1), "s": ints(2, 1, 6)}),
            example("y = ConstantOfShape<value = float[1] {2.5}>(s)", {"s": ints(2, 3)}),
            example("y = Tile(x, s)", {"x": x, "s": ints(1, 2, 3)}),
            example("y = Squeeze(x, s)", {"x": numbers(3, 1, 4, 1), "s": ints(-1, 1)}),
            example("y = Unsqueeze(x, s)", {"x": x, "s": ints(-1, 1)}),
        ],
        PROFILE,
    )


def test_expanding() -> None:
    x = numbers(3, 1, 5)
    check(
        [
            example("s = Constant<value = int64[4] {2, 1, 4, 1}>() y = Expand(x, s)", {"x": x}),
            example("n = Shape(z) y = Expand(x, n)", {"x": x, "z": numbers(3, 4, 5)}, symbolic={"z": ["N", "S", 5]}),
            example("n = Shape(z) y = Expand(x, n)", {"x": x, "z": numbers(3, 1, 5)}, symbolic={"z": ["N", "S", 5]}),
        ],
        PROFILE,
    )


FOLLOWED = """
 s = Shape(x) zero = Constant<value = int64 {0}>() one = Constant<value = int64 {1}>()
 n = Gather(s, zero) m = Gather(s, one) two = Constant<value = int64 {2}>()
 t = Mul(n, two) u = Add(t, m) v = Sub(u, m) w = Div(v, two) r = Mod(w, two) c = Cast<to = 6>(w) d = Cast<to = 7>(c)
 axis = Constant<value = int64[1] {0}>() e = Unsqueeze(d, axis) f = Unsqueeze(m, axis)
 g = Equal(e, f) h = Where(g, e, f) k = Max(e, f) l = Min(e, f)
 y = Concat<axis = 0>(e, f, h, k, l) z = ReduceProd<keepdims = 0>(y) q = Unsqueeze(r, axis)
"""


def test_sizes_are_followed_through_integer_arithmetic() -> None:
    x = numbers(6, 4)
    chain = example(FOLLOWED, {"x": x}, symbolic={"x": ["N", "M"]}, outputs=["y", "z", "q"])
    check([chain], PROFILE)


def test_following_sizes_costs_no_kernel() -> None:
    body = FOLLOWED + " b = Concat<axis = 0>(f, e) o = Reshape(x, b)"
    followed = example(body, {"x": numbers(6, 4)}, symbolic={"x": ["N", "M"]}, outputs=["o"])
    programs = Programs([Module(ir.from_proto(followed.model))], PROFILE)
    np.testing.assert_array_equal(programs.run(0, followed.feeds)[0], followed.feeds["x"].reshape(4, 6))
    assert len(programs.kernels) <= 1, f"only the copy into the result is a kernel, not {programs.kernels}"


def test_ranges() -> None:
    def limits(a: float, b: float, c: float, dtype: str) -> dict[str, np.ndarray]:
        return {"a": np.array(a, dtype), "b": np.array(b, dtype), "c": np.array(c, dtype)}

    body = "s = Shape(x) i = Constant<value = int64 {0}>() n = Gather(s, i) o = Constant<value = int64 {1}>() "
    body += "y = Range(i, n, o)"
    check(
        [
            example("y = Range(a, b, c)", limits(1, 10, 3, "int64")),
            example("y = Range(a, b, c)", limits(10, 1, -4, "int32")),
            example("y = Range(a, b, c)", limits(3, 3, 1, "int64")),
            example("y = Range(a, b, c)", limits(0.5, 3.1, 0.5, "float32")),
            example(body, {"x": numbers(7, 2)}, symbolic={"x": ["N", 2]}),
        ],
        PROFILE,
    )


def test_generated_tensors() -> None:
    def hann(n: int) -> np.ndarray:
        return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)

    check(
        [
            example("y = EyeLike<k = -1>(x)", {"x": numbers(4, 3)}),
            example("y = HannWindow(n)", {"n": np.array(10, "int64")}, want=[hann(10).astype("float32")]),
            example("s = Constant<value = int64[2] {0, 3}>() y = ConstantOfShape(s)", {"x": numbers(1)}),
        ],
        PROFILE,
    )


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_dropout_outside_training_keeps_everything(ratio: float) -> None:
    x = numbers(3, 4)
    body = f"r = Constant<value = float {{{ratio}}}>() y, m = Dropout(x, r)"
    check([example(body, {"x": x}, outputs=["y", "m"], want=[x, np.ones((3, 4), bool)])], PROFILE)
