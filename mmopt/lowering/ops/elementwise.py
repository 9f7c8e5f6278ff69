"""Operators that act on each element: arithmetic, comparison, logic, activations, casts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map
from mmopt.backends.expressions import same, simplify
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import MAX_ELEMENTS, NotLowered, Value, from_elements

Scalar = Callable[..., Expr]


def broadcast_shape(shapes: Sequence[Sequence[Expr]]) -> tuple[Expr, ...]:
    """NumPy's broadcast of ``shapes``. Symbolic extents are taken to be equal, and not one, where they meet."""
    rank = max(len(s) for s in shapes)
    result: list[Expr] = []
    for axis in range(rank):
        extents = [s[axis - rank + len(s)] for s in shapes if axis - rank + len(s) >= 0]
        result.append(_broadcast_extent(extents))
    return tuple(result)


def _broadcast_extent(extents: Sequence[Expr]) -> Expr:
    wide = [e for e in extents if not (isinstance(e, tirx.IntImm) and int(e.value) == 1)]
    if not wide:
        return extents[0]
    constants = [e for e in wide if isinstance(e, tirx.IntImm)]
    return constants[0] if constants else wide[0]


def read(value: Value, at: Sequence[Expr], shape: Sequence[Expr]) -> Expr:
    """Element of ``value`` broadcast to ``shape`` at ``at``."""
    skip = len(shape) - value.ndim
    indices: list[Expr] = []
    for axis, extent in enumerate(value.shape):
        one = isinstance(extent, tirx.IntImm) and int(extent.value) == 1
        wide = isinstance(shape[skip + axis], tirx.IntImm) and int(shape[skip + axis].value) == 1
        indices.append(tirx.const(0, "int64") if one and not wide else at[skip + axis])
    return value.tensor[tuple(indices)] if indices else value.tensor[()]


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
    body = lambda *at: rule(*(read(v, at, shape) for v in values))  # noqa: E731
    return Value(Map(shape, result, body, name or node.op_type.lower()), name=node.name)


def follow(values: Sequence[Value], rule: Scalar, dtype: str = "int64") -> Value | None:
    """The result element by element at compile time when all operands are followed that way."""
    arrays = [v.elements for v in values]
    if any(a is None for a in arrays) or any(v.dtype.startswith("float") for v in values):
        return None
    wide = np.broadcast_arrays(*arrays)  # type: ignore[arg-type]
    if wide[0].size > MAX_ELEMENTS:
        return None
    flat = [simplify(rule(*e)) for e in zip(*(a.flat for a in wide), strict=True)]
    return from_elements(np.array([*flat, None], dtype=object)[:-1].reshape(wide[0].shape), dtype)


def _is_float(dtype: str) -> bool:
    return "float" in dtype


def _divide(a: Expr, b: Expr) -> Expr:
    return a / b if _is_float(str(a.ty)) else tirx.truncdiv(a, b)


_BINARY: dict[str, Scalar] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _divide,
}


@lowers(*_BINARY)
def binary(node: OpNode) -> Value:
    """Arithmetic of two operands."""
    values = [node.input(0), node.input(1)]
    rule = _BINARY[node.op_type]
    return follow(values, rule, values[0].dtype) or elementwise(node, values, rule)


_UNARY: dict[str, Scalar] = {
    "Relu": lambda x: tirx.max(x, tirx.const(0, str(x.ty))),
    "Exp": tirx.exp,
    "Tanh": tirx.tanh,
    "Erf": tirx.erf,
    "Sqrt": tirx.sqrt,
    "Sigmoid": tirx.sigmoid,
    "Neg": lambda x: tirx.const(0, str(x.ty)) - x,
    "Abs": tirx.abs,
}


@lowers(*_UNARY)
def unary(node: OpNode) -> Value:
    """Functions of one operand."""
    return elementwise(node, [node.input(0)], _UNARY[node.op_type])
