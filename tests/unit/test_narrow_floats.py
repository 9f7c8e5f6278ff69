"""Rounding to bfloat16 and float16: what is rounded, what is not and why, and what the model computes then."""

from __future__ import annotations

import collections
import pathlib

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

import mmopt
from mmopt.errors import UserError
from mmopt.ir.fingerprint import fingerprint
from mmopt.ir.module import Module, initializer_bytes
from mmopt.ir.verify import verify
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize import InferShapes
from mmopt.transforms.precision import NarrowFloats
from tests.canonical import evaluate, module_from
from tests.kernels import WIDEST
from tests.programs import Programs

NUMPY = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}
ONNX = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16}


def rounded(text: str, weights: dict[str, np.ndarray], format: str = "bf16") -> tuple[Module, PassContext]:
    """A model after the pass; its inputs called in ``weights`` become initializers."""
    module = module_from(text, opset=20)
    for name, data in weights.items():
        value = next(v for v in module.graph.inputs if v.name == name)
        module.graph.inputs.remove(value)
        value.const_value = ir.tensor(data, name=name)
        module.graph.register_initializer(value)
    InferShapes().run(module, PassContext())
    context = PassContext()
    NarrowFloats(format=format).run(module, context)  # type: ignore[arg-type]
    assert [p for p in verify(module) if p.severity == "error"] == []
    InferShapes().run(module, PassContext())
    assert [p for p in verify(module) if p.severity == "error"] == []
    return module, context


def counts(module: Module) -> dict[str, int]:
    return dict(collections.Counter(node.op_type for node in module.graph))


def said(context: PassContext, kind: str) -> str:
    return "\n".join(remark.message for remark in context.remarks if remark.kind == kind)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def narrow_of(data: np.ndarray, format: str) -> np.ndarray:
    return data.astype(NUMPY[format]).astype(np.float64)


@pytest.mark.parametrize("format", ["bf16", "fp16"])
def test_a_product_of_rounded_operands(format: str) -> None:
    w, b = normal(16, 8), normal(8, seed=1)
    text = "g (float[4,16] x, float[16,8] w, float[8] b) => (float[4,8] y) { m = MatMul(x, w) y = Add(m, b) }"
    module, context = rounded(text, {"w": w, "b": b}, format)
    stored = {str(name): value.dtype for name, value in module.graph.initializers.items()}
    assert sorted(stored.values(), key=str) == sorted([ONNX[format], ir.DataType.FLOAT], key=str)
    x = normal(4, 16, seed=2)
    got = evaluate(module, {"x": x})["y"]
    want = narrow_of(x, format) @ narrow_of(w, format) + b
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(want - (x.astype(np.float64) @ w + b)).max() > 1e-4, "the oracle must round"
    assert "MatMul ×1" in said(context, "applied")
    assert "Add ×1" in said(context, "note")


def test_again_there_is_nothing_to_do() -> None:
    text = "g (float[4,16] x, float[16,8] w) => (float[4,8] y) { y = MatMul(x, w) }"
    module, _ = rounded(text, {"w": normal(16, 8)})
    before = fingerprint(module.model)
    assert not NarrowFloats().run(module, PassContext())
    assert fingerprint(module.model) == before


def test_a_value_between_two_products_is_stored_narrow_once() -> None:
    text = """g (float[4,16] x, float[16,16] v, float[16,16] w) => (float[4,16] y) {
        a = MatMul(x, v)
        r = Relu(a)
        b = MatMul(r, w)
        y = Add(b, r)
    }"""
    module, _ = rounded(text, {"v": normal(16, 16), "w": normal(16, 16, seed=1)})
    (relu,) = (node for node in module.graph if node.op_type == "Relu")
    assert [user.op_type for user in relu.outputs[0].consumers()] == ["Cast"]
    down = relu.outputs[0].consumers()[0]
    assert down.outputs[0].dtype == ir.DataType.BFLOAT16
    users = [cast.outputs[0].consumers()[0].op_type for cast in down.outputs[0].consumers()]
    assert sorted(users) == ["Add", "MatMul"], "each reader widens for itself"


def test_moved_values_are_rounded_before_they_move() -> None:
    text = """g (float[2,4,16] x, float[16,16] v, float[2,16,4] z) => (float[2,4,4] y, int64[3] n) {
        a = MatMul(x, v)
        t = Transpose<perm = [0, 2, 1]>(a)
        n = Shape(t)
        y = MatMul(t, z)
    }"""
    text = text.replace("float[2,4,4] y", "float[2,16,4] y").replace("float[2,16,4] z", "float[2,4,4] z")
    module, _ = rounded(text, {"v": normal(16, 16)})
    (turn,) = (node for node in module.graph if node.op_type == "Transpose")
    assert [value.dtype for value in (turn.inputs[0], turn.outputs[0]) if value] == [ir.DataType.BFLOAT16] * 2
    assert {user.op_type for user in turn.outputs[0].consumers()} == {"Cast", "Shape"}


def test_max_pooling_takes_and_gives_rounded_values() -> None:
    text = """g (float[1,3,8,8] x, float[8,3,3,3] v, float[8,8,1,1] w) => (float[1,8,3,3] y) {
        a = Conv(x, v)
        p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(a)
        y = Conv(p, w)
    }"""
    module, _ = rounded(text, {"v": normal(8, 3, 3, 3), "w": normal(8, 8, 1, 1, seed=1)})
    (pool,) = (node for node in module.graph if node.op_type == "MaxPool")
    around = [pool.inputs[0].producer(), pool.outputs[0].consumers()[0]]
    assert [node.op_type for node in around] == ["Cast", "Cast"]
    assert [around[0].inputs[0].dtype, around[1].outputs[0].dtype] == [ir.DataType.BFLOAT16] * 2


def test_the_other_branch_of_a_residual_sum_is_stored_narrow() -> None:
    text = """g (float[1,8,4,4] x, float[8,8,1,1] v, float[8,8,1,1] w) => (float[1,8,4,4] y) {
        a = Conv(x, v)
        b = Conv(x, w)
        y = Add(a, b)
    }"""
    module, _ = rounded(text, {"v": normal(8, 8, 1, 1), "w": normal(8, 8, 1, 1, seed=1)})
    first, second = (node for node in module.graph if node.op_type == "Conv")
    assert [user.op_type for user in first.outputs[0].consumers()] == ["Cast"]
    assert [user.op_type for user in second.outputs[0].consumers()] == ["Add"], "it stays in registers"


def test_a_table_that_is_only_looked_up_is_stored_narrow() -> None:
    text = "g (int64[5] i, float[100,16] t, float[16] s) => (float[5,16] y) { r = Gather(t, i) y = Mul(r, s) }"
    module, _ = rounded(text, {"t": normal(100, 16), "s": normal(16)})
    assert initializer_bytes(module.model) == 100 * 16 * 2 + 16 * 4
    small, _ = rounded(text.replace("100", "10"), {"t": normal(10, 16), "s": normal(16)})
    assert initializer_bytes(small.model) == 10 * 16 * 4 + 16 * 4


def test_outputs_norms_softmax_and_reductions_stay_wide() -> None:
    text = """g (float[4,16] x, float[16] s, float[16,16] w) => (float[4,16] y, float[4] z) {
        n = LayerNormalization(x, s)
        m = MatMul(n, w)
        y = Softmax(m)
        z = ReduceSum<keepdims = 0>(m, axes)
    }""".replace("float[16,16] w)", "float[16,16] w, int64[1] axes)")
    module, context = rounded(text, {"s": normal(16), "w": normal(16, 16), "axes": np.array([1])})
    kinds = {node.op_type: [v.dtype for v in node.inputs if v is not None] for node in module.graph}
    for op in ("LayerNormalization", "Softmax", "ReduceSum"):
        assert kinds[op][0] == ir.DataType.FLOAT
        assert op in said(context, "note")
    products = [node for node in module.graph if node.op_type == "MatMul"]
    assert {user.op_type for user in products[0].outputs[0].consumers()} == {"Softmax", "ReduceSum"}


def test_recurrent_weights_are_narrow_and_its_bias_and_state_are_not() -> None:
    text = """g (float[3,2,8] x, float[1,64,8] w, float[1,64,16] r, float[1,128] b, float[1,2,16] h)
        => (float[3,1,2,16] y) { y = LSTM<hidden_size = 16>(x, w, r, b, , h, h) }"""
    data = {"w": normal(1, 64, 8), "r": normal(1, 64, 16), "b": normal(1, 128)}
    module, _ = rounded(text, data)
    (lstm,) = (node for node in module.graph if node.op_type == "LSTM")
    sources = [v is not None and v.producer() is not None and v.producer().op_type for v in lstm.inputs]
    assert sources == ["Cast", "Cast", "Cast", False, False, False, False]


def test_a_weight_in_a_body_of_control_flow() -> None:
    text = """g (bool c, float[4,16] x, float[16,8] w) => (float[4,8] y) {
        y = If(c) <
          then_branch = t () => (float[4,8] p) { p = MatMul(x, w) },
          else_branch = e () => (float[4,8] q) { v = MatMul(x, w) q = Neg(v) }
        >
    }"""
    w, x = normal(16, 8), normal(4, 16, seed=1)
    module, _ = rounded(text, {"w": w})
    assert initializer_bytes(module.model) == w.size * 2
    want = narrow_of(x, "bf16") @ narrow_of(w, "bf16")
    for c in (True, False):
        got = evaluate(module, {"c": np.array(c), "x": x})["y"]
        np.testing.assert_allclose(got, want if c else -want, atol=1e-5)


# -- what stays as it is ---------------------------------------------------------------------------------------


def kept(text: str, weights: dict[str, np.ndarray], format: str = "bf16") -> str:
    module, context = rounded(text, weights, format)
    assert "Cast" not in counts(module)
    return said(context, "missed")


PRODUCT = "g (float[4,16] x, float[16,8] w) => (float[4,8] y) { y = MatMul(x, w) }"


@pytest.mark.parametrize(("format", "largest"), [("fp16", 7e4), ("bf16", 3.4e38)])
def test_a_weight_out_of_range(format: str, largest: float) -> None:
    w = normal(16, 8)
    w[3, 4] = largest
    assert "cannot hold" in kept(PRODUCT, {"w": w}, format) or "exceeds" in kept(PRODUCT, {"w": w}, format)


def test_a_weight_that_would_vanish() -> None:
    assert "stays in fp32" in kept(PRODUCT, {"w": normal(16, 8, scale=1e-7)}, "fp16")
    rounded(PRODUCT, {"w": normal(16, 8, scale=1e-7)}, "bf16")


def test_an_activation_near_the_range_of_float16() -> None:
    text = """g (float[4,16] x, float[1] s, float[16,8] w) => (float[4,8] y) { l = Mul(x, s) y = MatMul(l, w) }"""
    data = {"s": np.array([3e4], np.float32), "w": normal(16, 8)}
    assert "on the inputs tried" in kept(text, data, "fp16")
    module, _ = rounded(text, data, "bf16")
    assert counts(module)["Cast"] == 3


def test_given_samples_decide_about_the_range() -> None:
    module = module_from(PRODUCT, opset=20)
    InferShapes().run(module, PassContext())
    large = {"x": normal(2, 4, 16, scale=1e5), "w": normal(2, 16, 8)}
    context = PassContext(inputs=large)
    assert not NarrowFloats(format="fp16").run(module, context)
    assert "on the inputs tried" in said(context, "missed")


def test_angles_and_outer_products() -> None:
    outer = "g (float[4,1] x, float[1,8] w) => (float[4,8] y) { y = MatMul(x, w) }"
    assert "outer product" in kept(outer, {"w": normal(1, 8)})
    angles = """g (float[4,2] x, float[2,8] w) => (float[4,8] y) {
        m = MatMul(x, w)
        t = Mul(m, m)
        y = Sin(t)
    }"""
    assert "sine" in kept(angles, {"w": normal(2, 8)})


def test_doubles_and_old_operator_sets() -> None:
    module, _ = rounded("g (double[4,16] x, double[16,8] w) => (double[4,8] y) { y = MatMul(x, w) }", {})
    assert counts(module) == {"MatMul": 1}
    old = module_from(PRODUCT, opset=12)
    context = PassContext()
    assert not NarrowFloats().run(old, context)
    assert "too old" in said(context, "missed")


# -- through mmopt ---------------------------------------------------------------------------------------------


def network(path: pathlib.Path) -> pathlib.Path:
    """Convolutions with a residual branch, pooling, an LSTM over the rows and a classifier."""
    text = """g (float[2,3,16,16] image) => (float[2,10] logits) {
        a = Conv<pads = [1, 1, 1, 1]>(image, w0, b0)
        b = Relu(a)
        c = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(b)
        d = Conv<pads = [1, 1, 1, 1]>(c, w1, b0)
        e = Add(d, c)
        f = Relu(e)
        g0 = Conv<strides = [2, 2]>(f, w2)
        h = Reshape(g0, to)
        i = Transpose<perm = [2, 0, 1]>(h)
        j, k = LSTM<hidden_size = 32>(i, w3, r3)
        l = Squeeze(k, first)
        n = LayerNormalization(l, s)
        m = Gemm(n, w4, b4)
        logits = Softmax(m)
    }"""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text}')
    shapes = {"w0": (32, 3, 3, 3), "b0": (32,), "w1": (32, 32, 3, 3), "w2": (32, 32, 1, 1), "w3": (1, 128, 32)}
    shapes |= {"r3": (1, 128, 32), "s": (32,), "w4": (32, 10), "b4": (10,)}
    weights = {n: normal(*s, seed=k, scale=0.2) for k, (n, s) in enumerate(shapes.items())}
    arrays = weights | {"to": np.array([2, 32, 16]), "first": np.array([0])}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("format", ["bf16", "fp16"])
def test_a_whole_model(format: str, tmp_path: pathlib.Path) -> None:
    path = network(tmp_path / "net.onnx")
    module = mmopt.load(path)
    result = mmopt.optimize(module, precision=format)
    (record,) = (r for r in result.report.passes if r.name == "narrow-floats")
    assert (record.status, record.fidelity) == ("applied", "lossy")
    remarks = [r.message for r in result.module.remarks if r.source == "narrow-floats"]
    assert any("Conv ×3" in r and "LSTM ×1" in r and "Gemm ×1" in r for r in remarks)
    assert any("in fp32" in r and "LayerNormalization" in r and "Softmax" in r for r in remarks)

    built = mmopt.compile(result.module, reference=module, output=tmp_path / "net.mmopt")
    found = built.checks["main"]
    assert built.native
    assert found.precision == {"bf16": "bfloat16", "fp16": "float16"}[format]
    assert found.to_dict()["precision"] == found.precision
    image = normal(2, 3, 16, 16, seed=50)
    with mmopt.load_artifact(tmp_path / "net.mmopt") as session:
        got = session.run({"image": image})["logits"]
    narrow = onnxruntime.InferenceSession(str(tmp_path / "net.mmopt" / "optimized.onnx"))
    (same,) = narrow.run(None, {"image": image})
    # Values that lie between two narrow numbers may go either way; nothing else differs.
    np.testing.assert_allclose(got, same, atol={"bf16": 4e-3, "fp16": 5e-4}[format])
    (wide,) = onnxruntime.InferenceSession(str(path)).run(None, {"image": image})
    assert np.abs(got - wide).max() < found.outputs["logits"].tolerance
    assert np.abs(got - wide).max() > 1e-6, "nothing was rounded"

    weights = initializer_bytes(module.model)
    assert initializer_bytes(result.module.model) < 0.52 * weights
    stored = (tmp_path / "net.mmopt" / "weights.safetensors").stat().st_size
    assert stored < 0.75 * weights, "weights of a few channels are padded; the others halve"


@pytest.mark.parametrize("format", ["bf16", "fp16"])
def test_kernels_read_narrow_numbers_without_fusion_groups_too(format: str, tmp_path: pathlib.Path) -> None:
    module = mmopt.optimize(mmopt.load(network(tmp_path / "net.onnx")), level=1, precision=format).module
    program = Programs([module], WIDEST)
    assert {f"conv_{format}", f"matmul_{format}", "recurrence"} <= set(program.templates)
    wide = [name for name, data in program.weights.items() if data.dtype == np.float32 and data.size >= 32 * 32]
    assert wide == []


def test_a_target_without_the_arithmetic_is_told_and_obeyed(tmp_path: pathlib.Path) -> None:
    module = mmopt.load(network(tmp_path / "net.onnx"))
    old = mmopt.optimize(module, precision="bf16", target="x86-64-v3", validate="off").module
    assert any("x86-64-v3 multiplies in fp32" in r.message for r in old.remarks)
    assert initializer_bytes(old.model) < 0.52 * initializer_bytes(module.model)
    new = mmopt.optimize(module, precision="bf16", target="sapphirerapids", validate="off").module
    assert not any("multiplies in fp32" in r.message for r in new.remarks)


def test_a_recipe_may_ask_for_it_and_the_call_goes_before(tmp_path: pathlib.Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('schema_version = 1\nextends = "o0"\nprecision = "fp16"\n')
    module = mmopt.load(network(tmp_path / "net.onnx"))

    def specs(**given: str) -> list[str]:
        report = mmopt.optimize(module, recipe=recipe, validate="off", **given).report
        return [record.spec for record in report.passes if record.name == "narrow-floats"]

    assert specs() == ["narrow-floats{format=fp16}"]
    assert specs(precision="bf16") == ["narrow-floats"]
    assert specs(precision="fp32") == []
    with pytest.raises(UserError, match="no pass here brings the precision 'int2'"):
        specs(precision="int2")


def test_a_recipe_that_has_the_pass_runs_it_once(tmp_path: pathlib.Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('schema_version = 1\nprecision = "fp16"\n[[phase]]\npasses = ["narrow-floats{format=fp16}"]\n')
    report = mmopt.optimize(mmopt.load(network(tmp_path / "net.onnx")), recipe=recipe, validate="off").report
    assert [record.name for record in report.passes] == ["narrow-floats"]


def test_inputs_in_bfloat16_are_taken_as_they_are() -> None:
    """A model that widens its weights itself keeps the narrow ones."""
    w = helper.make_tensor("w", TensorProto.BFLOAT16, [16, 8], normal(16, 8).tobytes()[: 16 * 8 * 2], raw=True)
    nodes = [
        helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "f"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [4, 16]), ("y", [4, 8]))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [w])
    module = Module(ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)))
    InferShapes().run(module, PassContext())
    NarrowFloats().run(module, PassContext())
    assert [str(name) for name in module.graph.initializers] == ["w"]
    assert sum(node.op_type == "Cast" and node.inputs[0].name == "w" for node in module.graph) == 1
    assert [str(value.name) for value in module.graph.inputs] == ["x"]
