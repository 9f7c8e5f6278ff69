"""Computes once, before a loop, what is the same on every trip.

    Loop(n, c, x) { w = Softmax(v); x' = Mul(x, w) }   →   w = Softmax(v), Loop(n, c, x) { x' = Mul(x, w) }

The same for Scan. A loop may make no trip at all, so an operator that can fail for some values of its operands, such as
Gather with an index out of range, only leaves a loop that certainly makes one.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from mmopt.analysis.shapes import ShapeFacts, infer_shapes
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.canonicalize.bodies import move_initializer, rename
from mmopt.transforms.canonicalize.editing import Names, bodies, is_onnx, is_random

MAY_FAIL = frozenset(
    (
        *("Compress", "Div", "Expand", "Gather", "GatherElements", "GatherND", "Mod", "OneHot", "Pad", "Range"),
        *("Reshape", "Resize", "ScatterElements", "ScatterND", "SequenceAt", "Split", "Squeeze", "Tile", "TopK"),
        "Unsqueeze",
    )
)
"""Operators that some operands of the right type and shape make fail."""


@dataclasses.dataclass(frozen=True)
class HoistInvariants(Pass):
    """Moves what is the same on every trip out of Loop and Scan."""

    def run(self, module: Module, context: PassContext) -> bool:
        """Empty the innermost loops first."""
        loops = [n for graph in module.model.graphs() for n in graph if is_onnx(n, "Loop", "Scan")]
        if not loops:
            return False
        facts, names = infer_shapes(module.model), Names(module.model)
        moved = 0
        for node in reversed(loops):
            here = _hoist(node, facts, names)
            moved += here
            if here:
                self.remark(context, "applied", node.name or "", f"{here} operators are the same on every trip.")
        return moved > 0


def _hoist(loop: ir.Node, facts: ShapeFacts, names: Names) -> int:
    graph, body = loop.graph, loop.attributes["body"].as_graph()
    if graph is None:
        return 0
    certain, moved = _makes_a_trip(loop, facts), 0
    for node in list(body):
        if not _invariant(node, body) or (node.op_type in MAY_FAIL and not certain):
            continue
        for value in {value for value in node.inputs if value is not None and value.is_initializer()}:
            if value.graph is body:
                move_initializer(value, body, graph, names)
        body.remove(node)
        rename(node, names)
        graph.insert_before(loop, node)
        moved += 1
    return moved


def _invariant(node: ir.Node, body: ir.Graph) -> bool:
    """Whether ``node`` could stand outside ``body``; what it reads and could, already does."""
    if not is_onnx(node, node.op_type) or is_random(node) or any(True for _ in bodies(node)):
        return False
    if any(output.is_graph_output() for output in node.outputs):
        return False
    inside = [value for value in node.inputs if value is not None and value.graph is body]
    return all(value.is_initializer() and not value.is_graph_input() for value in inside)


def _makes_a_trip(loop: ir.Node, facts: ShapeFacts) -> bool:
    if is_onnx(loop, "Scan"):
        return False
    elements = None if loop.inputs[0] is None else facts.elements(loop.inputs[0])
    first = elements[0] if elements else None
    return isinstance(first, int) and first > 0 and loop.inputs[1] is None
