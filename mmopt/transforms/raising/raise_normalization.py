"""Lifts normalizations over the last axes.

    (x - mean(x)) / sqrt(mean((x - mean(x))²) + ε) · g + b   →  LayerNormalization(x, g, b) {axis, epsilon}
    x / sqrt(mean(x²) + ε) · g                               →  RMSNormalization(x, g) {axis, epsilon}

The root may divide, or its inverse multiply; a square is a Pow or a product; scale and bias may be left out. Scale and
bias must have the shape of the axes that are normalized.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import axes_of, integer, is_onnx
from mmopt.transforms.canonicalize.rewriting import Rewriter
from mmopt.transforms.raising.algebra import divided_by_root, square_of
from mmopt.transforms.raising.building import Builder, Unbuildable, sole_user
from mmopt.transforms.raising.rules import RaisingPass, RaisingRule


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What is normalized: ``data`` from ``axis`` on."""

    data: ir.Value
    axis: int
    width: tuple[int, ...]


def _normalize(node: ir.Node, rewriter: Rewriter) -> bool:
    """From the mean of the squares."""
    base = square_of(node.inputs[0])
    if base is None or node.inputs[0] is None:
        return False
    root = divided_by_root(node.outputs[0])
    if isinstance(root, str):
        return False
    if root.numerator is not base:
        return rewriter.miss(node, "normalization: the root divides something else than what it was taken of.")
    if sole_user(node.inputs[0]) is not node:
        return rewriter.miss(node, "normalization: the squares are needed elsewhere too.")
    centre = _centre(base, node)
    data = base if centre is None else centre
    rows = _rows(node, data, rewriter)
    if isinstance(rows, str):
        return rewriter.miss(node, f"normalization: {rows}.")
    if centre is not None and {user for user, _ in base.uses()} != {root.product, node.inputs[0].producer()}:
        return rewriter.miss(node, "normalization: what is left after the mean is subtracted is needed elsewhere too.")
    try:
        return _emit(root.product, rows, root.epsilon, centre is not None, rewriter)
    except Unbuildable as reason:
        return rewriter.miss(node, f"normalization: {reason}.")


def _centre(base: ir.Value, node: ir.Node) -> ir.Value | None:
    """``x`` where ``base = x - mean(x)`` over the axes of ``node``."""
    difference = base.producer()
    if difference is None or not is_onnx(difference, "Sub") or difference.inputs[0] is None:
        return None
    mean = difference.inputs[1].producer() if difference.inputs[1] is not None else None
    if mean is None or not is_onnx(mean, "ReduceMean") or mean.inputs[0] is not difference.inputs[0]:
        return None
    same = axes_of(mean) == axes_of(node) and integer(mean, "keepdims", 1) == integer(node, "keepdims", 1)
    return difference.inputs[0] if same else None


def _rows(node: ir.Node, data: ir.Value, rewriter: Rewriter) -> _Rows | str:
    shape, axes = rewriter.shape(data), axes_of(node)
    if shape is None or not axes or integer(node, "keepdims", 1) != 1:
        return "the axes of the mean, or those of its operand, are unknown"
    normal = sorted(axis % len(shape) for axis in axes)
    if normal != list(range(normal[0], len(shape))):
        return f"it is taken over axes {normal}, not over the last ones"
    width = tuple(size for size in shape[normal[0] :] if isinstance(size, int))
    if len(width) != len(normal):
        return "the sizes of the axes it is taken over are not numbers"
    return _Rows(data, normal[0], width)


def _emit(product: ir.Node, rows: _Rows, epsilon: float, centred: bool, rewriter: Rewriter) -> bool:
    last, scale = _operand(product, "Mul", rows, rewriter)
    bias = None
    if centred:
        last, bias = _operand(last, "Add", rows, rewriter)
    dtype = rewriter.dtype(rows.data)
    if dtype is None or rewriter.dtype(last.outputs[0]) != dtype:
        raise Unbuildable("operand and result have different types")
    operator = "LayerNormalization" if centred else "RMSNormalization"
    with Builder(rewriter, last) as builder:
        if scale is None:
            scale = builder.constant(np.ones(rows.width, dtype=dtype.numpy()), "scale")
        shape = builder.shape(rows.data)
        inputs = [rows.data, _shaped(scale, rows, builder)]
        inputs += [] if bias is None else [_shaped(bias, rows, builder)]
        axis = rows.axis - len(shape)
        return rewriter.replace(last, builder.node(operator, inputs, shape, dtype, axis=axis, epsilon=epsilon))


def _operand(node: ir.Node, op_type: str, rows: _Rows, rewriter: Rewriter) -> tuple[ir.Node, ir.Value | None]:
    """The node that scales, or shifts, the result of ``node`` by a tensor of the width, and that tensor."""
    value = node.outputs[0]
    user = sole_user(value)
    if user is None or not is_onnx(user, op_type) or user.inputs[0] is user.inputs[1]:
        return node, None
    other = user.inputs[1] if user.inputs[0] is value else user.inputs[0]
    shape = rewriter.shape(other)
    if other is None or shape is None or len(shape) > len(rewriter.shape(value) or ()):
        return node, None
    lead, tail = shape[: len(shape) - len(rows.width)], shape[max(0, len(shape) - len(rows.width)) :]
    fits = tuple(tail) == rows.width and all(size == 1 for size in lead)
    return (user, other) if fits else (node, None)


def _shaped(value: ir.Value, rows: _Rows, builder: Builder) -> ir.Value:
    return builder.reshape(value, rows.width)


RULES = (
    RaisingRule(
        "normalization",
        ("ReduceMean",),
        _normalize,
        "(x - mean(x)) / sqrt(var(x) + ε) · g + b;  x / sqrt(mean(x²) + ε) · g",
        "LayerNormalization, RMSNormalization",
    ),
)


@dataclasses.dataclass(frozen=True)
class RaiseNormalization(RaisingPass):
    """Lifts normalizations over the last axes into the standard's operators."""

    def raising_rules(self) -> tuple[RaisingRule, ...]:
        """The rules of this module."""
        return RULES
