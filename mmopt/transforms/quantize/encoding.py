"""Numbers behind QuantizeLinear and DequantizeLinear: steps, zero points, and constants as integers.

q = clip(round(x / scale) + zero_point, lowest, highest)        x ≈ (q - zero_point) · scale
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]

_BOUNDS = {
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT32: (-(2**31), 2**31 - 1),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
}

_FEW = (ir.DataType.INT4, ir.DataType.UINT4)
"""Types with so few integers that the one more on the negative side counts."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How a tensor is quantized.

    Attributes:
        dtype: Integer type.
        scale: float32: ``[]`` for the whole tensor, ``[channels]``, or of the tensor's rank with one for each block.
        zero_point: Of the shape of ``scale``; ``None`` for zero.
        axis: Axis of the channels or blocks.
        block: Elements of a block along ``axis``; 0 without blocks.
    """

    dtype: ir.DataType
    scale: Array
    zero_point: Array | None = None
    axis: int = 1
    block: int = 0

    def quantize(self, values: Array) -> Array:
        """The integers of ``values``, as int32 within the bounds of ``dtype``."""
        low, high = _BOUNDS[self.dtype]
        scale, zero = self.spread(values.shape)
        return np.asarray(np.clip(np.rint(values.astype(np.float64) / scale) + zero, low, high).astype(np.int32))

    def dequantize(self, integers: Array) -> Array:
        """What the integers stand for, float32."""
        scale, zero = self.spread(integers.shape)
        return np.asarray(((integers - zero) * scale).astype(np.float32))

    @property
    def bounds(self) -> tuple[int, int]:
        """Lowest and highest integer."""
        return _BOUNDS[self.dtype]

    def transposed(self) -> Encoding:
        """The encoding of the transposed matrix."""
        zero = self.zero_point
        turned = (self.scale.T, zero if zero is None else zero.T) if self.block else (self.scale, zero)
        return Encoding(self.dtype, *turned, 1 - self.axis, self.block)

    def spread(self, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Scale and zero point of every element of a tensor of ``shape``, float64 that broadcasts to it."""
        scale = self.scale.astype(np.float64)
        zero = np.zeros_like(scale) if self.zero_point is None else self.zero_point.astype(np.float64)
        if self.block:
            length = shape[self.axis]
            scale, zero = (np.repeat(v, self.block, self.axis).take(range(length), self.axis) for v in (scale, zero))
        elif scale.ndim == 1:
            wide = [1] * len(shape)
            wide[self.axis] = -1
            scale, zero = scale.reshape(wide), zero.reshape(wide)
        return scale, zero


def encode(low: Array, high: Array, dtype: ir.DataType, *, symmetric: bool, axis: int = 1, block: int = 0) -> Encoding:
    """The encoding whose range holds ``[low, high]`` and 0.

    Args:
        low: Lower ends, one for each scale.
        high: Upper ends.
        dtype: Integer type.
        symmetric: Whether 0 is encoded as 0 (as the middle, of an unsigned type) and both sides are alike; of 4 bits,
            the lowest integer is used all the same.
        axis: Axis of channels or blocks.
        block: Elements of a block.
    """
    lowest, highest = _BOUNDS[dtype]
    low, high = np.minimum(low, 0).astype(np.float64), np.maximum(high, 0).astype(np.float64)
    if symmetric:
        middle = 0 if lowest < 0 else (highest + 1) // 2
        below = middle - lowest if dtype in _FEW else highest - middle
        scale = _usable(np.maximum(-low / below, high / (highest - middle)))
        zero = None if middle == 0 else np.full(scale.shape, middle)
        return Encoding(dtype, scale, zero, axis, block)
    scale = _usable((high - low) / (highest - lowest))
    zero = np.clip(np.rint(lowest - low / scale), lowest, highest).astype(np.int64)
    return Encoding(dtype, scale, zero, axis, block)


def _usable(scale: Array) -> Array:
    """A scale is a normal float32: what is all 0 gets 1."""
    scale = np.asarray(scale).astype(np.float32)
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)


def encode_weight(
    weight: Array, dtype: ir.DataType, axis: int | None, *, block: int = 0, symmetric: bool = True, ratio: float = 1.0
) -> Encoding:
    """The encoding of a constant by its own extremes.

    Args:
        weight: The constant.
        dtype: Integer type.
        axis: Axis of channels, one scale each, or that blocks go along; ``None`` for one scale.
        block: Elements of a block along ``axis``; 0 for channels.
        symmetric: As for :func:`encode`.
        ratio: Part of the extremes to keep; the rest is clipped.
    """
    if axis is None:
        low, high = weight.min(), weight.max()
    elif block:
        low, high = (_blockwise(weight, axis, block, reduce) for reduce in (np.minimum, np.maximum))
    else:
        rest = tuple(n for n in range(weight.ndim) if n != axis)
        low, high = weight.min(axis=rest), weight.max(axis=rest)
    return encode(low * ratio, high * ratio, dtype, symmetric=symmetric, axis=axis or 0, block=block)


def _blockwise(weight: Array, axis: int, block: int, reduce: np.ufunc) -> Array:
    return np.asarray(reduce.reduceat(weight, range(0, weight.shape[axis], block), axis=axis))


def squared_error(weight: Array, encoding: Encoding) -> float:
    """Σ (w − what its integers stand for)²."""
    return float(((encoding.dequantize(encoding.quantize(weight)) - weight.astype(np.float64)) ** 2).sum())
