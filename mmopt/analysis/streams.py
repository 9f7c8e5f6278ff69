"""Which inputs a value is made of: labels that flow forward over the flat graph.

Every value gets two sets of labels, as bit masks. *Content* says whose data the value carries: an embedding carries
the ids it was looked up for. *Control* says what else decided about it: masks, comparisons, indices, conditions. A sum
of two contents is a fusion; a content that was masked by something else is not. Shapes carry nothing: the batch size
of an image that sizes a tensor of the text is neither. Only where the data decides about a size (how many tokens are
places for image features) does the size carry control on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from mmopt.analysis import operators as ops
from mmopt.analysis.dataflow import ABSENT, FlatGraph, FlatNode


@dataclasses.dataclass(frozen=True)
class Streams:
    """Labels of every value of a flat graph.

    Attributes:
        content: Bit mask of whose data each value carries.
        control: Bit mask of what else steered each value.
        extent: Bit mask of whose data decided about each value's shape.
    """

    content: list[int]
    control: list[int]
    extent: list[int]

    def reach(self, value: int) -> int:
        """Everything the value depends on, apart from shapes."""
        return 0 if value == ABSENT else self.content[value] | self.control[value]


def follow(graph: FlatGraph, content: Mapping[int, int], control: Mapping[int, int]) -> Streams:
    """Let labels flow from the graph's inputs to all values.

    Args:
        graph: The flat graph.
        content: Label bits that start as content, by value number.
        control: Label bits that start as control, by value number.

    Returns:
        The labels. Linear in the number of nodes; loops are walked again until their carried values settle, at most
        once per label.
    """
    streams = Streams(*([0] * len(graph.values) for _ in range(3)))
    for value, bits in content.items():
        streams.content[value] |= bits
    for value, bits in control.items():
        streams.control[value] |= bits
    loops = any(node.op == "Merge" for node in graph.nodes)
    while _sweep(graph, streams) and loops:
        pass
    return streams


def data_inputs(node: FlatNode, streams: Streams) -> list[int]:
    """The inputs whose content the node hands on."""
    return [v for v, steers in _inputs(node, streams) if not steers]


def _sweep(graph: FlatGraph, streams: Streams) -> bool:
    changed = False
    for node in graph.nodes:
        extent = _extent(node, streams)
        content, control = _transfer(graph, node, streams, extent)
        for value in node.outputs:
            before = (streams.content[value], streams.control[value], streams.extent[value])
            streams.content[value] |= content
            streams.control[value] |= control
            streams.extent[value] |= extent
            changed |= before != (streams.content[value], streams.control[value], streams.extent[value])
    return changed


def _extent(node: FlatNode, streams: Streams) -> int:
    """Whose data decides about the shape of what a node makes."""
    mask = 0
    inputs = node.inputs[:1] if node.op in ops.SCATTERS else node.inputs
    for position, value in enumerate(inputs):
        if value != ABSENT:
            sizes = node.op in ops.SIZED_BY_DATA or (
                node.op in ops.SIZED_BY_STEERING and position in ops.STEERING_INPUTS[node.op]
            )
            mask |= streams.extent[value] | (streams.reach(value) if sizes else 0)
    return mask


def _inputs(node: FlatNode, streams: Streams) -> list[tuple[int, bool]]:
    """The inputs that are given, each with whether it only steers."""
    steering = ops.STEERING_INPUTS.get(node.op, frozenset())
    if node.op in ops.GATHERS and node.inputs and streams.content[node.inputs[0]]:
        steering = frozenset({1})
    if node.op == "Collect":
        steering = frozenset(range(len(node.inputs) - 1))
    return [(v, k in steering) for k, v in enumerate(node.inputs) if v != ABSENT]


def _transfer(graph: FlatGraph, node: FlatNode, streams: Streams, extent: int) -> tuple[int, int]:
    if node.op in ops.DEAD:
        return 0, extent
    content = control = 0
    for value, steers in _inputs(node, streams):
        control |= streams.control[value]
        if steers:
            control |= streams.content[value]
        else:
            content |= streams.content[value]
    if node.op in ops.DECISIONS and not _is_one_hot(graph, node, streams):
        return 0, content | control
    return content, control


def _is_one_hot(graph: FlatGraph, node: FlatNode, streams: Streams) -> bool:
    """``Equal(ids, [0, 1, 2, …])`` spells out ids for a product with a table; that is data, not a decision."""
    fixed = [v for v in node.inputs if v != ABSENT and not streams.reach(v)]
    if node.op != "Equal" or len(fixed) != 1:
        return False
    source = graph.back_through(fixed[0], ops.LAYOUT)
    maker, tensor = graph.made_by(source), graph.constant(source)
    if tensor is None:
        return maker is not None and maker.op == "Range"
    return tensor.size > 1 and np.unique(tensor.numpy()).size == tensor.size
