"""Leaves broadcasting to the operators that do it by themselves, and computes before it rather than after.

    Add(Expand(x, s), y)    →  Add(x, y)          when the result keeps its shape
    Relu(Expand(x, s))      →  Expand(Relu(x), s)

``Where``, ``Clip`` and the rest of the element-wise family alike. What else reads the expanded tensor keeps it.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from mmopt.analysis.operators import UNARY
from mmopt.analysis.shape_rules import broadcast
from mmopt.transforms.canonicalize.editing import is_onnx
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass

BROADCASTING = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "Mod", "Where"),
    *("And", "Or", "Xor", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"),
)
"""Operators that broadcast all their inputs against each other."""

SIMPLE = tuple(sorted(op for op in UNARY if not op.startswith("com.") and op not in ("PRelu", "Clip")))
"""Operators of one input that work on each element alone."""


def _expand_of(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and is_onnx(node, "Expand") and node.inputs[0] is not None else None


def _broadcast(node: ir.Node, rewriter: Rewriter) -> bool:
    result = rewriter.shape(node.outputs[0])
    shapes = [rewriter.shape(value) for value in node.inputs]
    if result is None or None in result or any(shape is None or None in shape for shape in shapes):
        return False
    for place, value in enumerate(node.inputs):
        expand = _expand_of(value)
        inner = None if expand is None else rewriter.shape(expand.inputs[0])
        if expand is None or inner is None or None in inner:
            continue
        others = (shape for other, shape in enumerate(shapes) if other != place)
        if broadcast(inner, *others) == result:
            rewriter.set_input(node, place, expand.inputs[0])
            rewriter.changed(expand)  # what else reads it may be alone with it now
            return True
    return False


def _unary(node: ir.Node, rewriter: Rewriter) -> bool:
    expand = _expand_of(node.inputs[0])
    if expand is None or len(expand.outputs[0].uses()) > 1 or expand.outputs[0].is_graph_output():
        return False
    attributes = list(node.attributes.values())
    first = rewriter.emit(node.op_type, [expand.inputs[0]], node, like=expand.inputs[0], attributes=attributes)
    last = rewriter.emit("Expand", [first.outputs[0], expand.inputs[1]], node, like=node.outputs[0])
    return rewriter.replace(node, last.outputs[0])


RULES = (Rule("operand-broadcasts", BROADCASTING, _broadcast), Rule("compute-before-expand", SIMPLE, _unary))


@dataclasses.dataclass(frozen=True)
class DropExpands(RulePass):
    """Leaves broadcasting to element-wise operators, and moves computation before it."""

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
