"""Normalizations: parameters go along with their channels, and statistics are taken over what is kept."""

from __future__ import annotations

import onnx_ir as ir

from mmopt.analysis.axes.group import Mixing, Role
from mmopt.analysis.axes.rules.registry import axis_rule, present
from mmopt.analysis.axes.space import Space


@axis_rule("BatchNormalization", "InstanceNormalization")
def per_channel(node: ir.Node, space: Space) -> None:
    """One parameter of each kind per channel; channels do not act on each other.

    Group normalization is often spelled as an InstanceNormalization of ``[batch, groups, channels · places]``.
    """
    x, y = space.operand(node, 0), space.of(node.outputs[0])
    space.same_all(x, y)
    for index in range(1, len(node.inputs)):
        if present(node, index):
            space.same(space.operand(node, index)[0], x[1])
            space.reads(node, index, 0, Role.PARAMETER)
    for output in node.outputs[1:]:
        if output.name:
            space.same(space.of(output)[0], x[1])
    if node.op_type == "InstanceNormalization":
        for axis in range(2, len(x)):
            space.reads(node, 0, axis, Mixing.STATISTICS)


@axis_rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def layer_normalization(node: ir.Node, space: Space) -> None:
    """Statistics over all axes from ``axis`` on."""
    x = space.operand(node, 0)
    space.same_all(x, space.of(node.outputs[0]))
    first = node.attributes.get_int("axis", -1) % len(x)
    for axis in range(first, len(x)):
        space.reads(node, 0, axis, Mixing.STATISTICS)
        space.kind(x[axis], "features")
    for index in range(1, len(node.inputs)):
        if present(node, index):
            operand = space.operand(node, index)
            space.broadcast(operand, x)
            for axis in range(len(operand)):
                space.reads(node, index, axis, Role.PARAMETER)
    for output in node.outputs[1:]:
        if output.name:
            space.same_all(x[:first], space.of(output)[:first])


@axis_rule("GroupNormalization")
def group_normalization(node: ir.Node, space: Space) -> None:
    """Channels are ``groups × channels of a group``, with statistics over the latter and space."""
    x, y = space.operand(node, 0), space.of(node.outputs[0])
    groups = node.attributes.get_int("num_groups", 1)
    space.same_all(x, y)
    shared, extent = space.new(groups), space.extent(x[1])
    space.product(x[1], (shared, space.new(extent // groups if extent is not None else None)))
    space.count(shared, node, "num_groups")
    space.reads(node, 0, 1, Mixing.STATISTICS)
    for index in (1, 2):
        operand = space.operand(node, index)
        space.same(operand[0], shared if space.extent(operand[0]) == groups else x[1])
        space.reads(node, index, 0, Role.PARAMETER)


@axis_rule("LpNormalization")
def lp_normalization(node: ir.Node, space: Space) -> None:
    """Divided by the norm along an axis."""
    x = space.operand(node, 0)
    space.same_all(x, space.of(node.outputs[0]))
    space.reads(node, 0, node.attributes.get_int("axis", -1) % len(x), Mixing.ZERO)


@axis_rule("MeanVarianceNormalization")
def mean_variance(node: ir.Node, space: Space) -> None:
    """Statistics over ``axes``, which are not cut."""
    x = space.operand(node, 0)
    space.same_all(x, space.of(node.outputs[0]))
    axes = node.attributes.get("axes")
    for axis in [0, 2, 3] if axes is None else axes.as_ints():
        space.freeze(x[axis], "MeanVarianceNormalization takes statistics over it")


@axis_rule("Softmax", "LogSoftmax")
def softmax(node: ir.Node, space: Space) -> None:
    """Shares along an axis; what is left out gets none."""
    x = space.operand(node, 0)
    space.same_all(x, space.of(node.outputs[0]))
    space.reads(node, 0, node.attributes.get_int("axis", -1) % len(x), Mixing.LOWEST)


@axis_rule("Hardmax", "CumSum", "CumProd")
def ordered(node: ir.Node, space: Space) -> None:
    """What stands at a position depends on those before it or on who is largest."""
    x = space.operand(node, 0)
    space.same_all(x, space.of(node.outputs[0]))
    given = space.integers(node, 1) if node.op_type.startswith("Cum") else [node.attributes.get_int("axis", -1)]
    reason = f"{node.op_type} runs along it"
    space.freeze_all(x if given is None else [x[given[0]]], reason)
