"""Rescaling channels: which tensors allow it, and giving operators scaled copies of their constants."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
