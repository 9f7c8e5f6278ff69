"""Matrix products: the contracted axis is where units are read, the free axes are where they are made."""

from __future__ import annotations

import onnx_ir as ir

from mmopt.analysis.axes.group import Mixing, Role
from mmopt.analysis.axes.rules.registry import axis_rule, is_constant, present
from mmopt.analysis.axes.space import Space


@axis_rule("MatMul", "MatMulInteger")
def matmul(node: ir.Node, space: Space) -> None:
    """``[…, m, k] @ […, k, n]``; vectors lack m or n."""
    left, right, result = space.operand(node, 0), space.operand(node, 1), space.of(node.outputs[0])
    depth = (len(left) - 1, max(len(right) - 2, 0))
    space.same(left[depth[0]], right[depth[1]])
    contraction(node, space, (0, depth[0]), (1, depth[1]))
    free = list(result)
    if len(right) > 1:
        space.same(right[-1], free.pop())
        produces(node, space, 1, len(right) - 1)
    if len(left) > 1:
        space.same(left[-2], free.pop())
        produces(node, space, 0, len(left) - 2)
    for index, operand in enumerate((left, right)):
        space.broadcast(operand[:-2], free)
        for axis in range(len(operand) - 2):
            space.reads(node, index, axis, Role.PARAMETER)
    _heads(node, space, left, right)
    for index in (2, 3):
        if node.op_type == "MatMulInteger" and present(node, index):
            _zero_points(space.operand(node, index), (left, right)[index - 2], space, row=index == 2)


def _zero_points(points: list[int], operand: list[int], space: Space, *, row: bool) -> None:
    """Zero points of the rows of the left, or of the columns of the right operand."""
    if len(points) == 1 and len(operand) > 1:
        space.same(points[0], operand[-2] if row else operand[-1])
    elif points:
        space.freeze_all(points, "it has a zero point for each row of several matrices")


def _heads(node: ir.Node, space: Space, left: list[int], right: list[int]) -> None:
    """Batch axes of products of two activations are heads; the last axis of values is the head's size."""
    if any(is_constant(value) for value in node.inputs) or len(right) < 3:
        return
    for axes in (left, right):
        for axis in axes[1:-2] or axes[:-2]:
            space.kind(axis, "heads")
    space.kind(right[-1], "head size")


def contraction(node: ir.Node, space: Space, left: tuple[int, int], right: tuple[int, int]) -> None:
    """Record where two operands are summed over: at the constant one, if there is one."""
    constant = [is_constant(node.inputs[operand]) for operand, _ in (left, right)]
    for (operand, axis), fixed in zip((left, right), constant, strict=True):
        if fixed:
            space.reads(node, operand, axis, Role.CONSUMER)
    operand, axis = right if constant[1] else left
    space.reads(node, operand, axis, Mixing.ZERO)
    if not any(constant):
        space.kind(space.operand(node, operand)[axis], "head size")


def produces(node: ir.Node, space: Space, operand: int, axis: int, kind: str = "neurons") -> None:
    """A free axis of a constant operand makes units."""
    if is_constant(node.inputs[operand]):
        space.reads(node, operand, axis, Role.PRODUCER)
        space.kind(space.operand(node, operand)[axis], kind)


@axis_rule("Gemm")
def gemm(node: ir.Node, space: Space) -> None:
    """``alpha · A' B' + beta · C``."""
    a, b, result = space.operand(node, 0), space.operand(node, 1), space.of(node.outputs[0])
    rows, a_depth = (1, 0) if node.attributes.get_int("transA", 0) else (0, 1)
    columns, b_depth = (0, 1) if node.attributes.get_int("transB", 0) else (1, 0)
    space.same(a[a_depth], b[b_depth])
    contraction(node, space, (0, a_depth), (1, b_depth))
    for operand, axes, axis, out in ((0, a, rows, 0), (1, b, columns, 1)):
        space.same(axes[axis], result[out])
        produces(node, space, operand, axis)
    if present(node, 2):
        bias = space.operand(node, 2)
        space.broadcast(bias, result)
        for axis in range(len(bias)):
            space.reads(node, 2, axis, Role.PARAMETER)


@axis_rule("Einsum")
def einsum(node: ir.Node, space: Space) -> None:
    """Axes with one letter are equal; letters that the result lacks are summed over."""
    equation = node.attributes.get_string("equation", "") or ""
    terms, result = _terms(equation, node, space)
    letters: dict[str, int] = {}
    for operand, (term, axes) in enumerate(zip(terms, _operands(node, space), strict=False)):
        if len(set(term)) != len(term) or len(term) != len(axes):
            space.unknown(node, f"the equation {equation!r} of Einsum is not understood")
            return
        for axis, letter in enumerate(term):
            if space.size(axes[axis]) != 1:
                space.same(letters.setdefault(letter, axes[axis]), axes[axis])
            _einsum_roles(node, space, operand, axis, summed=letter not in result)
    for letter, axis in zip(result, space.of(node.outputs[0]), strict=True):
        if letter in letters:
            space.same(letters[letter], axis)
    _einsum_sums(node, space, terms, result)


def _operands(node: ir.Node, space: Space) -> list[list[int]]:
    return [space.operand(node, index) for index in range(len(node.inputs))]


def _terms(equation: str, node: ir.Node, space: Space) -> tuple[list[str], str]:
    """The terms of an equation, with an ellipsis spelled as digits counted from the right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        once = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
        right = ("..." if "..." in left else "") + "".join(once)
    ranks = [len(axes) for axes in _operands(node, space)]
    widths = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=False)]
    widest = max((w for t, w in zip(terms, widths, strict=False) if "..." in t), default=0)
    spell = "0123456789"[:widest]
    spelled = [t.replace("...", spell[widest - max(w, 0) :]) for t, w in zip(terms, widths, strict=False)]
    return spelled, right.replace("...", spell)


def _einsum_roles(node: ir.Node, space: Space, operand: int, axis: int, *, summed: bool) -> None:
    if is_constant(node.inputs[operand]):
        space.reads(node, operand, axis, Role.CONSUMER if summed else Role.PRODUCER)
        if not summed:
            space.kind(space.operand(node, operand)[axis], "neurons")


def _einsum_sums(node: ir.Node, space: Space, terms: list[str], result: str) -> None:
    """One operand of every sum has to be masked, a constant one if there is one."""
    for letter in sorted({c for term in terms for c in term} - set(result)):
        holders = [k for k, term in enumerate(terms) if letter in term]
        operand = next((k for k in holders if is_constant(node.inputs[k])), holders[0])
        space.reads(node, operand, terms[operand].index(letter), Mixing.ZERO)
    if len(terms) > 1 and not any(is_constant(value) for value in node.inputs):
        _einsum_kinds(node, space, terms, result)


def _einsum_kinds(node: ir.Node, space: Space, terms: list[str], result: str) -> None:
    """Letters that all activations and the result have are heads; those summed over are their size."""
    for operand, term in enumerate(terms):
        for axis, letter in enumerate(term):
            kind = "head size" if letter not in result else "heads" if all(letter in t for t in terms) else ""
            if kind:
                space.kind(space.operand(node, operand)[axis], kind)
