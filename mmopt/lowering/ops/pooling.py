"""Pooling over windows and over whole images."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import SUM, Combiner, Map, Reduction
from mmopt.backends.cpu.kernels.pool import Pool, Windows
from mmopt.backends.cpu.loops import flat_index, product
from mmopt.backends.expressions import simplify
from mmopt.lowering.ops.dequantized import dequantized, shared_encoding
from mmopt.lowering.ops.elementwise import accumulator, is_float
from mmopt.lowering.ops.extents import choose, i64, known
from mmopt.lowering.ops.reduction import LARGEST, Rule, over
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import NotLowered, Value

_LONGEST_UNROLLED = 64
"""Windows wider than this are reduced by a plain loop."""


def windows_of(node: OpNode, space: Sequence[Expr], filters: tuple[int, ...] | None = None) -> Windows:
    """Geometry from the attributes of a node over ``space``; the window's extents too unless ``filters`` has them."""
    rank = len(space)
    kernel = filters or tuple(node.attr("kernel_shape"))
    strides = tuple(node.attr("strides") or [1] * rank)
    dilations = tuple(node.attr("dilations") or [1] * rank)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    mode = node.attr("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        out = [simplify(tirx.floordiv(n + (s - 1), i64(s))) for n, s in zip(space, strides, strict=True)]
        lack = [
            simplify(tirx.max((o - 1) * s + r - n, i64(0)))
            for o, s, r, n in zip(out, strides, reach, space, strict=True)
        ]
        less = [simplify(tirx.floordiv(e, i64(2))) for e in lack]
        more = [simplify(e - h) for e, h in zip(lack, less, strict=True)]
        before, after = (less, more) if mode == "SAME_UPPER" else (more, less)
    else:
        pads = (node.attr("pads") if mode == "NOTSET" else None) or [0] * (2 * rank)
        before, after = [i64(p) for p in pads[:rank]], [i64(p) for p in pads[rank:]]
        ceil = bool(node.attr("ceil_mode", 0))
        sizes = zip(space, strides, reach, before, after, strict=True)
        out = [_window_count(n, s, r, b, a, ceil=ceil) for n, s, r, b, a in sizes]
    return Windows(kernel, strides, dilations, tuple(before), tuple(after), tuple(out))


def _window_count(extent: Expr, stride: int, reach: int, before: Expr, after: Expr, *, ceil: bool) -> Expr:
    room = extent + before + after - reach
    if not ceil:
        return simplify(tirx.floordiv(room, i64(stride)) + 1)
    count = simplify(tirx.floordiv(room + (stride - 1), i64(stride)) + 1)
    beyond = (count - 1) * stride >= extent + before
    return choose(beyond, count - 1, count)


def _pooled(
    node: OpNode,
    data: Value,
    windows: Windows,
    combiner: Combiner,
    before: Callable[[Expr], Expr],
    finish: Callable[[Expr, Sequence[Expr]], Expr],
) -> Value:
    if data.blocked is not None and math.prod(windows.kernel) <= _LONGEST_UNROLLED:
        return _pooled_blocks(node, data, windows, combiner, before, finish)
    tensor = node.context.tensor(data)
    wide = accumulator(data.dtype)
    if windows.kernel[-1] <= _LONGEST_UNROLLED:
        return Value(Pool(tensor, windows, wide, combiner, before, finish).output, name=node.name)
    shape = (*data.shape[:2], *windows.out)
    rank = len(windows.kernel)

    def body(*at: Expr) -> Expr:
        inside, place = placed(windows, data.shape, at[: 2 + rank], at[2 + rank :])
        (identity,) = combiner.identity((wide,))
        return tirx.Select(inside, before(tensor[place].astype(wide)), identity)

    # The position of an element is not known where the state is finished; averages of such windows count all elements.
    if any(known(p) != 0 for p in (*windows.before, *windows.after)):
        raise NotLowered(f"padded windows wider than {_LONGEST_UNROLLED}")
    ends = lambda state: finish(state[0], [i64(0)] * rank).astype(data.dtype)  # noqa: E731
    axes = [i64(k) for k in windows.kernel]
    return Value(Reduction(shape, axes, (wide,), body, combiner, ends, data.dtype), name=node.name)


def _pooled_blocks(
    node: OpNode,
    data: Value,
    windows: Windows,
    combiner: Combiner,
    before: Callable[[Expr], Expr],
    finish: Callable[[Expr, Sequence[Expr]], Expr],
) -> Value:
    """Windows of an input in blocks of channels: one vector of channels at a time, taps unrolled, layout kept."""
    blocked = data.blocked
    assert blocked is not None
    wide, rank = accumulator(data.dtype), len(windows.kernel)
    padded = any(known(p) != 0 for p in (*windows.before, *windows.after))
    (identity,) = combiner.identity((wide,))
    plain = (*blocked.shape[:2], *blocked.shape[2 : 2 + rank])

    shape = (*blocked.shape[:2], *windows.out, blocked.shape[-1])

    def read(tap: Sequence[int]) -> Map:
        def body(*at: Expr) -> Expr:
            inside, place = placed(windows, plain, at[: 2 + rank], [i64(t) for t in tap])
            value = before(blocked[(*place, at[-1])].astype(wide))
            return tirx.Select(inside, value, identity) if padded else value

        return Map(shape, wide, body, "tap")

    def merged(left: Map, right: Map) -> Map:
        return Map(shape, wide, lambda *at: combiner.combine((left[at],), (right[at],))[0], "window")

    # One tensor for each step: the emitter computes an inlined tensor once however often a rule reads it.
    total = functools.reduce(merged, (read(tap) for tap in itertools.product(*(range(k) for k in windows.kernel))))
    done = Map(shape, data.dtype, lambda *at: finish(total[at], at[2 : 2 + rank]).astype(data.dtype), "pool")
    return Value.in_blocks(done, node.name)


def placed(
    windows: Windows, shape: Sequence[Expr], at: Sequence[Expr], steps: Sequence[Expr]
) -> tuple[Expr, tuple[Expr, ...]]:
    """Whether an element of a window lies in the input, and the nearest one that does."""
    positions = [windows.position(d, at[2 + d], k) for d, k in enumerate(steps)]
    tests = [t for p, e in zip(positions, shape[2:], strict=True) for t in (p >= i64(0), p < e)]
    nearest = [tirx.max(tirx.min(p, e - 1), i64(0)) for p, e in zip(positions, shape[2:], strict=True)]
    # As a number: what is read under a condition that TVM understands loses the bounds that the condition implies, and
    # a Select reads whether it holds or not.
    inside = tirx.NE(tirx.all(*tests).astype("int8"), tirx.const(0, "int8"))
    return inside, (*at[:2], *nearest)


@lowers("MaxPool")
def max_pool(node: OpNode) -> list[Value]:
    """Largest element of each window, and where it is."""
    data = node.input(0)
    windows = windows_of(node, data.shape[2:])
    known = shared_encoding([data]) if node.n_outputs == 1 else None
    if known is not None:
        integers = _pooled(node, known[0].value, windows, LARGEST, lambda x: x, lambda state, at: state)
        return [dequantized(node, integers, known[0])]
    if data.deferred and not node.context.lazy:
        node.context.realize([data], "operand")
    best = _pooled(node, data, windows, LARGEST, lambda x: x, lambda state, at: state)
    return [best] if node.n_outputs == 1 else [best, _largest_positions(node, data, windows)]


def _largest_positions(node: OpNode, data: Value, windows: Windows) -> Value:
    """Flat index of the first largest element of each window."""
    rank, wide = len(windows.kernel), accumulator(data.dtype)
    nowhere = tirx.max_value("int64")
    tensor = node.context.tensor(data)

    def body(*at: Expr) -> tuple[Expr, ...]:
        inside, place = placed(windows, data.shape, at[: 2 + rank], at[2 + rank :])
        (lowest,) = LARGEST.identity((wide,))
        spatial, extents = place[2:], data.shape[2:]
        if node.attr("storage_order", 0):
            spatial, extents = spatial[::-1], extents[::-1]
        flat = flat_index((*place[:2], *spatial), (*data.shape[:2], *extents))
        return tirx.Select(inside, tensor[place].astype(wide), lowest), tirx.Select(inside, flat, nowhere)

    def combine(a: tuple[Expr, ...], b: tuple[Expr, ...]) -> tuple[Expr, ...]:
        first = tirx.all(tirx.EQ(a[1], nowhere), tirx.NE(b[1], nowhere))
        take = tirx.any(b[0] > a[0], first)
        return tirx.Select(take, b[0], a[0]), tirx.Select(take, b[1], a[1])

    combiner = Combiner(lambda dtypes: (*LARGEST.identity((dtypes[0],)), nowhere), combine, simple=False)
    shape = (*data.shape[:2], *windows.out)
    axes = [i64(k) for k in windows.kernel]
    return Value(Reduction(shape, axes, (wide, "int64"), body, combiner, lambda s: s[1], "int64"), name=node.name)


@lowers("AveragePool")
def average_pool(node: OpNode) -> Value:
    """Mean of each window, with or without the padding it covers."""
    data = node.input(0)
    windows = windows_of(node, data.shape[2:])
    padding = bool(node.attr("count_include_pad", 0))
    wide = accumulator(data.dtype)

    def finish(state: Expr, at: Sequence[Expr]) -> Expr:
        counts = [_covered(windows, data.shape[2:], d, i, padding=padding) for d, i in enumerate(at)]
        return state / simplify(product(counts)).astype(wide)

    return _pooled(node, data, windows, SUM, lambda x: x, finish)


def _covered(windows: Windows, space: Sequence[Expr], axis: int, at: Expr, *, padding: bool) -> Expr:
    """How many elements of a window lie in the input (or its padding) along an axis."""
    kernel, stride, dilation = windows.kernel[axis], windows.strides[axis], windows.dilations[axis]
    before, after, extent = windows.before[axis], windows.after[axis], space[axis]
    reach = (kernel - 1) * dilation + 1
    whole = known(simplify((windows.out[axis] - 1) * stride + reach - extent - before - after))
    plain = all(known(p) == 0 for p in (before, after))
    if whole is not None and whole <= 0 and (padding or plain):
        return i64(kernel)
    start = at * stride - before
    low = i64(0) if padding else tirx.max(_ceil(-start, dilation), i64(0))
    end = extent + after if padding else extent
    return tirx.max(tirx.min(_ceil(end - start, dilation), i64(kernel)) - low, i64(1))


def _ceil(length: Expr, step: int) -> Expr:
    return length if step == 1 else tirx.floordiv(length + (step - 1), i64(step))


@lowers("LpPool")
def lp_pool(node: OpNode) -> Value:
    """The p-norm of each window."""
    data, p = node.input(0), node.attr("p", 2)
    before, root = _norm(p)
    return _pooled(node, data, windows_of(node, data.shape[2:]), SUM, before, lambda state, at: root(state))


def _norm(p: int) -> tuple[Callable[[Expr], Expr], Callable[[Expr], Expr]]:
    if p == 1:
        return tirx.abs, lambda x: x
    if p == 2:
        return lambda x: x * x, tirx.sqrt
    return lambda x: _raised(tirx.abs(x), float(p)), lambda x: _raised(x, 1.0 / p)


def _raised(x: Expr, exponent: float) -> Expr:
    return tirx.pow(x, tirx.const(exponent, str(x.ty)))


@lowers("GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool")
def global_pool(node: OpNode) -> Value:
    """Pooling over all spatial axes."""
    data = node.input(0)
    axes = list(range(2, data.ndim))
    if node.op_type == "GlobalMaxPool":
        return over(node, data, axes, Rule(LARGEST), keep=True)
    if not is_float(data.dtype):
        raise NotLowered(f"{node.op_type} of {data.dtype}")
    if node.op_type == "GlobalAveragePool":
        return over(node, data, axes, Rule(SUM, after=lambda x, n: x / n.astype(str(x.ty))), keep=True)
    before, root = _norm(node.attr("p", 2))
    return over(node, data, axes, Rule(SUM, before, lambda x, n: root(x)), keep=True)
