"""Presets that also choose how convolutions, recurrences and tables are stored."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx_ir as ir

import mmopt
from mmopt.ir.module import Module
from mmopt.ir.verify import verify
from mmopt.pipeline.base import PassContext
from mmopt.transforms.quantize import CompressWeights, Quantize, QuantizeWeights
from mmopt.transforms.quantize.assignment import SCHEMES, offered
from mmopt.transforms.quantize.compress_weights import stores
from mmopt.transforms.quantize.encoding import encode_weight
from mmopt.transforms.quantize.layers import layers
from tests.canonical import count_ops, evaluate, module_from
from tests.unit.test_rewrite import weights

SHAPES = {**{f"k{n}": (32, 32, 3) for n in range(4)}, "w": (1, 64, 32), "r": (1, 64, 16), "v": (16, 32)}


def tower() -> Module:
    """Four convolutions, of which one needs its bits, a recurrence and a product."""
    declared = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in SHAPES.items())
    steps = "".join(f"c{n} = Conv<pads = [1, 1]>(h{n}, k{n}) h{n + 1} = Relu(c{n}) " for n in range(4))
    text = f"""g (float[1,32,10] h0, {declared}) => (float[1,32] y) <int64[1] zero = {{0}}> {{
      {steps} t = Transpose<perm = [2, 0, 1]>(h4) l, s, e = LSTM<hidden_size = 16>(t, w, r)
      f = Squeeze(s, zero) p = MatMul(f, v) y = Softsign(p) }}"""
    module = weights(module_from(text, opset=21), **SHAPES)
    for number, node in enumerate(module.graph):
        node.name = f"{node.op_type}_{number}"
    random = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        data = random.standard_normal(shape).astype(np.float32) / 8
        if name == "k2":
            data.reshape(-1)[::37] *= 20
        module.graph.initializers[name].const_value = ir.tensor(data, name=name)
    return module


def samples(count: int = 16) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((count, 1, 32, 10)).astype(np.float32)


def chosen(context: PassContext) -> dict[str, str]:
    notes = ((r.node, r.message.split()[-1]) for r in context.remarks if r.kind == "note")
    return {node: scheme for node, scheme in notes if node and scheme in SCHEMES}


class TestMixed:
    def test_all_that_can_be_stored_small_takes_part(self) -> None:
        module, context = tower(), PassContext(inputs={"h0": samples()})
        assert Quantize(preset="mixed", budget=0.2, schemes=("w8", "w4"), storage=True).run(module, context)
        assert [problem for problem in verify(module) if problem.severity == "error"] == []
        assert sorted(chosen(context)) == sorted(
            str(node.name) for node in tower().graph if node.op_type in ("Conv", "LSTM", "MatMul")
        )
        assert set(chosen(context).values()) == {"w4", "w8"}
        assert "QuantizeLinear" not in count_ops(module)
        assert not any(SHAPES.get(str(value.name)) for value in module.graph.initializers.values() if value.uses())

    def test_closer_than_four_bits_everywhere(self) -> None:
        mixed, every = tower(), tower()
        assert Quantize(preset="mixed", budget=0.2, schemes=("w8", "w4"), storage=True).run(
            mixed, PassContext(inputs={"h0": samples()})
        )
        assert QuantizeWeights(bits=4, block=32, kinds=("Conv", "MatMul")).run(every, PassContext())
        assert CompressWeights(bits=4, block=32).run(every, PassContext())
        x = {"h0": samples(17)[16]}
        want = evaluate(tower(), x)["y"]
        errors = [np.abs(evaluate(module, x)["y"] - want).mean() for module in (mixed, every)]
        assert errors[0] < 0.9 * errors[1]

    def test_artifact_keeps_the_integers(self, tmp_path: pathlib.Path) -> None:
        module = tower()
        pass_ = Quantize(preset="mixed", budget=0.2, schemes=("w8", "w4"), storage=True)
        assert pass_.run(module, PassContext(inputs={"h0": samples()}))
        built = mmopt.compile(module, output=tmp_path / "a.mmopt", reference=module, tolerance=1e-4)
        size = (tmp_path / "a.mmopt" / "weights.safetensors").stat().st_size
        assert size < 0.3 * 4 * sum(int(np.prod(shape)) for shape in SHAPES.values())
        x = {"h0": samples()[0]}
        got = mmopt.load_artifact(tmp_path / "a.mmopt").run(x)["y"]
        np.testing.assert_allclose(got, evaluate(module, x)["y"], atol=1e-5)
        assert {part.kind for entry in built.manifest.entries.values() for part in entry.segments} == {"native"}

    def test_without_storage_recurrences_stay_as_they_are(self) -> None:
        module, context = tower(), PassContext(inputs={"h0": samples()})
        assert Quantize(preset="mixed", budget=0.25, schemes=("w8", "w4")).run(module, context)
        assert not any(name.startswith("LSTM") for name in chosen(context))
        assert module.graph.initializers["w"].dtype == ir.DataType.FLOAT


class TestConvolutions:
    def test_integers_throughout_go_before_weights_of_the_same_size(self) -> None:
        convolution, product = (next(layer for layer in layers(tower()) if layer.node.op_type == kind)
                                for kind in ("Conv", "MatMul"))  # fmt: skip
        assert offered(convolution, ["fp32", "w8a8", "w8", "w4"]) == ["fp32", "w8a8", "w4"]
        assert offered(convolution, ["w8", "w4"]) == ["w8", "w4"]
        assert offered(product, ["fp32", "w8a8", "w8", "w4"]) == ["fp32", "w8a8", "w8", "w4"]
        assert offered(stores(tower())[0], ["fp32", "w8a8", "w8", "w4"]) == ["fp32", "w8", "w4"]

    def test_hierarchical_keeps_them_in_integers(self) -> None:
        module, context = tower(), PassContext(inputs={"h0": samples()})
        assert Quantize(preset="hierarchical", storage=True).run(module, context)
        found = chosen(context)
        assert {scheme for name, scheme in found.items() if name.startswith("Conv")} == {"w8a8"}
        assert {scheme for name, scheme in found.items() if name.startswith("LSTM")} <= {"w8", "w4"}

    def test_blocks_go_along_the_depth(self) -> None:
        blocks, channels = tower(), tower()
        assert QuantizeWeights(bits=4, block=16, kinds=("Conv",)).run(blocks, PassContext())
        assert QuantizeWeights(bits=4, kinds=("Conv",)).run(channels, PassContext())
        scales = [v.const_value for v in blocks.graph.initializers.values() if "scale" in str(v.name)]
        assert {tuple(scale.shape.numpy()) for scale in scales if scale is not None} == {(32, 2, 3)}
        x = {"h0": samples()[0]}
        want = evaluate(tower(), x)["y"]
        errors = [np.abs(evaluate(module, x)["y"] - want).mean() for module in (blocks, channels)]
        assert errors[0] < errors[1]

    def test_filters_stay_integers_in_the_artifact(self, tmp_path: pathlib.Path) -> None:
        """Winograd's algorithm would be the fastest here, and keep transformed filters in float."""
        text = """g (float[1,64,28,28] x, float[64,64,3,3] k) => (float[1,64,28,28] y) {
          c = Conv<pads = [1, 1, 1, 1]>(x, k) y = Relu(c) }"""
        module = weights(module_from(text, opset=21), k=(64, 64, 3, 3))
        assert QuantizeWeights(bits=4, block=32, kinds=("Conv",)).run(module, PassContext())
        mmopt.compile(module, output=tmp_path / "a.mmopt", reference=module, tolerance=1e-4)
        assert (tmp_path / "a.mmopt" / "weights.safetensors").stat().st_size < 0.25 * 4 * 64 * 64 * 9


def test_tables_that_something_else_reads_are_no_stores() -> None:
    text = """g (int64[3] i, float[100,32] t, float[100,32] u) => (float[3,32] y, float[3,100] z) {
      y = Gather(t, i) a = Gather(u, i) b = Transpose(u) z = MatMul(a, b) }"""
    module = weights(module_from(text, opset=21), t=(100, 32), u=(100, 32))
    assert [str(store.weights[0].name) for store in stores(module)] == ["t"]


def test_four_bits_use_their_lowest_integer() -> None:
    weight = np.array([[-8.0, 3, 7], [-4, 3, 5]], np.float32)
    encoding = encode_weight(weight, ir.DataType.INT4, 0)
    np.testing.assert_allclose(encoding.scale, [1, 5 / 7], rtol=1e-6)
    np.testing.assert_array_equal(encoding.quantize(weight)[0], weight[0])
    assert encode_weight(weight, ir.DataType.INT8, 0).quantize(weight).min() == -127


def test_extremes_are_clipped_for_the_nearest_integers_alone() -> None:
    heavy = np.random.default_rng(0).standard_t(3, (32, 32, 3)).astype(np.float32)
    product, convolution = (
        next(layer for layer in layers(tower()) if layer.node.op_type == kind) for kind in ("MatMul", "Conv")
    )
    clipped, kept = (QuantizeWeights(bits=4, method=method) for method in ("round", "gptq"))  # type: ignore[arg-type]
    assert (clipped.encoding(heavy[..., 0], product).scale < kept.encoding(heavy[..., 0], product).scale).all()
    whole = encode_weight(heavy[..., 0], ir.DataType.INT4, product.out_axis)
    np.testing.assert_array_equal(kept.encoding(heavy[..., 0], product).scale, whole.scale)
    scales = [pass_.encoding(heavy, convolution).scale for pass_ in (clipped, kept)]
    np.testing.assert_array_equal(*scales)
