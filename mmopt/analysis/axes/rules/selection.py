"""Operators that put axes together, take parts of them, or pick positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mmopt.analysis.axes.group import Role
from mmopt.analysis.axes.rules.registry import axis_rule, is_constant, present
from mmopt.analysis.axes.space import Space


@axis_rule("Constant", "Shape", "Size", "Range", "EyeLike", "NonZero", "RandomNormal", "RandomUniform")
def source(node: ir.Node, space: Space) -> None:
    """Results that have nothing to do with the axes of operands, or are sizes, which are followed elsewhere."""
    if node.op_type in ("Shape", "Size"):
        space.freeze_all(space.of(node.outputs[0]), f"{node.op_type} makes it")
    elif node.op_type != "Constant":
        space.unknown(node, f"{node.op_type} makes it")


@axis_rule("ConstantOfShape")
def constant_of_shape(node: ir.Node, space: Space) -> None:
    """Axes of its own, whatever their size."""
    space.of(node.outputs[0])


@axis_rule("Concat")
def concat(node: ir.Node, space: Space) -> None:
    """The axis is one operand's after the other."""
    y = space.of(node.outputs[0])
    axis = node.attributes.get_int("axis", 0) % len(y)
    pieces = []
    for index in range(len(node.inputs)):
        x = space.operand(node, index)
        pieces.append(x[axis])
        space.same_all(x[:axis] + x[axis + 1 :], y[:axis] + y[axis + 1 :])
        space.reads(node, index, axis, Role.PARAMETER)
    _side_by_side(y[axis], pieces, space)


@axis_rule("Split")
def split(node: ir.Node, space: Space) -> None:
    """The axis is one result's after the other."""
    x = space.operand(node, 0)
    axis = node.attributes.get_int("axis", 0) % len(x)
    pieces = []
    for output in node.outputs:
        y = space.of(output)
        pieces.append(y[axis])
        space.same_all(x[:axis] + x[axis + 1 :], y[:axis] + y[axis + 1 :])
    _side_by_side(x[axis], pieces, space)


def _side_by_side(whole: int, pieces: Sequence[int], space: Space) -> None:
    extents = [space.extent(piece) for piece in pieces]
    if space.extent(whole) is None or any(extent is None for extent in extents):
        space.freeze_all((whole, *pieces), "it is put together from parts whose sizes are not fixed")
        return
    start = 0
    for piece, extent in zip(pieces, extents, strict=True):
        stop = start + (extent or 0)
        space.part(whole, range(start, stop), piece)
        start = stop


@axis_rule("Slice")
def slice_(node: ir.Node, space: Space) -> None:
    """Constant bounds pick positions; axes that are not named pass."""
    x, y = space.operand(node, 0), space.of(node.outputs[0])
    bounds = slice_bounds(node, space, len(x))
    for axis, (a, b) in enumerate(zip(x, y, strict=True)):
        extent = space.extent(a)
        if bounds is not None and axis not in bounds:
            space.same(a, b)
        elif bounds is None or extent is None or bounds[axis] is None:
            space.freeze_all((a, b), "a Slice cuts it at places that are computed")
        else:
            start, stop, step = bounds[axis] or (0, 0, 1)
            space.part(a, range(extent)[start:stop:step], b)


def slice_bounds(node: ir.Node, space: Space, rank: int) -> dict[int, tuple[int, int | None, int] | None] | None:
    """Start, stop and step by axis, as Python takes them; ``None`` for what is computed."""
    steps: list[int] | None
    if "starts" in node.attributes:
        starts, ends = (list(node.attributes[k].as_ints()) for k in ("starts", "ends"))
        axes = list(node.attributes["axes"].as_ints()) if "axes" in node.attributes else list(range(len(starts)))
        steps = [1] * len(starts)
    else:
        named = space.integers(node, 3) if present(node, 3) else None
        counted = [space.facts.shape(v) for v in node.inputs[1:2] if v is not None]
        count = counted[0][0] if counted and counted[0] else 0
        axes = named if named is not None else list(range(count if isinstance(count, int) else 0))
        if present(node, 3) and named is None:
            return None
        found = space.integers(node, 1), space.integers(node, 2)
        steps = space.integers(node, 4) if present(node, 4) else [1] * len(axes)
        if found[0] is None or found[1] is None or steps is None:
            return {axis % rank: None for axis in axes}
        starts, ends = found[0], found[1]
    result: dict[int, tuple[int, int | None, int] | None] = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        backwards = step < 0 and end < -(1 << 30)
        result[axis % rank] = (start, None if backwards else end, step)
    return result


@axis_rule("Pad")
def pad(node: ir.Node, space: Space) -> None:
    """Positions of constant padding are positions like others; other kinds of padding look at neighbours."""
    x, y = space.operand(node, 0), space.of(node.outputs[0])
    amounts = pad_amounts(node, space, len(x))
    constant = node.attributes.get_string("mode", "constant") == "constant"
    for axis, (a, b) in enumerate(zip(x, y, strict=True)):
        before, after = (amounts[axis], amounts[axis + len(x)]) if amounts is not None else (None, None)
        extent = space.extent(a)
        if before == after == 0:
            space.same(a, b)
        elif before is None or after is None or extent is None or not constant or min(before, after) < 0:
            space.freeze_all((a, b), "it is padded")
        else:
            space.part(b, range(before, before + extent), a)


def pad_amounts(node: ir.Node, space: Space, rank: int) -> list[int] | None:
    """Padding before every axis, then after every axis; ``None`` when it is computed."""
    attribute = node.attributes.get("pads")
    given = list(attribute.as_ints()) if attribute is not None else space.integers(node, 1)
    if given is None or not present(node, 3):
        return given if given is None or len(given) == 2 * rank else None
    axes = space.integers(node, 3)
    if axes is None:
        return None
    amounts = [0] * (2 * rank)
    for k, axis in enumerate(axes):
        amounts[axis % rank] = given[k]
        amounts[axis % rank + rank] = given[k + len(axes)]
    return amounts


@axis_rule("Gather")
def gather(node: ir.Node, space: Space) -> None:
    """Constant indices pick positions; others look up rows of a table, whose columns are features."""
    data, indices, y = space.operand(node, 0), space.operand(node, 1), space.of(node.outputs[0])
    axis = node.attributes.get_int("axis", 0) % len(data)
    space.same_all(data[:axis], y[:axis])
    space.same_all(data[axis + 1 :], y[axis + len(indices) :])
    picked = y[axis : axis + len(indices)]
    chosen = _constant_indices(node, space.extent(data[axis]))
    if chosen is None:
        space.freeze(data[axis], "the data look positions up on it")
        space.same_all(indices, picked)
        _table_roles(node, space, data, axis)
    elif len(indices) == 1:
        space.freeze_all(indices, "it lists positions")
        space.part(data[axis], chosen, picked[0])
    else:
        space.freeze(data[axis], "a Gather picks it", chosen)
        space.freeze_all((*indices, *picked), "a Gather picks it")


def _constant_indices(node: ir.Node, extent: int | None) -> list[int] | None:
    value = node.inputs[1]
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or extent is None or tensor.size > 1 << 16:
        return None
    return [int(i) % extent for i in np.asarray(tensor.numpy()).reshape(-1)]


def _table_roles(node: ir.Node, space: Space, data: list[int], axis: int) -> None:
    if is_constant(node.inputs[0]):
        for other in range(len(data)):
            if other != axis:
                space.reads(node, 0, other, Role.PRODUCER)
                space.kind(data[other], "features")


@axis_rule("GatherElements", "ScatterElements", "GatherND", "ScatterND")
def indexed(node: ir.Node, space: Space) -> None:
    """Axes that the indices address are not cut; for the forms for whole slices the others pass."""
    if node.op_type in ("GatherElements", "ScatterElements") or node.attributes.get_int("batch_dims", 0) != 0:
        space.unknown(node, f"{node.op_type} addresses single elements")
        return
    data, indices, y = space.operand(node, 0), space.operand(node, 1), space.of(node.outputs[0])
    depth = space.extent(indices[-1])
    if depth is None:
        space.unknown(node, f"the indices of {node.op_type} have no fixed length")
        return
    space.freeze_all((*data[:depth], *indices), f"{node.op_type} addresses positions on it")
    if node.op_type == "GatherND":
        space.freeze_all(y[: len(indices) - 1], "GatherND addresses positions on it")
        space.same_all(data[depth:], y[len(indices) - 1 :])
        return
    updates = space.operand(node, 2)
    space.same_all(data, y)
    space.freeze_all(updates[: len(indices) - 1], "ScatterND addresses positions on it")
    space.same_all(data[depth:], updates[len(indices) - 1 :])


@axis_rule("Trilu")
def triangle(node: ir.Node, space: Space) -> None:
    """The last two axes are compared with each other."""
    x, y = space.operand(node, 0), space.of(node.outputs[0])
    space.same_all(x, y)
    space.freeze_all(x[-2:], "Trilu compares positions on it")


@axis_rule("OneHot")
def one_hot(node: ir.Node, space: Space) -> None:
    """The new axis is addressed by the data."""
    space.unknown(node, "OneHot addresses positions on it")
