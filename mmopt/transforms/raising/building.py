"""Makes nodes with known shapes: what raising passes put in place of the nodes they recognised."""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.analysis.dims import Size
from mmopt.analysis.shape_rules.types import to_ir_shape
from mmopt.analysis.shapes import Fact
from mmopt.transforms.canonicalize.constant_targets import reshape_target
from mmopt.transforms.canonicalize.editing import Array, constant, is_onnx, new_initializer
from mmopt.transforms.canonicalize.rewriting import Rewriter


class Unbuildable(Exception):
    """A shape cannot be written down; the text says which."""


class Builder:
    """Puts nodes before one node of a graph; used in a ``with`` block, what it made is gone after :class:`Unbuildable`.

    Args:
        rewriter: What is at work.
        before: The node whose place they take.
        witnesses: Values that may be asked for a size at run time; they must stand before ``before``.
    """

    def __init__(self, rewriter: Rewriter, before: ir.Node, witnesses: Iterable[ir.Value] = ()) -> None:
        self.rewriter, self.before, self.witnesses = rewriter, before, list(witnesses)
        self._nodes: list[ir.Node] = []
        self._constants: list[ir.Value] = []

    def __enter__(self) -> Builder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if not isinstance(error, Unbuildable):
            return
        for node in reversed(self._nodes):
            self.rewriter.drop(node)
        for value in self._constants:
            if self.before.graph is not None and value.name is not None:
                self.before.graph.initializers.pop(value.name)

    def shape(self, value: ir.Value) -> tuple[Size, ...]:
        """Shape of ``value``.

        Raises:
            Unbuildable: It is not known.
        """
        shape = self.rewriter.shape(value)
        known = [] if shape is None else [size for size in shape if size is not None]
        if shape is None or len(known) != len(shape):
            raise Unbuildable(f"the shape of {value.name} is unknown")
        return tuple(known)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[Size | None],
        dtype: ir.DataType | None,
        **attributes: Any,
    ) -> ir.Value:
        """The output of a new node of the default domain."""
        attrs = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]
        self._nodes.append(self.rewriter.emit(op_type, inputs, self.before, attributes=attrs))
        output = self._nodes[-1].outputs[0]
        output.type = None if dtype is None else ir.TensorType(dtype)
        output.shape = to_ir_shape(tuple(shape))
        kind = None if dtype is None else ir.TensorType(dtype)
        self.rewriter.facts.set(output, Fact(tuple(shape), None, kind))
        return output

    def adopt(self, node: ir.Node) -> None:
        """Count a node that somebody else put before the same place among those that go after :class:`Unbuildable`."""
        self._nodes.append(node)

    def constant(self, array: Array, name: str) -> ir.Value:
        """A new initializer."""
        graph = self.before.graph
        if graph is None:
            raise ValueError(f"node {self.before.name!r} is in no graph")
        base = f"{self.before.outputs[0].name}_{name}"
        self._constants.append(new_initializer(graph, ir.tensor(array), self.rewriter.names.fresh(base)))
        return self._constants[-1]

    def ints(self, numbers: Sequence[int], name: str = "shape") -> ir.Value:
        """A vector of integers."""
        return self.constant(np.array(numbers, dtype=np.int64), name)

    def reshape(self, value: ir.Value, sizes: Sequence[Size]) -> ir.Value:
        """``value`` in another shape; itself when it has that shape."""
        before = self.shape(value)
        if before == tuple(sizes):
            return value
        target = reshape_target(before, sizes)
        wanted = self.sizes(sizes) if target is None else self.ints(target)
        return self.node("Reshape", [value, wanted], sizes, self.rewriter.dtype(value))

    def transpose(self, value: ir.Value, perm: Sequence[int]) -> ir.Value:
        """``value`` with its axes in another order; itself when that is the same."""
        if list(perm) == sorted(perm):
            return value
        before = self.shape(value)
        shape = [before[axis] for axis in perm]
        return self.node("Transpose", [value], shape, self.rewriter.dtype(value), perm=list(perm))

    def expand(self, value: ir.Value, sizes: Sequence[Size]) -> ir.Value:
        """``value`` broadcast to ``sizes``; itself when it has that shape."""
        before = self.rewriter.shape(value)
        if before == tuple(sizes):
            return value
        padded = [1] * (len(sizes) - len(before or ())) + list(before or ())
        target = [1 if old == new else new for old, new in zip(padded, sizes, strict=True)]
        numbers = [size for size in target if isinstance(size, int)]
        wanted = self.ints(numbers) if len(numbers) == len(target) else self.sizes(target)
        return self.node("Expand", [value, wanted], sizes, self.rewriter.dtype(value))

    def sizes(self, sizes: Sequence[Size]) -> ir.Value:
        """A vector of sizes, those with names read from the shape of a witness.

        Raises:
            Unbuildable: No witness has such an axis.
        """
        parts: list[ir.Value] = []
        for size in sizes:
            parts.append(self.ints([size], "size") if isinstance(size, int) else self._measured(size))
        return self.node("Concat", parts, (len(sizes),), ir.DataType.INT64, axis=0)

    def _measured(self, size: Size) -> ir.Value:
        for witness in self.witnesses:
            shape = self.rewriter.shape(witness) or ()
            for axis, found in enumerate(shape):
                if found == size:
                    return self.node("Shape", [witness], (1,), ir.DataType.INT64, start=axis, end=axis + 1)
        raise Unbuildable(f"no tensor at hand has an axis of size {size}")


def uniform(value: ir.Value | None) -> float | None:
    """The number that every element of ``value`` is, when it is a constant, expanded or not."""
    for _ in range(8):
        if value is None:
            return None
        array = constant(value)
        if array is not None:
            return _single(array)
        node = value.producer()
        if node is None:
            return None
        if is_onnx(node, "ConstantOfShape"):
            fill = node.attributes.get("value")
            return 0.0 if fill is None else None if fill.is_ref() else _single(fill.as_tensor().numpy())
        if not is_onnx(node, "Expand", "Identity", "Reshape", "Unsqueeze", "Squeeze"):
            return None
        value = node.inputs[0]
    return None


def _single(array: Array) -> float | None:
    if array.size == 0 or array.dtype.kind not in "fiub":
        return None
    first = array.reshape(-1)[0]
    return float(first) if bool((array == first).all()) else None


def sole_user(value: ir.Value) -> ir.Node | None:
    """The only node that reads ``value``, where nothing else needs it."""
    users = {user for user, _ in value.uses()}
    return users.pop() if len(users) == 1 and not value.is_graph_output() else None
