"""What stands before a QuantizeLinear need not be more exact than the integers that come of it.

A quotient is rounded as the standard says when its dividend is given. When a product, a sum or a norm of the same
kernel made the dividend, it carries that operator's own rounding errors of a unit in the last place or more, and the
same is allowed to the division: a multiplication takes its place. A Gelu that nothing but a QuantizeLinear reads is a
polynomial whose error is a small part of the step; before a Cast to bfloat16, one whose error is a part of its.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from tvm import tirx
from tvm.ir import Expr

from mmopt.lowering.registry import OpNode

SHARE = 1 / 64
"""Largest error of a function before quantizing, as a part of the step."""

_MAGIC = 12582912.0
"""1.5 · 2²³: added to a float of less than 2²², it leaves the nearest integer, halves to even, in the last bits."""

_CARRYING = frozenset({"Relu", "Clip", "Max", "Min", "MaxPool", "Identity", "Reshape", "Transpose", "Squeeze"})
"""Operators that hand on what they read, or a constant."""

_GIVEN = frozenset({"DequantizeLinear", "Cast"})
"""Operators whose result is exact."""

_GELU = (
    (
        1.03e-3,
        3.4,
        (0.39427947998046875, -0.05980776995420456, 0.0067119537852704525, -0.00041514437180012465,
         1.0556701454333961e-05),
    ),
    (
        4.9e-4,
        3.7,
        (0.39653173089027405, -0.06265585869550705, 0.007874577306210995, -0.0006217035697773099,
         2.7193575078854337e-05, -4.980974495083501e-07),
    ),
    (
        1.6e-4,
        3.9,
        (0.39801740646362305, -0.064768485724926, 0.008865175768733025, -0.0008339560008607805,
         5.009608867112547e-05, -1.7105861616073526e-06, 2.5055422625541723e-08),
    ),
    (
        8.2e-5,
        4.1,
        (0.39867115020751953, -0.06580432504415512, 0.009431811980903149, -0.0009821660351008177,
         7.092077430570498e-05, -3.323197233839892e-06, 8.991395361590548e-08, -1.0585303744647945e-09),
    ),
    (
        4.3e-5,
        4.3,
        (0.3987332582473755, -0.06602644175291061, 0.009614214301109314, -0.0010473133297637105,
         8.321573841385543e-05, -4.642082785721868e-06, 1.7070925650841673e-07, -3.690997951721897e-09,
         3.5380618573777056e-11),
    ),
)  # fmt: skip
"""Largest error for |x| ≤ 20, where x is cut off, and the polynomial: the coarsest first. They were fitted by
``benchmarks/fit_intrinsics.py``."""


def is_rounded(value: ir.Value) -> bool:
    """Whether an operator of the same kernel made ``value`` with rounding errors of its own."""
    producer = value.producer()
    while producer is not None and producer.op_type in _CARRYING and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    return producer is not None and producer.op_type not in _GIVEN


def requantized(x: Expr, scale: float, zero: int, dtype: str) -> Expr:
    """``saturate(round(x / scale) + zero)`` up to the rounding of the quotient, halves to even.

    Four instructions a vector: the sum with :data:`_MAGIC` rounds and, as its bits count up by one from integer to
    integer, converts too. Bounds are applied before its bits are taken.
    """
    info = np.iinfo(dtype)
    inverse = float(np.float32(1) / np.float32(scale))
    low, high = (tirx.const(_MAGIC + limit - zero, "float32") for limit in (int(info.min), int(info.max)))
    shifted = x * tirx.const(inverse, "float32") + tirx.const(_MAGIC, "float32")
    bits = tirx.reinterpret("int32", tirx.max(tirx.min(shifted, high), low))
    return (bits + tirx.const(zero, "int32") if zero else bits).astype(dtype)


def can_requantize(scale: Expr, zero: Expr | None, dtype: str) -> bool:
    """Whether :func:`requantized` covers these parameters."""
    if not isinstance(scale, tirx.FloatImm) or not (zero is None or isinstance(zero, tirx.IntImm)):
        return False
    size = abs(float(scale.value))
    return dtype in ("uint8", "int8", "uint16", "int16") and 2.0**-100 < size < 2.0**100


def step_behind(node: OpNode) -> float | None:
    """The step of the 8-bit integers that ``node``'s result is rounded to, when nothing else reads it.

    Constants may scale and shift it on the way, as where channels of different ranges share a step.
    """
    output, factor = node.node.outputs[0], 1.0
    while (user := _only_user(output)) is not None and user.op_type in ("Mul", "Add") and user.domain == "":
        other = next((v for v in user.inputs if v is not output), None)
        value = None if other is None else node.context.value(other)
        if value is None or value.constant is None or not value.constant.size:
            return None
        factor *= float(np.abs(value.constant).max()) if user.op_type == "Mul" else 1.0
        output = user.outputs[0]
    if user is None or user.op_type != "QuantizeLinear" or len(user.inputs) < 3 or user.inputs[0] is not output:
        return None
    scale, zero = (node.context.value(v) if v is not None else None for v in user.inputs[1:3])
    if scale is None or zero is None or scale.constant is None or zero.dtype not in ("uint8", "int8"):
        return None
    return float(np.abs(scale.constant).min()) / max(factor, 1e-30) if scale.constant.size else None


def becomes_bfloat16(node: OpNode) -> bool:
    """Whether ``node``'s result is rounded to bfloat16, and nothing else reads it."""
    user = _only_user(node.node.outputs[0])
    if user is None or user.op_type != "Cast" or user.domain != "":
        return False
    return user.attributes["to"].as_int() == ir.DataType.BFLOAT16


def _only_user(value: ir.Value) -> ir.Node | None:
    users = {user for user, _ in value.uses()}
    return users.pop() if len(users) == 1 and not value.is_graph_output() else None


def coarse_gelu(step: float) -> Callable[[Expr], Expr] | None:
    """Gelu within :data:`SHARE` of ``step``; ``None`` where the step is too fine for the polynomials here.

    Φ(x) − ½ is odd: t · p(t²) with t = x cut off at ± c, beyond which Φ is 0 or 1 as far as it matters.
    """
    for error, bound, coefficients in _GELU:
        if error <= SHARE * step:
            return functools.partial(_gelu, bound=bound, coefficients=coefficients)
    return None


def _gelu(x: Expr, bound: float, coefficients: Sequence[float]) -> Expr:
    # Cut off below before it is multiplied with, far negative numbers give nearly 0 and not a part of them.
    x = tirx.max(x, tirx.const(-bound, "float32"))
    t = tirx.min(x, tirx.const(bound, "float32"))
    return x * (t * _polynomial(t * t, coefficients) + tirx.const(0.5, "float32"))


def _polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    value: Expr = tirx.const(coefficients[-1], "float32")
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + tirx.const(coefficient, "float32")
    return value
