"""The time of a model as a function of how many units of each group are kept, by what the target's kernels take.

A table is filled as it is asked: each product, recurrence and attention alone, at the sizes that a choice leaves it, is
handed to the target's own cost model. So sizes that leave vectors half empty, or lose a fast algorithm, cost what they
cost. What lies between (activations, norms) is mostly computed along with them, and counts by its elements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from mmopt.analysis import dims
from mmopt.analysis.axes import Group
from mmopt.ir.module import Module
from mmopt.transforms.canonicalize.editing import is_onnx, tensor_of
from mmopt.transforms.prune.costs import Axis, CostModel, Layout, Product, Sizes, Term

Predict = Callable[[Module], float]
"""Cycles of one core that the target's kernels are predicted to take for one run of a module."""

TIMED = ("MatMul", "Gemm", "Conv", "ConvTranspose", "LSTM", "GRU", "RNN", "Attention")
"""Operators that are timed by themselves."""

COUNTED = {"group", "hidden_size", "num_heads", "q_num_heads", "kv_num_heads"}
"""Attributes that are numbers of units."""

CYCLES_PER_ELEMENT = 0.25
"""Of everything else that makes a tensor of floats: it is bound by memory, and mostly fused."""


@dataclasses.dataclass(frozen=True)
class _Operand:
    """An input of an operator: its shape, how its axes are cut, and its contents where they are not weights."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    axes: tuple[Axis | None, ...]
    constant: bool

    def size(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(
            size if axis is None else max(1, round(size * axis.share(sizes)))
            for size, axis in zip(self.shape, self.axes, strict=True)
        )


class _Table:
    """Times by operator and sizes, asked for once."""

    def __init__(self, predict: Predict, opset: Mapping[str, int]) -> None:
        self._predict, self._opset = predict, dict(opset)
        self._known: dict[object, float] = {}

    def time(
        self,
        node: ir.Node,
        operands: Sequence[_Operand | None],
        shapes: Sequence[tuple[int, ...]],
        counts: Mapping[str, int],
    ) -> float:
        attributes = {**node.attributes, **{name: ir.AttrInt64(name, count) for name, count in counts.items()}}
        key = (node.op_type, tuple(shapes), tuple((name, str(value.value)) for name, value in attributes.items()))
        if key not in self._known:
            self._known[key] = self._predict(self._module(node, operands, shapes, attributes))
        return self._known[key]

    def _module(
        self,
        node: ir.Node,
        operands: Sequence[_Operand | None],
        shapes: Sequence[tuple[int, ...]],
        attributes: Mapping[str, ir.Attr],
    ) -> Module:
        values: list[ir.Value | None] = []
        inputs, constants = [], []
        for place, (operand, shape) in enumerate(zip(operands, shapes, strict=True)):
            if operand is None:
                values.append(None)
                continue
            value = ir.Value(name=f"x{place}", shape=ir.Shape(shape), type=ir.TensorType(operand.dtype))
            if operand.constant:
                value.const_value = ir.tensor(np.zeros(shape, operand.dtype.numpy()), name=f"x{place}")
                constants.append(value)
            else:
                inputs.append(value)
            values.append(value)
        outputs = [
            ir.Value(name=f"y{place}" if output.name else "", type=output.type)
            for place, output in enumerate(node.outputs)
        ]
        alone = ir.Node("", node.op_type, values, list(attributes.values()), outputs=outputs, name="alone")
        first = [output for output in outputs if output.name][:1]
        graph = ir.Graph(inputs, first, nodes=[alone], initializers=constants, opset_imports=self._opset, name="alone")
        return Module(ir.Model(graph, ir_version=10))


@dataclasses.dataclass(frozen=True)
class _NodeTime:
    """The time of one operator."""

    node: ir.Node
    operands: tuple[_Operand | None, ...]
    counts: Mapping[str, tuple[int, tuple[tuple[str, int], ...]]]
    tower: str | None
    table: _Table

    @property
    def groups(self) -> frozenset[str]:
        axes = [axis for operand in self.operands if operand is not None for axis in operand.axes if axis is not None]
        named = {name for axis in axes for _, groups in axis.parts for name, _ in groups}
        return frozenset(named | {name for _, groups in self.counts.values() for name, _ in groups})

    def value(self, sizes: Sizes) -> float:
        shapes = [() if operand is None else operand.size(sizes) for operand in self.operands]
        counts = {}
        for attribute, (count, groups) in self.counts.items():
            share = float(np.prod([sizes[name] / units for name, units in groups]))
            counts[attribute] = max(1, round(count * share))
        return self.table.time(self.node, self.operands, shapes, counts)


def latency(
    module: Module,
    groups: Sequence[Group],
    owner: Mapping[str, str],
    predict: Predict,
    binding: Mapping[str, int] | None = None,
) -> CostModel:
    """The predicted time of one run, in cycles of one core.

    Args:
        module: The module.
        groups: Groups that can be cut.
        owner: Towers by name of the node.
        predict: The target's cost model.
        binding: Numbers for symbolic dimensions; what is not in it counts as 1.
    """
    layout = Layout(module, groups)
    table = _Table(predict, {"": module.opset})
    terms: list[Term] = []
    for node in module.graph:
        tower = owner.get(str(node.name))
        operands = [_operand(value, layout, binding or {}) for value in node.inputs]
        missing = any(
            value is not None and operand is None for value, operand in zip(node.inputs, operands, strict=True)
        )
        if is_onnx(node, *TIMED) and not missing:
            terms.append(_NodeTime(node, tuple(operands), _counts(node, groups), tower, table))
        elif node.outputs and (result := _operand(node.outputs[0], layout, binding or {})) is not None:
            elements = float(np.prod(result.shape)) if result.dtype.is_floating_point() else 0.0
            terms.append(Product(elements * CYCLES_PER_ELEMENT, tuple(a for a in result.axes if a is not None), tower))
    return CostModel(terms, {group.name: group.units for group in groups})


def _operand(value: ir.Value | None, layout: Layout, binding: Mapping[str, int]) -> _Operand | None:
    if value is None:
        return None
    tensor = tensor_of(value)
    if tensor is not None:
        shape, dtype = tuple(tensor.shape.numpy()), tensor.dtype
    else:
        known, kind = layout.facts.shape(value), value.type if value.type is not None else layout.facts.type(value)
        if known is None or not isinstance(kind, ir.TensorType):
            return None
        if any(size is None for size in known):
            return None
        shape = tuple(
            int(dims.evaluate(size, {**dict.fromkeys(dims.symbols(size), 1), **binding}))
            for size in known
            if size is not None
        )
        dtype = kind.dtype
    axes = tuple(layout.axis(str(value.name), axis, size) for axis, size in enumerate(shape))
    return _Operand(str(value.name), dtype, shape, axes, tensor is not None)


def _counts(node: ir.Node, groups: Sequence[Group]) -> dict[str, tuple[int, tuple[tuple[str, int], ...]]]:
    """Attributes that count units, with the groups whose units they count."""
    found: dict[str, list[tuple[str, int]]] = {}
    for group in groups:
        for count in group.counts:
            is_here = any(count.output == output.name for output in node.outputs)
            if is_here and count.attribute in COUNTED & set(node.attributes):
                found.setdefault(count.attribute, []).append((group.name, group.units))
    return {name: (node.attributes[name].as_int(), tuple(members)) for name, members in found.items()}
