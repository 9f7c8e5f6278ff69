"""Values that onnxruntime and numpy exchange as raw bytes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from mmopt.runtime.fallback import _from_ort, _pack, _to_ort, _unpack


@pytest.mark.parametrize("name", ["int4", "uint4", "int2", "uint2"])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 17])
def test_values_below_a_byte_are_packed_as_onnx_does(name: str, size: int) -> None:
    bits = int(name[-1])
    values = np.random.default_rng(0).integers(0, 1 << bits, size)
    array = (values - (1 << bits - 1) if name.startswith("i") else values).astype(getattr(ml_dtypes, name))
    packed = _pack(array, bits)
    assert packed.tobytes() == ir.Tensor(array).tobytes()
    np.testing.assert_array_equal(_unpack(packed, size, bits).view(array.dtype), array)


def test_a_scalar_stays_a_scalar() -> None:
    assert _to_ort(np.array(2)).shape == ()
    assert tuple(_to_ort(np.array(2).astype(ml_dtypes.bfloat16)).shape()) == ()


@pytest.mark.parametrize(
    "name", ["bfloat16", "float8_e4m3fn", "float8_e8m0fnu", "float4_e2m1fn", "int4", "int2", "uint2"]
)
def test_values_pass_through_onnxruntime(name: str) -> None:
    array = np.array([[1, 0, 1], [1, 1, 0]]).astype(getattr(ml_dtypes, name))
    if name == "float8_e8m0fnu":  # it has no zero
        array = np.array([[1, 2, 0.5], [4, 1, 8]]).astype(array.dtype)
    back = _from_ort(_to_ort(array))
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)
