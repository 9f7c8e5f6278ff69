"""The table of rules: what each operator says about the axes of its operands and results."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from mmopt.analysis.axes.space import Space
from mmopt.analysis.operators import STEERING_INPUTS
from mmopt.analysis.shape_rules import ONNX_DOMAINS

AxisRule = Callable[[ir.Node, Space], None]

_STEERED_BY_DATA = frozenset({"Attention", "Clip", "Dropout", "RotaryEmbedding", "Where"})
"""Operators whose steering inputs are tensors with axes of the data (masks, tables) or scalars, not lists of sizes."""

RULES: dict[str, AxisRule] = {}
"""By operator of the default domain."""


def axis_rule(*op_types: str) -> Callable[[AxisRule], AxisRule]:
    """Register a rule for operators of the default domain."""

    def register(rule: AxisRule) -> AxisRule:
        RULES.update(dict.fromkeys(op_types, rule))
        return rule

    return register


def apply_rule(node: ir.Node, space: Space) -> None:
    """Tell ``space`` what ``node`` says; everything it touches is frozen where nothing is known about it."""
    name = node.op_type if node.domain in ONNX_DOMAINS else f"{node.domain}.{node.op_type}"
    values = [v for v in (*node.inputs, *node.outputs) if v is not None]
    rule = RULES.get(node.op_type) if node.domain in ONNX_DOMAINS else None
    if rule is None:
        space.unknown(node, f"what {name} does with it is not understood")
    elif not all(space.knows(v) for v in values if v.name):
        space.unknown(node, f"a shape at {name} is not known")
    else:
        rule(node, space)
        for index in () if node.op_type in _STEERED_BY_DATA else STEERING_INPUTS.get(node.op_type, ()):
            if present(node, index):
                space.freeze_all(space.operand(node, index), f"{name} is steered by it")


def present(node: ir.Node, index: int) -> bool:
    """Whether an optional operand is given."""
    return index < len(node.inputs) and node.inputs[index] is not None


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value follows from constants alone."""
    stack, seen = [value], set()
    while stack:
        current = stack.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        producer = current.producer()
        if producer is None:
            if ir.convenience.get_const_tensor(current) is None:
                return False
        elif producer.op_type != "Constant":
            if not producer.inputs or len(seen) > 64:
                return False
            stack.extend(producer.inputs)
    return bool(seen - {None})
