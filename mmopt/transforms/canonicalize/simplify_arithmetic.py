"""Drops arithmetic with a neutral constant, where every bit of the result stays.

    x * 1, x / 1, x ** 1          →  x      any number type, NaN and infinities included
    x + 0, x - 0                  →  x      integers
    x - (+0.0), x + (-0.0)        →  x      floats; ``x + (+0.0)`` stays, since it turns -0.0 into +0.0
    x or False, x and True        →  x

The constant must not broadcast x to a larger shape, nor change its type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from mmopt.analysis.shape_rules import broadcast
from mmopt.transforms.canonicalize.editing import Array, constant
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass


def _is_one(array: Array) -> bool:
    return bool((array == 1).all())


def _is_zero(array: Array, *, negative: bool) -> bool:
    if array.dtype.kind in "iub":
        return not array.any()
    return bool((array == 0).all()) and bool((np.signbit(array) == negative).all())


_NEUTRAL: dict[str, tuple[Callable[[Array], bool], bool]] = {
    "Mul": (_is_one, True),
    "Div": (_is_one, False),
    "Pow": (_is_one, False),
    "Add": (lambda a: _is_zero(a, negative=True), True),
    "Sub": (lambda a: _is_zero(a, negative=False), False),
    "Or": (lambda a: not a.any(), True),
    "And": (lambda a: bool(a.all()), True),
}
"""Per operator: whether a right operand is neutral, and whether the left one may be."""


def _neutral(node: ir.Node, rewriter: Rewriter) -> bool:
    is_neutral, commutes = _NEUTRAL[node.op_type]
    for kept, dropped in ((0, 1), (1, 0))[: 2 if commutes else 1]:
        array, value = constant(node.inputs[dropped]), node.inputs[kept]
        if array is None or value is None or array.size == 0 or not is_neutral(array):
            continue
        if rewriter.opset(node) >= 7 and _stays(rewriter, value, array):
            return rewriter.replace(node, value)
    return False


def _stays(rewriter: Rewriter, value: ir.Value, array: Array) -> bool:
    shape = rewriter.shape(value)
    if shape is None:
        return array.ndim == 0
    return broadcast(shape, array.shape) == shape if None not in shape else array.size == 1 and array.ndim <= len(shape)


RULES = (Rule("neutral-operand", tuple(_NEUTRAL), _neutral),)


@dataclasses.dataclass(frozen=True)
class SimplifyArithmetic(RulePass):
    """Drops arithmetic that changes no bit."""

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
