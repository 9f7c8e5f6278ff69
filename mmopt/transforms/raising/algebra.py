"""Reads arithmetic by what it computes: chains of factors and offsets, polynomials, roots, whatever their order."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import constant, is_onnx
from mmopt.transforms.raising.building import sole_user, uniform

_MAX_STEPS = 6
_MAX_DEGREE = 4


def near(number: float | None, wanted: float) -> bool:
    """Whether ``number`` is ``wanted`` as an exporter writes it, in half precision at the worst."""
    return number is not None and abs(number - wanted) <= 6e-4 * abs(wanted)


@dataclasses.dataclass(frozen=True)
class Affine:
    """``factor · value + offset``."""

    value: ir.Value
    factor: float = 1.0
    offset: float = 0.0


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant of one element is."""
    array = constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 and array.dtype.kind == "f" else None


def split_scalar(node: ir.Node) -> tuple[ir.Value, float, int] | None:
    """Operands of a binary node of which one is a number: the other one, the number, and where the other stands."""
    if len(node.inputs) != 2:
        return None
    for position in (0, 1):
        number, other = scalar(node.inputs[1 - position]), node.inputs[position]
        if number is not None and other is not None and scalar(other) is None:
            return other, number, position
    return None


def step_back(affine: Affine) -> Affine | None:
    """The same quantity in terms of what ``affine.value`` is made of, when one number and one tensor make it."""
    node = affine.value.producer()
    if node is None or not is_onnx(node, "Mul", "Div", "Add", "Sub", "Neg"):
        return None
    if node.op_type == "Neg":
        return None if node.inputs[0] is None else Affine(node.inputs[0], -affine.factor, affine.offset)
    found = split_scalar(node)
    if found is None:
        return None
    value, number, position = found
    if node.op_type == "Mul":
        return Affine(value, affine.factor * number, affine.offset)
    if node.op_type == "Div":
        return Affine(value, affine.factor / number, affine.offset) if position == 0 and number else None
    sign = 1.0 if node.op_type == "Add" or position == 1 else -1.0
    factor = -affine.factor if node.op_type == "Sub" and position == 1 else affine.factor
    return Affine(value, factor, affine.offset + affine.factor * sign * number)


def affines(value: ir.Value | None) -> Iterator[Affine]:
    """``value`` as an affine function of itself, of what it is made of, and so on."""
    at = None if value is None else Affine(value)
    for _ in range(_MAX_STEPS):
        if at is None:
            return
        yield at
        at = step_back(at)


def multiple_of(value: ir.Value | None, of: ir.Value) -> float | None:
    """``c`` where ``value = c · of``."""
    for at in affines(value):
        if at.value is of and at.offset == 0:
            return at.factor
    return None


# -- polynomials ---------------------------------------------------------------------------------------------------

Polynomial = dict[int, float]


def polynomial(value: ir.Value | None, x: ir.Value, depth: int = 0) -> Polynomial | None:
    """Coefficients of ``value`` as a polynomial in ``x``, by power; ``None`` when it is none."""
    if value is x:
        return {1: 1.0}
    number = scalar(value)
    if number is not None:
        return {0: number}
    node = None if value is None else value.producer()
    if node is None or depth > 8 or not is_onnx(node, "Add", "Sub", "Mul", "Div", "Neg", "Pow"):
        return None
    left = polynomial(node.inputs[0], x, depth + 1)
    if left is None:
        return None
    if node.op_type == "Neg":
        return {power: -c for power, c in left.items()}
    if node.op_type == "Pow":
        exponent = scalar(node.inputs[1])
        return None if exponent not in (2.0, 3.0) else _power(left, int(exponent))
    right = polynomial(node.inputs[1], x, depth + 1)
    return None if right is None else _combined(node.op_type, left, right)


def _power(base: Polynomial, exponent: int) -> Polynomial | None:
    total: Polynomial | None = base
    for _ in range(exponent - 1):
        total = None if total is None else _product(total, base)
    return total


def _combined(op_type: str, left: Polynomial, right: Polynomial) -> Polynomial | None:
    if op_type == "Mul":
        return _product(left, right)
    if op_type == "Div":
        divisor = right.get(0, 0.0)
        return {p: c / divisor for p, c in left.items()} if set(right) == {0} and divisor else None
    sign = -1.0 if op_type == "Sub" else 1.0
    return {p: left.get(p, 0.0) + sign * right.get(p, 0.0) for p in {*left, *right}}


def _product(left: Polynomial, right: Polynomial) -> Polynomial | None:
    total: Polynomial = {}
    for (p, a), (q, b) in itertools.product(left.items(), right.items()):
        total[p + q] = total.get(p + q, 0.0) + a * b
    return total if max(total) <= _MAX_DEGREE else None


def ancestors(value: ir.Value | None) -> list[ir.Value]:
    """What arithmetic on the way to ``value`` reads, nearest first."""
    found: dict[ir.Value, None] = {}
    layer = [value]
    for _ in range(_MAX_STEPS):
        nodes = [v.producer() for v in layer if v is not None]
        layer = [i for n in nodes if n is not None and is_onnx(n, "Add", "Mul", "Div", "Pow", "Sub") for i in n.inputs]
        found |= dict.fromkeys(v for v in layer if v is not None and constant(v) is None)
    return list(found)


# -- forward -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gate:
    """``value = x · (factor · anchor + offset)``."""

    value: ir.Value
    factor: float
    offset: float


def gate(anchor: ir.Value, x: ir.Value) -> Gate | str:
    """Where ``x`` meets an affine function of ``anchor`` in a product; else why it does not."""
    value, factor, offset = anchor, 1.0, 0.0
    met = False
    for _ in range(_MAX_STEPS):
        user = sole_user(value)
        if user is None or not is_onnx(user, "Add", "Mul", "Div", "Sub"):
            break
        found = split_scalar(user)
        step = None if found is None else _scalar_step(user, found[1], found[2], met)
        if step is not None:
            factor, offset = factor * step[0], offset * step[0] + step[1]
        elif user.op_type == "Mul" and not met:
            other = user.inputs[1] if user.inputs[0] is value else user.inputs[0]
            times = multiple_of(other, x)
            if times is None:
                return "it is not multiplied by its own operand"
            factor, offset, met = factor * times, offset * times, True
        else:
            break
        value = user.outputs[0]
    if not met:
        needed = sole_user(value) is None and len(value.uses()) > 1
        return "what is between is needed elsewhere too" if needed else "it is not multiplied by its own operand"
    return Gate(value, factor, offset)


def _scalar_step(user: ir.Node, number: float, position: int, met: bool) -> tuple[float, float] | None:
    """Factor and offset that a node with one number applies; no offset once the product is made."""
    if user.op_type == "Mul":
        return number, 0.0
    if user.op_type == "Div":
        return (1 / number, 0.0) if position == 0 and number else None
    if met:
        return None
    if user.op_type == "Add":
        return 1.0, number
    return (1.0, -number) if position == 0 else (-1.0, number)


@dataclasses.dataclass(frozen=True)
class Inverse:
    """``numerator / sqrt(value + epsilon)``.

    Attributes:
        product: The node that multiplies or divides.
        numerator: What is divided.
        epsilon: What is added before the root.
    """

    product: ir.Node
    numerator: ir.Value
    epsilon: float


def divided_by_root(value: ir.Value) -> Inverse | str:
    """Follow ``value`` to the product with the inverse of its root; else why it does not get there."""
    epsilon = 0.0
    user = sole_user(value)
    if user is not None and is_onnx(user, "Add"):
        number = uniform(user.inputs[1] if user.inputs[0] is value else user.inputs[0])
        if number is None or number < 0:
            return f"what {user.name} adds to the mean is no small number"
        epsilon, value = number, user.outputs[0]
        user = sole_user(value)
    rooted = _rooted(user, value)
    if rooted is None:
        return "no square root of the mean follows"
    node, power = rooted
    if power == 0.5:
        found = _divided(node.outputs[0], epsilon)
        if not isinstance(found, ir.Node):
            return found
        node = found
    value, user = node.outputs[0], sole_user(node.outputs[0])
    if user is None or not is_onnx(user, "Mul"):
        return "the inverse root is needed elsewhere too, or is no factor"
    other = user.inputs[1] if user.inputs[0] is value else user.inputs[0]
    return "the inverse root lacks a factor" if other is None else Inverse(user, other, epsilon)


def _divided(root: ir.Value, epsilon: float) -> Inverse | ir.Node | str:
    """What a root divides; or the node that gives its inverse; else why there is neither."""
    user = sole_user(root)
    if user is None:
        return "the root is needed elsewhere too"
    if is_onnx(user, "Reciprocal"):
        return user
    if not is_onnx(user, "Div") or user.inputs[1] is not root or user.inputs[0] is None:
        return "nothing is divided by the root"
    number = scalar(user.inputs[0])
    if number is None:
        return Inverse(user, user.inputs[0], epsilon)
    return user if number == 1 else "the root divides another number than 1"


def _rooted(user: ir.Node | None, value: ir.Value) -> tuple[ir.Node, float] | None:
    if user is None:
        return None
    if is_onnx(user, "Sqrt"):
        return user, 0.5
    if is_onnx(user, "Pow") and user.inputs[0] is value and scalar(user.inputs[1]) in (0.5, -0.5):
        return user, scalar(user.inputs[1]) or 0.5
    return None


def square_of(value: ir.Value | None) -> ir.Value | None:
    """``x`` where ``value = x²``."""
    node = None if value is None else value.producer()
    if node is None:
        return None
    if is_onnx(node, "Pow") and scalar(node.inputs[1]) == 2:
        return node.inputs[0]
    return node.inputs[0] if is_onnx(node, "Mul") and node.inputs[0] is node.inputs[1] else None
