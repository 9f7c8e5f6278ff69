"""Computes constants that are added or multiplied one after the other ahead of time.

    (x + c) + d  →  x + (c + d)
    (x · c) · d  →  x · (c · d)

The joint constant must not be larger than the larger of the two: a column and a row would become a matrix.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from mmopt.pipeline.base import Fidelity
from mmopt.transforms.canonicalize.editing import Array, is_onnx, new_initializer, tensor_of
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass
from mmopt.transforms.raising.building import sole_user

MAX_ELEMENTS = 1 << 24
"""Larger constants are left where they are."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def _join(node: ir.Node, rewriter: Rewriter) -> bool:
    outer = _with_constant(node)
    inner_node = None if outer is None else outer[0].producer()
    if outer is None or inner_node is None or not is_onnx(inner_node, node.op_type):
        return False
    inner = _with_constant(inner_node)
    if inner is None or inner_node.graph is not node.graph or sole_user(outer[0]) is not node:
        return False
    dtype, shape = rewriter.dtype(node.outputs[0]), rewriter.shape(node.outputs[0])
    if dtype not in _FLOATS or dtype is None or shape is None:
        return False
    joint = _joint(node.op_type, inner[1], outer[1])
    if joint is None or joint.ndim > len(rewriter.shape(inner[0]) or ()) or node.graph is None:
        return False
    if not _representable(joint, dtype.numpy()):
        return rewriter.miss(node, f"stays behind {inner_node.name!r}: the joint constant leaves the range of its type")
    name = rewriter.names.fresh(f"{node.outputs[0].name}_joint")
    value = new_initializer(node.graph, ir.tensor(joint.astype(dtype.numpy())), name)
    new = rewriter.emit(node.op_type, [inner[0], value], node, like=node.outputs[0])
    return rewriter.replace(node, new.outputs[0]) and _dropped(inner_node, rewriter)


def _with_constant(node: ir.Node) -> tuple[ir.Value, Array] | None:
    """What varies and what does not."""
    for place in (0, 1):
        tensor, value = tensor_of(node.inputs[1 - place]), node.inputs[place]
        if value is not None and tensor_of(value) is None and tensor is not None and tensor.dtype in _FLOATS:
            return (value, np.asarray(tensor.numpy()).astype(np.float64)) if tensor.size <= MAX_ELEMENTS else None
    return None


def _joint(op_type: str, first: Array, second: Array) -> Array | None:
    try:
        joint = np.asarray(first + second if op_type == "Add" else first * second)
    except ValueError:
        return None
    return joint if joint.size <= max(first.size, second.size) else None


def _representable(joint: Array, dtype: np.dtype[Any]) -> bool:
    """Whether the joint constant is finite, and no number of it too small for the format."""
    size = np.abs(joint[joint != 0])
    return bool(np.isfinite(joint).all() and (size < np.finfo(dtype).max).all() and (size > np.finfo(dtype).tiny).all())


def _dropped(node: ir.Node, rewriter: Rewriter) -> bool:
    rewriter.drop(node)
    return True


RULES = (Rule("reassociate-constants", ("Add", "Mul"), _join),)


@dataclasses.dataclass(frozen=True)
class ReassociateConstants(RulePass):
    """Computes constants that are added or multiplied one after the other ahead of time."""

    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
