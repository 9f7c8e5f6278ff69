"""Names of groups: the tower and the layer that makes the units."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence

import onnx_ir as ir

from mmopt.analysis.axes.group import Group, Place, Role
from mmopt.analysis.towers import analyze_towers
from mmopt.errors import MmoptError
from mmopt.ir.module import MODULE_PATH_KEY, Module

_SUFFIX = re.compile(r"[._/](weights?|kernel|bias|weight_orig|W|R|weight_[ih]h_l\d+(_reverse)?)$")
_MADE_UP = re.compile(r"^(val|node|onnx|_|\d|const|initializer|tensor)[\W_\d]*", re.IGNORECASE)


class Namer:
    """Gives groups their names and towers.

    Args:
        module: The module the groups are of.
    """

    def __init__(self, module: Module) -> None:
        self._nodes = {_name(node): (position, node) for position, node in enumerate(module.graph)}
        self._towers = _towers(module)

    def position(self, node: str | None) -> int:
        """Where a node stands in the graph; past the end when it is not there."""
        found = self._nodes.get(node or "")
        return len(self._nodes) if found is None else found[0]

    def named(self, groups: Sequence[Group]) -> tuple[Group, ...]:
        """The groups with towers and with names that no two share."""
        placed = [dataclasses.replace(group, tower=self._tower(group)) for group in groups]
        names = [self._base(group) for group in placed]
        for distinct in (self._with_kind, self._with_number):
            counts = collections.Counter(names)
            if max(counts.values(), default=1) == 1:
                break
            names = distinct(placed, names, counts)
        return tuple(dataclasses.replace(g, name=name) for g, name in zip(placed, names, strict=True))

    def _base(self, group: Group) -> str:
        layer = self._layer(group)
        return f"{group.tower}/{layer}" if group.tower else layer

    def _layer(self, group: Group) -> str:
        for role in (Role.PRODUCER, Role.PARAMETER, Role.CONSUMER):
            for place in group.weights:
                if place.role is role:
                    return self._readable(place)
        return group.weights[0].value

    def _readable(self, place: Place) -> str:
        stripped = _SUFFIX.sub("", place.value)
        if not _MADE_UP.match(stripped):
            return stripped
        found = self._nodes.get(place.node or "")
        path = found[1].metadata_props.get(MODULE_PATH_KEY, "") if found else ""
        return path or place.node or stripped

    def _with_kind(self, groups: Sequence[Group], names: list[str], counts: collections.Counter[str]) -> list[str]:
        return [f"{n}:{g.kind}" if counts[n] > 1 else n for g, n in zip(groups, names, strict=True)]

    def _with_number(self, groups: Sequence[Group], names: list[str], counts: collections.Counter[str]) -> list[str]:
        seen: collections.Counter[str] = collections.Counter()
        result = []
        for name in names:
            seen[name] += 1
            result.append(f"{name}#{seen[name]}" if counts[name] > 1 else name)
        return result

    def _tower(self, group: Group) -> str | None:
        """The tower that all makers of the units belong to; who reads them says nothing."""
        makers = {p.node for p in group.weights if p.role is Role.PRODUCER}
        nodes = makers or {p.node for p in (*group.weights, *group.activations) if p.node}
        towers = {self._towers.get(str(node)) for node in nodes}
        return towers.pop() if len(towers) == 1 else None


def _towers(module: Module) -> dict[str, str]:
    """Tower of every node that belongs to one."""
    try:
        report = analyze_towers(module)
    except (MmoptError, ValueError, KeyError, IndexError):
        return {}
    parts = [(tower.name, tower.part.nodes) for tower in report.towers]
    parts += [(projector.tower, projector.part.nodes) for projector in report.projectors]
    return {node: tower for tower, nodes in parts for node in nodes}


def _name(node: ir.Node) -> str:
    return node.name or next((str(output.name) for output in node.outputs if output.name), "")
