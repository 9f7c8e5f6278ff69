"""Resize and Upsample.

Interpolation is separable: one axis after another, each with a small table of source positions and weights. Positions
are computed in double precision, as in the reference implementation of the standard.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import SUM, Map, Reduction, Tensor
from mmopt.backends.expressions import simplify
from mmopt.lowering.ops.elementwise import accumulator, is_float
from mmopt.lowering.ops.extents import constant_axes, i64, integers, known, named, pick, settled
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import NotLowered, Value

_UNROLLED = 8
"""Taps up to this number are written out; more are a reduction."""


def f64(value: float | Expr) -> Expr:
    """A double."""
    return tirx.const(float(value), "float64") if isinstance(value, int | float) else value.astype("float64")


@dataclasses.dataclass(frozen=True)
class Axis:
    """One resized axis.

    Attributes:
        axis: Which.
        size: Extent of the operand.
        out: Extent of the result.
        scale: Gives the scale, inside a kernel.
        least: A lower bound of the scale when one is known.
        region: Gives start and end of the region of interest.
    """

    axis: int
    size: Expr
    out: Expr
    scale: Callable[[], Expr]
    least: float | None
    region: Callable[[], tuple[Expr, Expr]]


@lowers("Resize", "Upsample")
def resize(node: OpNode) -> Value:
    """Interpolation to other extents: nearest, linear or cubic."""
    data, mode = node.input(0), node.attr("mode", "nearest")
    if mode != "nearest" and not is_float(data.dtype):
        raise NotLowered(f"{mode} interpolation of {data.dtype}")
    axes = [a for a in _axes(node, data) if not _unchanged(a)]
    result = data
    for axis in axes:
        taps = _taps(node, axis, mode)
        result = _nearest(node, result, axis) if taps is None else _interpolated(node, result, axis, taps)
    if _transformation(node) == "tf_crop_and_resize":
        result = _extrapolated(node, result, axes, data.dtype)
    if result.dtype != data.dtype:
        inner = result
        result = Value(Map(inner.shape, data.dtype, lambda *at: inner.tensor[at].astype(data.dtype), "resize"))
    return result


def _unchanged(axis: Axis) -> bool:
    size, out = known(axis.size), known(axis.out)
    return size is not None and size == out and axis.least == 1.0


# -- extents and scales ----------------------------------------------------------------------------------------


def _axes(node: OpNode, data: Value) -> list[Axis]:
    older = node.op_type == "Upsample" or node.opset < 11
    scales, sizes = node.optional(1 if older else 2), None if older else node.optional(3)
    chosen = constant_axes(node.attr("axes") or list(range(data.ndim)), data.ndim)
    if scales is not None and known(scales.shape[0]) == 0:
        scales = None
    if scales is not None:
        return _by_scales(node, data, chosen, scales)
    if sizes is None:
        raise NotLowered("neither scales nor sizes are given")
    return _by_sizes(node, data, chosen, sizes)


def _region(node: OpNode, position: int, count: int) -> Callable[[], tuple[Expr, Expr]]:
    roi = node.optional(1) if node.op_type == "Resize" and node.opset >= 11 else None

    def ends() -> tuple[Expr, Expr]:
        if roi is None:
            return f64(0), f64(1)
        return f64(roi.tensor[i64(position)]), f64(roi.tensor[i64(count + position)])

    return ends


def _by_scales(node: OpNode, data: Value, chosen: Sequence[int], scales: Value) -> list[Axis]:
    node.context.tensor(scales)
    given = None if scales.constant is None else [float(s) for s in scales.constant.reshape(-1)]
    shape = list(data.shape)
    if given is not None and all(
        known(data.shape[d]) is not None or _is_ratio(s) for d, s in zip(chosen, given, strict=True)
    ):
        for d, factor in zip(chosen, given, strict=True):
            shape[d] = _scaled(data.shape[d], factor)
        shape = settled(node, shape)
    else:
        for d, extent in zip(chosen, _data_extents(node, [data.shape[d] for d in chosen], scales), strict=True):
            shape[d] = extent
        shape = named(node, shape, "resize")
    axes: list[Axis] = []
    for n, d in enumerate(chosen):
        least = given[n] if given is not None else _least(data.shape[d], shape[d])
        scale = _scale_at(scales, n) if given is None else _constant(given[n])
        axes.append(Axis(d, data.shape[d], shape[d], scale, least, _region(node, n, len(chosen))))
    return axes


def _scale_at(scales: Value, position: int) -> Callable[[], Expr]:
    return lambda: f64(scales.tensor[i64(position)])


def _constant(scale: float) -> Callable[[], Expr]:
    return lambda: f64(scale)


def _is_ratio(scale: float) -> bool:
    """Whether a scale is a small binary fraction, so that scaling an integer is exact."""
    return scale * 64 == int(scale * 64)


def _scaled(extent: Expr, scale: float) -> Expr:
    size = known(extent)
    if size is not None:
        return i64(math.floor(np.float32(size) * np.float32(scale)))
    return simplify(tirx.floordiv(extent * int(scale * 64), i64(64)))


def _data_extents(node: OpNode, extents: Sequence[Expr], scales: Value) -> list[Expr]:
    def body(n: Expr) -> Expr:
        size = pick(n, extents).astype("float32")
        return tirx.floor(size * scales.tensor[n].astype("float32")).astype("int64")

    return node.context.runtime_extents(Value(Map([len(extents)], "int64", body, "extents")), "resize")


def _least(size: Expr, out: Expr) -> float | None:
    """A lower bound of a scale that gives ``out`` from ``size``."""
    a, b = known(size), known(out)
    return b / a if a and b is not None else None


def _by_sizes(node: OpNode, data: Value, chosen: Sequence[int], sizes: Value) -> list[Axis]:
    given = [data.shape[d] for d in chosen]
    wanted = integers(node, sizes, "sizes")
    outs, scale = _fit(node, given, wanted.items)
    shape = list(data.shape)
    for d, extent in zip(chosen, outs, strict=True):
        shape[d] = extent
    shape = named(node, shape, "resize") if wanted.data or scale is not None else settled(node, shape)
    axes: list[Axis] = []
    for n, d in enumerate(chosen):
        ratio = scale or _ratio(shape[d], data.shape[d])
        least = _least(data.shape[d], shape[d])
        axes.append(Axis(d, data.shape[d], shape[d], ratio, least, _region(node, n, len(chosen))))
    return axes


def _ratio(out: Expr, size: Expr) -> Callable[[], Expr]:
    return lambda: f64(out) / f64(size)


def _fit(node: OpNode, given: Sequence[Expr], wanted: list[Expr]) -> tuple[list[Expr], Callable[[], Expr] | None]:
    """Extents after the aspect ratio has been kept, and the scale common to all axes where it is."""
    policy = node.attr("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return wanted, None
    sizes, outs = [known(g) for g in given], [known(w) for w in wanted]
    if None not in sizes and None not in outs:
        ratios = [o / g for o, g in zip(outs, sizes, strict=True)]  # type: ignore[operator]
        factor = min(ratios) if policy == "not_larger" else max(ratios)
        return [i64(math.floor(factor * g + 0.5)) for g in sizes], _constant(factor)  # type: ignore[operator]
    merge = tirx.min if policy == "not_larger" else tirx.max

    def scale() -> Expr:
        return _common(wanted, given, merge)

    return _fitted(node, given, scale), scale


def _common(outs: Sequence[Expr], given: Sequence[Expr], merge: Callable[[Expr, Expr], Expr]) -> Expr:
    ratios = [f64(o) / f64(g) for o, g in zip(outs, given, strict=True)]
    total = ratios[0]
    for ratio in ratios[1:]:
        total = merge(total, ratio)
    return total


def _fitted(node: OpNode, given: Sequence[Expr], fit: Callable[[], Expr]) -> list[Expr]:
    body = lambda n: tirx.floor(fit() * f64(pick(n, given)) + f64(0.5)).astype("int64")  # noqa: E731
    return node.context.runtime_extents(Value(Map([len(given)], "int64", body, "extents")), "resize")


# -- positions -------------------------------------------------------------------------------------------------


def _transformation(node: OpNode) -> str:
    if node.op_type == "Upsample" or node.opset < 11:
        return "asymmetric"
    return str(node.attr("coordinate_transformation_mode", "half_pixel"))


def _source_position(node: OpNode, axis: Axis, at: Expr) -> Expr:
    """Where element ``at`` of the result lies in the operand, as a double."""
    mode, x, scale = _transformation(node), f64(at), axis.scale()
    size = f64(axis.size)
    length = scale * size
    single = tirx.EQ(length, f64(1))
    steps = tirx.Select(single, f64(1), length - f64(1))
    half = (x + f64(0.5)) / scale - f64(0.5)
    if mode == "half_pixel":
        return half
    if mode == "pytorch_half_pixel":
        return tirx.Select(single, f64(-0.5), half)
    if mode == "asymmetric":
        return x / scale
    if mode == "align_corners":
        return tirx.Select(single, f64(0), x * (size - f64(1)) / steps)
    if mode == "half_pixel_symmetric":
        return size / f64(2) * (f64(1) - f64(axis.out) / length) + half
    if mode == "tf_crop_and_resize":
        start, end = axis.region()
        extent = (end - start) * (size - f64(1))
        return start * (size - f64(1)) + tirx.Select(single, extent / f64(2), x * extent / steps)
    raise NotLowered(f"coordinates by {mode}")


def _clamped(position: Expr, size: Expr) -> Expr:
    return tirx.max(tirx.min(position, size - 1), i64(0))


_ROUNDINGS: dict[str, Callable[[Expr], Expr]] = {
    "round_prefer_floor": lambda x: tirx.ceil(x - f64(0.5)),
    "round_prefer_ceil": lambda x: tirx.floor(x + f64(0.5)),
    "floor": tirx.floor,
    "ceil": tirx.ceil,
}


def _nearest(node: OpNode, data: Value, axis: Axis) -> Value:
    older = node.op_type == "Upsample" or node.opset < 11
    rounding = _ROUNDINGS["floor" if older else node.attr("nearest_mode", "round_prefer_floor")]

    def source(o: Expr) -> Expr:
        return _clamped(rounding(_source_position(node, axis, o)).astype("int64"), axis.size)

    table = Map([axis.out], "int64", source, "positions")
    shape = [axis.out if d == axis.axis else e for d, e in enumerate(data.shape)]
    node.context.tensor(data)

    def body(*at: Expr) -> Expr:
        return data.tensor[(*at[: axis.axis], table[at[axis.axis]], *at[axis.axis + 1 :])]

    return Value(Map(shape, data.dtype, body, "nearest"), name=node.name)


# -- weights ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Taps:
    """Neighbours that make up one element: ``count`` from ``floor(position) + first`` on."""

    count: int
    first: int
    weight: Callable[[Expr], Expr]


def _taps(node: OpNode, axis: Axis, mode: str) -> Taps | None:
    """Neighbours and the weight of one at a distance; ``None`` for the nearest only."""
    if mode == "nearest":
        return None
    support = 2 if mode == "cubic" else 1
    weight = _linear if support == 1 else lambda x: _cubic(x, float(node.attr("cubic_coeff_a", -0.75)))
    if not node.attr("antialias", 0):
        return Taps(2 * support, 1 - support, weight)
    if axis.least is None:
        raise NotLowered("antialiasing with a scale only known at run time")
    first = math.floor(-support / min(axis.least, 1.0)) + 1
    return Taps(2 - 2 * first, first, weight)


def _linear(distance: Expr) -> Expr:
    return tirx.max(f64(1) - tirx.abs(distance), f64(0))


def _cubic(distance: Expr, a: float) -> Expr:
    """Keys' cubic convolution kernel (Keys 1981)."""
    x = tirx.abs(distance)
    near = ((f64(a + 2) * x - f64(a + 3)) * x) * x + f64(1)
    far = ((f64(a) * x - f64(5 * a)) * x + f64(8 * a)) * x - f64(4 * a)
    return tirx.Select(x <= f64(1), near, tirx.Select(x < f64(2), far, f64(0)))


def _tables(node: OpNode, axis: Axis, taps: Taps) -> tuple[Tensor, Tensor]:
    """Source positions and weights, ``[out, taps]``."""
    exclude, smooth = bool(node.attr("exclude_outside", 0)), bool(node.attr("antialias", 0))

    position = Map([axis.out], "float64", lambda o: _source_position(node, axis, o), "position")

    def neighbour(o: Expr, k: Expr) -> Expr:
        return tirx.floor(position[o]).astype("int64") + taps.first + k

    def plain(o: Expr, k: Expr) -> Expr:
        place = neighbour(o, k)
        stretch = tirx.min(axis.scale(), f64(1)) if smooth else f64(1)
        weight = taps.weight((f64(place) - position[o]) * stretch)
        inside = tirx.all(place >= i64(0), place < axis.size)
        return tirx.Select(inside, weight, f64(0)) if exclude else weight

    shape = [axis.out, i64(taps.count)]
    places = Map(shape, "int64", lambda o, k: _clamped(neighbour(o, k), axis.size), "positions")
    raw = Map(shape, "float64", plain, "weights")
    if not exclude and not smooth:
        return places, raw
    total = Reduction([axis.out], [taps.count], ("float64",), lambda o, k: raw[o, k], SUM)
    return places, Map(shape, "float64", lambda o, k: raw[o, k] / total[o], "weights")


def _interpolated(node: OpNode, data: Value, axis: Axis, taps: Taps) -> Value:
    wide = accumulator(data.dtype)
    shape = [axis.out if d == axis.axis else e for d, e in enumerate(data.shape)]
    tables = [Value(t) for t in _tables(node, axis, taps)]
    node.context.realize(tables, "resize_table")
    node.context.realize([data], "resize")
    places, weights = (t.tensor for t in tables)

    def part(at: Sequence[Expr], k: Expr) -> Expr:
        o = at[axis.axis]
        element = data.tensor[(*at[: axis.axis], places[o, k], *at[axis.axis + 1 :])]
        return weights[o, k].astype(wide) * element.astype(wide)

    if taps.count > _UNROLLED:
        return Value(Reduction(shape, [taps.count], (wide,), lambda *at: part(at[:-1], at[-1]), SUM), name=node.name)

    def body(*at: Expr) -> Expr:
        total = part(at, i64(0))
        for k in range(1, taps.count):
            total = total + part(at, i64(k))
        return total

    return Value(Map(shape, wide, body, "resize"), name=node.name)


def _extrapolated(node: OpNode, data: Value, axes: Sequence[Axis], dtype: str) -> Value:
    """Elements whose source lies outside the operand are a constant."""
    value = node.attr("extrapolation_value", 0.0)
    node.context.tensor(data)

    def outside(axis: Axis, o: Expr) -> Expr:
        position = _source_position(node, axis, o)
        return tirx.any(position < f64(0), position > f64(axis.size) - f64(1))

    tables = {a.axis: Map([a.out], "bool", lambda o, a=a: outside(a, o), "outside") for a in axes}

    def body(*at: Expr) -> Expr:
        beyond = [tables[d][at[d]] for d in tables]
        return tirx.Select(
            tirx.any(*beyond) if len(beyond) > 1 else beyond[0], tirx.const(value, data.dtype), data.tensor[at]
        )

    return Value(Map(data.shape, data.dtype, body, "extrapolate"), name=node.name) if tables else data
