"""Finds every group of coupled axes of a graph."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import onnx_ir as ir

from mmopt.analysis.axes.group import Count, Group, Mixing, Place, Positions, Role, Site
from mmopt.analysis.axes.naming import Namer
from mmopt.analysis.axes.rules import apply_rule
from mmopt.analysis.axes.sizes import follow_sizes
from mmopt.analysis.axes.solving import Solution
from mmopt.analysis.axes.space import Holder, Reading, Space
from mmopt.analysis.shapes import infer_shapes
from mmopt.ir.module import Module

_ORDER = {Role.PRODUCER: 0, Role.CONSUMER: 1, Role.PARAMETER: 2}


def find_groups(module: Module) -> tuple[Group, ...]:
    """Every group of coupled axes that weights lie on, those that cannot be cut included with the reason.

    Args:
        module: The module, which is not changed. Bodies of If, Loop and Scan and calls of local functions are not
            looked into: what they touch is frozen.

    Returns:
        Groups in the order of the graph. Units of different groups can be cut independently of each other.
    """
    space = _describe(module)
    return _Finder(module, space).groups()


def _describe(module: Module) -> Space:
    space = Space(infer_shapes(module.model))
    graph = module.graph
    for value in graph.inputs:
        space.freeze_all(space.of(value), f"the input {value.name!r} shows it")
    for node in graph:
        apply_rule(node, space)
        for value in _captured(node):
            space.freeze_all(space.of(value), f"a body of {node.op_type} uses it")
    for value in graph.outputs:
        space.freeze_all(space.of(value), f"the output {value.name!r} shows it")
    follow_sizes(graph, space)
    space.close()
    return space


def _captured(node: ir.Node) -> Iterable[ir.Value]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            for inner in ir.traversal.RecursiveGraphIterator(attribute.as_graph()):
                for value in inner.inputs:
                    if value is not None:
                        yield value
            yield from attribute.as_graph().outputs


@dataclasses.dataclass
class _Unit:
    """Where one element lies: positions by axis."""

    element: int
    positions: dict[int, list[int]] = dataclasses.field(default_factory=dict)

    def signature(self) -> tuple[tuple[int, int], ...]:
        return tuple((axis, len(found)) for axis, found in sorted(self.positions.items()))


class _Finder:
    def __init__(self, module: Module, space: Space) -> None:
        self._module, self._space = module, space
        self._solution = Solution(space)
        self._order = {node: k for k, node in enumerate(module.graph)}
        self._holders: dict[int, list[Holder]] = collections.defaultdict(list)
        for axis, holder in space.holders:
            self._holders[space.find(axis)].append(holder)
        self._readings: dict[int, list[Reading]] = collections.defaultdict(list)
        for axis, reading in space.readings:
            self._readings[space.find(axis)].append(reading)
        self._frozen_positions: dict[int, list[tuple[int, str]]] = {}
        self._sources: dict[ir.Value, tuple[ir.Value, ...]] = {}
        self._namer = Namer(module)

    def groups(self) -> tuple[Group, ...]:
        units = self._units()
        cohorts: dict[tuple[tuple[int, int], ...], list[_Unit]] = collections.defaultdict(list)
        for unit in units:
            cohorts[unit.signature()].append(unit)
        drafts = [draft for members in cohorts.values() if (draft := self._draft(members))]
        drafts += [draft for axis in self._frozen_positions if (draft := self._frozen_draft(axis))]
        drafts.sort(key=lambda draft: self._rank(draft))
        return self._namer.named(drafts)

    def _rank(self, group: Group) -> tuple[int, int, str]:
        nodes = {p.node for p in group.weights if p.role is Role.PRODUCER} or {p.node for p in group.weights}
        first = min((self._namer.position(node) for node in nodes if node), default=0)
        return first, -group.units, group.kind

    def _units(self) -> list[_Unit]:
        units: dict[int, _Unit] = {}
        elements = self._solution.elements
        for axis in sorted(self._solution.axes()):
            if self._space.extent(axis) in (None, 0, 1):
                continue
            frozen: list[tuple[int, str]] = []
            for position, label in enumerate(self._solution.labels(axis)):
                if elements.is_frozen(label):
                    frozen.append((position, elements.reason(label[0])))
                    continue
                for element in label:
                    unit = units.setdefault(element, _Unit(element))
                    unit.positions.setdefault(axis, []).append(position)
            if frozen:
                self._frozen_positions[axis] = frozen
        return list(units.values())

    # -- groups that can be cut ------------------------------------------------------------------------------------

    def _draft(self, members: list[_Unit]) -> Group | None:
        axes = sorted(members[0].positions)
        members = sorted(members, key=lambda unit: [unit.positions[axis] for axis in axes])
        positions: dict[int, Positions] = {
            axis: tuple(tuple(unit.positions[axis]) for unit in members) for axis in axes
        }
        weights = self._weights(axes, positions.__getitem__)
        if not weights:
            return None
        sites, activations = self._sites(axes, positions.__getitem__), self._activations(axes, positions.__getitem__)
        frozen = "there is only one unit" if len(members) == 1 else ""
        frozen = frozen or ("" if sites or activations else "no operator reads these positions")
        return Group(
            name="",
            kind=self._kind(axes, weights),
            units=len(members),
            weights=weights,
            activations=activations,
            tower=None,
            multiple=1,
            frozen=frozen,
            sites=sites,
            counts=self._counts(positions),
        )

    def _frozen_draft(self, axis: int) -> Group | None:
        """What is frozen of an axis that some weight makes or reads, with the reason."""
        whats = {reading.what for reading in self._readings[axis]}
        if not whats & {Role.PRODUCER, Role.CONSUMER}:
            return None
        found = self._frozen_positions[axis]
        positions: Positions = tuple((position,) for position, _ in found)
        weights = self._weights([axis], lambda _: positions)
        if not weights:
            return None
        return Group(
            name="",
            kind=self._kind([axis], weights),
            units=len(positions),
            weights=weights,
            activations=self._activations([axis], lambda _: positions),
            tower=None,
            multiple=1,
            frozen=found[0][1],
        )

    # -- places ----------------------------------------------------------------------------------------------------

    def _weights(self, axes: Sequence[int], positions: Callable[[int], Positions]) -> tuple[Place, ...]:
        places: list[Place] = []
        for axis in axes:
            roles = self._roles(axis)
            for holder in self._holders[axis]:
                if not _is_weight(holder.value):
                    continue
                found = self._holder_roles(holder, axis, roles)
                for role, node in found:
                    places.append(Place(str(holder.value.name), holder.axis, positions(axis), role, node))
        unique = dict.fromkeys(places)
        return tuple(sorted(unique, key=lambda p: (self._namer.position(p.node), _ORDER[p.role], p.value, p.axis)))

    def _holder_roles(
        self, holder: Holder, axis: int, roles: dict[ir.Value, list[tuple[Role, str]]]
    ) -> list[tuple[Role, str]]:
        reader = None if holder.reader is None else node_name(holder.reader)
        found = [(role, node) for role, node in roles.get(holder.value, ()) if reader in (None, node)]
        main = [pair for pair in found if pair[0] is not Role.PARAMETER]
        if main or found:
            return main or found
        if reader is None:
            users = [use.node for use in holder.value.uses()]
            reader = node_name(users[0]) if users else ""
        return [(Role.PARAMETER, reader)]

    def _roles(self, axis: int) -> dict[ir.Value, list[tuple[Role, str]]]:
        """Roles of weights that this axis, or one it is a part of, gives them: those behind casts and the like too."""
        roles: dict[ir.Value, list[tuple[Role, str]]] = collections.defaultdict(list)
        for coupled in self._coupled(axis):
            for reading in self._readings[coupled]:
                if not isinstance(reading.what, Role):
                    continue
                operand = reading.node.inputs[reading.operand]
                for source in self._constants_behind(operand):
                    if coupled == axis or source is not operand:
                        roles[source].append((reading.what, node_name(reading.node)))
        return roles

    def _coupled(self, axis: int) -> list[int]:
        return [axis, *self._neighbours().get(axis, ())]

    def _neighbours(self) -> dict[int, set[int]]:
        found: dict[int, set[int]] | None = getattr(self, "_near", None)
        if found is None:
            found = collections.defaultdict(set)
            find = self._space.find
            pairs = [(p.whole, q) for p in self._space.products for q in p.parts]
            pairs += [(p.whole, p.piece) for p in self._space.parts]
            for left, right in pairs:
                found[find(left)].add(find(right))
                found[find(right)].add(find(left))
            self._near = found
        return found

    def _constants_behind(self, value: ir.Value | None) -> tuple[ir.Value, ...]:
        """The initializers and constants that a value follows from, if from nothing else."""
        if value is None:
            return ()
        if value not in self._sources:
            producer = value.producer()
            if _is_weight(value):
                self._sources[value] = (value,)
            elif producer is None or not producer.inputs:
                self._sources[value] = ()
            else:
                behind = [self._constants_behind(v) for v in producer.inputs if v is not None]
                self._sources[value] = tuple(v for found in behind for v in found) if all(behind) else ()
        return self._sources[value]

    def _activations(self, axes: Sequence[int], positions: Callable[[int], Positions]) -> tuple[Place, ...]:
        places = [
            (self._order.get(producer, 0) if (producer := holder.value.producer()) else -1, holder, axis)
            for axis in axes
            for holder in self._holders[axis]
            if not _is_weight(holder.value) and holder.value.name
        ]
        places.sort(key=lambda item: (item[0], str(item[1].value.name), item[1].axis))
        return tuple(
            Place(
                str(holder.value.name),
                holder.axis,
                positions(axis),
                Role.ACTIVATION,
                node_name(producer) if (producer := holder.value.producer()) else None,
            )
            for _, holder, axis in places
        )

    def _sites(self, axes: Sequence[int], positions: Callable[[int], Positions]) -> tuple[Site, ...]:
        sites = [
            Site(str(reading.node.outputs[0].name), reading.operand, reading.axis, reading.what, positions(axis))
            for axis in axes
            for reading in self._readings[axis]
            if isinstance(reading.what, Mixing)
        ]
        return tuple(dict.fromkeys(sites))

    def _counts(self, positions: dict[int, Positions]) -> tuple[Count, ...]:
        return tuple(
            Count(_output_name(node), attribute, positions[self._space.find(axis)])
            for axis, node, attribute in self._space.counts
            if self._space.find(axis) in positions
        )

    def _kind(self, axes: Sequence[int], weights: Sequence[Place]) -> str:
        kinds = {kind for axis, kind in self._space.kinds if self._space.find(axis) in axes}
        mixing = {reading.what for axis in axes for reading in self._readings[axis]}
        if Mixing.LOWEST in mixing and "head size" in kinds:
            return "positions"
        for kind in ("hidden units", "heads", "head size", "groups", "channels", "features"):
            if kind in kinds:
                return kind
        producers = {p.node for p in weights if p.role is Role.PRODUCER}
        return "features" if len(producers) != 1 else "neurons"


def node_name(node: ir.Node) -> str:
    """Name of a node, or of its first output where it has none."""
    return node.name or _output_name(node)


def _output_name(node: ir.Node) -> str:
    return next((str(output.name) for output in node.outputs if output.name), "")


def _is_weight(value: ir.Value) -> bool:
    producer = value.producer()
    if producer is not None:
        return producer.op_type == "Constant" and producer.domain == ""
    return value.is_initializer() and not value.is_graph_input()
