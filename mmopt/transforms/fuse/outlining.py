"""Replaces groups of nodes by calls of model-local functions of the domain ``mmopt.fused``."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from mmopt.ir.module import FUSED_DOMAIN, Module


class Outliner:
    """Makes the functions; equal groups share one."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.names: set[str | None] = {
            identifier[1] for identifier in module.model.functions if identifier[0] == FUSED_DOMAIN
        }
        self.node_names: set[str | None] = {node.name for graph in module.model.graphs() for node in graph}
        self.known: dict[str, str] = {}

    def outline(self, graph: ir.Graph, nodes: Sequence[ir.Node], title: str) -> ir.Node:
        """Replace ``nodes`` of ``graph`` by one call of a function named ``title``, numbered where that is taken."""
        members = set(nodes)
        made = {o for n in nodes for o in n.outputs}
        inputs = list(dict.fromkeys(v for n in nodes for v in n.inputs if v is not None and v not in made))
        outputs = [
            o
            for n in nodes
            for o in n.outputs
            if o.is_graph_output() or any(user not in members for user, _ in o.uses())
        ]
        key = _signature(nodes, inputs, outputs)
        if key not in self.known:
            self.known[key] = self._define(title, nodes, inputs, outputs)
        return self._call(graph, self.known[key], nodes, inputs, outputs)

    def _define(
        self, title: str, nodes: Sequence[ir.Node], inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]
    ) -> str:
        name = _free(title, self.names)
        mapping: dict[ir.Value, ir.Value] = {v: ir.Value(name=f"in{n}") for n, v in enumerate(inputs)}
        copies: list[ir.Node] = []
        for number, node in enumerate(nodes):
            results = [ir.Value(name=f"v{number}_{n}") for n in range(len(node.outputs))]
            mapping.update(zip(node.outputs, results, strict=True))
            copies.append(
                ir.Node(
                    node.domain,
                    node.op_type,
                    [None if v is None else mapping[v] for v in node.inputs],
                    list(node.attributes.values()),
                    outputs=results,
                    name=f"{node.op_type}_{number}",
                )
            )
        opsets = {d: v for d, v in self.module.model.opset_imports.items() if d in {n.domain for n in nodes} | {""}}
        body = ir.Graph(
            [mapping[v] for v in inputs], [mapping[v] for v in outputs], nodes=copies, opset_imports=opsets, name=name
        )
        function = ir.Function(FUSED_DOMAIN, name, "", graph=body, attributes=[])
        self.module.model.functions[function.identifier()] = function
        self.module.model.opset_imports.setdefault(FUSED_DOMAIN, 1)
        return name

    def _call(
        self,
        graph: ir.Graph,
        name: str,
        nodes: Sequence[ir.Node],
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
    ) -> ir.Node:
        results = [ir.Value(name=o.name, shape=o.shape, type=o.type) for o in outputs]
        call = ir.Node(
            FUSED_DOMAIN,
            name,
            list(inputs),
            outputs=results,
            name=_free(f"{nodes[0].name or name}.fused", self.node_names),
        )
        for key, value in nodes[0].metadata_props.items():
            call.metadata_props[key] = value
        graph.insert_after(nodes[-1], call)
        for old, new in zip(outputs, results, strict=True):
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(list(nodes), safe=True)
        return call


def _free(base: str, taken: set[str | None]) -> str:
    """``base``, numbered when it is taken; it is taken from now on."""
    name, number = base, 1
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    taken.add(name)
    return name


def _signature(nodes: Sequence[ir.Node], inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> str:
    """Equal for groups whose functions would be equal."""
    label: dict[ir.Value, str] = {v: f"i{n}" for n, v in enumerate(inputs)}
    lines: list[str] = []
    for number, node in enumerate(nodes):
        label.update({o: f"v{number}.{n}" for n, o in enumerate(node.outputs)})
        operands = ",".join("-" if v is None else label[v] for v in node.inputs)
        attributes = ";".join(f"{k}={_attribute(a)}" for k, a in sorted(node.attributes.items()))
        lines.append(f"{node.domain}.{node.op_type}({operands}){{{attributes}}}")
    return "\n".join([*lines, ",".join(label[o] for o in outputs)])


def _attribute(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        return str(attribute.as_tensor().numpy().tolist())
    return str(attribute.value)
