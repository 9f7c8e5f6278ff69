"""Merges linear layers that are added or follow one another.

    Gemm(x, W, b) + Gemm(y, V, c)  →  Gemm(Concat(x, y), [W; V], b + c)
    Gemm(Gemm(x, W, b), V, c)      →  Gemm(x, W V, b V + c)                where that takes no more products

New weights are computed in float64 and rounded once.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mmopt.analysis.dims import Size
from mmopt.pipeline.base import Fidelity
from mmopt.transforms.canonicalize.editing import Array, integer, is_onnx, tensor_of
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass
from mmopt.transforms.raising.building import Builder, sole_user

MAX_COPIED = 1 << 14
"""Elements that may be joined where that saves nothing but a sum."""

_MAX_WEIGHTS = 1 << 24
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


@dataclasses.dataclass(frozen=True)
class _Linear:
    """``x W + b`` with ``W [inputs, outputs]`` and ``b [outputs]`` in float64."""

    node: ir.Node
    x: ir.Value
    weight: Array
    bias: Array


def _linear(value: ir.Value | None, rewriter: Rewriter) -> _Linear | None:
    """The layer whose result is ``value``, where its weights are constants and its alone."""
    node = None if value is None else value.producer()
    if node is None or not is_onnx(node, "Gemm") or integer(node, "transA", 0) or node.inputs[0] is None:
        return None
    if any(attribute.is_ref() for attribute in node.attributes.values()):
        return None
    tensors = [tensor_of(operand) for operand in node.inputs[1:]]
    shared = any(operand is not None and len(operand.uses()) > 1 for operand in node.inputs[1:2])
    if any(tensor is None or tensor.dtype not in _FLOATS or tensor.size > _MAX_WEIGHTS for tensor in tensors) or shared:
        return None
    arrays = [np.asarray(tensor.numpy()).astype(np.float64) for tensor in tensors if tensor is not None]
    alpha, beta = (float(node.attributes[k].as_float()) if k in node.attributes else 1.0 for k in ("alpha", "beta"))
    weight = alpha * (arrays[0].T if integer(node, "transB", 0) else arrays[0])
    bias = beta * arrays[1] if len(arrays) > 1 else np.zeros(1)
    if bias.size not in (1, weight.shape[1]):
        return None
    return _Linear(node, node.inputs[0], weight, np.broadcast_to(bias.reshape(-1), [weight.shape[1]]))


def _sum(node: ir.Node, rewriter: Rewriter) -> bool:
    """From the Add."""
    if any(value is None or sole_user(value) is not node for value in node.inputs):
        return False
    first, second = (_linear(value, rewriter) for value in node.inputs)
    shape = rewriter.shape(node.outputs[0])
    if first is None or second is None or first.node.graph is not node.graph or shape is None:
        return False
    if second.node.graph is not node.graph or first.weight.shape[1] != second.weight.shape[1]:
        return False
    if not all(rewriter.shape(side.node.outputs[0]) == shape for side in (first, second)) or None in shape:
        return False
    bias = first.bias + second.bias
    if first.x is second.x:
        return _emit(node, first.x, first.weight + second.weight, bias, rewriter)
    weight = np.concatenate([first.weight, second.weight])
    if not _cheap(shape[0], *weight.shape):
        return rewriter.miss(node, "summed layers stay apart: joining what they read costs more than the sum.")
    rows = [rewriter.shape(side.x) for side in (first, second)]
    if any(row is None or row[0] != shape[0] for row in rows):
        return False
    return _emit(node, _joined(node, [first, second], shape[0], rewriter), weight, bias, rewriter)


def _cheap(rows: Size | None, inputs: int, outputs: int) -> bool:
    count = rows if isinstance(rows, int) else 1
    return count * inputs <= max(MAX_COPIED, 2 * count * outputs)


def _joined(node: ir.Node, sides: list[_Linear], rows: Size | None, rewriter: Rewriter) -> ir.Value:
    """What both layers read, side by side; a concatenation of one's own is taken apart first."""
    parts: list[ir.Value] = []
    for side in sides:
        made = side.x.producer()
        own = made is not None and is_onnx(made, "Concat") and sole_user(side.x) is side.node
        if made is not None and own and (integer(made, "axis", 0) or 0) in (1, -1):
            parts += [value for value in made.inputs if value is not None]
        else:
            parts.append(side.x)
    width = sum(side.weight.shape[0] for side in sides)
    with Builder(rewriter, node) as builder:
        return builder.node("Concat", parts, (rows, width), rewriter.dtype(parts[0]), axis=1)


def _chain(node: ir.Node, rewriter: Rewriter) -> bool:
    """From the second Gemm."""
    source = node.inputs[0]
    if source is None or sole_user(source) is not node:
        return False
    second, first = _linear(node.outputs[0], rewriter), _linear(source, rewriter)
    if first is None or second is None or first.node.graph is not node.graph:
        return False
    (inputs, inner), outputs = first.weight.shape, second.weight.shape[1]
    if inputs * outputs > inputs * inner + inner * outputs:
        return rewriter.miss(node, "layers in a row stay apart: one would take more products than both.")
    return _emit(node, first.x, first.weight @ second.weight, first.bias @ second.weight + second.bias, rewriter)


def _emit(node: ir.Node, x: ir.Value, weight: Array, bias: Array, rewriter: Rewriter) -> bool:
    dtype = rewriter.dtype(node.outputs[0])
    if dtype is None or not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        return False
    old = list({value.producer() for value in node.inputs[:2] if value is not None})
    with Builder(rewriter, node) as builder:
        constants = [
            builder.constant(np.ascontiguousarray(array).astype(dtype.numpy()), name)
            for array, name in ((weight, "weight"), (bias, "bias"))
        ]
        made = builder.node("Gemm", [x, *constants], rewriter.shape(node.outputs[0]) or (), dtype)
    rewriter.replace(node, made)
    for producer in old:
        _drop_unused(producer, rewriter)
    return True


def _drop_unused(node: ir.Node | None, rewriter: Rewriter) -> None:
    """Erase a layer that nobody reads any more, and what only it joined."""
    if node is None or any(value.uses() or value.is_graph_output() for value in node.outputs):
        return
    joined = None if node.inputs[0] is None else node.inputs[0].producer()
    rewriter.drop(node)
    if joined is not None and is_onnx(joined, "Concat"):
        _drop_unused(joined, rewriter)


RULES = (Rule("merge-summed", ("Add",), _sum), Rule("merge-chained", ("Gemm",), _chain))


@dataclasses.dataclass(frozen=True)
class MergeLinears(RulePass):
    """Merges linear layers that are added or follow one another."""

    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
