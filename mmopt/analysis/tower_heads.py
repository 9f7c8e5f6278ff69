"""Which part every node belongs to: a tower, its projector, the trunk between fusions, or a head of outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from mmopt.analysis.dataflow import FlatGraph
from mmopt.analysis.fusion_points import Join


@dataclasses.dataclass(frozen=True)
class OwnHead:
    """The head of a single tower: of its own outputs, or the vote of decision-level fusion.

    Attributes:
        tower: Number of the tower.
        nodes: Indices of its nodes.
    """

    tower: int
    nodes: list[int]


@dataclasses.dataclass(frozen=True)
class HeadPart:
    """A head as a part.

    Attributes:
        outputs: Bit mask of the outputs it makes.
        number: Number of the part.
        tower: Number of the tower it belongs to alone, or -1.
    """

    outputs: int
    number: int
    tower: int = -1


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Part of every node.

    Attributes:
        owner: Part by node; -1 for nodes that carry no data.
        projectors: Number of the projector of tower 0; those of other towers follow, and towers count from 0.
        trunk: Number of the trunk.
        heads: The heads.
    """

    owner: list[int]
    projectors: int
    trunk: int
    heads: list[HeadPart]


def is_mixed(mask: int) -> bool:
    """Whether a mask has more than one bit."""
    return bool(mask & (mask - 1))


def assign(
    graph: FlatGraph,
    reach: Sequence[int],
    joins: Iterable[Join],
    projectors: Sequence[Sequence[int]],
    own_heads: Sequence[OwnHead],
) -> Assignment:
    """Assign every node to a part.

    Args:
        graph: The flat graph.
        reach: Bit mask of the towers that each node depends on.
        joins: The fusion points.
        projectors: Nodes of each tower's projector.
        own_heads: Heads that single towers have.
    """
    count = len(projectors)
    trunk = 2 * count
    owner = [-1 if not mask else trunk if is_mixed(mask) else mask.bit_length() - 1 for mask in reach]
    for tower, nodes in enumerate(projectors):
        for index in nodes:
            owner[index] = count + tower
    leads = _leads_to(graph)
    heads = []
    for number, head in enumerate(own_heads, trunk + 1):
        outputs = 0
        for index in head.nodes:
            owner[index] = number
            outputs |= leads[index]
        heads.append(HeadPart(outputs, number, head.tower))
    before = _before(graph, joins)
    after = [k for k, own in enumerate(owner) if own == trunk and not before[k]]
    heads += _shared_heads(owner, leads, after, len(graph.outputs), heads, trunk + 1 + len(own_heads))
    return Assignment(owner, count, trunk, heads)


def _shared_heads(
    owner: list[int], leads: list[int], after: list[int], outputs: int, own: Sequence[HeadPart], first: int
) -> list[HeadPart]:
    """Heads after the last fusion: one for every output, and one for what several outputs have in common."""
    covered = 0
    for head in own:
        covered |= head.outputs
    made = {leads[k] for k in after}
    masks = [1 << k for k in range(outputs) if 1 << k in made or not covered >> k & 1]
    numbers = {mask: number for number, mask in enumerate(masks, first)}
    heads = [HeadPart(mask, number) for mask, number in numbers.items()]
    common = 0
    for index in after:
        common |= leads[index] if is_mixed(leads[index]) else 0
        owner[index] = numbers.get(leads[index], first + len(masks))
    return [*heads, HeadPart(common, first + len(masks))] if common else heads


def _before(graph: FlatGraph, joins: Iterable[Join]) -> list[bool]:
    """Whether each node is part of a join or leads to one."""
    marked = [False] * len(graph.nodes)
    members = {k for join in joins for k in join.nodes}
    for node in reversed(graph.nodes):
        users = (k for v in node.outputs for k in graph.consumers[v])
        marked[node.index] = node.index in members or any(marked[k] for k in users)
    return marked


def _leads_to(graph: FlatGraph) -> list[int]:
    """Bit mask of the outputs that each node leads to."""
    masks = [0] * len(graph.values)
    for k, value in enumerate(graph.outputs):
        masks[value] |= 1 << k
    leads = [0] * len(graph.nodes)
    for node in reversed(graph.nodes):
        for value in node.outputs:
            leads[node.index] |= masks[value]
        for value in node.inputs:
            if value >= 0:
                masks[value] |= leads[node.index]
    return leads
