"""Where a tower ends: the values that leave it, the projector before them, and the place to cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from mmopt.analysis import operators as ops
from mmopt.analysis.dataflow import FlatGraph, FlatNode
from mmopt.analysis.streams import Streams

_POINTWISE = ops.LAYOUT | ops.ACTIVATIONS | ops.UNARY | ops.NORMS | ops.ARITHMETIC | {"Softmax", "LogSoftmax"}
_INSIDE_BLOCK = _POINTWISE | ops.REDUCTIONS | {"Slice", "Split", "Gather", "Where"}
_LONGEST_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Tail:
    """The end of a tower.

    Attributes:
        crossing: Values that other parts of the model use, in order of production.
        cut: Values to end the tower at: those of ``crossing``, or the one all of them are projections of.
        projector: Indices of the nodes from the first linear layer of the tail on.
    """

    crossing: list[int]
    cut: list[int]
    projector: list[int]


def linear_weight(graph: FlatGraph, streams: Streams, node: FlatNode) -> bool:
    """Whether a node is a linear layer: a product with weights, or a convolution with a window of one element."""
    if node.op in ops.PRODUCTS:
        positions = ops.PRODUCTS[node.op]
        factors = [node.inputs[k] for k in positions if k < len(node.inputs)]
        return len(factors) == 2 and sum(1 for v in factors if streams.reach(v)) == 1
    if node.op in ops.CONVOLUTIONS:
        dims = graph.dims(node.inputs[ops.CONVOLUTIONS[node.op][1]])
        return dims is not None and all(d == 1 for d in dims[2:])
    return False


def find_tail(graph: FlatGraph, streams: Streams, tower: int, crossing: Iterable[int]) -> Tail:
    """Walk back from the values that leave a tower.

    The walk goes from one value that everything passes through to the next. It stops where features are mixed across
    places (attention, convolution, recurrence, pooling, a residual around a linear layer), since that is tower.

    Args:
        graph: The flat graph.
        streams: Labels in which tower k has bit k.
        tower: Number of the tower.
        crossing: Values of the tower that joins, or outputs, use.
    """
    values = sorted(set(crossing), key=lambda v: (graph.producer[v], v))
    walk = _Walk(graph, streams, 1 << tower)
    if len(values) <= 1:
        return Tail(values, values, walk.trail(values[0]) if values else [])
    first, choke = walk.block(values, leading=True)
    if choke is not None:
        return Tail(values, [choke], walk.from_first_linear(sorted({*first, *walk.trail(choke)})))
    nodes = {index for value in values for index in walk.trail(value)}
    return Tail(values, values, sorted(nodes))


class _Walk:
    def __init__(self, graph: FlatGraph, streams: Streams, own: int) -> None:
        self.graph, self.streams, self.own = graph, streams, own

    def trail(self, value: int) -> list[int]:
        """The nodes before a value back to the tower's last mixing, from the first linear layer among them on."""
        nodes: list[int] = []
        current: int | None = value
        while current is not None:
            block, before = self.block([current], leading=False)
            if before is None:
                break
            nodes += block
            current = before
        return self.from_first_linear(sorted(nodes))

    def from_first_linear(self, nodes: list[int]) -> list[int]:
        """Drop what comes before the first linear layer; all of it when there is none."""
        for position, index in enumerate(nodes):
            if linear_weight(self.graph, self.streams, self.graph.nodes[index]):
                return nodes[position:]
        return []

    def block(self, values: list[int], leading: bool) -> tuple[list[int], int | None]:
        """Nodes back to the nearest single value that all of ``values`` are made of, and that value.

        A leading block starts at several values and may hold linear layers and selections (keys and values of
        attention); other blocks may hold a linear layer only when they are nothing else.
        """
        frontier, nodes = set(values), list[int]()
        while frontier:
            latest = max(frontier, key=lambda v: self.graph.producer[v])
            node = self.graph.made_by(latest)
            if node is None or node.scope or not self._is_eligible(node):
                return nodes, None
            nodes.append(node.index)
            frontier -= set(node.outputs)
            frontier |= {v for v in node.inputs if v >= 0 and self._carries(v)}
            if len(frontier) == 1:
                return (nodes, next(iter(frontier))) if leading or self._is_plain(nodes) else (nodes, None)
            if not leading and len(nodes) > _LONGEST_BLOCK:
                return nodes, None
        return nodes, None

    def _carries(self, value: int) -> bool:
        return self.streams.content[value] == self.own and self.streams.reach(value) == self.own

    def _is_eligible(self, node: FlatNode) -> bool:
        if any(self.streams.reach(v) & ~self.own for v in node.outputs):
            return False
        return node.op in _INSIDE_BLOCK or linear_weight(self.graph, self.streams, node)

    def _is_plain(self, nodes: list[int]) -> bool:
        """Whether a block is one linear layer or point-wise arithmetic, such as a norm or an activation spelled out."""
        members = [self.graph.nodes[k] for k in nodes]
        if len(members) == 1:
            return members[0].op in _POINTWISE or linear_weight(self.graph, self.streams, members[0])
        if any(n.op in ("Gather", "Slice", "Split") for n in members):
            return False
        linear = sum(1 for n in members if linear_weight(self.graph, self.streams, n))
        return linear == 0 or (linear == 1 and self._is_dynamically_quantized(members))

    def _is_dynamically_quantized(self, members: list[FlatNode]) -> bool:
        """Whether a block is one linear layer whose scale is taken from the data first and put back at the end."""
        made = {v for n in members for v in n.outputs}
        first = [n for n in members if any(v >= 0 and v not in made and self._carries(v) for v in n.inputs)]
        return [n.op for n in first] == ["DynamicQuantizeLinear"]
