"""Writes transposes that only move axes of one element as reshapes, which move nothing and join with their neighbours.

Transpose<1, 0, 2>(x [1, n, m])    →  Reshape(x, [n, 1, m])
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from mmopt.transforms.canonicalize import merge_reshapes
from mmopt.transforms.canonicalize.constant_targets import reshape_target
from mmopt.transforms.canonicalize.editing import new_initializer
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass


def moves_units_only(node: ir.Node, rewriter: Rewriter) -> bool:
    """Whether a Transpose leaves all axes of more than one element in their order."""
    shape = rewriter.shape(node.inputs[0])
    if shape is None:
        return False
    perm = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else [*range(len(shape))][::-1]
    large = [axis for axis in perm if shape[axis] != 1]
    return large == sorted(large)


def _as_reshape(node: ir.Node, rewriter: Rewriter) -> bool:
    before, after = rewriter.shape(node.inputs[0]), rewriter.shape(node.outputs[0])
    if before is None or after is None or node.graph is None or not moves_units_only(node, rewriter):
        return False
    target = reshape_target(before, after)
    if target is None:
        return False
    name = rewriter.names.fresh(f"{node.outputs[0].name}_shape")
    shape = new_initializer(node.graph, ir.tensor(np.array(target, dtype=np.int64)), name)
    reshape = rewriter.emit("Reshape", [node.inputs[0], shape], node, like=node.outputs[0])
    return rewriter.replace(node, reshape.outputs[0])


RULES = (Rule("transpose-of-units", ("Transpose",), _as_reshape),)


@dataclasses.dataclass(frozen=True)
class UnitTransposes(RulePass):
    """Writes transposes that only move axes of one element as reshapes, and joins these."""

    def rules(self) -> tuple[Rule, ...]:
        """The rule of this module, and those that join reshapes."""
        return (*RULES, *merge_reshapes.RULES)
