"""Gives every node and value a name that is the same in every run.

    (unnamed) = Relu(x)   →   Relu_0: Relu_0_output = Relu(x)

Names that are there stay, and inputs, outputs and initializers of the main graph above all. Of two nodes of one name,
or two values where one could be taken for the other, the later gets a number. An optional output that is left out stays
nameless: that is how ONNX leaves it out.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.canonicalize import editing


@dataclasses.dataclass(frozen=True)
class StabilizeNames(Pass):
    """Names what has no name, and tells apart what has the same."""

    def run(self, module: Module, context: PassContext) -> bool:
        """Name the main graph with its bodies, then each local function."""
        graphs = [module.model.graph, *(function.graph for function in module.model.functions.values())]
        return any([_Namer().visit(graph, set()) for graph in graphs])


class _Namer:
    """Names one graph with the bodies inside it. Values of a body must differ from all of the graphs around it."""

    def __init__(self) -> None:
        self._node_names: set[str] = set()
        self._counts: dict[str, int] = {}
        self.changed = False

    def visit(self, graph: ir.Graph, outer: set[str]) -> bool:
        """Name ``graph``; ``outer`` are the names of values it could be confused with."""
        names = set(outer)
        seen: set[ir.Value] = set()
        outputs = [value for value in graph.outputs if value.producer() is not None]
        for value in (*graph.inputs, *outputs, *graph.initializers.values()):
            self._value(value, value.name or "value", names, seen)
        for node in graph:
            self._node(node)
            for i, value in enumerate(node.outputs):
                if value.name or value.uses() or value.is_graph_output():
                    suffix = f"_{i}" if len(node.outputs) > 1 else ""
                    self._value(value, value.name or f"{node.name}_output{suffix}", names, seen)
        for node in graph:
            for body in editing.bodies(node):
                self.visit(body, names)
        return self.changed

    def _node(self, node: ir.Node) -> None:
        name = node.name or self._numbered(node.op_type)
        if name in self._node_names:
            name = self._free(name, self._node_names)
        self._node_names.add(name)
        if node.name != name:
            node.name, self.changed = name, True

    def _value(self, value: ir.Value, wanted: str, names: set[str], seen: set[ir.Value]) -> None:
        if value in seen:
            return
        seen.add(value)
        name = self._free(wanted, names) if wanted in names else wanted
        names.add(name)
        if value.name != name:
            value.name, self.changed = name, True

    def _numbered(self, op_type: str) -> str:
        count = self._counts.get(op_type, 0)
        self._counts[op_type] = count + 1
        return f"{op_type}_{count}"

    def _free(self, base: str, taken: set[str]) -> str:
        count = self._counts.get(base, 0)
        while (name := f"{base}_{count + 1}") in taken:
            count += 1
        self._counts[base] = count + 1
        return name
