"""Convolutions, pooling and what moves between channels and space."""

from __future__ import annotations

import onnx_ir as ir

from mmopt.analysis.axes.group import Mixing, Role
from mmopt.analysis.axes.rules.registry import axis_rule, is_constant, present
from mmopt.analysis.axes.space import Space

_SPACE = "it is a place in space"


def _freeze_space(node: ir.Node, space: Space, *operands: int) -> None:
    for operand in operands:
        if present(node, operand):
            space.freeze_all(space.operand(node, operand)[2:], _SPACE)
    for output in node.outputs:
        if output.name:
            space.freeze_all(space.of(output)[2:], _SPACE)


@axis_rule("Conv", "ConvInteger")
def conv(node: ir.Node, space: Space) -> None:
    """Weights ``[out, in / groups, …]``. With groups, both channel axes are ``groups × channels of a group``."""
    x, w, y = space.operand(node, 0), space.operand(node, 1), space.of(node.outputs[0])
    groups = node.attributes.get_int("group", 1)
    _freeze_space(node, space, 0, 1)
    space.same(x[0], y[0])
    space.same(w[0], y[1])
    depthwise = groups > 1 and space.size(w[1]) == 1 and space.extent(w[0]) == groups
    if groups == 1:
        space.same(x[1], w[1])
    else:
        shared = _grouped(node, space, groups, ((x[1], w[1]), (y[1], None)))
        space.kind(shared, "channels" if depthwise else "groups")
    if is_constant(node.inputs[1]):
        space.reads(node, 1, 0, Role.PARAMETER if depthwise else Role.PRODUCER)
        space.reads(node, 1, 1, Role.CONSUMER)
    space.kind(y[1], "channels")
    space.reads(node, 1, 1, Mixing.ZERO)
    if node.op_type == "Conv" and present(node, 2):
        space.same(space.operand(node, 2)[0], y[1])
        space.reads(node, 2, 0, Role.PARAMETER)


def _grouped(node: ir.Node, space: Space, groups: int, sides: tuple[tuple[int, int | None], ...]) -> int:
    """Say that channel axes are ``groups × members``; members that no tensor has an axis for get one of their own."""
    shared = space.new(groups)
    for whole, given in sides:
        extent = space.extent(whole)
        member = space.new(extent // groups if extent is not None else None) if given is None else given
        space.product(whole, (shared, member))
    space.count(shared, node, "group")
    return shared


@axis_rule("ConvTranspose")
def conv_transpose(node: ir.Node, space: Space) -> None:
    """Weights ``[in, out / groups, …]``."""
    x, w, y = space.operand(node, 0), space.operand(node, 1), space.of(node.outputs[0])
    groups = node.attributes.get_int("group", 1)
    _freeze_space(node, space, 0, 1)
    space.same(x[0], y[0])
    space.same(x[1], w[0])
    if groups == 1:
        space.same(w[1], y[1])
    else:
        space.kind(_grouped(node, space, groups, ((w[0], None), (y[1], w[1]))), "groups")
    if is_constant(node.inputs[1]):
        space.reads(node, 1, 1, Role.PRODUCER)
        space.reads(node, 1, 0, Role.CONSUMER)
    space.kind(y[1], "channels")
    space.reads(node, 1, 0, Mixing.ZERO)
    if present(node, 2):
        space.same(space.operand(node, 2)[0], y[1])
        space.reads(node, 2, 0, Role.PARAMETER)


@axis_rule(
    "AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool", "MaxRoiPool", "MaxUnpool"
)
def pool(node: ir.Node, space: Space) -> None:
    """Channels pass. Indices that MaxPool gives count through all channels."""
    x = space.operand(node, 0)
    _freeze_space(node, space, 0)
    if node.op_type in ("MaxRoiPool", "MaxUnpool") or sum(bool(o.name and o.uses()) for o in node.outputs) > 1:
        space.unknown(node, f"{node.op_type} counts places through all channels")
        return
    space.same_all(x[:2], space.of(node.outputs[0])[:2])


@axis_rule("Resize", "Upsample", "GridSample", "AffineGrid")
def resample(node: ir.Node, space: Space) -> None:
    """Batch and channels pass where they keep their size; everything else is space."""
    x, y = space.operand(node, 0), space.of(node.outputs[0])
    if node.op_type == "AffineGrid":
        space.unknown(node, "AffineGrid makes places in space")
        return
    for position, (a, b) in enumerate(zip(x, y, strict=True)):
        if position < 2 and space.size(a) == space.size(b) and space.size(a) is not None:
            space.same(a, b)
        else:
            space.freeze_all((a, b), _SPACE)
    for index in range(1, len(node.inputs)):
        if node.op_type == "GridSample" and present(node, index):
            space.freeze_all(space.operand(node, index), _SPACE)


@axis_rule("DepthToSpace", "SpaceToDepth")
def depth_to_space(node: ir.Node, space: Space) -> None:
    """``blocks × blocks × channels`` on the deep side, or channels first in mode CRD."""
    x, y = space.operand(node, 0), space.of(node.outputs[0])
    block = node.attributes.get_int("blocksize", 1)
    _freeze_space(node, space, 0)
    space.same(x[0], y[0])
    deep, flat = (x[1], y[1]) if node.op_type == "DepthToSpace" else (y[1], x[1])
    blocks = space.new(block * block)
    space.freeze(blocks, _SPACE)
    channels_first = node.attributes.get_string("mode", "DCR") == "CRD"
    space.product(deep, (flat, blocks) if channels_first else (blocks, flat))


@axis_rule("LRN")
def local_response(node: ir.Node, space: Space) -> None:
    """Neighbouring channels act on each other."""
    x, y = space.operand(node, 0), space.of(node.outputs[0])
    space.same_all(x, y)
    space.freeze(x[1], "LRN normalizes by neighbouring channels")
