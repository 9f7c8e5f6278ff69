"""Values while a graph is lowered, and what functions do with them: views, shared memory, sizes that cost nothing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper
from tvm import tirx

from mmopt.backends.compute import Map, Source
from mmopt.ir.module import Module
from mmopt.lowering.values import (
    MAX_ELEMENTS,
    NotLowered,
    Value,
    dtype_name,
    from_elements,
    known_extents,
    known_ints,
    plain_view,
    static_shape,
)
from tests.canonical import module_from
from tests.kernels import WIDEST, Arrays, check
from tests.programs import Example, Programs, assert_close, model_of

N = tirx.Var("n", "int64")


# -- values ----------------------------------------------------------------------------------------------------


def test_small_integer_constants_are_followed_and_others_are_not() -> None:
    followed = Value(constant=np.array([[1, 2], [3, 4]]))
    assert [[int(e) for e in row] for row in followed.elements] == [[1, 2], [3, 4]]
    assert Value(constant=np.array([1.5])).elements is None
    assert Value(constant=np.zeros(MAX_ELEMENTS + 1, np.int64)).elements is None
    assert Value(Source((2,), "int64", "x")).elements is None


def test_elements_that_are_all_known_become_a_constant() -> None:
    known = from_elements([2, tirx.const(3, "int64")])
    np.testing.assert_array_equal(known.constant, [2, 3])
    open_ = from_elements([2, N + 1 - 1])
    assert open_.constant is None
    assert open_.elements[1].same_as(N)
    assert from_elements(7).shape == ()
    assert [int(d) for d in from_elements([]).shape] == [0]


def test_a_value_needs_one_form() -> None:
    with pytest.raises(ValueError, match="a tensor, a constant or elements"):
        Value()


def test_what_must_be_known_and_is_not() -> None:
    computed = Value(Source((2,), "int64", "x"))
    with pytest.raises(NotLowered, match="axes is not known"):
        known_ints(computed, "axes")
    with pytest.raises(NotLowered, match="shape depends on data"):
        known_extents(computed, "shape")
    with pytest.raises(NotLowered, match="kernel has symbolic extents"):
        static_shape((N,), "kernel")
    assert known_ints(None, "axes") is None
    assert known_ints(Value(constant=np.array([[4, 5]])), "axes") == [4, 5]
    assert static_shape((tirx.const(4, "int64"),), "kernel") == (4,)


def test_only_computations_are_pending() -> None:
    source = Source((2,), "float32", "x")
    assert not Value(source).pending
    assert not Value(constant=np.ones(3)).pending
    assert Value(Map((2,), "float32", lambda i: source[i])).pending
    blocked = Map((1, 2, 5, 8), "float32", lambda *at: tirx.const(0, "float32"))
    value = Value.in_blocks(blocked)
    assert value.pending
    assert [int(d) for d in value.shape] == [1, 16, 5]
    assert value.in_blocks_of(8) is blocked
    assert value.in_blocks_of(16) is None


def test_element_types_without_kernels() -> None:
    assert dtype_name(ir.DataType.BFLOAT16) == "bfloat16"
    with pytest.raises(NotLowered, match="STRING"):
        dtype_name(ir.DataType.STRING)
    with pytest.raises(NotLowered, match="unknown"):
        dtype_name(None)


def test_views_and_choices_read_the_right_elements() -> None:
    data = Arrays()
    x = data.source((2, 3, 5, 4))
    plain = plain_view(x)
    chosen = Value(elements=np.array([[N, N + 1], [N * 2, tirx.const(9, "int64")]], object), dtype="int32").tensor
    want = data[x].transpose(0, 1, 3, 2).reshape(2, 12, 5)
    cases = [data.case("plain view", plain, want)]
    cases.append(data.case("sizes as data", chosen, np.array([[6, 7], [12, 9]]), sizes={"n": 6}))
    check(cases, WIDEST)


# -- functions -------------------------------------------------------------------------------------------------


def run(text: str, feeds: dict[str, np.ndarray]) -> tuple[list[np.ndarray], Programs]:
    """Outputs of a model given as text, and the program."""
    compiled = Programs([module_from(text)], WIDEST)
    return compiled.run(0, feeds), compiled


X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def test_arithmetic_on_sizes_needs_no_kernel() -> None:
    text = """g (float[n,3,4] x) => (float[?,?] y) <int64[1] zero = {0}, int64[1] minus = {-1}, int64 two = {2}> {
        s = Shape(x)
        first = Gather(s, zero)
        half = Div(first, two)
        target = Concat<axis = 0>(half, minus)
        r = Reshape(x, target)
        y = Relu(r)
    }"""
    (y,), compiled = run(text, {"x": X - 12})
    np.testing.assert_array_equal(y, np.maximum(X - 12, 0).reshape(1, 24))
    assert len(compiled.kernels) == 1


def test_sizes_as_data_are_written_out() -> None:
    text = """g (float[n,3,m] x) => (int64[3] s, int64 count) {
        s = Shape(x)
        count = Size(x)
    }"""
    (s, count), _ = run(text, {"x": X})
    np.testing.assert_array_equal(s, [2, 3, 4])
    assert count == 24


def test_results_never_share_memory_with_inputs_or_each_other() -> None:
    text = """g (float[n,3,4] x) => (float[n,12] a, float[n,12] b, float[n,3,4] c) <int64[2] shape = {0, 12}> {
        a = Reshape(x, shape)
        b = Identity(a)
        c = Identity(x)
    }"""
    x = X.copy()
    results, _ = run(text, {"x": x})
    for number, result in enumerate(results):
        assert not np.shares_memory(result, x)
        assert not any(np.shares_memory(result, other) for other in results[:number])
        np.testing.assert_array_equal(result.reshape(2, 3, 4), X)


def test_constants_as_results() -> None:
    text = """g (float[n] x) => (float[2] w, int64 k) <float[2] v = {1.5, 2.5}, int64 j = {7}> {
        w = Identity(v)
        k = Identity(j)
    }"""
    (w, k), _ = run(text, {"x": np.zeros(1, np.float32)})
    np.testing.assert_array_equal(w, [1.5, 2.5])
    assert k == 7


def test_sizes_that_are_data_at_run_time() -> None:
    text = """g (float[2,3,4] x, int64[2] shape) => (float[?,?] y) {
        r = Reshape(x, shape)
        y = Tanh(r)
    }"""
    compiled = Programs([module_from(text)], WIDEST)
    for shape in [(6, 4), (2, 12), (24, 1)]:
        (y,) = compiled.run(0, {"x": X, "shape": np.array(shape)})
        assert_close(y, np.tanh(X.reshape(shape)))


def test_a_weight_used_by_several_entries_is_stored_once() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    feeds = {"x": np.ones((3, 16), np.float32)}
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    one = Example("one", model_of([node], feeds, ["y"], {"w": weight}), feeds)
    shared = ir.from_proto(one.model)
    module = Module(shared)
    again = Module(ir.from_proto(one.model))
    again.graph.initializers["w"].const_value = module.graph.initializers["w"].const_value
    compiled = Programs([module, again], WIDEST)
    assert len(compiled.weights) == 1
    for number in (0, 1):
        assert_close(compiled.run(number, feeds)[0], feeds["x"] @ weight)


def test_kernels_that_are_equal_are_compiled_once() -> None:
    text = """g (float[n,3,4] x) => (float[n,3,4] y) {
        a = Exp(x)
        b = Exp(a)
        y = Exp(b)
    }"""
    (y,), compiled = run(text, {"x": -X})
    assert_close(y, np.exp(np.exp(np.exp(-X))))
    assert len(compiled.kernels) == 1
