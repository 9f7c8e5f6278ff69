"""What shape inference knows of values, what values say of themselves, and writing the one onto the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from mmopt.analysis.dims import Size
from mmopt.analysis.shape_rules import MAX_ELEMENTS, Elements, Shape, constant_tensor
from mmopt.analysis.shape_rules.types import from_ir_shape, to_ir_shape

_LIMITS = {
    ir.DataType.INT64: 1 << 63,
    ir.DataType.INT32: 1 << 31,
    ir.DataType.BOOL: 2,
    ir.DataType.FLOAT: 1 << 24,
    ir.DataType.DOUBLE: 1 << 53,
}
"""Element types whose whole numbers are followed, and the size from which they would wrap or round."""


@dataclasses.dataclass(frozen=True)
class Fact:
    """What is known of one value.

    Attributes:
        shape: Dimensions; ``None`` for an unknown dimension or rank.
        elements: Elements of a small integer, bool or whole-number float tensor of rank 0 or 1.
        type: Tensor, sequence or optional type.
    """

    shape: Shape = None
    elements: Elements = None
    type: ir.TypeProtocol | None = None


class ShapeFacts:
    """Inferred facts of every value of a model. Build with :func:`infer_shapes`.

    Attributes:
        varying: Values inside loops that change their shape from trip to trip, so that an annotation, which describes
            one trip at best, says nothing.
    """

    def __init__(self) -> None:
        self._facts: dict[ir.Value, Fact] = {}
        self.varying: set[ir.Value] = set()

    def fact(self, value: ir.Value) -> Fact:
        """Everything known of ``value``."""
        fact = self._facts.get(value)
        if fact is None:
            fact = self._facts[value] = declared_fact(value)
        return fact

    def set(self, value: ir.Value, fact: Fact) -> None:
        """Record what is known of ``value``."""
        self._facts[value] = fact

    def shape(self, value: ir.Value) -> Shape:
        """Inferred shape."""
        return self.fact(value).shape

    def elements(self, value: ir.Value) -> Elements:
        """Inferred elements of a tensor of sizes."""
        return self.fact(value).elements

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Inferred element type of a tensor."""
        kind = self.fact(value).type
        return kind.dtype if isinstance(kind, ir.TensorType) else None

    def type(self, value: ir.Value) -> ir.TypeProtocol | None:
        """Inferred type."""
        return self.fact(value).type


def annotate(
    model: ir.Model, facts: ShapeFacts, on_conflict: Callable[[ir.Value, ir.Shape], None] | None = None
) -> bool:
    """Write ``facts`` onto the values inside ``model``. Inputs and outputs of the main graph are its contract and stay.

    Args:
        model: The model the facts are about.
        facts: Result of :func:`infer_shapes`.
        on_conflict: Called with a value and its inferred shape before an annotation that contradicts it is replaced.

    Returns:
        Whether any annotation changed.
    """
    changed = False
    kept = {*model.graph.inputs, *model.graph.outputs}
    for graph in model.graphs():
        values = [*graph.inputs, *graph.initializers.values(), *(o for node in graph for o in node.outputs if o.name)]
        for value in values:
            if value not in kept:
                changed |= _annotate_value(value, facts.fact(value), value in facts.varying, on_conflict)
    return changed


def _annotate_value(
    value: ir.Value, fact: Fact, varies: bool, on_conflict: Callable[[ir.Value, ir.Shape], None] | None
) -> bool:
    changed = False
    if fact.type is not None and value.type != fact.type:
        value.type, changed = own_type(fact.type), True
    dims = fact.shape if varies else filled(fact.shape, from_ir_shape(value.shape))
    shape = None if dims is None else to_ir_shape(dims)
    if shape is not None and value.shape != shape:
        if on_conflict is not None and _contradicts(value.shape, shape):
            on_conflict(value, shape)
        value.shape, changed = shape, True
    return changed


def own_type(kind: ir.TypeProtocol) -> ir.TypeProtocol:
    """A type for one value alone: setting ``value.dtype`` writes into the type object."""
    return ir.TensorType(kind.dtype, denotation=kind.denotation) if isinstance(kind, ir.TensorType) else kind


def filled(shape: Shape, annotation: Shape) -> Shape:
    """``shape`` with its gaps filled from an annotation of the same rank."""
    if shape is None or annotation is None or len(shape) != len(annotation):
        return annotation if shape is None else shape
    return tuple(b if a is None else a for a, b in zip(shape, annotation, strict=True))


def _contradicts(annotation: ir.Shape | None, inferred: ir.Shape) -> bool:
    """Whether an annotation says something false: another rank, another number, or a number for what varies."""
    if annotation is None:
        return False
    if len(annotation) != len(inferred):
        return True
    return any(isinstance(a, int) and a != b for a, b in zip(annotation, inferred, strict=True))


def declared_fact(value: ir.Value) -> Fact:
    """What a value says of itself: the contents of an initializer, else its annotation."""
    tensor = constant_tensor(value)
    if tensor is None:
        return Fact(from_ir_shape(value.shape), None, value.type)
    shape = tuple(int(dim) for dim in tensor.shape.numpy())
    return Fact(shape, tensor_elements(tensor), value.type or ir.TensorType(tensor.dtype))


def tensor_elements(tensor: ir.TensorProtocol) -> Elements:
    """The elements of a small tensor of rank 0 or 1 when all are whole numbers."""
    if len(tensor.shape) > 1 or tensor.size > MAX_ELEMENTS or tensor.dtype not in _LIMITS:
        return None
    array = np.asarray(tensor.numpy()).reshape(-1)
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.floor(array)).all()):
        return None
    return tuple(int(element) for element in array.tolist())


def checked_elements(elements: Elements, shape: tuple[Size | None, ...], kind: ir.TypeProtocol | None) -> Elements:
    """``elements`` when they fit the shape and the type; a number the type cannot hold exactly becomes unknown."""
    limit = _LIMITS.get(kind.dtype, 0) if isinstance(kind, ir.TensorType) else 0
    if elements is None or not limit or (shape and shape[0] != len(elements)) or len(elements) > MAX_ELEMENTS:
        return None
    if not shape and len(elements) != 1:
        return None
    return tuple(None if isinstance(e, int) and not -limit <= e < limit else e for e in elements)
