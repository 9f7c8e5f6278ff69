"""Normalizations: softmax and its kin, and those by mean and variance.

All are chains of reductions over the same rows, which the emitter runs row by row. Variances are taken about the
mean, in two passes over the row, so that large means cost no digits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import SUM, Map
from mmopt.backends.cpu.loops import product
from mmopt.backends.expressions import simplify
from mmopt.lowering.ops.elementwise import accumulator, broadcast_index
from mmopt.lowering.ops.extents import axis_attr, i64
from mmopt.lowering.ops.reduction import LARGEST, Rule, extremum_position, over
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import NotLowered, Value, dtype_name


def like(x: Expr, value: float) -> Expr:
    """``value`` as a constant of the type of ``x``."""
    return tirx.const(value, str(x.ty))


def rows(at: Sequence[Expr], axes: Sequence[int]) -> tuple[Expr, ...]:
    """Where the statistics of the row that ``at`` is in are: reduced axes have extent one."""
    return tuple(i64(0) if d in axes else i for d, i in enumerate(at))


# -- softmax ---------------------------------------------------------------------------------------------------


def _softmax_axes(node: OpNode, rank: int) -> list[int]:
    """One axis; before opset 13 that axis and all behind it."""
    if node.opset >= 13:
        return [axis_attr(node, rank, -1)]
    return list(range(axis_attr(node, rank, 1), rank))


@lowers("Softmax")
def softmax(node: OpNode) -> Value:
    """``exp(x - max) / Σ exp(x - max)``."""
    return softmax_of(node, node.input(0), _softmax_axes(node, node.input(0).ndim))


def softmax_of(node: OpNode, data: Value, axes: Sequence[int]) -> Value:
    """Softmax of ``data`` over ``axes``."""
    shifted, total = _exponentials(node, data, axes)
    body = lambda *at: (shifted.tensor[at] / total.tensor[rows(at, axes)]).astype(data.dtype)  # noqa: E731
    return Value(Map(data.shape, data.dtype, body, "softmax"), name=node.name)


def _exponentials(node: OpNode, data: Value, axes: Sequence[int]) -> tuple[Value, Value]:
    wide = accumulator(data.dtype)
    top = over(node, data, axes, Rule(LARGEST), keep=True, dtype=wide)
    body = lambda *at: tirx.exp(data.tensor[at].astype(wide) - top.tensor[rows(at, axes)])  # noqa: E731
    shifted = Value(Map(data.shape, wide, body, "exp"))
    return shifted, over(node, shifted, axes, Rule(SUM), keep=True)


@lowers("LogSoftmax")
def log_softmax(node: OpNode) -> Value:
    """``x - max - log Σ exp(x - max)``."""
    data = node.input(0)
    axes, wide = _softmax_axes(node, data.ndim), accumulator(data.dtype)
    top = over(node, data, axes, Rule(LARGEST), keep=True, dtype=wide)

    def moved(*at: Expr) -> Expr:
        return data.tensor[at].astype(wide) - top.tensor[rows(at, axes)]

    parts = Value(Map(data.shape, wide, lambda *at: tirx.exp(moved(*at)), "exp"))
    total = over(node, parts, axes, Rule(SUM, after=lambda x, count: tirx.log(x)), keep=True)
    body = lambda *at: (moved(*at) - total.tensor[rows(at, axes)]).astype(data.dtype)  # noqa: E731
    return Value(Map(data.shape, data.dtype, body, "log_softmax"), name=node.name)


@lowers("Hardmax")
def hardmax(node: OpNode) -> Value:
    """One at the first largest element, zero elsewhere."""
    data = node.input(0)
    axes = _softmax_axes(node, data.ndim)
    shape = data.shape
    if len(axes) > 1:
        data = node.context.reshape(data, [*shape[: axes[0]], simplify(product(shape[axes[0] :]))])
    axis = axes[0]
    best = extremum_position(node, data, axis, largest=True)
    one, zero = tirx.const(1, data.dtype), tirx.const(0, data.dtype)
    body = lambda *at: tirx.Select(tirx.EQ(at[axis], best.tensor[rows(at, [axis])]), one, zero)  # noqa: E731
    result = Value(Map(data.shape, data.dtype, body, "hardmax"), name=node.name)
    if len(axes) == 1:
        return result
    node.context.realize([result], "hardmax")
    return node.context.reshape(result, shape)


# -- mean and variance -----------------------------------------------------------------------------------------


def moments(node: OpNode, data: Value, axes: Sequence[int], wide: str) -> tuple[Value, Value]:
    """Mean and variance over ``axes``, which keep extent one, in type ``wide``."""
    mean = over(node, data, axes, Rule(SUM, after=lambda x, count: x / count.astype(wide)), keep=True, dtype=wide)

    def centred(*at: Expr) -> Expr:
        return data.tensor[at].astype(wide) - mean.tensor[rows(at, axes)]

    parts = Value(Map(data.shape, wide, centred, "centred"))
    mean_square = Rule(SUM, before=lambda x: x * x, after=lambda x, count: x / count.astype(wide))
    return mean, over(node, parts, axes, mean_square, keep=True)


def inverse_root(value: Value, epsilon: float) -> Value:
    """``1 / sqrt(value + epsilon)``."""

    def body(*at: Expr) -> Expr:
        x = value.tensor[at]
        return like(x, 1) / tirx.sqrt(x + like(x, epsilon))

    return Value(Map(value.shape, value.dtype, body, "inverse_root"))


def _trailing(value: Value | None, at: Sequence[Expr], shape: Sequence[Expr], wide: str) -> Expr | None:
    """Element of a scale or bias whose axes are the last ones of ``shape``."""
    if value is None:
        return None
    skip = len(shape) - value.ndim
    return value.tensor[broadcast_index(value.shape, at[skip:], shape[skip:])].astype(wide)


def _affine(x: Expr, scale: Expr | None, bias: Expr | None) -> Expr:
    scaled = x if scale is None else x * scale
    return scaled if bias is None else scaled + bias


@lowers("LayerNormalization")
def layer_normalization(node: OpNode) -> list[Value]:
    """``(x - mean) / sqrt(variance + epsilon) · scale + bias`` from ``axis`` on, the mean and 1/deviation."""
    data, scale, bias = node.input(0), node.optional(1), node.optional(2)
    axes = list(range(axis_attr(node, data.ndim, -1), data.ndim))
    wide = _stash_dtype(node, data.dtype)
    for value in (scale, bias):
        if value is not None:
            node.context.tensor(value)
    mean, variance = moments(node, data, axes, wide)
    inverse = inverse_root(variance, node.attr("epsilon", 1e-5))

    def body(*at: Expr) -> Expr:
        x = (data.tensor[at].astype(wide) - mean.tensor[rows(at, axes)]) * inverse.tensor[rows(at, axes)]
        parts = (_trailing(scale, at, data.shape, wide), _trailing(bias, at, data.shape, wide))
        return _affine(x, *parts).astype(data.dtype)

    result = Value(Map(data.shape, data.dtype, body, "layer_norm"), name=node.name)
    return [result, mean, inverse][: node.n_outputs]


def _stash_dtype(node: OpNode, dtype: str) -> str:
    stash = dtype_name(ir.DataType(node.attr("stash_type", 1)))
    return "float64" if dtype == "float64" and node.n_outputs == 1 else accumulator(stash)


@lowers("RMSNormalization", "SimplifiedLayerNormalization")
def rms_normalization(node: OpNode) -> Value:
    """``x / sqrt(mean(x²) + epsilon) · scale`` over the axes from ``axis`` on."""
    data, scale = node.input(0), node.input(1)
    axes = list(range(axis_attr(node, data.ndim, -1), data.ndim))
    wide = "float64" if data.dtype == "float64" else "float32"
    node.context.tensor(scale)
    mean_square = Rule(SUM, before=lambda x: x * x, after=lambda x, count: x / count.astype(wide))
    inverse = inverse_root(over(node, data, axes, mean_square, keep=True, dtype=wide), node.attr("epsilon", 1e-5))

    def body(*at: Expr) -> Expr:
        x = data.tensor[at].astype(wide) * inverse.tensor[rows(at, axes)]
        return _affine(x, _trailing(scale, at, data.shape, wide), None).astype(data.dtype)

    return Value(Map(data.shape, data.dtype, body, "rms_norm"), name=node.name)


@lowers("InstanceNormalization")
def instance_normalization(node: OpNode) -> Value:
    """Each channel of each instance by its own mean and variance."""
    data, scale, bias = node.input(0), node.input(1), node.input(2)
    return _by_channel(node, data, list(range(2, data.ndim)), scale, bias)


def _by_channel(node: OpNode, data: Value, axes: list[int], scale: Value, bias: Value) -> Value:
    wide = accumulator(data.dtype)
    mean, variance = moments(node, data, axes, wide)
    inverse = inverse_root(variance, node.attr("epsilon", 1e-5))
    for value in (scale, bias):
        node.context.tensor(value)

    def body(*at: Expr) -> Expr:
        x = (data.tensor[at].astype(wide) - mean.tensor[rows(at, axes)]) * inverse.tensor[rows(at, axes)]
        return _affine(x, scale.tensor[at[1]].astype(wide), bias.tensor[at[1]].astype(wide)).astype(data.dtype)

    return Value(Map(data.shape, data.dtype, body, "normalize"), name=node.name)


@lowers("GroupNormalization")
def group_normalization(node: OpNode) -> Value:
    """Groups of channels by their own mean and variance; scale and bias by channel (by group before opset 21)."""
    data, scale, bias = node.input(0), node.input(1), node.input(2)
    groups = node.attr("num_groups")
    n, channels, *spatial = data.shape
    each = simplify(tirx.floordiv(channels, i64(groups)))
    grouped = node.context.reshape(data, [n, i64(groups), each, simplify(product(spatial))])
    wide = accumulator(data.dtype)
    mean, variance = moments(node, grouped, [2, 3], wide)
    inverse = inverse_root(variance, node.attr("epsilon", 1e-5))
    for value in (scale, bias):
        node.context.tensor(value)

    def body(*at: Expr) -> Expr:
        x = (grouped.tensor[at].astype(wide) - mean.tensor[rows(at, [2, 3])]) * inverse.tensor[rows(at, [2, 3])]
        entry = at[1] * each + at[2] if node.opset >= 21 else at[1]
        return _affine(x, scale.tensor[entry].astype(wide), bias.tensor[entry].astype(wide)).astype(data.dtype)

    result = Value(Map(grouped.shape, data.dtype, body, "group_norm"), name=node.name)
    node.context.realize([result], "group_norm")
    return node.context.reshape(result, data.shape)


@lowers("BatchNormalization")
def batch_normalization(node: OpNode) -> list[Value]:
    """Channels by given statistics, or in training mode by those of the batch."""
    data, scale, bias, mean, variance = (node.input(n) for n in range(5))
    epsilon = node.attr("epsilon", 1e-5)
    if node.attr("training_mode", 0):
        return _training_batch(node, data, scale, bias, mean, variance)
    if node.n_outputs > 1:
        raise NotLowered("batch normalization of the older training form")
    wide = accumulator(data.dtype)
    factor, offset = _folded(node, [scale, bias, mean, variance], epsilon, wide)

    def body(*at: Expr) -> Expr:
        channel = at[1] if len(at) > 1 else i64(0)
        return (data.tensor[at].astype(wide) * factor.tensor[channel] + offset.tensor[channel]).astype(data.dtype)

    node.context.tensor(data)
    return [Value(Map(data.shape, data.dtype, body, "batch_norm"), name=node.name)]


def _folded(node: OpNode, values: Sequence[Value], epsilon: float, wide: str) -> tuple[Value, Value]:
    """Factor and offset of each channel, computed at compile time where the statistics are constants."""
    arrays = [v.constant for v in values]
    if all(a is not None for a in arrays):
        scale, bias, mean, variance = (np.asarray(a, dtype="float64") for a in arrays)
        factor = scale / np.sqrt(variance + epsilon)
        offset = bias - mean * factor
        return tuple(
            node.context.constant(a.astype(wide), f"{node.name}_{k}")
            for k, a in (("factor", factor), ("offset", offset))
        )  # type: ignore[return-value]
    for value in values:
        node.context.tensor(value)
    scale_, bias_, mean_, variance_ = values

    def factor_of(c: Expr) -> Expr:
        spread = variance_.tensor[c].astype(wide)
        return scale_.tensor[c].astype(wide) / tirx.sqrt(spread + like(spread, epsilon))

    slope = Value(Map(scale_.shape, wide, factor_of, "factor"))
    shift = lambda c: bias_.tensor[c].astype(wide) - mean_.tensor[c].astype(wide) * slope.tensor[c]  # noqa: E731
    return slope, Value(Map(scale_.shape, wide, shift, "offset"))


def _training_batch(node: OpNode, data: Value, scale: Value, bias: Value, mean: Value, variance: Value) -> list[Value]:
    axes = [d for d in range(data.ndim) if d != 1]
    momentum, wide = node.attr("momentum", 0.9), accumulator(data.dtype)
    result = _by_channel(node, data, axes, scale, bias)
    batch = moments(node, data, axes, wide)
    outputs = [result]
    for old, new in zip((mean, variance), batch, strict=True):
        node.context.tensor(old)

        def body(c: Expr, old: Value = old, new: Value = new) -> Expr:
            before, now = old.tensor[c].astype(wide), new.tensor[rows([c] * data.ndim, axes)]
            return (before * like(before, momentum) + now * like(now, 1 - momentum)).astype(old.dtype)

        outputs.append(Value(Map(old.shape, old.dtype, body, "running"), name=node.name))
    return outputs[: node.n_outputs]


@lowers("MeanVarianceNormalization")
def mean_variance_normalization(node: OpNode) -> Value:
    """``(x - mean) / (deviation + 1e-9)``."""
    data = node.input(0)
    axes = sorted(a % data.ndim for a in node.attr("axes", [0, 2, 3]))
    wide = accumulator(data.dtype)
    mean, variance = moments(node, data, axes, wide)

    def body(*at: Expr) -> Expr:
        spread = tirx.sqrt(variance.tensor[rows(at, axes)])
        return ((data.tensor[at].astype(wide) - mean.tensor[rows(at, axes)]) / (spread + like(spread, 1e-9))).astype(
            data.dtype
        )

    return Value(Map(data.shape, data.dtype, body, "normalize"), name=node.name)


@lowers("LpNormalization")
def lp_normalization(node: OpNode) -> Value:
    """Vectors along an axis divided by their norm; those of norm zero stay zero."""
    data = node.input(0)
    axes, wide = [axis_attr(node, data.ndim, -1)], accumulator(data.dtype)
    if node.attr("p", 2) == 1:
        rule = Rule(SUM, before=tirx.abs)
    else:
        rule = Rule(SUM, before=lambda x: x * x, after=lambda x, count: tirx.sqrt(x))
    norm = over(node, data, axes, rule, keep=True, dtype=wide)

    def body(*at: Expr) -> Expr:
        length = norm.tensor[rows(at, axes)]
        zero = like(length, 0)
        safe = tirx.Select(tirx.EQ(length, zero), like(length, 1), length)
        return tirx.Select(tirx.EQ(length, zero), zero, data.tensor[at].astype(wide) / safe).astype(data.dtype)

    return Value(Map(data.shape, data.dtype, body, "normalize"), name=node.name)


@lowers("LRN")
def local_response_normalization(node: OpNode) -> Value:
    """Each element divided by a power of the squares of its neighbouring channels (Krizhevsky et al. 2012)."""
    data, size = node.input(0), node.attr("size")
    alpha, beta, bias = node.attr("alpha", 1e-4), node.attr("beta", 0.75), node.attr("bias", 1.0)
    wide, channels = accumulator(data.dtype), data.shape[1]
    node.context.tensor(data)

    def neighbour(at: Sequence[Expr], shift: int) -> Expr:
        channel = at[1] + shift
        inside = tirx.all(channel >= i64(0), channel < channels)
        nearest = tirx.max(tirx.min(channel, channels - 1), i64(0))
        x = data.tensor[(at[0], nearest, *at[2:])].astype(wide)
        return tirx.Select(inside, x * x, like(x, 0))

    def squares(*at: Expr) -> Expr:
        first = -((size - 1) // 2)
        total = neighbour(at, first)
        for shift in range(first + 1, first + size):
            total = total + neighbour(at, shift)
        return total

    around = Value(Map(data.shape, wide, squares, "squares"))

    def body(*at: Expr) -> Expr:
        total = around.tensor[at]
        return (
            data.tensor[at].astype(wide)
            / tirx.pow(like(total, bias) + like(total, alpha / size) * total, like(total, beta))
        ).astype(data.dtype)

    return Value(Map(data.shape, data.dtype, body, "lrn"), name=node.name)
