from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mmopt.ir.evaluate import ReferenceRunner
from mmopt.pipeline.base import Fidelity
from mmopt.pipeline.validation import Tolerance, compare, compare_outputs, tolerance_for, working_precision, worst
from tests.canonical import module_from
from tests.pass_models import FLOAT, audio_model, make_module

EXACT, ROUNDING, LOSSY = Fidelity.EXACT, Fidelity.ROUNDING, Fidelity.LOSSY
A = np.linspace(-1, 3, 100, dtype=np.float32).reshape(10, 10)


def test_equal_arrays_agree_with_no_error():
    found = compare(A, A.copy(), EXACT, name="y")
    assert found.ok
    assert (found.name, found.max_abs_error, found.relative_error, found.mismatched_fraction) == ("y", 0, 0, 0)
    assert found.range == pytest.approx(4)


def test_error_is_measured_against_the_range():
    off = A.copy()
    off[0, 0] += 0.04
    found = compare(A, off, ROUNDING)

    assert not found.ok
    assert found.max_abs_error == pytest.approx(0.04, rel=1e-5)
    assert found.relative_error == pytest.approx(0.01, rel=1e-5)
    assert found.mismatched_fraction == 0.01
    assert "1.0% of the elements" in found.reason


@pytest.mark.parametrize(
    ("fidelity", "relative", "ok"),
    [(EXACT, 1e-6, True), (EXACT, 1e-5, False), (ROUNDING, 5e-5, True), (ROUNDING, 3e-4, False)],
)
def test_tolerance_follows_from_fidelity(fidelity, relative, ok):
    assert compare(A, A + np.float32(4 * relative), fidelity).ok is ok


def test_tolerance_follows_from_dtype():
    def error_allowed(dtype):
        a = A.astype(dtype)
        return compare(a, (a.astype(np.float32) * 1.005).astype(dtype), ROUNDING).ok

    assert not error_allowed(np.float64)
    assert not error_allowed(np.float32)
    assert error_allowed(np.float16)
    assert error_allowed(ml_dtypes.bfloat16)


def test_outputs_far_from_zero_are_granted_their_last_places():
    a = np.float32(1e6) + np.linspace(0, 1, 50, dtype=np.float32)
    assert compare(a, a + np.float32(0.0625), EXACT).ok
    assert not compare(a, a + np.float32(2), EXACT).ok


def test_small_probabilities_are_as_exact_as_the_reference_makes_them():
    # What decides on tolerance is the grain of the values that onnxruntime's sigmoid gives.
    x = np.array([-8.5, -8.3, -8.4], np.float32)
    module = module_from("g (float[3] x) => (float[3] y) { y = Sigmoid(x) }")
    with ReferenceRunner(threads=1) as runner:
        reference = np.asarray(runner.run(module, {"x": x})["y"])
    exact = (1 / (1 + np.exp(-x.astype(np.float64)))).astype(np.float32)
    found = compare(reference, exact, Fidelity.ROUNDING)
    assert found.ok
    assert found.relative_error > 1e-4
    assert not compare(exact, reference, Fidelity.ROUNDING).ok
    assert not compare(reference, reference + np.float32(3e-7), Fidelity.ROUNDING).ok


def test_mask_values_do_not_hide_errors_in_the_rest():
    a = np.concatenate([A.reshape(-1), [-1e9] * 10]).astype(np.float32)
    off = a.copy()
    off[3] += 0.1
    assert compare(a, a * np.float32(1 + 1e-7), EXACT).ok
    assert not compare(a, off, ROUNDING).ok


@pytest.mark.parametrize("fidelity", [EXACT, ROUNDING, LOSSY])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_must_stay_where_they_are(fidelity, value):
    special = A.copy()
    special[2, 3] = value

    assert compare(special, special.copy(), fidelity).ok
    assert compare(special, special.copy(), fidelity).nonfinite == 1
    for one, other in ((special, A), (A, special)):
        found = compare(one, other, fidelity)
        assert not found.ok
        assert "at 1 element" in found.reason


def test_lossy_is_held_to_its_own_bound_only():
    assert compare(A, A * 0.5, tolerance_for(LOSSY)).ok
    assert compare(A, A + np.float32(0.02), tolerance_for(LOSSY, bound=0.01)).ok
    assert not compare(A, A + np.float32(0.06), tolerance_for(LOSSY, bound=0.01)).ok


def test_integers_are_exact_but_for_single_steps_of_eight_bits():
    a = np.arange(200, dtype=np.int64)
    off = a.copy()
    off[0] = 1
    assert not compare(a, off, ROUNDING).ok

    small, step = a.astype(np.uint8), off.astype(np.uint8)
    assert compare(small, step, ROUNDING).ok
    assert not compare(small, step, EXACT).ok
    assert not compare(small, small + np.uint8(1), ROUNDING).ok


def test_type_shape_and_presence():
    assert "dtype is float64" in compare(A, A.astype(np.float64), EXACT).reason
    assert "shape is [100]" in compare(A, A.reshape(-1), EXACT).reason
    found = compare_outputs({"a": A, "b": A}, {"a": A}, EXACT)
    assert [one.ok for one in found] == [True, False]
    assert worst(found).name == "b"
    assert "missing" in worst(found).reason


def test_sequences_optionals_strings_and_empty():
    assert compare([A, A], [A, A], EXACT).ok
    assert "1 elements, should have 2" in compare([A, A], [A], EXACT).reason
    assert not compare([A, A], [A, A + 1], EXACT).ok
    assert compare(None, None, EXACT).ok
    assert not compare(None, A, EXACT).ok
    text = np.array(["a", "b"], object)
    assert compare(text, np.array(["a", "b"]), EXACT).ok
    assert not compare(text, text[::-1], EXACT).ok
    assert compare(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), EXACT).ok
    complex_ = A.astype(np.complex64) * (1 + 2j)
    assert compare(complex_, complex_.copy(), EXACT).ok
    assert not compare(complex_, complex_.conj(), ROUNDING).ok


def test_comparison_is_json():
    found = compare(np.array([np.nan, 1], np.float32), np.array([1, 1], np.float32), LOSSY)
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["tolerance"] is None


floats = arrays.arrays(
    np.float32,
    arrays.array_shapes(max_dims=3, max_side=5),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
)


@given(floats)
def test_reflexive_and_matching_a_plain_formula(array):
    assert compare(array, array, EXACT).ok
    doubled = compare(array, array + 1, Tolerance(math.inf))
    assert doubled.max_abs_error == pytest.approx(float(np.abs((array + 1).astype(np.float64) - array).max()))


def test_working_precision_is_the_coarsest_inside():
    from onnx import TensorProto, helper

    def through(target):
        nodes = [helper.make_node("Cast", ["x"], ["h"], to=target), helper.make_node("Cast", ["h"], ["y"], to=FLOAT)]
        return make_module(nodes, [("x", FLOAT, [2])], [("y", FLOAT, [2])], {})

    assert working_precision(audio_model()) == "float32"
    assert working_precision(through(TensorProto.FLOAT16)) == "float16"
    assert working_precision(through(TensorProto.BFLOAT16)) == "bfloat16"
    assert working_precision(through(TensorProto.FLOAT8E4M3FN)) == "8-bit"
    quantized = audio_model()
    quantized.graph.append(ir.node("QuantizeLinear", [quantized.graph.inputs[0], quantized.graph.initializers["half"]]))
    assert working_precision(quantized) == "8-bit"


def test_tolerances_grow_with_coarseness_and_fidelity():
    order = ["float64", "float32", "float16", "bfloat16"]
    for fidelity in (EXACT, ROUNDING):
        bounds = [tolerance_for(fidelity, precision).relative for precision in order]
        assert bounds == sorted(bounds)
    for precision in [*order, "8-bit"]:
        assert tolerance_for(EXACT, precision).relative < tolerance_for(ROUNDING, precision).relative
