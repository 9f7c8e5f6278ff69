"""Quantization passes: what they put into a model, how exact it stays in onnxruntime, and what they refuse."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import mmopt
from mmopt.analysis.calibration import MADE_UP, TensorStatistics, collect, save
from mmopt.cli import main
from mmopt.cli.quantizing import quantization
from mmopt.errors import UserError
from mmopt.evaluation import Evaluation, load_evaluation
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.ir.verify import verify
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.quantize import (
    EqualizeLayers,
    ProtectWeights,
    Quantize,
    QuantizeDynamic,
    QuantizeStatic,
    QuantizeWeights,
    SeparateModalities,
    SmoothActivations,
    SplitRanges,
)
from mmopt.transforms.quantize.adaround import adaround
from mmopt.transforms.quantize.assignment import SCHEMES
from mmopt.transforms.quantize.encoding import encode, encode_weight, squared_error
from mmopt.transforms.quantize.gptq import gptq, output_error
from mmopt.transforms.quantize.layers import layers
from mmopt.transforms.quantize.quantize import by_place, steps_upwards, within
from mmopt.transforms.quantize.recovery import recover
from mmopt.transforms.quantize.scales import magnitudes
from mmopt.transforms.quantize.sensitivity import EVALUATIONS, measure
from mmopt.transforms.quantize.split_ranges import best_threshold
from tests.canonical import count_ops, evaluate, module_from, ops
from tests.unit.test_rewrite import weights

TYPES = [ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.UINT16]


class TestEncoding:
    @pytest.mark.parametrize("dtype", TYPES)
    @pytest.mark.parametrize("symmetric", [False, True])
    @given(values=npst.arrays(np.float32, 20, elements=st.floats(-1000, 1000, width=32)))
    def test_what_lies_in_the_range_is_off_by_half_a_step(
        self, dtype: ir.DataType, symmetric: bool, values: np.ndarray
    ) -> None:
        encoding = encode(values.min(), values.max(), dtype, symmetric=symmetric)
        integers = encoding.quantize(values)
        assert integers.min() >= encoding.bounds[0]
        assert integers.max() <= encoding.bounds[1]
        error = np.abs(encoding.dequantize(integers) - values)
        # The zero point is rounded too, which can cost the ends of an asymmetric range half a step more.
        assert error.max() <= encoding.scale * (0.501 if symmetric else 1.001) + 1e-6
        assert encoding.dequantize(encoding.quantize(np.zeros(1))) == 0

    def test_integers_are_those_of_onnxruntime(self) -> None:
        module = module_from(
            """g (float[64] x) => (float[64] y) <float s = {0.037}, uint8 z = {117}>
            { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"""
        )
        x = np.linspace(-6, 6, 64, dtype=np.float32)
        encoding = encode(np.array(-0.037 * 117), np.array(0.037 * 138), ir.DataType.UINT8, symmetric=False)
        np.testing.assert_allclose(encoding.scale, 0.037, rtol=1e-6)
        expected = evaluate(module, {"x": x})["y"]
        np.testing.assert_allclose(encoding.dequantize(encoding.quantize(x)), expected, atol=1e-6)

    @pytest.mark.parametrize("block", [0, 8, 5])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_channels_and_blocks(self, axis: int, block: int) -> None:
        weight = np.random.default_rng(0).standard_normal((24, 16)).astype(np.float32)
        weight[3] *= 100
        encoding = encode_weight(weight, ir.DataType.INT8, axis, block=block)
        error = np.abs(encoding.dequantize(encoding.quantize(weight)) - weight)
        scale, _ = encoding.spread(weight.shape)
        assert (error <= 0.501 * scale).all()
        count = weight.shape[axis] if not block else -(-weight.shape[axis] // block)
        assert encoding.scale.shape[axis if block else 0] == count


def mlp(seed: int = 0) -> Module:
    text = """a = MatMul(x, w) b = Add(a, c) h = Gelu(b) d = MatMul(h, v) e = LayerNormalization(d, g, f)
              y = Gemm(e, o)"""
    inputs = "float[4,32] x, float[32,64] w, float[64] c, float[64,32] v, float[32] g, float[32] f, float[32,8] o"
    module = module_from(f"g ({inputs}) => (float[4,8] y) {{ {text} }}", opset=21)
    for number, node in enumerate(module.graph):
        node.name = f"{node.op_type}_{number}"
    module = weights(module, w=(32, 64), c=(64,), v=(64, 32), g=(32,), f=(32,), o=(32, 8))
    mixed = np.random.default_rng(seed)
    for name in ("w", "v", "o"):
        value = module.graph.initializers[name]
        shape = value.const_value.shape.numpy()  # type: ignore[union-attr]
        value.const_value = ir.tensor(mixed.standard_normal(shape).astype(np.float32) / 6, name=name)
    return module


def feeds(seed: int = 1, count: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 4, 32)).astype(np.float32)


def error(module: Module, reference: Module) -> float:
    """Root mean square error, of the root mean square of the reference."""
    x = {"x": feeds(7)[0]}
    got, want = evaluate(module, x)["y"], evaluate(reference, x)["y"]
    return float(np.sqrt(((got - want) ** 2).mean() / (want**2).mean()))


def quantized(pass_: Pass, module: Module | None = None, *, samples: bool = True) -> tuple[Module, PassContext]:
    module = mlp() if module is None else module
    context = PassContext(inputs={"x": feeds()} if samples else None)
    assert pass_.run(module, context) is True
    assert [problem for problem in verify(module) if problem.severity == "error"] == []
    return module, context


class TestStatic:
    def test_layers_read_and_hold_integers(self) -> None:
        module, context = quantized(QuantizeStatic())
        counts = count_ops(module)
        assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (2, 4)
        kinds = {v.name: v.dtype for v in module.graph.initializers.values() if v.uses()}
        assert kinds["w_quantized"] == ir.DataType.INT8
        assert "w" not in module.graph.initializers
        assert [remark.node for remark in context.remarks if remark.kind == "missed"] == ["Gemm_5"]
        assert "its result leaves the model" in context.remarks[0].message
        assert "4 given samples" in context.remarks[-1].message
        assert error(module, mlp()) < 0.03

    def test_sixteen_bits_are_closer_than_eight(self) -> None:
        eight, _ = quantized(QuantizeStatic())
        sixteen, _ = quantized(QuantizeStatic(activation_bits=16))
        assert error(sixteen, mlp()) < error(eight, mlp())

    def test_selection_by_name_and_kind(self) -> None:
        module, context = quantized(QuantizeStatic(exclude=("MatMul_0",)))
        assert count_ops(module)["QuantizeLinear"] == 1
        assert any("excluded" in remark.message for remark in context.remarks)
        module, _ = quantized(QuantizeStatic(include=("Gemm*",), logits=True))
        assert count_ops(module)["QuantizeLinear"] == 1
        assert QuantizeStatic(kinds=("Conv",)).run(mlp(), PassContext(inputs={"x": feeds()})) is False

    def test_a_value_that_several_layers_read_is_quantized_once(self) -> None:
        body = "a = MatMul(x, w) b = MatMul(x, v) c = Add(a, b) y = Exp(c)"
        text = f"g (float[4,32] x, float[32,16] w, float[32,16] v) => (float[4,16] y) {{ {body} }}"
        module = weights(module_from(text), w=(32, 16), v=(32, 16))
        module, _ = quantized(QuantizeStatic(), module)
        assert ops(module).count("QuantizeLinear") == 1

    def test_residual_sums_of_convolutions_read_integers_too(self) -> None:
        text = """g (float[1,16,6,6] x, float[16,16,3,3] w, float[16,16,3,3] v) => (float[1,16,6,6] y) {
          r = Relu(x) a = Conv<pads = [1, 1, 1, 1]>(r, w) b = Add(a, r) y = Exp(b) }"""
        module = weights(module_from(text), w=(16, 16, 3, 3), v=(16, 16, 3, 3))
        context = PassContext(inputs={"x": np.random.default_rng(0).random((2, 1, 16, 6, 6)).astype(np.float32)})
        assert QuantizeStatic().run(module, context)
        (add,) = (node for node in module.graph if node.op_type == "Add")
        assert add.inputs[1] is not None
        assert add.inputs[1].producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]

    def test_statistics_from_a_file_give_the_same_model(self, tmp_path: pathlib.Path) -> None:
        from mmopt.ir.fingerprint import fingerprint

        save(collect(mlp(), {"x": feeds()}), tmp_path / "a.stats")
        from_file = mlp()
        assert QuantizeStatic(stats=str(tmp_path / "a.stats")).run(from_file, PassContext())
        assert fingerprint(from_file.model) == fingerprint(quantized(QuantizeStatic())[0].model)

    def test_nothing_to_calibrate_on_is_an_error_that_ends_the_run(self) -> None:
        with pytest.raises(UserError, match="nothing to calibrate on"):
            QuantizeStatic().run(mlp(), PassContext())
        with pytest.raises(UserError, match="nothing to calibrate on"):
            mmopt.optimize(mlp(), precision="int8")

    def test_precision_int8(self) -> None:
        result = mmopt.optimize(mlp(), precision="int8", samples={"x": feeds()})
        assert error(result.module, mlp()) < 0.03
        assert [record.status for record in result.report.passes if record.name == "quantize-static"] == ["applied"]

    def test_made_up_samples_are_said_to_be(self) -> None:
        result = mmopt.optimize(mlp(), precision="int8", samples="random")
        messages = [remark.message for remark in result.module.remarks]
        assert any("made up" in message for message in messages)
        assert any("16 random samples" in message for message in messages)


class TestDynamic:
    def test_ranges_are_found_at_run_time(self) -> None:
        module, _ = quantized(QuantizeDynamic(), samples=False)
        assert count_ops(module)["DynamicQuantizeLinear"] == 2
        assert error(module, mlp()) < 0.03


class TestWeights:
    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize(("bits", "block", "bound"), [(8, 0, 0.01), (8, 16, 0.01), (4, 16, 0.12), (4, 0, 0.16)])
    def test_only_weights_change(self, bits: int, block: int, bound: float, symmetric: bool) -> None:
        pass_ = QuantizeWeights(bits=bits, block=block, symmetric=symmetric)  # type: ignore[arg-type]
        module, context = quantized(pass_, samples=False)
        assert count_ops(module)["DequantizeLinear"] == 2
        assert "QuantizeLinear" not in count_ops(module)
        assert error(module, mlp()) < bound
        assert f"2 weights in int{bits}" in context.remarks[-1].message

    def test_blocks_are_closer_than_channels(self) -> None:
        blocks, _ = quantized(QuantizeWeights(bits=4, block=8), samples=False)
        channels, _ = quantized(QuantizeWeights(bits=4), samples=False)
        assert error(blocks, mlp()) < error(channels, mlp())

    def test_clipping_extremes_lessens_the_error(self) -> None:
        layer = next(layers(mlp()))
        weight = np.random.default_rng(0).standard_t(4, (32, 64)).astype(np.float32)
        searched, plain = (QuantizeWeights(bits=4, search=s).encoding(weight, layer) for s in (True, False))
        assert squared_error(weight, searched) < 0.95 * squared_error(weight, plain)

    def test_old_opset_is_left_alone(self) -> None:
        text = "g (float[4,32] x, float[32,16] w) => (float[4,16] y) { a = MatMul(x, w) y = Exp(a) }"
        module = weights(module_from(text, opset=18), w=(32, 16))
        context = PassContext()
        assert QuantizeWeights(bits=4).run(module, context) is False
        assert "too old" in context.remarks[0].message


class TestArtifact:
    """Whole runs: quantized, compiled and compared with onnxruntime on the quantized model."""

    @pytest.mark.parametrize(
        "pass_",
        [QuantizeStatic(), QuantizeDynamic(), QuantizeWeights(bits=8), QuantizeWeights(bits=4, block=16)],
        ids=lambda p: p.spec(),
    )
    def test_artifact_computes_what_the_quantized_model_says(self, pass_: Pass, tmp_path: pathlib.Path) -> None:
        result = mmopt.optimize(mlp(), passes=[pass_], samples={"x": feeds()})
        built = mmopt.compile(result.module, output=tmp_path / "a.mmopt", reference=result.module)
        session = mmopt.load_artifact(tmp_path / "a.mmopt")
        x = {"x": feeds(3)[0]}
        want = evaluate(result.module, x)["y"]
        np.testing.assert_allclose(session.run(x)["y"], want, atol=2e-2 * np.abs(want).max())
        segments = [segment for entry in built.manifest.entries.values() for segment in entry.segments]
        assert {segment.kind for segment in segments} == {"native"}

    def test_command(self, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
        ir.save(mlp().model, tmp_path / "m.onnx")
        np.savez(tmp_path / "x.npz", x=feeds(count=8))
        arguments = ["optimize", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "a.mmopt"), "--precision", "int8"]
        assert main.run(arguments) == 2
        assert "nothing to calibrate on" in capsys.readouterr().err
        assert not (tmp_path / "a.mmopt").exists()
        assert main.run([*arguments, "--calib", str(tmp_path / "x.npz")]) == 0
        assert main.run([*arguments[:-2], "--precision", "int8", "--calib", "random"]) == 0
        assert "made up" in capsys.readouterr().err
        assert '"calib": "random"' in (tmp_path / "a.mmopt" / "manifest.json").read_text()


class TestMigration:
    @staticmethod
    def skewed() -> Module:
        """An MLP after a norm with channels of very different ranges."""
        text = """g (float[4,32] x, float[32] g, float[32] b, float[32,24] w, float[32,24] v) => (float[4,24] y) {
          n = LayerNormalization(x, g, b) a = MatMul(n, w) c = MatMul(n, v) d = Mul(a, c) y = Tanh(d) }"""
        module = weights(module_from(text, opset=21), g=(32,), b=(32,), w=(32, 24), v=(32, 24))
        gain = module.graph.initializers["g"]
        data = np.ones(32, np.float32)
        data[:2] = 60
        gain.const_value = ir.tensor(data, name="g")
        random = np.random.default_rng(3)
        for name in ("w", "v"):
            array = random.standard_normal((32, 24)).astype(np.float32) / 20
            array[:2] /= 60
            module.graph.initializers[name].const_value = ir.tensor(array, name=name)
        return module

    def test_smoothing_changes_nothing_but_rounding_and_helps(self) -> None:
        x = {"x": feeds(7)[0]}
        module = self.skewed()
        context = PassContext(inputs={"x": feeds()})
        assert SmoothActivations().run(module, context)
        want = evaluate(self.skewed(), x)["y"]
        np.testing.assert_allclose(evaluate(module, x)["y"], want, atol=1e-5)
        plain = self.skewed()
        assert QuantizeStatic().run(plain, PassContext(inputs={"x": feeds()}))
        assert QuantizeStatic().run(module, PassContext(inputs={"x": feeds()}))
        errors = [np.abs(evaluate(one, x)["y"] - want).mean() for one in (module, plain)]
        assert errors[0] < 0.5 * errors[1]

    def test_scales_follow_the_formula(self) -> None:
        module = self.skewed()
        found = collect(module, {"x": feeds()}).tensors["n"].channels
        assert found is not None
        tops = np.maximum(np.abs(found.low), np.abs(found.high))
        both = [np.abs(module.graph.initializers[n].const_value.numpy()).max(axis=1) for n in "wv"]  # type: ignore[union-attr]
        expected = tops**0.7 / np.maximum(*both) ** 0.3
        assert SmoothActivations(alpha=0.7).run(module, PassContext(inputs={"x": feeds()}))
        gain = module.graph[0].inputs[1].const_value.numpy()  # type: ignore[union-attr]
        np.testing.assert_allclose(gain, self.skewed().graph[0].inputs[1].const_value.numpy() / expected, rtol=1e-5)  # type: ignore[union-attr]

    def test_norm_that_others_read_is_left_alone(self) -> None:
        text = """g (float[4,32] x, float[32] g, float[32] b, float[32,32] w) => (float[4,32] y) {
          n = LayerNormalization(x, g, b) a = MatMul(n, w) y = Add(a, n) }"""
        module = weights(module_from(text, opset=21), g=(32,), b=(32,), w=(32, 32))
        assert SmoothActivations(insert=False).run(module, PassContext(inputs={"x": feeds()})) is False

    @staticmethod
    def shared(scale: float) -> Module:
        """A norm that a layer and a residual sum read, with one channel far larger than the others, and off zero."""
        inputs = "float[4,32] x, float[32] g, float[32] b, float[32,24] w, float[24] c"
        text = f"""g ({inputs}) => (float[4,24] y, float[4,32] z) {{
          n = LayerNormalization(x, g, b) a = MatMul(n, w) d = Add(a, c) y = Tanh(d) z = Add(x, n) }}"""
        module = weights(module_from(text, opset=21), g=(32,), b=(32,), w=(32, 24), c=(24,))
        gain, offset = np.ones(32, np.float32), np.zeros(32, np.float32)
        gain[3], offset[3] = scale / 4, scale
        random = np.random.default_rng(3)
        weight = random.standard_normal((32, 24)).astype(np.float32) / 20
        weight[3] /= scale
        for name, data in (("g", gain), ("b", offset), ("w", weight)):
            module.graph.initializers[name].const_value = ir.tensor(data, name=name)
        return module

    @pytest.mark.parametrize("shift", [False, True])
    def test_operators_are_put_in_where_no_norm_takes_the_scales(self, shift: bool) -> None:
        x = {"x": feeds(7)[0]}
        want = evaluate(self.shared(60), x)
        errors = []
        for smooth in (True, False):
            module, context = self.shared(60), PassContext(inputs={"x": feeds(count=16)})
            if smooth:
                assert SmoothActivations(shift=shift).run(module, context)
                assert count_ops(module)["Mul"] == 1
                got = evaluate(module, x)
                np.testing.assert_allclose(got["y"], want["y"], atol=1e-5)
                np.testing.assert_array_equal(got["z"], want["z"])
                assert SmoothActivations(shift=shift).run(module, context) is False
            assert QuantizeStatic().run(module, context)
            errors.append(np.abs(evaluate(module, x)["y"] - want["y"]).mean())
        assert errors[0] < 0.5 * errors[1]

    def test_nothing_is_put_in_where_channels_are_alike(self) -> None:
        module, context = self.shared(1), PassContext(inputs={"x": feeds(count=16)})
        assert SmoothActivations().run(module, context) is False
        assert "its channels are alike" in context.remarks[0].message

    def test_a_shift_goes_into_norm_and_bias(self) -> None:
        module = self.skewed()
        norm = module.graph[0]
        offset = norm.inputs[2]
        assert offset is not None
        offset.const_value = ir.tensor(np.full(32, 5, np.float32), name="b")
        x = {"x": feeds(7)[0]}
        want = evaluate(module, x)["y"]
        assert SmoothActivations(alpha=1.0, shift=True).run(module, PassContext(inputs={"x": feeds(count=16)}))
        np.testing.assert_allclose(evaluate(module, x)["y"], want, atol=1e-4)
        found = collect(module, {"x": feeds(count=16)}).tensors["n"].channels
        assert found is not None
        assert np.abs(found.mean).max() < 1e-3 * np.abs(found.high).max()

    def test_the_share_found_is_near_the_best(self) -> None:
        x = feeds(count=16)
        found = collect(self.skewed(), {"x": x}).tensors["n"].channels
        assert found is not None
        errors = {}
        want = [evaluate(self.skewed(), {"x": one})["y"] for one in x]
        for alpha in (None, 0.0, 0.3, 0.5, 0.7, 1.0):
            module, context = self.skewed(), PassContext(inputs={"x": x})
            assert SmoothActivations(alpha=alpha).run(module, context)
            assert QuantizeStatic().run(module, context)
            got = [evaluate(module, {"x": one})["y"] for one in x]
            errors[alpha] = np.sqrt(np.mean([(a - b) ** 2 for a, b in zip(got, want, strict=True)]))
        assert errors[None] < 1.2 * min(errors.values())

    def test_wrong_use(self) -> None:
        with pytest.raises(UserError, match="alpha is 2"):
            SmoothActivations(alpha=2).run(self.skewed(), PassContext(inputs={"x": feeds()}))
        with pytest.raises(UserError, match="nothing to calibrate on"):
            SmoothActivations().run(self.skewed(), PassContext())

    def test_layers_in_a_row_are_balanced(self) -> None:
        text = """g (float[2,16,6,6] x, float[16,16,1,1] w, float[16] c, float[16,16,3,3] v) => (float[2,16,2,2] y) {
          a = Conv(x, w, c) r = Relu(a) p = MaxPool<kernel_shape = [3, 3]>(r) y = Conv(p, v) }"""

        def build() -> Module:
            module = weights(module_from(text, opset=21), w=(16, 16, 1, 1), c=(16,), v=(16, 16, 3, 3))
            spread = np.logspace(-2, 2, 16).astype(np.float32)
            weight = module.graph.initializers["w"]
            scaled = weight.const_value.numpy() * spread[:, None, None, None]  # type: ignore[union-attr]
            weight.const_value = ir.tensor(scaled, name="w")
            return module

        module = build()
        x = {"x": np.random.default_rng(0).standard_normal((2, 16, 6, 6)).astype(np.float32)}
        assert EqualizeLayers().run(module, PassContext())
        want = evaluate(build(), x)["y"]
        np.testing.assert_allclose(evaluate(module, x)["y"], want, atol=1e-5 * np.abs(want).max())
        first, second = (next(n for n in module.graph if n.op_type == "Conv" and n.outputs[0].name == o) for o in "ay")
        rows = np.abs(first.inputs[1].const_value.numpy()).max(axis=(1, 2, 3))  # type: ignore[union-attr]
        columns = np.abs(second.inputs[1].const_value.numpy()).max(axis=(0, 2, 3))  # type: ignore[union-attr]
        np.testing.assert_allclose(rows, columns, rtol=1e-3)

    def test_a_layer_between_two_others_belongs_to_two_pairs(self) -> None:
        def build() -> Module:
            body = "a = MatMul(x, w) r = Relu(a) b = MatMul(r, v) s = Relu(b) y = MatMul(s, u)"
            text = f"g (float[4,32] x, float[32,32] w, float[32,32] v, float[32,32] u) => (float[4,32] y) {{ {body} }}"
            module = weights(module_from(text, opset=21), w=(32, 32), v=(32, 32), u=(32, 32))
            random = np.random.default_rng(0)
            for name in "wvu":
                data = random.standard_normal((32, 32)) * np.exp(random.standard_normal(32))
                module.graph.initializers[name].const_value = ir.tensor(data.astype(np.float32), name=name)
            return module

        module, x = build(), {"x": feeds()[0]}
        assert EqualizeLayers(rounds=30).run(module, PassContext())
        want = evaluate(build(), x)["y"]
        np.testing.assert_allclose(evaluate(module, x)["y"], want, atol=1e-4 * np.abs(want).max())
        found = list(layers(module))
        for first, second in itertools.pairwise(found):
            np.testing.assert_allclose(magnitudes(first, out=True), magnitudes(second), rtol=0.02)
        assert sum(value.is_initializer() for value in module.graph.initializers.values()) == 3

    def test_what_a_scale_does_not_pass_is_left_alone(self) -> None:
        body = "a = MatMul(x, w) r = Tanh(a) y = MatMul(r, v)"
        text = f"g (float[4,32] x, float[32,32] w, float[32,32] v) => (float[4,32] y) {{ {body} }}"
        module = weights(module_from(text, opset=21), w=(32, 32), v=(32, 32))
        assert EqualizeLayers().run(module, PassContext()) is False


def correlated(count: int = 64) -> np.ndarray:
    """Samples whose channels go together, as those of real networks do."""
    random = np.random.default_rng(5)
    return (random.standard_normal((count, 4, 6)) @ random.standard_normal((6, 32))).astype(np.float32) + (
        0.1 * random.standard_normal((count, 4, 32))
    ).astype(np.float32)


class TestGptq:
    @pytest.mark.parametrize("block", [0, 8])
    def test_outputs_are_closer_than_with_the_nearest_integers(self, block: int) -> None:
        random = np.random.default_rng(0)
        weight = random.standard_normal((32, 12)).astype(np.float32)
        x = correlated().reshape(-1, 32)
        gram = x.T.astype(np.float64) @ x
        encoding = encode_weight(weight, ir.DataType.INT4, 0 if block else 1, block=block)
        chosen = encoding.dequantize(gptq(weight, gram, encoding))
        nearest = encoding.dequantize(encoding.quantize(weight))
        error, plain = (float(((x @ weight - x @ q) ** 2).sum()) for q in (chosen, nearest))
        assert error < 0.3 * plain
        assert output_error(weight, chosen, gram) == pytest.approx(error, rel=1e-3)

    def test_independent_inputs_get_the_nearest_integers(self) -> None:
        weight = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
        encoding = encode_weight(weight, ir.DataType.INT4, 1)
        np.testing.assert_array_equal(gptq(weight, np.eye(16), encoding), encoding.quantize(weight))

    def test_integers_of_a_transposed_weight(self) -> None:
        weight = np.random.default_rng(0).standard_normal((32, 12)).astype(np.float32)
        gram = np.cov(correlated().reshape(-1, 32).T)
        for block in (0, 8):
            there = encode_weight(weight, ir.DataType.INT4, 0 if block else 1, block=block)
            back = encode_weight(weight.T, ir.DataType.INT4, 1 if block else 0, block=block).transposed()
            np.testing.assert_array_equal(gptq(weight, gram, there), gptq(weight, gram, back))

    @pytest.mark.parametrize("method", ["gptq", "adaround"])
    def test_pass_is_closer_than_rounding(self, method: str) -> None:
        context = PassContext(inputs={"x": correlated()})
        module, plain = mlp(), mlp()
        assert QuantizeWeights(bits=4, method=method).run(module, context)  # type: ignore[arg-type]
        assert QuantizeWeights(bits=4).run(plain, PassContext())
        x = {"x": correlated(1)[0]}
        want = evaluate(mlp(), x)["y"]
        errors = [np.abs(evaluate(one, x)["y"] - want).mean() for one in (module, plain)]
        assert errors[0] < 0.9 * errors[1]

    @pytest.mark.parametrize("rounding", ["gptq", "adaround"])
    def test_static_quantization_is_closer_than_with_the_nearest(self, rounding: str) -> None:
        x = correlated()
        want = [evaluate(mlp(), {"x": one})["y"] for one in x[:8]]
        errors = []
        for pass_ in (QuantizeStatic(activation_bits=16, rounding=rounding), QuantizeStatic(activation_bits=16)):  # type: ignore[arg-type]
            module = mlp()
            assert pass_.run(module, PassContext(inputs={"x": x}))
            got = [evaluate(module, {"x": one})["y"] for one in x[:8]]
            errors.append(np.mean([np.abs(a - b).mean() for a, b in zip(got, want, strict=True)]))
        assert errors[0] < 0.9 * errors[1]

    def test_needs_samples(self) -> None:
        with pytest.raises(UserError, match="nothing to calibrate on"):
            QuantizeWeights(bits=4, method="gptq").run(mlp(), PassContext())


class TestAdaround:
    @pytest.mark.parametrize("block", [0, 8])
    @pytest.mark.parametrize("dtype", [ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8])
    def test_no_integer_can_be_changed_alone_for_the_better(self, dtype: ir.DataType, block: int) -> None:
        random = np.random.default_rng(0)
        weight = random.standard_normal((32, 6)).astype(np.float32)
        x = correlated().reshape(-1, 32)
        gram = x.T.astype(np.float64) @ x
        symmetric = dtype != ir.DataType.UINT4
        encoding = encode_weight(weight, dtype, 0 if block else 1, block=block, symmetric=symmetric)
        chosen = adaround(weight, gram, encoding)
        best = output_error(weight, encoding.dequantize(chosen), gram)
        assert best <= output_error(weight, encoding.dequantize(gptq(weight, gram, encoding)), gram)
        assert best < 0.3 * output_error(weight, encoding.dequantize(encoding.quantize(weight)), gram)
        low, high = encoding.bounds
        for place in random.integers(0, chosen.size, 60):
            for step in (-1, 1):
                other = chosen.copy()
                other.flat[place] = np.clip(other.flat[place] + step, low, high)
                assert output_error(weight, encoding.dequantize(other), gram) >= 0.999 * best

    def test_channels_that_are_always_zero_keep_the_nearest(self) -> None:
        weight = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
        gram = np.eye(16)
        gram[4:] = 0
        encoding = encode_weight(weight, ir.DataType.INT4, 1)
        np.testing.assert_array_equal(adaround(weight, gram, encoding), encoding.quantize(weight))


def test_protecting_weights_lessens_the_error_of_four_bits() -> None:
    x = {"x": feeds(7)[0]}
    want = evaluate(TestMigration.skewed(), x)["y"]
    module, plain = TestMigration.skewed(), TestMigration.skewed()
    context = PassContext(inputs={"x": feeds(count=16)})
    assert ProtectWeights(bits=4, block=0).run(module, context)
    np.testing.assert_allclose(evaluate(module, x)["y"], want, atol=1e-5)
    for one in (module, plain):
        assert QuantizeWeights(bits=4).run(one, PassContext())
    errors = [np.abs(evaluate(one, x)["y"] - want).mean() for one in (module, plain)]
    assert errors[0] < 0.7 * errors[1]


class TestBiasCorrection:
    @pytest.mark.parametrize(
        ("body", "inputs", "shape"),
        [
            ("a = MatMul(x, w) y = Exp(a)", "float[64,32] x, float[32,8] w", (32, 8)),
            ("a = Gemm<alpha = 2.0, transB = 1>(x, w) y = Exp(a)", "float[64,32] x, float[8,32] w", (8, 32)),
            (
                "a = Gemm<beta = 0.5>(x, w, c) y = Exp(a)",
                "float[64,32] x, float[32,8] w, float[8] c",
                (32, 8),
            ),
            ("a = Conv<group = 2>(x, w) y = Exp(a)", "float[4,32,6,6] x, float[8,16,3,3] w", (8, 16, 3, 3)),
        ],
    )
    def test_mean_of_the_outputs_stays(self, body: str, inputs: str, shape: tuple[int, ...]) -> None:
        output = "float[4,8,4,4] y" if len(shape) == 4 else "float[64,8] y"

        def build() -> Module:
            module = module_from(f"g ({inputs}) => ({output}) {{ {body} }}", opset=21)
            given = {"w": shape, **({"c": (8,)} if "c)" in body else {})}
            module = weights(module, **given)
            data = np.random.default_rng(2).standard_normal(shape).astype(np.float32) / 40
            data.reshape(-1)[0] = 1.0  # an outlier makes the steps coarse
            module.graph.initializers["w"].const_value = ir.tensor(data, name="w")
            return module

        size = [int(d) for d in build().graph.inputs[0].shape.numpy()]  # type: ignore[union-attr]
        x = (np.random.default_rng(0).random((4, *size)) + 1).astype(np.float32)
        want = np.log(evaluate(build(), {"x": x[0]})["y"])
        axes = tuple(n for n in range(want.ndim) if n != 1)
        shifts = []
        for correct in (True, False):
            module = build()
            assert QuantizeStatic(correct_bias=correct).run(module, PassContext(inputs={"x": x}))
            assert [problem for problem in verify(module) if problem.severity == "error"] == []
            got = np.log(evaluate(module, {"x": x[0]})["y"])
            shifts.append(np.abs((got - want).mean(axis=axes)).mean())
        assert shifts[0] < 0.5 * shifts[1]


class TestPresets:
    def test_full_is_static_everywhere(self) -> None:
        module, context = quantized(Quantize())
        assert count_ops(module)["QuantizeLinear"] == 2
        assert any(remark.message.startswith("full: w8a8 ×2") for remark in context.remarks)
        assert error(module, mlp()) < 0.03

    @staticmethod
    def deep(count: int = 12) -> Module:
        """A stack of layers in a tower of its own; some of them matter much more than others."""
        names = ", ".join(f"float[32,32] w{n}" for n in range(count))
        steps = "".join(f"a{n} = MatMul(h{n}, w{n}) h{n + 1} = Tanh(a{n}) " for n in range(count))
        text = f"g (float[4,32] h0, {names}) => (float[4,32] y) {{ {steps} y = Softsign(h{count}) }}"
        module = weights(module_from(text, opset=21), **{f"w{n}": (32, 32) for n in range(count)})
        for number, node in enumerate(module.graph):
            node.name = f"{node.op_type}_{number}"
        random = np.random.default_rng(4)
        for n in range(count):
            data = random.standard_normal((32, 32)).astype(np.float32) / 5
            if n % 3 == 0:
                data[0, 0] = 6.0
            module.graph.initializers[f"w{n}"].const_value = ir.tensor(data, name=f"w{n}")
        return module

    @staticmethod
    def context() -> PassContext:
        return PassContext(inputs={"h0": feeds(count=40)})

    def size(self, module: Module) -> float:
        tensors = [v.const_value for v in module.graph.initializers.values() if v.uses() and str(v.name)[0] == "w"]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None) / (12 * 32 * 32 * 4)

    def test_hierarchical_keeps_the_ends(self) -> None:
        module, context = self.deep(), self.context()
        assert Quantize(preset="hierarchical").run(module, context)
        found = {remark.node: remark.message for remark in context.remarks if remark.kind == "note"}
        order = [message.split()[-1] for message in found.values()]
        assert order == ["w8a8"] * 2 + ["w4"] * 8 + ["w8a8"] * 2

    @pytest.mark.parametrize("budget", [0.16, 0.19, 0.23, 0.4])
    def test_mixed_meets_its_budget_and_beats_uniform(self, budget: float) -> None:
        module, context = self.deep(), self.context()
        assert Quantize(preset="mixed", budget=budget).run(module, context)
        assert self.size(module) < budget * 1.15  # offsets and zero points come on top of the weights

    def test_mixed_is_closer_than_hierarchical_at_its_size(self) -> None:
        x = {"h0": feeds(9)[0]}
        want = evaluate(self.deep(), x)["y"]
        places = by_place(self.deep(), list(layers(self.deep())), "w4")
        share = sum(SCHEMES[name].bits for name in places.values()) / (32 * len(places))
        errors = []
        for pass_ in (Quantize(preset="mixed", budget=share), Quantize(preset="hierarchical")):
            module = self.deep()
            assert pass_.run(module, self.context())
            errors.append(float(((evaluate(module, x)["y"] - want) ** 2).mean()))
        assert errors[0] < errors[1]

    def test_layers_that_no_scheme_fits_stay_in_float(self) -> None:
        text = """g (float[1,16,4,4] x, float[16,16,1,1] k, float[4,32] w, float[32,32] v) => (float[1,16,4,32] y) {
          a = Conv(x, k) b = MatMul(a, w) h = Tanh(b) c = MatMul(h, v) y = Softsign(c) }"""
        module = weights(module_from(text, opset=21), k=(16, 16, 1, 1), w=(4, 32), v=(32, 32))
        for number, node in enumerate(module.graph):
            node.name = f"{node.op_type}_{number}"
        x = np.random.default_rng(0).standard_normal((4, 1, 16, 4, 4)).astype(np.float32)
        context = PassContext(inputs={"x": x})
        assert Quantize(preset="mixed", budget=0.25, schemes=("w8a16",)).run(module, context)
        missed = {remark.node: remark.message for remark in context.remarks if remark.kind == "missed"}
        assert "none of the schemes given fits it" in missed["Conv_0"]
        assert module.graph.initializers["k"].dtype == ir.DataType.FLOAT
        assert count_ops(module)["DequantizeLinear"] == 2

    def test_full_balances_channels_first(self) -> None:
        module, plain = TestMigration.skewed(), TestMigration.skewed()
        x, samples = {"x": feeds(7)[0]}, {"x": feeds()}
        want = evaluate(TestMigration.skewed(), x)["y"]
        assert Quantize().run(module, PassContext(inputs=samples))
        assert QuantizeStatic().run(plain, PassContext(inputs=samples))
        errors = [np.abs(evaluate(one, x)["y"] - want).mean() for one in (module, plain)]
        assert errors[0] < 0.5 * errors[1]

    def test_impossible_budget(self) -> None:
        with pytest.raises(UserError, match=r"need at least 0\.156"):
            Quantize(preset="mixed", budget=0.1).run(self.deep(), self.context())

    def test_table_goes_before_the_preset(self) -> None:
        module, context = self.deep(), self.context()
        assert Quantize(table=("MatMul_0=fp32", "MatMul_[24]=w4")).run(module, context)
        found = {r.node: r.message.split()[-1] for r in context.remarks if r.kind == "note"}
        assert (found["MatMul_0"], found["MatMul_2"], found["MatMul_4"], found["MatMul_6"]) == (
            "fp32", "w4", "w4", "w8a8",
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"table": ("MatMul_0",)}, "gives no scheme"),
            ({"table": ("Conv*=w8a8",)}, "no layer that w8a8 fits"),
            ({"preset": "mixed", "schemes": ("w3",)}, "there is no scheme 'w3'"),
        ],
    )
    def test_wrong_options(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(UserError, match=message):
            Quantize(**options).run(self.deep(), self.context())  # type: ignore[arg-type]

    def test_sensitivity_costs_what_it_says_and_is_the_error_of_each_layer_alone(self) -> None:
        module = self.deep()
        data = {"h0": feeds(count=40)}
        runs: list[int] = []
        found = measure(
            module, list(layers(module)), ["w4"], data, None, progress=lambda done, total: runs.append(total)
        )
        assert found.samples == 2  # 3 % of 40, rounded up
        assert found.runs == pytest.approx(13 * 2 / 40)
        both = measure(module, list(layers(module)), ["w4", "w8"], {"h0": feeds(count=400)}, None)
        assert both.samples == 6  # 3 % of 400, for two schemes together
        assert both.runs * 100 / 12 < 1.1 * EVALUATIONS
        assert len(runs) == 12
        changed = self.deep()
        QuantizeWeights(bits=4, block=32, include=("MatMul_6",)).run(changed, PassContext())
        expected = []
        for place in (0, 20):
            want, got = (evaluate(one, {"h0": data["h0"][place]})["y"] for one in (module, changed))
            expected.append(np.sqrt(((got - want) ** 2).mean() / (want**2).mean()))
        assert found.of("MatMul_6", "w4") == pytest.approx(np.mean(expected), rel=1e-4)
        ranked = [size for _, size in found.ranked("w4")]
        assert ranked == sorted(ranked, reverse=True)

    def evaluation(self, *limits: str) -> tuple[Evaluation, list[float]]:
        """Judges by how far a third of the outputs is off; and the shares of its data that it was asked for."""
        told: list[float] = []
        inputs = [{"h0": one} for one in feeds(3, count=8)]
        wanted = [evaluate(self.deep(), one)["y"][:, :8] for one in inputs]

        def closeness(run: Any, share: float = 1.0) -> dict[str, float]:
            told.append(share)
            count = max(1, round(share * len(inputs)))
            gaps = [np.abs(run(x)["y"][:, :8] - y).mean() for x, y in zip(inputs[:count], wanted, strict=False)]
            return {"closeness": 1 - float(np.mean(gaps))}

        return load_evaluation(closeness, limits).against(self.deep()), told

    def test_sensitivity_by_the_task_comes_on_top(self) -> None:
        module, data = self.deep(), {"h0": feeds(count=40)}
        evaluation, told = self.evaluation("closeness=-0.01")
        told.clear()
        found = list(layers(module))[:4]
        plain = measure(module, found, ["w4"], data, None)
        judged = measure(module, found, ["w4"], data, None, evaluation=evaluation)
        assert set(told) == {0.03}
        assert len(told) == 5
        assert judged.evaluations == pytest.approx(0.15)
        assert plain.evaluations == 0
        changed = self.deep()
        QuantizeWeights(bits=4, block=32, include=("MatMul_2",)).run(changed, PassContext())
        with ReferenceRunner() as runner:
            metrics = evaluation.measure(runner.prepare(changed), share=0.03)
        expected = plain.of("MatMul_2", "w4") + (1 - metrics["closeness"]) / 0.01
        assert judged.of("MatMul_2", "w4") == pytest.approx(expected, rel=1e-4)

    def test_mixed_is_as_small_as_metrics_allow(self) -> None:
        sizes = []
        for limit in ("0.05", "0.01", "0.002"):
            evaluation, _ = self.evaluation(f"closeness=-{limit}")
            module, context = self.deep(), self.context()
            context.evaluation = evaluation
            assert Quantize(preset="mixed", by_metrics=True).run(module, context)
            assert evaluation.judge_module(module).missed == []
            assert any("chosen by the metrics of" in remark.message for remark in context.remarks)
            sizes.append(self.size(module))
        assert sizes[0] < sizes[1] < sizes[2] < 1

    def test_metrics_need_limits(self) -> None:
        with pytest.raises(UserError, match="no limits of metrics"):
            Quantize(preset="mixed", by_metrics=True).run(self.deep(), self.context())

    def test_steps_upwards_are_those_of_budgets(self) -> None:
        module, data = self.deep(), {"h0": feeds(count=40)}
        found = list(layers(module))
        schemes = ("w4", "w8", "fp32")
        sensitivity = measure(module, found, schemes, data, None)
        steps = list(steps_upwards(found, schemes, sensitivity))
        assert set(steps[0].values()) == {"w4"}
        assert set(steps[-1].values()) == {"fp32"}
        for number in (0, 5, 14, len(steps) - 1):
            share = sum(SCHEMES[name].bits for name in steps[number].values()) / (32 * len(found))
            assert within(found, schemes, sensitivity, share + 1e-9) == steps[number]

    def test_command(self, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert quantization("mixed=5bits") == ["quantize{preset=mixed,budget=0.15625}"]
        assert quantization("mixed=metrics") == ["quantize{preset=mixed,by_metrics=true}"]
        assert quantization(None, "int8", recover=True) == ["quantize-static{rounding=adaround,balance=true}"]
        assert quantization("full", recover=True) == ["quantize{preset=full,rounding=adaround,recover=true}"]
        with pytest.raises(UserError, match="nothing is quantized"):
            quantization(None, "bf16", recover=True)
        ir.save(mlp().model, tmp_path / "m.onnx")
        np.savez(tmp_path / "x.npz", x=feeds(count=8))
        arguments = ["optimize", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "a.onnx"), "--emit", "onnx"]
        calib = ["--calib", str(tmp_path / "x.npz")]
        for wrong in ("fulll", "mixed=2", "full=0.5", "mixed=x", "full=4bits", "mixed=33bits", "mixed=metrics"):
            assert main.run([*arguments, *calib, "--quant", wrong]) == 2
            assert ("--eval" if wrong == "mixed=metrics" else "--quant") in capsys.readouterr().err
        assert main.run([*arguments, *calib, "--quant", "mixed=0.2"]) == 0
        assert "mixed: w" in capsys.readouterr().err
        kinds = {value.dtype for value in ir.load(tmp_path / "a.onnx").graph.initializers.values()}
        assert ir.DataType.INT4 in kinds


class TestHonesty:
    """Through the command line: what data cannot be used, and what is said of data that means nothing."""

    TOWERS = """g (float[1,16] picture, float[1,16] sound) => (float[1,16] y) {
      p = MatMul(picture, a) q = Relu(p) s = MatMul(sound, b) t = Relu(s) u = Add(q, t)
      v = MatMul(u, w) y = Tanh(v) }"""

    @pytest.fixture
    def folder(self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
        inputs = "(float[1,16] picture, float[1,16] sound, float[16,16] a, float[16,16] b, float[16,16] w)"
        text = self.TOWERS.replace("(float[1,16] picture, float[1,16] sound)", inputs)
        module = weights(module_from(text, opset=21), a=(16, 16), b=(16, 16), w=(16, 16))
        random = np.random.default_rng(0)
        for name in "abw":
            data = random.standard_normal((16, 16)).astype(np.float32) / 4
            module.graph.initializers[name].const_value = ir.tensor(data, name=name)
        ir.save(module.model, tmp_path / "m.onnx")
        monkeypatch.chdir(tmp_path)
        return tmp_path

    @staticmethod
    def samples() -> dict[str, np.ndarray]:
        random = np.random.default_rng(0)
        return {name: random.standard_normal((6, 1, 16)).astype(np.float32) for name in ("picture", "sound")}

    @staticmethod
    def run(*arguments: str, output: str = "a.onnx") -> int:
        return main.run(["optimize", "m.onnx", "-o", output, *arguments])

    @pytest.mark.parametrize(
        ("wanted", "change", "message"),
        [
            (["--precision", "int8"], ("sound", (4, 0, 3), np.nan), "sample 4 of input 'sound' has NaN"),
            (["--quant", "mixed"], ("picture", (2, 0, 0), np.inf), "sample 2 of input 'picture' has NaN or infinity"),
            (["--pass", "smooth-activations"], ("sound", slice(None), 0), "tower: 'sound' never varies"),
        ],
    )
    def test_data_that_cannot_be_used(
        self,
        folder: pathlib.Path,
        wanted: list[str],
        change: tuple[str, object, float],
        message: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        data = self.samples()
        data[change[0]][change[1]] = change[2]  # type: ignore[index]
        np.savez(folder / "x.npz", **data)  # type: ignore[arg-type]
        assert self.run(*wanted, "--calib", "x.npz") == 2
        assert message in capsys.readouterr().err
        assert main.run(["calibrate", "m.onnx", "--calib", "x.npz", "-o", "x.stats"]) == 2
        assert message in capsys.readouterr().err
        assert sorted(path.name for path in folder.iterdir()) == ["m.onnx", "x.npz"]

    @pytest.mark.parametrize("way", ["samples", "statistics"])
    def test_made_up_samples_mark_console_report_and_manifest(
        self, folder: pathlib.Path, way: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["--precision", "int8", "--calib", "random"]
        if way == "statistics":
            assert main.run(["calibrate", "m.onnx", "--calib", "random", "-o", "r.stats", "-q"]) == 0
            arguments = ["--pass", "quantize-static{stats=r.stats}"]
        assert self.run(*arguments, output="a.mmopt") == 0
        assert "the calibration samples were made up" in capsys.readouterr().err
        assert "the calibration samples were made up" in (folder / "a.mmopt" / "report.json").read_text()
        notes = json.loads((folder / "a.mmopt" / "manifest.json").read_text())["notes"]
        assert [note for note in notes if "made up" in note] == [MADE_UP]

    def test_given_samples_are_not_marked(self, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
        np.savez(folder / "x.npz", **self.samples())  # type: ignore[arg-type]
        assert self.run("--precision", "int8", "--calib", "x.npz") == 0
        assert "made up" not in capsys.readouterr().err


class TestMerging:
    """Statistics collected apart give the model that those of all data give."""

    FRAMES, BANDS = 32, 20

    @classmethod
    def spoken(cls) -> list[np.ndarray]:
        """Frames of recordings, ``[count, 1, BANDS, FRAMES]`` for each of six speakers."""
        path = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data" / "spoken_digits.npz"
        if not path.exists():
            pytest.skip("recordings of spoken digits are not here")
        data = dict(np.load(path))
        bounds, size = data["offsets"], cls.FRAMES * cls.BANDS
        parts = []
        for speaker in range(6):
            places = np.flatnonzero(data["speaker"] == speaker)[:8]
            waves = [data["audio"][bounds[n] : bounds[n] + size] for n in places]
            rows = [np.pad(wave, (0, size - len(wave))).reshape(cls.FRAMES, cls.BANDS).T for wave in waves]
            parts.append(np.stack(rows)[:, None].astype(np.float32) / 32768)
        return parts

    @classmethod
    def synthetic(cls) -> list[np.ndarray]:
        """The same from random numbers; every speaker is louder than the one before."""
        random = np.random.default_rng(0)
        shape = (5, 1, cls.BANDS, cls.FRAMES)
        return [((1.7**n) * random.standard_normal(shape)).astype(np.float32) for n in range(6)]

    @classmethod
    def network(cls, path: pathlib.Path) -> None:
        inputs = f"float[1,{cls.BANDS},{cls.FRAMES}] x, float[24,{cls.BANDS},5] w, float[24] b, float[24,16] v"
        text = f"""g ({inputs}) => (float[1,{cls.FRAMES - 4},16] y) {{
          c = Conv(x, w, b) r = Relu(c) t = Transpose<perm = [0, 2, 1]>(r) m = MatMul(t, v) y = Softsign(m) }}"""
        module = weights(module_from(text, opset=21), w=(24, cls.BANDS, 5), b=(24,), v=(24, 16))
        random = np.random.default_rng(1)
        for name in ("w", "v"):
            shape = module.graph.initializers[name].const_value.shape.numpy()  # type: ignore[union-attr]
            data = random.standard_normal(shape).astype(np.float32) / 5
            module.graph.initializers[name].const_value = ir.tensor(data, name=name)
        ir.save(module.model, path)

    @pytest.mark.parametrize("source", ["synthetic", "spoken"])
    def test_models_from_merged_and_pooled_statistics_agree(
        self, source: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parts = getattr(self, source)()
        monkeypatch.chdir(tmp_path)
        self.network(tmp_path / "m.onnx")
        merge = []
        for number, part in enumerate([*parts, np.concatenate(parts)]):
            np.savez("x.npz", x=part)
            name = f"{number}.stats" if number < len(parts) else "pooled.stats"
            assert main.run(["calibrate", "m.onnx", "--calib", "x.npz", "-o", name, "-q"]) == 0
            merge += ["--merge", name] if number < len(parts) else []
        assert main.run(["calibrate", *merge, "-o", "merged.stats", "-q"]) == 0
        for method in ("minmax", "percentile", "mse", "entropy"):
            models = []
            for name in ("merged", "pooled"):
                module = mmopt.load("m.onnx")
                pass_ = QuantizeStatic(stats=f"{name}.stats", method=method, logits=True)  # type: ignore[arg-type]
                assert pass_.run(module, PassContext())
                models.append(module)
            tensors = [{name: v.const_value.numpy() for name, v in m.graph.initializers.items()} for m in models]  # type: ignore[union-attr]
            assert set(tensors[0]) == set(tensors[1])
            for name, array in tensors[0].items():
                if array.dtype == np.float32 and "scale" not in name:  # biases, by means summed in another order
                    np.testing.assert_allclose(array, tensors[1][name], rtol=1e-6, atol=1e-7)
                else:
                    np.testing.assert_array_equal(array, tensors[1][name])


class TestRecovery:
    @staticmethod
    def samples(count: int = 64) -> np.ndarray:
        return correlated(count)

    @pytest.mark.parametrize(
        "pass_", [QuantizeWeights(bits=4, recover=True), QuantizeWeights(bits=4, block=8, recover=True)]
    )
    def test_outputs_are_closer(self, pass_: QuantizeWeights) -> None:
        x, unseen = self.samples(), self.samples(80)[64:]
        recovered, context = mlp(), PassContext(inputs={"x": x})
        assert pass_.run(recovered, context)
        assert [problem for problem in verify(recovered) if problem.severity == "error"] == []
        assert any("2 of 2 layers give more nearly" in remark.message for remark in context.remarks)
        rounded = mlp()
        assert dataclasses.replace(pass_, recover=False, method="adaround").run(rounded, PassContext(inputs={"x": x}))
        errors = []
        for module in (recovered, rounded):
            pairs = [(evaluate(module, {"x": one})["y"], evaluate(mlp(), {"x": one})["y"]) for one in unseen]
            errors.append(np.sqrt(np.mean([(a - b) ** 2 for a, b in pairs])))
        assert errors[0] < 0.95 * errors[1]

    def test_what_is_learned_makes_up_for_layers_before(self) -> None:
        """With the second layer alone in 4 bits and the first one off by a constant, the bias takes it back."""
        module, reference = mlp(), mlp()
        bias = module.graph.initializers["c"]
        bias.const_value = ir.tensor(bias.const_value.numpy() + np.float32(0.2), name="c")  # type: ignore[union-attr]
        QuantizeWeights(bits=8, include=("MatMul_3",)).run(module, PassContext())
        (found,) = recover(module, reference, {"x": self.samples()})
        assert found.kept
        assert found.after < 0.2 * found.before

    def test_a_layer_that_gets_no_better_is_left_as_it_is(self) -> None:
        module = mlp()
        QuantizeWeights(bits=8).run(module, PassContext())
        tensors = {name: v.const_value for name, v in module.graph.initializers.items()}
        # It is measured against itself: nothing is lost that could be found again.
        found = recover(module, module.clone(), {"x": self.samples(8)})
        assert [one.kept for one in found] == [False, False]
        assert all(module.graph.initializers[name].const_value is tensor for name, tensor in tensors.items())

    def test_layers_that_read_integers_are_left_alone(self) -> None:
        module = mlp()
        QuantizeStatic().run(module, PassContext(inputs={"x": feeds()}))
        assert recover(module, mlp(), {"x": feeds()}) == []

    def test_needs_samples(self, tmp_path: pathlib.Path) -> None:
        with pytest.raises(UserError, match="recovering needs samples"):
            QuantizeWeights(bits=4, recover=True).run(mlp(), PassContext())

    def test_preset(self) -> None:
        module, context = TestPresets.deep(), TestPresets.context()
        assert Quantize(preset="hierarchical", highest="w8", recover=True).run(module, context)
        assert any("of 12 layers give more nearly" in remark.message for remark in context.remarks)


class TestModalities:
    @staticmethod
    def model() -> Module:
        """Twelve loud tokens of a picture and six quiet ones of words in one transformer layer."""
        text = """g (float[1,12,32] picture, float[1,5,32] words, float[1,1,32] cls, float[32,48] w, float[48] c,
          float[48,32] v, float[32] g, float[32] b) => (float[1,18,32] y) {
          x = Concat<axis = 1>(picture, cls, words) h = MatMul(x, w) i = Add(h, c) j = Relu(i) k = MatMul(j, v)
          r = Add(k, x) n = LayerNormalization(r, g, b) y = Tanh(n) }"""
        shapes = {"cls": (1, 1, 32), "w": (32, 48), "c": (48,), "v": (48, 32), "g": (32,), "b": (32,)}
        module = weights(module_from(text, opset=21), **shapes)
        random = np.random.default_rng(0)
        for name in ("w", "v", "cls"):
            data = random.standard_normal(shapes[name]).astype(np.float32) / 6
            module.graph.initializers[name].const_value = ir.tensor(data, name=name)
        module.graph.initializers["g"].const_value = ir.tensor(np.ones(32, np.float32), name="g")
        return module

    @staticmethod
    def samples(count: int = 8) -> dict[str, np.ndarray]:
        random = np.random.default_rng(1)
        picture = 80 * random.standard_normal((count, 1, 12, 32))
        return {"picture": picture.astype(np.float32), "words": random.random((count, 1, 5, 32)).astype(np.float32)}

    def test_each_modality_has_its_own_scale(self) -> None:
        data = self.samples()
        x = {name: array[0] for name, array in data.items()}
        want = evaluate(self.model(), x)["y"]
        errors = []
        for separate in (True, False):
            module, context = self.model(), PassContext(inputs=data)
            if separate:
                assert SeparateModalities().run(module, context)
                assert "2 layers compute tokens" in context.remarks[-1].message
                np.testing.assert_allclose(evaluate(module, x)["y"], want, atol=1e-5)
                assert SeparateModalities().run(module, context) is False
            assert QuantizeStatic().run(module, context)
            assert [problem for problem in verify(module) if problem.severity == "error"] == []
            kinds = [
                v.name
                for v in module.graph.initializers.values()
                if v.dtype == ir.DataType.INT8 and len(v.shape or ()) == 2
            ]
            assert len(kinds) == 2  # the parts share the integers of their weight
            assert count_ops(module)["QuantizeLinear"] == (4 if separate else 2)
            errors.append(np.abs(evaluate(module, x)["y"] - want)[:, 13:].mean())
        assert errors[0] < 0.1 * errors[1]

    def test_artifact(self, tmp_path: pathlib.Path) -> None:
        data = self.samples()
        result = mmopt.optimize(self.model(), passes=[SeparateModalities(), QuantizeStatic()], samples=data)
        mmopt.compile(result.module, output=tmp_path / "a.mmopt", reference=result.module)
        x = {name: array[1] for name, array in data.items()}
        got = mmopt.load_artifact(tmp_path / "a.mmopt").run(x)["y"]
        np.testing.assert_allclose(got, evaluate(result.module, x)["y"], atol=2e-2)

    @pytest.mark.parametrize(
        "body",
        [
            "x = Concat<axis = 1>(words, words) y = MatMul(x, w)",  # one modality
            "x = Concat<axis = 2>(words, more) y = MatMul(x, w)",  # channels, not tokens
            "t = Concat<axis = 1>(words, more) x = Transpose<perm = [0, 2, 1]>(t) y = MatMul(x, w)",
        ],
    )
    def test_what_is_left_alone(self, body: str) -> None:
        size = 64 if "axis = 2" in body else 8 if "Transpose" in body else 32
        text = f"g (float[1,4,32] words, float[1,4,32] more, float[{size},16] w) => (float[1,n,16] y) {{ {body} }}"
        module = weights(module_from(text, opset=21), w=(size, 16))
        assert SeparateModalities().run(module, PassContext()) is False

    def test_tokens_of_unknown_number_are_left_alone(self) -> None:
        text = """g (float[1,n,32] words, float[1,4,32] more, float[32,16] w) => (float[1,m,16] y) {
          x = Concat<axis = 1>(words, more) y = MatMul(x, w) }"""
        assert SeparateModalities().run(weights(module_from(text, opset=21), w=(32, 16)), PassContext()) is False


class TestSplitRanges:
    @staticmethod
    def model() -> Module:
        """What a Gelu gives, 40 in a few places and below 1 elsewhere."""
        text = """g (float[4,32] x, float[32,16] w, float[32,16] v) => (float[4,16] y) {
          a = Gelu(x) b = MatMul(a, w) c = MatMul(a, v) d = Mul(b, c) y = Tanh(d) }"""
        module = weights(module_from(text, opset=21), w=(32, 16), v=(32, 16))
        random = np.random.default_rng(0)
        for name in "wv":
            data = random.standard_normal((32, 16)).astype(np.float32) / 6
            module.graph.initializers[name].const_value = ir.tensor(data, name=name)
        return module

    @staticmethod
    def samples(count: int = 16) -> np.ndarray:
        random = np.random.default_rng(1)
        x = random.standard_normal((count, 4, 32)).astype(np.float32) / 2
        x[:, 0, 5] = 40  # the other rows, and most samples of this one, are far below
        return x

    def test_small_values_keep_fine_steps(self) -> None:
        data = self.samples()
        x = {"x": data[0]}
        want = evaluate(self.model(), x)["y"]
        errors = []
        for split in (True, False):
            module, context = self.model(), PassContext(inputs={"x": data})
            if split:
                assert SplitRanges().run(module, context)
                np.testing.assert_allclose(evaluate(module, x)["y"], want, atol=1e-5)
                assert "2 layers read two ranges" in context.remarks[-1].message
                assert SplitRanges().run(module, context) is False
            assert QuantizeStatic().run(module, context)
            assert [problem for problem in verify(module) if problem.severity == "error"] == []
            kinds = [v.dtype for v in module.graph.initializers.values() if len(v.shape or ()) == 2]
            assert kinds == [ir.DataType.INT8] * 2  # both parts share the integers of a weight
            errors.append(np.abs(evaluate(module, x)["y"] - want)[1:].mean())
        assert errors[0] < 0.4 * errors[1]

    def test_threshold_is_the_best_of_a_grid(self) -> None:
        statistics = TensorStatistics()
        values = np.concatenate([np.abs(np.random.default_rng(0).standard_normal(20_000)), [30.0, 35.0, 50.0]])
        statistics.update(values)
        threshold, gain = best_threshold(statistics)

        def error(t: float) -> float:
            first, second = t / 255, max(50 - t, 1e-9) / 255
            small, large = np.minimum(values, t), np.maximum(values - t, 0)
            return float(((np.rint(small / first) * first + np.rint(large / second) * second - values) ** 2).sum())

        assert error(threshold) < 1.1 * min(error(t) for t in np.linspace(0.5, 49, 200))
        assert gain == pytest.approx(np.sqrt(error(50.0) / error(threshold)), rel=0.1)

    def test_what_is_even_is_left_alone(self) -> None:
        context = PassContext(inputs={"x": np.random.default_rng(0).uniform(0, 2, (4, 4, 32)).astype(np.float32)})
        assert SplitRanges().run(self.model(), context) is False
        assert "times only" in context.remarks[0].message
        assert SplitRanges(producers=("Softmax",)).run(self.model(), PassContext()) is False
