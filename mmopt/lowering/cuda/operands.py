"""Operands of products where they lie in memory."""

from __future__ import annotations

import dataclasses

from tvm.ir import Expr

from mmopt.backends.cpu.loops import i64, static
from mmopt.backends.cuda.kernels.operand import Operand
from mmopt.lowering.registry import OpNode
from mmopt.lowering.values import Value


def in_memory(node: OpNode, a: Value) -> bool:
    """Whether ``a`` is stored, or has to be before it can be multiplied."""
    return not a.pending or Operand.of(node.context.tensor(a)) is None


def batched_operand(node: OpNode, value: Value, batch: tuple[Expr, ...]) -> Operand:
    """``value`` for a product with axes ``batch``: those it has one index of are repeated."""
    found = stored_operand(node, value)
    missing = len(batch) + 2 - value.ndim
    steps = list(found.strides)
    for axis in range(value.ndim - 2):
        if static(value.shape[axis]) == 1 and static(batch[axis + missing]) != 1:
            steps[axis] = i64(0)
    return dataclasses.replace(found, strides=tuple(steps))


def stored_operand(node: OpNode, value: Value) -> Operand:
    """``value`` where it is, or stored first when it is still a computation."""
    found = Operand.of(node.context.tensor(value))
    if found is None:
        node.context.realize([value], "operand")
        found = Operand.of(node.context.dense(value))
    assert found is not None
    return found


def turned(operand: Operand) -> Operand:
    """``[..., K, N]`` with the summed axis last."""
    *outer, k, n = operand.strides
    return dataclasses.replace(operand, strides=(*outer, n, k))
