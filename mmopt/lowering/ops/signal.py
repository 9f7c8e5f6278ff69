"""Discrete Fourier transforms by direct sums, and the filter bank of the mel scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import SUM, Map, Reduction, Tensor
from mmopt.backends.expressions import simplify
from mmopt.lowering.ops.casting import cast_expr
from mmopt.lowering.ops.elementwise import accumulator
from mmopt.lowering.ops.extents import Integers, constant_axes, declared, i64, integers, known, named, settled
from mmopt.lowering.ops.matmul import product_of
from mmopt.lowering.ops.reduction import split_at
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import Value, dtype_name, static_shape


def _half(length: Expr) -> Expr:
    return simplify(tirx.floordiv(length, i64(2)) + 1)


def _turns(node: OpNode, length: Expr, wide: str) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``2πn / length``."""

    def angle(n: Expr) -> Expr:
        return n.astype("float64") * tirx.const(2 * math.pi, "float64") / tirx.max(length, i64(1)).astype("float64")

    tables = [
        Value(Map([length], wide, lambda n, f=f: f(angle(n)).astype(wide), "turns")) for f in (tirx.cos, tirx.sin)
    ]
    node.context.realize(tables, "turns")
    return tables[0].tensor, tables[1].tensor


def _term(real: Expr, imaginary: Expr, cosine: Expr, sine: Expr, component: Expr, *, inverse: bool) -> Expr:
    """Real (component 0) or imaginary part of ``(real + i·imaginary) · exp(∓i·angle)``."""
    turned = (imaginary * sine, real * sine)
    first = real * cosine - turned[0] if inverse else real * cosine + turned[0]
    second = imaginary * cosine + turned[1] if inverse else imaginary * cosine - turned[1]
    return tirx.Select(tirx.EQ(component, i64(0)), first, second)


@lowers("DFT")
def dft(node: OpNode) -> Value:
    """The Fourier transform along an axis; complex numbers are pairs along the last axis."""
    data = node.input(0)
    inverse, onesided = bool(node.attr("inverse", 0)), bool(node.attr("onesided", 0))
    axis = _axis(node)
    wanted = node.optional(1)
    given = integers(node, wanted, "dft") if wanted is not None else None
    if axis.constants is not None:
        (position,) = constant_axes(axis.constants, data.ndim)
        count, shape = data.shape[position], list(data.shape)
    else:
        position, shape = None, []
        outer, count, inner = named(
            node, split_at(data.shape[:-1], _from_front(axis.items[0], data.ndim)), "dft", [None] * 3
        )
    default = simplify((count - 1) * 2) if inverse and onesided else count
    length = default if given is None else given.items[0]
    if given is not None and given.data:
        (length,) = named(node, [length], "dft", [None])
    points = _half(length) if onesided and not inverse else length
    real_result = inverse and onesided
    if position is not None:
        shape[position], shape[-1] = points, i64(1 if real_result else 2)
        shape = settled(node, shape)
        done = _transform(node, data, (position, count, length, shape), inverse=inverse, onesided=onesided)
        return done
    flat = node.context.reshape(data, [outer, count, inner, data.shape[-1]])
    (points,) = named(node, [points], "points", [None])
    done = _transform(
        node,
        flat,
        (1, count, length, [outer, points, inner, i64(1 if real_result else 2)]),
        inverse=inverse,
        onesided=onesided,
    )
    node.context.realize([done], "dft")
    stated = declared(node)
    full = [_replaced(e, axis.items[0], d, data.ndim, points) for d, e in enumerate(data.shape[:-1])]
    return node.context.reshape(done, named(node, [*full, i64(1 if real_result else 2)], "dft", stated))


def _replaced(extent: Expr, axis: Expr, position: int, rank: int, points: Expr) -> Expr:
    here = tirx.any(tirx.EQ(axis, i64(position)), tirx.EQ(axis, i64(position - rank)))
    return simplify(tirx.Select(here, points, extent))


def _from_front(axis: Expr, rank: int) -> Expr:
    return simplify(tirx.Select(axis < i64(0), axis + rank, axis))


def _axis(node: OpNode) -> Integers:
    if node.opset < 20:
        return Integers([i64(node.attr("axis", 1))], data=False)
    value = node.optional(2)
    return integers(node, value, "axis") if value is not None else Integers([i64(-2)], data=False)


def _transform(
    node: OpNode, data: Value, plan: tuple[int, Expr, Expr, Sequence[Expr]], *, inverse: bool, onesided: bool
) -> Value:
    """The transform along axis ``plan[0]`` of ``plan[1]`` points, of length ``plan[2]``, to shape ``plan[3]``."""
    axis, count, length, shape = plan
    wide = "float64"
    cosine, sine = _turns(node, length, wide)
    terms = _half(length) if inverse and onesided else length
    used = simplify(tirx.min(count, terms)) if not count.same_as(terms) else count
    node.context.tensor(data)
    pairs = known(data.shape[-1]) == 2

    def body(*at: Expr) -> Expr:
        *place, component, t = at
        source = (*place[:axis], t, *place[axis + 1 :])
        real = data.tensor[(*source, i64(0))].astype(wide)
        imaginary = data.tensor[(*source, i64(1))].astype(wide) if pairs else tirx.const(0, wide)
        phase = tirx.floormod(place[axis] * t, tirx.max(length, i64(1)))
        value = _term(real, imaginary, cosine[phase], sine[phase], component, inverse=inverse)
        if not (inverse and onesided):
            return value
        single = tirx.any(tirx.EQ(t, i64(0)), tirx.EQ(t * 2, length))
        return tirx.Select(single, value, value + value)

    def finish(state: tuple[Expr, ...]) -> Expr:
        total = state[0] / length.astype(wide) if inverse else state[0]
        return total.astype(data.dtype)

    return Value(Reduction(shape, [used], (wide,), body, SUM, finish, data.dtype), name=node.name)


@lowers("STFT")
def stft(node: OpNode) -> Value:
    """Fourier transforms of overlapping windows of a signal."""
    signal, step = node.input(0), integers(node, node.input(1), "step")
    window, size = node.optional(2), node.optional(3)
    onesided, wide = bool(node.attr("onesided", 1)), accumulator(signal.dtype)
    sized = integers(node, size, "frame") if size is not None else None
    length = sized.items[0] if sized is not None else window.shape[0] if window is not None else signal.shape[1]
    if sized is not None and sized.data:
        (length,) = named(node, [length], "frame", [None])
    hop = step.items[0]
    frames = simplify(tirx.floordiv(signal.shape[1] - length, tirx.max(hop, i64(1))) + 1)
    points = _half(length) if onesided else length
    shape = [signal.shape[0], frames, points, i64(2)]
    shape = named(node, shape, "stft") if step.data or (sized is not None and sized.data) else settled(node, shape)
    if known(length) is not None and window is not None and known(signal.shape[-1]) != 2:
        return _real_stft(node, signal, window, hop, shape)
    cosine, sine = _turns(node, length, wide)
    for value in (signal, window):
        if value is not None:
            node.context.tensor(value)
    pairs = signal.ndim == 3 and known(signal.shape[-1]) == 2

    def body(batch: Expr, frame: Expr, k: Expr, component: Expr, t: Expr) -> Expr:
        place = (batch, frame * hop + t)
        real = signal.tensor[(*place, i64(0)) if signal.ndim == 3 else place].astype(wide)
        imaginary = signal.tensor[(*place, i64(1))].astype(wide) if pairs else tirx.const(0, wide)
        weight = window.tensor[t].astype(wide) if window is not None else tirx.const(1, wide)
        phase = tirx.floormod(k * t, tirx.max(length, i64(1)))
        return _term(real * weight, imaginary * weight, cosine[phase], sine[phase], component, inverse=False)

    finish = lambda state: state[0].astype(signal.dtype)  # noqa: E731
    used = length if window is None else simplify(tirx.min(length, window.shape[0]))
    return Value(Reduction(shape, [used], (wide,), body, SUM, finish, signal.dtype), name=node.name)


def _real_stft(node: OpNode, signal: Value, window: Value, hop: Expr, shape: Sequence[Expr]) -> Value:
    """The transform of real frames of constant length as a product with a constant matrix."""
    length, points = static_shape([window.shape[0], shape[2]], "the frame")
    angle = 2 * np.pi * np.outer(np.arange(length), np.arange(points)) / length
    matrix = np.stack([np.cos(angle), -np.sin(angle)], axis=-1).reshape(length, 2 * points).astype(signal.dtype)
    for value in (signal, window):
        node.context.tensor(value)

    def frame(batch: Expr, number: Expr, t: Expr) -> Expr:
        place = (batch, number * hop + t)
        return signal.tensor[(*place, i64(0)) if signal.ndim == 3 else place] * window.tensor[t]

    frames = Value(Map([shape[0], shape[1], i64(length)], signal.dtype, frame, "frames"))
    node.context.realize([frames], "frames")
    done = product_of(node, frames, node.context.constant(matrix, "dft"))
    node.context.realize([done], "stft")
    return node.context.reshape(done, shape)


@lowers("MelWeightMatrix")
def mel_weight_matrix(node: OpNode) -> Value:
    """Triangular filters, evenly spaced on the mel scale, over the bins of a spectrum."""
    bins, length, rate, lower, upper = (node.input(n) for n in range(5))
    dtype = dtype_name(ir.DataType(node.attr("output_datatype", int(ir.DataType.FLOAT))))
    mels, spectrum = integers(node, bins, "mels"), integers(node, length, "spectrum")
    shape = [_half(spectrum.items[0]), mels.items[0]]
    shape = named(node, shape, "mel") if mels.data or spectrum.data else settled(node, shape)
    for value in (length, rate, lower, upper):
        node.context.tensor(value)

    def number(value: float) -> Expr:
        return tirx.const(value, "float64")

    def scalar(value: Value) -> Expr:
        return value.tensor[tuple(i64(0) for _ in value.shape)].astype("float64")

    def mel(hertz: Expr) -> Expr:
        return number(2595) * tirx.log(number(1) + hertz / number(700)) / number(math.log(10))

    def edge(n: Expr) -> Expr:
        low, high = mel(scalar(lower)), mel(scalar(upper))
        at = n.astype("float64") * ((high - low) / (shape[1] + 2).astype("float64")) + low
        hertz = number(700) * (tirx.exp(at / number(2595) * number(math.log(10))) - number(1))
        return tirx.floor((scalar(length) + number(1)) * hertz / scalar(rate)).astype("int64")

    edges = Value(Map([simplify(shape[1] + 2)], "int64", edge, "edges"))
    node.context.realize([edges], "edges")

    def body(j: Expr, i: Expr) -> Expr:
        left, centre, right = (edges.tensor[i + n] for n in range(3))
        rising = (j - left).astype("float64") / tirx.max(centre - left, i64(1)).astype("float64")
        falling = (right - j).astype("float64") / tirx.max(right - centre, i64(1)).astype("float64")
        below = tirx.Select(tirx.all(j >= left, j <= centre), rising, number(0))
        peak = tirx.Select(tirx.EQ(j, centre), number(1), number(0))
        value = tirx.Select(tirx.EQ(left, centre), peak, below)
        return cast_expr(tirx.Select(tirx.all(j >= centre, j < right), falling, value), dtype)

    return Value(Map(shape, dtype, body, "mel"), name=node.name)
