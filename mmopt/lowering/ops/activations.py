"""Functions of one operand: activations, mathematical functions, tests for NaN and infinity."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.cpu import intrinsics
from mmopt.lowering.ops.coarse import becomes_bfloat16, coarse_gelu, step_behind
from mmopt.lowering.ops.elementwise import Scalar, apply, elementwise, is_float, larger, libm, smaller
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import Value


def like(x: Expr, value: float) -> Expr:
    """``value`` as a constant of the type of ``x``."""
    return tirx.const(value, str(x.ty))


def relu(x: Expr) -> Expr:
    """``max(x, 0)``; NaN stays."""
    return tirx.Select(x < like(x, 0), like(x, 0), x)


def absolute(x: Expr) -> Expr:
    """Magnitude."""
    return x if str(x.ty).startswith("uint") else tirx.abs(x)


def sigmoid(x: Expr) -> Expr:
    """``1 / (1 + exp(-x))``."""
    return like(x, 1) / (like(x, 1) + tirx.exp(like(x, 0) - x))


def softplus(x: Expr) -> Expr:
    """``log(1 + exp(x))`` without overflow."""
    return larger(x, like(x, 0)) + tirx.log1p(tirx.exp(like(x, 0) - tirx.abs(x)))


def gelu(x: Expr) -> Expr:
    """Gaussian error linear unit, exact."""
    return like(x, 0.5) * x * (like(x, 1) + tirx.erf(x * like(x, math.sqrt(0.5))))


def gelu_tanh(x: Expr) -> Expr:
    """Gaussian error linear unit with the tanh approximation (Hendrycks & Gimpel 2016), as ½ + ½ tanh(z) = σ(2z)."""
    inner = like(x, 2 * math.sqrt(2 / math.pi)) * (x + like(x, 0.044715) * x * x * x)
    return x * sigmoid(inner)


def _sign(x: Expr) -> Expr:
    negative = tirx.Select(x < like(x, 0), like(x, -1), x) if not str(x.ty).startswith("uint") else x
    return tirx.Select(x > like(x, 0), like(x, 1), negative)


def _round(x: Expr) -> Expr:
    return tirx.nearbyint(x)


_UNARY: dict[str, Scalar] = {
    "Relu": relu,
    "Exp": tirx.exp,
    "Log": tirx.log,
    "Tanh": tirx.tanh,
    "Erf": tirx.erf,
    "Sqrt": tirx.sqrt,
    "Sigmoid": sigmoid,
    "Neg": lambda x: x * like(x, -1),
    "Abs": absolute,
    "Reciprocal": lambda x: like(x, 1) / x,
    "Floor": tirx.floor,
    "Ceil": tirx.ceil,
    "Round": _round,
    "Sign": _sign,
    "Sin": tirx.sin,
    "Cos": tirx.cos,
    "Tan": tirx.tan,
    "Asin": tirx.asin,
    "Acos": tirx.acos,
    "Atan": tirx.atan,
    "Sinh": lambda x: libm("sinh", x),
    "Cosh": lambda x: libm("cosh", x),
    "Asinh": tirx.asinh,
    "Acosh": tirx.acosh,
    "Atanh": tirx.atanh,
    "Softplus": softplus,
    "Softsign": lambda x: x / (like(x, 1) + tirx.abs(x)),
    "Mish": lambda x: x * tirx.tanh(softplus(x)),
    "HardSwish": lambda x: x * _hard_sigmoid(x, 1 / 6, 0.5),
    "BitwiseNot": lambda x: ~x,
    "Not": tirx.Not,
}


@lowers(*_UNARY)
def unary(node: OpNode) -> Value:
    """Functions without parameters."""
    return apply(node, [node.input(0)], _UNARY[node.op_type])


def _hard_sigmoid(x: Expr, alpha: float, beta: float) -> Expr:
    return larger(like(x, 0), smaller(like(x, 1), like(x, alpha) * x + like(x, beta)))


def _elu(x: Expr, alpha: float) -> Expr:
    return tirx.Select(x < like(x, 0), like(x, alpha) * (tirx.exp(x) - like(x, 1)), x)


def _celu(x: Expr, alpha: float) -> Expr:
    return tirx.Select(x < like(x, 0), like(x, alpha) * (tirx.exp(x / like(x, alpha)) - like(x, 1)), x)


def _selu(x: Expr, alpha: float, gamma: float) -> Expr:
    negative = like(x, alpha) * tirx.exp(x) - like(x, alpha)
    return like(x, gamma) * tirx.Select(x > like(x, 0), x, negative)


def _leaky(x: Expr, alpha: float) -> Expr:
    return tirx.Select(x < like(x, 0), like(x, alpha) * x, x)


def _thresholded(x: Expr, alpha: float) -> Expr:
    return tirx.Select(x > like(x, alpha), x, like(x, 0))


def _shrink(x: Expr, bias: float, lambd: float) -> Expr:
    upper = tirx.Select(x > like(x, lambd), x - like(x, bias), like(x, 0))
    return tirx.Select(x < like(x, -lambd), x + like(x, bias), upper)


def _swish(x: Expr, alpha: float) -> Expr:
    return x * sigmoid(x if alpha == 1 else like(x, alpha) * x)


_PARAMETRIC: dict[str, tuple[Callable[..., Expr], dict[str, float]]] = {
    "HardSigmoid": (_hard_sigmoid, {"alpha": 0.2, "beta": 0.5}),
    "Elu": (_elu, {"alpha": 1.0}),
    "Celu": (_celu, {"alpha": 1.0}),
    "Selu": (_selu, {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875}),
    "LeakyRelu": (_leaky, {"alpha": 0.01}),
    "ThresholdedRelu": (_thresholded, {"alpha": 1.0}),
    "Shrink": (_shrink, {"bias": 0.0, "lambd": 0.5}),
    "Swish": (_swish, {"alpha": 1.0}),
}


@lowers(*_PARAMETRIC)
def parametric(node: OpNode) -> Value:
    """Activations with attributes."""
    rule, defaults = _PARAMETRIC[node.op_type]
    options = {name: node.attr(name, default) for name, default in defaults.items()}
    return apply(node, [node.input(0)], lambda x: rule(x, **options))


@lowers("Binarizer", domain="ai.onnx.ml")
def binarizer(node: OpNode) -> Value:
    """One above a threshold, zero elsewhere."""
    threshold = node.attr("threshold", 0.0)
    rule = lambda x: tirx.Select(x > like(x, threshold), like(x, 1), like(x, 0))  # noqa: E731
    return apply(node, [node.input(0)], rule)


@lowers("Gelu")
def gaussian_error_unit(node: OpNode) -> Value:
    """Gelu in the form ``approximate`` names, no more exact than what reads it can tell."""
    x = node.input(0)
    if node.attr("approximate", "none") == "tanh":
        return apply(node, [x], gelu_tanh)
    return apply(node, [x], _gelu_for(node) if x.dtype == "float32" else gelu)


def _gelu_for(node: OpNode) -> Scalar:
    step = step_behind(node)
    coarse = None if step is None else coarse_gelu(step)
    if coarse is not None or node.context.program.profile.kind == "cuda":
        return coarse or gelu
    return functools.partial(intrinsics.gelu, coarse=becomes_bfloat16(node))


@lowers("SwiGLU")
def swiglu(node: OpNode) -> Value:
    """``swish(x) * y`` for the halves of the operand, or of two operands."""
    alpha = node.attr("alpha", 1.0)
    return apply(node, [node.input(0), node.input(1)], lambda x, y: _swish(x, alpha) * y)


@lowers("IsNaN")
def is_nan(node: OpNode) -> Value:
    """Whether each element is NaN."""
    x = node.input(0)
    rule = tirx.isnan if is_float(x.dtype) else lambda v: tirx.const(False, "bool")
    return apply(node, [x], rule, "bool")


@lowers("IsInf")
def is_inf(node: OpNode) -> Value:
    """Whether each element is an infinity of a sign asked for."""
    signs = [s for s, name in ((1, "detect_positive"), (-1, "detect_negative")) if node.attr(name, 1)]

    def rule(x: Expr) -> Expr:
        dtype = str(x.ty)
        infinity = tirx.infinity(dtype)
        found = [tirx.EQ(x, infinity if s > 0 else tirx.const(float("-inf"), dtype)) for s in signs]
        return tirx.any(*found) if found else tirx.const(False, "bool")

    return elementwise(node, [node.input(0)], lambda x: rule(x.astype("float32") if "16" in str(x.ty) else x), "bool")
