"""Where quantization puts its nodes, what it leaves behind, and what other tools make of it."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import mmopt
from mmopt.api import choose_recipe
from mmopt.cli import main
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.canonicalize import InferShapes
from mmopt.transforms.fuse.fuse_groups import FuseGroups
from mmopt.transforms.precision import NarrowFloats
from mmopt.transforms.quantize import EqualizeLayers, ProtectWeights, QuantizeStatic, QuantizeWeights, SmoothActivations
from tests.canonical import evaluate, module_from
from tests.kernels import WIDEST
from tests.programs import Programs
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
        static = QuantizeStatic(portable=not target, balance=True, logits=not target)
        assert static in passes
        assert (NarrowFloats(kinds=("Attention",)) in passes) == narrow
        assert (QuantizeWeights(logits=True) in passes) == bool(target)
        if narrow:  # behind the quantization, its error would be judged by integers that happen to turn out otherwise
            assert passes.index(NarrowFloats(kinds=("Attention",))) < passes.index(static)

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


def branches() -> Module:
    """Two branches of convolutions over a pooled image that are concatenated, and a sum of two convolutions."""
    text = "float[1,16,16,16] x, float[32,16,3,3] v, float[32] c, float[16,32,1,1] w, float[16,32,3,3] u"
    text += ", float[16,32,1,1] s, float[16,32,1,1] t"
    body = """a = Conv<pads=[1,1,1,1]>(x, v, c) r = Relu(a) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
    d = Conv(p, w) dr = Relu(d) e = Conv<pads=[1,1,1,1]>(p, u) er = Relu(e) j = Concat<axis=1>(dr, er)
    f = Conv(j, s) g = Conv(j, t) h = Add(f, g) k = Relu(h) y = Exp(k)"""
    module = module_from(f"g ({text}) => (float[1,16,8,8] y) {{ {body} }}", opset=21)
    for number, node in enumerate(module.graph):
        node.name = f"{node.op_type}_{number}"
    shapes = {"v": (32, 16, 3, 3), "c": (32,), "w": (16, 32, 1, 1), "u": (16, 32, 3, 3), "s": (16, 32, 1, 1)}
    module = weights(module, **shapes, t=(16, 32, 1, 1))
    for name in ("v", "w", "u", "s", "t"):
        value = module.graph.initializers[name]
        data = np.random.default_rng(len(name) + ord(name)).standard_normal(value.shape.numpy()) / 12  # type: ignore[union-attr]
        value.const_value = ir.tensor(data.astype(np.float32), name=name)
    InferShapes().run(module, PassContext())
    return module


def images(count: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 1, 16, 16, 16)).astype(np.float32)


def source(value: ir.Value | None) -> tuple[str, str]:
    """What a value is dequantized from: the operator that makes it, and the name of its scale."""
    wide = None if value is None else value.producer()
    assert wide is not None
    assert wide.op_type == "DequantizeLinear"
    narrow = wide.inputs[0].producer()  # type: ignore[union-attr]
    if narrow is None:
        return "constant", str(wide.inputs[1].name)  # type: ignore[union-attr]
    made = narrow.inputs[0].producer()  # type: ignore[union-attr]
    return "input" if made is None else made.op_type, str(scale_of(narrow))


def scale_of(node: ir.Node) -> float:
    return float(node.inputs[1].const_value.numpy())  # type: ignore[union-attr]


class TestSharing:
    def test_what_chooses_or_moves_elements_works_on_integers_of_its_result(self) -> None:
        module = branches()
        assert QuantizeStatic().run(module, PassContext(inputs={"x": images()}))
        nodes = {node.name: node for node in module.graph}
        pool, join, reader = nodes["MaxPool_2"], nodes["Concat_7"], nodes["Conv_8"]
        assert source(pool.inputs[0]) == ("Relu", source(nodes["Conv_3"].inputs[0])[1])
        assert source(nodes["Conv_3"].inputs[0])[0] == "MaxPool"
        assert [source(value) for value in join.inputs] == [("Relu", source(reader.inputs[0])[1])] * 2

    def test_of_a_sum_only_the_waiting_side_is_stored_as_integers(self) -> None:
        module = branches()
        assert QuantizeStatic().run(module, PassContext(inputs={"x": images()}))
        (add,) = (node for node in module.graph if node.op_type == "Add")
        first, second = add.inputs
        assert source(first)[0] == "Conv"
        assert second is not None
        assert second.producer().op_type == "Conv"  # type: ignore[union-attr]

    def test_other_runtimes_get_integers_on_both_sides_and_biases_of_32_bits(self) -> None:
        module = branches()
        assert QuantizeStatic(portable=True).run(module, PassContext(inputs={"x": images()}))
        (add,) = (node for node in module.graph if node.op_type == "Add")
        assert [source(value)[0] for value in add.inputs] == ["Conv", "Conv"]
        for node in module.graph:
            if node.op_type == "Conv":
                wide = node.inputs[2].producer()  # type: ignore[union-attr]
                assert wide is not None
                assert wide.inputs[0].dtype == ir.DataType.INT32  # type: ignore[union-attr]
        assert error_of(module) < 0.05

    def test_onnxruntime_computes_all_of_it_in_integers(self, tmp_path: pathlib.Path) -> None:
        module = branches()
        assert QuantizeStatic(portable=True).run(module, PassContext(inputs={"x": images()}))
        ir.save(module.model, tmp_path / "m.onnx")
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "o.onnx")
        options.log_severity_level = 4
        onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
        operators = [node.op_type for node in ir.load(tmp_path / "o.onnx").graph]
        assert operators.count("QLinearConv") == 5
        assert "Conv" not in operators
        assert "Add" in operators or "QLinearAdd" in operators

    @pytest.mark.parametrize("portable", [False, True])
    def test_the_native_kernels_agree(self, portable: bool) -> None:
        module = branches()
        assert QuantizeStatic(portable=portable).run(module, PassContext(inputs={"x": images()}))
        want = evaluate(module, {"x": images(1, 5)[0]})["y"]
        InferShapes().run(module, PassContext())
        FuseGroups().run(module, PassContext())
        programs = Programs([module], WIDEST)
        (got,) = programs.run(0, {"x": images(1, 5)[0]})
        assert np.abs(got - want).max() <= 0.02 * np.abs(want).max()
        # Nothing but the input is dequantized or quantized by itself.
        assert programs.kernels.count("Concat") <= 1
        assert not [name for name in programs.kernels if name.startswith("DequantizeLinear")]


def error_of(module: Module) -> float:
    """Root mean square error, of the root mean square of the float model."""
    x = {"x": images(1, 7)[0]}
    got, want = evaluate(module, x)["y"], evaluate(branches(), x)["y"]
    return float(np.sqrt(((got - want) ** 2).mean() / (want**2).mean()))


def test_a_bias_takes_up_what_is_corrected() -> None:
    """The mean error of rounded weights needs no operator of its own where a constant is added anyway."""
    module = mlp()
    before = sum(node.op_type == "Add" for node in module.graph)
    assert QuantizeStatic().run(module, PassContext(inputs={"x": feeds()}))
    after = [node for node in module.graph if node.op_type == "Add"]
    assert len(after) == before + 1, "MatMul without a bias gets one"
    assert unused(module) == []


def test_layers_whose_result_leaves_keep_float_operands_and_store_integers() -> None:
    """The last layer reads what the norm gives as it is; its weight is int8 all the same."""
    result = mmopt.optimize(mlp(), precision="int8", samples={"x": feeds()}, target="sapphirerapids", validate="off")
    tensors = result.module.graph.initializers.values()
    floats = [v for v in tensors if v.dtype == ir.DataType.FLOAT and v.shape is not None and len(v.shape) == 2]
    assert floats == []
    want = evaluate(mlp(), {"x": feeds(7)[0]})["y"]
    got = evaluate(result.module, {"x": feeds(7)[0]})["y"]
    assert np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) < 0.03
