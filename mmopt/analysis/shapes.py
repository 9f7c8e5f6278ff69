"""Shape inference with symbolic dimensions.

Shapes *and the elements of small integer tensors* are followed through the graph, so that the shape arithmetic of a
dynamic export (``Shape → Gather → Mul → Concat → Reshape``) ends in dimensions like ``2*seq``:

    x[batch, seq, 768] → Reshape(Concat(Shape(x)[:2], 12, 64)) → [batch, seq, 12, 64]

Facts follow from the graph inputs and the operators alone, since passes change graphs on their strength. Annotations
in the file are believed for operators of unknown domains only; elsewhere they fill gaps when facts are written back,
and give way where they contradict them. Bodies of If, Loop and Scan and calls of local functions are followed.
Cost: one visit a node, no weights are read or serialized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from mmopt.analysis import dims
from mmopt.analysis.dims import DimTooComplex, Size
from mmopt.analysis.shape_rules import (
    MAX_ELEMENTS,
    ONNX_DOMAINS,
    SHAPE_RULES,
    VALUE_RULES,
    Elements,
    NodeView,
    Shape,
    constant_tensor,
)
from mmopt.analysis.shape_rules.types import Typed, from_ir_shape, infer_by_onnx, output_types, to_ir_shape

_MALFORMED = (IndexError, ValueError, TypeError, ZeroDivisionError, StopIteration, OverflowError, DimTooComplex)
"""What a rule raises on a node that breaks the standard or outgrows the arithmetic: its outputs are unknown."""

_MAX_LOOP_ROUNDS = 4
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


def infer_shapes(model: ir.Model) -> ShapeFacts:
    """Infer shapes, element types and small integer contents of every value of ``model``, which is not changed."""
    inference = _Inference(model, ShapeFacts(), {})
    inference.graph(model.graph)
    return inference.facts


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
        value.type, changed = fact.type, True
    dims = fact.shape if varies else _filled(fact.shape, from_ir_shape(value.shape))
    shape = None if dims is None else to_ir_shape(dims)
    if shape is not None and value.shape != shape:
        if on_conflict is not None and _contradicts(value.shape, shape):
            on_conflict(value, shape)
        value.shape, changed = shape, True
    return changed


def _filled(shape: Shape, annotation: Shape) -> Shape:
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


class _Inference:
    """One walk over a graph in order; function calls get a walk of their own."""

    def __init__(self, model: ir.Model, facts: ShapeFacts, attributes: Mapping[str, ir.Attr], depth: int = 0) -> None:
        self.facts = facts
        self._model, self._attributes, self._depth = model, attributes, depth
        self._opsets: Mapping[str, int] = model.opset_imports
        self._trusting = True

    def graph(self, graph: ir.Graph | ir.Function) -> None:
        """Infer every node of ``graph``."""
        for node in graph:
            self._node(node)

    def _node(self, node: ir.Node) -> None:
        version = node.version or self._opsets.get(node.domain, 1)
        view = NodeView(node, version, self.facts, self._attributes)
        try:
            facts = self._infer(view)
        except _MALFORMED:
            facts = []
        facts += [Fact()] * (len(node.outputs) - len(facts))
        for value, fact in zip(node.outputs, facts, strict=False):
            self.facts.set(value, self._with_annotation(fact, node, value))

    def _infer(self, view: NodeView) -> list[Fact]:
        node = view.node
        if node.domain in ONNX_DOMAINS and node.op_type in _CONTROL_FLOW:
            return _CONTROL_FLOW[node.op_type](self, view)
        if node.op_identifier() in self._model.functions:
            return self._call(view)
        for body in _bodies(view):
            self.graph(body)
        if node.domain in ONNX_DOMAINS and node.op_type == "Constant":
            return [_constant(view)]
        return self._by_rules(view)

    def _by_rules(self, view: NodeView) -> list[Fact]:
        node = view.node
        own = node.domain in ONNX_DOMAINS
        input_types = [None if value is None else self.facts.type(value) for value in node.inputs]
        types = output_types(view, input_types)
        rule = SHAPE_RULES.get(node.op_type) if own else None
        shapes = list(rule(view) or ()) if rule is not None else []
        shapes += [None] * (len(node.outputs) - len(shapes))
        if None in types or all(shape is None for shape in shapes):
            for i, (shape, kind) in enumerate(infer_by_onnx(view, input_types) or ()):
                shapes[i] = shape if shapes[i] is None else shapes[i]
                types[i] = kind if types[i] is None else types[i]
        value_rule = VALUE_RULES.get(node.op_type) if own else None
        facts = [Fact(shape, None, kind) for shape, kind in zip(shapes, types, strict=False)]
        if value_rule is not None and facts and shapes[0] is not None and len(shapes[0]) <= 1:
            facts[0] = dataclasses.replace(facts[0], elements=_checked(value_rule(view), shapes[0], types[0]))
        return facts

    def _with_annotation(self, fact: Fact, node: ir.Node, value: ir.Value) -> Fact:
        """Fill the gaps of ``fact`` from the value's own annotation, for operators that nothing is known about."""
        kind = fact.type if fact.type is not None else value.type
        shape = fact.shape
        if node.domain not in ONNX_DOMAINS and self._trusting:
            shape = _filled(shape, from_ir_shape(value.shape))
        if not self._trusting:
            self.facts.varying.add(value)
        return Fact(shape, fact.elements, kind) if shape is not fact.shape or kind is not fact.type else fact

    def _call(self, view: NodeView) -> list[Fact]:
        """A call of a local function: its body with the facts of the arguments."""
        function = self._model.functions[view.node.op_identifier()]
        if self._depth > 32:
            return []
        given = {name: a for name in view.node.attributes if (a := view.attribute(name)) is not None}
        defaults = {name: a for name, a in function.attributes.items() if not a.is_ref() and a.value is not None}
        inner = _Inference(self._model, ShapeFacts(), {**defaults, **given}, self._depth + 1)
        inner._opsets = {**self._model.opset_imports, **function.opset_imports}
        for i, value in enumerate(function.inputs):
            argument = view.input(i)
            inner.facts.set(value, Fact() if argument is None else self.facts.fact(argument))
        inner.graph(function)
        return [inner.facts.fact(value) for value in function.outputs]

    def branch(self, view: NodeView) -> list[Fact]:
        """If: what both branches agree on; the branch itself when the condition is known."""
        branches = [view.attribute("then_branch"), view.attribute("else_branch")]
        results = []
        for attribute in branches:
            body = attribute.as_graph() if attribute is not None else None
            if body is not None:
                self.graph(body)
                results.append([self.facts.fact(value) for value in body.outputs])
        condition = view.elements(0)
        if condition is not None and isinstance(condition[0], int) and len(results) == 2:
            return results[0 if condition[0] else 1]
        return [_common(a, b) for a, b in zip(*results, strict=False)]

    def loop(self, view: NodeView) -> list[Fact]:
        """Loop: carried shapes are widened until the body keeps them; scan outputs get the trip count in front."""
        attribute = view.attribute("body")
        if attribute is None:
            return []
        body = attribute.as_graph()
        self.facts.set(body.inputs[0], Fact((), None, ir.TensorType(ir.DataType.INT64)))
        condition = view.input(1)
        condition_shape = self.facts.shape(condition) if condition is not None else ()
        self.facts.set(body.inputs[1], Fact(condition_shape, None, ir.TensorType(ir.DataType.BOOL)))
        initial = [self._argument(view, i) for i in range(2, len(view.node.inputs))]
        carried = self._fixed_point(body, body.inputs[2:], initial, body.outputs[1 : 1 + len(initial)])
        trips = view.elements(0) if _runs_to_the_end(view, body) else None
        scanned = [self.facts.fact(value) for value in body.outputs[1 + len(initial) :]]
        return carried + [_stacked(fact, 0, trips[0] if trips else None) for fact in scanned]

    def scan(self, view: NodeView) -> list[Fact]:
        """Scan: slices of the scanned inputs go in, slices of the scanned outputs are stacked."""
        attribute, count = view.attribute("body"), view.integer("num_scan_inputs", 0)
        if attribute is None or view.version < 9:
            return []
        body, states = attribute.as_graph(), len(view.node.inputs) - count
        axes = view.ints("scan_input_axes") or [0] * count
        length: Size | None = None
        for i in range(count):
            fact = self._argument(view, states + i)
            if fact.shape is not None:
                axis = axes[i] % len(fact.shape)
                length = fact.shape[axis] if length is None else length
                fact = Fact((*fact.shape[:axis], *fact.shape[axis + 1 :]), None, fact.type)
            self.facts.set(body.inputs[states + i], fact)
        initial = [self._argument(view, i) for i in range(states)]
        carried = self._fixed_point(body, body.inputs[:states], initial, body.outputs[:states])
        out_axes = view.ints("scan_output_axes") or [0] * (len(body.outputs) - states)
        scanned = [self.facts.fact(value) for value in body.outputs[states:]]
        return carried + [_stacked(fact, axis, length) for fact, axis in zip(scanned, out_axes, strict=False)]

    def _argument(self, view: NodeView, index: int) -> Fact:
        value = view.input(index)
        return Fact() if value is None else dataclasses.replace(self.facts.fact(value), elements=None)

    def _fixed_point(
        self, body: ir.Graph, inputs: Sequence[ir.Value], initial: list[Fact], outputs: Sequence[ir.Value]
    ) -> list[Fact]:
        """Facts of loop-carried values that hold before and after every trip.

        Annotations inside a body whose carried shapes vary are not believed.
        """
        carried, trusting = initial, self._trusting
        for round_ in range(_MAX_LOOP_ROUNDS + 1):
            for value, fact in zip(inputs, carried, strict=False):
                self.facts.set(value, fact)
            self.graph(body)
            after = [_common(fact, self.facts.fact(value)) for fact, value in zip(carried, outputs, strict=False)]
            if [fact.shape for fact in after] == [fact.shape for fact in carried]:
                break
            self._trusting = False
            carried = after if round_ < _MAX_LOOP_ROUNDS - 1 else [Fact(None, None, fact.type) for fact in after]
        self._trusting = trusting
        return carried


_CONTROL_FLOW = {"If": _Inference.branch, "Loop": _Inference.loop, "Scan": _Inference.scan}


def _bodies(view: NodeView) -> list[ir.Graph]:
    graphs: list[ir.Graph] = []
    for attribute in view.node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            graphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            graphs.extend(attribute.as_graphs())
    return graphs


def _constant(view: NodeView) -> Fact:
    tensor = ir.convenience.get_const_tensor(view.node.outputs[0]) if not _has_references(view.node) else None
    if tensor is None:
        return Fact()
    return Fact(tuple(int(d) for d in tensor.shape.numpy()), tensor_elements(tensor), ir.TensorType(tensor.dtype))


def _has_references(node: ir.Node) -> bool:
    return any(attribute.is_ref() for attribute in node.attributes.values())


def _checked(elements: Elements, shape: tuple[Size | None, ...], kind: ir.TypeProtocol | None) -> Elements:
    """``elements`` when they fit the shape and the type; a number the type cannot hold exactly becomes unknown."""
    limit = _LIMITS.get(kind.dtype, 0) if isinstance(kind, ir.TensorType) else 0
    if elements is None or not limit or (shape and shape[0] != len(elements)) or len(elements) > MAX_ELEMENTS:
        return None
    if not shape and len(elements) != 1:
        return None
    return tuple(None if isinstance(e, int) and not -limit <= e < limit else e for e in elements)


def _common(a: Fact, b: Fact) -> Fact:
    """What holds for a value that is either ``a`` or ``b``."""
    kind = a.type if a.type is not None else b.type
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return Fact(None, None, kind)
    return Fact(tuple(x if x == y else None for x, y in zip(a.shape, b.shape, strict=False)), None, kind)


def _stacked(fact: Fact, axis: int, length: Size | None) -> Fact:
    if fact.shape is None:
        return Fact(None, None, fact.type)
    at = axis % (len(fact.shape) + 1)
    return Fact((*fact.shape[:at], length, *fact.shape[at:]), None, fact.type)


def _runs_to_the_end(view: NodeView, body: ir.Graph) -> bool:
    """Whether a loop makes all its trips: it starts, and its condition is handed on unchanged."""
    if view.has(1) and view.integers(1) != [1]:
        return False
    condition = body.outputs[0]
    producer = condition.producer()
    while producer is not None and producer.op_type == "Identity" and producer.inputs[0] is not None:
        condition = producer.inputs[0]
        producer = condition.producer()
    tensor = constant_tensor(condition)
    return condition is body.inputs[1] or (tensor is not None and bool(np.all(tensor.numpy())))


def sizes_equal(a: ir.Shape | None, b: ir.Shape | None) -> bool:
    """Whether two annotations certainly describe the same shape; unknown dimensions equal nothing."""
    if a is None or b is None or len(a) != len(b) or a.has_unknown_dim() or b.has_unknown_dim():
        return False
    return all(x == y for x, y in zip(a, b, strict=False)) or from_ir_shape(a) == from_ir_shape(b)


__all__ = ["Fact", "ShapeFacts", "Typed", "annotate", "dims", "infer_shapes", "sizes_equal", "tensor_elements"]
