"""What the analysis of axes reports: groups of coupled axes, unit by unit, as plain data."""

from __future__ import annotations

import dataclasses
import enum

Positions = tuple[tuple[int, ...], ...]
"""Indices on one axis, unit by unit. Places on equal axes share the object."""


class Role(enum.Enum):
    """What an axis has to do with the units that lie on it."""

    PRODUCER = "producer"
    """A weight whose slice computes the unit."""

    CONSUMER = "consumer"
    """A weight whose slice reads the unit."""

    PARAMETER = "parameter"
    """Something per unit that goes along: a bias, a scale, a statistic, a depthwise filter, a position's code."""

    ACTIVATION = "activation"
    """A tensor that the graph computes."""


class Mixing(enum.Enum):
    """How an operator lets units of one axis influence anything else, and so how a unit is masked there."""

    ZERO = "zero"
    """Products or sums over the axis: a unit that is zero says nothing."""

    MEAN = "mean"
    """A mean: a unit that is zero still counts, unless the divisor is corrected."""

    LOWEST = "lowest"
    """A maximum, or exponentials that are added up: minus infinity says nothing."""

    HIGHEST = "highest"
    """A minimum."""

    ONE = "one"
    """A product of all units."""

    STATISTICS = "statistics"
    """A normalization that takes mean and variance over the axis."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a group's units lie on one axis of one value.

    Attributes:
        value: Name of an initializer (or of a ``Constant``'s output), or of a tensor of the main graph.
        axis: The axis.
        positions: The indices on this axis of every unit, each ascending.
        role: What the axis has to do with the units.
        node: Name (of the first output, where it has none) of the operator that reads the initializer in this role, or
            that makes the tensor.
    """

    value: str
    axis: int
    positions: Positions
    role: Role
    node: str | None


@dataclasses.dataclass(frozen=True)
class Site:
    """An operand through which units of the group influence what lies outside it.

    Attributes:
        output: Name of the operator's first output.
        operand: Position of the input.
        axis: Axis of that input.
        how: How the operator mixes the units.
        positions: As in :class:`Place`.
    """

    output: str
    operand: int
    axis: int
    how: Mixing
    positions: Positions


@dataclasses.dataclass(frozen=True)
class Count:
    """An attribute that counts what the group's units are made of.

    Attributes:
        output: Name of the operator's first output.
        attribute: Name of the attribute: ``group``, ``hidden_size``, ``q_num_heads``, …
        positions: Which of the things counted belong to each unit, unit by unit.
    """

    output: str
    attribute: str
    positions: Positions


@dataclasses.dataclass(frozen=True)
class Group:
    """Coupled axes: to cut a unit is to cut its positions at every place.

    Attributes:
        name: Stable and readable: the tower and the layer that makes the units, ``text/encoder.layers.3.mlp.fc1``.
        kind: ``channels``, ``neurons``, ``heads``, ``head size``, ``hidden units``, ``features``, ``groups`` (of a
            convolution) or ``positions`` (of learned latents).
        units: How many there are.
        weights: The places on weights.
        activations: The places on tensors that the graph computes.
        tower: Name of the tower that all places belong to; ``None`` when several towers are tied, or none is known.
        multiple: How many units at a time keep every operator legal.
        frozen: Why nothing can be cut here; "" when it can.
        sites: Where units influence what lies outside; what a mask has to close.
        counts: Attributes that change with the number of units.
    """

    name: str
    kind: str
    units: int
    weights: tuple[Place, ...]
    activations: tuple[Place, ...]
    tower: str | None
    multiple: int
    frozen: str
    sites: tuple[Site, ...] = ()
    counts: tuple[Count, ...] = ()
