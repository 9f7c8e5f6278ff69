"""Where pairs of QuantizeLinear and DequantizeLinear go besides the operands of layers.

Operators that choose or move elements take the encoding of their result for their operands, so that they work on
integers and nothing is rounded twice:

    y = MaxPool(x); Conv(Q(y))    →    y = MaxPool(Q(x)); Conv(Q(y))        one encoding for both

A sum of two convolutions keeps the first one's result in memory until the second is computed: as integers. Other
runtimes add what two convolutions give as integers throughout, and take biases as int32 in units of the sums:

    Conv(x', w') + Conv(y', v')       →    Q(Conv(x', w')) + Q(Conv(y', v'))
    Gemm(Q(Reshape(ReduceMean(x))))   →    Gemm(Q(Reshape(Q(GlobalAveragePool(Q(x))))))
    Gemm(x', w', b)                   →    Gemm(x', w', Dequantize(b'))        b' = b / (s_x · s_w) in int32
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import axes_of, integer, is_onnx, tensor_of
from mmopt.transforms.quantize.encoding import Array, Encoding
from mmopt.transforms.quantize.layers import Layer
from mmopt.transforms.quantize.qdq import Quantizer

_LARGEST = 2**31 - 1

_MOVING = ("Reshape", "Flatten", "Squeeze")
"""What may stand between a mean over images and the layer that reads it."""


def share_upwards(quantizer: Quantizer, value: ir.Value, encoding: Encoding, taken: Collection[ir.Value]) -> int:
    """Have the operators that only choose or move elements on the way to ``value`` read integers of its encoding.

    Args:
        quantizer: Makes the nodes.
        value: A value that is quantized.
        encoding: How.
        taken: Values that have encodings of their own.

    Returns:
        How many operators.
    """
    node, count = value.producer(), 0
    if node is None or not _carries(node):
        return 0
    for source in dict.fromkeys(v for v in node.inputs if v is not None):
        if source in taken or tensor_of(source) is not None or source.producer() is None:
            continue
        count += share_upwards(quantizer, source, encoding, taken)
        quantizer.activation(source, encoding, [node])
    return count + 1


def _carries(node: ir.Node) -> bool:
    if is_onnx(node, "MaxPool"):
        return not any(output.uses() for output in node.outputs[1:])
    return is_onnx(node, "Concat")


def stored_sums(
    graph: ir.Graph, convolutions: Collection[ir.Node], *, every: bool
) -> Iterator[tuple[ir.Value, ir.Node]]:
    """Results of convolutions that wait in memory to be added, with the sums that read them.

    Args:
        graph: The graph.
        convolutions: Those that are quantized.
        every: Also the result that is added as soon as it is there.
    """
    order = {node: number for number, node in enumerate(graph)}
    for node in graph:
        if not is_onnx(node, "Add"):
            continue
        made = [v for v in dict.fromkeys(node.inputs) if v is not None and v.producer() in convolutions]
        alone = [v for v in made if len(v.uses()) == 1 and not v.is_graph_output()]
        if every and any(_widened(v) for v in node.inputs if v not in made) and len(made) == 1:
            yield from ((value, node) for value in alone)
        elif len(made) == 2:
            last = max(made, key=lambda v: order[v.producer()])  # type: ignore[index]
            yield from ((value, node) for value in alone if every or value is not last)


def _widened(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and is_onnx(producer, "DequantizeLinear")


def means(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node, ir.Value]]:
    """Means over whole images that nothing but a quantized layer reads, moved or not.

    Yields:
        The mean, as GlobalAveragePool; what reads it; what is quantized in the end.
    """
    for node in list(graph):
        if not _is_image_mean(node):
            continue
        reader = moved = _only_reader(node.outputs[0])
        value = node.outputs[0]
        while moved is not None and is_onnx(moved, *_MOVING) and moved.inputs[0] is value:
            value = moved.outputs[0]
            moved = _only_reader(value)
        if reader is not None and moved is not None and is_onnx(moved, "QuantizeLinear"):
            if is_onnx(node, "ReduceMean"):  # other runtimes have integers for the one only
                node.resize_inputs(1)
                node.op_type = "GlobalAveragePool"
                node.attributes.clear()
            yield node, reader, value


def _is_image_mean(node: ir.Node) -> bool:
    data = node.inputs[0] if node.inputs else None
    rank = None if data is None or data.shape is None else len(data.shape)
    if rank != 4 or is_onnx(node, "GlobalAveragePool"):
        return rank == 4
    if not is_onnx(node, "ReduceMean") or not integer(node, "keepdims", 1):
        return False
    axes = axes_of(node)
    return axes is not None and sorted(axis % 4 for axis in axes) == [2, 3]


def _only_reader(value: ir.Value) -> ir.Node | None:
    users = list(dict.fromkeys(use.node for use in value.uses()))
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def store_bias(quantizer: Quantizer, layer: Layer, data: Encoding, weight: Encoding) -> bool:
    """Keep the bias of a layer as int32 in units of its sums, with a zero point of 0; returns whether it has one.

    Args:
        quantizer: Makes the nodes.
        layer: The layer.
        data: How what it reads is quantized: one scale.
        weight: How its weights are: one scale for each output channel.
    """
    found = _bias(layer)
    if found is None:
        return False
    node, bias = found
    tensor = tensor_of(bias)
    assert tensor is not None
    values = np.asarray(tensor.numpy()).astype(np.float64).reshape(-1)
    scale = np.asarray(data.scale.astype(np.float32) * weight.scale.astype(np.float32)).reshape(-1)
    if values.size != scale.size or np.abs(values / scale).max(initial=0) > _LARGEST:
        return False
    integers: Array = np.rint(values / scale).astype(np.int32)
    quantizer.constant(bias, integers, Encoding(ir.DataType.INT32, scale, axis=0), [node])
    return True


def _bias(layer: Layer) -> tuple[ir.Node, ir.Value] | None:
    """The bias of a layer as a vector, and the operator that adds it."""
    node = layer.node
    if is_onnx(node, "Conv", "Gemm"):
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return (node, bias) if bias is not None and _is_vector(bias) else None
    users = list(dict.fromkeys(use.node for use in node.outputs[0].uses()))
    if len(users) != 1 or not is_onnx(users[0], "Add") or node.outputs[0].is_graph_output():
        return None
    others = [v for v in users[0].inputs if v is not None and v is not node.outputs[0]]
    return (users[0], others[0]) if len(others) == 1 and _is_vector(others[0]) else None


def _is_vector(value: ir.Value) -> bool:
    tensor = tensor_of(value)
    return tensor is not None and len(tensor.shape) == 1 and tensor.dtype == ir.DataType.FLOAT
