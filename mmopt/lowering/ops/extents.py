"""Sizes and small integer inputs: known at compile time, followed as expressions, or read at run time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import onnx_ir as ir
from tvm import relax, tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map, index
from mmopt.backends.cpu.loops import product
from mmopt.backends.expressions import same, simplify
from mmopt.lowering.registry import OpNode
from mmopt.lowering.values import NotLowered, Value

_SHIFT = 1 << 40
"""Added to integers read at run time: TVM takes every size variable to be non-negative. Larger ones are cut."""


def i64(value: int | Expr) -> Expr:
    """An index expression."""
    return index(value)


def choose(condition: Expr, then: int | Expr, other: int | Expr) -> Expr:
    """``then`` where ``condition`` holds, simplified."""
    return simplify(tirx.Select(condition, i64(then), i64(other)))


def known(expression: Expr) -> int | None:
    """The value of a constant expression."""
    return int(expression.value) if isinstance(expression, tirx.IntImm) else None


@dataclasses.dataclass(frozen=True)
class Integers:
    """The elements of a small integer input.

    Attributes:
        items: One index expression each.
        data: Whether they are data: symbols bound at run time, of any sign, rather than expressions of sizes.
    """

    items: list[Expr]
    data: bool

    @property
    def constants(self) -> list[int] | None:
        """The items as integers when all are constant."""
        values = [known(e) for e in self.items]
        return None if None in values else [v for v in values if v is not None]


def integers(node: OpNode, value: Value, hint: str) -> Integers:
    """Elements of a scalar or 1-D integer input, wherever they come from.

    Raises:
        NotLowered: The number of elements is not known.
    """
    if value.elements is not None:
        return Integers([i64(e) for e in value.elements.reshape(-1)], data=False)
    if value.constant is not None:
        return Integers([i64(int(e)) for e in value.constant.reshape(-1)], data=False)
    flat = node.context.reshape(value, [1]) if value.ndim == 0 else value
    source = node.context.tensor(flat)

    def shifted(position: Expr) -> Expr:
        number = source[position].astype("int64")
        return tirx.max(tirx.min(number, i64(_SHIFT)), i64(-_SHIFT)) + _SHIFT

    sizes = node.context.runtime_extents(Value(Map(flat.shape, "int64", shifted, hint)), hint)
    return Integers([size - _SHIFT for size in sizes], data=True)


def scalar(node: OpNode, value: Value) -> Value:
    """A value of one element without its axes."""
    return node.context.reshape(value, []) if value.ndim else value


def optional_integers(node: OpNode, position: int, attribute: str) -> Integers | None:
    """Integers given as an attribute (older opsets) or as an input; ``None`` when absent."""
    value = node.optional(position)
    if value is not None:
        return integers(node, value, attribute)
    given = node.attr(attribute)
    if given is None:
        return None
    return Integers([i64(int(e)) for e in (given if isinstance(given, list) else [given])], data=False)


def constant_axes(axes: Sequence[int], rank: int) -> list[int]:
    """Axes counted from the front.

    Raises:
        NotLowered: An axis is out of range.
    """
    if any(not -rank <= a < rank for a in axes):
        raise NotLowered(f"axes {list(axes)} are out of range for rank {rank}")
    return [a % rank for a in axes]


def axis_attr(node: OpNode, rank: int, default: int, name: str = "axis") -> int:
    """An axis attribute counted from the front."""
    return constant_axes([node.attr(name, default)], rank)[0] if rank else 0


def declared(node: OpNode, position: int = 0) -> list[int | None] | None:
    """Extents the model states for an output: integers, ``None`` for symbolic ones; ``None`` without a rank."""
    shape = node.node.outputs[position].shape
    if shape is None:
        return None
    return [d if isinstance(d, int) else None for d in shape]


def named(node: OpNode, extents: Sequence[Expr], hint: str, stated: Sequence[int | None] | None = None) -> list[Expr]:
    """Involved extents as plain ones: what the model states for the output, or a fresh size computed once.

    The artifact compares a stated extent with the computed one at run time.

    Args:
        node: The node being lowered.
        extents: Expressions, of data too.
        hint: For names of fresh sizes.
        stated: Extents the model states; those of the first output when absent.
    """
    values = [simplify(e) for e in extents]
    plain = _stated(node, values, stated)
    fresh = [isinstance(p, tirx.IntImm | tirx.Var) for p in plain]
    return _bind(
        node, values, [p if keep else node.context.fresh_symbol(hint) for p, keep in zip(plain, fresh, strict=True)]
    )


def settled(node: OpNode, extents: Sequence[Expr]) -> list[Expr]:
    """``extents``, with what the model states for the output (checked at run time) where an expression remains."""
    values = [simplify(e) for e in extents]
    return _bind(node, values, _stated(node, values, None))


def _stated(node: OpNode, values: Sequence[Expr], stated: Sequence[int | None] | None) -> list[Expr]:
    sizes = declared(node) if stated is None else stated
    if sizes is None or len(sizes) != len(values):
        return list(values)
    return [v if size is None or known(v) is not None else i64(size) for v, size in zip(values, sizes, strict=True)]


def _bind(node: OpNode, values: Sequence[Expr], names: list[Expr]) -> list[Expr]:
    changed = [n for n, (value, name) in enumerate(zip(values, names, strict=True)) if not value.same_as(name)]
    if changed:
        builder = node.context.builder
        shape = builder.emit(relax.ShapeExpr([values[n] for n in changed]))
        builder.match_cast(shape, relax.ShapeType([names[n] for n in changed]))
    return names


def quotient(whole: Sequence[Expr], part: Sequence[Expr]) -> Expr:
    """``product(whole) // product(part)`` with common factors cancelled; zero where ``part`` is empty of elements."""
    above, top = _factors(whole)
    below, bottom = _factors(part)
    for factor in list(below):
        match = next((n for n, other in enumerate(above) if same(other, factor)), None)
        if match is not None:
            above.pop(match)
            below.remove(factor)
    if not below and bottom and top % bottom == 0:
        return simplify(product([i64(top // bottom), *above]))
    divisor = simplify(product([i64(bottom), *below]))
    safe = divisor if known(divisor) else tirx.max(divisor, i64(1))
    return simplify(tirx.floordiv(product([i64(top), *above]), safe))


def _factors(extents: Sequence[Expr]) -> tuple[list[Expr], int]:
    symbolic: list[Expr] = []
    constant = 1
    pending = [simplify(e) for e in extents]
    while pending:
        current = pending.pop()
        if isinstance(current, tirx.IntImm):
            constant *= int(current.value)
        elif isinstance(current, tirx.Mul):
            pending.extend((current.a, current.b))
        else:
            symbolic.append(current)
    return symbolic, constant


def nonnegative(expression: Expr) -> bool:
    """Whether an expression of sizes is certainly not negative."""
    if isinstance(expression, tirx.IntImm):
        return int(expression.value) >= 0
    if isinstance(expression, tirx.Var):
        return True
    if isinstance(expression, tirx.Max):
        return nonnegative(expression.a) or nonnegative(expression.b)
    if isinstance(expression, tirx.Add | tirx.Mul | tirx.Min | tirx.FloorDiv | tirx.Div):
        return nonnegative(expression.a) and nonnegative(expression.b)
    if isinstance(expression, tirx.Select):
        return nonnegative(expression.true_value) and nonnegative(expression.false_value)
    return False


def is_axis(axes: Sequence[Expr], rank: int, position: int | Expr) -> Expr:
    """Whether ``position`` is among ``axes``, which may be negative and may be data."""
    here = i64(position)
    hits = [tirx.any(tirx.EQ(a, here), tirx.EQ(a, here - rank)) for a in axes]
    return tirx.any(*hits) if len(hits) > 1 else hits[0] if hits else tirx.const(False, "bool")


def pick(position: Expr, items: Sequence[Expr]) -> Expr:
    """The item at a position that is data; the last one behind the end."""
    chosen = items[-1] if items else i64(1)
    for n in range(len(items) - 2, -1, -1):
        chosen = tirx.Select(tirx.EQ(position, i64(n)), items[n], chosen)
    return chosen


def computed(node: OpNode, count: int, body: Callable[[Expr], Expr], hint: str) -> list[Expr]:
    """``count`` sizes that a small kernel computes at run time: ``body`` gives the one at a position."""
    return node.context.runtime_extents(Value(Map([count], "int64", body, hint)), hint)


def without_axes(node: OpNode, extents: Sequence[Expr], axes: Sequence[Expr], hint: str) -> list[Expr]:
    """``extents`` less those at ``axes``, which are data."""
    rank = len(extents)
    kept = Map([rank], "int64", lambda d: tirx.Select(is_axis(axes, rank, d), i64(0), i64(1)), "kept")

    def body(slot: Expr) -> Expr:
        before, extent = i64(0), i64(0)
        for d in range(rank):
            here = tirx.all(tirx.EQ(kept[i64(d)], i64(1)), tirx.EQ(before, slot))
            extent = extent + tirx.Select(here, extents[d], i64(0))
            before = before + kept[i64(d)]
        return extent

    return named(node, computed(node, rank - len(axes), body, hint), hint)


def with_axes(node: OpNode, extents: Sequence[Expr], axes: Sequence[Expr], hint: str) -> list[Expr]:
    """``extents`` with ones inserted so that they are at ``axes`` of the result, which are data."""
    rank = len(extents) + len(axes)
    old = Map([rank], "int64", lambda d: tirx.Select(is_axis(axes, rank, d), i64(0), i64(1)), "old")

    def body(d: Expr) -> Expr:
        taken = i64(0)
        for e in range(rank):
            taken = taken + tirx.Select(i64(e) < d, old[i64(e)], i64(0))
        return tirx.Select(tirx.EQ(old[d], i64(1)), pick(taken, extents), i64(1))

    return named(node, computed(node, rank, body, hint), hint)


def element_type(node: OpNode, position: int = 0) -> ir.DataType | None:
    """The ONNX element type of an input as the model has it."""
    value = node.node.inputs[position] if position < len(node.node.inputs) else None
    return None if value is None else value.dtype
