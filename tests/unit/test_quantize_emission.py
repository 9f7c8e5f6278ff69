"""Quantization for runtimes that read ONNX: where they look for integers, and what they cannot see through."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import mmopt
from mmopt.errors import UserError
from mmopt.ir.module import Module
from mmopt.ir.verify import verify
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize import InferShapes
from mmopt.transforms.canonicalize.editing import constant
from mmopt.transforms.quantize import QuantizeAttention, QuantizeStatic, SeparateProjections
from tests.canonical import count_ops, evaluate, module_from
from tests.unit.test_quantize_placement import branches, images
from tests.unit.test_rewrite import weights

LENGTH = 520


def projected(length: int = 8, bias: bool = True, tail: str = "t = Add(q, k) y = Mul(t, v)", depth: int = 32) -> Module:
    """One product, split into three."""
    add = "b = Add(a, c)" if bias else "b = Identity(a)"
    inputs = f"float[2,{length},{depth}] x, float[{depth},96] w, float[96] c"
    body = f"a = MatMul(x, w) {add} q, k, v = Split<axis = -1>(b, s) {tail}"
    sizes = "<int64[3] s = {32, 32, 32}>"
    module = module_from(f"g ({inputs}) => (float[2,{length},32] y) {sizes} {{ {body} }}", opset=23)
    if not bias:
        node = next(node for node in module.graph if node.op_type == "Identity")
        node.outputs[0].replace_all_uses_with(node.inputs[0])  # type: ignore[arg-type]
        module.graph.remove(node, safe=True)
    module = weights(module, w=(depth, 96), c=(96,))
    data = np.random.default_rng(0).standard_normal((depth, 96)).astype(np.float32) / 4
    module.graph.initializers["w"].const_value = ir.tensor(data, name="w")
    InferShapes().run(module, PassContext())
    return module


def attention(options: str = "q_num_heads = 4, kv_num_heads = 4", length: int = LENGTH, more: str = "") -> Module:
    return projected(length, tail=f"y = Attention<{options}>(q, k, v{more})")


def tokens(length: int = LENGTH, seed: int = 1, count: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 2, length, 32)).astype(np.float32)


class TestSeparateProjections:
    @pytest.mark.parametrize("bias", [True, False])
    def test_each_part_has_a_product_of_its_own(self, bias: bool) -> None:
        # As wide as weights are: small constants are read otherwise.
        module, x = projected(bias=bias, depth=700), {"x": np.random.default_rng(0).random((2, 8, 700), np.float32)}
        want = evaluate(module, x)["y"]
        assert SeparateProjections().run(module, PassContext())
        assert [problem for problem in verify(module) if problem.severity == "error"] == []
        assert count_ops(module)["MatMul"] == 3
        assert "Split" not in count_ops(module)
        assert "w" not in module.graph.initializers
        np.testing.assert_allclose(evaluate(module, x)["y"], want, atol=1e-5 * np.abs(want).max())
        assert SeparateProjections().run(module, PassContext()) is False

    def test_what_something_else_reads_is_left_alone(self) -> None:
        module = projected(tail="t = Add(q, k) u = Mul(t, v) e = ReduceSum(b) y = Add(u, e)")
        assert SeparateProjections().run(module, PassContext()) is False

    def test_another_axis_is_left_alone(self) -> None:
        text = """g (float[3,8,32] x, float[32,32] w) => (float[1,8,32] y) <int64[3] s = {1, 1, 1}> {
          a = MatMul(x, w) q, k, v = Split<axis = 0>(a, s) t = Add(q, k) y = Mul(t, v) }"""
        module = weights(module_from(text, opset=23), w=(32, 32))
        InferShapes().run(module, PassContext())
        assert SeparateProjections().run(module, PassContext()) is False


class TestQuantizeAttention:
    def test_queries_and_keys_are_integers_without_a_zero_point(self, tmp_path: pathlib.Path) -> None:
        module, x = attention(), {"x": tokens(seed=7)[0]}
        want = evaluate(module, x)["y"]
        context = PassContext(inputs={"x": tokens()})
        assert QuantizeAttention().run(module, context)
        assert [problem for problem in verify(module) if problem.severity == "error"] == []
        assert "Attention" not in count_ops(module)
        (scores,) = (node.inputs[0].producer() for node in module.graph if node.op_type == "Softmax")  # type: ignore[union-attr]
        for value in scores.inputs:  # type: ignore[union-attr]
            wide = value.producer()  # type: ignore[union-attr]
            assert wide is not None
            assert wide.op_type == "DequantizeLinear"
            assert wide.inputs[2].dtype == ir.DataType.INT8  # type: ignore[union-attr]
            assert constant(wide.inputs[2]) == 0
        got = evaluate(module, x)["y"]
        assert np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) < 0.04
        ir.save(module.model, tmp_path / "m.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, x)[0], got, atol=2e-2 * np.abs(got).max())

    def test_scale_of_its_own(self) -> None:
        module = attention("q_num_heads = 4, kv_num_heads = 4, scale = 0.1")
        x = {"x": tokens(seed=7)[0]}
        want = evaluate(module, x)["y"]
        assert QuantizeAttention().run(module, PassContext(inputs={"x": tokens()}))
        assert np.abs(evaluate(module, x)["y"] - want).max() < 0.04 * np.abs(want).max()

    @pytest.mark.parametrize(
        "module",
        [
            attention(length=64),
            attention("q_num_heads = 4, kv_num_heads = 4, is_causal = 1"),
            attention("q_num_heads = 4, kv_num_heads = 4, softcap = 5.0"),
        ],
        ids=["short", "causal", "capped"],
    )
    def test_what_is_left_alone(self, module: Module) -> None:
        assert QuantizeAttention().run(module, PassContext(inputs={"x": tokens()})) is False

    def test_needs_samples(self) -> None:
        with pytest.raises(UserError, match="nothing to calibrate on"):
            QuantizeAttention().run(attention(), PassContext())


@pytest.mark.parametrize("portable", [False, True])
def test_convolutions_of_signed_numbers_have_no_zero_point_elsewhere(portable: bool) -> None:
    module = branches()
    assert QuantizeStatic(portable=portable).run(module, PassContext(inputs={"x": images()}))
    first = next(node for node in module.graph if node.op_type == "QuantizeLinear" and node.inputs[0].is_graph_input())  # type: ignore[union-attr]
    zero = constant(first.inputs[2])
    assert zero is not None
    assert (zero.dtype == np.int8) == portable
    assert (zero == 0) == portable
    behind = [constant(node.inputs[2]) for node in module.graph if node.op_type == "QuantizeLinear"]
    assert any(zero is not None and zero.dtype == np.uint8 for zero in behind), "rectified numbers use all 8 bits"


def averaged(mean: str = "m = ReduceMean<keepdims=1>(r, a)") -> Module:
    """A convolution, its mean over the image, and a layer that reads that."""
    text = "float[1,16,16,16] x, float[32,16,3,3] v, float[32] c, float[32,24] w, float[24] b"
    body = f"d = Conv<pads=[1,1,1,1]>(x, v, c) r = Relu(d) {mean} f = Reshape(m, s) g = Gemm(f, w, b) y = Relu(g)"
    constants = "<int64[2] a = {2, 3}, int64[2] s = {1, 32}>"
    module = module_from(f"g ({text}) => (float[1,24] y) {constants} {{ {body} }}", opset=21)
    module = weights(module, v=(32, 16, 3, 3), c=(32,), w=(32, 24), b=(24,))
    InferShapes().run(module, PassContext())
    return module


MEANS = ["m = ReduceMean<keepdims=1>(r, a)", "m = GlobalAveragePool(r)"]


class TestMeans:
    @pytest.mark.parametrize("mean", MEANS)
    def test_other_runtimes_average_integers(self, mean: str, tmp_path: pathlib.Path) -> None:
        module, x = averaged(mean), {"x": images(1, 5)[0]}
        want = evaluate(module, x)["y"]
        assert QuantizeStatic(portable=True).run(module, PassContext(inputs={"x": images()}))
        assert [problem for problem in verify(module) if problem.severity == "error"] == []
        (node,) = (node for node in module.graph if node.op_type == "GlobalAveragePool")
        assert node.inputs[0].producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]
        assert [use.node.op_type for use in node.outputs[0].uses()] == ["QuantizeLinear"]
        ir.save(module.model, tmp_path / "m.onnx")
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "o.onnx")
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
        operators = [node.op_type for node in ir.load(tmp_path / "o.onnx").graph]
        assert "QLinearGlobalAveragePool" in operators
        assert operators.count("QuantizeLinear") == 1, "the input's"
        assert np.abs(session.run(None, x)[0] - want).max() < 0.02 * np.abs(want).max()

    def test_the_native_kernels_average_floats(self) -> None:
        module = averaged()
        assert QuantizeStatic().run(module, PassContext(inputs={"x": images()}))
        (node,) = (node for node in module.graph if node.op_type == "ReduceMean")
        assert node.inputs[0].producer().op_type == "Relu"  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        "mean",
        [
            "n = ReduceMean<keepdims=1>(r, a) m = Exp(n)",  # something else reads it
            "n = ReduceMean<keepdims=1>(r) m = Expand(n, s)",  # not over the image alone
            "e = Exp(r) p = GlobalMaxPool(e) n = GlobalAveragePool(r) m = Mul(n, p)",
        ],
    )
    def test_what_is_left_alone(self, mean: str) -> None:
        module = averaged(mean)
        assert QuantizeStatic(portable=True).run(module, PassContext(inputs={"x": images()}))
        node = next(node for node in module.graph if node.op_type in ("ReduceMean", "GlobalAveragePool"))
        assert node.inputs[0].producer().op_type != "DequantizeLinear"  # type: ignore[union-attr]


def test_an_emitted_model_is_quantized_for_others() -> None:
    samples = {"x": tokens()}
    emitted = mmopt.optimize(attention(), precision="int8", samples=samples, target="", validate="off").module
    native = mmopt.optimize(attention(), precision="int8", samples=samples, target="x86-64-v3", validate="off").module
    assert {"Split", "Attention"} & set(count_ops(emitted)) == set()
    assert "Attention" in count_ops(native)
