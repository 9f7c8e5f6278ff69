"""Symbolic tensor dimensions: integer polynomials over named sizes, kept in one normal form.

A dimension is a plain ``int`` where it is known and a :class:`Dim` where it is not. Two expressions for the same
polynomial are equal and print alike, so ``seq + seq`` and ``2*seq`` compare equal and shapes can be compared by ``==``.
Every named size is a tensor dimension, hence an integer >= 0 (a cache may be empty, so 1 would be too much to assume).

    parse_dim("2*(seq + 1)") == 2 * parse_dim("seq") + 2      # Dim("2*seq + 2")
"""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Union

Size = Union[int, "Dim"]
"""A dimension: known (``int``) or symbolic (:class:`Dim`)."""

_MAX_TERMS = 64
"""Polynomials longer than this are given up: no real shape needs them, and arithmetic on them is quadratic."""


class DimTooComplex(ArithmeticError):
    """An expression outgrew what is worth tracking; callers treat the dimension as unknown."""


class Atom:
    """An indivisible factor: a named size, or ``//``, ``Mod``, ``Max``, ``Min`` of two expressions."""

    __slots__ = ("_hash", "args", "op", "text")

    def __init__(self, op: str, args: tuple[Size, ...], text: str) -> None:
        self.op, self.args, self.text = op, args, text
        self._hash = hash(text)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Atom) and self.text == other.text


Monomial = tuple[Atom, ...]


class Dim:
    """A non-constant polynomial with integer coefficients. Immutable; build with :func:`symbol` and operators."""

    __slots__ = ("_hash", "_text", "terms")

    def __init__(self, terms: dict[Monomial, int]) -> None:
        self.terms = terms
        self._text = ""
        self._hash = hash(frozenset(terms.items()))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dim) and self._hash == other._hash and self.terms == other.terms

    def __add__(self, other: Size) -> Size:
        return _combine(self, other, 1)

    def __radd__(self, other: int) -> Size:
        return _combine(self, other, 1)

    def __sub__(self, other: Size) -> Size:
        return _combine(self, other, -1)

    def __rsub__(self, other: int) -> Size:
        return _combine(-self, other, 1)

    def __neg__(self) -> Size:
        return _from_terms({monomial: -factor for monomial, factor in self.terms.items()})

    def __mul__(self, other: Size) -> Size:
        product: dict[Monomial, int] = {}
        for left, a in self.terms.items():
            for right, b in _terms(other).items():
                monomial = tuple(sorted(left + right, key=_atom_text))
                product[monomial] = product.get(monomial, 0) + a * b
        return _from_terms(product)

    def __rmul__(self, other: int) -> Size:
        return self * other

    def __floordiv__(self, other: Size) -> Size:
        return floor_divide(self, other)

    def __rfloordiv__(self, other: int) -> Size:
        return floor_divide(other, self)

    def __mod__(self, other: Size) -> Size:
        return modulo(self, other)

    def __str__(self) -> str:
        if not self._text:
            self._text = _render(self.terms)
        return self._text

    def __repr__(self) -> str:
        return f"Dim({str(self)!r})"


def _atom_text(atom: Atom) -> str:
    return atom.text


def _terms(size: Size) -> dict[Monomial, int]:
    if isinstance(size, Dim):
        return size.terms
    return {(): size} if size else {}


def _from_terms(terms: dict[Monomial, int]) -> Size:
    kept = {monomial: factor for monomial, factor in terms.items() if factor}
    if len(kept) > _MAX_TERMS:
        raise DimTooComplex(f"a dimension expression grew to {len(kept)} terms")
    if not kept:
        return 0
    if len(kept) == 1 and () in kept:
        return kept[()]
    return Dim(kept)


def _combine(left: Size, right: Size, sign: int) -> Size:
    total = dict(_terms(left))
    for monomial, factor in _terms(right).items():
        total[monomial] = total.get(monomial, 0) + sign * factor
    return _from_terms(total)


def _atom(op: str, args: tuple[Size, ...]) -> Dim:
    listed = ", ".join(str(arg) for arg in args)
    text = f"{_operand(args[0])}//{_operand(args[1])}" if op == "//" else f"{op}({listed})"
    if len(text) > 400:
        raise DimTooComplex("a dimension expression grew too long to print")
    return Dim({(Atom(op, args, text),): 1})


def _operand(size: Size) -> str:
    text = str(size)
    return text if re.fullmatch(r"\w+", text) else f"({text})"


def _render(terms: dict[Monomial, int]) -> str:
    ordered = sorted(terms.items(), key=lambda item: (-len(item[0]), [atom.text for atom in item[0]]))
    # "1 - seq", not "-seq + 1": a leading minus reads badly and not every parser of dimension strings takes it.
    first = next((i for i, (_, factor) in enumerate(ordered) if factor > 0), 0)
    ordered.insert(0, ordered.pop(first))
    text = ""
    for monomial, factor in ordered:
        # Python reads -a//2 as (-a)//2, but 1 - a//2 as 1 - (a//2).
        alone = len(monomial) == 1 and (factor == 1 or (factor == -1 and text != ""))
        factors = [f"({atom.text})" if atom.op == "//" and not alone else atom.text for atom in monomial]
        if abs(factor) > 1 or not monomial:
            factors.insert(0, str(abs(factor)))
        sign = ("-" if factor < 0 else "") if not text else (" - " if factor < 0 else " + ")
        text += sign + "*".join(factors)
    return text


def symbol(name: str) -> Dim:
    """The size called ``name``."""
    return Dim({(Atom("", (), name),): 1})


def _divide_exactly(dividend: Size, divisor: Size) -> Size | None:
    """``dividend / divisor`` when that is again a polynomial with integer coefficients, by leading-term division."""
    lead, lead_factor = max(_terms(divisor).items(), key=_degree)
    quotient: Size = 0
    rest = dividend
    for _ in range(_MAX_TERMS):
        if rest == 0:
            return quotient
        monomial, factor = max(_terms(rest).items(), key=_degree)
        remaining = list(monomial)
        for atom in lead:
            if atom not in remaining:
                return None
            remaining.remove(atom)
        if factor % lead_factor:
            return None
        step = _from_terms({tuple(remaining): factor // lead_factor})
        quotient, rest = quotient + step, rest - step * divisor
    return None


def _degree(item: tuple[Monomial, int]) -> tuple[int, list[str]]:
    return len(item[0]), [atom.text for atom in item[0]]


def _split_multiples(size: Dim, divisor: int) -> tuple[Size, Size]:
    """``(q, r)`` with ``size == q * divisor + r`` and every factor of ``r`` in ``[0, divisor)``."""
    quotient = _from_terms({monomial: factor // divisor for monomial, factor in size.terms.items()})
    return quotient, _from_terms({monomial: factor % divisor for monomial, factor in size.terms.items()})


def floor_divide(left: Size, right: Size) -> Size:
    """``floor(left / right)``; a zero divisor is 0 (it divides an empty tensor, whatever the quotient)."""
    if isinstance(left, int) and isinstance(right, int):
        return left // right if right else 0
    if right == 0:
        return 0
    exact = _divide_exactly(left, right)
    if exact is not None:
        return exact
    if isinstance(left, Dim) and isinstance(right, int) and right > 0:
        quotient, rest = _split_multiples(left, right)
        return quotient + _divide_rest(rest, right)
    return _atom("//", (left, right))


def _divide_rest(rest: Size, divisor: int) -> Size:
    if isinstance(rest, int):
        return rest // divisor
    if len(rest.terms) == 1:
        ((monomial, factor),) = rest.terms.items()
        if factor == 1 and len(monomial) == 1 and monomial[0].op == "//" and isinstance(monomial[0].args[1], int):
            return floor_divide(monomial[0].args[0], monomial[0].args[1] * divisor)
    return _atom("//", (rest, divisor))


def modulo(left: Size, right: Size) -> Size:
    """``left mod right`` with the sign of ``right`` (Python's, and ONNX ``Mod`` with ``fmod=0``)."""
    if isinstance(left, int) and isinstance(right, int):
        return left % right if right else 0
    if _divide_exactly(left, right) is not None:
        return 0
    if isinstance(left, Dim) and isinstance(right, int) and right > 0:
        left = _split_multiples(left, right)[1]
        if isinstance(left, int):
            return left
    return _atom("Mod", (left, right))


_Interval = tuple[float, float]


def lower_bound(size: Size) -> float:
    """A number that ``size`` is never below; ``-inf`` when nothing is known."""
    return _bounds(size)[0]


def _bounds(size: Size) -> _Interval:
    """Interval arithmetic, with every named size in [0, inf)."""
    if isinstance(size, int):
        return (size, size)
    low = high = 0.0
    for monomial, factor in size.terms.items():
        interval: _Interval = (factor, factor)
        for atom in monomial:
            interval = _times(interval, _atom_bounds(atom))
        low, high = low + interval[0], high + interval[1]
    return (low, high)


def _times(a: _Interval, b: _Interval) -> _Interval:
    # An unbounded factor times 0 is 0: sizes are finite.
    ends = [0.0 if x == 0 or y == 0 else x * y for x in a for y in b]
    return (min(ends), max(ends))


def _atom_bounds(atom: Atom) -> _Interval:
    if not atom.op:
        return (0.0, math.inf)
    (low, high), (other_low, other_high) = (_bounds(arg) for arg in atom.args)
    if atom.op == "Max":
        return (max(low, other_low), max(high, other_high))
    if atom.op == "Min":
        return (min(low, other_low), min(high, other_high))
    divisor = atom.args[1]
    if atom.op == "Mod":
        return (0.0, divisor - 1 if isinstance(divisor, int) else math.inf) if other_low >= 0 else (-math.inf, math.inf)
    if isinstance(divisor, int) and divisor > 0:
        return (low // divisor if math.isfinite(low) else low, high // divisor if math.isfinite(high) else high)
    return (0.0, math.inf) if low >= 0 and other_low >= 0 else (-math.inf, math.inf)


def at_least(left: Size, right: Size) -> bool:
    """Whether ``left >= right`` is certain, whatever the sizes are."""
    difference = left - right
    return lower_bound(difference) >= 0 or lower_bound(_without_quotients(difference)) >= 0


def _without_quotients(size: Size) -> Size:
    """Something of which the sign bounds that of ``size`` from below: ``-(a//n)`` is at least ``-a/n``, times n."""
    for _ in range(4):
        if isinstance(size, int):
            return size
        for monomial, factor in size.terms.items():
            if factor < 0 and len(monomial) == 1 and monomial[0].op == "//":
                dividend, divisor = monomial[0].args
                if isinstance(divisor, int) and divisor > 0:
                    rest = size - _from_terms({monomial: factor})
                    size = rest * divisor + dividend * factor
                    break
        else:
            return size
    return size


def _extreme(op: str, left: Size, right: Size, python: Callable[[int, int], int]) -> Size:
    if isinstance(left, int) and isinstance(right, int):
        return python(left, right)
    for high, low in ((left, right), (right, left)):
        if at_least(high, low):
            return high if op == "Max" else low
    first, second = sorted((left, right), key=str)
    return _atom(op, (first, second))


def maximum(left: Size, right: Size) -> Size:
    """The larger of two sizes."""
    return _extreme("Max", left, right, max)


def minimum(left: Size, right: Size) -> Size:
    """The smaller of two sizes."""
    return _extreme("Min", left, right, min)


def product(sizes: Iterable[Size]) -> Size:
    """The product of ``sizes``; 1 for none."""
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


def evaluate(size: Size, bindings: Mapping[str, int]) -> int:
    """The value of ``size`` with every named size replaced by its number in ``bindings``.

    Raises:
        KeyError: A name is not bound.
    """
    if isinstance(size, int):
        return size
    return sum(
        factor * math.prod(_evaluate_atom(atom, bindings) for atom in monomial)
        for monomial, factor in size.terms.items()
    )


def _evaluate_atom(atom: Atom, bindings: Mapping[str, int]) -> int:
    if not atom.op:
        return bindings[atom.text]
    left, right = (evaluate(arg, bindings) for arg in atom.args)
    return _FUNCTIONS[atom.op](left, right)  # type: ignore[return-value]


def symbols(size: Size) -> frozenset[str]:
    """Names that occur in ``size``."""
    if isinstance(size, int):
        return frozenset()
    found: set[str] = set()
    for monomial in size.terms:
        for atom in monomial:
            found.update(*(symbols(arg) for arg in atom.args) if atom.op else [(atom.text,)])
    return frozenset(found)


_FUNCTIONS: dict[str, Callable[[Size, Size], Size]] = {
    "Max": maximum,
    "Min": minimum,
    "Mod": modulo,
    "max": maximum,
    "min": minimum,
    "mod": modulo,
    "//": floor_divide,
}
_BINARY: dict[type[ast.operator], Callable[[Size, Size], Size]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: floor_divide,
    ast.Mod: modulo,
}


@functools.lru_cache(maxsize=4096)
def parse_dim(text: str) -> Size:
    """The size that a dimension string of an ONNX file stands for.

    Expressions as torch, sympy and this module write them are understood (``2*s0 + 1``, ``s0//2``, ``floor(s0/2)``,
    ``Max(1, s0)``). Anything else, such as ``batch-size`` or ``/Add.1_dim_0``, is the name of one size.
    """
    if text.isidentifier() or re.search(r"\S-\S", text.replace("(-", "( -").replace("*-", "* -")):
        return symbol(text)
    try:
        return _from_ast(ast.parse(text, mode="eval").body)
    except (ValueError, SyntaxError, DimTooComplex, RecursionError):
        return symbol(text)


def _from_ast(node: ast.expr) -> Size:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return symbol(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_from_ast(node.operand)
    if isinstance(node, ast.BinOp):
        return _from_binary(node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _from_call(node.func.id, node.args)
    raise ValueError("not a dimension expression")


def _from_binary(node: ast.BinOp) -> Size:
    left, right = _from_ast(node.left), _from_ast(node.right)
    if isinstance(node.op, ast.Pow) and isinstance(right, int) and 0 <= right <= 8:
        return product([left] * right)
    if isinstance(node.op, ast.Div):
        exact = _divide_exactly(left, right) if right != 0 else None
        if exact is None:
            raise ValueError("a fraction is no dimension")
        return exact
    if type(node.op) not in _BINARY:
        raise ValueError("not an operator of dimension expressions")
    return _BINARY[type(node.op)](left, right)


def _from_call(name: str, args: list[ast.expr]) -> Size:
    if name == "floor" and len(args) == 1:
        inner = args[0]
        if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Div):
            return floor_divide(_from_ast(inner.left), _from_ast(inner.right))
        return _from_ast(inner)
    if name not in _FUNCTIONS or len(args) < 2:
        raise ValueError(f"{name} is not a function of dimension expressions")
    return functools.reduce(_FUNCTIONS[name], [_from_ast(arg) for arg in args])
