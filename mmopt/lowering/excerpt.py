"""Cuts nodes out of a model into a model of their own, for onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.lowering.grouping import reads
from mmopt.lowering.values import Value, described

LARGEST_CONSTANT = 1 << 16
"""Bytes up to which a value known at compile time goes into the excerpt instead of being computed elsewhere."""


class NotCut(Exception):
    """Something the nodes read has an unknown type, so that they cannot be a model of their own."""


def cut_out(
    model: ir.Model, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value], lowered: Mapping[ir.Value, Value]
) -> ir.Model:
    """A model of ``nodes`` only, with the initializers they use.

    Args:
        model: Where they are; it is unchanged.
        nodes: Nodes of its main graph, in order.
        outputs: Values the new model gives: made by the nodes, or initializers.
        lowered: What is known of values from a lowering: constants, and types where the model states none.

    Raises:
        NotCut: The type of a value they read is not known.
    """
    made = {v for node in nodes for v in node.outputs}
    used = dict.fromkeys([*(v for node in nodes for v in reads(node)), *outputs])
    outside = [v for v in used if v not in made]
    weights = [v for v in outside if v.const_value is not None and v.producer() is None]
    known = {v: _constant(v, lowered.get(v)) for v in outside if v not in weights}
    inputs = [v for v in outside if v not in weights]
    view = ir.GraphView(inputs, outputs, nodes=nodes, initializers=weights, opset_imports=dict(model.opset_imports))
    graph = view.clone()
    for value, original in zip(list(graph.inputs), inputs, strict=True):
        constant = known[original]
        if constant is not None:
            graph.inputs.remove(value)
            value.const_value = constant
            graph.register_initializer(value)
        else:
            _state_type(value, original, lowered.get(original))
    graph.name = model.graph.name or "part"
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))


def _constant(value: ir.Value, lowered: Value | None) -> ir.TensorProtocol | None:
    if lowered is None or lowered.constant is None or lowered.constant.nbytes > LARGEST_CONSTANT or value.dtype is None:
        return None
    return ir.Tensor(lowered.constant, dtype=value.dtype, name=value.name)


def _state_type(value: ir.Value, original: ir.Value, lowered: Value | None) -> None:
    if value.type is not None and (value.shape is not None or not isinstance(value.type, ir.TensorType)):
        return
    known = described(original, lowered)
    if known is None and value.type is None:
        raise NotCut(f"the type of {original.name} is not known")
    if known is not None:
        value.type, value.shape = known.type, known.shape


def refusal(model: ir.Model) -> str:
    """Why onnxruntime cannot load ``model``, or ""."""
    with ReferenceRunner(threads=1) as runner:
        return runner.refusal(Module(model))
