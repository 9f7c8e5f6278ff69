"""Cuts weights, and gives operators new constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.ir.module import Module
from mmopt.transforms.canonicalize.editing import Names, new_initializer

Array = np.ndarray[Any, Any]


class Constants:
    """New constants in a module, each under a name that was free.

    Args:
        module: The module they go into.
    """

    def __init__(self, module: Module) -> None:
        self._graph = module.graph
        self._names = Names(module.model)
        self.names = self._names

    def add(self, array: Array, name: str, dtype: ir.DataType | None = None) -> ir.Value:
        """A new initializer. ``dtype`` is needed for types that numpy lacks."""
        tensor = ir.Tensor(np.ascontiguousarray(array), dtype=dtype or ir.DataType.from_numpy(array.dtype))
        return new_initializer(self._graph, tensor, self._names.fresh(name))

    def integers(self, numbers: Sequence[int], like: str) -> ir.Value:
        """A vector of int64."""
        return self.add(np.array(numbers, dtype=np.int64), like)

    def give(self, node: ir.Node, operand: int, value: ir.Value) -> None:
        """Make an operator read ``value``."""
        while len(node.inputs) <= operand:
            node.resize_inputs(len(node.inputs) + 1)
        node.replace_input_with(operand, value)


def kept(extent: int, removed: frozenset[int]) -> list[int]:
    """Positions that stay."""
    return [position for position in range(extent) if position not in removed]


def without(array: Array, axes: Mapping[int, frozenset[int]]) -> Array:
    """``array`` without some positions of some axes."""
    for axis, removed in axes.items():
        array = np.take(array, kept(array.shape[axis], removed), axis=axis)
    return np.ascontiguousarray(array)


def cut_constant(value: ir.Value, axes: Mapping[int, frozenset[int]]) -> None:
    """Cut an initializer, or what a ``Constant`` gives, under its name."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return
    smaller = ir.Tensor(without(tensor.numpy(), axes), dtype=tensor.dtype, name=value.name)
    put_constant(value, smaller)


def put_constant(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Give an initializer or a ``Constant`` other contents."""
    producer = value.producer()
    if producer is None:
        value.const_value = tensor
    else:
        producer.attributes.clear()
        producer.attributes["value"] = ir.AttrTensor("value", tensor)
    value.shape = ir.Shape(tensor.shape.numpy())
