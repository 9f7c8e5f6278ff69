"""Questions about scalar expressions: their parts, their cost, their strides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tvm import sym, tirx
from tvm.ir import Call, Expr, is_prim_expr

CALL_COST = 8
"""Cost of a transcendental call in units of one arithmetic operation."""

_FREE_CALLS = frozenset({"tirx.if_then_else", "tirx.reinterpret", "tirx.likely"})


def parts(expression: Expr) -> Iterator[Expr]:
    """Direct scalar operands of ``expression``."""
    if isinstance(expression, Call):
        yield from (a for a in expression.args if is_prim_expr(a))
    elif isinstance(expression, tirx.Select):
        yield from (expression.condition, expression.true_value, expression.false_value)
    elif isinstance(expression, tirx.Cast):
        yield expression.value
    elif isinstance(expression, tirx.Not):
        yield expression.a
    elif hasattr(expression, "a") and hasattr(expression, "b"):
        yield from (expression.a, expression.b)


def variables(expression: Expr) -> set[Expr]:
    """All variables that occur in ``expression``."""
    found: set[Expr] = set()
    pending = [expression]
    while pending:
        current = pending.pop()
        if isinstance(current, tirx.Var):
            found.add(current)
        else:
            pending.extend(parts(current))
    return found


def cost(expression: Expr) -> int:
    """Rough arithmetic operations of one evaluation; casts and reads are free."""
    total = 0
    pending = [expression]
    while pending:
        current = pending.pop()
        operands = list(parts(current))
        pending.extend(operands)
        if isinstance(current, Call):
            total += 1 if str(current.op.name) in _FREE_CALLS else CALL_COST
        elif operands and not isinstance(current, tirx.Cast):
            total += 1
    return total


def strides(offset: Expr, axes: Sequence[Expr]) -> list[Expr | None]:
    """Coefficient of each of ``axes`` in ``offset``; ``None`` where the dependence is not linear."""
    found = sym.detect_linear_equation(offset, list(axes)) if axes else []
    if len(found) == len(axes) + 1:
        return list(found[:-1])
    used = variables(offset)
    return [None if axis in used else tirx.const(0, "int64") for axis in axes]


_ANALYZER = sym.Analyzer()


def simplify(expression: Expr) -> Expr:
    """The canonical form of an index expression."""
    return _ANALYZER.simplify(expression)


def same(left: Expr, right: Expr) -> bool:
    """Whether two index expressions are equal for every value of their variables."""
    if left.same_as(right):
        return True
    if isinstance(left, tirx.IntImm) and isinstance(right, tirx.IntImm):
        return int(left.value) == int(right.value)
    return bool(_ANALYZER.can_prove_equal(left, right))


def itemsize(dtype: str) -> int:
    """Bytes of one element of a TVM dtype, at least one."""
    digits = "".join(c for c in dtype.split("_")[0] if c.isdigit())
    return max(1, int(digits) // 8) if digits else 1
