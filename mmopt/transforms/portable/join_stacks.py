"""Stacks tensors with one operator in place of one for each, and reduces a stack without making it.

Concat(Unsqueeze(a), Unsqueeze(b), …)              →  Reshape(Concat(a, b, …))
ReduceMean(Concat(Unsqueeze(a), Unsqueeze(b), …))  →  Mean(a, b, …)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from mmopt.analysis.dims import Size
from mmopt.pipeline.base import Fidelity
from mmopt.transforms.canonicalize.editing import axes_of, integer, is_onnx
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass
from mmopt.transforms.raising.building import Builder, Unbuildable, sole_user

_REDUCED = {"ReduceMean": "Mean", "ReduceSum": "Sum", "ReduceMax": "Max", "ReduceMin": "Min"}


def _join(node: ir.Node, rewriter: Rewriter) -> bool:
    """From the Concat."""
    axis, shape = integer(node, "axis", 0), rewriter.shape(node.outputs[0])
    if axis is None or shape is None or len(node.inputs) < 2:
        return False
    axis %= len(shape)
    members = [_before_unsqueeze(value, axis, len(shape), rewriter) for value in node.inputs]
    parts = [value for value in members if value is not None]
    if len(parts) < len(members) or not all(rewriter.same_shape(parts[0], part) for part in parts):
        return False
    if rewriter.dtype(parts[0]) in (ir.DataType.FLOAT, ir.DataType.DOUBLE) and _reduce(node, axis, parts, rewriter):
        return True
    if axis == len(shape) - 1:
        return rewriter.miss(node, "stacking: the new axis is the last, along which there is nothing to join.")
    return _concat(node, axis, parts, rewriter)


def _before_unsqueeze(value: ir.Value | None, axis: int, rank: int, rewriter: Rewriter) -> ir.Value | None:
    node = None if value is None else value.producer()
    if value is None or node is None or not is_onnx(node, "Unsqueeze") or sole_user(value) is None:
        return None
    axes = axes_of(node)
    return node.inputs[0] if axes is not None and [a % rank for a in axes] == [axis] else None


def _reduce(node: ir.Node, axis: int, parts: Sequence[ir.Value], rewriter: Rewriter) -> bool:
    user = sole_user(node.outputs[0])
    if user is None or not is_onnx(user, *_REDUCED) or integer(user, "keepdims", 1) != 0:
        return False
    axes, rank = axes_of(user), len(rewriter.shape(node.outputs[0]) or ())
    if axes is None or [a % rank for a in axes] != [axis]:
        return False
    new = rewriter.emit(_REDUCED[user.op_type], parts, user, like=user.outputs[0])
    return rewriter.replace(user, new.outputs[0])


def _concat(node: ir.Node, axis: int, parts: Sequence[ir.Value], rewriter: Rewriter) -> bool:
    try:
        with Builder(rewriter, node, parts) as builder:
            shape, stacked = builder.shape(parts[0]), builder.shape(node.outputs[0])
            joined: list[Size] = [*shape]
            joined[axis] = shape[axis] * len(parts)
            dtype = rewriter.dtype(parts[0])
            made = builder.reshape(builder.node("Concat", parts, joined, dtype, axis=axis), stacked)
    except Unbuildable as reason:
        return rewriter.miss(node, f"stacking: {reason}.")
    return rewriter.replace(node, made)


RULES = (Rule("join-stacks", ("Concat",), _join),)


@dataclasses.dataclass(frozen=True)
class JoinStacks(RulePass):
    """Stacks tensors with one operator, and reduces a stack without making it."""

    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
