"""Questions about scalar expressions: their parts, their cost, their strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tvm import sym, tirx
from tvm.ir import Call, Expr, is_prim_expr

CALL_COST = 8
"""Cost of a transcendental call in units of one arithmetic operation."""

_FREE_CALLS = frozenset({"tirx.if_then_else", "tirx.reinterpret", "tirx.likely", "tirx.mmopt_bfloat16"})

_POLYNOMIALS = frozenset({"tirx.exp", "tirx.tanh", "tirx.sigmoid", "tirx.erf", "tirx.log"}) | {
    "tirx.mmopt_gelu",
    "tirx.mmopt_gelu_coarse",
}
"""Calls that become polynomials with bound variables; see ``mmopt.backends.cpu.intrinsics``."""


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


def nodes(expression: Expr) -> Iterator[Expr]:
    """Every operation and leaf of ``expression`` once, however often it is used."""
    seen = {expression}
    pending = [expression]
    while pending:
        current = pending.pop()
        yield current
        fresh = [operand for operand in parts(current) if operand not in seen]
        seen.update(fresh)
        pending.extend(fresh)


def variables(expression: Expr) -> set[Expr]:
    """All variables that occur in ``expression``."""
    return {node for node in nodes(expression) if isinstance(node, tirx.Var)}


def cost(expression: Expr) -> int:
    """Rough arithmetic operations of one evaluation, shared values computed once; casts and reads are free."""
    total = 0
    for current in nodes(expression):
        operands = list(parts(current))
        if isinstance(current, Call):
            total += 1 if str(current.op.name) in _FREE_CALLS else CALL_COST
        elif operands and not isinstance(current, tirx.Cast):
            total += 1
    return total


def untangled(expression: Expr, keep: Callable[[Expr], Expr]) -> Expr:
    """``expression`` with ``keep`` applied to each argument of a polynomial function that contains another one.

    Code generation takes exponential time on such functions inside each other. What stands under a condition stays as
    it is, for it may be legal to compute there only.
    """
    done: dict[Expr, Expr] = {}

    def visit(node: Expr) -> Expr:
        if node not in done:
            done[node] = _with_parts(node, [visit(p) for p in parts(node)], keep)
        return done[node]

    nested = any(_is_polynomial(node) and any(map(_has_polynomial, parts(node))) for node in nodes(expression))
    return visit(expression) if nested else expression


def _with_parts(node: Expr, operands: list[Expr], keep: Callable[[Expr], Expr]) -> Expr:
    if isinstance(node, Call):
        if str(node.op.name) == "tirx.if_then_else" or len(operands) != len(node.args):
            return node
        if _is_polynomial(node):
            operands = [keep(o) if _has_polynomial(o) else o for o in operands]
        return Call(node.op, operands, node.attrs, node.ty_args, node.span, node.ty)
    if isinstance(node, tirx.Cast):
        return operands[0].astype(str(node.ty))
    return type(node)(*operands) if operands else node


def _is_polynomial(node: Expr) -> bool:
    return isinstance(node, Call) and str(node.op.name) in _POLYNOMIALS


def _has_polynomial(expression: Expr) -> bool:
    return any(map(_is_polynomial, nodes(expression)))


def rectified(expression: Expr) -> Expr:
    """``expression`` with LLVM's maximum in place of ``0 where x < 0, else x``, for targets that do it at once.

    A NaN stays one in either; of the zeros, the maximum is the positive one.
    """

    def maximum(node: Expr) -> Expr:
        return tirx.call_llvm_pure_intrin(str(node.ty), "llvm.maximum", node.false_value, node.true_value)

    return _replaced(expression, _rectifies, maximum)


def narrowed(expression: Expr, bits: Callable[[Expr], Expr]) -> Expr:
    """``expression`` with ``bits`` for each conversion of float32 to bfloat16: they give it as uint16."""
    return _replaced(expression, _narrows, lambda node: tirx.reinterpret("bfloat16", bits(node.value)))


def _replaced(expression: Expr, matches: Callable[[Expr], bool], make: Callable[[Expr], Expr]) -> Expr:
    """``expression`` with ``make`` of every node that ``matches``, from the leaves on."""
    if not any(map(matches, nodes(expression))):
        return expression
    done: dict[Expr, Expr] = {}

    def visit(node: Expr) -> Expr:
        if node not in done:
            made = _with_parts(node, [visit(p) for p in parts(node)], lambda part: part)
            done[node] = make(made) if matches(made) else made
        return done[node]

    return visit(expression)


def _narrows(node: Expr) -> bool:
    return isinstance(node, tirx.Cast) and str(node.ty) == "bfloat16" and str(node.value.ty) == "float32"


def _rectifies(node: Expr) -> bool:
    if not (isinstance(node, tirx.Select) and isinstance(node.condition, tirx.LT) and str(node.ty) == "float32"):
        return False
    zeros = (node.condition.b, node.true_value)
    return node.condition.a.same_as(node.false_value) and all(
        isinstance(z, tirx.FloatImm) and z.value == 0 for z in zeros
    )


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
