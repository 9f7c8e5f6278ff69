"""Operators that treat every element alike: axes pass through, and broadcast operands go along."""

from __future__ import annotations

import onnx_ir as ir

from mmopt.analysis.axes.group import Role
from mmopt.analysis.axes.rules.registry import axis_rule
from mmopt.analysis.axes.space import Space

_UNARY = """
    Abs Acos Acosh Asin Asinh Atan Atanh BitCast BitwiseNot Cast Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp Floor Gelu
    HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid
    Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu
"""

_BROADCAST = """
    Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod
    Mul Or PRelu Pow Sub Sum Where Xor
"""


@axis_rule(*_UNARY.split())
def unary(node: ir.Node, space: Space) -> None:
    """Every axis passes; further operands are scalars."""
    source = space.operand(node, 0)
    for output in node.outputs:
        if output.name:
            space.same_all(source, space.of(output))


@axis_rule(*_BROADCAST.split())
def broadcast(node: ir.Node, space: Space) -> None:
    """Operands are aligned at the last axis."""
    result = space.of(node.outputs[0])
    for index, value in enumerate(node.inputs):
        if value is not None:
            operand = space.operand(node, index)
            space.broadcast(operand, result)
            for axis in range(len(operand)):
                space.reads(node, index, axis, Role.PARAMETER)


@axis_rule("CastLike")
def cast_like(node: ir.Node, space: Space) -> None:
    """The second operand gives its type alone."""
    space.same_all(space.operand(node, 0), space.of(node.outputs[0]))
