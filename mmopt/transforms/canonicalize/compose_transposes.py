"""Joins transposes that follow each other: ``Transpose_q(Transpose_p(x)) = Transpose_r(x)`` with ``r[i] = p[q[i]]``.

    Transpose<0, 2, 1>(Transpose<0, 2, 1>(x))  →  x
    Transpose<1, 0, 2>(Transpose<0, 2, 1>(x))  →  Transpose<2, 0, 1>(x)

Axes of one element may come and go in between:

    Transpose<0, 2, 1>(Reshape(Transpose<1, 0>(x), [1, m, n]))  →  Reshape(x, [1, n, m])

The first one stays where something else reads it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from mmopt.analysis.shape_rules import Shape
from mmopt.transforms.canonicalize.constant_targets import reshape_target
from mmopt.transforms.canonicalize.editing import is_onnx, new_initializer
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass


def permutation(node: ir.Node, rewriter: Rewriter) -> list[int] | None:
    """Permutation of a Transpose; reversed axes where it has none. ``None`` when unknown."""
    perm = node.attributes.get("perm")
    if perm is not None:
        return None if perm.is_ref() else list(perm.as_ints())
    shape = rewriter.shape(node.inputs[0])
    return None if shape is None else list(range(len(shape) - 1, -1, -1))


def _compose(node: ir.Node, rewriter: Rewriter) -> bool:
    inner = node.inputs[0].producer() if node.inputs[0] is not None else None
    if inner is None or not is_onnx(inner, "Transpose") or inner.inputs[0] is None:
        return False
    first, second = permutation(inner, rewriter), permutation(node, rewriter)
    if first is None or second is None or len(first) != len(second):
        return False
    perm = [first[i] for i in second]
    source = inner.inputs[0]
    if perm == list(range(len(perm))):
        return rewriter.replace(node, source)
    joined = rewriter.emit("Transpose", [source], node, like=node.outputs[0], attributes=[ir.AttrInt64s("perm", perm)])
    return rewriter.replace(node, joined.outputs[0])


def _large(shape: Shape) -> list[int] | None:
    """Axes that may have more than one element; ``None`` when the shape is not known."""
    return None if shape is None or None in shape else [axis for axis, size in enumerate(shape) if size != 1]


def _around_units(node: ir.Node, rewriter: Rewriter) -> bool:
    """A Reshape between two transposes adds and drops axes of one element only, and the rest ends in its old order."""
    reshape = node.inputs[0].producer() if node.inputs[0] is not None else None
    if reshape is None or not is_onnx(reshape, *_SHAPE_ONLY) or reshape.inputs[0] is None or node.graph is None:
        return False
    inner = reshape.inputs[0].producer()
    if inner is None or not is_onnx(inner, "Transpose"):
        return False
    first, second, source = permutation(inner, rewriter), permutation(node, rewriter), inner.inputs[0]
    before, after = rewriter.shape(inner.outputs[0]), rewriter.shape(reshape.outputs[0])
    given, kept = _large(before), _large(after)
    if first is None or second is None or before is None or after is None or given is None or kept is None:
        return False
    if [before[axis] for axis in given] != [after[axis] for axis in kept]:
        return False
    origin = {axis: first[place] for axis, place in zip(kept, given, strict=True)}
    order = [origin[axis] for axis in second if axis in origin]
    start, result = rewriter.shape(source), rewriter.shape(node.outputs[0])
    target = None if start is None or result is None else reshape_target(start, result)
    if order != sorted(order) or target is None:
        return False
    name = rewriter.names.fresh(f"{node.outputs[0].name}_shape")
    shape = new_initializer(node.graph, ir.tensor(np.array(target, dtype=np.int64)), name)
    return rewriter.replace(node, rewriter.emit("Reshape", [source, shape], node, like=node.outputs[0]).outputs[0])


_SHAPE_ONLY = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")

RULES = (
    Rule("compose-transposes", ("Transpose",), _compose),
    Rule("transposes-around-units", ("Transpose",), _around_units),
)


@dataclasses.dataclass(frozen=True)
class ComposeTransposes(RulePass):
    """Joins adjacent transposes into one, or into none when they cancel."""

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
