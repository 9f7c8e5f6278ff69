"""Shapes of operators that work element by element, normalize, or otherwise keep the shape of an input."""

from __future__ import annotations

from collections.abc import Sequence

from mmopt.analysis.shape_rules.registry import NodeView, Shape, broadcast, normalize_axis, shape_rule

SAME_SHAPE = """
    Abs Acos Acosh Asin Asinh Atan Atanh Bernoulli BitCast BitwiseNot Cast CastLike Ceil Celu Clip Cos Cosh CumProd
    CumSum DequantizeLinear Elu Erf Exp EyeLike Floor Gelu GroupNormalization HardSigmoid HardSwish Hardmax Identity
    InstanceNormalization IsInf IsNaN LRN LeakyRelu Log LogSoftmax LpNormalization MeanVarianceNormalization Mish Neg
    Not PRelu QuantizeLinear RMSNormalization RandomNormalLike RandomUniformLike Reciprocal Relu ReverseSequence
    Round Scatter ScatterElements ScatterND Selu Shrink Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Swish
    Tan Tanh TensorScatter ThresholdedRelu Trilu
"""

BROADCAST = """
    Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min
    Mod Mul Or Pow Sub Sum Where Xor
"""


@shape_rule(*SAME_SHAPE.split())
def same_shape(view: NodeView) -> Sequence[Shape]:
    """The output has the shape of the first input."""
    return [view.shape(0)]


@shape_rule(*BROADCAST.split())
def broadcast_inputs(view: NodeView) -> Sequence[Shape] | None:
    """The output has the broadcast shape of all inputs. Opsets before 7 broadcast by an ``axis`` attribute."""
    if view.version < 7 and view.integer("broadcast", 0):
        return [view.shape(0)]
    return [broadcast(*(view.shape(i) for i in range(len(view.node.inputs))))]


@shape_rule("Dropout")
def dropout(view: NodeView) -> Sequence[Shape]:
    """Both the output and the mask have the shape of the input."""
    return [view.shape(0)] * len(view.node.outputs)


@shape_rule("BatchNormalization")
def batch_normalization(view: NodeView) -> Sequence[Shape]:
    """Statistics have one number per channel."""
    return [view.shape(0)] + [view.shape(1)] * (len(view.node.outputs) - 1)


@shape_rule("LayerNormalization")
def layer_normalization(view: NodeView) -> Sequence[Shape]:
    """Mean and deviation keep the normalized axes with size 1."""
    shape = view.shape(0)
    if shape is None:
        return [None] * len(view.node.outputs)
    axis = normalize_axis(view.integer("axis", -1), len(shape))
    statistics = (*shape[:axis], *[1] * (len(shape) - axis))
    return [shape] + [statistics] * (len(view.node.outputs) - 1)
