"""Which part of the model every node and every weight belongs to, and what the parts cost."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from mmopt.analysis import cost
from mmopt.analysis import operators as ops
from mmopt.analysis.dataflow import FlatGraph
from mmopt.analysis.tower_report import Part, SharedWeight

_SAMPLE = 64


class Parts:
    """Assignment of nodes to numbered parts.

    Nodes that compute from weights alone (casts, dequantization, shapes) belong to the parts that use them.

    Args:
        graph: The flat graph.
        owner: Part of every node, or -1 for nodes that carry no data.
        costs: Cost of every node.
    """

    def __init__(self, graph: FlatGraph, owner: Sequence[int], costs: Sequence[cost.NodeCost]) -> None:
        self.graph, self.costs = graph, costs
        self.users = _using_parts(graph, owner)
        self.owner = [own if own >= 0 else _single(self.users[k]) for k, own in enumerate(owner)]
        self._members: dict[int, list[int]] = {}
        for index, number in enumerate(self.owner):
            self._members.setdefault(number, []).append(index)
        self.weights = {
            value: (count, _union(self.users[k] for k in graph.consumers[value] if graph.nodes[k].op not in ops.DEAD))
            for value, count in cost.weights(graph).items()
        }

    def part(self, number: int) -> Part:
        """Nodes and cost of a part."""
        members = self._members.get(number, [])
        names = tuple(dict.fromkeys(self.graph.nodes[k].name for k in members))
        parameters = sum(count for count, users in self.weights.values() if users >> number & 1)
        return Part(names, parameters, cost.add(self.costs[k].macs for k in members))

    def shared(self, towers: Sequence[tuple[str, int]]) -> tuple[SharedWeight, ...]:
        """Weights that several towers use, each tower given by its name and the bit mask of its parts.

        Initializers with equal contents count as one weight. Constant fills (zeros, ones) are no evidence.
        """
        masks = {v: users for v, (_, users) in self.weights.items()}
        found = []
        for values in self._equal_weights([v for v in masks if masks[v]]):
            users = _union(masks[v] for v in values)
            names = tuple(name for name, parts in towers if users & parts)
            if len(names) > 1 and not self._is_fill(values[0]):
                found.append(SharedWeight(tuple(map(self.graph.name, values)), names, self.weights[values[0]][0]))
        return tuple(found)

    def _equal_weights(self, values: list[int]) -> list[list[int]]:
        """Weights grouped by contents. A digest is taken only where dtype, shape and a sample of elements agree."""
        groups: dict[object, list[int]] = {}
        for value in values:
            groups.setdefault(self._sample(value), []).append(value)
        result = []
        for members in groups.values():
            if len(members) == 1:
                result.append(members)
                continue
            exact: dict[object, list[int]] = {}
            for value in members:
                exact.setdefault(self._digest(value), []).append(value)
            result += exact.values()
        return sorted(result)

    def _sample(self, value: int) -> object:
        tensor = self.graph.constant(value)
        assert tensor is not None
        array = tensor.numpy().reshape(-1)
        step = max(1, array.size // _SAMPLE)
        return tensor.dtype, tuple(tensor.shape), array[::step].tobytes()

    def _digest(self, value: int) -> object:
        tensor = self.graph.constant(value)
        assert tensor is not None
        return hashlib.sha256(np.ascontiguousarray(tensor.numpy()).tobytes()).digest()

    def _is_fill(self, value: int) -> bool:
        """Whether all elements are equal."""
        tensor = self.graph.constant(value)
        assert tensor is not None
        array = tensor.numpy().reshape(-1)
        return bool((array == array[0]).all())


def _using_parts(graph: FlatGraph, owner: Sequence[int]) -> list[int]:
    """Bit mask of the parts that use the results of each node; its own part where it has one."""
    users = [0] * len(graph.nodes)
    for node in reversed(graph.nodes):
        if owner[node.index] >= 0:
            users[node.index] = 1 << owner[node.index]
        else:
            users[node.index] = _union(users[k] for v in node.outputs for k in graph.consumers[v])
    return users


def _union(masks: Iterable[int]) -> int:
    result = 0
    for mask in masks:
        result |= mask
    return result


def _single(mask: int) -> int:
    return mask.bit_length() - 1 if mask and not mask & (mask - 1) else -1
