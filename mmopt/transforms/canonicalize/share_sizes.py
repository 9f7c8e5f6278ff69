"""Computes a size once, however it is come by.

    a = Gather(Shape(x[batch, seq]), 1);  b = Gather(Shape(Relu(x)), 1)     →   b = a       both are ``seq``

Where inference knows every element of two small integer tensors, as numbers and named sizes, and they are the same, the
first stands for both. Unlike common subexpressions, the two need not be computed alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import onnx_ir as ir

from mmopt.analysis.shapes import ShapeFacts, infer_shapes
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.canonicalize import editing


@dataclasses.dataclass(frozen=True)
class ShareSizes(Pass):
    """Merges values that inference shows to hold the same sizes."""

    def run(self, module: Module, context: PassContext) -> bool:
        """Merge equal sizes of the main graph and of the bodies inside it."""
        return self.share(module, context, infer_shapes(module.model))

    def share(self, module: Module, context: PassContext, facts: ShapeFacts) -> bool:
        """As :meth:`run`, with facts that are known already."""
        count = _share(module.model.graph, facts, {})
        if count:
            self.remark(context, "applied", "", f"{count} sizes were computed before.")
        return count > 0


def _share(graph: ir.Graph, facts: ShapeFacts, seen: dict[Hashable, ir.Value]) -> int:
    count = 0
    known = dict(seen)
    for node in graph:
        for body in editing.bodies(node):
            count += _share(body, facts, known)
        if len(node.outputs) != 1 or node.outputs[0].is_graph_output():
            continue
        value = node.outputs[0]
        key = _key(value, facts)
        if key is None:
            continue
        first = known.setdefault(key, value)
        if first is not value and value.uses():
            editing.replace(value, first)
            count += 1
    return count


def _key(value: ir.Value, facts: ShapeFacts) -> Hashable | None:
    """Elements, rank and type; ``None`` unless there is a named size among them (numbers are folded)."""
    fact = facts.fact(value)
    if fact.elements is None or fact.shape is None or None in fact.elements:
        return None
    if all(isinstance(element, int) for element in fact.elements):
        return None
    dtype = facts.dtype(value)
    if dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    return (fact.elements, len(fact.shape), dtype)
