"""Moves transposes down past element-wise operators and reductions, where they meet another one or become fewer.

    Transpose_q(Relu(Transpose_p(x)))          →  Relu(x)                       when q undoes p
    Add(Transpose_p(x), Transpose_p(y))        →  Transpose_p(Add(x, y))
    ReduceMean_a(Transpose_p(x), keepdims = 0) →  ReduceMean_p(a)(x)            when the rest keeps its order
    Gather_a(Transpose_p(x), i)                →  Gather_p(a)(x, i)             alike, for one index

A transpose goes past an operator only if nothing else reads it, and past an operator of one input only if what
follows, through operators of the same kind, is another transpose.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from mmopt.analysis.operators import REDUCTIONS
from mmopt.transforms.canonicalize.compose_transposes import RULES as COMPOSE
from mmopt.transforms.canonicalize.compose_transposes import permutation
from mmopt.transforms.canonicalize.editing import axes_of, constant, integer, is_onnx, new_initializer
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass
from mmopt.transforms.rewrite.drop_expands import SIMPLE

_BINARY = ("Add", "Sub", "Mul", "Div", "Min", "Max", "Pow")
_MAX_LOOK_AHEAD = 16


def _transposed(value: ir.Value | None, rewriter: Rewriter) -> tuple[ir.Value, list[int]] | None:
    """Source and permutation of a value that a transpose of its own makes."""
    node = None if value is None else value.producer()
    if value is None or node is None or not is_onnx(node, "Transpose") or node.inputs[0] is None:
        return None
    if len(set(value.consumers())) > 1 or value.is_graph_output():
        return None
    perm = permutation(node, rewriter)
    return None if perm is None else (node.inputs[0], perm)


def _unary(node: ir.Node, rewriter: Rewriter) -> bool:
    found = _transposed(node.inputs[0], rewriter)
    if found is None or not _meets_transpose(node):
        return False
    source, perm = found
    attributes = list(node.attributes.values())
    first = rewriter.emit(node.op_type, [source, *node.inputs[1:]], node, like=source, attributes=attributes)
    return _transpose(node, first, perm, rewriter)


def _transpose(node: ir.Node, first: ir.Node, perm: list[int], rewriter: Rewriter) -> bool:
    attribute = ir.AttrInt64s("perm", perm)
    last = rewriter.emit("Transpose", [first.outputs[0]], node, like=node.outputs[0], attributes=[attribute])
    return rewriter.replace(node, last.outputs[0])


def _meets_transpose(node: ir.Node) -> bool:
    """Whether the only way on from ``node`` leads through element-wise operators to a transpose."""
    for _ in range(_MAX_LOOK_AHEAD):
        output = node.outputs[0]
        users = set(output.consumers())
        if len(users) != 1 or output.is_graph_output():
            return False
        (node,) = users
        if is_onnx(node, "Transpose"):
            return True
        others = [value for value in node.inputs if value is not output and value is not None]
        scalar = all((array := constant(value)) is not None and array.size == 1 for value in others)
        if not is_onnx(node, *SIMPLE) and not (is_onnx(node, *_BINARY) and scalar):
            return False
    return False


def _binary(node: ir.Node, rewriter: Rewriter) -> bool:
    """Two operands transposed alike, or one and a constant that can be transposed back."""
    left, right = (_transposed(value, rewriter) for value in node.inputs)
    if left is not None and right is not None:
        if left[1] != right[1]:
            return False
        operands, perm = [left[0], right[0]], left[1]
    else:
        found, place = (left, 0) if left is not None else (right, 1)
        other = node.inputs[1 - place]
        if found is None or not _meets_transpose(node):
            return False
        source, perm = found
        moved = _untransposed(other, perm, node, rewriter)
        if moved is None:
            return False
        operands = [source, moved] if place == 0 else [moved, source]
    like = next((value for value in operands if _becomes(value, perm, node, rewriter)), None)
    if like is None:
        return False
    first = rewriter.emit(node.op_type, operands, node, like=like, attributes=list(node.attributes.values()))
    return _transpose(node, first, perm, rewriter)


def _becomes(value: ir.Value, perm: list[int], node: ir.Node, rewriter: Rewriter) -> bool:
    """Whether the result of ``node`` certainly has the type of ``value`` and, transposed, its shape."""
    shape, result = rewriter.shape(value), rewriter.shape(node.outputs[0])
    if shape is None or result is None or None in result or len(shape) != len(perm):
        return False
    same = rewriter.dtype(value) == rewriter.dtype(node.outputs[0])
    return same and tuple(shape[axis] for axis in perm) == tuple(result)


def _untransposed(value: ir.Value | None, perm: list[int], node: ir.Node, rewriter: Rewriter) -> ir.Value | None:
    """A constant that, transposed by ``perm``, broadcasts as ``value`` does."""
    array = constant(value)
    if value is None or array is None or array.ndim > len(perm) or node.graph is None:
        return None
    if array.size == 1 and array.ndim <= 1:
        return value
    full = array.reshape((1,) * (len(perm) - array.ndim) + array.shape)
    back = np.ascontiguousarray(full.transpose(np.argsort(perm)))
    return new_initializer(node.graph, ir.tensor(back), rewriter.names.fresh(f"{value.name}_transposed"))


def _reduce(node: ir.Node, rewriter: Rewriter) -> bool:
    """A reduction reads what was transposed: the same reduction of other axes, if the rest keeps its order."""
    found = _transposed(node.inputs[0], rewriter)
    axes = axes_of(node)
    if found is None or axes is None or node.graph is None or len(node.inputs) < 2 or not axes:
        return False
    source, perm = found
    dropped = {axis % len(perm) for axis in axes}
    kept = [perm[axis] for axis in range(len(perm)) if axis not in dropped]
    keep_dims = integer(node, "keepdims", 1)
    if keep_dims is None or kept != sorted(kept):
        return False
    if keep_dims and any(perm[axis] != axis for axis in range(len(perm)) if axis not in dropped):
        return False
    numbers = np.array(sorted(perm[axis] for axis in dropped), np.int64)
    moved = new_initializer(node.graph, ir.tensor(numbers), rewriter.names.fresh(f"{node.outputs[0].name}_axes"))
    attributes = list(node.attributes.values())
    new = rewriter.emit(node.op_type, [source, moved], node, like=node.outputs[0], attributes=attributes)
    return rewriter.replace(node, new.outputs[0])


def _select(node: ir.Node, rewriter: Rewriter) -> bool:
    """One index of a transposed axis is one index of the axis it came from."""
    found = _transposed(node.inputs[0], rewriter)
    axis, index = integer(node, "axis", 0), rewriter.shape(node.inputs[1])
    if found is None or axis is None or index != ():
        return False
    source, perm = found
    place = axis % len(perm)
    kept = [axis for n, axis in enumerate(perm) if n != place]
    if kept != sorted(kept):
        return False
    attribute = ir.AttrInt64("axis", perm[place])
    new = rewriter.emit("Gather", [source, node.inputs[1]], node, like=node.outputs[0], attributes=[attribute])
    return rewriter.replace(node, new.outputs[0])


RULES = (
    Rule("select-before-transpose", ("Gather",), _select),
    Rule("transpose-past-unary", SIMPLE, _unary),
    Rule("transpose-past-binary", _BINARY, _binary),
    Rule("reduce-before-transpose", tuple(sorted(REDUCTIONS)), _reduce),
)


@dataclasses.dataclass(frozen=True)
class SinkTransposes(RulePass):
    """Moves transposes down to where they cancel or become fewer."""

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return (*RULES, *COMPOSE)
