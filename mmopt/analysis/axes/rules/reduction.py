"""Reductions: what is left out must not count."""

from __future__ import annotations

import onnx_ir as ir

from mmopt.analysis.axes.group import Mixing
from mmopt.analysis.axes.rules.registry import axis_rule, present
from mmopt.analysis.axes.space import Space

REDUCTIONS = {
    "ReduceL1": Mixing.ZERO,
    "ReduceL2": Mixing.ZERO,
    "ReduceLogSum": Mixing.ZERO,
    "ReduceLogSumExp": Mixing.LOWEST,
    "ReduceMax": Mixing.LOWEST,
    "ReduceMean": Mixing.MEAN,
    "ReduceMin": Mixing.HIGHEST,
    "ReduceProd": Mixing.ONE,
    "ReduceSum": Mixing.ZERO,
    "ReduceSumSquare": Mixing.ZERO,
}


def reduced_axes(node: ir.Node, space: Space, rank: int) -> list[int] | None:
    """The axes that are reduced; ``None`` when they are computed."""
    attribute = node.attributes.get("axes")
    if attribute is not None:
        return [axis % rank for axis in attribute.as_ints()]
    if present(node, 1):
        axes = space.integers(node, 1)
        return None if axes is None else [axis % rank for axis in axes] or _all_or_none(node, rank)
    return _all_or_none(node, rank)


def _all_or_none(node: ir.Node, rank: int) -> list[int]:
    return [] if node.attributes.get_int("noop_with_empty_axes", 0) else list(range(rank))


@axis_rule(*REDUCTIONS)
def reduce(node: ir.Node, space: Space) -> None:
    """Reduced axes are mixed, the others pass."""
    x, y = space.operand(node, 0), space.of(node.outputs[0])
    axes = reduced_axes(node, space, len(x))
    if axes is None:
        space.unknown(node, f"the axes of {node.op_type} are computed")
        return
    for axis in axes:
        space.reads(node, 0, axis, REDUCTIONS[node.op_type])
    _pass_others(x, y, axes, bool(node.attributes.get_int("keepdims", 1)), space)


def _pass_others(x: list[int], y: list[int], axes: list[int], keep: bool, space: Space) -> None:
    rest = [a for k, a in enumerate(x) if k not in axes]
    space.same_all(rest, [a for k, a in enumerate(y) if k not in axes] if keep else y)


@axis_rule("ArgMax", "ArgMin")
def arg_extreme(node: ir.Node, space: Space) -> None:
    """The result is a position on the axis."""
    x, y = space.operand(node, 0), space.of(node.outputs[0])
    axis = node.attributes.get_int("axis", 0) % len(x)
    space.freeze(x[axis], f"{node.op_type} gives positions on it")
    _pass_others(x, y, [axis], bool(node.attributes.get_int("keepdims", 1)), space)


@axis_rule("TopK")
def top_k(node: ir.Node, space: Space) -> None:
    """The axis is sorted and cut."""
    x = space.operand(node, 0)
    axis = node.attributes.get_int("axis", -1) % len(x)
    for output in node.outputs:
        if output.name:
            y = space.of(output)
            space.freeze(y[axis], "TopK sorts it")
            space.same_all(x[:axis] + x[axis + 1 :], y[:axis] + y[axis + 1 :])
    space.freeze(x[axis], "TopK sorts it")
