"""Turns ``Constant`` nodes into initializers, in the graph they stand in (bodies of If, Loop and Scan included).

    c = Constant<value_ints: [1, 2]>()   →   initializer c = [1, 2]

A constant that is a graph output keeps its node: not every runtime takes an initializer for an output.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.canonicalize import editing


@dataclasses.dataclass(frozen=True)
class LiftConstants(Pass):
    """Turns Constant nodes into initializers."""

    def run(self, module: Module, context: PassContext) -> bool:
        """Lift the constants of every graph. Local functions have no initializers, so theirs stay."""
        changed = False
        for graph in list(module.model.graphs()):
            lifted = [node for node in graph if _lift(node, graph)]
            editing.erase(lifted)
            changed |= bool(lifted)
        return changed


def _lift(node: ir.Node, graph: ir.Graph) -> bool:
    if not editing.is_onnx(node, "Constant") or len(node.attributes) != 1:
        return False
    old = node.outputs[0]
    tensor = editing.constant_node_tensor(node)
    if tensor is None or old.is_graph_output() or not old.name or old.name in graph.initializers:
        return False
    new = editing.new_initializer(graph, tensor, old.name)
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)
    old.replace_all_uses_with(new)
    return True
