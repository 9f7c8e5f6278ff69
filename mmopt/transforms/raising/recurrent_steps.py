"""Reads which step of which sequence a value is."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import constant_ints, integer, is_onnx
from mmopt.transforms.canonicalize.rewriting import Rewriter


@dataclasses.dataclass(frozen=True)
class Moment:
    """``sequence`` at ``index`` of ``axis``, which is 0 or 1 of three."""

    sequence: ir.Value
    axis: int
    index: int


def moment(value: ir.Value, rewriter: Rewriter) -> Moment | None:
    """The step that ``value [batch, features]`` is, by Gather, or by Slice or Split with the axis taken away."""
    node = value.producer()
    if node is None or not node.inputs or node.inputs[0] is None:
        return None
    shape, source = rewriter.shape(value), node.inputs[0]
    before = rewriter.shape(source)
    if before is None or len(before) != 3 or None in before:
        return None
    if is_onnx(node, "Gather"):
        index = constant_ints(node.inputs[1])
        if index is None or rewriter.shape(node.inputs[1]) != ():
            return None
        return _at(source, (integer(node, "axis", 0) or 0) % 3, index[0], rewriter)
    if not is_onnx(node, "Squeeze", "Reshape"):
        return None
    for axis in (0, 1):
        if before[axis] == 1 and (*before[:axis], *before[axis + 1 :]) == shape:
            found = _cut(source, axis, rewriter)
            if found is not None:
                return found
    return None


def _at(sequence: ir.Value, axis: int, index: int, rewriter: Rewriter) -> Moment | None:
    length = (rewriter.shape(sequence) or (None,) * 3)[axis]
    if axis == 2 or not isinstance(length, int):
        return None
    return Moment(sequence, axis, index % length) if -length <= index < length else None


def _cut(value: ir.Value, axis: int, rewriter: Rewriter) -> Moment | None:
    """Where a piece of one step was cut from."""
    node = value.producer()
    if node is None or not node.inputs or node.inputs[0] is None:
        return None
    if is_onnx(node, "Split") and (integer(node, "axis", 0) or 0) % 3 == axis:
        sizes = [(rewriter.shape(output) or (None,) * 3)[axis] for output in node.outputs]
        position = list(node.outputs).index(value)
        return _at(node.inputs[0], axis, position, rewriter) if set(sizes[: position + 1]) == {1} else None
    if not is_onnx(node, "Slice") or len(node.inputs) < 4:
        return None
    starts, axes = constant_ints(node.inputs[1]), constant_ints(node.inputs[3])
    if starts is None or axes is None or len(starts) != 1 or axes[0] % 3 != axis:
        return None
    return _at(node.inputs[0], axis, starts[0], rewriter)


def direction_of(moments: Sequence[Moment]) -> str:
    """``forward`` or ``reverse``; "" when the steps are in neither order, or of different sequences."""
    if len({(at.sequence, at.axis) for at in moments}) != 1:
        return ""
    strides = {after.index - before.index for before, after in itertools.pairwise(moments)}
    return {1: "forward", -1: "reverse"}.get(strides.pop(), "") if len(strides) == 1 else ""
