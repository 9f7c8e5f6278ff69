"""What a model costs as a function of how many units of each group are kept: multiply-accumulates or parameters.

The cost of a product is in proportion to each axis of its weight, so that two cuts at both ends of it multiply. Groups
on one axis are either side by side (what a concatenation joins), and then their shares of it add up, or nested (heads
and what is in each head), and then they multiply.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx_ir as ir

from mmopt.analysis import dims
from mmopt.analysis.cost import analyze_cost
from mmopt.analysis.shapes import ShapeFacts, infer_shapes
from mmopt.ir.module import Module
from mmopt.transforms.canonicalize.editing import tensor_of

if TYPE_CHECKING:
    from mmopt.analysis.axes import Group

Sizes = Mapping[str, int]
"""Units kept, by name of the group."""


class Term(Protocol):
    """A part of the cost."""

    @property
    def groups(self) -> frozenset[str]:
        """Names of the groups it depends on."""

    @property
    def tower(self) -> str | None:
        """The tower it belongs to, or None."""

    def value(self, sizes: Sizes) -> float:
        """The cost at these sizes."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """What share of an axis is kept.

    Attributes:
        size: Positions of the axis before the cut.
        parts: Positions of each part of it that groups lie on, and these groups with their units.
    """

    size: int
    parts: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]

    def share(self, sizes: Sizes) -> float:
        """The share kept at these sizes."""
        kept = self.size
        for positions, groups in self.parts:
            share = 1.0
            for name, units in groups:
                share *= sizes[name] / units
            kept -= round(positions * (1 - share))
        return kept / self.size


@dataclasses.dataclass(frozen=True)
class Product:
    """A cost in proportion to each of some axes.

    Attributes:
        base: The cost before the cut.
        axes: The axes that are cut.
        tower: The tower it belongs to, or None.
    """

    base: float
    axes: tuple[Axis, ...]
    tower: str | None

    @property
    def groups(self) -> frozenset[str]:
        """See :class:`Term`."""
        return frozenset(name for axis in self.axes for _, groups in axis.parts for name, _ in groups)

    def value(self, sizes: Sizes) -> float:
        """See :class:`Term`."""
        result = self.base
        for axis in self.axes:
            result *= axis.share(sizes)
        return result


class _Remembered:
    """A term whose values are computed once for the same sizes: a search asks for the same ones many times."""

    def __init__(self, term: Term) -> None:
        self._term, self.names, self.tower = term, tuple(sorted(term.groups)), term.tower
        self._values: dict[tuple[int, ...], float] = {}

    def value(self, sizes: Sizes) -> float:
        key = tuple([sizes[name] for name in self.names])
        if key not in self._values:
            self._values[key] = self._term.value(sizes)
        return self._values[key]


class CostModel:
    """The cost of a model: a sum of terms.

    Args:
        terms: Its parts.
        full: Units of each group before any cut.

    Attributes:
        full: As given.
    """

    def __init__(self, terms: Iterable[Term], full: Sizes) -> None:
        self._terms, self.full = [_Remembered(term) for term in terms], dict(full)
        self._by_group: dict[str, list[_Remembered]] = {name: [] for name in full}
        for term in self._terms:
            for name in term.names:
                self._by_group[name].append(term)

    def total(self, sizes: Sizes | None = None, tower: str | None = None) -> float:
        """The cost at these sizes (before any cut when None), of one tower when it is named."""
        at = self.full if sizes is None else sizes
        return sum(term.value(at) for term in self._terms if tower is None or term.tower == tower)

    def difference(self, sizes: Sizes, name: str, count: int, tower: str | None = None) -> float:
        """What is saved when ``count`` units are kept of one group in place of those in ``sizes``."""
        changed = {**sizes, name: count}
        terms = (term for term in self._by_group[name] if tower is None or term.tower == tower)
        return sum(term.value(sizes) - term.value(changed) for term in terms)

    def towers(self) -> list[str]:
        """Towers that terms belong to, in order."""
        return list(dict.fromkeys(term.tower for term in self._terms if term.tower is not None))


class Layout:
    """Where groups lie, axis by axis.

    Args:
        module: The module.
        groups: Groups that can be cut.
    """

    def __init__(self, module: Module, groups: Sequence[Group]) -> None:
        self.facts: ShapeFacts = infer_shapes(module.model)
        self._found: dict[tuple[str, int], list[tuple[str, int, frozenset[int]]]] = {}
        for group in groups:
            for place in (*group.weights, *group.activations):
                covered = frozenset(index for unit in place.positions for index in unit)
                entry = (group.name, group.units, covered)
                listed = self._found.setdefault((place.value, place.axis), [])
                if entry not in listed:
                    listed.append(entry)

    def axis(self, value: str, axis: int, size: int) -> Axis | None:
        """How one axis of a value is cut; None when it is not."""
        listed = self._found.get((value, axis))
        if not listed:
            return None
        parts: dict[frozenset[int], list[tuple[str, int]]] = {}
        for name, units, covered in listed:
            key = next((known for known in parts if known & covered), covered)
            members = parts.pop(key, [])
            if (name, units) not in members:
                members.append((name, units))
            parts[key | covered] = members
        return Axis(size, tuple((len(covered), tuple(members)) for covered, members in parts.items()))

    def axes(self, value: ir.Value, shape: Sequence[int]) -> tuple[Axis, ...]:
        """How all axes of a value of known shape are cut."""
        found = (self.axis(str(value.name), axis, size) for axis, size in enumerate(shape))
        return tuple(axis for axis in found if axis is not None)


def parameters(module: Module, groups: Sequence[Group], owner: Mapping[str, str]) -> CostModel:
    """The number of weights.

    Args:
        module: The module.
        groups: Groups that can be cut.
        owner: Towers by name of the node.
    """
    layout = Layout(module, groups)
    terms: list[Term] = []
    for value in module.graph.initializers.values():
        tensor = tensor_of(value)
        if tensor is None or not tensor.dtype.is_floating_point():
            continue
        towers = {owner.get(str(use.node.name)) for use in value.uses()}
        tower = towers.pop() if len(towers) == 1 else None
        terms.append(Product(float(tensor.size), layout.axes(value, tensor.shape.numpy()), tower))
    return CostModel(terms, {group.name: group.units for group in groups})


def macs(
    module: Module, groups: Sequence[Group], owner: Mapping[str, str], binding: Mapping[str, int] | None = None
) -> CostModel:
    """Multiply-accumulates.

    Args:
        module: The module.
        groups: Groups that can be cut.
        owner: Towers by name of the node.
        binding: Numbers for symbolic dimensions; what is not in it counts as 1.
    """
    layout = Layout(module, groups)
    cost = analyze_cost(module)
    terms: list[Term] = []
    for node in module.graph:
        found = cost.nodes.get(str(node.name))
        if found is None or found.macs is None:
            continue
        base = float(dims.evaluate(found.macs, {**dict.fromkeys(dims.symbols(found.macs), 1), **(binding or {})}))
        if base:
            terms += _products(node, base, layout, owner.get(str(node.name)))
    return CostModel(terms, {group.name: group.units for group in groups})


def _products(node: ir.Node, base: float, layout: Layout, tower: str | None) -> list[Term]:
    weights = [
        (value, tensor) for value in node.inputs if (tensor := tensor_of(value)) is not None and value is not None
    ]
    matrices = [
        (value, tensor) for value, tensor in weights if len(tensor.shape) >= 2 and tensor.dtype.is_floating_point()
    ]
    if matrices:
        # Of a layer with several matrices (a recurrent one), each takes its part.
        whole = sum(tensor.size for _, tensor in matrices)
        return [
            Product(base * tensor.size / whole, layout.axes(value, tensor.shape.numpy()), tower)
            for value, tensor in matrices
        ]
    return [Product(base, tuple(_between_activations(node, layout)), tower)]


def _between_activations(node: ir.Node, layout: Layout) -> Iterable[Axis]:
    """Axes of a product of two tensors: those of its result, and the one that is summed over."""
    result, data = node.outputs[0], node.inputs[0]
    for value, of_interest in ((result, None), (data, -1)):
        shape = None if value is None else layout.facts.shape(value)
        if value is None or shape is None:
            continue
        for axis, size in enumerate(shape):
            if (of_interest is None or axis == len(shape) + of_interest) and isinstance(size, int):
                found = layout.axis(str(value.name), axis, size)
                if found is not None:
                    yield found


def owners(module: Module) -> dict[str, str]:
    """The tower of each node, by name; projectors and heads of one tower count to it."""
    from mmopt.analysis.towers import analyze_towers

    report = analyze_towers(module)
    found: dict[str, str] = {}
    for tower in report.towers:
        found.update(dict.fromkeys(tower.part.nodes, tower.name))
    for projector in report.projectors:
        found.update(dict.fromkeys(projector.part.nodes, projector.tower))
    for head in report.heads:
        if len(head.towers) == 1:
            found.update((name, head.towers[0]) for name in head.part.nodes if name not in found)
    return found


def binding_of(module: Module, samples: Mapping[str, Any] | None) -> dict[str, int]:
    """Numbers for symbolic dimensions as calibration samples have them; the first dimension of inputs is 1."""
    found: dict[str, int] = {}
    for value in module.graph.inputs:
        if value.shape is None or samples is None or str(value.name) not in samples:
            continue
        sample = np.asarray(samples[str(value.name)]).shape[1:]
        rest = list(value.shape)
        sizes = sample if len(sample) == len(rest) else (1, *sample)
        for dim, size in zip(rest, sizes, strict=False):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                found.setdefault(dim.value, int(size))
        if rest and isinstance(rest[0], ir.SymbolicDim) and rest[0].value is not None:
            found[rest[0].value] = 1
    return found
