"""Quantizing what a kernel has just computed: exact up to the quotient's rounding, and Gelu up to a part of a step."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper
from scipy.special import erf

from mmopt.lowering.ops.coarse import _GELU, SHARE, coarse_gelu
from tests.kernels import WIDEST
from tests.programs import Example, Programs, grouped, model_of

ROWS, DEPTH, COLUMNS = 37, 64, 48


def layer(x: np.ndarray, between: list[onnx.NodeProto], scale: float, zero: np.generic) -> onnx.ModelProto:
    """x·w of quantized operands, what stands between, and its quantization; w is the identity on 48 of 64 channels."""
    w = np.eye(DEPTH, COLUMNS, dtype=np.int8)
    held = {"w": w, "sx": np.float32(0.037), "sw": np.float32(1.0), "zx": np.uint8(128), "zw": np.int8(0)}
    held |= {"sy": np.float32(scale), "zy": zero}
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "sx", "zx"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wf"]),
        helper.make_node("MatMul", ["xf", "wf"], ["product"]),
        *between,
        helper.make_node("QuantizeLinear", [between[-1].output[0] if between else "product", "sy", "zy"], ["y"]),
    ]
    return model_of(nodes, {"x": x}, ["y"], {name: np.asarray(v) for name, v in held.items()}, opset=21)


def bytes_(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (ROWS, DEPTH)).astype(np.uint8)


def real(x: np.ndarray) -> np.ndarray:
    """What the product is, float64."""
    return (x[:, :COLUMNS].astype(np.float64) - 128) * np.float64(np.float32(0.037))


class TestRequantizing:
    @pytest.mark.parametrize(
        "zero", [np.uint8(0), np.uint8(77), np.uint8(255), np.int8(-3), np.int8(0), np.uint16(4001)], ids=str
    )
    def test_a_product_is_rounded_to_the_nearest_step(self, zero: np.generic) -> None:
        x = bytes_()
        model = layer(x, [], 0.0191, zero)
        info = np.iinfo(zero.dtype)
        want = np.clip(np.rint(real(x) / np.float64(np.float32(0.0191))) + int(zero), info.min, info.max)
        (got,) = Programs([grouped(model)], WIDEST).run(0, {"x": x})
        assert got.dtype == zero.dtype
        np.testing.assert_array_equal(got, want)

    def test_halves_go_to_even(self) -> None:
        """Steps of twice the operand's put every other product half way between two integers; the zero point is odd."""
        x = bytes_()
        model = layer(x, [], 1.0, np.uint8(31))
        model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.float32(0.5), "sx"))
        want = np.clip(np.rint((x[:, :COLUMNS].astype(np.float64) - 128) / 2) + 31, 0, 255)
        (got,) = Programs([grouped(model)], WIDEST).run(0, {"x": x})
        np.testing.assert_array_equal(got, want)

    def test_what_exceeds_the_range_is_cut_off(self) -> None:
        x = np.zeros((ROWS, DEPTH), np.uint8)
        x[::2] = 255
        (got,) = Programs([grouped(layer(x, [], 1e-7, np.uint8(9)))], WIDEST).run(0, {"x": x})
        assert set(np.unique(got)) == {0, 255}


class TestGelu:
    @pytest.mark.parametrize("scale", [0.2, 0.02, 0.006, 0.0028, 1e-5])
    def test_within_a_part_of_the_step(self, scale: float) -> None:
        x = bytes_()
        model = layer(x, [helper.make_node("Gelu", ["product"], ["g"])], scale, np.uint8(17))
        exact = real(x) * (1 + erf(real(x) / np.sqrt(2))) / 2
        place = np.clip(exact / np.float32(scale) + 17, -0.5, 255.5)
        (got,) = Programs([grouped(model)], WIDEST).run(0, {"x": x})
        assert np.abs(got - place).max() <= 0.5 + SHARE + 1e-3

    def test_far_negative_numbers_give_nothing(self) -> None:
        x = np.zeros((ROWS, DEPTH), np.uint8)
        model = layer(x, [helper.make_node("Gelu", ["product"], ["g"])], 0.01, np.uint8(5))
        model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.float32(1e30), "sx"))
        (got,) = Programs([grouped(model)], WIDEST).run(0, {"x": x})
        assert (got == 5).all()

    def test_polynomials_are_as_good_as_they_say(self) -> None:
        x = np.linspace(-20, 20, 200_001).astype(np.float32)
        exact = x * (1 + erf(x.astype(np.float64) / np.sqrt(2))) / 2
        for error, bound, coefficients in _GELU:
            low = np.maximum(x, np.float32(-bound))
            cut = np.minimum(low, np.float32(bound))
            value = np.zeros_like(x)
            for c in reversed(coefficients):
                value = value * (cut * cut) + np.float32(c)
            assert np.abs(low * (cut * value + np.float32(0.5)) - exact).max() <= error

    def test_finer_steps_take_better_polynomials_and_then_none(self) -> None:
        chosen = [coarse_gelu(step) for step in (1.0, 0.06, 0.02, 0.008, 0.003)]
        lengths = [len(c.keywords["coefficients"]) for c in chosen if c is not None]  # type: ignore[attr-defined]
        assert lengths == [5, 6, 7, 8, 9]
        assert coarse_gelu(1e-4) is None

    def test_a_result_that_others_read_too_is_exact(self) -> None:
        x = bytes_()
        nodes = [helper.make_node("Gelu", ["product"], ["g"])]
        model = layer(x, nodes, 0.05, np.uint8(17))
        model.graph.node.append(helper.make_node("Identity", ["g"], ["z"]))
        model.graph.output.append(helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [ROWS, COLUMNS]))
        example = Example("gelu twice", model, {"x": x})
        got = Programs([grouped(model)], WIDEST).run(0, example.feeds)
        np.testing.assert_allclose(got[1], real(x) * (1 + erf(real(x) / np.sqrt(2))) / 2, atol=1e-6)


class TestGeluBeforeBfloat16:
    """Only a Cast to bfloat16 that alone reads the result makes it coarse: by a twelfth of that rounding at most."""

    def _outputs(self, x: np.ndarray, to: int, shared: bool) -> list[np.ndarray]:
        nodes = [
            helper.make_node("Gelu", ["x"], ["g"]),
            helper.make_node("Cast", ["g"], ["n"], to=to),
            helper.make_node("Cast", ["n"], ["y"], to=onnx.TensorProto.FLOAT),
        ]
        outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, list(x.shape))]
        if shared:
            outputs.append(helper.make_tensor_value_info("g", onnx.TensorProto.FLOAT, list(x.shape)))
        taken = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, list(x.shape))
        model = helper.make_model(
            helper.make_graph(nodes, "g", [taken], outputs),
            opset_imports=[helper.make_opsetid("", 23)],
            ir_version=10,
        )
        return Programs([grouped(model)], WIDEST).run(0, {"x": x})

    def test_the_result_is_right_to_a_unit_of_bfloat16(self) -> None:
        x = np.linspace(-4, 8, 4096).astype(np.float32).reshape(64, 64)
        exact = x * (1 + erf(x.astype(np.float64) / np.sqrt(2))) / 2
        (got,) = self._outputs(x, onnx.TensorProto.BFLOAT16, shared=False)
        assert (np.abs(got - exact) <= (2.0**-8 + 3e-4) * np.abs(exact) + 1e-30).all()

    def test_others_get_it_exact(self) -> None:
        x = np.linspace(-4, 8, 4096).astype(np.float32).reshape(64, 64)
        exact = x * (1 + erf(x.astype(np.float64) / np.sqrt(2))) / 2
        for to, shared in ((onnx.TensorProto.BFLOAT16, True), (onnx.TensorProto.DOUBLE, False)):
            got = self._outputs(x, to, shared)[-1]
            np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-7)
