"""Reductions, positions of extrema, running sums, softmax and normalizations."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
import scipy.special

from mmopt.ir.module import Module
from tests.operators import example, numbers
from tests.programs import Programs, check

PROFILE = "x86-64-v3"


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype="int64")


OPERATORS = ["Sum", "Mean", "Prod", "Max", "Min", "L1", "L2", "SumSquare", "LogSum", "LogSumExp"]


def test_reductions_over_constant_axes() -> None:
    x = numbers(3, 4, 40, low=0.1, high=1)
    axes = "a = Constant<value = int64[2] {0, -1}>() "
    examples = [example(axes + f"y = Reduce{op}(x, a)", {"x": x}) for op in OPERATORS]
    middle = "a = Constant<value = int64[1] {1}>() "
    for op in OPERATORS[:4]:
        examples.append(
            example(middle + f"y = Reduce{op}<keepdims = 0>(x, a)", {"x": x}, symbolic={"x": ["N", "S", "D"]})
        )
    check(examples, PROFILE)


def test_reductions_over_all_no_and_data_axes() -> None:
    x = numbers(3, 4, 5)
    check(
        [
            example("y = ReduceSum<keepdims = 0>(x)", {"x": x}, symbolic={"x": ["N", "S", 5]}),
            example("y = ReduceSum<noop_with_empty_axes = 1>(x)", {"x": x}),
            example("y = ReduceSum(x, a)", {"x": x, "a": ints(-1)}),
            example("y = ReduceMean<keepdims = 0>(x, a)", {"x": x, "a": ints(0, -1)}),
            example("y = ReduceMax<keepdims = 0>(x, a)", {"x": x, "a": ints(1)}, symbolic={"x": ["N", 4, 5]}),
        ],
        PROFILE,
    )


def test_large_reductions_to_one_number_in_two_stages() -> None:
    """Sums of 2^18 numbers on all cores; each case is two kernels, of which only the first is large."""
    x, wide = numbers(96, 4, 700, low=0.5, high=1), numbers(1 << 18, low=0.5, high=1)
    axes = "a = Constant<value = int64[2] {0, 2}>() "
    examples = [example(f"y = Reduce{op}<keepdims = {n % 2}>(x)", {"x": x}) for n, op in enumerate(OPERATORS)]
    examples += [example(f"y = Reduce{op}(x)", {"x": wide}) for op in ("Mean", "Max")]
    examples += [example(axes + "y = ReduceMean<keepdims = 0>(x, a)", {"x": x[:, :1]})]
    check(examples, PROFILE)


@pytest.mark.parametrize(("shape", "parts"), [((96, 4, 700), 48), ((13, 1 << 15), 13), ((1 << 18,), 64), ((96, 40), 0)])
def test_parts_of_large_reductions(shape: tuple[int, ...], parts: int) -> None:
    case = example("y = ReduceSum<keepdims = 0>(x)", {"x": numbers(*shape)})
    kernels = Programs([Module(ir.from_proto(case.model))], PROFILE)._program.kernels
    assert [kernel["bytes"] for kernel in kernels][:-1] == ([4 * (math.prod(shape) + parts)] if parts else [])


def test_reductions_of_nothing_nan_and_integers() -> None:
    empty = numbers(2, 0, 3)
    nan = np.array([[1, np.nan, 2], [3, 4, 5]], dtype="float32")
    axis = "a = Constant<value = int64[1] {1}>() "
    none = np.full((2, 1, 3), -np.inf, dtype="float32")
    check(
        [
            example(axis + "y = ReduceSum(x, a)", {"x": empty}, want=[np.zeros((2, 1, 3), "float32")]),
            example(axis + "y = ReduceProd(x, a)", {"x": empty}, want=[np.ones((2, 1, 3), "float32")]),
            example(axis + "y = ReduceMax(x, a)", {"x": empty}, want=[none]),
            example(axis + "y = ReduceMin(x, a)", {"x": empty}, want=[-none]),
            example(axis + "y = ReduceMax(x, a)", {"x": nan}, want=[nan.max(1, keepdims=True)]),
            example(axis + "y = ReduceSum(x, a)", {"x": numbers(2, 9, dtype="int32", high=90)}),
            example(axis + "y = ReduceMax(x, a)", {"x": numbers(2, 9, dtype="int8", low=-90, high=90)}),
        ],
        PROFILE,
    )


def test_large_exponents_do_not_overflow() -> None:
    x = np.array([[1000.0, 1001.0, 999.0], [-1000.0, -1000.0, -np.inf]], dtype="float32")
    check(
        [
            example("y = ReduceLogSumExp(x)", {"x": x}, want=[scipy.special.logsumexp(x, keepdims=True)]),
            example("y = Softmax(x)", {"x": x}, want=[scipy.special.softmax(x, axis=1)]),
            example("y = LogSoftmax(x)", {"x": x[:1]}, want=[scipy.special.log_softmax(x[:1], axis=1)]),
        ],
        PROFILE,
    )


@pytest.mark.parametrize("operator", ["ArgMax", "ArgMin"])
def test_positions_of_extrema(operator: str) -> None:
    x = np.array([[2, 3, 3, 1, 1], [5, 5, 5, 5, 5]], dtype="float32")
    names = {"x": ["N", "S"]}
    check(
        [
            example(f"y = {operator}<axis = 1>(x)", {"x": x}, symbolic=names),
            example(f"y = {operator}<axis = -1, keepdims = 0, select_last_index = 1>(x)", {"x": x}, symbolic=names),
            example(f"y = {operator}<axis = 0>(x)", {"x": x.astype("int32")}),
        ],
        PROFILE,
    )


def test_running_sums() -> None:
    x = numbers(3, 5, 4)
    check(
        [
            example("y = CumSum(x, a)", {"x": x, "a": np.array(-2, "int64")}),
            example("a = Constant<value = int64 {2}>() y = CumSum<exclusive = 1>(x, a)", {"x": x}),
            example(
                "a = Constant<value = int64 {0}>() y = CumSum<reverse = 1>(x, a)",
                {"x": x},
                symbolic={"x": ["N", 5, "D"]},
            ),
            example("a = Constant<value = int64 {1}>() y = CumSum<exclusive = 1, reverse = 1>(x, a)", {"x": x}),
        ],
        PROFILE,
    )


def test_softmax_over_every_axis() -> None:
    x = numbers(3, 4, 33)
    names = {"x": ["N", "S", "D"]}
    examples = [example(f"y = Softmax<axis = {a}>(x)", {"x": x}) for a in (0, 1, -1)]
    examples += [example(f"y = Softmax<axis = {a}>(x)", {"x": x}, symbolic=names) for a in (1, -1)]
    examples += [example("y = LogSoftmax<axis = 1>(x)", {"x": x}, symbolic=names)]
    examples += [example("y = Hardmax<axis = -1>(x)", {"x": x})]
    examples += [example("y = Softmax<axis = 1>(x)", {"x": x}, opset=11), example("y = Hardmax(x)", {"x": x}, opset=11)]
    check(examples, PROFILE)


def test_normalizations() -> None:
    x, scale, bias = numbers(2, 6, 5, 7), numbers(6, seed=1), numbers(6, seed=2)
    feeds = {"x": x, "s": scale, "b": bias}
    mean, variance = numbers(6, seed=3), numbers(6, seed=4, low=0.1)
    names = {"x": ["N", 6, "H", "W"]}
    last = {"x": numbers(3, 4, 50), "s": numbers(50, seed=1), "b": numbers(50, seed=2)}
    layer = "y, m, d = LayerNormalization<axis = -1>(x, s, b)"
    two = {"x": numbers(3, 4, 5), "s": numbers(4, 5, seed=1)}
    check(
        [
            example(layer, last, outputs=["y", "m", "d"], symbolic={"x": ["N", "S", 50]}),
            example("y = LayerNormalization<axis = 1>(x, s)", two),
            example("y = RMSNormalization<axis = -1>(x, s)", {k: last[k] for k in "xs"}, opset=23),
            example("y = InstanceNormalization(x, s, b)", feeds, symbolic=names),
            example("y = GroupNormalization<num_groups = 3>(x, s, b)", feeds),
            example("y = BatchNormalization(x, s, b, m, v)", {**feeds, "m": mean, "v": variance}, symbolic=names),
            example("y = LpNormalization<axis = 1>(x)", {"x": x}),
            example("y = MeanVarianceNormalization(x)", {"x": x}),
            example("y = LRN<size = 3, alpha = 0.3, bias = 2.0>(x)", {"x": x}),
        ],
        PROFILE,
    )


def test_variances_of_large_means_keep_their_digits() -> None:
    x = (numbers(2, 64, low=-1, high=1).astype("float64") + 3000).astype("float32")
    wide = x.astype("float64")
    want = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
    one = np.ones(64, dtype="float32")
    check([example("y = LayerNormalization(x, s)", {"x": x, "s": one}, want=[want.astype("float32")])], PROFILE, 1e-3)


def test_half_precision_accumulates_in_single() -> None:
    x = numbers(2, 3000, dtype="float16", low=0, high=1)
    want = x.astype("float64").sum(1, keepdims=True).astype("float16")
    axis = "a = Constant<value = int64[1] {1}>() "
    check([example(axis + "y = ReduceSum(x, a)", {"x": x}, want=[want])], PROFILE, 1e-3)
