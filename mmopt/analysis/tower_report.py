"""What tower discovery reports: plain data, with a dictionary form for JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from mmopt.analysis.dims import Size
from mmopt.analysis.modalities import InputRole
from mmopt.ir.modality import Modality

SCHEMA_VERSION = 1

Place = tuple[int, int]
"""A value of the main graph: (position of the node, position of its output), or (-1, position of the input)."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A set of nodes and what it costs.

    Attributes:
        nodes: Names of the nodes in order of execution; nodes inside bodies have the path of what they lie in.
        parameters: Number of weights these nodes use; a weight used by two parts counts in both.
        macs: Multiply-accumulates; ``None`` when a shape is unknown, an expression when a dimension is symbolic.
    """

    nodes: tuple[str, ...]
    parameters: int
    macs: Size | None


@dataclasses.dataclass(frozen=True)
class Tower:
    """What processes one group of inputs and nothing else.

    Attributes:
        name: Label of the group: "text", "image 2", "modality 1".
        modality: Kind of data.
        inputs: Inputs that are data of the group or belong to it: masks, positions, lengths.
        auxiliary: States and scalars that steer this tower alone.
        part: Its nodes, without the projector.
        outputs: Names of the values at which the tower ends and the rest takes over.
        cut: The same values by place; empty when they lie inside a body.
        reason: Why these inputs make a tower.
    """

    name: str
    modality: Modality
    inputs: tuple[str, ...]
    auxiliary: tuple[str, ...]
    part: Part
    outputs: tuple[str, ...]
    cut: tuple[Place, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Projector:
    """Linear layers (with norms and activations) between a tower and the fusion.

    Attributes:
        tower: Name of the tower.
        part: Its nodes.
        reason: What was seen.
    """

    tower: str
    part: Part
    reason: str


@dataclasses.dataclass(frozen=True)
class FusionPoint:
    """Where streams come together.

    Attributes:
        kind: How:

            * ``concat``: put side by side, along features or along the sequence.
            * ``add``: added (or subtracted, averaged) element by element, directly or as a stack that is summed.
            * ``weighted``: added after each was scaled by a constant share.
            * ``product``: multiplied element by element (alignment), or every element with every other.
            * ``similarity``: inner products or distances of whole vectors.
            * ``attention``: shares computed from the data weigh it: cross attention, or a gate over the streams.
            * ``scatter``: elements of one stream are put at chosen places of another.
            * ``modulation``: one stream scales and shifts the other.
            * ``max``: the larger element is taken.
            * ``state``: one stream is the initial state of a recurrence over the other.
            * ``other``: an operator that says nothing more.
        node: Name of the node where they meet.
        nodes: Names of all nodes that belong to it.
        towers: Names of the towers joined.
        depth: How many fusion points came before it, one after the other.
        reason: What was seen.
    """

    kind: str
    node: str
    nodes: tuple[str, ...]
    towers: tuple[str, ...]
    depth: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Head:
    """What makes an output of the joined (or of a single tower's) features.

    Attributes:
        outputs: Names of outputs; several when a part is common to them.
        towers: Names of the towers it works for: one for the head of a tower in decision-level fusion.
        part: Its nodes; none when an output is a feature as it is.
        reason: What was seen.
    """

    outputs: tuple[str, ...]
    towers: tuple[str, ...]
    part: Part
    reason: str


@dataclasses.dataclass(frozen=True)
class SharedWeight:
    """A weight that several towers use.

    Attributes:
        names: Names of the initializer, or of several with equal contents.
        towers: Names of the towers.
        parameters: Number of elements.
    """

    names: tuple[str, ...]
    towers: tuple[str, ...]
    parameters: int


@dataclasses.dataclass(frozen=True)
class TowerReport:
    """The structure of a multimodal model.

    Attributes:
        inputs: Role of every input by name.
        towers: In the order of the inputs.
        projectors: In the order of the towers.
        fusions: In order of execution.
        heads: In the order of the outputs.
        shared: Weights that two towers use.
        level: Where the towers are joined: ``feature``, ``decision`` (after their heads), ``deep`` (at several depths),
            or "" when there is one tower.
        trunk: What lies between the first fusion and the heads, the fusion points included.
        uncut: Why the model cannot be cut into entry points; "" when it can.
    """

    inputs: dict[str, InputRole]
    towers: tuple[Tower, ...]
    projectors: tuple[Projector, ...]
    fusions: tuple[FusionPoint, ...]
    heads: tuple[Head, ...]
    shared: tuple[SharedWeight, ...]
    level: str
    trunk: Part
    uncut: str

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data, with ``schema_version``; symbolic figures are strings."""
        return {"schema_version": SCHEMA_VERSION, **_plain(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, Modality):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (int, float, str)) else str(value)
