"""Computes at compile time what depends on no input.

    Concat(Shape(x)[0], 12)  with x[2, 7]           →  initializer [2, 12]
    Mul(w, 0.125)            with w an initializer  →  initializer

Numbers come from onnxruntime, so a folded constant has the bits the runtime would have computed. What stays:

- random operators, control flow, and what makes a graph output;
- QuantizeLinear, DequantizeLinear and casts from a narrower float of more than one element: they say how a weight is
  stored and in which precision it takes part;
- a result larger than ``max_bytes`` (of ConstantOfShape, Expand, Tile, …), unless it takes the place of constants that
  are no smaller; all results of one run together stay below ``max_total_bytes``.

A transposed weight above ``max_bytes`` is folded without computing it: its bytes are made when they are read. It counts
in full all the same, since whoever runs the model in memory reads it.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from mmopt.analysis.shapes import ShapeFacts, infer_shapes
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.canonicalize import editing
from mmopt.transforms.canonicalize.constant_regions import ConstantRegion, Tensors
from mmopt.transforms.canonicalize.constant_runs import compute


@dataclasses.dataclass(frozen=True)
class FoldConstants(Pass):
    """Computes at compile time what depends on no input.

    Attributes:
        max_bytes: Largest constant made from smaller ones.
        max_total_bytes: Largest sum of all constants made in one run.
    """

    max_bytes: int = 1 << 20
    max_total_bytes: int = 1 << 28

    def run(self, module: Module, context: PassContext) -> bool:
        """Fold everything that can be folded, in one sweep."""
        return self.fold(module, context, infer_shapes(module.model))

    def fold(self, module: Module, context: PassContext, facts: ShapeFacts) -> bool:
        """As :meth:`run`, with facts that are known already."""
        region = ConstantRegion(facts, self.max_bytes, self.max_total_bytes)
        for graph in module.model.graphs():
            region.add(graph)
        results: Tensors = {**region.known, **region.lazy}
        nodes = [value.producer() for value in results]
        computed, failed = compute(module.model, region.nodes, results)
        results.update(computed)
        failures = dict(failed)
        nodes += [node for node in region.nodes if node not in failures]
        folded = _install([node for node in nodes if node is not None], results)
        for node, reason in (*region.missed, *failed):
            self.remark(context, "missed", node.name or "", reason)
        if folded:
            self.remark(context, "applied", "", f"{folded} {'node' if folded == 1 else 'nodes'} computed.")
        return folded > 0


def _install(nodes: list[ir.Node], results: Tensors) -> int:
    """Put results in place of ``nodes``. Only what something else reads becomes an initializer."""
    folded = set(nodes)
    doomed = []
    for node in nodes:
        outside = [output for output in node.outputs if any(user not in folded for user in output.consumers())]
        if any(output not in results for output in outside):
            raise ValueError(f"node {node.name!r} was computed without the output that is read")
        for output in outside:
            _make_initializer(output, results[output])
        doomed.append(node)
    editing.erase(doomed)
    return len(doomed)


def _make_initializer(output: ir.Value, tensor: ir.TensorProtocol) -> None:
    node = output.producer()
    if node is None or node.graph is None or output.name is None:
        raise ValueError(f"value {output.name!r} is not made by a node of a graph")
    name, output.name = output.name, None
    new = editing.new_initializer(node.graph, tensor, name)
    new.doc_string = output.doc_string
    new.metadata_props.update(output.metadata_props)
    output.replace_all_uses_with(new)
