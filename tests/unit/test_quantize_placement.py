"""Where quantization puts its nodes, what it leaves behind, and what other tools make of it."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx_ir as ir
import pytest

from mmopt.api import choose_recipe
from mmopt.cli import main
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.canonicalize import InferShapes
from mmopt.transforms.precision import NarrowFloats
from mmopt.transforms.quantize import EqualizeLayers, ProtectWeights, QuantizeStatic, QuantizeWeights, SmoothActivations
from tests.canonical import module_from
from tests.unit.test_quantize import feeds, mlp
from tests.unit.test_rewrite import weights

BF16 = ir.DataType.BFLOAT16


def unused(module: Module) -> list[str]:
    """Initializers that nothing reads."""
    initializers = module.graph.initializers.items()
    return [name for name, value in initializers if not value.uses() and not value.is_graph_output()]


def rectified() -> Module:
    text = "float[4,32] x, float[32,64] w, float[64] b, float[64,32] v, float[32] c"
    module = module_from(
        f"g ({text}) => (float[4,32] z) {{ h = Gemm(x, w, b) r = Relu(h) y = Gemm(r, v, c) z = Exp(y) }}"
    )
    for number, node in enumerate(module.graph):
        node.name = f"{node.op_type}_{number}"
    return weights(module, w=(32, 64), b=(64,), v=(64, 32), c=(32,))


class TestLeftovers:
    @pytest.mark.parametrize(
        "pass_", [SmoothActivations(), ProtectWeights(), QuantizeStatic(), QuantizeWeights()], ids=str
    )
    def test_replaced_constants_go(self, pass_: Pass) -> None:
        module = mlp()
        assert pass_.run(module, PassContext(inputs={"x": feeds()}))
        assert unused(module) == []

    def test_balanced_and_corrected_ones_too(self) -> None:
        module = rectified()
        module.graph.initializers["w"].const_value = ir.tensor(
            np.random.default_rng(3).standard_normal((32, 64)).astype(np.float32)
            * np.geomspace(1, 50, 64).astype(np.float32)
        )
        context = PassContext(inputs={"x": feeds()})
        assert EqualizeLayers().run(module, context)
        assert QuantizeStatic().run(module, context)
        assert unused(module) == []

    def test_what_something_else_reads_stays(self) -> None:
        module = rectified()
        bias = module.graph.initializers["b"]
        module.graph.outputs.append(bias)
        assert QuantizeStatic().run(module, PassContext(inputs={"x": feeds()}))
        assert "b" in module.graph.initializers


class TestAttention:
    """What is quantized has attention read bfloat16 where the target multiplies it."""

    @pytest.mark.parametrize(("target", "narrow"), [("sapphirerapids", True), ("x86-64-v3", False), ("", False)])
    def test_by_target(self, target: str, narrow: bool) -> None:
        recipe = choose_recipe(2, "int8", target=target)
        passes = [pass_ for phase in recipe.phases for pass_ in phase.passes]
        assert QuantizeStatic() in passes
        assert (NarrowFloats(kinds=("Attention",)) in passes) == narrow

    def test_nothing_but_its_operands_is_rounded(self) -> None:
        text = "float[1,2,32,32] q, float[32,32] w, int64[7] i, float[2000,32] t"
        body = """k = MatMul(q, w) y = Attention(q, k, k) e = Gather(t, i)"""
        module = module_from(f"g ({text}) => (float[1,2,32,32] y, float[7,32] e) {{ {body} }}", opset=23)
        module = weights(module, w=(32, 32), t=(2000, 32))
        InferShapes().run(module, PassContext())
        assert NarrowFloats(kinds=("Attention",)).run(module, PassContext())
        widened = {node.outputs[0] for node in module.graph if node.op_type == "Cast" and node.inputs[0].dtype == BF16}  # type: ignore[union-attr]
        (attention,) = (node for node in module.graph if node.op_type == "Attention")
        assert all(value in widened for value in attention.inputs)
        assert module.graph.initializers["w"].dtype == ir.DataType.FLOAT
        assert module.graph.initializers["t"].dtype == ir.DataType.FLOAT

    def test_an_emitted_model_has_no_casts(self, tmp_path: pathlib.Path) -> None:
        text = "float[1,2,32,32] x, float[32,32] w"
        body = "q = MatMul(x, w) y = Attention(q, q, q)"
        module = weights(module_from(f"g ({text}) => (float[1,2,32,32] y) {{ {body} }}", opset=23), w=(32, 32))
        ir.save(module.model, tmp_path / "m.onnx")
        np.savez(tmp_path / "c.npz", x=np.random.default_rng(0).standard_normal((4, 1, 2, 32, 32)).astype(np.float32))
        options = ["--precision", "int8", "--calib", str(tmp_path / "c.npz"), "--target", "sapphirerapids", "-q"]
        options += ["--tolerance", "0.5"]
        code = main.run(["optimize", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "o.onnx"), *options])
        assert code == 0
        operators = {node.op_type for node in ir.load(tmp_path / "o.onnx").graph}
        assert "QuantizeLinear" in operators
        assert "Cast" not in operators
