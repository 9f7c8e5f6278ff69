"""What goes before static quantization so that one scale fits all channels of a tensor, and what it costs nothing."""

from __future__ import annotations

import copy

import numpy as np
import onnx_ir as ir
import pytest

import mmopt
from mmopt.analysis.calibration import TensorStatistics, collect
from mmopt.errors import UserError
from mmopt.ir.module import Module
from mmopt.ir.verify import verify
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize import InferShapes
from mmopt.transforms.canonicalize.editing import constant
from mmopt.transforms.fuse.fuse_groups import FuseGroups
from mmopt.transforms.quantize import QuantizeStatic, SmoothActivations, SplitChannels
from mmopt.transforms.quantize.layers import layers
from tests.canonical import count_ops, evaluate, module_from
from tests.kernels import WIDEST
from tests.programs import Programs
from tests.unit.test_rewrite import weights

ROWS, DEPTH, HIDDEN = 8, 32, 512
LARGE = 20.0


def outgrown(body: str = "a = MatMul(x, w) b = Add(a, c) h = Gelu(b) d = MatMul(h, v) y = Tanh(d)") -> Module:
    """A block whose hidden channels 7 and 300 are twenty times the others."""
    inputs = f"float[{ROWS},{DEPTH}] x, float[{DEPTH},{HIDDEN}] w, float[{HIDDEN}] c, float[{HIDDEN},16] v"
    module = module_from(f"g ({inputs}) => (float[{ROWS},16] y) {{ {body} }}", opset=21)
    module = weights(module, w=(DEPTH, HIDDEN), c=(HIDDEN,), v=(HIDDEN, 16))
    random = np.random.default_rng(0)
    w = random.standard_normal((DEPTH, HIDDEN)).astype(np.float32) / 6
    w[:, [7, 300]] *= LARGE
    v = random.standard_normal((HIDDEN, 16)).astype(np.float32) / 40
    for name, data in (("w", w), ("v", v)):
        module.graph.initializers[name].const_value = ir.tensor(data, name=name)
    return module


def rows(seed: int = 1, count: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, ROWS, DEPTH)).astype(np.float32)


def error(module: Module, want: np.ndarray, seed: int = 7) -> float:
    got = evaluate(module, {"x": rows(seed)[0]})["y"]
    return float(np.sqrt(((got - want) ** 2).mean() / (want**2).mean()))


class TestSplitChannels:
    def test_it_changes_nothing_but_rounding_and_helps(self) -> None:
        module, context = outgrown(), PassContext(inputs={"x": rows()})
        want = evaluate(outgrown(), {"x": rows(7)[0]})["y"]
        assert SplitChannels().run(module, context)
        assert [problem for problem in verify(module) if problem.severity == "error"] == []
        # Offsets are exact only in sum: a step's part from each copy, times weights.
        np.testing.assert_allclose(evaluate(module, {"x": rows(7)[0]})["y"], want, atol=1e-5)
        assert "of 512 channels are computed up to" in context.remarks[0].message
        (first, second) = layers(module)
        wide = constant(second.weight)
        assert wide is not None
        assert len(wide) > HIDDEN
        assert (len(wide) - HIDDEN) % 32 == 0
        assert first.weight.shape == ir.Shape([DEPTH, len(wide)])
        plain = outgrown()
        for one in (module, plain):
            assert QuantizeStatic().run(one, PassContext(inputs={"x": rows()}))
        assert error(module, want) < 0.35 * error(plain, want)
        assert SplitChannels().run(outgrown(), PassContext(inputs={"x": rows()}))

    def test_copies_add_up_to_the_channel_rounded_once(self) -> None:
        """Integers of the copies differ by their offsets, so that their sum is as fine as one of them."""
        module = outgrown()
        assert SplitChannels().run(module, PassContext(inputs={"x": rows(count=32)}))
        assert QuantizeStatic().run(module, PassContext(inputs={"x": rows(count=32)}))
        second = [node for node in module.graph if node.op_type == "MatMul"][1]
        wide = second.inputs[0]
        assert wide is not None
        scale = float(wide.producer().inputs[1].const_value.numpy())  # type: ignore[union-attr]
        probe = module.clone()
        names = [str(wide.name), next(str(n.outputs[0].name) for n in probe.graph if n.op_type == "Gelu")]
        values = {str(v.name): v for node in probe.graph for v in node.outputs}
        probe.graph.outputs.extend(values[name] for name in names)
        found = evaluate(probe, {"x": rows(1)[0]})
        exact, copies = found[names[1]], found[names[0]]
        sums = copies[:, 7] + copies[:, HIDDEN:][:, (exact[:, HIDDEN:] == exact[:, 7:8]).all(axis=0)].sum(axis=1)
        count = 1 + int((exact[:, HIDDEN:] == exact[:, 7:8]).all(axis=0).sum())
        assert count > 3
        assert np.abs(sums - exact[:, 7]).max() <= 0.51 * scale + 1e-4

    def test_statistics_become_those_of_the_changed_module(self) -> None:
        module = outgrown()
        calibration = collect(module, {"x": rows()}, gram=["h"])
        assert SplitChannels().apply(module, PassContext(), calibration)
        name = str(next(node for node in module.graph if node.op_type == "Tanh").inputs[0].producer().inputs[0].name)  # type: ignore[union-attr]
        again = collect(module, {"x": rows()}, gram=[name]).tensors[name]
        found = calibration.tensors[name]
        assert (found.low, found.high) == pytest.approx((again.low, again.high), rel=1e-5)
        assert found.gram is not None
        assert again.gram is not None
        np.testing.assert_allclose(found.gram, again.gram, atol=1e-4 * np.abs(again.gram).max())
        assert found.channels is not None
        np.testing.assert_allclose(found.channels.mean, again.channels.mean, atol=1e-5)  # type: ignore[union-attr]
        np.testing.assert_allclose(found.channels.mean_square, again.channels.mean_square, atol=1e-4)  # type: ignore[union-attr]

    def test_a_gate_between_the_layers_is_widened_too(self) -> None:
        module = outgrown("a = MatMul(x, w) b = Add(a, c) s = Sigmoid(b) h = Mul(b, s) d = MatMul(h, v) y = Tanh(d)")
        want = evaluate(module, {"x": rows(7)[0]})["y"]
        assert SplitChannels().run(module, PassContext(inputs={"x": rows()}))
        np.testing.assert_allclose(evaluate(module, {"x": rows(7)[0]})["y"], want, atol=1e-5)

    @pytest.mark.parametrize(
        "body",
        [
            "a = MatMul(x, w) h = Gelu(a) d = MatMul(h, v) e = ReduceSum(h) y = Add(d, e)",
            "a = MatMul(x, w) h = Gelu(a) e = ReduceSum(a) d = MatMul(h, v) y = Add(d, e)",
            "a = MatMul(x, w) b = MatMul(x, w) h = Mul(a, b) d = MatMul(h, v) y = Tanh(d)",
            "a = MatMul(x, w) h = Softmax(a) d = MatMul(h, v) y = Tanh(d)",
        ],
        ids=["read elsewhere", "read on the way", "two layers", "not by channel"],
    )
    def test_what_is_left_alone(self, body: str) -> None:
        assert SplitChannels().run(outgrown(body), PassContext(inputs={"x": rows()})) is False

    def test_channels_that_are_alike_are_left_alone(self) -> None:
        module, context = outgrown(), PassContext(inputs={"x": rows()})
        data = module.graph.initializers["w"].const_value.numpy().copy()  # type: ignore[union-attr]
        data[:, [7, 300]] /= LARGE
        module.graph.initializers["w"].const_value = ir.tensor(data, name="w")
        module.graph.initializers["c"].const_value = ir.tensor(np.zeros(HIDDEN, np.float32), name="c")
        assert SplitChannels().run(module, context) is False
        assert "no copies" in context.remarks[0].message

    def test_wrong_use(self) -> None:
        with pytest.raises(UserError, match="share is 2"):
            SplitChannels(share=2).run(outgrown(), PassContext(inputs={"x": rows()}))
        with pytest.raises(UserError, match="nothing to calibrate on"):
            SplitChannels().run(outgrown(), PassContext())

    def test_the_native_kernels_agree(self) -> None:
        module = outgrown()
        assert QuantizeStatic(balance=True).run(module, PassContext(inputs={"x": rows()}))
        want = evaluate(module, {"x": rows(7)[0]})["y"]
        InferShapes().run(module, PassContext())
        FuseGroups().run(module, PassContext())
        programs = Programs([module], WIDEST)
        (got,) = programs.run(0, {"x": rows(7)[0]})
        assert np.abs(got - want).max() <= 0.02 * np.abs(want).max()
        assert not [name for name in programs.kernels if name.startswith(("Mul", "Gelu", "QuantizeLinear_1"))]


class TestValues:
    """What attention gives takes its scales from the projection of the values."""

    @staticmethod
    def attention(tail: str = "y = Tanh(o)", cast: str = "u = Identity(v)") -> Module:
        inputs = "float[2,8,32] x, float[32,96] w, float[96] c, float[32,32] p"
        text = f"""a = MatMul(x, w) b = Add(a, c) q, k, v = Split<axis = -1>(b, s) {cast}
          t = Attention<q_num_heads = 4, kv_num_heads = 4>(q, k, u) o = MatMul(t, p) {tail}"""
        sizes = "<int64[3] s = {32, 32, 32}>"
        module = module_from(f"g ({inputs}) => (float[2,8,32] y) {sizes} {{ {text} }}", opset=23)
        if "Identity" in cast:
            (node,) = (node for node in module.graph if node.op_type == "Identity")
            node.outputs[0].replace_all_uses_with(node.inputs[0])  # type: ignore[arg-type]
            module.graph.remove(node, safe=True)
        module = weights(module, w=(32, 96), c=(96,), p=(32, 32))
        random = np.random.default_rng(0)
        w = random.standard_normal((32, 96)).astype(np.float32) / 6
        w[:, 70] *= 30
        p = random.standard_normal((32, 32)).astype(np.float32) / 6
        for name, data in (("w", w), ("p", p)):
            module.graph.initializers[name].const_value = ir.tensor(data, name=name)
        return module

    @staticmethod
    def samples(seed: int = 1) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((8, 2, 8, 32)).astype(np.float32)

    @pytest.mark.parametrize("cast", ["u = Identity(v)", "n = Cast<to = 16>(v) u = Cast<to = 1>(n)"])
    def test_no_operator_is_put_in(self, cast: str) -> None:
        module = self.attention(cast=cast)
        x = {"x": self.samples(7)[0]}
        want = evaluate(module, x)["y"]
        before = count_ops(module)
        context = PassContext(inputs={"x": self.samples()})
        assert SmoothActivations(insert=False).run(module, context)
        assert count_ops(module) == before
        assert "1 projections of values" in context.remarks[-1].message
        np.testing.assert_allclose(evaluate(module, x)["y"], want, atol=1e-5 if "Identity" in cast else 2e-2)
        weight, same = (next(layers(one)).node.inputs[1] for one in (module, self.attention()))
        queries, untouched = (constant(value) for value in (weight, same))
        assert queries is not None
        assert untouched is not None
        np.testing.assert_array_equal(queries[:, :64], untouched[:, :64])

    def test_what_others_read_is_left_alone(self) -> None:
        module = self.attention("m = Tanh(t) y = Add(o, m)")
        assert SmoothActivations(insert=False).run(module, PassContext(inputs={"x": self.samples()})) is False


def test_balancing_by_statistics_of_one_pass_is_balancing_step_by_step() -> None:
    step, whole = outgrown(), outgrown()
    for pass_ in (SplitChannels(), SmoothActivations(), QuantizeStatic(rounding="gptq")):
        pass_.run(step, PassContext(inputs={"x": rows()}))
    assert QuantizeStatic(rounding="gptq", balance=True).run(whole, PassContext(inputs={"x": rows()}))
    x = {"x": rows(7)[0]}
    np.testing.assert_allclose(evaluate(whole, x)["y"], evaluate(step, x)["y"], atol=2e-2)
    assert count_ops(whole) == count_ops(step)


def test_precision_int8_balances() -> None:
    want = evaluate(outgrown(), {"x": rows(7)[0]})["y"]
    made = {"x": rows(count=16)}
    default = mmopt.optimize(outgrown(), precision="int8", samples=made, target="", validate="off").module
    plain = mmopt.optimize(outgrown(), passes=[QuantizeStatic()], samples=made, validate="off").module
    assert error(default, want) < 0.5 * error(plain, want)


def test_rescaled_statistics_are_those_of_rescaled_values() -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal((40, 6)) + 1
    index, factors, offsets = np.array([2, 0, 0, 5]), np.array([0.5, 2.0, 1.0, 3.0]), np.array([0.0, 1.0, -1.0, 0.2])
    before, want = TensorStatistics(), TensorStatistics()
    before.update(values, 1, gram=True)
    want.update(values[:, index] * factors + offsets, 1, gram=True)
    kept = copy.deepcopy(before)
    found = before.rescaled(index, factors, offsets)
    assert (found.low, found.high, found.count) == pytest.approx((want.low, want.high, want.count))
    np.testing.assert_allclose(found.gram, want.gram)  # type: ignore[arg-type]
    for name in ("low", "high", "total", "squares", "count"):
        np.testing.assert_allclose(getattr(found.channels, name), getattr(want.channels, name))
    np.testing.assert_array_equal(before.gram, kept.gram)
    with pytest.raises(ValueError, match="by channel"):
        TensorStatistics().rescaled(index, factors, offsets)
