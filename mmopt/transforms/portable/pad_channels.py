"""Pads the channels between convolutions to whole vectors, with weights of zero.

    r = Relu(Conv(x, W[24, …])), y = Conv(r, V[…, 24, …])
    →  r = Relu(Conv(x, [W 0][32, …])), y = Conv(r, [V 0][…, 32, …])

onnxruntime keeps images in blocks of 16 channels, computes whole blocks anyway, and where an image does not fill its
last one, reorders it before the next layer. What stands between the layers must leave the new channels finite, and
whoever reads them must be able to weigh them with zero: a convolution or a linear layer, through concatenations too.
Only small layers are padded, where reordering costs more than the new arithmetic.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from mmopt.analysis.dims import Size
from mmopt.analysis.shape_rules.types import to_ir_shape
from mmopt.analysis.shapes import Fact
from mmopt.transforms.canonicalize.editing import Array, axes_of, integer, is_onnx, new_initializer, tensor_of
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass

BLOCK = 16
"""Channels of a block where vectors hold 512 bits; a whole number of blocks where they hold less."""

LEAST = 8
"""Layers with fewer channels would more than double."""

MAX_EXTRA = 1 << 20
"""Products of two numbers that padding one layer may add to a run."""

_FINITE_AT_ZERO = frozenset(
    {
        *("Abs", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Neg", "Relu"),
        *("Selu", "Sigmoid", "Softplus", "Softsign", "Swish", "Tanh", "AveragePool", "GlobalAveragePool", "MaxPool"),
        "GlobalMaxPool",
    }
)
_REDUCTIONS = ("ReduceMean", "ReduceMax", "ReduceSum")


class _Unpaddable(Exception):
    """Something reads the channels that cannot ignore new ones."""


@dataclasses.dataclass
class _Plan:
    """What padding a convolution comes to.

    Attributes:
        between: Values that get more channels, along axis 1.
        readers: Layers that must ignore them, and the channel that the first new one becomes.
    """

    between: list[ir.Value]
    readers: list[tuple[ir.Node, int]]


def _pad(node: ir.Node, rewriter: Rewriter) -> bool:
    weight, shape = _weight(node), rewriter.shape(node.outputs[0])
    if weight is None or shape is None or len(shape) < 3 or weight.shape[0] % BLOCK == 0 or weight.shape[0] < LEAST:
        return False
    extra = -weight.shape[0] % BLOCK
    plan = _Plan([], [])
    try:
        _follow(node.outputs[0], weight.shape[0], plan, rewriter)
        cost = extra * sum(_cost(layer, rewriter) for layer in (node, *(reader for reader, _ in plan.readers)))
    except _Unpaddable as reason:
        return rewriter.miss(node, f"keeps its {weight.shape[0]} channels: {reason}.")
    if cost > MAX_EXTRA or not plan.readers:
        return rewriter.miss(node, f"keeps its {weight.shape[0]} channels: whole vectors would cost {cost} products.")
    _grow(node, extra, plan, rewriter)
    return True


def _weight(node: ir.Node) -> Array | None:
    """Weights of a layer that may be changed: constant, and its alone."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = tensor_of(value)
    if value is None or tensor is None or len(value.uses()) > 1 or value.is_graph_output():
        return None
    if is_onnx(node, "Conv") and integer(node, "group", 1) != 1:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return None if bias is not None and tensor_of(bias) is None else np.asarray(tensor.numpy())


def _follow(value: ir.Value, place: int, plan: _Plan, rewriter: Rewriter) -> None:
    """Everything that new channels at ``place`` of ``value`` reach.

    Raises:
        _Unpaddable: They cannot be ignored somewhere.
    """
    if value.is_graph_output() or value in plan.between:
        raise _Unpaddable(f"{value.name} is an output, or reached twice")
    plan.between.append(value)
    for user, index in value.uses():
        if is_onnx(user, "Conv", "Gemm", "MatMul"):
            _check_reader(user, index, value, rewriter)
            plan.readers.append((user, place))
        elif is_onnx(user, "Concat"):
            _follow(user.outputs[0], place + _before(user, index, rewriter), plan, rewriter)
        elif _keeps_channels(user, index):
            _follow(user.outputs[0], place, plan, rewriter)
        else:
            raise _Unpaddable(f"{user.op_type} {user.name!r} reads them")


def _check_reader(user: ir.Node, index: int, value: ir.Value, rewriter: Rewriter) -> None:
    rank = len(rewriter.shape(value) or ())
    linear = is_onnx(user, "Gemm", "MatMul") and rank == 2 and not integer(user, "transA", 0)
    if index != 0 or _weight(user) is None or not (is_onnx(user, "Conv") or linear):
        raise _Unpaddable(f"the weights of {user.op_type} {user.name!r} cannot be changed")
    if len(_weight_shape(user)) < 2:
        raise _Unpaddable(f"{user.op_type} {user.name!r} has a single row of weights")


def _weight_shape(node: ir.Node) -> tuple[int, ...]:
    weight = _weight(node)
    return () if weight is None else weight.shape


def _before(node: ir.Node, index: int, rewriter: Rewriter) -> int:
    """Channels of a concatenation before those of its input ``index``."""
    rank = len(rewriter.shape(node.outputs[0]) or ())
    axis = integer(node, "axis", 0)
    shapes = [rewriter.shape(value) for value in node.inputs[:index]]
    sizes = [None if shape is None or len(shape) < 2 else shape[1] for shape in shapes]
    numbers = [size for size in sizes if isinstance(size, int)]
    if not rank or axis is None or axis % rank != 1 or len(numbers) < len(sizes):
        raise _Unpaddable(f"Concat {node.name!r} joins something else than channels")
    return sum(numbers)


def _keeps_channels(node: ir.Node, index: int) -> bool:
    """Whether every channel of the result depends on that channel alone, and is finite where that is zero."""
    if index != 0 or len(node.outputs) > 1:
        return False
    if is_onnx(node, *_REDUCTIONS):
        axes = axes_of(node)
        return axes is not None and bool(axes) and all(axis > 1 for axis in axes)
    return is_onnx(node, *_FINITE_AT_ZERO)


def _cost(node: ir.Node, rewriter: Rewriter) -> int:
    """Products that one more channel at either end costs."""
    shape, weight = rewriter.shape(node.outputs[0]) or (), _weight_shape(node)
    sizes = [size if isinstance(size, int) else 1 for size in shape[:1]] + list(shape[2:])
    numbers = [size for size in sizes if isinstance(size, int)]
    if len(numbers) < len(sizes) or not weight:
        raise _Unpaddable("their number is not known")
    smaller = min(weight[:2]) if is_onnx(node, "Conv") else min(weight)
    per_channel = int(np.prod(weight)) // max(smaller, 1)
    return int(np.prod(numbers, dtype=np.int64)) * per_channel


def _grow(node: ir.Node, extra: int, plan: _Plan, rewriter: Rewriter) -> None:
    for position, value in enumerate(node.inputs[1:3], 1):
        if value is not None:
            _insert(node, position, 0, _length(value), extra, rewriter)
    for reader, place in plan.readers:
        rows = is_onnx(reader, "MatMul") or (is_onnx(reader, "Gemm") and not integer(reader, "transB", 0))
        _insert(reader, 1, 0 if rows else 1, place, extra, rewriter)
    for value in plan.between:
        _widen(value, extra, rewriter)


def _length(value: ir.Value) -> int:
    tensor = tensor_of(value)
    if tensor is None:
        raise ValueError(f"{value.name} is no constant")
    return int(tensor.shape.numpy()[0])


def _insert(node: ir.Node, position: int, axis: int, place: int, extra: int, rewriter: Rewriter) -> None:
    """Zeros among the weights at ``position``, before index ``place`` of ``axis``."""
    value = node.inputs[position]
    tensor = tensor_of(value)
    if value is None or tensor is None or node.graph is None:
        raise ValueError(f"{node.name} has no weights")
    array = np.asarray(tensor.numpy())
    shape = list(array.shape)
    shape[axis] = extra
    parts = [*np.split(array, [place], axis=axis)]
    padded = np.concatenate([parts[0], np.zeros(shape, array.dtype), parts[1]], axis=axis)
    made = new_initializer(node.graph, ir.tensor(padded), rewriter.names.fresh(f"{value.name}_padded"))
    rewriter.set_input(node, position, made)


def _widen(value: ir.Value, extra: int, rewriter: Rewriter) -> None:
    shape = rewriter.shape(value)
    if shape is None or shape[1] is None:
        return
    wider: tuple[Size | None, ...] = (shape[0], shape[1] + extra, *shape[2:])
    value.shape = to_ir_shape(wider)
    rewriter.facts.set(value, Fact(wider, None, value.type))


RULES = (Rule("pad-channels", ("Conv",), _pad),)


@dataclasses.dataclass(frozen=True)
class PadChannels(RulePass):
    """Pads the channels between small convolutions to whole vectors."""

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
