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
import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from mmopt.analysis import dims
from mmopt.analysis.dims import DimTooComplex, Size
from mmopt.analysis.shape_facts import (
    Fact,
    ShapeFacts,
    annotate,
    checked_elements,
    declared_fact,
    filled,
    tensor_elements,
)
from mmopt.analysis.shape_rules import (
    ONNX_DOMAINS,
    SHAPE_RULES,
    VALUE_RULES,
    NodeView,
    Shape,
    constant_tensor,
)
from mmopt.analysis.shape_rules.types import from_ir_shape, infer_by_onnx, output_types

_MALFORMED = (IndexError, ValueError, TypeError, ZeroDivisionError, StopIteration, OverflowError, DimTooComplex)
"""What a rule raises on a node that breaks the standard or outgrows the arithmetic: its outputs are unknown."""

_MAX_LOOP_ROUNDS = 4


def infer_shapes(model: ir.Model) -> ShapeFacts:
    """Infer shapes, element types and small integer contents of every value of ``model``, which is not changed."""
    facts = ShapeFacts()
    for value, shape in input_shapes(model).items():
        facts.set(value, dataclasses.replace(declared_fact(value), shape=shape))
    _Inference(model, facts, {}).graph(model.graph)
    return facts


def input_shapes(model: ir.Model) -> dict[ir.Value, Shape]:
    """Shapes of the inputs of the main graph, every dimension with a name or number.

    Dimension 0 of an input ``x`` that the model leaves unnamed is called ``x_d0`` (``x_d0_1``, … if that is taken).
    """
    declared = {value: from_ir_shape(value.shape) for value in model.graph.inputs}
    taken = {
        name for shape in declared.values() for dim in shape or () if dim is not None for name in dims.symbols(dim)
    }
    return {value: _named(value, shape, taken) for value, shape in declared.items()}


def _named(value: ir.Value, shape: Shape, taken: set[str]) -> Shape:
    if shape is None or None not in shape:
        return shape
    named = list(shape)
    for axis, dim in enumerate(shape):
        if dim is None:
            base = re.sub(r"\W", "_", f"{value.name}_d{axis}")
            base = base if base[0].isalpha() else f"d_{base}"
            numbered = (f"{base}_{i}" for i in itertools.count(1))
            name = next(n for n in itertools.chain([base], numbered) if n not in taken)
            taken.add(name)
            named[axis] = dims.symbol(name)
    return tuple(named)


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
            facts[0] = dataclasses.replace(facts[0], elements=checked_elements(value_rule(view), shapes[0], types[0]))
        return facts

    def _with_annotation(self, fact: Fact, node: ir.Node, value: ir.Value) -> Fact:
        """Fill the gaps of ``fact`` from the value's own annotation, for operators that nothing is known about."""
        kind = fact.type if fact.type is not None else value.type
        shape = fact.shape
        if node.domain not in ONNX_DOMAINS and self._trusting:
            shape = filled(shape, from_ir_shape(value.shape))
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


__all__ = ["Fact", "ShapeFacts", "annotate", "infer_shapes", "input_shapes", "tensor_elements"]
