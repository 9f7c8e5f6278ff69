"""Reading images between their pixels: sampling grids, regions, deformed windows, and columns put back into images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import SUM, Map, Reduction, Tensor
from mmopt.backends.cpu.loops import product
from mmopt.backends.expressions import simplify
from mmopt.lowering.ops.elementwise import accumulator
from mmopt.lowering.ops.extents import i64, integers, named, settled
from mmopt.lowering.ops.pooling import windows_of
from mmopt.lowering.ops.reduction import LARGEST
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import Value, static_shape

Pixel = Callable[[Sequence[Expr]], Expr]
"""Gives a pixel at spatial integer positions."""


def like(x: Expr, value: float) -> Expr:
    """``value`` as a constant of the type of ``x``."""
    return tirx.const(value, str(x.ty))


# -- interpolation ---------------------------------------------------------------------------------------------


def _reflect(x: Expr, low: Expr, high: Expr) -> Expr:
    """``x`` mirrored at both borders until it lies between them."""
    span = high - low
    period = tirx.max(span + span, like(span, 1e-6))
    phase = x - low
    phase = phase - tirx.floor(phase / period) * period
    return low + tirx.Select(phase <= span, phase, period - phase)


def _borders(size: Expr, dtype: str, align: bool) -> tuple[Expr, Expr]:
    low, shift = (0.0, 1.0) if align else (-0.5, 0.5)
    return tirx.const(low, dtype), size.astype(dtype) - tirx.const(shift, dtype)


def _clamp(position: Expr, size: Expr) -> Expr:
    return tirx.max(tirx.min(position, size - 1), i64(0))


def _pixels(tensor: Tensor, lead: Sequence[Expr], sizes: Sequence[Expr], mode: str, align: bool, dtype: str) -> Pixel:
    """Pixels of one image, with those outside made as ``mode`` says."""

    def pixel(at: Sequence[Expr]) -> Expr:
        if mode == "reflection":
            borders = [_borders(s, dtype, align) for s in sizes]
            at = [_reflect(p.astype(dtype), *b).astype("int64") for p, b in zip(at, borders, strict=True)]
        value = tensor[(*lead, *(_clamp(p, s) for p, s in zip(at, sizes, strict=True)))].astype(dtype)
        if mode != "zeros":
            return value
        inside = [t for p, s in zip(at, sizes, strict=True) for t in (p >= i64(0), p < s)]
        return tirx.Select(tirx.all(*inside), value, tirx.const(0, dtype))

    return pixel


def _cubic_weights(ratio: Expr) -> list[Expr]:
    """Keys' cubic convolution with a = -0.75 at the four neighbours (Keys 1981)."""
    a = -0.75

    def near(x: Expr) -> Expr:
        return (like(x, a + 2) * x - like(x, a + 3)) * x * x + like(x, 1)

    def far(x: Expr) -> Expr:
        return ((like(x, a) * x - like(x, 5 * a)) * x + like(x, 8 * a)) * x - like(x, 4 * a)

    one = like(ratio, 1)
    return [far(ratio + one), near(ratio), near(one - ratio), far(one - ratio + one)]


def interpolated(pixel: Pixel, at: Sequence[Expr], mode: str) -> Expr:
    """The image at real positions ``at``: the nearest pixel, or weighted neighbours."""
    if mode == "nearest":
        return pixel([p.astype("int64") for p in at])
    lows = [tirx.floor(p) for p in at]
    ratios = [p - low for p, low in zip(at, lows, strict=True)]
    bases = [low.astype("int64") for low in lows]
    weights = [_cubic_weights(r) if mode == "cubic" else [like(r, 1) - r, r] for r in ratios]
    first = -1 if mode == "cubic" else 0
    total: Expr | None = None
    for taps in itertools.product(range(4 if mode == "cubic" else 2), repeat=len(at)):
        part = pixel([b + (first + t) for b, t in zip(bases, taps, strict=True)])
        for axis, tap in enumerate(taps):
            part = part * weights[axis][tap]
        total = part if total is None else total + part
    assert total is not None
    return total


# -- grids -----------------------------------------------------------------------------------------------------


@lowers("GridSample")
def grid_sample(node: OpNode) -> Value:
    """The image at positions of a grid, which span -1 to 1 over its extents."""
    data, grid = node.input(0), node.input(1)
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(node.attr("mode", "linear"), node.attr("mode", "linear"))
    padding, align = node.attr("padding_mode", "zeros"), bool(node.attr("align_corners", 0))
    sizes, wide = data.shape[2:], accumulator(data.dtype)
    rank = len(sizes)
    for value in (data, grid):
        node.context.tensor(value)

    def place(*at: Expr) -> Expr:
        """Real position along spatial axis ``at[-1]``; the grid has the last axis first."""
        axis = at[-1]
        chosen = [
            _denormalized(grid.tensor[(*at[:-1], i64(rank - 1 - d))].astype(wide), sizes[d], align) for d in range(rank)
        ]
        placed = [_into(p, s, mode, padding, align) for p, s in zip(chosen, sizes, strict=True)]
        result = placed[-1]
        for d in range(rank - 2, -1, -1):
            result = tirx.Select(tirx.EQ(axis, i64(d)), placed[d], result)
        return result

    positions = Value(Map([*grid.shape[:-1], i64(rank)], wide, place, "positions"))
    node.context.realize([positions], "grid")

    def body(*at: Expr) -> Expr:
        point = [positions.tensor[(at[0], *at[2:], i64(d))] for d in range(rank)]
        pixel = _pixels(data.tensor, at[:2], sizes, padding, align, wide)
        return interpolated(pixel, point, mode).astype(data.dtype)

    return Value(Map([*data.shape[:2], *grid.shape[1:-1]], data.dtype, body, "grid_sample"), name=node.name)


def _denormalized(n: Expr, size: Expr, align: bool) -> Expr:
    extent = size.astype(str(n.ty))
    if align:
        return (n + like(n, 1)) / like(n, 2) * (extent - like(n, 1))
    return ((n + like(n, 1)) * extent - like(n, 1)) / like(n, 2)


def _into(x: Expr, size: Expr, mode: str, padding: str, align: bool) -> Expr:
    """A position moved into the image where ``padding`` says so. Cubic weights go by the position as it is, as in
    PyTorch, where this operator comes from: only the pixels are moved.
    """
    if mode == "cubic":
        return x
    value = tirx.nearbyint(x) if mode == "nearest" else x
    low, high = _borders(size, str(x.ty), align)
    outside = tirx.any(value < low, value > high)
    if padding == "border":
        nearest = tirx.max(tirx.min(value, size.astype(str(x.ty)) - like(x, 1)), like(x, 0))
        return tirx.Select(outside, nearest, value)
    if padding == "reflection":
        return tirx.Select(outside, _reflect(value, low, high), value)
    return value


@lowers("AffineGrid")
def affine_grid(node: OpNode) -> Value:
    """Positions of every pixel of an image under an affine map, for GridSample."""
    theta = node.input(0)
    size = integers(node, node.input(1), "size")
    rank = len(size.items) - 2
    shape = [size.items[0], *size.items[2:], i64(rank)]
    shape = named(node, shape, "grid") if size.data else settled(node, shape)
    align, wide = bool(node.attr("align_corners", 0)), accumulator(theta.dtype)
    node.context.tensor(theta)

    def centre(position: Expr, extent: Expr) -> Expr:
        x, n = position.astype(wide), extent.astype(wide)
        if align:
            return x * like(x, 2) / tirx.max(n - like(n, 1), like(n, 1)) - like(x, 1)
        return (x * like(x, 2) + like(x, 1)) / n - like(x, 1)

    def body(*at: Expr) -> Expr:
        batch, row, space = at[0], at[-1], at[1:-1]
        total = theta.tensor[batch, row, i64(rank)].astype(wide)
        for d in range(rank):
            point = centre(space[rank - 1 - d], shape[rank - d])
            total = total + theta.tensor[batch, row, i64(d)].astype(wide) * point
        return total.astype(theta.dtype)

    return Value(Map(shape, theta.dtype, body, "affine_grid"), name=node.name)


# -- regions ---------------------------------------------------------------------------------------------------


@lowers("RoiAlign")
def roi_align(node: OpNode) -> Value:
    """Mean (or maximum) of samples in each bin of regions of interest (He et al. 2017)."""
    data, regions, batches = (node.input(n) for n in range(3))
    bins = (node.attr("output_height", 1), node.attr("output_width", 1))
    half = node.opset >= 16 and node.attr("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    scale, ratio = node.attr("spatial_scale", 1.0), node.attr("sampling_ratio", 0)
    largest, wide = node.attr("mode", "avg") == "max", accumulator(data.dtype)
    for value in (data, regions, batches):
        node.context.tensor(value)

    def edge(region: Expr, column: int) -> Expr:
        x = regions.tensor[region, i64(column)].astype(wide) * tirx.const(scale, wide)
        return x - tirx.const(0.5 if half else 0.0, wide)

    def extent(region: Expr, axis: int) -> Expr:
        length = edge(region, 3 - axis) - edge(region, 1 - axis)
        return (length if half else tirx.max(length, tirx.const(1.0, wide))) / tirx.const(bins[axis], wide)

    def samples(region: Expr, axis: int) -> Expr:
        return i64(ratio) if ratio > 0 else tirx.ceil(extent(region, axis)).astype("int64")

    most = [i64(ratio)] * 2 if ratio > 0 else _most_samples(node, regions.shape[0], samples)

    def sample(region: Expr, bin_: Expr, step: Expr, axis: int) -> Expr:
        length = extent(region, axis)
        inside = (
            (step.astype(wide) + tirx.const(0.5, wide)) * length / tirx.max(samples(region, axis), i64(1)).astype(wide)
        )
        return edge(region, 1 - axis) + bin_.astype(wide) * length + inside

    def body(*at: Expr) -> Expr:
        region, channel, row, column, i, j = at
        used = tirx.all(i < samples(region, 0), j < samples(region, 1))
        lead = (i64(batches.tensor[region]), channel)
        parts = _corners(
            data.tensor, lead, data.shape[2:], (sample(region, row, i, 0), sample(region, column, j, 1)), wide
        )
        if largest:
            best = tirx.max(tirx.max(parts[0], parts[1]), tirx.max(parts[2], parts[3]))
            return tirx.Select(used, best, tirx.const(-math.inf, wide))
        return tirx.Select(used, parts[0] + parts[1] + parts[2] + parts[3], tirx.const(0, wide))

    shape = (regions.shape[0], data.shape[1], *bins)
    state = Reduction(shape, most, (wide,), body, LARGEST if largest else SUM)

    def finish(*at: Expr) -> Expr:
        if largest:
            nothing = tirx.EQ(state[at], tirx.const(-math.inf, wide))
            return tirx.Select(nothing, tirx.const(0, wide), state[at]).astype(data.dtype)
        count = tirx.max(samples(at[0], 0) * samples(at[0], 1), i64(1))
        return (state[at] / count.astype(wide)).astype(data.dtype)

    return Value(Map(shape, data.dtype, finish, "roi_align"), name=node.name)


def _most_samples(node: OpNode, count: Expr, samples: Callable[[Expr, int], Expr]) -> list[Expr]:
    """The largest number of samples any region needs along each axis."""
    body = lambda axis, region: tirx.Select(tirx.EQ(axis, i64(0)), samples(region, 0), samples(region, 1))  # noqa: E731
    finish = lambda state: tirx.max(state[0], i64(0))  # noqa: E731
    most = Value(Reduction([2], [count], ("int64",), body, LARGEST, finish))
    return node.context.runtime_extents(most, "samples")


def _corners(tensor: Tensor, lead: Sequence[Expr], sizes: Sequence[Expr], at: Sequence[Expr], wide: str) -> list[Expr]:
    """The four weighted pixels around a point; zeros where it lies more than a pixel outside."""
    outside, lows, highs, weights = [], [], [], []
    for x, size in zip(at, sizes, strict=True):
        outside += [x < tirx.const(-1.0, wide), x > size.astype(wide)]
        inner = tirx.max(x, tirx.const(0.0, wide))
        low = tirx.min(inner.astype("int64"), size - 1)
        high = tirx.min(low + 1, size - 1)
        part = tirx.Select(low >= size - 1, tirx.const(0.0, wide), inner - low.astype(wide))
        lows.append(tirx.max(low, i64(0)))
        highs.append(high)
        weights.append((tirx.const(1.0, wide) - part, part))
    away = tirx.any(*outside)
    parts: list[Expr] = []
    for i, j in itertools.product(range(2), repeat=2):
        pixel = tensor[(*lead, (lows, highs)[i][0], (lows, highs)[j][1])].astype(wide)
        parts.append(tirx.Select(away, tirx.const(0.0, wide), pixel * weights[0][i] * weights[1][j]))
    return parts


# -- windows ---------------------------------------------------------------------------------------------------


@lowers("DeformConv")
def deform_conv(node: OpNode) -> Value:
    """Convolution whose windows are moved pixel by pixel (Zhu et al. 2018)."""
    x, w, offset = (node.input(n) for n in range(3))
    bias, mask = node.optional(3), node.optional(4)
    windows = windows_of(node, x.shape[2:], static_shape(w.shape[2:], "the filter"))
    groups, moved = node.attr("group", 1), node.attr("offset_group", 1)
    rank, wide = len(windows.kernel), accumulator(x.dtype)
    cells = math.prod(windows.kernel)
    for value in (x, w, offset, bias, mask):
        if value is not None:
            node.context.tensor(value)
    per_group = simplify(tirx.floordiv(w.shape[0], i64(groups)))
    per_move = simplify(tirx.floordiv(x.shape[1], i64(moved)))

    def body(*at: Expr) -> Expr:
        n, out, *rest = at
        space, (depth, *steps) = rest[:rank], rest[rank:]
        channel = tirx.floordiv(out, per_group) * w.shape[1] + depth
        cell: Expr = i64(0)
        for step, count in zip(steps, windows.kernel, strict=True):
            cell = cell * count + step
        first = tirx.floordiv(channel, per_move) * cells + cell
        shifts = [offset.tensor[(n, first * rank + d, *space)].astype(wide) for d in range(rank)]
        point = [windows.position(d, space[d], steps[d]).astype(wide) + shifts[d] for d in range(rank)]
        value = interpolated(_pixels(x.tensor, (n, channel), x.shape[2:], "zeros", True, wide), point, "linear")
        if mask is not None:
            value = value * mask.tensor[(n, first, *space)].astype(wide)
        return value * w.tensor[(out, depth, *steps)].astype(wide)

    shape = (x.shape[0], w.shape[0], *offset.shape[2:])
    total = Reduction(shape, w.shape[1:], (wide,), body, SUM)

    def finish(*at: Expr) -> Expr:
        value = total[at] if bias is None else total[at] + bias.tensor[at[1]].astype(wide)
        return value.astype(x.dtype)

    return Value(Map(shape, x.dtype, finish, "deform_conv"), name=node.name)


@lowers("Col2Im")
def col2im(node: OpNode) -> Value:
    """Columns of windows added up into the image they were taken from."""
    data = node.input(0)
    image, block = integers(node, node.input(1), "image"), integers(node, node.input(2), "block")
    rank = len(image.items)
    strides, dilations = node.attr("strides") or [1] * rank, node.attr("dilations") or [1] * rank
    pads = node.attr("pads") or [0] * (2 * rank)
    size = named(node, image.items, "image", _stated_image(node, rank)) if image.data else image.items
    kernel = named(node, block.items, "block", [None] * rank) if block.data else block.items
    cells = simplify(product(kernel))
    channels = simplify(tirx.floordiv(data.shape[1], tirx.max(cells, i64(1))))
    if image.data or block.data:
        (channels,) = named(node, [channels], "channels", [_stated_channels(node)])
    counts: list[Expr] = []
    for d in range(rank):
        room = size[d] + (pads[d] + pads[rank + d] - 1) - (kernel[d] - 1) * dilations[d]
        counts.append(simplify(tirx.floordiv(room, i64(strides[d])) + 1))
    node.context.tensor(data)

    def body(*at: Expr) -> Expr:
        n, channel, space, steps = at[0], at[1], at[2 : 2 + rank], at[2 + rank :]
        tests: list[Expr] = []
        cell, column = i64(0), i64(0)
        for d in range(rank):
            start = space[d] + pads[d] - steps[d] * dilations[d]
            window = tirx.floordiv(start, i64(strides[d]))
            tests += [tirx.EQ(tirx.floormod(start, i64(strides[d])), i64(0)), window >= i64(0), window < counts[d]]
            cell = cell * kernel[d] + steps[d]
            column = column * counts[d] + _clamp(window, counts[d])
        value = data.tensor[n, channel * cells + cell, column]
        return tirx.Select(tirx.all(*tests), value, tirx.const(0, data.dtype))

    return Value(Reduction((data.shape[0], channels, *size), kernel, (data.dtype,), body, SUM), name=node.name)


def _stated_image(node: OpNode, rank: int) -> list[int | None]:
    shape = node.node.outputs[0].shape
    if shape is None:
        return [None] * rank
    return [d if isinstance(d, int) else None for d in list(shape)[2:]]


def _stated_channels(node: OpNode) -> int | None:
    shape = node.node.outputs[0].shape
    extent = shape[1] if shape is not None else None
    return extent if isinstance(extent, int) else None
