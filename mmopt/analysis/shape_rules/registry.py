"""What a shape rule sees of a node, and the table of rules.

A rule gets a :class:`NodeView` and returns one shape per output (``None`` where it cannot tell), or ``None`` for
"not by me", and then the rule of the onnx library is asked. A value rule returns the elements of a small integer
output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir

from mmopt.analysis.dims import Dim, Size

Shape = tuple[Size | None, ...] | None
"""Dimensions of a tensor; ``None`` for an unknown dimension, or for an unknown rank."""

Elements = tuple[Size | None, ...] | None
"""Elements of a tensor of rank 0 or 1 that holds sizes (booleans as 0 and 1); ``None`` where unknown."""

ONNX_DOMAINS = ("", "ai.onnx")


class Facts(Protocol):
    """What is known of values so far."""

    def shape(self, value: ir.Value) -> Shape:
        """Inferred shape."""

    def elements(self, value: ir.Value) -> Elements:
        """Inferred elements."""

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Inferred element type."""


class NodeView:
    """A node with the facts about its inputs.

    Attributes:
        node: The node.
        version: Opset version of the node's domain.
    """

    def __init__(self, node: ir.Node, version: int, facts: Facts, attributes: Mapping[str, ir.Attr]) -> None:
        self.node, self.version, self._facts, self._outer = node, version, facts, attributes

    def input(self, index: int) -> ir.Value | None:
        """The value at an input position; ``None`` when it is left out."""
        inputs = self.node.inputs
        return inputs[index] if index < len(inputs) else None

    def has(self, index: int) -> bool:
        """Whether the optional input at ``index`` is given."""
        return self.input(index) is not None

    def shape(self, index: int = 0) -> Shape:
        """Shape of an input."""
        value = self.input(index)
        return None if value is None else self._facts.shape(value)

    def elements(self, index: int = 0) -> Elements:
        """Elements of an input, when it is a small tensor of sizes."""
        value = self.input(index)
        return None if value is None else self._facts.elements(value)

    def integers(self, index: int) -> list[int] | None:
        """Elements of an input when every one is a known number."""
        elements = self.elements(index)
        if elements is None or not all(isinstance(e, int) for e in elements):
            return None
        return [e for e in elements if isinstance(e, int)]

    def array(self, index: int) -> np.ndarray | None:
        """Contents of an input that is a small constant."""
        value = self.input(index)
        tensor = constant_tensor(value) if value is not None else None
        return tensor.numpy() if tensor is not None and tensor.size <= MAX_ELEMENTS else None

    def dtype(self, index: int = 0) -> ir.DataType | None:
        """Element type of an input."""
        value = self.input(index)
        return None if value is None else self._facts.dtype(value)

    def attribute(self, name: str) -> ir.Attr | None:
        """An attribute, with references to the attributes of the enclosing function resolved."""
        attribute = self.node.attributes.get(name)
        if attribute is not None and attribute.is_ref():
            attribute = self._outer.get(attribute.ref_attr_name or "")
        return attribute if attribute is not None and not attribute.is_ref() else None

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        attribute = self.attribute(name)
        return default if attribute is None else attribute.as_int()

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        attribute = self.attribute(name)
        return default if attribute is None else attribute.as_string()

    def ints(self, name: str) -> list[int] | None:
        """A list-of-integers attribute; ``None`` when it is absent."""
        attribute = self.attribute(name)
        return None if attribute is None else list(attribute.as_ints())

    def axes(self, index: int) -> list[int] | None:
        """Axes given by attribute ``axes`` or, in later opsets, by the input at ``index``; ``None`` when unknown."""
        if self.attribute("axes") is not None:
            return self.ints("axes")
        return self.integers(index) if self.has(index) else None


MAX_ELEMENTS = 64
"""Tensors with more elements than this do not hold a shape."""

ShapeRule = Callable[[NodeView], "Sequence[Shape] | None"]
ValueRule = Callable[[NodeView], Elements]

SHAPE_RULES: dict[str, ShapeRule] = {}
VALUE_RULES: dict[str, ValueRule] = {}


def shape_rule(*op_types: str) -> Callable[[ShapeRule], ShapeRule]:
    """Register a rule for operators of the default domain."""

    def register(rule: ShapeRule) -> ShapeRule:
        SHAPE_RULES.update(dict.fromkeys(op_types, rule))
        return rule

    return register


def value_rule(*op_types: str) -> Callable[[ValueRule], ValueRule]:
    """Register a rule for the elements of the first output."""

    def register(rule: ValueRule) -> ValueRule:
        VALUE_RULES.update(dict.fromkeys(op_types, rule))
        return rule

    return register


def constant_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer that cannot be overridden by a caller; ``None`` for any other value."""
    if value.is_initializer() and not value.is_graph_input():
        return value.const_value
    return None


def normalize_axis(axis: int, rank: int) -> int:
    """A non-negative axis; ``IndexError`` when it is out of range."""
    if not -rank <= axis < rank:
        raise IndexError(f"axis {axis} is out of range for rank {rank}")
    return axis % rank if rank else 0


def broadcast(*shapes: Shape) -> Shape:
    """The numpy broadcast of shapes; a dimension is ``None`` when it depends on which of two unknown sizes is 1."""
    if any(shape is None for shape in shapes):
        return None
    known = [shape for shape in shapes if shape is not None]
    rank = max((len(shape) for shape in known), default=0)
    return tuple(_broadcast_dim([s[len(s) - rank + i] for s in known if len(s) - rank + i >= 0]) for i in range(rank))


def _broadcast_dim(dims: list[Size | None]) -> Size | None:
    others = [dim for dim in dims if dim != 1]
    if not others:
        return 1
    fixed = [dim for dim in others if isinstance(dim, int)]
    if fixed:
        return fixed[0]
    return next((dim for dim in others if all(dim == other or _is_clipped(other, dim) for other in others)), None)


def _is_clipped(dim: Size | None, size: Size | None) -> bool:
    """Whether ``dim`` is ``Min(size, n)`` with n > 1, as of a table of n positions cut to ``size`` of them.

    Next to ``size`` itself such a dimension broadcasts only where it equals it: it is 1 only where ``size`` is.
    """
    if not isinstance(dim, Dim) or size is None or len(dim.terms) != 1:
        return False
    ((monomial, factor),) = dim.terms.items()
    if factor != 1 or len(monomial) != 1 or monomial[0].op != "Min":
        return False
    bounds = [arg for arg in monomial[0].args if arg != size]
    return len(bounds) == 1 and isinstance(bounds[0], int) and bounds[0] > 1
