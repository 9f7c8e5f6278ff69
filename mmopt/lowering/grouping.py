"""Puts the nodes of a graph into as few native and foreign groups as their order allows."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

FEW = 8
"""A native group with at most this many nodes, all of them cheap, is not worth the two crossings."""

SIZES = frozenset(
    {
        "Cast",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Flatten",
        "Gather",
        "Identity",
        "Range",
        "Reshape",
        "Shape",
        "Size",
    }
    | {"Slice", "Squeeze", "Unsqueeze"}
)
"""Operators that mostly work out sizes, or move nothing."""

CHEAP = SIZES | frozenset(
    {"Abs", "Add", "And", "CastLike", "Ceil", "Clip", "Div", "Equal", "Expand", "Floor", "Greater", "GreaterOrEqual"}
    | {"Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Relu", "Sign", "Split", "Sqrt", "Sub"}
    | {"Transpose", "Where"}
)
"""Operators whose cost is that of reading their input."""


@dataclasses.dataclass
class Group:
    """Nodes in order that one engine runs together."""

    native: bool
    nodes: list[ir.Node] = dataclasses.field(default_factory=list)


def reads(node: ir.Node) -> list[ir.Value]:
    """Values a node uses, those that its bodies use from outside included."""
    found = dict.fromkeys(v for v in node.inputs if v is not None)
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            found.update(dict.fromkeys(_from_outside(attribute.as_graph())))
        elif attribute.type == ir.AttributeType.GRAPHS:
            for body in attribute.as_graphs():
                found.update(dict.fromkeys(_from_outside(body)))
    return list(found)


def _from_outside(body: ir.Graph) -> list[ir.Value]:
    used: dict[ir.Value, None] = {}
    own = {*body.inputs, *body.initializers.values()}
    for node in body:
        used.update(dict.fromkeys(reads(node)))
        own.update(node.outputs)
    used.update(dict.fromkeys(body.outputs))
    return [v for v in used if v not in own]


def grouped(graph: ir.Graph, foreign: Collection[ir.Node]) -> list[Group]:
    """Groups of the nodes of ``graph`` in an order in which they can run.

    Taking all nodes of one kind that are ready, then all of the other, needs the fewest groups for the kind it starts
    with.

    Args:
        graph: The graph.
        foreign: Its nodes that are not native.
    """
    native_first = _alternating(graph, foreign, native=True)
    foreign_first = _alternating(graph, foreign, native=False)
    return min(native_first, foreign_first, key=len)


def _alternating(graph: ir.Graph, foreign: Collection[ir.Node], native: bool) -> list[Group]:
    waits, followers = _order(graph)
    ready: dict[bool, collections.deque[ir.Node]] = {True: collections.deque(), False: collections.deque()}
    for node, count in waits.items():
        if count == 0:
            ready[node not in foreign].append(node)
    groups: list[Group] = []
    while ready[True] or ready[False]:
        group = Group(native)
        while ready[native]:
            node = ready[native].popleft()
            group.nodes.append(node)
            for follower in followers[node]:
                waits[follower] -= 1
                if waits[follower] == 0:
                    ready[follower not in foreign].append(follower)
        if group.nodes:
            groups.append(group)
        native = not native
    positions = {node: n for n, node in enumerate(graph)}
    for group in groups:
        group.nodes.sort(key=positions.__getitem__)
    return groups


def _order(graph: ir.Graph) -> tuple[dict[ir.Node, int], Mapping[ir.Node, Sequence[ir.Node]]]:
    """How many nodes each node waits for, and which wait for it."""
    waits: dict[ir.Node, int] = {}
    followers: dict[ir.Node, list[ir.Node]] = {node: [] for node in graph}
    for node in graph:
        producers = {v.producer() for v in reads(node)}
        before = [p for p in producers if p is not None and p in followers]
        waits[node] = len(before)
        for producer in before:
            followers[producer].append(node)
    return waits, followers


def absorbed(groups: Sequence[Group], graph: ir.Graph) -> list[Group]:
    """The groups, with native ones that are not worth it given to their foreign neighbours."""
    current = list(groups)
    while True:
        poor = [g for g in current if g.native and _poor(g)]
        if not poor or len(current) == len(poor):
            return current
        foreign = {n for g in current for n in g.nodes if not g.native or g in poor}
        current = grouped(graph, foreign)


def _poor(group: Group) -> bool:
    kinds = {n.op_type if not n.domain else "" for n in group.nodes}
    return kinds <= SIZES or (len(group.nodes) <= FEW and kinds <= CHEAP)
