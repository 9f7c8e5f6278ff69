"""Quantization: linear quantizing and dequantizing, and integer products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import SUM, Map, Reduction
from mmopt.backends.expressions import simplify
from mmopt.lowering.ops import products
from mmopt.lowering.ops.casting import saturated
from mmopt.lowering.ops.coarse import can_requantize, is_rounded, requantized
from mmopt.lowering.ops.conv import geometry
from mmopt.lowering.ops.conv_narrow import IntegerSums, integer_sums
from mmopt.lowering.ops.dequantized import is_encoding
from mmopt.lowering.ops.elementwise import accumulator, broadcast_index, broadcast_shape
from mmopt.lowering.ops.extents import i64, known
from mmopt.lowering.ops.pooling import placed, windows_of
from mmopt.lowering.ops.reduction import LARGEST, SMALLEST, Rule, over
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import NotLowered, Quantized, Value, dtype_name, narrow_bits, static_shape

Parameter = Callable[[Sequence[Expr]], Expr]
"""Gives a scale or zero point at an index of the tensor it belongs to."""


def parameter(node: OpNode, value: Value, data: Value) -> Parameter:
    """How a scale or zero point is read: one for all, one for each index of ``axis``, or one for each block of it."""
    node.context.tensor(value)
    if value.ndim == 0 or (value.ndim == 1 and known(value.shape[0]) == 1 and data.ndim != 1):
        return lambda at: value.tensor[tuple(i64(0) for _ in value.shape)]
    axis = node.attr("axis", 1) % max(data.ndim, 1)
    if value.ndim == 1:
        return lambda at: value.tensor[at[axis] if known(value.shape[0]) != 1 else i64(0)]
    block = node.attr("block_size", 0)
    if not block:
        raise NotLowered("a blocked scale without a block size")
    return lambda at: value.tensor[(*at[:axis], tirx.floordiv(at[axis], i64(block)), *at[axis + 1 :])]


def rounded(x: Expr, scale: Expr, zero: Expr | None, dtype: str, bits: int | None = None) -> Expr:
    """``saturate(round(x / scale) + zero)``, halves to even."""
    wide = str(x.ty)
    quotient = tirx.nearbyint(divided(x, scale))
    return saturated(quotient if zero is None else quotient + zero.astype(wide), dtype, bits)


def divided(x: Expr, scale: Expr) -> Expr:
    """``x / scale`` as far as it matters before rounding to an integer of at most 16 bits.

    A known scale is divided by in multiplications: the first quotient's error is computed exactly, for the compiler
    fuses ``x - first · scale``, and corrected (Markstein, 1990). Beyond 2²⁰ only the sign has to be right.
    """
    if not isinstance(scale, tirx.FloatImm) or str(x.ty) != "float32":
        return x / scale
    step = np.float32(scale.value)
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / step
    if not (np.isfinite(inverse) and abs(inverse) < 2.0**100 and abs(step) < 2.0**100):
        return x / scale
    reciprocal, bound = tirx.const(float(inverse), "float32"), tirx.const(2.0**20, "float32")
    first = tirx.max(tirx.min(x * reciprocal, bound), tirx.const(-(2.0**20), "float32"))
    if float(inverse) * float(step) == 1.0:  # a power of two
        return first
    return first + (x - first * scale) * reciprocal


def _each(node: OpNode, data: Value, dtype: str, rule: Callable[[Expr, Sequence[Expr]], Expr], name: str) -> Value:
    """``rule`` of each element and its index, in the layout that ``data`` is in."""
    tensor, blocked = node.context.tensor(data), data.blocked
    if blocked is None:
        return Value(Map(data.shape, dtype, lambda *at: rule(tensor[at], at), name), name=node.name)
    lanes = blocked.shape[-1]

    def body(*at: Expr) -> Expr:
        n, c, *space, lane = at
        return rule(blocked[at], (n, c * lanes + lane, *space))

    return Value.in_blocks(Map(blocked.shape, dtype, body, name), node.name)


@lowers("QuantizeLinear")
def quantize_linear(node: OpNode) -> Value:
    """Floats as integers of a step and a zero point."""
    data, scale, zero = node.input(0), node.input(1), node.optional(2)
    chosen = node.attr("output_dtype", 0)
    dtype = zero.dtype if zero is not None else dtype_name(ir.DataType(chosen)) if chosen else "uint8"
    bits = zero.bits if zero is not None else narrow_bits(ir.DataType(chosen)) if chosen else None
    if "int" not in dtype:
        raise NotLowered(f"quantization to {dtype}")
    if data.quantized is not None and bits is None and is_encoding(data.quantized, scale, zero, dtype):
        return data.quantized.value
    step = parameter(node, scale, data)
    offset = parameter(node, zero, data) if zero is not None else None
    wide = "float64" if data.dtype == "float64" else "float32"

    source = node.node.inputs[0]
    computed = wide == "float32" and bits is None and source is not None and is_rounded(source)

    def rule(x: Expr, at: Sequence[Expr]) -> Expr:
        width, shift = step(at).astype(wide), offset(at) if offset is not None else None
        if computed and can_requantize(width, shift, dtype):
            return requantized(x, float(width.value), 0 if shift is None else int(shift.value), dtype)
        return rounded(x.astype(wide), width, shift, dtype, bits)

    made = _each(node, data, dtype, rule, "quantize")
    made.bits = bits
    return made


@lowers("DequantizeLinear")
def dequantize_linear(node: OpNode) -> Value:
    """Integers of a step and a zero point as floats."""
    data, scale, zero = node.input(0), node.input(1), node.optional(2)
    chosen = node.attr("output_dtype", 0)
    dtype = dtype_name(ir.DataType(chosen)) if chosen else scale.dtype
    step = parameter(node, scale, data)
    offset = parameter(node, zero, data) if zero is not None else None
    wide = accumulator(scale.dtype)
    if data.dtype == "int32" and data.constant is not None and data.ndim == 1 and dtype == "float32":
        bias = _known_bias(node, data.constant, scale, zero)
        if bias is not None:
            return bias

    def rule(x: Expr, at: Sequence[Expr]) -> Expr:
        if offset is None:
            return (x.astype(wide) * step(at).astype(wide)).astype(dtype)
        difference = (
            x.astype("int64") - offset(at).astype("int64")
            if data.dtype == "int32"
            else x.astype("int32") - offset(at).astype("int32")
        )
        return (difference.astype(wide) * step(at).astype(wide)).astype(dtype)

    made = _each(node, data, dtype, rule, "dequantize")
    if not node.attr("block_size", 0) or scale.ndim == data.ndim:
        axis = node.attr("axis", 1) % max(data.ndim, 1)
        made.quantized = Quantized(data, scale, zero, axis, node.attr("block_size", 0))
    return made


def _known_bias(node: OpNode, data: np.ndarray, scale: Value, zero: Value | None) -> Value | None:
    """A constant vector in 32 bits: no smaller than the floats it stands for, it is kept as those."""
    if scale.constant is None or (zero is not None and zero.constant is None):
        return None
    centred = data.astype(np.int64) - (0 if zero is None or zero.constant is None else zero.constant.astype(np.int64))
    return node.context.constant(centred.astype(np.float32) * scale.constant.astype(np.float32), node.name)


@lowers("DynamicQuantizeLinear")
def dynamic_quantize_linear(node: OpNode) -> list[Value]:
    """Eight-bit quantization by the range of the data, widened to hold zero."""
    data = node.input(0)
    axes = list(range(data.ndim))
    zero = tirx.const(0.0, data.dtype)
    low = over(node, data, axes, Rule(SMALLEST, after=lambda x, _: tirx.min(x, zero)), keep=False)
    high = over(node, data, axes, Rule(LARGEST, after=lambda x, _: tirx.max(x, zero)), keep=False)
    levels = tirx.const(255.0, data.dtype)
    node.context.realize([low, high], "range")

    def step() -> Expr:
        width = (high.tensor[()] - low.tensor[()]) / levels
        return tirx.Select(tirx.EQ(width, zero), tirx.const(1.0, data.dtype), width)

    scale = Value(Map([], data.dtype, lambda: (high.tensor[()] - low.tensor[()]) / levels, "scale"), name=node.name)
    offset = Value(
        Map([], "uint8", lambda: saturated(tirx.nearbyint(zero - low.tensor[()] / step()), "uint8"), "zero_point")
    )
    node.context.realize([scale, offset], "parameters")

    def body(*at: Expr) -> Expr:
        return rounded(data.tensor[at], step(), offset.tensor[()], "uint8")

    return [Value(Map(data.shape, "uint8", body, "quantize"), name=node.name), scale, offset]


# -- integer products ------------------------------------------------------------------------------------------


def _centred(value: Value, zero: Value | None, at: tuple[Expr, ...], along: int) -> Expr:
    """An element less its zero point, which may differ along an axis."""
    x = value.tensor[at].astype("int32")
    return x if zero is None else x - _at(zero, at, along).astype("int32")


def _at(value: Value, at: Sequence[Expr], along: int) -> Expr:
    """A parameter of a matrix: one for all, one for each row or column, or a tensor that broadcasts."""
    if value.ndim == 0:
        return value.tensor[()]
    if value.ndim == 1:
        return value.tensor[i64(0) if known(value.shape[0]) == 1 else at[along]]
    return value.tensor[broadcast_index(value.shape, at[len(at) - value.ndim :], [i64(0)] * value.ndim)]


def integer_product(node: OpNode, a: Value, b: Value, a_zero: Value | None, b_zero: Value | None) -> Value:
    """``(a - a_zero) @ (b - b_zero)`` in 32-bit integers."""
    fast = products.integer_product(node, a, b, a_zero, b_zero)
    if fast is not None:
        return fast
    for value in (a, b, a_zero, b_zero):
        if value is not None:
            node.context.tensor(value)
    if a.ndim == 1 or b.ndim == 1:
        raise NotLowered("an integer product with a vector")
    batch = broadcast_shape([a.shape[:-2], b.shape[:-2]])
    shape = (*batch, a.shape[-2], b.shape[-1])

    def body(*at: Expr) -> Expr:
        *outer, row, column, k = at
        left = broadcast_index(a.shape[:-2], outer[len(outer) - a.ndim + 2 :], batch[len(batch) - a.ndim + 2 :])
        right = broadcast_index(b.shape[:-2], outer[len(outer) - b.ndim + 2 :], batch[len(batch) - b.ndim + 2 :])
        return _centred(a, a_zero, (*left, row, k), -2) * _centred(b, b_zero, (*right, k, column), -1)

    return Value(Reduction(shape, [a.shape[-1]], ("int32",), body, SUM), name=node.name)


@lowers("MatMulInteger")
def matmul_integer(node: OpNode) -> Value:
    """Product of 8-bit matrices in 32 bits."""
    return integer_product(node, node.input(0), node.input(1), node.optional(2), node.optional(3))


@lowers("QLinearMatMul")
def qlinear_matmul(node: OpNode) -> Value:
    """Product of quantized matrices, quantized again."""
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = (node.input(n) for n in range(8))
    product = integer_product(node, a, b, a_zero, b_zero)
    for value in (a_scale, b_scale, y_scale, y_zero):
        node.context.tensor(value)
    _only_integers(y_zero.dtype)

    def body(*at: Expr) -> Expr:
        factor = _at(a_scale, at, -2).astype("float32") * _at(b_scale, at, -1).astype("float32")
        factor = factor / _at(y_scale, at, -2).astype("float32")
        quotient = tirx.nearbyint(product.tensor[at].astype("float32") * factor)
        return saturated(quotient + _at(y_zero, at, -2).astype("float32"), y_zero.dtype)

    return Value(Map(product.shape, y_zero.dtype, body, "quantize"), name=node.name)


def _only_integers(dtype: str) -> None:
    if "int" not in dtype:
        raise NotLowered(f"a quantized product of {dtype}")


def _sums_of(node: OpNode, x: Value, w: Value, x_zero: Value | None, w_zero: Value | None) -> IntegerSums | None:
    """A convolution of centred bytes by dot-product instructions, where there are some for it."""
    shape = geometry(node, x.shape[2:], static_shape(w.shape[2:], "the filter"))
    return integer_sums(node, x, w, x_zero, w_zero, node.attr("group", 1), shape)


def integer_convolution(node: OpNode, x: Value, w: Value, x_zero: Value | None, w_zero: Value | None) -> Value:
    """Convolution of centred 8-bit tensors in 32 bits; padding counts as the zero point."""
    for value in (x, w, x_zero, w_zero):
        if value is not None:
            node.context.tensor(value)
    windows = windows_of(node, x.shape[2:], static_shape(w.shape[2:], "the filter"))
    groups, rank = node.attr("group", 1), len(windows.kernel)
    per_group = simplify(tirx.floordiv(w.shape[0], i64(groups)))

    def body(*at: Expr) -> Expr:
        n, channel, *rest = at
        space, (depth, *steps) = rest[:rank], rest[rank:]
        inside, (_, _, *nearest) = placed(windows, x.shape, (n, channel, *space), steps)
        source = tirx.floordiv(channel, per_group) * w.shape[1] + depth
        left = _centred(x, x_zero, (n, source, *nearest), 1)
        right = _centred(w, w_zero, (channel, depth, *steps), 0)
        return tirx.Select(inside, left * right, tirx.const(0, "int32"))

    extents = (x.shape[0], w.shape[0], *windows.out)
    return Value(Reduction(extents, w.shape[1:], ("int32",), body, SUM), name=node.name)


@lowers("ConvInteger")
def conv_integer(node: OpNode) -> Value:
    """Convolution of 8-bit tensors in 32 bits."""
    sums = _sums_of(node, node.input(0), node.input(1), node.optional(2), node.optional(3))
    if sums is not None:
        return sums.finished(node, "int32", None)
    return integer_convolution(node, node.input(0), node.input(1), node.optional(2), node.optional(3))


@lowers("QLinearConv")
def qlinear_conv(node: OpNode) -> Value:
    """Convolution of quantized tensors, quantized again."""
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = (node.input(n) for n in range(8))
    bias = node.optional(8)
    _only_integers(y_zero.dtype)
    for value in (x_scale, w_scale, y_scale, y_zero, bias):
        if value is not None:
            node.context.tensor(value)

    def requantized(total: Expr, channel: Expr) -> Expr:
        at = (i64(0), channel)
        if bias is not None:
            total = total + bias.tensor[channel]
        factor = _at(x_scale, at, 1) * _at(w_scale, at, 1) / _at(y_scale, at, 1)
        quotient = tirx.nearbyint(total.astype("float32") * factor)
        return saturated(quotient + _at(y_zero, at, 1).astype("float32"), y_zero.dtype)

    sums = _sums_of(node, x, w, x_zero, w_zero)
    if sums is not None:
        return sums.finished(node, y_zero.dtype, requantized)
    plain = integer_convolution(node, x, w, x_zero, w_zero).tensor
    return Value(Map(plain.shape, y_zero.dtype, lambda *at: requantized(plain[at], at[1]), "quantize"), name=node.name)
