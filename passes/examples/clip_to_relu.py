"""A pass as a class: options are dataclass fields, and near misses leave a remark.

    y = Clip(x, min=0)   →   y = Relu(x)        when there is no upper bound

Run it with:

    mmopt optimize model.onnx --pass 'passes/examples/clip_to_relu.py:ClipToRelu{largest=1000}'
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from mmopt import Fidelity, Module, Pass, PassContext


@dataclasses.dataclass(frozen=True)
class ClipToRelu(Pass):
    """Replaces a Clip from zero upwards by a Relu.

    Attributes:
        largest: An upper bound of this or more counts as none.
    """

    fidelity = Fidelity.EXACT

    largest: float = 3e38

    def run(self, module: Module, context: PassContext) -> bool:
        changed = False
        for node in list(module.graph.all_nodes()):
            if node.op_type != "Clip" or node.domain:
                continue
            if reason := self._reason_against(node):
                self.remark(context, "missed", node.name or "", reason)
                continue
            _replace(node, ir.node("Relu", [node.inputs[0]], name=node.name))
            self.remark(context, "applied", node.name or "", "Replaced Clip by Relu.")
            changed = True
        return changed

    def _reason_against(self, node: ir.Node) -> str:
        low, high = _bound(node, 1), _bound(node, 2)
        if low != 0:
            return f"The lower bound is {low}, not a constant 0."
        if high is None or high < self.largest:
            return f"The upper bound {high} is no constant above {self.largest}."
        return ""


def _bound(node: ir.Node, position: int) -> float | None:
    """The constant at ``position``: infinite when left out, None when it is computed."""
    value = node.inputs[position] if position < len(node.inputs) else None
    if value is None:
        return -np.inf if position == 1 else np.inf
    return None if value.const_value is None else float(value.const_value.numpy())


def _replace(old: ir.Node, new: ir.Node) -> None:
    """Put ``new`` in the place of ``old``; its output takes over name, type and uses."""
    before, after = old.outputs[0], new.outputs[0]
    after.name, after.type, after.shape = before.name, before.type, before.shape
    old.graph.insert_before(old, new)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    old.graph.remove(old, safe=True)
