"""Gives Reshape and Expand constant targets where the sizes they compute are those of their input anyway.

    Reshape(x[batch, seq, 768], Concat(batch, seq, 12, 64))   →   Reshape(x, [0, 0, 12, 64])
    Reshape(x[batch, 7, 7, 64], Concat(49 * batch, 64))       →   Reshape(x, [-1, 64])
    Expand(x[batch, 1, seq], Concat(batch, 8, seq))           →   Expand(x, [1, 8, 1])

A 0 copies a size of the input, a 1 in Expand keeps it, and -1 stands for what is left. -1 is used only when every other
size is a number above 0: next to an empty axis it would be ambiguous.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mmopt.analysis.dims import Size
from mmopt.transforms.canonicalize.editing import constant_ints, integer, new_initializer
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass


def _reshape(node: ir.Node, rewriter: Rewriter) -> bool:
    before, after = rewriter.shape(node.inputs[0]), rewriter.shape(node.outputs[0])
    if len(node.inputs) != 2 or before is None or after is None or constant_ints(node.inputs[1]) is not None:
        return False
    target = reshape_target(before, after)
    if target is None or integer(node, "allowzero", 0) is None:
        return False
    # Under allowzero a 0 would be an empty axis. The new target has no such 0, so it does not need the attribute.
    node.attributes.pop("allowzero", None)
    return _set_target(node, rewriter, target)


def reshape_target(before: Sequence[Size | None], after: Sequence[Size | None]) -> list[int] | None:
    """A constant target that takes shape ``before`` to ``after`` whatever the named sizes are, if there is one."""
    target: list[int] = []
    for axis, size in enumerate(after):
        if size is None:
            return None
        if isinstance(size, int) and size > 0:
            target.append(size)
        elif axis < len(before) and before[axis] == size:
            target.append(0)
        elif size == 0:
            return None
        else:
            target.append(-1)
    return target if target.count(-1) + (0 in target and -1 in target) <= 1 else None


def _expand(node: ir.Node, rewriter: Rewriter) -> bool:
    before, after = rewriter.shape(node.inputs[0]), rewriter.shape(node.outputs[0])
    if len(node.inputs) != 2 or before is None or after is None or constant_ints(node.inputs[1]) is not None:
        return False
    padded = [1] * (len(after) - len(before)) + list(before)
    target = [1 if old is not None and old == new else new for old, new in zip(padded, after, strict=True)]
    numbers = [size for size in target if isinstance(size, int)]
    return len(numbers) == len(target) and _set_target(node, rewriter, numbers)


def _set_target(node: ir.Node, rewriter: Rewriter, target: list[int]) -> bool:
    if node.graph is None:
        return False
    name = rewriter.names.fresh(f"{node.outputs[0].name}_shape")
    value = new_initializer(node.graph, ir.tensor(np.array(target, dtype=np.int64)), name)
    rewriter.set_input(node, 1, value)
    return True


RULES = (
    Rule("constant-reshape-target", ("Reshape",), _reshape),
    Rule("constant-expand-target", ("Expand",), _expand),
)


@dataclasses.dataclass(frozen=True)
class ConstantTargets(RulePass):
    """Replaces computed targets of Reshape and Expand by constants that mean the same for every size."""

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
