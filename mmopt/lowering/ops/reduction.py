"""Reductions over axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import SUM, Combiner, Map, Reduction
from mmopt.backends.cpu.kernels.scan import Scan
from mmopt.backends.cpu.loops import product
from mmopt.backends.expressions import simplify
from mmopt.lowering.ops.activations import absolute
from mmopt.lowering.ops.elementwise import Scalar, accumulator, is_float, larger, smaller
from mmopt.lowering.ops.extents import (
    Integers,
    axis_attr,
    choose,
    constant_axes,
    i64,
    integers,
    is_axis,
    known,
    named,
    optional_integers,
    without_axes,
)
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import MAX_ELEMENTS, NotLowered, Value, from_elements


def _lowest(dtype: str) -> Expr:
    return tirx.const(-math.inf, dtype) if is_float(dtype) else tirx.min_value(dtype)


def _highest(dtype: str) -> Expr:
    return tirx.const(math.inf, dtype) if is_float(dtype) else tirx.max_value(dtype)


LARGEST = Combiner(lambda dtypes: (_lowest(dtypes[0]),), lambda a, b: (larger(a[0], b[0]),))
"""Maximum; minus infinity of nothing, NaN where there is one."""
SMALLEST = Combiner(lambda dtypes: (_highest(dtypes[0]),), lambda a, b: (smaller(a[0], b[0]),))
"""Minimum; infinity of nothing, NaN where there is one."""
PRODUCT = Combiner(lambda dtypes: (tirx.const(1, dtypes[0]),), lambda a, b: (a[0] * b[0],))
"""Product; one of nothing."""


SHARED_WORK = 1 << 17
"""Elements of a reduction to few results from which a second stage costs less than other cores win."""

MOST_PARTS = 64
"""Parts of a reduction in two stages."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is reduced and how.

    Attributes:
        combiner: How elements merge.
        before: Applied to each element.
        after: Applied to the result; gets the number of elements too.
    """

    combiner: Combiner
    before: Scalar = lambda x: x
    after: Callable[[Expr, Expr], Expr] = lambda x, count: x


_RULES: dict[str, Rule] = {
    "ReduceSum": Rule(SUM),
    "ReduceMean": Rule(SUM, after=lambda x, count: _over(x, count)),
    "ReduceProd": Rule(PRODUCT),
    "ReduceMax": Rule(LARGEST),
    "ReduceMin": Rule(SMALLEST),
    "ReduceL1": Rule(SUM, before=absolute),
    "ReduceL2": Rule(SUM, before=lambda x: x * x, after=lambda x, count: _root(x)),
    "ReduceSumSquare": Rule(SUM, before=lambda x: x * x),
    "ReduceLogSum": Rule(SUM, after=lambda x, count: tirx.log(x)),
}


def _over(x: Expr, count: Expr) -> Expr:
    dtype = str(x.ty)
    return x / count.astype(dtype) if is_float(dtype) else tirx.truncdiv(x, tirx.max(count, i64(1)).astype(dtype))


def _root(x: Expr) -> Expr:
    dtype = str(x.ty)
    return tirx.sqrt(x) if is_float(dtype) else tirx.sqrt(x.astype("float64")).astype(dtype)


@lowers(*_RULES)
def reduce(node: OpNode) -> Value:
    """Sums, means, products, extrema and norms."""
    data = node.input(0)
    rule = _RULES[node.op_type]
    axes = _axes(node, data.ndim)
    if axes is None:
        return elementwise_rule(node, data, rule)
    if not isinstance(axes, list):
        return _over_data_axes(node, data, rule, axes.items)
    followed = _followed(node, data, axes)
    return followed if followed is not None else over(node, data, axes, rule, keep=bool(node.attr("keepdims", 1)))


def _axes(node: OpNode, rank: int) -> list[int] | Integers | None:
    """Constant axes, axes that are data, or ``None`` when nothing is to be reduced."""
    axes = optional_integers(node, 1, "axes")
    if axes is None or not axes.items:
        return None if node.attr("noop_with_empty_axes", 0) else list(range(rank))
    if axes.constants is None:
        return axes
    return sorted(set(constant_axes(axes.constants, rank)))


def elementwise_rule(node: OpNode, data: Value, rule: Rule) -> Value:
    """``rule`` where every element is reduced alone."""
    node.context.tensor(data)
    wide = _accumulator(data.dtype)

    def body(*at: Expr) -> Expr:
        element = rule.before(data.tensor[at].astype(wide))
        return rule.after(element, i64(1)).astype(data.dtype)

    return Value(Map(data.shape, data.dtype, body, "reduce"), name=node.name)


def _accumulator(dtype: str) -> str:
    return "uint8" if dtype == "bool" else accumulator(dtype)


def over(node: OpNode, data: Value, axes: Sequence[int], rule: Rule, *, keep: bool, dtype: str | None = None) -> Value:
    """``data`` reduced over ``axes``.

    Args:
        node: The node being lowered.
        data: What is reduced.
        axes: From the front, sorted.
        rule: How.
        keep: Whether reduced axes stay with extent one.
        dtype: Type of the result; that of ``data`` when absent.
    """
    node.context.tensor(data)
    rank, result = data.ndim, dtype or data.dtype
    wide = _accumulator(data.dtype)
    kept = [d for d in range(rank) if d not in axes]
    shape = [i64(1) if d in axes else data.shape[d] for d in range(rank)] if keep else [data.shape[d] for d in kept]
    count = simplify(product([data.shape[a] for a in axes]))
    offset = rank if keep else len(kept)

    def body(*at: Expr) -> Expr:
        inner = dict(zip(axes, at[offset:], strict=True))
        outer = {d: at[d if keep else kept.index(d)] for d in kept}
        return rule.before(data.tensor[tuple(inner[d] if d in inner else outer[d] for d in range(rank))].astype(wide))

    finish = lambda state: rule.after(state[0], count).astype(result)  # noqa: E731
    extents = [data.shape[a] for a in axes]
    parts = _parts(node.context.program.profile.cores, shape, extents)
    if parts > 1:
        return _in_parts(node, parts, shape, extents, body, rule.combiner, finish, (wide, result))
    return Value(Reduction(shape, extents, (wide,), body, rule.combiner, finish, result), name=node.name)


def _parts(cores: int, shape: Sequence[Expr], extents: Sequence[Expr]) -> int:
    """How many parts of the outermost reduced axis are reduced by themselves, where there are too few results for all
    cores and much to read for each: a divisor of its extent, or 1."""
    results, first, work = known(product(shape)), known(extents[0]), known(simplify(product(extents)))
    if results is None or first is None or work is None or not 0 < results < cores or results * work < SHARED_WORK:
        return 1
    divisors = (d for d in range(1, min(first, MOST_PARTS) + 1) if first % d == 0)
    return max(divisors, key=lambda parts: (results * parts % cores == 0, parts))


def _in_parts(
    node: OpNode,
    parts: int,
    shape: Sequence[Expr],
    extents: Sequence[Expr],
    body: Callable[..., Expr],
    combiner: Combiner,
    finish: Callable[[tuple[Expr, ...]], Expr],
    dtypes: tuple[str, str],
) -> Value:
    """A reduction in two stages: parts of the outermost axis, on all cores, and then what they came to."""
    wide, result = dtypes
    each, rank = simplify(tirx.floordiv(extents[0], i64(parts))), len(shape)

    def part(*at: Expr) -> Expr:
        return body(*at[:rank], at[rank] * each + at[rank + 1], *at[rank + 2 :])

    first = Value(Reduction([*shape, i64(parts)], [each, *extents[1:]], (wide,), part, combiner), name=node.name)
    node.context.realize([first], "parts")
    total = Reduction(shape, [parts], (wide,), lambda *at: first.tensor[at], combiner, finish, result)
    return Value(total, name=node.name)


def _over_data_axes(node: OpNode, data: Value, rule: Rule, axes: Sequence[Expr]) -> Value:
    """A reduction whose axes are data: each axis is walked either by the result or by the reduction."""
    node.context.tensor(data)
    reduced = [is_axis(axes, data.ndim, d) for d in range(data.ndim)]
    stated = [None] * data.ndim
    outer = named(node, [choose(r, 1, e) for r, e in zip(reduced, data.shape, strict=True)], "kept", stated)
    inner = named(node, [choose(r, e, 1) for r, e in zip(reduced, data.shape, strict=True)], "reduced", stated)
    wide, count = _accumulator(data.dtype), product(inner)

    def body(*at: Expr) -> Expr:
        indices = tuple(o + i for o, i in zip(at[: data.ndim], at[data.ndim :], strict=True))
        return rule.before(data.tensor[indices].astype(wide))

    finish = lambda state: rule.after(state[0], count).astype(data.dtype)  # noqa: E731
    full = Value(Reduction(outer, inner, (wide,), body, rule.combiner, finish, data.dtype), name=node.name)
    node.context.realize([full], "reduce")
    if node.attr("keepdims", 1):
        return node.context.reshape(full, named(node, outer, "reduce"))
    return node.context.reshape(full, without_axes(node, data.shape, axes, "reduce"))


def _followed(node: OpNode, data: Value, axes: Sequence[int]) -> Value | None:
    """Reductions of sizes at compile time."""
    combine: dict[str, Callable[[Expr, Expr], Expr]] = {
        "ReduceSum": lambda a, b: a + b,
        "ReduceProd": lambda a, b: a * b,
        "ReduceMax": tirx.max,
        "ReduceMin": tirx.min,
    }
    values = data.elements
    if values is None or node.op_type not in combine or data.ndim != 1 or list(axes) != [0] or not values.size:
        return None
    total = values[0]
    for element in values[1:]:
        total = combine[node.op_type](total, element)
    return from_elements([total] if node.attr("keepdims", 1) else total, data.dtype)


@lowers("ReduceLogSumExp")
def log_sum_exp(node: OpNode) -> Value:
    """``log Σ exp(x)``, with the largest element taken out so that nothing overflows."""
    data = node.input(0)
    axes = _axes(node, data.ndim)
    if axes is None:
        return data
    if not isinstance(axes, list):
        return _over_data_axes(node, data, Rule(SUM, tirx.exp, lambda x, count: tirx.log(x)), axes.items)
    wide = accumulator(data.dtype)
    if not is_float(data.dtype):
        raise NotLowered("the logarithm of a sum of integers")
    top = over(node, data, axes, Rule(LARGEST, after=lambda x, count: _finite(x)), keep=True, dtype=wide)

    def shifted(*at: Expr) -> Expr:
        peak = top.tensor[tuple(i64(0) if d in axes else i for d, i in enumerate(at))]
        return tirx.exp(data.tensor[at].astype(wide) - peak)

    parts = Value(Map(data.shape, wide, shifted, "exp"))
    keep = bool(node.attr("keepdims", 1))
    total = over(node, parts, axes, Rule(SUM, after=lambda x, count: tirx.log(x)), keep=keep)
    kept = [d for d in range(data.ndim) if d not in axes]

    def body(*at: Expr) -> Expr:
        where = at if keep else tuple(at[kept.index(d)] if d in kept else i64(0) for d in range(data.ndim))
        return (total.tensor[at] + top.tensor[where]).astype(data.dtype)

    return Value(Map(total.shape, data.dtype, body, "log_sum_exp"), name=node.name)


def _finite(x: Expr) -> Expr:
    """``x``, or zero where it is infinite."""
    bound = tirx.const(math.inf, str(x.ty))
    return tirx.Select(tirx.EQ(tirx.abs(x), bound), tirx.const(0, str(x.ty)), x)


@lowers("ArgMax", "ArgMin")
def arg_extremum(node: OpNode) -> Value:
    """Position of the largest or smallest element along an axis: the first, or the last, of equals."""
    data = node.input(0)
    axis = axis_attr(node, data.ndim, 0)
    positions = extremum_position(
        node, data, axis, largest=node.op_type == "ArgMax", last=bool(node.attr("select_last_index", 0))
    )
    if node.attr("keepdims", 1):
        return positions
    node.context.realize([positions], node.op_type)
    return node.context.reshape(positions, [d for n, d in enumerate(data.shape) if n != axis])


def extremum_position(node: OpNode, data: Value, axis: int, *, largest: bool, last: bool = False) -> Value:
    """Positions of extrema along ``axis``, which keeps extent one."""
    node.context.tensor(data)
    shape = [i64(1) if d == axis else e for d, e in enumerate(data.shape)]
    wide = _accumulator(data.dtype)

    def identity(dtypes: tuple[str, ...]) -> tuple[Expr, ...]:
        nowhere = i64(-1) if last else tirx.max_value("int64")
        return (_lowest(dtypes[0]) if largest else _highest(dtypes[0]), nowhere)

    def combine(a: tuple[Expr, ...], b: tuple[Expr, ...]) -> tuple[Expr, ...]:
        beyond = b[0] > a[0] if largest else b[0] < a[0]
        tie = tirx.all(tirx.EQ(a[0], b[0]), b[1] > a[1] if last else b[1] < a[1])
        take = tirx.any(beyond, tie)
        return tirx.Select(take, b[0], a[0]), tirx.Select(take, b[1], a[1])

    def body(*at: Expr) -> tuple[Expr, ...]:
        position = at[-1]
        return data.tensor[(*at[:axis], position, *at[axis + 1 : -1])].astype(wide), position

    combiner = Combiner(identity, combine, simple=False)
    reduction = Reduction(
        shape, [data.shape[axis]], (wide, "int64"), body, combiner, lambda state: tirx.max(state[1], i64(0)), "int64"
    )
    return Value(reduction, name=node.name)


@lowers("CumSum", "CumProd")
def cumulative(node: OpNode) -> Value:
    """Running sums or products along an axis."""
    data = node.input(0)
    axis = integers(node, node.input(1), "axis")
    if axis.constants is not None:
        (position,) = constant_axes(axis.constants, data.ndim)
        split = [product(data.shape[:position]), data.shape[position], product(data.shape[position + 1 :])]
        split = [simplify(e) for e in split]
    else:
        split = named(node, split_at(data.shape, axis.items[0]), "scan", [None] * 3)
    if data.elements is not None and known(split[1]) is not None and data.ndim == 1:
        return _followed_scan(node, data)
    flat = node.context.reshape(data, split)
    node.context.realize([flat], "scan")
    scan = Scan(
        flat.tensor,
        product=node.op_type == "CumProd",
        exclusive=bool(node.attr("exclusive", 0)),
        reverse=bool(node.attr("reverse", 0)),
        accumulator=accumulator(data.dtype),
    )
    done = Value(scan.output, name=node.name)
    node.context.realize([done], node.op_type)
    return node.context.reshape(done, data.shape)


def split_at(extents: Sequence[Expr], axis: Expr) -> list[Expr]:
    """Elements in front of, along and behind an axis that is data."""
    rank = len(extents)
    before, here, after = i64(1), i64(1), i64(1)
    position = choose(axis < i64(0), axis + rank, axis)
    for d, extent in enumerate(extents):
        before = before * choose(i64(d) < position, extent, 1)
        here = here * choose(tirx.EQ(i64(d), position), extent, 1)
        after = after * choose(i64(d) > position, extent, 1)
    return [simplify(e) for e in (before, here, after)]


def _followed_scan(node: OpNode, data: Value) -> Value:
    assert data.elements is not None
    items = list(data.elements)[:MAX_ELEMENTS]
    items = items[::-1] if node.attr("reverse", 0) else items
    total: Expr = i64(1 if node.op_type == "CumProd" else 0)
    sums: list[Expr] = []
    for item in items:
        following = total * item if node.op_type == "CumProd" else total + item
        sums.append(total if node.attr("exclusive", 0) else following)
        total = following
    return from_elements(sums[::-1] if node.attr("reverse", 0) else sums, data.dtype)
