"""Computes equal things once.

    a = Exp(x); b = Exp(x); return a + b     →   a = Exp(x); return a + a

Two nodes are equal when operator, inputs and attributes are, bit for bit (-0.0 is not 0.0); bodies of If, Loop and Scan
are compared node by node. A node in a body may reuse one of a graph around it. Random operators and operators of
domains this project does not know are left alone.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Hashable, Sequence

import onnx_ir as ir

from mmopt.analysis.shape_rules import ONNX_DOMAINS
from mmopt.ir.fingerprint import tensor_digest
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.canonicalize import editing

_PURE_DOMAINS = (*ONNX_DOMAINS, "ai.onnx.ml", "com.microsoft")


@dataclasses.dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Computes equal things once."""

    def run(self, module: Module, context: PassContext) -> bool:
        """Merge equal nodes of the main graph and of the bodies inside it."""
        merger = _Merger(module.model)
        merger.visit(module.model.graph)
        if merger.count:
            self.remark(context, "applied", "", f"{merger.count} nodes computed what another one did.")
        return merger.count > 0


class _Merger:
    def __init__(self, model: ir.Model) -> None:
        self.count = 0
        self._functions = model.functions
        self._seen: dict[Hashable, ir.Node] = {}

    def visit(self, graph: ir.Graph) -> None:
        """Merge the nodes of ``graph`` with those before them here and in the graphs around it."""
        added: list[Hashable] = []
        for node in graph:
            for body in editing.bodies(node):
                self.visit(body)
            key = self._key(node)
            if key is None:
                continue
            first = self._seen.get(key)
            if first is None:
                self._seen[key] = node
                added.append(key)
            elif _can_merge(node, first):
                for old, new in zip(node.outputs, first.outputs, strict=True):
                    editing.replace(old, new)
                editing.erase([node])
                self.count += 1
        for key in added:
            del self._seen[key]

    def _key(self, node: ir.Node) -> Hashable:
        known = node.domain in _PURE_DOMAINS or node.op_identifier() in self._functions
        if not known or editing.is_random(node) or self._calls_random(node):
            return None
        return _node_key(node, {})

    def _calls_random(self, node: ir.Node) -> bool:
        function = self._functions.get(node.op_identifier())
        return function is not None and any(editing.is_random(n) or self._calls_random(n) for n in function)


def _can_merge(node: ir.Node, first: ir.Node) -> bool:
    """Whether every used output exists in ``first`` too, and graph outputs can keep their names."""
    outputs = [old for old, new in zip(node.outputs, first.outputs, strict=True) if old.is_graph_output()]
    pairs = list(zip(node.outputs, first.outputs, strict=True))
    present = all(new.name or not (old.uses() or old.is_graph_output()) for old, new in pairs)
    return present and len(outputs) <= 1 and all(editing.can_replace(old, new) for old, new in pairs)


def _node_key(node: ir.Node, local: dict[ir.Value, int]) -> Hashable:
    inputs = tuple(None if value is None else local.get(value, value) for value in node.inputs)
    attributes = tuple((name, _attribute_key(node.attributes[name], local)) for name in sorted(node.attributes))
    return (node.domain, node.op_type, node.overload, node.version, inputs, attributes, len(node.outputs))


def _attribute_key(attribute: ir.Attr, local: dict[ir.Value, int]) -> Hashable:
    kind, value = attribute.type, attribute.value
    if attribute.is_ref():
        return (kind, "ref", attribute.ref_attr_name)
    if kind == ir.AttributeType.GRAPH:
        return (kind, _graph_key(attribute.as_graph(), local))
    if kind == ir.AttributeType.GRAPHS:
        return (kind, tuple(_graph_key(graph, local) for graph in attribute.as_graphs()))
    if kind == ir.AttributeType.TENSOR:
        return (kind, tensor_digest(attribute.as_tensor()))
    if kind in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
        numbers = [value] if kind == ir.AttributeType.FLOAT else list(value)
        return (kind, struct.pack(f"{len(numbers)}d", *numbers))
    if kind in (ir.AttributeType.INTS, ir.AttributeType.STRINGS):
        return (kind, tuple(value))
    # Tensor lists, sparse tensors and types are rare and have no cheap key: equal only when they are one object.
    return (kind, value if kind in (ir.AttributeType.INT, ir.AttributeType.STRING) else id(value))


def _graph_key(graph: ir.Graph, outer: dict[ir.Value, int]) -> Hashable:
    """A body with its own values numbered in order, so that names do not count."""
    local = dict(outer)

    def number(values: Sequence[ir.Value]) -> None:
        for value in values:
            local[value] = len(local)

    number(graph.inputs)
    number(list(graph.initializers.values()))
    weights = tuple(tensor_digest(v.const_value) for v in graph.initializers.values() if v.const_value is not None)
    nodes = []
    for node in graph:
        nodes.append(_node_key(node, local))
        number(node.outputs)
    types = tuple(str(value.type) for value in graph.inputs)
    return (types, weights, tuple(nodes), tuple(local.get(value, value) for value in graph.outputs))
