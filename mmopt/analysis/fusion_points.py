"""Where streams of several towers come together, and how.

Nodes are visited in order. A node whose inputs carry different sets of towers joins them when no node before it did, or
when an input brings something that was learned since: the keys and values of a further layer of cross attention do, the
residual that skips an attention does not. Joins that are one operation in the eyes of a person (a chain of additions,
scores and weighted sum of one attention) become one fusion point.
"""

from __future__ import annotations

import dataclasses

from mmopt.analysis import fusion_kinds
from mmopt.analysis import operators as ops
from mmopt.analysis.dataflow import FlatGraph, FlatNode
from mmopt.analysis.streams import Streams, data_inputs

CHAINED = frozenset({"concat", "add", "weighted", "product", "max"})
"""Kinds that may be spelled as several binary operators in a row."""


@dataclasses.dataclass
class Join:
    """A fusion point in the making.

    Attributes:
        nodes: Indices of its nodes; the first one is where the streams meet.
        kind: See :class:`mmopt.analysis.tower_report.FusionPoint`.
        towers: Bit mask of the towers joined.
        operands: The values that are joined.
        depth: Number of fusion points one after the other before it.
        reason: What was seen.
    """

    nodes: list[int]
    kind: str
    towers: int
    operands: list[int]
    depth: int
    reason: str


def find_joins(graph: FlatGraph, streams: Streams) -> list[Join]:
    """All fusion points, in order of execution.

    Args:
        graph: The flat graph.
        streams: Labels in which tower k has bit k.
    """
    return _Search(graph, streams).run()


class _Search:
    def __init__(self, graph: FlatGraph, streams: Streams) -> None:
        self.graph, self.streams = graph, streams
        self.joins: list[Join] = []
        self.at: dict[int, Join] = {}
        """Join that a node belongs to."""
        self.used: set[int] = set()
        """Values that a join has consumed, directly or through what was made from them."""
        self.met: set[int] = set()
        """Sets of towers that have come together."""
        self.depth = [0] * len(graph.values)

    def run(self) -> list[Join]:
        for node in self.graph.nodes:
            depth = max((self.depth[v] for v in node.inputs if v >= 0), default=0)
            join = self.at.get(node.index) or self._examine(node, depth)
            if join is not None:
                depth = max(depth, join.depth + 1)
            for value in node.outputs:
                self.depth[value] = depth
        return self.joins

    def _examine(self, node: FlatNode, depth: int) -> Join | None:
        """The join that a node makes or belongs to."""
        content = self.streams.content
        parts = [v for v in data_inputs(node, self.streams) if content[v]]
        union = 0
        for value in parts:
            union |= content[value]
        if node.op == "Merge" or len({content[v] for v in parts}) < 2:
            return self._close_attention(node, parts)
        grown = all(content[v] != union for v in parts)
        fresh = [self._consume(v) for v in parts if content[v] != union]
        first = grown and union not in self.met
        self.met.add(union)
        if not (first or any(fresh)):
            self._widen(node, parts, union)
            return None
        return self._add(node, parts, union, depth)

    def _consume(self, value: int) -> bool:
        """Mark a value and all it is made of as consumed; whether anything learned was among what is new."""
        fresh, stack = False, [value]
        while stack:
            current = stack.pop()
            if current in self.used or not self.streams.content[current]:
                continue
            self.used.add(current)
            node = self.graph.made_by(current)
            if node is None or ops.is_contraction(node.op) or self._is_lookup(node):
                fresh = True
            if node is not None:
                stack.extend(v for v in node.inputs if v >= 0)
        return fresh

    def _is_lookup(self, node: FlatNode) -> bool:
        return node.op in ops.GATHERS and not self.streams.reach(node.inputs[0])

    def _add(self, node: FlatNode, parts: list[int], union: int, depth: int) -> Join:
        kind, reason = fusion_kinds.classify(self.graph, self.streams, node, parts)
        if (chain := self._chained(kind, parts, union)) is not None:
            chain.nodes.append(node.index)
            chain.towers |= union
            chain.operands += [v for v in parts if self._join_behind(v) is not chain]
            if kind == "weighted":
                chain.kind, chain.reason = kind, reason
            return chain
        join = Join([node.index], kind, union, parts, depth, reason)
        self.joins.append(join)
        self.at[node.index] = join
        if kind == "attention":
            for other in fusion_kinds.weighted_sums(self.graph, self.streams, node):
                self.at.setdefault(other, join)
                join.nodes.append(other)
        return join

    def _join_behind(self, value: int) -> Join | None:
        maker = self.graph.made_by(self.graph.back_through(value, ops.LAYOUT))
        return self.at.get(maker.index) if maker is not None else None

    def _chained(self, kind: str, parts: list[int], union: int) -> Join | None:
        """The join that this one continues: the same operator on its direct result."""
        for value in parts:
            join = self._join_behind(value)
            if join is None:
                continue
            same = {join.kind, kind} <= {"add", "weighted"} or (join.kind == kind and kind in CHAINED)
            if same and self.graph.nodes[join.nodes[-1]].outputs[0] == self.graph.back_through(value, ops.LAYOUT):
                return join
            if join.kind == "product" and kind == "add" and union == join.towers:
                join.kind, join.reason = "modulation", "one stream scales and shifts the other"
                return join
        return None

    def _widen(self, node: FlatNode, parts: list[int], union: int) -> None:
        """``[a, b, a*b]``: the product came first, but it is the concatenation that joins the streams."""
        pure = {self.streams.content[v] for v in parts if self.streams.content[v] != union}
        if node.op != "Concat" or len(pure) < 2:
            return
        for join in reversed(self.joins):
            if join.towers == union and join.kind in ("product", "add", "similarity"):
                join.kind, join.reason = "concat", "streams and combinations of them are put side by side"
                join.nodes.append(node.index)
                return

    def _close_attention(self, node: FlatNode, parts: list[int]) -> Join | None:
        """Joint attention: queries, keys and values were each put side by side; that is one attention."""
        if node.op not in ops.PRODUCTS or len(parts) != 2:
            return None
        behind = [self._concat_behind(v) for v in parts]
        first, second = behind[0], behind[1]
        if first is None or second is None or first is second or {first.kind, second.kind} - {"concat", "attention"}:
            return None
        kept, gone = (first, second) if first.nodes[0] < second.nodes[0] else (second, first)
        kept.kind, kept.reason = "attention", "all streams attend to all"
        kept.nodes += [*gone.nodes, node.index]
        kept.operands += gone.operands
        self.joins.remove(gone)
        for index in kept.nodes:
            self.at[index] = kept
        return kept

    def _concat_behind(self, value: int) -> Join | None:
        """The join a factor comes from, through what may lie between it and the product: norms, rotation, softmax."""
        for _ in range(24):
            maker = self.graph.made_by(value)
            if maker is None:
                return None
            if (join := self.at.get(maker.index)) is not None:
                return join
            if maker.op not in fusion_kinds.BESIDE_SCORES:
                return None
            value = next((v for v in maker.inputs if v >= 0 and self.streams.content[v]), -1)
        return None
