"""Writes out loops of a few trips.

    y, s = Loop(2, True, x) { x' = f(t, x), s' = x' }   →   a = f(0, x), y = f(1, a), s = Concat([a], [y])

A loop that is unrolled takes part in every other rewrite, and its operators in fusion. Its number of trips must be
known, it must not stop early, and it must stay small written out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mmopt.analysis.shapes import ShapeFacts, infer_shapes
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.canonicalize.bodies import goes_on, spill
from mmopt.transforms.canonicalize.editing import (
    Names,
    can_replace,
    drop_unused,
    erase,
    is_onnx,
    is_random,
    new_initializer,
    new_node,
    replace,
)


@dataclasses.dataclass(frozen=True)
class UnrollLoops(Pass):
    """Writes out loops whose few trips are known.

    Attributes:
        max_trips: Most trips that are written out.
        max_nodes: Most nodes that one loop may become.
    """

    max_trips: int = 8
    max_nodes: int = 256

    def run(self, module: Module, context: PassContext) -> bool:
        """Unroll outer loops first; loops inside are met again in every copy."""
        changed = False
        while loop := self._next(module, context):
            names = Names(module.model)
            node, trips = loop
            self.remark(context, "applied", node.name or "", f"The loop is written out: {trips} trips.")
            _unroll(node, trips, names)
            changed = True
        return changed

    def _next(self, module: Module, context: PassContext) -> tuple[ir.Node, int] | None:
        loops = [n for graph in module.model.graphs() for n in graph if is_onnx(n, "Loop")]
        if not loops:
            return None
        facts = infer_shapes(module.model)
        for node in loops:
            trips = _trips(node, facts)
            if trips is None:
                continue
            size = trips * sum(1 for _ in node.attributes["body"].as_graph().all_nodes())
            if 0 < trips <= self.max_trips and size <= self.max_nodes and _runs_through(node):
                return node, trips
        return None


def _trips(node: ir.Node, facts: ShapeFacts) -> int | None:
    elements = None if node.inputs[0] is None else facts.elements(node.inputs[0])
    return elements[0] if elements and isinstance(elements[0], int) else None


def _runs_through(node: ir.Node) -> bool:
    """Whether no trip can end the loop, and each computes the same thing twice the same."""
    body = node.attributes["body"].as_graph()
    steady = goes_on(node.inputs[1]) and goes_on(body.outputs[0], body.inputs[1])
    return steady and None not in node.inputs[2:] and not any(is_random(n) for n in body)


def _unroll(node: ir.Node, trips: int, names: Names) -> None:
    graph = node.graph
    if graph is None:
        raise ValueError(f"node {node.name!r} is in no graph")
    carried = [value for value in node.inputs[2:] if value is not None]
    count = len(carried)
    stacked: list[list[ir.Value]] = [[] for _ in node.outputs[count:]]
    go = new_initializer(graph, ir.tensor(np.array(True)), names.fresh(f"{node.name or 'loop'}_goes_on"))
    for trip in range(trips):
        number = ir.tensor(np.array(trip, dtype=np.int64))
        counter = new_initializer(graph, number, names.fresh(f"{node.name or 'loop'}_trip"))
        results = _copy(node, [counter, go, *carried], names)
        carried = results[1 : 1 + count]
        for pieces, value in zip(stacked, results[1 + count :], strict=True):
            pieces.append(value)
    stacks = [_stack(pieces, node, names) for pieces in stacked]
    for old, new in zip(node.outputs, [*carried, *stacks], strict=True):
        if not (old.uses() or old.is_graph_output()):
            continue
        value = new if can_replace(old, new) else new_node("Identity", [new], node, names).outputs[0]
        replace(old, value)
    erase([node])
    drop_unused(go)


def _copy(node: ir.Node, given: Sequence[ir.Value], names: Names) -> list[ir.Value]:
    """One trip: its results, before ``node``."""
    body = node.attributes["body"].as_graph().clone(allow_outer_scope_values=True)
    for copied in body:
        copied.name = names.fresh(copied.name or copied.op_type)
        for output in copied.outputs:
            output.name = names.fresh(output.name) if output.name else output.name
    for copied in body.all_nodes():
        for output in copied.outputs:
            output.shape = None
    actual = dict(zip(body.inputs, given, strict=True))
    outputs = list(body.outputs)
    for formal, value in actual.items():
        formal.replace_all_uses_with(value)
    body.inputs.clear()
    spill(body, node, names)
    return [actual.get(value, value) for value in outputs]


def _stack(pieces: Sequence[ir.Value], node: ir.Node, names: Names) -> ir.Value:
    graph = node.graph
    if graph is None:
        raise ValueError(f"node {node.name!r} is in no graph")
    axes = new_initializer(graph, ir.tensor(np.array([0], dtype=np.int64)), names.fresh(f"{node.name or 'loop'}_axes"))
    rows = [new_node("Unsqueeze", [piece, axes], node, names).outputs[0] for piece in pieces]
    return new_node("Concat", rows, node, names, [ir.AttrInt64("axis", 0)]).outputs[0]
