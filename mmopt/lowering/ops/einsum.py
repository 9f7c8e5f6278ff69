"""Einsum and determinants."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tvm.ir import Expr

from mmopt.backends.compute import SUM, Map, Reduction
from mmopt.backends.cpu.kernels.determinant import Determinant
from mmopt.backends.cpu.loops import product
from mmopt.backends.expressions import same, simplify
from mmopt.lowering.ops.elementwise import accumulator, broadcast_index, broadcast_shape
from mmopt.lowering.ops.matmul import product_of
from mmopt.lowering.ops.movement import transposed
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import NotLowered, Value


@dataclasses.dataclass(frozen=True)
class Equation:
    """A parsed equation; broadcast axes of an ellipsis have digits as labels.

    Attributes:
        operands: Labels of each operand.
        result: Labels of the result.
        extents: Extent of each label.
    """

    operands: tuple[str, ...]
    result: str
    extents: dict[str, Expr]

    @property
    def summed(self) -> list[str]:
        """Labels that are summed over, in order of appearance."""
        return list(dict.fromkeys(c for labels in self.operands for c in labels if c not in self.result))


def parse(equation: str, values: Sequence[Value]) -> Equation:
    """Read an equation for operands of known ranks."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    hidden = [v.ndim - len(t.replace("...", "")) for t, v in zip(terms, values, strict=True)]
    most = max((h for t, h in zip(terms, hidden, strict=True) if "..." in t), default=0)
    digits = "".join(chr(0x100 + n) for n in range(most))
    operands = tuple(t.replace("...", digits[most - h :]) for t, h in zip(terms, hidden, strict=True))
    if arrow:
        result = right.replace("...", digits)
    else:
        letters = [c for labels in operands for c in labels if c not in digits]
        result = digits + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    if any(len(o) != v.ndim for o, v in zip(operands, values, strict=True)):
        raise NotLowered(f"equation {equation} does not fit the ranks of its operands")
    found: dict[str, list[Expr]] = {}
    for labels, value in zip(operands, values, strict=True):
        for label, extent in zip(labels, value.shape, strict=True):
            found.setdefault(label, []).append(extent)
    extents = {label: broadcast_shape([[e] for e in sizes])[0] for label, sizes in found.items()}
    return Equation(operands, result, extents)


@lowers("Einsum")
def einsum(node: OpNode) -> Value:
    """Sums of products over labelled axes."""
    values = [v for v in node.inputs if v is not None]
    equation = parse(node.attr("equation"), values)
    if _is_matrix_product(equation, values):
        return _matrix_product(node, equation, values)
    return _general(node, equation, values)


def _general(node: OpNode, equation: Equation, values: Sequence[Value]) -> Value:
    for value in values:
        node.context.tensor(value)
    summed, dtype = equation.summed, values[0].dtype
    wide = accumulator(dtype)
    shape = [equation.extents[c] for c in equation.result]

    def term(*at: Expr) -> Expr:
        index = dict(zip((*equation.result, *summed), at, strict=True))
        total: Expr | None = None
        for labels, value in zip(equation.operands, values, strict=True):
            places = broadcast_index(value.shape, [index[c] for c in labels], [equation.extents[c] for c in labels])
            factor = value.tensor[places].astype(wide)
            total = factor if total is None else total * factor
        assert total is not None
        return total

    if not summed:
        return Value(Map(shape, dtype, lambda *at: term(*at).astype(dtype), "einsum"), name=node.name)
    axes = [equation.extents[c] for c in summed]
    finish = lambda state: state[0].astype(dtype)  # noqa: E731
    return Value(Reduction(shape, axes, (wide,), term, SUM, finish, dtype), name=node.name)


def _is_matrix_product(equation: Equation, values: Sequence[Value]) -> bool:
    """Two operands, each label once in each, every axis of full extent, summed labels in both."""
    if len(values) != 2 or any(v.dtype not in ("float32", "float64") for v in values):
        return False
    a, b = equation.operands
    if len(set(a)) != len(a) or len(set(b)) != len(b) or not equation.summed:
        return False
    full = all(
        same(e, equation.extents[c])
        for o, v in zip((a, b), values, strict=True)
        for c, e in zip(o, v.shape, strict=True)
    )
    return full and all(c in a and c in b for c in equation.summed)


def _matrix_product(node: OpNode, equation: Equation, values: Sequence[Value]) -> Value:
    a, b = equation.operands
    batch = [c for c in equation.result if c in a and c in b]
    rows = [c for c in equation.result if c in a and c not in b]
    columns = [c for c in equation.result if c in b and c not in a]
    depth = equation.summed

    def extents(labels: Sequence[str]) -> list[Expr]:
        return [equation.extents[c] for c in labels]

    def size(labels: Sequence[str]) -> Expr:
        return simplify(product(extents(labels)))

    def arranged(value: Value, labels: str, *groups: Sequence[str]) -> Value:
        order = [labels.index(c) for group in (batch, *groups) for c in group]
        moved = transposed(node, value, order)
        return node.context.reshape(moved, [*extents(batch), *(size(g) for g in groups)])

    left, right = arranged(values[0], a, rows, depth), arranged(values[1], b, depth, columns)
    full = product_of(node, left, right)
    node.context.realize([full], "einsum")
    labels = [*batch, *rows, *columns]
    wide = node.context.reshape(full, extents(labels))
    return transposed(node, wide, [labels.index(c) for c in equation.result])


@lowers("Det")
def determinant(node: OpNode) -> Value:
    """Determinant of each matrix."""
    data = node.input(0)
    *outer, rows, _ = data.shape
    stack = node.context.reshape(data, [simplify(product(outer)), rows, rows])
    node.context.realize([stack], "matrices")
    done = Value(Determinant(stack.tensor, accumulator(data.dtype)).output, name=node.name)
    node.context.realize([done], "det")
    return node.context.reshape(done, outer)
