"""Puts the bodies of local functions in place of their calls, so that other passes see through them.

    z = my.Scale(x)  with  my.Scale(a) = {b = Mul(a, 2); return b}   →   z = Mul(x, 2)

Fusion groups (domain ``mmopt.fused``) stay: their bodies are definitions, not code to optimize.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
from onnx_ir.passes import common

from mmopt.ir.module import FUSED_DOMAIN, Module
from mmopt.pipeline.base import Pass, PassContext

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


@dataclasses.dataclass(frozen=True)
class InlineFunctions(Pass):
    """Inlines calls of local functions other than fusion groups."""

    def run(self, module: Module, context: PassContext) -> bool:
        """Inline every function that can be inlined; the others get a remark."""
        model = module.model
        blocked = {name: why for name, function in model.functions.items() if (why := _obstacle(function, model))}
        for name, why in blocked.items():
            if name[0] != FUSED_DOMAIN:
                self.remark(context, "missed", "", f"Function {name[0]}::{name[1]} is not inlined: {why}.")
        free = [function for name, function in model.functions.items() if name not in blocked]
        if not free:
            return False
        for function in free:
            _separate_outputs(function)
        wanted = {function.identifier() for function in free}
        common.InlinePass(criteria=lambda function: function.identifier() in wanted)(model)
        for identifier in wanted & set(model.functions):
            del model.functions[identifier]
        return True


def _obstacle(function: ir.Function, model: ir.Model) -> str:
    """Why a function cannot be inlined, or ""."""
    if function.domain == FUSED_DOMAIN:
        return "it is a fusion group"
    for domain, version in function.opset_imports.items():
        if model.opset_imports.get(domain, version) != version:
            return f"it follows opset {version} of domain {domain!r}, the model {model.opset_imports[domain]}"
    if any(attribute.type in _GRAPHS for attribute in function.attributes.values()):
        return "it takes a graph as an attribute"
    return ""


def _separate_outputs(function: ir.Function) -> None:
    """Give an output that is an input, or another output too, a value of its own: inlining renames outputs."""
    taken = set(function.inputs)
    for index, value in enumerate(function.outputs):
        if value in taken:
            output = ir.Value(name=f"{value.name}_output_{index}", type=value.type, shape=value.shape)
            function.append(ir.Node("", "Identity", [value], outputs=[output]))
            function.outputs[index] = output
        taken.add(value)
