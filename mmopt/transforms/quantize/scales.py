"""Rescaling channels: which tensors allow it, and giving operators scaled copies of their constants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from mmopt.ir.module import Module
from mmopt.transforms.canonicalize.editing import Array, Names, drop_unused, is_onnx, new_initializer, tensor_of
from mmopt.transforms.quantize.layers import Layer, layers

_NORMS = ("LayerNormalization", "RMSNormalization")

LIMITS = (1e-4, 1e4)
"""Scales outside of this are cut: a channel that is (nearly) always 0 must not blow up weights."""


def limited(scales: Array) -> Array:
    """Scales within :data:`LIMITS`; 1 for what is no positive number."""
    return np.clip(np.where(np.isfinite(scales) & (scales > 0), scales, 1.0), *LIMITS)


def weight_of(layer: Layer) -> Array:
    """The weight that a layer reads now, float64."""
    tensor = tensor_of(layer.node.inputs[1])
    assert tensor is not None
    return np.asarray(tensor.numpy()).astype(np.float64)


def magnitudes(layer: Layer, *, out: bool = False) -> Array:
    """Largest |w| of each channel of input, or of output."""
    weight, axis = np.abs(weight_of(layer)), layer.out_axis if out else layer.depth_axis
    return np.asarray(weight.max(axis=tuple(n for n in range(weight.ndim) if n != axis)))


def after_norms(module: Module) -> Iterator[tuple[ir.Node, list[Layer]]]:
    """Norms over the last axis, with constant weights, that layers read and nothing else."""
    found = {layer.node: layer for layer in layers(module) if not is_onnx(layer.node, "Conv")}
    for node in module.graph:
        if not is_onnx(node, *_NORMS) or any(tensor_of(value) is None for value in node.inputs[1:]):
            continue
        value = node.outputs[0]
        users = list(dict.fromkeys(use.node for use in value.uses()))
        readers = [found[user] for user in users if user in found and found[user].data is value]
        scale = tensor_of(node.inputs[1])
        if not users or len(readers) != len(users) or value.is_graph_output() or scale is None or len(scale.shape) != 1:
            continue
        if all(weight_of(layer).shape[layer.depth_axis] == scale.shape[0] for layer in readers):
            yield node, readers


def after_attention(module: Module) -> Iterator[tuple[ir.Value, Layer]]:
    """What attention gives, where layers read it and nothing else, with the layer that makes the values it mixes.

    The values reach the attention alone, as the last part of a Split or as they are, with a bias or without.
    """
    found = {layer.node: layer for layer in layers(module) if is_onnx(layer.node, "MatMul")}
    for node in module.graph:
        heads = node.attributes.get_int("kv_num_heads", 0) if is_onnx(node, "Attention") else 0
        if not heads or heads != node.attributes.get_int("q_num_heads", 0) or len(node.outputs) > 1:
            continue
        output = node.outputs[0]
        users = [use.node for use in output.uses()]
        if not users or output.is_graph_output() or not all(u in found and found[u].data is output for u in users):
            continue
        source = _projection(node.inputs[2], found)
        if source is not None and all(weight_of(found[u]).shape[0] <= weight_of(source).shape[1] for u in users):
            yield output, source


def _projection(value: ir.Value | None, found: Mapping[ir.Node, Layer]) -> Layer | None:
    """The layer that makes ``value`` for one reader, through casts, the last part of a Split and a bias."""
    producer = None if value is None else value.producer()
    while producer is not None and is_onnx(producer, "Cast") and value is not None and len(value.uses()) == 1:
        value = producer.inputs[0]
        producer = None if value is None else value.producer()
    alone = producer is not None and value is not None and len(value.uses()) == 1
    if alone and is_onnx(producer, "Split") and producer.outputs[-1] is value:  # type: ignore[arg-type, union-attr]
        value = producer.inputs[0]  # type: ignore[union-attr]
        producer = None if value is None else value.producer()
        alone = value is not None and len(value.uses()) == 1
    if alone and producer is not None and is_onnx(producer, "Add"):
        inner = [v for v in producer.inputs if tensor_of(v) is None]
        constant = next((tensor_of(v) for v in producer.inputs if tensor_of(v) is not None), None)
        if len(inner) != 1 or constant is None or len(constant.shape) != 1 or inner[0] is None:
            return None
        producer = inner[0].producer() if len(inner[0].uses()) == 1 else None
    if not alone or producer is None or producer not in found or producer.outputs[0].is_graph_output():
        return None
    return found[producer]


class Writer:
    """Gives operators scaled copies of their constants."""

    def __init__(self, module: Module) -> None:
        self.names = Names(module.model)
        self._graph = module.graph
        self.changed = False

    def scale_norm(self, norm: ir.Node, scales: Array, shifts: Array | None = None) -> None:
        """Take ``shifts`` from what a norm gives and divide it by ``scales``."""
        offset = np.zeros_like(scales) if shifts is None else shifts
        self._replace(norm, 1, lambda data: data / scales)
        if len(norm.inputs) > 2 and norm.inputs[2] is not None:
            self._replace(norm, 2, lambda data: (data - offset) / scales)
        elif offset.any():
            value = self._constant(f"{norm.outputs[0].name}_bias", -offset / scales)
            if len(norm.inputs) < 3:
                norm.resize_inputs(3)
            norm.replace_input_with(2, value)

    def insert(self, value: ir.Value, users: list[ir.Node], scales: Array, shifts: Array) -> None:
        """Have ``users`` read ``value`` less ``shifts`` and divided by ``scales``, along the last axis."""
        steps = [("Mul", 1 / scales), *([("Add", -shifts / scales)] if shifts.any() else [])]
        nodes, source = [], value
        for op_type, data in steps:
            name = self.names.fresh(f"{value.name}_smoothed")
            result = ir.Value(name=name, type=value.type, shape=value.shape)
            constant = self._constant(f"{name}_by", data)
            nodes.append(
                ir.Node("", op_type, [source, constant], outputs=[result], name=self.names.fresh(f"{name}_node"))
            )
            source = result
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(next(iter(self._graph)), nodes)
        else:
            self._graph.insert_after(producer, nodes)
        for user in users:
            for position, operand in enumerate(user.inputs):
                if operand is value:
                    user.replace_input_with(position, source)

    def _constant(self, name: str, data: Array) -> ir.Value:
        self.changed = True
        return new_initializer(self._graph, ir.tensor(data.astype(np.float32)), self.names.fresh(name))

    def scale_depth(self, layer: Layer, scales: Array) -> None:
        """Multiply the weights of each channel of input."""
        self._replace(layer.node, 1, lambda data: data * along(scales, data.ndim, layer.depth_axis))

    def scale_outputs(self, layer: Layer, scales: Array) -> None:
        """Multiply what each channel of output gives."""
        self._replace(layer.node, 1, lambda data: data * along(scales, data.ndim, layer.out_axis))
        if len(layer.node.inputs) > 2 and layer.node.inputs[2] is not None:
            self._replace(layer.node, 2, lambda data: data * scales)

    def scale_values(self, layer: Layer, scales: Array) -> None:
        """Divide the last channels that ``layer`` gives, and its bias, by ``scales``."""
        count = len(scales)

        def change(data: Array) -> Array:
            changed = data.copy()
            changed[..., -count:] /= scales
            return changed

        self._replace(layer.node, 1, change)
        users = [use.node for use in layer.node.outputs[0].uses()]
        if is_onnx(users[0], "Add"):
            position = next(n for n, v in enumerate(users[0].inputs) if tensor_of(v) is not None)
            self._replace(users[0], position, change)

    def take(self, layer: Layer, index: Array, axis: int) -> None:
        """Give the weight of ``layer`` these channels along ``axis``, and its bias too where they are its output."""
        self._replace(layer.node, 1, lambda data: np.take(data, index, axis=axis))
        if axis == layer.out_axis and len(layer.node.inputs) > 2:
            self._take_operand(layer.node, 2, index)

    def take_operands(self, node: ir.Node, index: Array) -> None:
        """Give every constant of ``node`` that has one number for each channel these channels."""
        for position in range(len(node.inputs)):
            self._take_operand(node, position, index)

    def _take_operand(self, node: ir.Node, position: int, index: Array) -> None:
        tensor = tensor_of(node.inputs[position])
        if tensor is not None and tensor.size > 1:
            self._replace(node, position, lambda data: np.take(data, index, axis=-1))

    def _replace(self, node: ir.Node, position: int, change: Callable[[Array], Array]) -> None:
        value = node.inputs[position]
        tensor = tensor_of(value)
        if value is None or tensor is None:
            return
        data = np.asarray(tensor.numpy())
        changed = change(data.astype(np.float64)).astype(data.dtype)
        if np.array_equal(changed, data):
            return
        name = self.names.fresh(f"{value.name}_rescaled")
        node.replace_input_with(position, new_initializer(self._graph, ir.tensor(changed), name))
        drop_unused(value)
        self.changed = True


def along(scales: Array, rank: int, axis: int) -> Array:
    shape = [1] * rank
    shape[axis] = -1
    return scales.reshape(shape)
