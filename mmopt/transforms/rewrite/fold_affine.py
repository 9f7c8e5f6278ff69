"""Folds scales and offsets by constants into the weights beside them.

    y = a · (W x + c) + b    →  y = (a W) x + (a c + b)      a, b per output channel
    y = W (a · x + b) + c    →  y = (W a) x + (W b + c)      a, b per input channel, from a batch normalization

The affine step is a BatchNormalization, or a Mul, Div, Add or Sub with a constant. The linear one is a Conv,
ConvTranspose, Gemm or MatMul with constant weights, or a LayerNormalization or RMSNormalization, whose scale and bias
take part alike. New weights are computed in float64 and rounded once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mmopt.pipeline.base import Fidelity
from mmopt.transforms.canonicalize.editing import Array, constant, integer, is_onnx, new_initializer, tensor_of
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass

MAX_COPIED = 1 << 22
"""Weights with more elements are not copied to fold something into one of their several uses."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


@dataclasses.dataclass(frozen=True)
class Affine:
    """``a · value + b``, per channel.

    Attributes:
        value: What goes in.
        a: Factors, ``[channels]`` or ``[1]``, float64.
        b: Offsets, ``[channels]`` or ``[1]``, float64.
    """

    value: ir.Value
    a: Array
    b: Array


@dataclasses.dataclass(frozen=True)
class Linear:
    """Weights of a linear step, seen as ``[outputs]`` channels to scale.

    Attributes:
        node: The node.
        weight: Its weights, float64.
        bias: Its bias, ``[channels]``, or ``None``.
        channels: Output channels.
        scaled: ``scaled(weight, a)``: weights times a factor per output channel.
        biased: Whether the operator can take a bias.
    """

    node: ir.Node
    weight: Array
    bias: Array | None
    channels: int
    scaled: Callable[[Array, Array], Array]
    biased: bool = True


_CHANNEL_AXIS = {"Conv": 1, "ConvTranspose": 1, "Gemm": -1, "MatMul": -1}
_NORMS = ("LayerNormalization", "RMSNormalization")


def _after(node: ir.Node, rewriter: Rewriter) -> bool:
    """An affine step that reads a linear one."""
    for place in range(2):
        value = node.inputs[place] if place < len(node.inputs) else None
        producer = None if value is None else value.producer()
        if value is None or producer is None or not is_onnx(producer, *_CHANNEL_AXIS, *_NORMS):
            continue
        if len(value.uses()) > 1 or value.is_graph_output() or value is not producer.outputs[0]:
            continue
        axis = _CHANNEL_AXIS.get(producer.op_type, -1)
        affine = _affine(node, place, axis, rewriter)
        if affine is not None and _fold(node, producer, affine, rewriter):
            return True
    return False


def _fold(node: ir.Node, producer: ir.Node, affine: Affine, rewriter: Rewriter) -> bool:
    linear = _linear(producer, rewriter)
    if linear is None or affine.a.size not in (1, linear.channels) or affine.b.size not in (1, linear.channels):
        return False
    if not linear.biased and affine.b.any():
        return False
    bias = affine.b if linear.bias is None else linear.bias * affine.a + affine.b
    weight = linear.scaled(linear.weight, np.broadcast_to(affine.a, [linear.channels]))
    needed = linear.bias is not None or bool(affine.b.any())
    full = np.broadcast_to(bias, [linear.channels]) if needed else None
    return _replace(node, linear, producer.inputs[0], weight, full, rewriter)


def _before(node: ir.Node, rewriter: Rewriter) -> bool:
    """A batch normalization that only a Conv without padding, or a Gemm, reads."""
    users = list(node.outputs[0].uses())
    if len(users) != 1 or node.outputs[0].is_graph_output() or users[0].idx != 0:
        return False
    user = users[0].node
    affine = _batch_norm(node) if is_onnx(user, "Conv", "Gemm") else None
    linear = None if affine is None else _linear(user, rewriter)
    if affine is None or linear is None:
        return False
    if is_onnx(user, "Conv"):
        if affine.b.any() and _pads(user):
            return rewriter.miss(node, f"stays before {user.name!r}, whose padding is not shifted with the rest")
        weight, extra = _into_conv(linear.weight, affine, integer(user, "group", 1) or 1)
    else:
        if integer(user, "transA", 0):
            return False
        weight, extra = _into_gemm(linear.weight, affine, user)
    bias = extra if linear.bias is None else linear.bias + extra
    return _replace(user, linear, affine.value, weight, bias, rewriter)


def _into_conv(weight: Array, affine: Affine, groups: int) -> tuple[Array, Array]:
    outputs, depth = weight.shape[:2]
    shape = (outputs, depth, *[1] * (weight.ndim - 2))
    a, b = (np.broadcast_to(v, [groups * depth]).reshape(groups, depth) for v in (affine.a, affine.b))
    per_output = [np.repeat(v, outputs // groups, axis=0).reshape(shape) for v in (a, b)]
    return weight * per_output[0], (weight * per_output[1]).reshape(outputs, -1).sum(axis=1)


def _into_gemm(weight: Array, affine: Affine, gemm: ir.Node) -> tuple[Array, Array]:
    factor = _real(gemm, "alpha", 1.0)
    if integer(gemm, "transB", 0):
        return weight * affine.a[None, :], factor * (weight * affine.b[None, :]).sum(axis=1)
    return weight * affine.a[:, None], factor * (weight * affine.b[:, None]).sum(axis=0)


def _replace(
    node: ir.Node, linear: Linear, source: ir.Value | None, weight: Array, bias: Array | None, rewriter: Rewriter
) -> bool:
    """Let the linear step with new weights stand for ``node``."""
    old, owner = linear.node, linear.node.graph
    dtype = rewriter.dtype(old.inputs[1])
    if owner is None or dtype is None or not np.isfinite(weight).all() or (bias is not None and not _finite(bias)):
        return False
    kind = dtype.numpy()
    name = str(old.inputs[1].name) if old.inputs[1] is not None else "weight"
    with np.errstate(over="ignore"):
        arrays = [weight.astype(kind)] + ([] if bias is None else [np.ascontiguousarray(bias).astype(kind)])
    if not all(np.isfinite(array).all() for array in arrays):
        return rewriter.miss(node, f"stays beside {old.name!r}: the folded weights leave the range of {dtype.name}")
    values = [
        new_initializer(owner, ir.tensor(array), rewriter.names.fresh(f"{name}_{suffix}"))
        for array, suffix in zip(arrays, ("scaled", "offset"), strict=False)
    ]
    attributes = [value for key, value in old.attributes.items() if key != "beta"]
    new = rewriter.emit(old.op_type, [source, *values], node, like=node.outputs[0], attributes=attributes)
    return rewriter.replace(node, new.outputs[0])


def _finite(array: Array) -> bool:
    return bool(np.isfinite(array).all())


def _pads(node: ir.Node) -> bool:
    auto, pads = node.attributes.get("auto_pad"), node.attributes.get("pads")
    implied = auto is not None and (auto.is_ref() or auto.as_string() not in ("NOTSET", "VALID"))
    return implied or (pads is not None and (pads.is_ref() or any(pads.as_ints())))


def _affine(node: ir.Node, place: int, axis: int, rewriter: Rewriter) -> Affine | None:
    """What ``node`` does to its input at ``place``, per channel along ``axis``."""
    if is_onnx(node, "BatchNormalization"):
        return _batch_norm(node) if place == 0 and axis == 1 else None
    value, other = node.inputs[place], node.inputs[1 - place]
    number, shape = constant(other), rewriter.shape(value)
    if value is None or number is None or shape is None or rewriter.shape(node.outputs[0]) != shape:
        return None
    flat = _per_channel(number, len(shape), axis)
    if flat is None or (place == 1 and not is_onnx(node, "Mul", "Add")):
        return None
    one, zero = np.ones(1), np.zeros(1)
    if is_onnx(node, "Mul", "Div"):
        with np.errstate(divide="ignore"):
            return Affine(value, flat if is_onnx(node, "Mul") else 1 / flat, zero)
    return Affine(value, one, flat if is_onnx(node, "Add") else -flat)


def _per_channel(array: Array, rank: int, axis: int) -> Array | None:
    """``array`` as a vector over ``axis``, if it varies along no other axis."""
    if array.ndim > rank or array.dtype.kind != "f":
        return None
    full = array.reshape((1,) * (rank - array.ndim) + array.shape)
    rest = [size for place, size in enumerate(full.shape) if place != axis % rank]
    return full.reshape(-1).astype(np.float64) if all(size == 1 for size in rest) else None


def _batch_norm(node: ir.Node) -> Affine | None:
    value = node.inputs[0]
    arrays = [constant(v) for v in node.inputs[1:5]]
    if value is None or integer(node, "training_mode", 0) != 0 or any(array is None for array in arrays):
        return None
    scale, bias, mean, variance = (np.asarray(array, dtype=np.float64) for array in arrays)
    with np.errstate(all="ignore"):
        a = scale / np.sqrt(variance + _real(node, "epsilon", 1e-5))
    return Affine(value, a, bias - mean * a) if np.isfinite(a).all() else None


def _real(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.as_float())


def _linear(node: ir.Node, rewriter: Rewriter) -> Linear | None:
    weight = _array(node.inputs[1]) if len(node.inputs) > 1 else None
    if weight is None or any(attribute.is_ref() for attribute in node.attributes.values()):
        return None
    source = node.inputs[2] if len(node.inputs) > 2 else None
    bias = None if source is None else _array(source)
    if source is not None and bias is None:
        return None
    return _KINDS[node.op_type](node, weight, bias, rewriter)


def _array(value: ir.Value | None) -> Array | None:
    """A floating-point constant in float64, unless it is large and others read it too."""
    tensor = tensor_of(value)
    if value is None or tensor is None or tensor.dtype not in _FLOATS:
        return None
    if len(value.uses()) > 1 and tensor.size > MAX_COPIED:
        return None
    return np.asarray(tensor.numpy()).astype(np.float64)


def _along(axis: int) -> Callable[[Array, Array], Array]:
    def scaled(weight: Array, a: Array) -> Array:
        shape = [1] * weight.ndim
        shape[axis] = -1
        return np.asarray(weight * a.reshape(shape))

    return scaled


def _conv(node: ir.Node, weight: Array, bias: Array | None, rewriter: Rewriter) -> Linear | None:
    return Linear(node, weight, bias, weight.shape[0], _along(0))


def _conv_transpose(node: ir.Node, weight: Array, bias: Array | None, rewriter: Rewriter) -> Linear | None:
    groups = integer(node, "group", 1) or 1

    def scaled(array: Array, a: Array) -> Array:
        rows = np.repeat(a.reshape(groups, -1), array.shape[0] // groups, axis=0)
        return np.asarray(array * rows.reshape(array.shape[0], array.shape[1], *[1] * (array.ndim - 2)))

    return Linear(node, weight, bias, weight.shape[1] * groups, scaled)


def _gemm(node: ir.Node, weight: Array, bias: Array | None, rewriter: Rewriter) -> Linear | None:
    axis = 0 if integer(node, "transB", 0) else 1
    channels = weight.shape[axis]
    if bias is not None:
        flat = _per_channel(bias, 2, -1) if bias.ndim <= 2 else None
        if flat is None:
            return None
        bias = np.broadcast_to(flat * _real(node, "beta", 1.0), [channels])
    return Linear(node, weight, bias, channels, _along(axis))


def _matmul(node: ir.Node, weight: Array, bias: Array | None, rewriter: Rewriter) -> Linear | None:
    return Linear(node, weight, None, weight.shape[1], _along(1), biased=False) if weight.ndim == 2 else None


def _norm(node: ir.Node, weight: Array, bias: Array | None, rewriter: Rewriter) -> Linear | None:
    shape = rewriter.shape(node.inputs[0])
    last = shape is not None and integer(node, "axis", -1) in (-1, len(shape) - 1)
    biased = is_onnx(node, "LayerNormalization")
    if not last or weight.ndim != 1 or any(output.uses() for output in node.outputs[1:]):
        return None
    return Linear(node, weight, bias, weight.shape[0], _along(0), biased=biased)


_KINDS = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "LayerNormalization": _norm,
    "RMSNormalization": _norm,
}

RULES = (
    Rule("fold-into-weights-before", ("BatchNormalization", "Mul", "Div", "Add", "Sub"), _after),
    Rule("fold-into-weights-after", ("BatchNormalization",), _before),
)


@dataclasses.dataclass(frozen=True)
class FoldAffine(RulePass):
    """Folds batch normalization and constant scales and offsets into the weights beside them."""

    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
