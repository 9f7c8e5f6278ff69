"""Convolutions: blocked templates for constant filters, a generic reduction for everything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import SUM, Map, Reduction, Source, Tensor, guarded, index
from mmopt.backends.cpu.choosing import Workload, dim
from mmopt.backends.cpu.kernels.conv import Window, channel_block, pack_filters
from mmopt.backends.cpu.kernels.conv_depthwise import (
    DepthwiseConvolution,
    depthwise_candidates,
    depthwise_workload,
)
from mmopt.backends.cpu.kernels.conv_direct import DirectConvolution
from mmopt.backends.cpu.kernels.conv_patches import Convolved, direct_candidates, patch_of
from mmopt.backends.cpu.kernels.tile import lanes_of
from mmopt.backends.cpu.kernels.winograd import WinogradConvolution
from mmopt.backends.cpu.kernels.winograd_cut import Cut, cut_of, winograd_candidates
from mmopt.backends.cpu.kernels.winograd_transform import transform_filters
from mmopt.backends.cpu.loops import product, static
from mmopt.backends.expressions import simplify
from mmopt.lowering.ops.conv_narrow import BYTES, known_widened, narrow_convolution
from mmopt.lowering.ops.conv_transpose import in_phases
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import NotLowered, Value, plain_view, static_shape

_TEMPLATE_DTYPES = ("float32", "float64")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Attributes of a convolution-like operator, with automatic padding resolved."""

    window: Window
    begin: tuple[Expr, ...]
    end: tuple[Expr, ...]

    @property
    def padded(self) -> bool:
        return any(static(p) != 0 for p in (*self.begin, *self.end))

    def padded_extents(self, space: Sequence[Expr]) -> tuple[Expr, ...]:
        return tuple(simplify(s + b + e) for s, b, e in zip(space, self.begin, self.end, strict=True))


def geometry(node: OpNode, space: Sequence[Expr], kernel: tuple[int, ...]) -> Geometry:
    """Strides, dilations and padding of ``node`` for an input of ``space``."""
    rank = len(kernel)
    strides = tuple(node.attr("strides") or [1] * rank)
    dilations = tuple(node.attr("dilations") or [1] * rank)
    window = Window(kernel, strides, dilations)
    mode = node.attr("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        totals = [_same_padding(s, k, st, d) for s, k, st, d in zip(space, kernel, strides, dilations, strict=True)]
        small = [simplify(tirx.floordiv(t, index(2))) for t in totals]
        large = [simplify(t - s) for t, s in zip(totals, small, strict=True)]
        begin, end = (small, large) if mode == "SAME_UPPER" else (large, small)
        return Geometry(window, tuple(begin), tuple(end))
    pads = (node.attr("pads") or [0] * (2 * rank)) if mode == "NOTSET" else [0] * (2 * rank)
    return Geometry(window, tuple(index(p) for p in pads[:rank]), tuple(index(p) for p in pads[rank:]))


def _same_padding(extent: Expr, kernel: int, stride: int, dilation: int) -> Expr:
    out = tirx.floordiv(extent + (stride - 1), index(stride))
    return simplify(tirx.max((out - 1) * stride + (dilation * (kernel - 1) + 1) - extent, index(0)))


def _as_stored(node: OpNode, w: Value) -> Value:
    """A filter that was widened or dequantized as a constant; of the latter the artifact keeps the integers."""
    made = None if w.quantized is None else node.context.program.widened(w.quantized, w.quantized.value.name)
    return made or known_widened(w)


@lowers("Conv")
def conv(node: OpNode) -> Value:
    """Convolution of any rank, grouped, strided, dilated."""
    x, w, bias = node.input(0), node.input(1), node.optional(2)
    kernel = static_shape(w.shape[2:], "kernel")
    shape = geometry(node, x.shape[2:], kernel)
    return convolve(node, x, w, bias, node.attr("group", 1), shape)


def convolve(node: OpNode, x: Value, w: Value, bias: Value | None, groups: int, shape: Geometry) -> Value:
    """Pick the template for a convolution."""
    if (templates := node.context.program.templates) is not None:
        return templates.convolution(node, x, w, bias, groups, shape)
    lanes = lanes_of(node.context.program.profile, x.dtype)
    channels, depth, out = static(x.shape[1]), static(w.shape[1]), static(w.shape[0])
    block = channel_block(out, lanes) if groups == channels == out and out else 1
    narrow = narrow_convolution(node, x, w, bias, groups, shape) if block == 1 else None
    if narrow is not None:
        return narrow
    w = _as_stored(node, w)
    usable = w.constant is not None and x.dtype in _TEMPLATE_DTYPES and channels is not None
    if not usable or out is None or depth is None or 0 in static_or_one((*w.shape, *x.shape)):
        return generic_convolution(node, x, w, bias, groups, shape)
    if block > 1:
        return _depthwise(node, x, w, bias, shape, block)
    apart = channel_block(depth, lanes) == 1 < channel_block(depth * groups, lanes)
    if groups > 1 and (apart or channel_block(out // groups, lanes) == 1):
        return generic_convolution(node, x, w, bias, groups, shape)
    return _direct(node, x, w, bias, groups, shape, lanes)


def static_or_one(shape: Sequence[Expr]) -> list[int]:
    """Extents as integers, symbolic ones as 1."""
    return [1 if static(d) is None else static(d) or 0 for d in shape]


def _direct(node: OpNode, x: Value, w: Value, bias: Value | None, groups: int, shape: Geometry, lanes: int) -> Value:
    context = node.context
    assert w.constant is not None
    out, depth = w.constant.shape[:2]
    block = _block_of_input(x, depth, lanes)
    plain = block == 1
    # Blocks that do not fit are computed in whole vectors and stored channel by channel.
    together = channel_block(out // groups, lanes)
    together = together if together > 1 else lanes
    space = shape.window.output(shape.padded_extents(x.shape[2:]))
    flat = not plain and shape.window == Window(*(tuple([1] * len(space)),) * 3)
    walked = (simplify(product(space)),) if flat else space
    extents = tuple(dim(s) for s in walked)
    work = Convolved(
        dim(x.shape[0]), depth, out // groups, groups, shape.window.kernel, shape.window.strides, extents, x.dtype
    )
    workload = work.workload()
    offered = direct_candidates(context.program.profile, work)
    # Filters transformed for Winograd's algorithm are no integers any more.
    if all(d == 1 for d in shape.window.dilations) and w.widened is None:
        offered += winograd_candidates(context.program.profile, work)
    chosen = context.program.chooser.choose(workload, offered)
    if (cut := cut_of(chosen)) is not None:
        return _winograd(node, x, w, bias, shape, cut, workload)
    patch = patch_of(chosen)
    columns = patch.columns
    filters = context.program.packed(
        w, ("filters", groups, block, columns), lambda a: pack_filters(a, groups, block, columns)
    )
    nest = DirectConvolution(
        padded_input(node, x, shape, 0 if plain else block),
        filters,
        channels=out,
        groups=groups,
        block=block,
        window=shape.window,
        patch=patch,
        plain=plain,
        result_block=together,
        flat=flat,
    )
    nest.workload = workload
    return _finish(node, nest.output, bias, out, together)


def _block_of_input(x: Value, depth: int, lanes: int) -> int:
    """Channels of a block to read ``x`` in: those it has, if groups of ``depth`` channels are whole blocks."""
    block = 0 if x.blocked is None else static(x.blocked.shape[-1]) or 0
    return block if block in (lanes, lanes // 2, lanes // 4) and depth % block == 0 else channel_block(depth, lanes)


def _winograd(
    node: OpNode, x: Value, w: Value, bias: Value | None, shape: Geometry, cut: Cut, workload: Workload
) -> Value:
    assert w.constant is not None
    context, channels, columns = node.context, w.constant.shape[0], cut.vectors * cut.lanes
    filters = context.program.packed(
        w, ("winograd", cut.tile, columns), lambda a: transform_filters(a, cut.tile, cut.lanes, columns)
    )
    source = context.in_blocks(x, cut.lanes)
    space = shape.window.output(shape.padded_extents(x.shape[2:]))
    nest = WinogradConvolution(source, filters, channels=channels, before=shape.begin, space=space, cut=cut)
    nest.workload = workload
    return _finish(node, nest.output, bias, channels, cut.lanes)


def _depthwise(node: OpNode, x: Value, w: Value, bias: Value | None, shape: Geometry, lanes: int) -> Value:
    assert w.constant is not None
    context, channels = node.context, w.constant.shape[0]
    space = shape.window.output(shape.padded_extents(x.shape[2:]))
    source: Tensor
    widened: Callable[[Expr], Expr] | None = None
    scale: Expr | None = None
    if static(x.shape[-1]) is not None and static(shape.begin[-1]) is not None:
        narrow = _centred_integers(x) or _narrow_floats(x)
        if narrow is None:
            source = context.in_blocks(x, _whole_vectors(x, lanes))
        else:
            stored, widened, scale = narrow
            source = context.in_blocks(stored, _whole_vectors(stored, lanes))
        before = shape.begin
    else:
        source, before = padded_input(node, x, shape, lanes), (index(0),) * len(space)

    def pack(weight: np.ndarray) -> np.ndarray:
        split = weight.reshape(channels // lanes, lanes, *weight.shape[2:])
        return np.moveaxis(split, 1, -1)

    workload = depthwise_workload(x.dtype, channels, shape.window, space)
    options = depthwise_candidates(context.program.profile, workload, lanes)
    rows = context.program.chooser.choose(workload, options).number("rows")
    filters = context.program.packed(w, ("depthwise", lanes), pack)
    nest = DepthwiseConvolution(
        source, filters, window=shape.window, before=before, space=space, rows=rows, widened=widened
    )
    nest.workload = workload
    return _finish(node, nest.output, bias, channels, static(source.shape[-1]) or lanes, scale)


def _whole_vectors(x: Value, lanes: int) -> int:
    """Channels of a block to read ``x`` in: those it has, if they are whole vectors."""
    block = 0 if x.blocked is None else static(x.blocked.shape[-1]) or 0
    return block if block and block % lanes == 0 else lanes


def _narrow_floats(x: Value) -> tuple[Value, Callable[[Expr], Expr], None] | None:
    """What ``x`` was widened from, and how; ``None`` where ``x`` is in memory, or was not widened."""
    if x.narrow is None or not x.deferred or x.dtype != "float32":
        return None
    return x.narrow, lambda value: value.astype("float32"), None


def _centred_integers(x: Value) -> tuple[Value, Callable[[Expr], Expr], Expr] | None:
    """What ``x`` was dequantized from, the float of an element less the zero point, and the scale.

    ``None`` where ``x`` is in memory, or was not dequantized from bytes with one scale.
    """
    known = x.quantized
    if known is None or not x.deferred or x.dtype != "float32" or known.value.dtype not in BYTES or known.block:
        return None
    if not known.single or known.scale.constant is None or (known.zero is not None and known.zero.constant is None):
        return None
    zero = 0 if known.zero is None or known.zero.constant is None else int(known.zero.constant.reshape(-1)[0])

    def centred(value: Expr) -> Expr:
        wide = value.astype("int32").astype("float32")
        return wide - tirx.const(zero, "float32") if zero else wide

    return known.value, centred, tirx.const(float(known.scale.constant.reshape(-1)[0]), "float32")


def _finish(
    node: OpNode, result: Tensor, bias: Value | None, channels: int, lanes: int, scale: Expr | None = None
) -> Value:
    """Scale a blocked result, add the bias, and describe it as a value."""
    final = result
    if bias is not None or scale is not None:
        addend = None if bias is None else bias.tensor

        def body(*at: Expr) -> Expr:
            value = result[at] if scale is None else result[at] * scale
            if addend is None:
                return value
            channel = at[1] * lanes + at[-1]
            return value + addend[channel if channels % lanes == 0 else tirx.min(channel, index(channels - 1))]

        final = Map(result.shape, result.dtype, body, "bias")
    if channels % lanes == 0:
        return Value.in_blocks(final, node.name)
    view = plain_view(final)
    shape = (final.shape[0], index(channels), *final.shape[2:-1])
    return Value(Map(shape, final.dtype, view.body, "plain"), name=node.name)


def padded_input(node: OpNode, x: Value, shape: Geometry, lanes: int, fill: float = 0.0) -> Tensor:
    """``x`` in memory with its padding, in blocks of ``lanes`` channels (plain when 0)."""
    context = node.context
    if lanes and not shape.padded:
        return context.in_blocks(x, lanes)
    if not lanes and not shape.padded:
        return context.dense(x)
    context.realize([x], "operand")
    blocked = x.in_blocks_of(lanes) if lanes else None
    origin = context.tensor(x) if blocked is None else blocked
    space = shape.padded_extents(x.shape[2:])
    zero = tirx.const(fill, x.dtype)

    def body(n: Expr, c: Expr, *rest: Expr) -> Expr:
        at = rest[: len(space)]
        inside = [p - b for p, b in zip(at, shape.begin, strict=True)]
        legal = tirx.all(*(tirx.all(p >= 0, p < s) for p, s in zip(inside, x.shape[2:], strict=True)))
        if blocked is not None:
            return guarded(legal, lambda: origin[(n, c, *inside, rest[-1])], zero)
        channel = c * lanes + rest[-1] if lanes else c
        return guarded(legal, lambda: origin[(n, channel, *inside)], zero)

    channels = (index((static(x.shape[1]) or 0) // lanes),) if lanes else (x.shape[1],)
    extents = (x.shape[0], *channels, *space, *((index(lanes),) if lanes else ()))
    value = Value(Map(extents, x.dtype, body, "pad"))
    context.realize([value], "pad")
    assert isinstance(value.tensor, Source)
    return value.tensor


def generic_convolution(node: OpNode, x: Value, w: Value, bias: Value | None, groups: int, shape: Geometry) -> Value:
    """Any dtype, any filter: a plain reduction with guarded reads."""
    context = node.context
    data, filters = context.tensor(x), context.tensor(w)
    depth, out = w.shape[1], w.shape[0]
    space = shape.window.output(shape.padded_extents(x.shape[2:]))
    wide = "float32" if x.dtype in ("float16", "bfloat16") else x.dtype
    if "float" not in x.dtype:
        raise NotLowered(f"convolution of {x.dtype}")
    zero = tirx.const(0, wide)
    rank = len(space)

    def body(n: Expr, o: Expr, *rest: Expr) -> Expr:
        at, c, tap = rest[:rank], rest[rank], rest[rank + 1 :]
        inside = [p - b for p, b in zip(shape.window.position(at, tap), shape.begin, strict=True)]
        group = tirx.floordiv(o, simplify(tirx.floordiv(out, index(groups))))
        where = (n, group * depth + c, *inside)
        weight = filters[(o, c, *tap)].astype(wide)
        if not shape.padded:
            return data[where].astype(wide) * weight
        legal = tirx.all(*(tirx.all(p >= 0, p < s) for p, s in zip(inside, x.shape[2:], strict=True)))
        return guarded(legal, lambda: data[where].astype(wide), zero) * weight

    total = Reduction((x.shape[0], out, *space), (depth, *w.shape[2:]), (wide,), body, SUM, name="conv")
    if bias is None and wide == x.dtype:
        return Value(total, name=node.name)
    addend = None if bias is None else bias.tensor

    def finish(*at: Expr) -> Expr:
        value = total[at] if addend is None else total[at] + addend[at[1]].astype(wide)
        return value.astype(x.dtype)

    return Value(Map(total.shape, x.dtype, finish, "bias"), name=node.name)


@lowers("ConvTranspose")
def conv_transpose(node: OpNode) -> Value:
    """The adjoint of a convolution: in phases, or as a convolution of the input with zeros put between its elements."""
    x, w, bias = node.input(0), _as_stored(node, node.input(1)), node.optional(2)
    kernel = static_shape(w.shape[2:], "kernel")
    rank, groups = len(kernel), node.attr("group", 1)
    strides = tuple(node.attr("strides") or [1] * rank)
    dilations = tuple(node.attr("dilations") or [1] * rank)
    reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    extra = node.attr("output_padding") or [0] * rank
    begin, end = _transposed_pads(node, x.shape[2:], strides, reach, extra)
    if (made := _phases(node, x, w, bias, groups, (strides, dilations), begin, end, extra)) is not None:
        return made
    spread = _spread(node, x, strides)
    window = Window(kernel, (1,) * rank, dilations)
    before = tuple(simplify(index(r) - b) for r, b in zip(reach, begin, strict=True))
    after = tuple(simplify(index(r + o) - e) for r, o, e in zip(reach, extra, end, strict=True))
    return convolve(node, spread, _adjoint_filter(node, w, groups), bias, groups, Geometry(window, before, after))


def _phases(
    node: OpNode,
    x: Value,
    w: Value,
    bias: Value | None,
    groups: int,
    steps: tuple[tuple[int, ...], tuple[int, ...]],
    begin: Sequence[Expr],
    end: Sequence[Expr],
    extra: Sequence[int],
) -> Value | None:
    """A transposed convolution in phases, where that is possible; see :mod:`mmopt.lowering.ops.conv_transpose`."""
    strides, dilations = steps
    usable = w.constant is not None and x.dtype in _TEMPLATE_DTYPES and static(x.shape[1]) is not None
    if not usable or groups != 1 or set(dilations) != {1} or set(strides) == {1}:
        return None
    if 0 in static_or_one((*w.shape, *x.shape)):
        return None
    sizes = zip(x.shape[2:], strides, w.shape[2:], extra, begin, end, strict=True)
    out = [simplify((e - 1) * s + k + o - b - c) for e, s, k, o, b, c in sizes]

    def plain(x: Value, w: Value, kernel: tuple[int, ...], before: list[Expr], after: list[Expr]) -> Value:
        ones = (1,) * len(kernel)
        shape = Geometry(Window(kernel, ones, ones), tuple(before), tuple(after))
        return convolve(node, x, w, None, 1, shape)

    return in_phases(node, x, w, bias, strides, begin, out, plain)


def _transposed_pads(
    node: OpNode, space: Sequence[Expr], strides: Sequence[int], reach: Sequence[int], extra: Sequence[int]
) -> tuple[list[Expr], list[Expr]]:
    """What is cut off each side of the full result."""
    rank, mode, wanted = len(strides), node.attr("auto_pad", "NOTSET"), node.attr("output_shape")
    if wanted is None and mode not in ("SAME_UPPER", "SAME_LOWER"):
        pads = (node.attr("pads") if mode == "NOTSET" else None) or [0] * (2 * rank)
        return [index(p) for p in pads[:rank]], [index(p) for p in pads[rank:]]
    begin, end = [], []
    for axis, (extent, stride) in enumerate(zip(space, strides, strict=True)):
        target = index(wanted[axis]) if wanted is not None else extent * stride
        total = simplify((extent - 1) * stride + (extra[axis] + reach[axis] + 1) - target)
        half = simplify(tirx.floordiv(total, index(2)))
        rest = simplify(total - half)
        begin.append(half if mode == "SAME_UPPER" else rest)
        end.append(rest if mode == "SAME_UPPER" else half)
    return begin, end


def _spread(node: OpNode, x: Value, strides: Sequence[int]) -> Value:
    """``x`` with ``stride - 1`` zeros between neighbours."""
    if all(s == 1 for s in strides):
        return x
    data = node.context.tensor(x)
    extents = [simplify((e - 1) * s + 1) for e, s in zip(x.shape[2:], strides, strict=True)]

    def body(n: Expr, c: Expr, *at: Expr) -> Expr:
        on = tirx.all(*(tirx.floormod(i, index(s)).equal(index(0)) for i, s in zip(at, strides, strict=True)))
        source = [tirx.floordiv(i, index(s)) for i, s in zip(at, strides, strict=True)]
        return tirx.Select(on, data[(n, c, *source)], tirx.const(0, x.dtype))

    return Value(Map((*x.shape[:2], *extents), x.dtype, body, "spread"))


def _adjoint_filter(node: OpNode, w: Value, groups: int) -> Value:
    """``[C, O/g, *kernel]`` → ``[O, C/g, *kernel]`` with the kernel reversed."""
    kernel = static_shape(w.shape[2:], "kernel")
    if w.constant is not None:
        channels, each = w.constant.shape[:2]
        split = w.constant.reshape(groups, channels // groups, each, *kernel).swapaxes(1, 2)
        turned = np.flip(split, axis=tuple(range(3, 3 + len(kernel))))
        shape = (groups * each, channels // groups, *kernel)
        return Value(constant=np.ascontiguousarray(turned.reshape(shape)), name=f"{w.name}.adjoint")
    data, each = node.context.tensor(w), w.shape[1]
    depth = simplify(tirx.floordiv(w.shape[0], index(groups)))

    def body(o: Expr, c: Expr, *tap: Expr) -> Expr:
        turned = [index(k - 1) - t for k, t in zip(kernel, tap, strict=True)]
        return data[(tirx.floordiv(o, each) * depth + c, tirx.floormod(o, each), *turned)]

    return Value(Map((simplify(each * groups), depth, *w.shape[2:]), w.dtype, body, "adjoint"))
