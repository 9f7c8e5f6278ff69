"""Joins operators that only change the shape: Reshape, Flatten, Squeeze and Unsqueeze keep the order of elements.

    Reshape(Reshape(x, s), t)        →  Reshape(x, t)
    Squeeze<1>(Unsqueeze<1>(x))      →  x
    Flatten(Reshape(x, s))           →  x                 when the shapes of x and the result are equal
    Unsqueeze<0>(Unsqueeze<0>(x))    →  Unsqueeze<0, 1>(x)
    Squeeze<0>(Reshape(x, s))        →  Reshape(x, t)

What is in between stays where something else reads it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from mmopt.transforms.canonicalize.constant_targets import reshape_target
from mmopt.transforms.canonicalize.editing import axes_of, is_onnx, new_initializer
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass

SHAPE_ONLY = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


def _inner(node: ir.Node) -> ir.Node | None:
    """The shape-only node that ``node`` reads, with a source of its own."""
    producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if producer is None or not is_onnx(producer, *SHAPE_ONLY) or producer.inputs[0] is None:
        return None
    return producer


def _cancel(node: ir.Node, rewriter: Rewriter) -> bool:
    """The chain ends in the shape it started from."""
    inner = _inner(node)
    while inner is not None and inner.inputs[0] is not None:
        if rewriter.same_shape(inner.inputs[0], node.outputs[0]):
            return rewriter.replace(node, inner.inputs[0])
        inner = _inner(inner)
    return False


def _reshape(node: ir.Node, rewriter: Rewriter) -> bool:
    """Reshape of anything shape-only: what is in between does not matter, unless a 0 copies one of its sizes."""
    inner = _inner(node)
    if inner is None or inner.inputs[0] is None or len(node.inputs) != 2 or node.inputs[1] is None:
        return False
    source = inner.inputs[0]
    target = rewriter.facts.elements(node.inputs[1])
    if target is None or any(size is None for size in target):
        return False
    literal = bool(node.attributes["allowzero"].value) if "allowzero" in node.attributes else False
    zeros = [i for i, size in enumerate(target) if size == 0]
    # A symbolic size may turn out 0, which copies. It is certainly no copy where it equals the size it would copy.
    if not literal and not all(_copies_same(rewriter, source, node, i) for i in zeros):
        return False
    rewriter.set_input(node, 0, source)
    return True


def _copies_same(rewriter: Rewriter, source: ir.Value, node: ir.Node, axis: int) -> bool:
    before, after = rewriter.shape(source), rewriter.shape(node.inputs[0])
    if before is None or after is None or axis >= len(before) or axis >= len(after):
        return False
    return before[axis] is not None and before[axis] == after[axis]


def _inverse(node: ir.Node, rewriter: Rewriter) -> bool:
    """Squeeze and Unsqueeze of the same axes, also where the sizes are unknown."""
    inner = _inner(node)
    if inner is None or {inner.op_type, node.op_type} != {"Squeeze", "Unsqueeze"} or inner.inputs[0] is None:
        return False
    axes, other = axes_of(node), axes_of(inner)
    if axes is None or other is None or min(axes + other, default=-1) < 0 or sorted(axes) != sorted(other):
        return False
    return rewriter.replace(node, inner.inputs[0])


def _unsqueeze(node: ir.Node, rewriter: Rewriter) -> bool:
    """Unsqueeze of Unsqueeze: the inner axes move up past the outer ones."""
    inner = _inner(node)
    if inner is None or not is_onnx(inner, "Unsqueeze") or inner.inputs[0] is None or rewriter.opset(node) < 13:
        return False
    outer_axes, inner_axes = axes_of(node), axes_of(inner)
    if not outer_axes or not inner_axes or min(outer_axes + inner_axes) < 0 or node.graph is None:
        return False
    axes = set(outer_axes)
    free = [i for i in range(len(outer_axes) + max(inner_axes) + 1) if i not in axes]
    axes.update(free[i] for i in inner_axes)
    tensor = ir.tensor(np.array(sorted(axes), dtype=np.int64))
    both = new_initializer(node.graph, tensor, rewriter.names.fresh(f"{node.outputs[0].name}_axes"))
    joined = rewriter.emit("Unsqueeze", [inner.inputs[0], both], node, like=node.outputs[0])
    return rewriter.replace(node, joined.outputs[0])


def _as_reshape(node: ir.Node, rewriter: Rewriter) -> bool:
    """Two different operators with nothing else in between are one Reshape."""
    inner = _inner(node)
    if inner is None or inner.inputs[0] is None or len(inner.outputs[0].uses()) > 1 or node.graph is None:
        return False
    before, after = rewriter.shape(inner.inputs[0]), rewriter.shape(node.outputs[0])
    target = None if before is None or after is None else reshape_target(before, after)
    if target is None or inner.outputs[0].is_graph_output() or rewriter.opset(node) < 5:
        return False
    name = rewriter.names.fresh(f"{node.outputs[0].name}_shape")
    value = new_initializer(node.graph, ir.tensor(np.array(target, dtype=np.int64)), name)
    joined = rewriter.emit("Reshape", [inner.inputs[0], value], node, like=node.outputs[0])
    return rewriter.replace(node, joined.outputs[0])


RULES = (
    Rule("cancel-reshapes", SHAPE_ONLY, _cancel),
    Rule("reshape-of-reshape", ("Reshape",), _reshape),
    Rule("squeeze-of-unsqueeze", ("Squeeze", "Unsqueeze"), _inverse),
    Rule("unsqueeze-of-unsqueeze", ("Unsqueeze",), _unsqueeze),
    Rule("two-in-one-reshape", ("Flatten", "Squeeze", "Unsqueeze"), _as_reshape),
)


@dataclasses.dataclass(frozen=True)
class MergeReshapes(RulePass):
    """Joins chains of operators that only change the shape."""

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
