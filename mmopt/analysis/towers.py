"""Towers, projectors, fusion points and heads of a multimodal model, found from dataflow alone.

Inputs are grouped into modalities; every group gets a label that flows forward through the graph. Nodes that only one
label reaches are that group's tower. Where labels meet is fusion, what comes after the last meeting is a head. No name
of a model, node or input decides anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mmopt.analysis import cost
from mmopt.analysis import operators as ops
from mmopt.analysis.dataflow import FlatGraph, flatten
from mmopt.analysis.entry_points import extract_entry_points, why_uncut
from mmopt.analysis.fusion_points import Join, find_joins
from mmopt.analysis.modalities import COMMON, UNUSED, InputRole, classify
from mmopt.analysis.shapes import infer_shapes
from mmopt.analysis.streams import Streams, follow
from mmopt.analysis.tower_heads import Assignment, OwnHead, assign, is_mixed
from mmopt.analysis.tower_parts import Parts
from mmopt.analysis.tower_report import FusionPoint, Head, Projector, Tower, TowerReport
from mmopt.analysis.tower_tails import Tail, find_tail
from mmopt.ir.module import Module

__all__ = ["TowerReport", "analyze_towers", "extract_entry_points"]

_STEERING_ROLES = frozenset({"mask", "positions", "lengths", "state", "scalar"})
_BEFORE_VOTES = ops.LAYOUT | {"Mul", "Div"}


def analyze_towers(module: Module, binding: Mapping[str, int] | None = None) -> TowerReport:
    """Find the structure of a model.

    Args:
        module: The module; its ``modalities`` override what is found about inputs.
        binding: Numbers for symbolic dimensions, for the MACs in the report.

    Returns:
        The report. Time is linear in the number of nodes; equal modules give equal reports.

    Raises:
        UserError: ``module.modalities`` names an input, or ``binding`` a dimension, that does not exist.
    """
    graph = flatten(module)
    structure = _Structure(graph, classify(graph, module.modalities))
    parts = Parts(graph, structure.assignment.owner, cost.node_costs(graph, binding))
    report = _Writer(structure, parts).report()
    # Facts about the values of a copy with calls inlined say nothing about the values of the module itself.
    facts = infer_shapes(module.model) if module.model.functions else graph.facts
    return report if report.uncut else dataclasses.replace(report, uncut=why_uncut(module, report.towers, facts))


class _Structure:
    """What is found, in numbers: towers are bits, parts and values are numbers."""

    def __init__(self, graph: FlatGraph, roles: dict[str, InputRole]) -> None:
        self.graph, self.roles = graph, roles
        self.groups = _tower_groups(roles)
        self.streams = self._follow()
        self.joins = find_joins(graph, self.streams)
        self.reach = [self.union(node.outputs) for node in graph.nodes]
        self.tails = [self._tail(k) for k in range(len(self.groups))]
        self.projectors = [self._projector(k) for k in range(len(self.groups))]
        self.level = self._level()
        self.assignment = self._assign()

    def union(self, values: tuple[int, ...]) -> int:
        """Towers that any of the values depends on."""
        mask = 0
        for value in values:
            mask |= self.streams.reach(value)
        return mask

    def _follow(self) -> Streams:
        content: dict[int, int] = {}
        control: dict[int, int] = {}
        for value in self.graph.inputs:
            role = self.roles[self.graph.name(value)]
            if role.group in self.groups:
                kind = control if role.role in _STEERING_ROLES else content
                kind[value] = 1 << self.groups.index(role.group)
        return follow(self.graph, content, control)

    def is_pure(self, value: int, tower: int) -> bool:
        """Whether a value carries data of one tower and depends on nothing else."""
        return self.streams.content[value] == 1 << tower == self.streams.reach(value)

    def _tail(self, tower: int) -> Tail:
        """The end of a tower: at what the rest of the model uses; empty when it only has outputs of its own."""
        graph = self.graph
        pure = (v for v in range(len(graph.values)) if self.is_pure(v, tower))
        crossing = [v for v in pure if any(is_mixed(self.reach[k]) for k in graph.consumers[v])]
        return find_tail(graph, self.streams, tower, crossing)

    def _projector(self, tower: int) -> list[int]:
        nodes = self.tails[tower].projector
        return nodes if self._leaves_learning(tower, nodes) else []

    def _leaves_learning(self, tower: int, nodes: list[int]) -> bool:
        """Whether the tower learns anything without these nodes; a plain perceptron would be all projector."""
        inside = set(nodes)
        rest = (n for n in self.graph.nodes if n.index not in inside and self.reach[n.index] == 1 << tower)
        return any(ops.is_contraction(n.op) or n.op in ops.GATHERS for n in rest)

    def _level(self) -> str:
        if not self.joins:
            return ""
        if max(join.depth for join in self.joins) > 0:
            return "deep"
        return "decision" if all(self._is_decision(join) for join in self.joins) else "feature"

    def _is_decision(self, join: Join) -> bool:
        """Whether votes are joined: probabilities, or results of linear layers that nothing learned follows."""
        if join.kind not in ("add", "weighted", "max", "concat"):
            return False
        makers = [self.graph.made_by(self.graph.back_through(v, _BEFORE_VOTES)) for v in join.operands]
        if all(m is not None and m.op in ("Softmax", "Sigmoid", "LogSoftmax") for m in makers):
            return True
        if join.kind == "concat" or not all(p for k, p in enumerate(self.projectors) if join.towers >> k & 1):
            return False
        return not any(is_mixed(self.reach[n.index]) and ops.is_contraction(n.op) for n in self.graph.nodes)

    def _assign(self) -> Assignment:
        projectors = self.projectors
        own = [OwnHead(k, nodes) for k, tail in enumerate(self.tails) if not tail.crossing for nodes in self._trails(k)]
        if self.level == "decision":
            own += [OwnHead(k, nodes) for k, nodes in enumerate(projectors) if nodes]
            projectors = [[] for _ in projectors]
        return assign(self.graph, self.reach, self.joins, projectors, own)

    def _trails(self, tower: int) -> list[list[int]]:
        """The last linear layers before each output of a tower that joins nothing."""
        outputs = [v for v in dict.fromkeys(self.graph.outputs) if self.is_pure(v, tower)]
        found = [find_tail(self.graph, self.streams, tower, [v]).projector for v in outputs]
        trails = [nodes for nodes in found if nodes and not any(set(nodes) < set(other) for other in found)]
        return [nodes for nodes in trails if self._leaves_learning(tower, nodes)]

    def cut(self, tower: int) -> list[int]:
        """Values of the main graph to end a tower at, outputs of its own included; none when it ends in a body."""
        graph, values = self.graph, self.tails[tower].cut
        if any(graph.place(v) is None for v in values):
            values = self._cut_at_calls(tower)
        outputs = [v for v in dict.fromkeys(graph.outputs) if self.is_pure(v, tower)]
        values = list(dict.fromkeys(self._same_output(v, outputs) for v in values))
        return [*values, *(v for v in outputs if v not in values)]

    def _same_output(self, value: int, outputs: list[int]) -> int:
        """An output of the model that differs from ``value`` by layout alone, else ``value``: one value less to cut."""
        before = value
        while before not in outputs:
            node = self.graph.made_by(before)
            if node is None or node.op not in ops.LAYOUT:
                return value
            before = node.inputs[0]
        return before

    def _cut_at_calls(self, tower: int) -> list[int]:
        """The same where the fusion lies inside nodes of the main graph (calls, bodies): the values these take."""
        graph = self.graph
        mixed = {n.origin for n in graph.nodes if is_mixed(self.reach[n.index])}
        found = []
        for value in range(len(graph.values)):
            maker = graph.made_by(value)
            inside = maker is not None and maker.origin in mixed
            taken = any(graph.nodes[k].origin in mixed for k in graph.consumers[value])
            if taken and not inside and self.is_pure(value, tower):
                found.append(value)
        return found if all(graph.made_by(v) is not None and graph.place(v) for v in found) else []


def _tower_groups(roles: Mapping[str, InputRole]) -> list[str]:
    """Labels of the groups that carry data, in the order of the inputs."""
    carrying = (r.group for r in roles.values() if r.role not in _STEERING_ROLES)
    return [group for group in dict.fromkeys(carrying) if group not in (COMMON, UNUSED)]


class _Writer:
    """Puts the structure in words."""

    def __init__(self, structure: _Structure, parts: Parts) -> None:
        self.structure, self.parts = structure, parts
        self.graph, self.groups, self.roles = structure.graph, structure.groups, structure.roles

    def report(self) -> TowerReport:
        assignment = self.structure.assignment
        towers = tuple(self._tower(k) for k in range(len(self.groups)))
        members = [(name, 1 << k | 1 << assignment.projectors + k) for k, name in enumerate(self.groups)]
        own = {h.tower: 1 << h.number for h in assignment.heads if h.tower >= 0}
        members = [(name, mask | own.get(k, 0)) for k, (name, mask) in enumerate(members)]
        return TowerReport(
            inputs=self.roles,
            towers=towers,
            projectors=tuple(self._projectors()),
            fusions=tuple(self._fusion(join) for join in self.structure.joins),
            heads=tuple(self._heads()),
            shared=self.parts.shared(members),
            level=self.structure.level,
            trunk=self.parts.part(assignment.trunk),
            uncut=self._uncut(towers),
        )

    def _names(self, mask: int) -> tuple[str, ...]:
        return tuple(name for k, name in enumerate(self.groups) if mask >> k & 1)

    def _tower(self, k: int) -> Tower:
        name = self.groups[k]
        members = {n: r for n, r in self.roles.items() if r.group == name}
        main = [n for n, r in members.items() if r.role not in ("state", "scalar")]
        cut = self.structure.cut(k)
        places = [place for v in cut if (place := self.graph.place(v)) is not None]
        return Tower(
            name=name,
            modality=next(r.modality for r in members.values() if r.role not in _STEERING_ROLES),
            inputs=tuple(main),
            auxiliary=tuple(n for n in members if n not in main),
            part=self.parts.part(k),
            outputs=tuple(self.graph.name(v) for v in cut),
            cut=tuple(places) if len(places) == len(cut) else (),
            reason="; ".join(f"{n}: {r.reason}" for n, r in members.items()),
        )

    def _projectors(self) -> list[Projector]:
        first = self.structure.assignment.projectors
        parts = [(name, self.parts.part(first + k)) for k, name in enumerate(self.groups)]
        reason = "linear layers between the tower's last mixing of places and the fusion"
        return [Projector(name, part, reason) for name, part in parts if part.nodes]

    def _heads(self) -> list[Head]:
        found = []
        for head in self.structure.assignment.heads:
            outputs = [v for k, v in enumerate(self.graph.outputs) if head.outputs >> k & 1]
            part = self.parts.part(head.number)
            if head.tower >= 0:
                towers, reason = 1 << head.tower, "the last linear layers of this tower alone"
            else:
                towers = self.structure.union(tuple(outputs))
                reason = "what follows the last fusion" if part.nodes else "returned as it is"
            found.append(Head(tuple(map(self.graph.name, outputs)), self._names(towers), part, reason))
        return found

    def _fusion(self, join: Join) -> FusionPoint:
        names = tuple(dict.fromkeys(self.graph.nodes[k].name for k in join.nodes))
        return FusionPoint(join.kind, names[0], names, self._names(join.towers), join.depth, join.reason)

    def _uncut(self, towers: tuple[Tower, ...]) -> str:
        if len(towers) < 2:
            return "there are fewer than two towers"
        for tower in towers:
            if not tower.cut:
                return f"the tower {tower.name!r} ends inside the body of a node, or nothing uses it"
            if any(node < 0 for node, _ in tower.cut):
                return f"the input of {tower.name!r} goes into the fusion as it is"
        return ""
