"""Transposing, slicing, joining, padding, gathering and scattering."""

from __future__ import annotations

import numpy as np
import pytest

from tests.operators import example, numbers
from tests.programs import check

PROFILE = "x86-64-v3"


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype="int64")


def constant(name: str, *values: int) -> str:
    """A statement that makes a constant vector."""
    return f"{name} = Constant<value = int64[{len(values)}] {{{', '.join(map(str, values))}}}>() "


@pytest.mark.parametrize("perm", ["0, 2, 1, 3", "3, 2, 1, 0", "2, 0, 3, 1", "1, 0, 2, 3"])
def test_transposing(perm: str) -> None:
    x = numbers(2, 1, 5, 17)
    body = f"y = Transpose<perm = [{perm}]>(x)"
    check([example(body, {"x": x}), example(body, {"x": x}, symbolic={"x": ["N", 1, "S", 17]})], PROFILE)


SLICES = [
    ((1,), (3,), (0,), (1,)),
    ((-2,), (2**40,), (1,), (1,)),
    ((-1,), (-(2**40),), (1,), (-1,)),
    ((5, 0), (-100, -1), (1, 0), (-2, 2)),
    ((3,), (1,), (0,), (1,)),
    ((100,), (0,), (-1,), (-3,)),
]
"""Starts, ends, axes, steps."""


def test_slicing_with_constants() -> None:
    x = numbers(4, 7)
    bodies = [
        constant("a", *s) + constant("b", *e) + constant("c", *a) + constant("d", *t) + "y = Slice(x, a, b, c, d)"
        for s, e, a, t in SLICES
    ]
    examples = [example(body, {"x": x}) for body in bodies]
    examples += [example(body, {"x": x}, symbolic={"x": ["N", "S"]}) for body in bodies]
    check(examples, PROFILE)


def test_slicing_with_data() -> None:
    x = numbers(4, 7)
    feeds = [{"x": x, "a": ints(*s), "b": ints(*e), "c": ints(*a), "d": ints(*t)} for s, e, a, t in SLICES]
    examples = [example("y = Slice(x, a, b, c, d)", feed) for feed in feeds]
    examples.append(
        example("y = Slice(x, a, b)", {"x": x, "a": ints(1, -3), "b": ints(-1, 100)}, symbolic={"x": ["N", 7]})
    )
    check(examples, PROFILE)


def test_slicing_by_sizes() -> None:
    body = constant("o", 1) + constant("z", 0) + "s = Shape<end = 1>(w) a = Sub(s, o) y = Slice(x, a, s, z) "
    feeds = {"x": numbers(6, 3), "w": numbers(4)}
    check([example(body, feeds, symbolic={"x": ["N", 3], "w": ["M"]})], PROFILE)


def test_joining_and_splitting() -> None:
    a, b, c = numbers(2, 3, 5), numbers(2, 1, 5, seed=1), numbers(2, 0, 5)
    names = {"a": ["N", "S", 5], "b": ["N", "T", 5]}
    check(
        [
            example("y = Concat<axis = 1>(a, b)", {"a": a, "b": b}, symbolic=names),
            example("y = Concat<axis = -2>(a, c, b)", {"a": a, "b": b, "c": c}),
            example("e = Exp(a) y = Concat<axis = 0>(a, e, a)", {"a": a}),
            example("y, z = Split<axis = -1, num_outputs = 2>(a)", {"a": a}, outputs=["y", "z"]),
            example(constant("s", 1, 0, 2) + "y, z, w = Split<axis = 1>(a, s)", {"a": a}, outputs=["y", "z", "w"]),
            example("y, z = Split<axis = 1>(a, s)", {"a": a, "s": ints(1, 2)}, outputs=["y", "z"]),
            example(
                "y, z = Split<num_outputs = 2>(a)", {"a": numbers(5, 3)}, outputs=["y", "z"], symbolic={"a": ["N", 3]}
            ),
        ],
        PROFILE,
    )


PADS = [(0, 2, 1, 3), (1, 0, 0, 0), (2, 3, 3, 2)]


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "wrap"])
def test_padding(mode: str) -> None:
    x = numbers(4, 6)
    body = f'y = Pad<mode = "{mode}">(x, p)'
    examples = [example(constant("p", *p) + body, {"x": x}) for p in PADS]
    examples += [example(constant("p", *p) + body, {"x": x}, symbolic={"x": ["N", "S"]}) for p in PADS[:1]]
    examples += [example(body, {"x": x, "p": ints(*PADS[0])})]
    check(examples, PROFILE)


def test_padding_with_axes_values_and_cropping() -> None:
    x = numbers(4, 6)
    through_halves = "b = Cast<to = 16>(x) c = Pad(b, p) y = Cast<to = 1>(c)"
    v, halves = np.array(7.5, dtype="float32"), np.arange(12, dtype="float32").reshape(3, 4)
    check(
        [
            example(constant("p", 1, 2) + constant("a", -1) + "y = Pad(x, p, v, a)", {"x": x, "v": v}),
            example("y = Pad(x, p, v, a)", {"x": x, "v": v, "p": ints(1, 2), "a": ints(-1)}),
            example(constant("p", -1, 2, -1, -3) + "y = Pad(x, p)", {"x": x}),
            example(constant("p", 0, 0, 0, 13) + through_halves, {"x": halves},
                    want=[np.pad(halves, ((0, 0), (0, 13)))]),
            example("s = Constant<value = int64[2] {7, 3}>() y = CenterCropPad<axes = [0, 1]>(x, s)", {"x": x}),
        ],
        PROFILE,
    )  # fmt: skip


def test_gathering() -> None:
    x = numbers(5, 4, 3)
    index = np.array([[0, -1], [2, 4]], dtype="int64")
    elements = np.array([[[0, -1, 2]], [[4, 3, -5]]], dtype="int64").repeat(2, axis=1)
    pairs = np.array([[0, -1], [4, 3], [-5, 0]], dtype="int64")
    names = {"x": ["N", "S", 3]}
    check(
        [
            example("y = Gather(x, i)", {"x": x, "i": index}, symbolic=names),
            example("y = Gather<axis = -2>(x, i)", {"x": x, "i": index - 1}),
            example("i = Constant<value = int64 {-1}>() y = Gather<axis = 1>(x, i)", {"x": x}, symbolic=names),
            example("y = Gather<axis = 2>(x, i)", {"x": x, "i": np.array(1, "int32")}),
            example("y = GatherElements(x, i)", {"x": x, "i": elements}),
            example("y = GatherND(x, i)", {"x": x, "i": pairs}),
            example("y = GatherND<batch_dims = 1>(x, i)", {"x": x, "i": ints(0, -1, 2, 3, 1).reshape(5, 1)}),
        ],
        PROFILE,
    )


def test_positions_out_of_range_read_no_foreign_memory() -> None:
    x = numbers(3, 2)
    check([example("y = Gather(x, i)", {"x": x, "i": ints(0, 99, -99)}, want=[x[[0, 2, 0]]])], PROFILE)


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scattering(reduction: str) -> None:
    x = numbers(4, 5, 3)
    elements = np.array([[[3, -4, 0]], [[1, 1, -1]]], dtype="int64")
    updates = numbers(2, 1, 3, seed=1)
    pairs = np.array([[0, -1], [3, 2]], dtype="int64")
    check(
        [
            example(f'y = ScatterElements<reduction = "{reduction}">(x, i, u)', {"x": x, "i": elements, "u": updates}),
            example(
                f'y = ScatterND<reduction = "{reduction}">(x, i, u)', {"x": x, "i": pairs, "u": numbers(2, 3, seed=2)}
            ),
        ],
        PROFILE,
    )


def test_rearranging() -> None:
    x = numbers(2, 8, 4, 6)
    reverse = "y = ReverseSequence<batch_axis = 0, time_axis = 1>(x, n)"
    one_hot = (
        "d = Constant<value = int64 {4}>() v = Constant<value = float[2] {0.5, 2.0}>() y = OneHot<axis = 1>(i, d, v)"
    )
    check(
        [
            example("y = DepthToSpace<blocksize = 2>(x)", {"x": x}, symbolic={"x": ["N", 8, "H", "W"]}),
            example('y = DepthToSpace<blocksize = 2, mode = "CRD">(x)', {"x": x}),
            example("y = SpaceToDepth<blocksize = 2>(x)", {"x": x}, symbolic={"x": ["N", 8, "H", "W"]}),
            example(constant("r", 2, 1, 1, 3) + "y = Tile(x, r)", {"x": x}, symbolic={"x": ["N", 8, 4, "W"]}),
            example(reverse, {"x": numbers(3, 5, 2), "n": ints(1, 5, 3)}, symbolic={"x": ["N", "T", 2], "n": ["N"]}),
            example("y = Trilu<upper = 0>(x)", {"x": x}),
            example("y = Trilu(x, k)", {"x": x, "k": np.array(-1, "int64")}),
            example(one_hot, {"i": np.array([[0, -1, 9], [3, 1, 2]], "int64")}),
        ],
        PROFILE,
    )
