"""Lifts activations that exporters spell out.

    0.5 · x · (1 + erf(x / √2))                            →  Gelu(x)
    0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))     →  Gelu(x) {approximate="tanh"}
    x · sigmoid(a · x)                                     →  Swish(x) {alpha=a}, from opset 24 on
    x · min(max(x + 3, 0), 6) / 6, x · HardSigmoid(x)      →  HardSwish(x)
    log(1 + exp(x))                                        →  Softplus(x), when asked for
    x · tanh(softplus(x))                                  →  Mish(x)

Factors may stand anywhere in the product. Softplus cannot overflow as its spelling can, but onnxruntime takes several
times as long for it, so it is left as it is by default.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import is_onnx
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule
from mmopt.transforms.raising.algebra import Gate, affines, ancestors, gate, near, polynomial, scalar
from mmopt.transforms.raising.building import Builder, sole_user
from mmopt.transforms.raising.rules import RaisingPass, RaisingRule

_SWISH_OPSET = 24


def _gelu(node: ir.Node, rewriter: Rewriter) -> bool:
    """From the Erf."""
    x = next((at.value for at in affines(node.inputs[0]) if near(at.factor, math.sqrt(0.5)) and at.offset == 0), None)
    if x is None:
        return rewriter.miss(node, "Gelu: the operand of Erf is not divided by the root of 2.")
    return _half_of_one_plus(node, x, rewriter, {})


def _gelu_tanh(node: ir.Node, rewriter: Rewriter) -> bool:
    """From the Tanh."""
    inner = node.inputs[0]
    for x in ancestors(inner):
        found = polynomial(inner, x)
        if found is not None and _is_tanh_gelu(found):
            return _half_of_one_plus(node, x, rewriter, {"approximate": "tanh"})
    return False


def _is_tanh_gelu(found: dict[int, float]) -> bool:
    root = math.sqrt(2 / math.pi)
    rest = [c for power, c in found.items() if power not in (1, 3)]
    return near(found.get(1), root) and near(found.get(3), 0.044715 * root) and not any(rest)


def _half_of_one_plus(node: ir.Node, x: ir.Value, rewriter: Rewriter, attributes: dict[str, Any]) -> bool:
    found = gate(node.outputs[0], x)
    if isinstance(found, str):
        return rewriter.miss(node, f"Gelu: {found}.")
    if not near(found.offset, found.factor) or found.factor == 0:
        return rewriter.miss(node, f"Gelu: x is multiplied by {found.factor:g} · {node.op_type} + {found.offset:g}.")
    return _replace(found, "Gelu", x, 2 * found.factor, rewriter, attributes)


def _replace(
    found: Gate, op_type: str, x: ir.Value, times: float, rewriter: Rewriter, attributes: dict[str, Any]
) -> bool:
    """Put ``times · op_type(x)`` in place of the product, where that has the shape of ``x``."""
    last = found.value.producer()
    if last is None or not rewriter.same_shape(x, found.value):
        return False
    builder = Builder(rewriter, last)
    shape, dtype = builder.shape(x), rewriter.dtype(x)
    result = builder.node(op_type, [x], shape, dtype, **attributes)
    if not near(times, 1.0) and dtype is not None:
        factor = builder.constant(np.array(times, dtype=dtype.numpy()), "factor")
        result = builder.node("Mul", [result, factor], shape, dtype)
    return rewriter.replace(last, result)


def _swish(node: ir.Node, rewriter: Rewriter) -> bool:
    """From the Sigmoid."""
    if rewriter.opset(node) < _SWISH_OPSET:
        return False
    for at in affines(node.inputs[0]):
        if at.offset != 0:
            continue
        found = gate(node.outputs[0], at.value)
        if isinstance(found, Gate) and found.offset == 0 and found.factor != 0:
            return _replace(found, "Swish", at.value, found.factor, rewriter, {"alpha": at.factor})
    return False


def _hard_swish(node: ir.Node, rewriter: Rewriter) -> bool:
    """From the Clip, or the HardSigmoid."""
    if node.op_type == "Clip":
        bounds = [scalar(value) for value in (*node.inputs[1:3], None, None)[:2]]
        slope, limit = 1.0, 6.0
        if bounds != [0.0, 6.0]:
            return False
    else:
        slope, limit = _attribute(node, "alpha", 0.2) * 6, 1.0
        if not near(slope, 1.0) or not near(_attribute(node, "beta", 0.5), 0.5):
            return False
    for at in affines(node.inputs[0]):
        wanted = 3.0 if node.op_type == "Clip" else 0.0
        if at.factor != 1 or (at.offset != wanted):
            continue
        found = gate(node.outputs[0], at.value)
        if isinstance(found, Gate) and found.offset == 0 and found.factor != 0:
            return _replace(found, "HardSwish", at.value, found.factor * limit, rewriter, {})
    return False


def _attribute(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.is_ref() else attribute.as_float()


def _softplus(node: ir.Node, rewriter: Rewriter) -> bool:
    """From the Log."""
    total = node.inputs[0].producer() if node.inputs[0] is not None else None
    if total is None or not is_onnx(total, "Add") or sole_user(total.outputs[0]) is not node:
        return False
    for position in (0, 1):
        summand = total.inputs[position]
        exponential = None if summand is None else summand.producer()
        if exponential is None or not is_onnx(exponential, "Exp") or scalar(total.inputs[1 - position]) != 1:
            continue
        x = exponential.inputs[0]
        if x is not None and sole_user(exponential.outputs[0]) is total and rewriter.same_shape(x, node.outputs[0]):
            made = rewriter.emit("Softplus", [x], node, like=node.outputs[0])
            return rewriter.replace(node, made.outputs[0])
    return False


def _mish(node: ir.Node, rewriter: Rewriter) -> bool:
    """From the Tanh."""
    inner = node.inputs[0].producer() if node.inputs[0] is not None else None
    if inner is None or not is_onnx(inner, "Softplus") or inner.inputs[0] is None:
        return False
    if sole_user(inner.outputs[0]) is not node:
        return rewriter.miss(node, "Mish: the Softplus is needed elsewhere too.")
    found = gate(node.outputs[0], inner.inputs[0])
    if isinstance(found, str) or found.offset != 0 or found.factor == 0:
        return False
    return _replace(found, "Mish", inner.inputs[0], found.factor, rewriter, {})


RULES = (
    RaisingRule("gelu", ("Erf",), _gelu, "0.5 · x · (1 + erf(x / √2))", "Gelu"),
    RaisingRule("gelu-tanh", ("Tanh",), _gelu_tanh, "0.5 · x · (1 + tanh(√(2/π) (x + 0.044715 x³)))", "Gelu"),
    RaisingRule("swish", ("Sigmoid",), _swish, "x · sigmoid(a x), from opset 24 on", "Swish"),
    RaisingRule("hard-swish", ("Clip", "HardSigmoid"), _hard_swish, "x · min(max(x + 3, 0), 6) / 6", "HardSwish"),
    RaisingRule("softplus", ("Log",), _softplus, "log(1 + exp(x)), with the option softplus", "Softplus"),
    RaisingRule("mish", ("Tanh",), _mish, "x · tanh(softplus(x))", "Mish"),
)


@dataclasses.dataclass(frozen=True)
class RaiseActivations(RaisingPass):
    """Lifts activations into the standard's operators.

    Attributes:
        softplus: Whether Softplus is lifted too.
    """

    softplus: bool = False

    def raising_rules(self) -> tuple[RaisingRule, ...]:
        """The rules of this module."""
        return RULES

    def rules(self) -> tuple[Rule, ...]:
        """Those that are on."""
        return tuple(rule for rule in RULES if self.softplus or rule.name != "softplus")
