"""Arithmetic, comparison, logic and activations, element by element with numpy's broadcasting."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from mmopt.training.lazy import functional, torch
from mmopt.training.registry import Types, add, rule
from mmopt.training.tensors import BOUNDS, dtypes

if TYPE_CHECKING:
    from torch import Tensor

for _name in (
    *("Abs", "Acos", "Acosh", "Add", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor"),
    *("Log", "Mul", "Neg", "Reciprocal", "Relu", "Sigmoid", "Sign", "Sin", "Sinh", "Sqrt", "Sub", "Tan", "Tanh"),
):
    add(f"torch.{_name.lower()}", _name)

for _name, _function in {
    "IsNaN": "torch.isnan",
    "Equal": "torch.eq",
    "Greater": "torch.gt",
    "GreaterOrEqual": "torch.ge",
    "Less": "torch.lt",
    "LessOrEqual": "torch.le",
    "And": "torch.logical_and",
    "Or": "torch.logical_or",
    "Xor": "torch.logical_xor",
    "Not": "torch.logical_not",
    "BitwiseAnd": "torch.bitwise_and",
    "BitwiseOr": "torch.bitwise_or",
    "BitwiseXor": "torch.bitwise_xor",
    "Mish": "torch.nn.functional.mish",
    "Softsign": "torch.nn.functional.softsign",
}.items():
    add(_function, _name)


@rule("Round")
def round_half_even(x: Tensor) -> Tensor:
    """Round to the nearest, halves to even. The gradient is zero, as the function's own is."""
    return torch.round(x)


def _unsigned(node: ir.Node, types: Types) -> Mapping[str, Any]:
    dtype = types(node.outputs[0]) or types(node.inputs[0])
    return {"unsigned_bits": dtype.bitwidth if dtype is not None and dtype.name.startswith("UINT") else 0}


@rule("BitwiseNot", static=_unsigned)
def bitwise_not(x: Tensor, *, unsigned_bits: int = 0) -> Tensor:
    """Unsigned integers may be held in wider signed ones: only their own bits turn."""
    return (1 << unsigned_bits) - 1 - x if unsigned_bits and x.dtype.is_signed else torch.bitwise_not(x)


@rule("BitShift", static=_unsigned)
def bit_shift(x: Tensor, count: Tensor, *, direction: str, unsigned_bits: int = 0) -> Tensor:
    """Shift; bits that leave an unsigned integer are lost."""
    if direction == "RIGHT":
        return torch.bitwise_right_shift(x, count)
    moved = torch.bitwise_left_shift(x.to(torch.int64), count.to(torch.int64))
    kept = (1 << unsigned_bits) - 1 if 0 < unsigned_bits < 64 else -1
    return (moved & kept).to(x.dtype)


@rule("Div")
def div(x: Tensor, y: Tensor) -> Tensor:
    """Division; that of integers is cut off towards zero."""
    if x.dtype.is_floating_point or x.is_complex():
        return torch.div(x, y)
    return torch.div(x, y, rounding_mode="trunc")


@rule("Mod")
def mod(x: Tensor, y: Tensor, *, fmod: int = 0) -> Tensor:
    """Remainder with the sign of the divisor, or of the dividend."""
    return torch.fmod(x, y) if fmod else torch.remainder(x, y)


@rule("Pow")
def power(x: Tensor, y: Tensor) -> Tensor:
    """``x ** y`` in the type of ``x``."""
    if y.numel() == 1 and not y.requires_grad and y.ndim <= x.ndim:
        exponent = y.item()
        if x.dtype.is_floating_point or float(exponent).is_integer():
            return torch.pow(x, exponent).to(x.dtype)
    return torch.pow(x, y).to(x.dtype)


@rule("IsInf")
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Infinities of either sign or both."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = x.float()
    found = torch.zeros_like(x, dtype=torch.bool)
    found = found | torch.isposinf(x) if detect_positive else found
    return found | torch.isneginf(x) if detect_negative else found


@rule("Where")
def where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``x`` where the condition holds, else ``y``."""
    return torch.where(condition, x, y)


@rule("Max")
def maximum(*xs: Tensor) -> Tensor:
    """Largest of each element. Where several are, each gets an equal part of the gradient."""
    return functools.reduce(torch.maximum, xs)


@rule("Min")
def minimum(*xs: Tensor) -> Tensor:
    """Smallest of each element."""
    return functools.reduce(torch.minimum, xs)


@rule("Sum")
def total(*xs: Tensor) -> Tensor:
    """Sum of all inputs."""
    return functools.reduce(torch.add, xs)


@rule("Mean")
def mean(*xs: Tensor) -> Tensor:
    """Mean of all inputs."""
    return functools.reduce(torch.add, xs) / len(xs)


def _target(node: ir.Node, types: Types) -> Mapping[str, Any]:
    found = ir.DataType(node.attributes["to"].as_int()) if "to" in node.attributes else types(node.inputs[1])
    if found is None:
        return {}
    if found not in dtypes():
        raise ValueError(f"torch has no tensors of {found.name}")
    return {"to": found.name}


@rule("Cast", integers="none", static=_target)
def cast(x: Tensor, *, to: str, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Another type. Between types of floats, gradients pass unchanged: that of a pair of casts is the identity."""
    dtype = ir.DataType[to]
    target = dtypes()[dtype]
    if dtype == ir.DataType.BOOL:
        return x != 0
    if to.startswith("FLOAT8"):
        return _to_float8(x, target, bool(saturate))
    if dtype in BOUNDS and (target.itemsize * 8 != dtype.bitwidth or x.dtype.is_floating_point):
        return _to_narrow(x, dtype, target)
    return x.to(target)


def _to_float8(x: Tensor, target: torch.dtype, saturate: bool) -> Tensor:
    largest = torch.finfo(target).max
    x = x.float()
    if saturate:
        return torch.where(x.isnan(), x, x.clamp(-largest, largest)).to(target)
    made = x.to(target)
    if target in (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        # Half a step above the largest still rounds to it; what is beyond has no infinity to become.
        made = torch.where(x.abs() > largest * 1.0357, torch.full_like(x, math.nan), made.float()).to(target)
    return made


def _to_narrow(x: Tensor, dtype: ir.DataType, target: torch.dtype) -> Tensor:
    """To an integer, with the bits that do not fit cut off."""
    bits = dtype.bitwidth
    if x.dtype.is_floating_point:
        x = torch.where(x.isfinite(), x, torch.zeros_like(x)).to(torch.int64)
    wide = x.to(torch.int64) & ((1 << bits) - 1)
    if dtype.name.startswith("INT"):
        wide = torch.where(wide >= 1 << (bits - 1), wide - (1 << bits), wide)
    return wide.to(target)


@rule("CastLike", static=_target)
def cast_like(x: Tensor, like: Tensor, *, to: str = "", saturate: int = 1, round_mode: str = "up") -> Tensor:
    """The type of another tensor."""
    known = to or next(dtype.name for dtype, held in dtypes().items() if held == like.dtype)
    return cast(x, to=known, saturate=saturate)


@rule("Clip")
def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Cut to an interval. An upper end below the lower one wins."""
    if low is not None:
        x = torch.maximum(x, low.to(x.dtype))
    return x if high is None else torch.minimum(x, high.to(x.dtype))


@rule("Gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """``x Φ(x)``, exactly or by tanh."""
    return functional.gelu(x, approximate=approximate)


@rule("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """``x``, or ``alpha x`` below zero."""
    return functional.leaky_relu(x, alpha)


@rule("PRelu")
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """``x``, or ``slope · x`` below zero; the slope broadcasts."""
    return torch.where(x < 0, x * slope, x)


@rule("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """``x``, or ``alpha (eˣ − 1)`` below zero."""
    return functional.elu(x, alpha)


@rule("Celu")
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """``max(0, x) + min(0, alpha (e^(x/alpha) − 1))``."""
    return functional.celu(x, alpha)


@rule("Selu")
def selu(x: Tensor, *, alpha: float = 1.6732632423543772, gamma: float = 1.0507009873554805) -> Tensor:
    """``gamma · elu(x, alpha)``."""
    return gamma * functional.elu(x, alpha)


@rule("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """``max(0, min(1, alpha x + beta))``."""
    return torch.clamp(alpha * x + beta, 0, 1)


@rule("HardSwish")
def hard_swish(x: Tensor) -> Tensor:
    """``x · hard_sigmoid(x)`` with slope 1/6."""
    return x * torch.clamp(x / 6 + 0.5, 0, 1)


@rule("Swish")
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """``x · sigmoid(alpha x)``."""
    return x * torch.sigmoid(alpha * x)


@rule("Softplus")
def softplus(x: Tensor) -> Tensor:
    """``log(1 + eˣ)``."""
    return functional.softplus(x)


@rule("ThresholdedRelu")
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """``x`` above ``alpha``, else zero."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


@rule("Shrink")
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """Zero within ``±lambd``; outside, nearer to zero by ``bias``."""
    zero = torch.zeros_like(x)
    return torch.where(x > lambd, x - bias, torch.where(x < -lambd, x + bias, zero))


@rule("Dropout", several=True)
def dropout(x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None, *, seed: int = 0) -> Any:
    """What it is in evaluation: the input, and a mask of ones. A model that drops even then drops here too."""
    if training is None or not bool(training):
        return x, torch.ones_like(x, dtype=torch.bool)
    part = 0.5 if ratio is None else float(ratio)
    if part == 0:
        return x, torch.ones_like(x, dtype=torch.bool)
    mask = torch.rand_like(x) >= part
    return x * mask / (1 - part), mask
