"""Removes what no output depends on: nodes, initializers, local functions, optional outputs, opset imports.

    y = Relu(x); z = Exp(x); return y            →  y = Relu(x); return y
    v, i = MaxPool(x); return v                  →  v = MaxPool(x); return v

Bodies of If, Loop and Scan are swept too, and what only a dead one reads is dead as well.
"""

from __future__ import annotations

import dataclasses

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from mmopt.analysis.shape_rules.types import schema_of
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.canonicalize import editing


@dataclasses.dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Removes nodes, initializers, functions, optional outputs and opset imports that nothing uses."""

    def run(self, module: Module, context: PassContext) -> bool:
        """Remove everything that is dead in one sweep from the outputs backwards."""
        model = module.model
        changed = _sweep(model.graph, model.opset_imports)
        for graph in list(model.graphs()):
            changed |= _drop_initializers(graph)
        changed |= common.RemoveUnusedFunctionsPass()(model).modified  # type: ignore[no-untyped-call]
        for function in model.functions.values():
            changed |= _sweep(function.graph, function.opset_imports)
        return common.RemoveUnusedOpsetsPass()(model).modified or changed


def _sweep(graph: ir.Graph, opsets: dict[str, int]) -> bool:
    """Remove the dead nodes of ``graph`` and of the bodies in it, users before what they use."""
    changed = False
    for node in reversed(graph):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            editing.erase([node])
            changed = True
            continue
        changed |= _drop_optional_outputs(node, opsets)
        for body in editing.bodies(node):
            changed |= _sweep(body, opsets)
    return changed


def _drop_initializers(graph: ir.Graph) -> bool:
    dead = [
        name
        for name, value in graph.initializers.items()
        if not (value.uses() or value.is_graph_output() or value.is_graph_input())
    ]
    for name in dead:
        del graph.initializers[name]
    return bool(dead)


def _drop_optional_outputs(node: ir.Node, opsets: dict[str, int]) -> bool:
    """Un-name optional outputs that nobody reads, and cut them off at the end.

    Before opset 14 the number of outputs of a BatchNormalization says whether it trains, so its outputs stay.
    """
    if len(node.outputs) < 2 or node.op_type == "BatchNormalization":
        return False
    schema = schema_of(node.domain, node.op_type, int(node.version or opsets.get(node.domain, 1)))
    if schema is None:
        return False
    optional = [formal.option == onnx.defs.OpSchema.FormalParameterOption.Optional for formal in schema.outputs]
    changed = False
    for output, may_go in zip(node.outputs, optional, strict=False):
        if may_go and output.name and not output.uses() and not output.is_graph_output():
            output.name, changed = "", True
    count = len(node.outputs)
    while count > 1 and not node.outputs[count - 1].name and optional[count - 1 : count] == [True]:
        count -= 1
    if count < len(node.outputs):
        node.resize_outputs(count)
        return True
    return changed
