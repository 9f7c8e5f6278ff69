"""Cuts a product whose result is split at once into one product for each part, as other runtimes like them.

    q, k, v = Split(x [Wq Wk Wv] + [bq bk bv])    →    q = x Wq + bq,  k = x Wk + bk,  v = x Wv + bv

The reverse of ``merge-projections``: where a Split copies, it costs more than one wide product saves.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.editing import (
    Array,
    Names,
    constant,
    constant_ints,
    drop_unused,
    erase,
    integer,
    is_onnx,
    new_initializer,
    new_node,
    replace,
    tensor_of,
)


@dataclasses.dataclass(frozen=True)
class SeparateProjections(Pass):
    """Cut products whose results are split at once, for runtimes that copy to split."""

    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    def run(self, module: Module, context: PassContext) -> bool:
        """Cut what is split along the last axis after a product with a constant, with a bias or without."""
        names, count = Names(module.model), 0
        for split in [node for node in module.graph if is_onnx(node, "Split")]:
            found = _projection(split)
            if found is None:
                continue
            _cut(split, found, names)
            count += 1
        if count:
            self.remark(context, "applied", "", f"{count} products are computed in the parts that they are split into.")
        return bool(count)


@dataclasses.dataclass(frozen=True)
class _Projection:
    """``x W + b``, and where it is cut."""

    product: ir.Node
    add: ir.Node | None
    weight: Array
    bias: Array | None
    sizes: list[int]


def _projection(split: ir.Node) -> _Projection | None:
    sizes = constant_ints(split.inputs[1]) if len(split.inputs) > 1 else None
    value = split.inputs[0]
    if sizes is None or value is None or not _alone(value) or value.shape is None:
        return None
    if integer(split, "axis", 0) not in (-1, len(value.shape) - 1) or any(o.is_graph_output() for o in split.outputs):
        return None
    producer, add, bias = value.producer(), None, None
    if producer is not None and is_onnx(producer, "Add"):
        constants = [constant(v) for v in producer.inputs]
        inner = next((v for v, found in zip(producer.inputs, constants, strict=True) if found is None), None)
        bias = next((found for found in constants if found is not None), None)
        if inner is None or bias is None or bias.shape != (sum(sizes),) or not _alone(inner):
            return None
        producer, add = inner.producer(), producer
    if producer is None or not is_onnx(producer, "MatMul") or producer.inputs[0] is None:
        return None
    tensor = tensor_of(producer.inputs[1])
    if tensor is None or tuple(tensor.shape.numpy())[1:] != (sum(sizes),):
        return None
    return _Projection(producer, add, np.asarray(tensor.numpy()), bias, sizes)


def _alone(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _cut(split: ir.Node, found: _Projection, names: Names) -> None:
    graph = found.product.graph
    assert graph is not None
    stops = np.cumsum(found.sizes)
    constants = [found.product.inputs[1], *([] if found.add is None else found.add.inputs)]
    for part, stop, size in zip(split.outputs, stops, found.sizes, strict=True):
        columns = slice(int(stop) - size, int(stop))
        weight = _constant(graph, f"{found.product.inputs[1].name}_part", found.weight[:, columns], names)  # type: ignore[union-attr]
        result = new_node("MatMul", [found.product.inputs[0], weight], split, names).outputs[0]
        _typed(result, part)
        if found.bias is not None:
            bias = _constant(graph, f"{part.name}_bias", found.bias[columns], names)
            result = new_node("Add", [result, bias], split, names).outputs[0]
            _typed(result, part)
        replace(part, result)
    erase([split, *([] if found.add is None else [found.add]), found.product])
    for value in constants:
        drop_unused(value)


def _constant(graph: ir.Graph, base: str, data: Array, names: Names) -> ir.Value:
    return new_initializer(graph, ir.tensor(np.ascontiguousarray(data)), names.fresh(base))


def _typed(value: ir.Value, like: ir.Value) -> None:
    value.type, value.shape = like.type, None if like.shape is None else like.shape.copy()
