"""A flat view of a model's dataflow: subgraph bodies and local functions spread out into one list of nodes.

Analyses that follow values from inputs to outputs do not want to know about scopes. Here a value is a number, a node is
a tuple of numbers, and control flow is made of the pseudo-operators of :data:`FLOW`:

========= =====================================================================================================
Branch    output of an If: ``(condition, value of each branch…)``
Merge     a loop-carried value inside a body: ``(initial value, value of the next round)``; the second is a back edge
Element   one slice of a scanned tensor, inside the body: ``(tensor,)``
Collect   an output of Loop, Scan or another operator with a body: ``(condition…, value inside the body)``
========= =====================================================================================================

Except for the back edge of Merge, every value is produced before it is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from mmopt.analysis.shape_rules import Shape
from mmopt.analysis.shape_rules.types import from_ir_shape
from mmopt.analysis.shapes import infer_shapes
from mmopt.ir.module import Module

FLOW = "mmopt.flow"
"""Domain of the pseudo-operators."""

FLOW_OPERATORS = frozenset({"Branch", "Merge", "Element", "Collect"})

ABSENT = -1
"""Stands for an optional input that is not given."""

_ORIGIN = "mmopt.origin"

Scope = tuple[tuple[ir.Node, int], ...]
"""The bodies something lies in, outermost first: (node with the body, number of the body)."""


@dataclasses.dataclass(frozen=True)
class FlatNode:
    """One operation.

    Attributes:
        index: Position in :attr:`FlatGraph.nodes`.
        op: Operator type; the domain is prefixed unless it is the default one or :data:`FLOW`.
        inputs: Value numbers, :data:`ABSENT` where left out.
        outputs: Value numbers.
        node: The ONNX node it stands for; for pseudo-operators the one with the body.
        origin: Position of the node of the main graph that contains it.
        name: Name for people: the node's, or its operator and position, after the names of what it is nested in.
        scope: The bodies it lies in.
    """

    index: int
    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    node: ir.Node
    origin: int
    name: str
    scope: Scope = ()


class FlatGraph:
    """The flat view of a model without local functions.

    Attributes:
        values: The ONNX value of each value number.
        nodes: All operations in order of execution.
        producer: Index of the node that makes each value, or -1 for inputs and initializers.
        consumers: Indices of the nodes that use each value.
        inputs: Value numbers of the graph's inputs, without those that are initializers.
        outputs: Value numbers of the graph's outputs.
        facts: Inferred shapes and types.

    Args:
        model: A model free of calls of local functions.
        originals: The nodes of the main graph before calls were inlined.
    """

    def __init__(self, model: ir.Model, originals: Sequence[ir.Node]) -> None:
        graph = model.graph
        self.values: list[ir.Value] = []
        self.nodes: list[FlatNode] = []
        self.producer: list[int] = []
        self.consumers: list[list[int]] = []
        self.facts = infer_shapes(model)
        self._numbers: dict[ir.Value, int] = {}
        self._originals = originals
        names = [node.name or f"{node.op_type}#{position}" for position, node in enumerate(originals)]
        # Old models list their initializers among the inputs, as defaults that a caller may override.
        self.inputs = [self.number(v) for v in graph.inputs if not v.is_initializer()]
        for position, node in enumerate(graph):
            origin = int(node.metadata_props.get(_ORIGIN, position))
            self._add(node, origin, (), names[origin])
        self.outputs = [self.number(v) for v in graph.outputs]
        self._link()

    def number(self, value: ir.Value) -> int:
        """The number of a value, new or known."""
        found = self._numbers.get(value)
        if found is None:
            found = self._numbers[value] = len(self.values)
            self.values.append(value)
        return found

    def constant(self, value: int) -> ir.TensorProtocol | None:
        """The tensor of an initializer or of a Constant node's output."""
        return ir.convenience.get_const_tensor(self.values[value]) if value != ABSENT else None

    def made_by(self, value: int) -> FlatNode | None:
        """The node that produces a value."""
        if value == ABSENT or self.producer[value] < 0:
            return None
        return self.nodes[self.producer[value]]

    def users(self, value: int) -> Iterable[FlatNode]:
        """The nodes that use a value, each once."""
        return (self.nodes[i] for i in dict.fromkeys(self.consumers[value]))

    def back_through(self, value: int, operators: Collection[str]) -> int:
        """Walk from a value to where it comes from, along the first inputs of nodes of the given operators."""
        while (node := self.made_by(value)) is not None and node.op in operators and node.inputs:
            value = node.inputs[0]
        return value

    def dims(self, value: int) -> Shape:
        """Dimensions, an ``int``, a symbolic size or ``None`` each; ``None`` when even the rank is unknown.

        Gaps in what was inferred are filled from the annotation: good enough to describe a model, not to rewrite it.
        """
        inferred, declared = self.facts.shape(self.values[value]), from_ir_shape(self.values[value].shape)
        if inferred is None or declared is None or len(inferred) != len(declared):
            return declared if inferred is None else inferred
        return tuple(theirs if mine is None else mine for mine, theirs in zip(inferred, declared, strict=True))

    def rank(self, value: int) -> int | None:
        """Rank, where it is known."""
        dims = self.dims(value)
        return None if dims is None else len(dims)

    def dtype(self, value: int) -> ir.DataType | None:
        """Element type, where it is known."""
        return self.facts.dtype(self.values[value])

    def name(self, value: int) -> str:
        """The value's name, for people."""
        return self.values[value].name or ""

    def place(self, value: int) -> tuple[int, int] | None:
        """Where a value is found in the original main graph: (position of the node, or -1 for inputs; position).

        ``None`` for values inside bodies and calls.
        """
        if self.producer[value] < 0:
            return (-1, self.inputs.index(value)) if value in self.inputs else None
        node = self.nodes[self.producer[value]]
        for position, output in enumerate(self._originals[node.origin].outputs if not node.scope else ()):
            if output is self.values[value] or (output.name and output.name == self.values[value].name):
                return node.origin, position
        return None

    def _link(self) -> None:
        self.producer = [-1] * len(self.values)
        self.consumers = [[] for _ in self.values]
        for node in self.nodes:
            for value in node.outputs:
                self.producer[value] = node.index
            for value in node.inputs:
                if value != ABSENT:
                    self.consumers[value].append(node.index)

    def _add(self, node: ir.Node, origin: int, scope: Scope, name: str) -> None:
        inputs = tuple(ABSENT if v is None else self.number(v) for v in node.inputs)
        bodies = [b for a in node.attributes.values() for b in _graphs(a)]
        if not bodies:
            op = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
            self._emit(op, inputs, [self.number(v) for v in node.outputs], node, origin, name, scope)
        elif node.op_type == "If":
            self._add_if(node, inputs, bodies, origin, name, scope)
        else:
            self._add_loop(node, inputs, bodies[0], origin, name, scope)

    def _emit(
        self,
        op: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        node: ir.Node,
        origin: int,
        name: str,
        scope: Scope,
    ) -> None:
        self.nodes.append(FlatNode(len(self.nodes), op, tuple(inputs), tuple(outputs), node, origin, name, scope))

    def _add_body(self, node: ir.Node, which: int, body: ir.Graph, origin: int, name: str, scope: Scope) -> list[int]:
        """Spread out a body; returns the numbers of its outputs."""
        inner = (*scope, (node, which))
        for position, child in enumerate(body):
            self._add(child, origin, inner, f"{name}/{child.name or f'{child.op_type}#{which}.{position}'}")
        return [self.number(v) for v in body.outputs]

    def _add_if(
        self,
        node: ir.Node,
        inputs: tuple[int, ...],
        bodies: list[ir.Graph],
        origin: int,
        name: str,
        scope: Scope,
    ) -> None:
        results = [self._add_body(node, k, body, origin, name, scope) for k, body in enumerate(bodies)]
        for k, output in enumerate(node.outputs):
            choices = [branch[k] for branch in results]
            self._emit("Branch", [*inputs, *choices], [self.number(output)], node, origin, name, scope)

    def _add_loop(
        self,
        node: ir.Node,
        inputs: tuple[int, ...],
        body: ir.Graph,
        origin: int,
        name: str,
        scope: Scope,
    ) -> None:
        """Loop, Scan and the like: tie carried values, hand in slices, collect results."""
        control, carried, scanned = _split_inputs(node, inputs, len(body.inputs))
        lead = 2 if node.op_type == "Loop" else 0
        next_values = body.outputs[1:] if node.op_type == "Loop" else body.outputs
        inner = (*scope, (node, 0))
        for k, initial in enumerate(carried):
            target, back = self.number(body.inputs[lead + k]), self.number(next_values[k])
            self._emit("Merge", [initial, back], [target], node, origin, name, inner)
        for k, tensor in enumerate(scanned):
            target = self.number(body.inputs[lead + len(carried) + k])
            self._emit("Element", [tensor], [target], node, origin, name, inner)
        results = self._add_body(node, 0, body, origin, name, scope)[len(body.outputs) - len(next_values) :]
        for result, output in zip(results, node.outputs, strict=False):
            self._emit("Collect", [*control, result], [self.number(output)], node, origin, name, scope)


def _graphs(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.is_ref():
        return []
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    if attribute.type == ir.AttributeType.GRAPHS:
        return list(attribute.as_graphs())
    return []


def _split_inputs(
    node: ir.Node, inputs: tuple[int, ...], parameters: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Inputs of a node with a body as (control, carried, scanned)."""
    if node.op_type == "Loop":
        return tuple(v for v in inputs[:2] if v != ABSENT), inputs[2:], ()
    if node.op_type != "Scan":
        return (), (), inputs[:parameters]
    # The first version of Scan had the lengths of the sequences as an extra first input.
    data = inputs[len(inputs) - parameters :]
    scans = node.attributes["num_scan_inputs"].as_int()
    return (), data[: len(data) - scans], data[len(data) - scans :]


def without_functions(module: Module) -> ir.Model:
    """The module's model, or a copy with local functions inlined whose nodes remember the node they came from."""
    if not module.model.functions:
        return module.model
    copy = module.model.clone()
    for position, node in enumerate(copy.graph):
        node.metadata_props[_ORIGIN] = str(position)
    InlinePass()(copy)
    return copy


def flatten(module: Module) -> FlatGraph:
    """The flat view of a module; time and memory grow with the number of nodes after inlining."""
    model = without_functions(module)
    return FlatGraph(model, list(module.graph))
