"""Operators of several operands that act on each element, with NumPy's broadcasting: arithmetic, comparison, logic."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map
from mmopt.backends.expressions import same, simplify
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import MAX_ELEMENTS, NotLowered, Value, from_elements

Scalar = Callable[..., Expr]

HALF_DTYPES = frozenset({"float16", "bfloat16"})
"""Element types that are stored only: arithmetic on them happens in float32."""


# -- scalar helpers --------------------------------------------------------------------------------------------


def is_float(dtype: str) -> bool:
    """Whether ``dtype`` is a floating-point type."""
    return "float" in dtype


def is_one(extent: Expr) -> bool:
    """Whether an extent is the constant one."""
    return isinstance(extent, tirx.IntImm) and int(extent.value) == 1


def truth(value: Expr) -> Expr:
    """``value`` as a boolean expression; NaN is true."""
    dtype = str(value.ty)
    if dtype == "bool":
        return value
    other = tirx.NE(value, tirx.const(0, dtype))
    return tirx.any(other, tirx.isnan(value)) if is_float(dtype) else other


def accumulator(dtype: str) -> str:
    """The type arithmetic on ``dtype`` is done in."""
    return "float32" if dtype in HALF_DTYPES else dtype


def widened(rule: Scalar) -> Scalar:
    """``rule`` on operands brought to :func:`accumulator` types, its result rounded to the first operand's type."""

    @functools.wraps(rule)
    def apply(*operands: Expr) -> Expr:
        dtype = str(operands[0].ty)
        wide = [o.astype(accumulator(str(o.ty))) for o in operands]
        result = rule(*wide)
        return result.astype(dtype) if dtype in HALF_DTYPES and str(result.ty) == "float32" else result

    return apply


def libm(name: str, *operands: Expr) -> Expr:
    """A function of the C library that TVM has no operator for."""
    dtype = str(operands[0].ty)
    return tirx.call_pure_extern(dtype, name + ("f" if dtype == "float32" else ""), *operands)


def larger(a: Expr, b: Expr) -> Expr:
    """The larger operand; NaN when either is."""
    if not is_float(str(a.ty)):
        return tirx.max(a, b)
    return tirx.Select(tirx.any(a > b, tirx.isnan(a)), a, b)


def smaller(a: Expr, b: Expr) -> Expr:
    """The smaller operand; NaN when either is."""
    if not is_float(str(a.ty)):
        return tirx.min(a, b)
    return tirx.Select(tirx.any(a < b, tirx.isnan(a)), a, b)


# -- broadcasting ----------------------------------------------------------------------------------------------


def broadcast_shape(shapes: Sequence[Sequence[Expr]]) -> tuple[Expr, ...]:
    """NumPy's broadcast of ``shapes``; symbolic extents that may differ are compared with one at run time."""
    rank = max((len(s) for s in shapes), default=0)
    result: list[Expr] = []
    for axis in range(rank):
        extents = [s[axis - rank + len(s)] for s in shapes if axis - rank + len(s) >= 0]
        result.append(_broadcast_extent(extents))
    return tuple(result)


def _broadcast_extent(extents: Sequence[Expr]) -> Expr:
    wide = [e for e in extents if not is_one(e)]
    if not wide:
        return extents[0]
    constants = [e for e in wide if isinstance(e, tirx.IntImm)]
    if constants:
        return constants[0]
    result = wide[0]
    for extent in wide[1:]:
        if not same(result, extent):
            result = simplify(tirx.Select(tirx.EQ(result, tirx.const(1, "int64")), extent, result))
    return result


def read(value: Value, at: Sequence[Expr], shape: Sequence[Expr]) -> Expr:
    """Element of ``value`` broadcast to ``shape`` at ``at``."""
    skip = len(shape) - value.ndim
    return value.tensor[broadcast_index(value.shape, at[skip:], shape[skip:])]


def broadcast_index(extents: Sequence[Expr], at: Sequence[Expr], shape: Sequence[Expr]) -> tuple[Expr, ...]:
    """Where a tensor of ``extents`` is read for index ``at`` of its broadcast to ``shape`` of the same rank."""
    indices: list[Expr] = []
    for extent, i, wide in zip(extents, at, shape, strict=True):
        if is_one(extent):
            indices.append(i if is_one(wide) else tirx.const(0, "int64"))
        elif same(extent, wide):
            indices.append(i)
        else:
            indices.append(i * tirx.NE(extent, tirx.const(1, "int64")).astype("int64"))
    return tuple(indices)


def elementwise(node: OpNode, values: Sequence[Value], rule: Scalar, dtype: str | None = None, name: str = "") -> Value:
    """A broadcasting elementwise result.

    Args:
        node: The node being lowered.
        values: Operands.
        rule: Scalar expression of one element of the result from one element of each operand.
        dtype: Result dtype; that of the first operand when absent.
        name: Hint for generated code.
    """
    shape = broadcast_shape([v.shape for v in values])
    for value in values:
        node.context.tensor(value)
    result = dtype or values[0].dtype
    hint = name or node.op_type.lower()
    leader = next((v for v in values if v.blocked is not None and len(v.shape) == len(shape)), None)
    if leader is not None and all(map(same, leader.shape, shape)):
        return _in_blocks(node, values, rule, result, leader, hint)
    body = lambda *at: rule(*(read(v, at, shape) for v in values))  # noqa: E731
    return Value(Map(shape, result, body, hint), name=node.name)


def _in_blocks(node: OpNode, values: Sequence[Value], rule: Scalar, dtype: str, leader: Value, hint: str) -> Value:
    """An elementwise result in the blocked layout its largest operand is in; see ``Value.blocked``."""
    assert leader.blocked is not None
    shape, extents = leader.shape, leader.blocked.shape
    lanes = extents[-1]
    for value in values:
        full = len(value.shape) == len(shape) and all(map(same, value.shape, shape))
        if full and value.blocked is None and value.constant is None and not value.pending:
            node.context.in_blocks(value, int(lanes.value))

    def operand(value: Value, at: tuple[Expr, ...]) -> Expr:
        if value.blocked is not None and all(map(same, value.blocked.shape, extents)):
            return value.blocked[at]
        n, c, *rest = at
        return read(value, (n, c * lanes + rest[-1], *rest[:-1]), shape)

    return Value.in_blocks(Map(extents, dtype, lambda *at: rule(*(operand(v, at) for v in values)), hint), node.name)


def follow(values: Sequence[Value], rule: Scalar, dtype: str = "int64") -> Value | None:
    """The result element by element at compile time when all operands are followed that way."""
    if is_float(dtype) or any(is_float(v.dtype) for v in values):
        return None
    arrays = [v.elements for v in values]
    if any(a is None for a in arrays):
        return None
    wide = np.broadcast_arrays(*arrays)  # type: ignore[arg-type]
    if wide[0].size > MAX_ELEMENTS:
        return None
    typed = [[truth(e) if v.dtype == "bool" else e for e in a.flat] for v, a in zip(values, wide, strict=True)]
    flat = [simplify(rule(*e)) for e in zip(*typed, strict=True)]
    return from_elements(np.array([*flat, None], dtype=object)[:-1].reshape(wide[0].shape), dtype)


def apply(node: OpNode, values: Sequence[Value], rule: Scalar, dtype: str | None = None) -> Value:
    """:func:`follow` where possible, else :func:`elementwise` with half-precision operands widened."""
    result = dtype or values[0].dtype
    followed = follow(values, rule, result)
    return followed if followed is not None else elementwise(node, values, widened(rule), result)


# -- two operands ----------------------------------------------------------------------------------------------


def divide(a: Expr, b: Expr) -> Expr:
    """Quotient; of integers rounded towards zero."""
    if is_float(str(a.ty)):
        return a / b
    if isinstance(b, tirx.IntImm) and int(b.value) == 0:
        raise NotLowered("an integer division by zero")
    return tirx.truncdiv(a, b)


def _bool_xor(a: Expr, b: Expr) -> Expr:
    return tirx.any(tirx.all(a, tirx.Not(b)), tirx.all(tirx.Not(a), b))


_BINARY: dict[str, Scalar] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": divide,
    "And": tirx.all,
    "Or": tirx.any,
    "Xor": _bool_xor,
    "BitwiseAnd": lambda a, b: a & b,
    "BitwiseOr": lambda a, b: a | b,
    "BitwiseXor": lambda a, b: a ^ b,
    "PRelu": lambda x, slope: tirx.Select(x < tirx.const(0, str(x.ty)), x * slope, x),
}

_COMPARE: dict[str, Scalar] = {
    "Equal": tirx.EQ,
    "Greater": lambda a, b: a > b,
    "GreaterOrEqual": lambda a, b: a >= b,
    "Less": lambda a, b: a < b,
    "LessOrEqual": lambda a, b: a <= b,
}


@lowers(*_BINARY)
def binary(node: OpNode) -> Value:
    """Arithmetic and logic of two operands."""
    return apply(node, [_aligned(node, 0), _aligned(node, 1)], _BINARY[node.op_type])


@lowers(*_COMPARE)
def compare(node: OpNode) -> Value:
    """Comparisons; any with NaN is false."""
    rule = _COMPARE[node.op_type]
    values = [_aligned(node, 0), _aligned(node, 1)]
    if values[0].dtype == "bool":
        return apply(node, values, lambda a, b: tirx.Not(_bool_xor(a, b)), "bool")
    return apply(node, values, rule, "bool")


def _aligned(node: OpNode, position: int) -> Value:
    """An operand; before opset 7 the second may be aligned with an axis of the first, slopes of PRelu with axis 1."""
    value = node.input(position)
    axis = 1 if node.op_type == "PRelu" and value.ndim == 1 else node.attr("axis")
    if position == 0 or node.opset >= 7 or axis is None or node.input(0).ndim < 2:
        return value
    trailing = node.input(0).ndim - axis % node.input(0).ndim - value.ndim
    return node.context.reshape(value, [*value.shape, *[1] * trailing])


@lowers("Mod")
def mod(node: OpNode) -> Value:
    """Remainder with the sign of the divisor, or of the dividend when ``fmod`` is set."""
    values = [node.input(0), node.input(1)]
    if is_float(values[0].dtype):
        return apply(node, values, _fmod if node.attr("fmod", 0) else _float_mod)
    return apply(node, values, tirx.truncmod if node.attr("fmod", 0) else tirx.floormod)


def _fmod(a: Expr, b: Expr) -> Expr:
    return libm("fmod", a, b)


def _float_mod(a: Expr, b: Expr) -> Expr:
    rest = _fmod(a, b)
    zero = tirx.const(0, str(a.ty))
    crossed = tirx.all(tirx.NE(rest, zero), _bool_xor(rest < zero, b < zero))
    return tirx.Select(crossed, rest + b, rest)


@lowers("Pow")
def power(node: OpNode) -> Value:
    """Power; the result has the base's type."""
    base, exponent = node.input(0), node.input(1)
    known = exponent.constant.item() if exponent.constant is not None and exponent.constant.size == 1 else None
    if is_float(base.dtype) and known in (0.5, 1, 2, 3) and exponent.ndim <= base.ndim:
        rules: dict[float, Scalar] = {0.5: tirx.sqrt, 1: lambda x: x, 2: lambda x: x * x, 3: lambda x: x * x * x}
        return apply(node, [base], rules[known])
    work = accumulator(base.dtype) if is_float(base.dtype) else "float64"
    rule = lambda x, y: tirx.pow(x.astype(work), y.astype(work)).astype(base.dtype)  # noqa: E731
    return elementwise(node, [base, exponent], rule)


@lowers("BitShift")
def bit_shift(node: OpNode) -> Value:
    """Shift by the second operand's bits; by the width or more leaves nothing."""
    x, y = node.input(0), node.input(1)
    width = np.dtype(x.dtype).itemsize * 8
    shift = tirx.shift_left if node.attr("direction") == "LEFT" else tirx.shift_right
    signed = x.dtype.startswith("int") and node.attr("direction") != "LEFT"

    def rule(a: Expr, b: Expr) -> Expr:
        last = tirx.const(width - 1, str(b.ty))
        bounded = shift(a, tirx.min(b, last))
        return bounded if signed else tirx.Select(b > last, tirx.const(0, str(a.ty)), bounded)

    return elementwise(node, [x, y], rule)


# -- any number of operands ------------------------------------------------------------------------------------

_VARIADIC: dict[str, Scalar] = {"Sum": lambda a, b: a + b, "Mean": lambda a, b: a + b, "Max": larger, "Min": smaller}


@lowers(*_VARIADIC)
def variadic(node: OpNode) -> Value:
    """Sum, mean, maximum or minimum of all operands."""
    values = [v for v in node.inputs if v is not None]
    combine = _VARIADIC[node.op_type]

    def rule(*operands: Expr) -> Expr:
        total = functools.reduce(combine, operands)
        return total / tirx.const(len(operands), str(total.ty)) if node.op_type == "Mean" else total

    return apply(node, values, rule)


@lowers("Where")
def where(node: OpNode) -> Value:
    """Elements of the second operand where the first is true, else of the third."""
    condition, x, y = node.input(0), node.input(1), node.input(2)
    followed = follow([condition, x, y], tirx.Select, x.dtype)
    return followed if followed is not None else elementwise(node, [condition, x, y], tirx.Select, x.dtype)


@lowers("Clip")
def clip(node: OpNode) -> Value:
    """Bounded from below, then from above; NaN stays."""
    x = node.input(0)
    bounds = [_bound(node, 1, "min", x.dtype), _bound(node, 2, "max", x.dtype)]
    given = [b for b in bounds if b is not None]
    low, high = bounds[0] is not None, bounds[1] is not None

    def rule(value: Expr, *limits: Expr) -> Expr:
        rest = list(limits)
        if low:
            least = rest.pop(0)
            value = tirx.Select(value < least, least, value)
        if high:
            most = rest.pop(0)
            value = tirx.Select(value > most, most, value)
        return value

    return apply(node, [x, *given], rule)


def _bound(node: OpNode, position: int, attribute: str, dtype: str) -> Value | None:
    if node.opset >= 11:
        return node.optional(position)
    value = node.attr(attribute)
    return None if value is None else node.context.constant(np.array(value, dtype=dtype))
