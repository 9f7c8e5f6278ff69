"""Constant folding: what is computed, with which bits, and what must stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize import FoldConstants
from tests.canonical import check, evaluate, inputs_for, module_from, ops


def _weight(module: Module, name: str) -> np.ndarray:
    value = module.graph.initializers[name]
    assert value.const_value is not None
    return value.const_value.numpy()


def _store(module: Module, name: str, array: np.ndarray) -> None:
    """Make an initializer of the value ``name``, which nothing defines yet."""
    value = next(v for node in module.graph for v in node.inputs if v is not None and v.name == name)
    value.const_value = ir.tensor(array, name=name)
    value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
    module.graph.register_initializer(value)


def test_float_arithmetic_has_the_bits_of_onnxruntime() -> None:
    text = (
        "g (float[4] x) => (float[4] y, float[4] kept) <float[4] w = {0.1, -2.5, 3.3, 1e-8}>"
        " { a = Exp(w) b = Tanh(a) c = Pow(b, a) y = Add(x, c) kept = Mul(w, x) }"
    )
    module = module_from(text)
    want = evaluate(module, inputs_for(module))
    check(FoldConstants(), module)
    assert ops(module) == ["Add", "Mul"]
    assert list(module.graph.initializers) == ["w", "c"]
    np.testing.assert_array_equal(evaluate(module, inputs_for(module))["y"], want["y"])


def test_only_what_is_read_outside_becomes_an_initializer() -> None:
    module = module_from(
        "g (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}> { a = Neg(w) b = Abs(a) c = Sqrt(b) y = Mul(x, c) }"
    )
    check(FoldConstants(), module)
    assert sorted(module.graph.initializers) == ["c", "w"]


def test_known_sizes_of_a_dynamic_shape_fold() -> None:
    module = module_from(
        "g (float[batch,12] x) => (float[a,b] y) <int64 one = {1}, int64[1] z = {0}, int64[1] r = {-1}> {"
        " s = Shape(x) h = Gather(s, one) u = Unsqueeze(h, z) t = Concat<axis = 0>(r, u) y = Reshape(x, t) }"
    )
    check(FoldConstants(), module)
    assert ops(module) == ["Shape", "Reshape"]
    assert _weight(module, "t").tolist() == [-1, 12]


def test_sizes_that_vary_do_not_fold() -> None:
    module = module_from("g (float[batch,12] x) => (int64[2] y) { s = Shape(x) y = Neg(s) }")
    check(FoldConstants(), module, fires=False)


def test_zero_keeps_its_sign() -> None:
    module = module_from("g (float[3] x) => (float[3] y) <float[1] z = {0.0}> { n = Neg(z) d = Div(x, n) y = Neg(d) }")
    check(FoldConstants(), module)
    assert np.signbit(_weight(module, "n")).all()


def test_constants_in_bodies_fold() -> None:
    module = module_from(
        "g (float[2] x, bool c) => (float[2] y) <float[2] w = {1.0, 4.0}> { y = If (c) <"
        " then_branch = t () => (float[2] p) { a = Sqrt(w) p = Add(x, a) },"
        " else_branch = e () => (float[2] q) { b = Sqrt(w) q = Sub(x, b) }> }"
    )
    check(FoldConstants(), module)
    assert sorted(ops(module)) == ["Add", "If", "Sub"]


def test_several_outputs_fold_together() -> None:
    module = module_from(
        "g (float[2] x) => (float[2] y) <float[4] w = {1.0, 2.0, 3.0, 4.0}>"
        " { a, b = Split<axis = 0, num_outputs = 2>(w) c = Mul(x, a) y = Add(c, b) }"
    )
    check(FoldConstants(), module)
    assert ops(module) == ["Mul", "Add"]


KEPT = {
    "random": "r = RandomUniform<shape = [3], seed = 1.0>() y = Add(x, r)",
    "random-like": "r = RandomNormalLike<seed = 1.0>(w) y = Add(x, r)",
    "dequantize": "r = DequantizeLinear(q, s) y = Add(x, r)",
    "graph-output": "a = Relu(x) y = Exp(a) o = Exp(w)",
    "half-weight": "r = Cast<to = 1>(h) y = Add(x, r)",
    "bfloat16-pair": "b = Cast<to = 16>(w) r = Cast<to = 1>(b) y = Add(x, r)",
    "trained-dropout": "r, m = Dropout(w, p, t) y = Add(x, r)",
}


@pytest.mark.parametrize("body", KEPT.values(), ids=KEPT)
def test_stays(body: str) -> None:
    outputs = "float[3] y, float[3] o" if " o = " in body else "float[3] y"
    module = module_from(
        f"g (float[3] x) => ({outputs}) <float[3] w = {{1.0, 2.0, 3.0}}, int8[3] q = {{1, 2, 3}}, float s = {{0.5}},"
        f" float p = {{0.5}}, bool t = {{1}}> {{ {body} }}"
    )
    if "(h)" in body:
        _store(module, "h", np.ones(3, np.float16))
    check(FoldConstants(), module, fires=False, run="Dropout" not in body)


def test_a_scalar_in_half_precision_folds() -> None:
    module = module_from("g (float[3] x) => (float[3] y) <float16 h> { r = Cast<to = 1>(h) y = Mul(x, r) }")
    _store(module, "h", np.array(1.5, np.float16))
    check(FoldConstants(), module)
    assert _weight(module, "r") == np.float32(1.5)


GROWING = {
    "constant-of-shape": ("r = ConstantOfShape(s)", "int64[2] s = {600, 600}"),
    "expand": ("r = Expand(v, s)", "float v = {1.0}, int64[2] s = {600, 600}"),
    "tile": ("r = Tile(v, s)", "float[1,1] v = {1.0}, int64[2] s = {600, 600}"),
}


@pytest.mark.parametrize(("body", "weights"), GROWING.values(), ids=GROWING)
def test_what_would_grow_stays(body: str, weights: str) -> None:
    text = f"g (float[600,600] x) => (float[600,600] y) <{weights}> {{ {body} y = Add(x, r) }}"
    context = check(FoldConstants(), module_from(text), fires=False)
    assert "1440000 bytes" in context.remarks[0].message
    check(FoldConstants(max_bytes=1 << 21), module_from(text))
    check(FoldConstants(max_bytes=1 << 21, max_total_bytes=1 << 20), module_from(text), fires=False)


def _with_weight(shape: tuple[int, ...], body: str) -> Module:
    module = module_from(f"g (float[3,{shape[0]}] x) => (float[a,b] y) <float[{shape[0]},{shape[1]}] w> {{ {body} }}")
    _store(module, "w", np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    return module


def test_a_large_result_folds_where_it_takes_the_place_of_its_source() -> None:
    module = _with_weight((600, 600), "n = Neg(w) y = MatMul(x, n)")
    check(FoldConstants(), module)
    assert ops(module) == ["MatMul"]
    shared = _with_weight((600, 600), "n = Neg(w) m = MatMul(x, n) y = MatMul(m, w)")
    check(FoldConstants(), shared, fires=False)


def test_a_large_transpose_folds_without_being_computed() -> None:
    module = _with_weight((600, 600), "t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)")
    source = module.graph.initializers["w"].const_value
    assert source is not None
    check(FoldConstants(), module)
    tensor = module.graph.initializers["t"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    np.testing.assert_array_equal(tensor.numpy(), source.numpy().T)
    assert tensor.tobytes() == np.ascontiguousarray(source.numpy().T).tobytes()


def test_a_node_that_cannot_run_stays_and_the_others_fold() -> None:
    """Its axis is out of range: onnxruntime refuses it, however it is run."""
    module = module_from(
        "g (float[3] x) => (float[3] y) <float[3] w = {1.0, 2.0, 3.0}, float[2,3] v = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0},"
        " int64[2] t = {4, 4}> { a = Exp(w) b = Reshape(v, t) c = Neg(b) d = Sqrt(w) e = Add(a, d) y = Add(x, e) }"
    )
    context = PassContext()
    assert FoldConstants().run(module, context)
    assert "e" in module.graph.initializers
    assert [r.kind for r in context.remarks if "Reshape" in r.message] == ["missed"]


_SLICES = (
    "z = Constant<value_ints = [0]>() h = Constant<value_ints = [300]>() e = Constant<value_ints = [600]>()"
    " a = Slice(w, z, h, z) b = Slice(w, h, e, z)"
)


def test_slices_of_a_weight_fold_when_together_they_take_its_place() -> None:
    module = _with_weight((600, 600), f"{_SLICES} f = Concat<axis = 0>(x, a) g = Concat<axis = 0>(f, b) y = Neg(g)")
    check(FoldConstants(max_bytes=1 << 10), module)
    assert ops(module).count("Slice") == 0
    shared = f"{_SLICES} v = MatMul(x, w) f = Concat<axis = 0>(v, a) g = Concat<axis = 0>(f, b) y = Neg(g)"
    check(FoldConstants(max_bytes=1 << 10), _with_weight((600, 600), shared), fires=False)


def test_transposes_count_towards_the_sum() -> None:
    module = _with_weight((600, 600), "t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)")
    context = check(FoldConstants(max_total_bytes=1 << 20), module, fires=False)
    assert "max_total_bytes" in context.remarks[0].message
