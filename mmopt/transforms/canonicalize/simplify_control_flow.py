"""Takes control flow apart whose course is known.

    y = If(True, then: {z = Exp(x); return z}, else: …)    →   y = Exp(x)
    y, s = Loop(0, cond, x, body)                          →   y = x, s = an empty tensor
    y = Loop(n, False, x, body)                            →   y = x

Everything else about loops stays as it is.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mmopt.analysis.shapes import ShapeFacts, infer_shapes
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.canonicalize import editing
from mmopt.transforms.canonicalize.bodies import spill


@dataclasses.dataclass(frozen=True)
class SimplifyControlFlow(Pass):
    """Inlines the branch of an If whose condition is constant, and removes loops that make no trip."""

    def run(self, module: Module, context: PassContext) -> bool:
        """Simplify every If and Loop, outer ones first."""
        if not any(editing.is_onnx(node, "If", "Loop") for graph in module.model.graphs() for node in graph):
            return False
        return self.simplify(module, context, infer_shapes(module.model))

    def simplify(self, module: Module, context: PassContext, facts: ShapeFacts) -> bool:
        """As :meth:`run`, with facts that are known already."""
        worker = _Simplifier(self, context, facts, module.model)
        worker.visit(module.model.graph)
        return worker.changed


class _Simplifier:
    def __init__(self, owner: Pass, context: PassContext, facts: ShapeFacts, model: ir.Model) -> None:
        self._owner, self._context, self._facts, self._model = owner, context, facts, model
        self._names: editing.Names | None = None
        self.changed = False

    def visit(self, graph: ir.Graph) -> None:
        """Simplify ``graph``, what is inlined into it, and the bodies that stay."""
        queue = collections.deque(graph)
        while queue:
            node = queue.popleft()
            if editing.is_onnx(node, "If"):
                inlined = self._inline_branch(node)
                if inlined is not None:
                    queue.extendleft(reversed(inlined))
                    continue
            elif editing.is_onnx(node, "Loop") and self._remove_loop(node):
                continue
            for body in editing.bodies(node):
                self.visit(body)

    @property
    def _fresh(self) -> editing.Names:
        """Names of the whole model; first asked for while every node is still in its graph."""
        if self._names is None:
            self._names = editing.Names(self._model)
        return self._names

    def _known(self, value: ir.Value | None) -> int | None:
        """The number in a scalar (or one-element vector) that never varies."""
        elements = None if value is None else self._facts.elements(value)
        return elements[0] if elements and len(elements) == 1 and isinstance(elements[0], int) else None

    def _inline_branch(self, node: ir.Node) -> list[ir.Node] | None:
        condition = self._known(node.inputs[0])
        attribute = node.attributes.get("then_branch" if condition else "else_branch")
        if condition is None or node.graph is None or attribute is None or attribute.is_ref():
            return None
        nodes, results = spill(attribute.as_graph(), node, self._fresh)
        self._replace(node, results)
        side = "then" if condition else "else"
        self._owner.remark(
            self._context, "applied", node.name or "", f"The condition is constant: the {side} branch stays."
        )
        return nodes

    def _remove_loop(self, node: ir.Node) -> bool:
        trips, condition = self._known(node.inputs[0]), self._known(node.inputs[1])
        if not (trips is not None and trips <= 0) and condition != 0:
            return False
        carried = list(node.inputs[2:])
        if any(value is None for value in carried):
            return False
        values: list[ir.Value | None] = list(carried)
        for output in node.outputs[len(carried) :]:
            used = output.uses() or output.is_graph_output()
            values.append(self._empty(node, output) if used else None)
            if used and values[-1] is None:
                reason = "The loop makes no trip, but the size of what it would have stacked is not known."
                self._owner.remark(self._context, "missed", node.name or "", reason)
                return False
        self._replace(node, values)
        self._owner.remark(self._context, "applied", node.name or "", "The loop makes no trip.")
        return True

    def _empty(self, node: ir.Node, output: ir.Value) -> ir.Value | None:
        """An initializer with no trip stacked in it."""
        shape, dtype = self._facts.shape(output), self._facts.dtype(output)
        if shape is None or dtype is None or node.graph is None or dtype == ir.DataType.STRING:
            return None
        sizes = [dim for dim in shape[1:] if isinstance(dim, int)]
        if len(sizes) != len(shape) - 1:
            return None
        tensor = ir.Tensor(np.empty((0, *sizes), dtype=dtype.numpy()), dtype=dtype)
        return editing.new_initializer(node.graph, tensor, self._fresh.fresh(f"{output.name}_empty"))

    def _replace(self, node: ir.Node, values: Sequence[ir.Value | None]) -> None:
        """Let ``values`` stand for the outputs of ``node``, and drop it."""
        for old, new in zip(node.outputs, values, strict=True):
            if new is None or not (old.uses() or old.is_graph_output()):
                continue
            if not editing.can_replace(old, new):
                new = editing.new_node("Identity", [new], node, self._fresh).outputs[0]
            editing.replace(old, new)
        editing.erase([node])
        self.changed = True
