"""Takes the mean error of rounded weights out of the bias: b ← b + (W − Q) · E[x].

Rounding errors of one row do not average out when what it reads has a mean, as everything behind a rectifier does
(Nagel et al., 2019).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import (
    Array,
    Names,
    drop_unused,
    integer,
    is_onnx,
    new_initializer,
    tensor_of,
)
from mmopt.transforms.quantize.layers import Layer
from mmopt.transforms.quantize.qdq import redirect


def mean_error(layer: Layer, difference: Array, mean: Array) -> Array | None:
    """What a layer's output channels lose on average.

    Args:
        layer: The layer.
        difference: Weights less what their integers stand for, of the weight's shape.
        mean: Mean of each channel that the layer reads.

    Returns:
        float64 ``[output channels]``; ``None`` when the channels do not fit.
    """
    if not is_onnx(layer.node, "Conv"):
        matrix = difference if layer.depth_axis == 0 else difference.T
        return mean @ matrix if matrix.shape[0] == len(mean) else None
    groups = integer(layer.node, "group", 1) or 1
    outputs, depth = difference.shape[:2]
    if groups * depth != len(mean):
        return None
    taps = difference.reshape(outputs, depth, -1).sum(axis=2)
    means = np.repeat(mean.reshape(groups, depth), outputs // groups, axis=0)
    return np.asarray((taps * means).sum(axis=1))


def add_to_bias(layer: Layer, offset: Array, names: Names) -> None:
    """Add ``offset``, one number for each output channel, to what ``layer`` gives."""
    node, graph = layer.node, layer.node.graph
    assert graph is not None
    data = offset.astype(np.float32)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = tensor_of(bias)
    if is_onnx(node, "Conv", "Gemm") and (bias is None or tensor is not None):
        if tensor is not None:
            data = (np.asarray(tensor.numpy()) + _scaled(node, offset)).astype(np.float32)
        elif is_onnx(node, "Gemm"):
            data = _scaled(node, offset).astype(np.float32)
        value = new_initializer(graph, ir.tensor(data), names.fresh(f"{layer.weight.name}_bias"))
        if len(node.inputs) > 2:
            node.replace_input_with(2, value)
            drop_unused(bias)
        else:
            node.resize_inputs(3)
            node.replace_input_with(2, value)
        return
    output = node.outputs[0]
    users = list(dict.fromkeys(use.node for use in output.uses()))
    if _joins_addend(output, users, data, names):
        return
    value = new_initializer(graph, ir.tensor(data), names.fresh(f"{layer.weight.name}_offset"))
    name = names.fresh(f"{output.name}_corrected")
    corrected = ir.Value(name=name, type=output.type, shape=output.shape)
    add = ir.Node("", "Add", [output, value], outputs=[corrected], name=names.fresh(f"{node.name}_correction"))
    for user in users:
        redirect(user, output, corrected)
    graph.insert_after(node, add)


def _joins_addend(output: ir.Value, users: list[ir.Node], offset: Array, names: Names) -> bool:
    """Put ``offset`` into the constant that is added to ``output`` anyway, if there is one."""
    if len(users) != 1 or not is_onnx(users[0], "Add") or output.is_graph_output():
        return False
    (user,) = users
    position = 1 if user.inputs[0] is output else 0
    addend = user.inputs[position]
    tensor = tensor_of(addend)
    if tensor is None or addend is None or tuple(tensor.shape.numpy()) != offset.shape or user.graph is None:
        return False
    data = (np.asarray(tensor.numpy()).astype(np.float64) + offset).astype(np.float32)
    value = new_initializer(user.graph, ir.tensor(data), names.fresh(f"{addend.name}_corrected"))
    user.replace_input_with(position, value)
    drop_unused(addend)
    return True


def _scaled(node: ir.Node, offset: Array) -> Array:
    """``offset`` as a Gemm's third input, which it multiplies by beta."""
    beta = node.attributes.get("beta")
    alpha = node.attributes.get("alpha")
    return np.asarray(
        offset * (1.0 if alpha is None else alpha.as_float()) / (1.0 if beta is None else beta.as_float() or 1.0)
    )
