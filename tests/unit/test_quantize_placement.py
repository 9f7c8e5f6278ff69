"""Where quantization puts its nodes, what it leaves behind, and what other tools make of it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.quantize import EqualizeLayers, ProtectWeights, QuantizeStatic, QuantizeWeights, SmoothActivations
from tests.canonical import module_from
from tests.unit.test_quantize import feeds, mlp
from tests.unit.test_rewrite import weights


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
