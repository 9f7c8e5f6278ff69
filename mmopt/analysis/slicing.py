"""Which nodes of the main graph some values need, with questions about foreign shapes answered from other sizes."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import onnx_ir as ir

from mmopt.analysis.dims import Size
from mmopt.analysis.shapes import ShapeFacts

SizeSource = int | tuple[ir.Value, int]
"""Where a size comes from: a number, or an axis of a value."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A Shape node whose input is not at hand.

    Attributes:
        value: Its output.
        dims: Where each element comes from: a number, or an axis of a value that is at hand.
    """

    value: ir.Value
    dims: tuple[SizeSource, ...]


@dataclasses.dataclass
class Selection:
    """Nodes to take.

    Attributes:
        nodes: The nodes.
        values: All values that they use, and the targets.
        inputs: Inputs of the graph that they use.
        questions: Shape nodes to replace.
        refused: What is needed but not allowed; "" when all is well.
    """

    nodes: set[ir.Node] = dataclasses.field(default_factory=set)
    values: set[ir.Value] = dataclasses.field(default_factory=set)
    inputs: set[ir.Value] = dataclasses.field(default_factory=set)
    questions: list[Question] = dataclasses.field(default_factory=list)
    refused: str = ""


def placed(graph: ir.Graph, place: tuple[int, int]) -> ir.Value:
    """The value at a place of the main graph, as :class:`mmopt.analysis.tower_report.Tower` gives it."""
    node, position = place
    return graph.inputs[position] if node < 0 else graph[node].outputs[position]


def captured(node: ir.Node) -> set[ir.Value]:
    """Values from outside that the bodies of a node use."""
    used: set[ir.Value] = set()
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            used |= _free_values(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            for body in attribute.as_graphs():
                used |= _free_values(body)
    return used


def _free_values(body: ir.Graph) -> set[ir.Value]:
    used = set(body.outputs)
    defined = {*body.inputs, *body.initializers.values()}
    for node in body:
        used |= {v for v in node.inputs if v is not None} | captured(node)
        defined.update(node.outputs)
    return used - defined


class Slicer:
    """Selects nodes of a main graph.

    Args:
        graph: The main graph.
        facts: Inferred shapes.
    """

    def __init__(self, graph: ir.Graph, facts: ShapeFacts) -> None:
        self._graph, self._facts = graph, facts
        self._order = {v: k for k, v in enumerate(v for n in graph for v in n.outputs)}

    def select(self, targets: Iterable[ir.Value], stops: Collection[ir.Value], allowed: set[ir.Value]) -> Selection:
        """The nodes that ``targets`` need.

        Args:
            targets: Values to compute.
            stops: Values that are given; nothing before them is needed.
            allowed: Inputs of the graph that may be used.
        """
        selection = Selection()
        waiting: collections.deque[ir.Node] = collections.deque()
        self._close(list(targets), stops, selection, waiting)
        while waiting and not selection.refused:
            self._ask(waiting.popleft(), stops, allowed, selection, waiting)
        foreign = [v for v in self._graph.inputs if v in selection.inputs - allowed]
        if foreign and not selection.refused:
            selection.refused = f"the input {foreign[0].name!r}"
        return selection

    def _close(
        self,
        stack: list[ir.Value],
        stops: Collection[ir.Value],
        selection: Selection,
        waiting: collections.deque[ir.Node],
    ) -> None:
        """Add everything that the values of ``stack`` are computed from; Shape nodes wait with what they ask about."""
        while stack:
            value = stack.pop()
            if value in selection.values:
                continue
            selection.values.add(value)
            node = value.producer()
            if value in stops or node is None:
                if value.is_graph_input() and not value.is_initializer() and value not in stops:
                    selection.inputs.add(value)
                continue
            if node in selection.nodes:
                continue
            selection.nodes.add(node)
            if node.op_type == "Shape" and node.domain == "":
                waiting.append(node)
                continue
            stack.extend(v for v in (*node.inputs, *captured(node)) if v is not None)

    def _ask(
        self,
        node: ir.Node,
        stops: Collection[ir.Value],
        allowed: set[ir.Value],
        selection: Selection,
        waiting: collections.deque[ir.Node],
    ) -> None:
        """Settle a Shape node: its input is at hand, or its sizes are, or its input must be computed."""
        value = node.inputs[0]
        if value is None or value in selection.values or (value in allowed and not stops):
            if value is not None:
                self._close([value], stops, selection, waiting)
            return
        dims = self._sizes(node, value, stops, allowed if not stops else selection.inputs)
        if dims is not None:
            selection.nodes.discard(node)
            selection.questions.append(Question(node.outputs[0], dims))
            return
        self._close([value], stops, selection, waiting)
        if selection.inputs - allowed:
            selection.refused = f"the shape of {value.name!r}, which belongs to another stream"

    def _sizes(
        self, node: ir.Node, value: ir.Value, stops: Collection[ir.Value], inputs: Collection[ir.Value]
    ) -> tuple[SizeSource, ...] | None:
        """Where to get the elements of a Shape node's output; elements that nobody picks may be anything."""
        shape = self._facts.shape(value)
        if shape is None:
            return None
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape))
        asked = shape[slice(start, end)]
        known = self._known_sizes(stops, inputs)
        found: list[SizeSource | None] = [d if isinstance(d, int) else known.get(d) for d in asked]
        if None in found:
            picked = _picked_elements(node.outputs[0], len(found))
            found = [0 if dim is None and k not in picked else dim for k, dim in enumerate(found)]
        return tuple(d for d in found if d is not None) if None not in found else None

    def _known_sizes(self, stops: Collection[ir.Value], inputs: Collection[ir.Value]) -> dict[Size | None, SizeSource]:
        """An axis of a value at hand for every symbolic size, in the order of the graph."""
        known: dict[Size | None, SizeSource] = {}
        ordered = [v for v in self._graph.inputs if v in inputs]
        ordered += sorted((v for v in stops if v in self._order), key=lambda v: self._order[v])
        for value in ordered:
            for axis, size in enumerate(self._facts.shape(value) or ()):
                if size is not None and not isinstance(size, int):
                    known.setdefault(size, (value, axis))
        return known


def _picked_elements(value: ir.Value, count: int) -> set[int]:
    """The elements of a vector that its users pick by constant positions; all of them where a user takes it whole."""
    picked: set[int] = set()
    for user, position in value.uses():
        constants = [ir.convenience.get_const_tensor(v) if v is not None else None for v in user.inputs[1:]]
        arrays = [None if c is None else c.numpy().reshape(-1) for c in constants]
        if position == 0 and user.op_type == "Gather" and arrays[0] is not None:
            picked |= {int(k) % count for k in arrays[0]}
        elif position == 0 and user.op_type == "Slice" and _is_plain_slice(arrays):
            picked |= set(range(count)[slice(int(_first(arrays[0])), int(_first(arrays[1])))])
        else:
            return set(range(count))
    return picked if not value.is_graph_output() else set(range(count))


def _is_plain_slice(arrays: Sequence[np.ndarray | None]) -> bool:
    given = [a for a in arrays if a is not None]
    return len(given) == len(arrays) >= 2 and (len(arrays) < 4 or int(_first(arrays[3])) == 1)


def _first(array: np.ndarray | None) -> int:
    return 0 if array is None else int(array[0])
