"""Reads parts of the last axis: what Split and Slice cut out, and of what."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import axes_of, constant_ints, integer, is_onnx
from mmopt.transforms.canonicalize.rewriting import Rewriter


@dataclasses.dataclass(frozen=True)
class Part:
    """``value[..., start::step]``, ``size`` of it."""

    value: ir.Value
    start: int
    size: int
    step: int = 1


def part_of(value: ir.Value | None, rewriter: Rewriter) -> Part | None:
    """A part of the last axis, by Slice or Split."""
    node = None if value is None else value.producer()
    if value is None or node is None or not node.inputs or node.inputs[0] is None:
        return None
    shape, after = rewriter.shape(node.inputs[0]), rewriter.shape(value)
    if not shape or not after or len(shape) != len(after):
        return None
    width, size = shape[-1], after[-1]
    if not isinstance(width, int) or not isinstance(size, int):
        return None
    if is_onnx(node, "Split") and integer(node, "axis", 0) in (-1, len(shape) - 1):
        before = [rewriter.shape(o) for o in node.outputs[: list(node.outputs).index(value)]]
        sizes = [s[-1] for s in before if s]
        return Part(node.inputs[0], sum(s for s in sizes if isinstance(s, int)), size)
    if not is_onnx(node, "Slice") or len(node.inputs) < 4:
        return None
    starts, axes = constant_ints(node.inputs[1]), axes_of(node, 3)
    steps = constant_ints(node.inputs[4]) if len(node.inputs) > 4 else [1]
    if starts is None or axes is None or steps is None or len(starts) != 1 or axes[0] % len(shape) != len(shape) - 1:
        return None
    start = starts[0] + width if starts[0] < 0 else min(starts[0], width)
    return Part(node.inputs[0], start, size, steps[0]) if steps[0] > 0 else None


def region(value: ir.Value | None, rewriter: Rewriter) -> Part | None:
    """Which part of what ``value`` is; the whole of itself where it is no part."""
    shape = rewriter.shape(value)
    if value is None or not shape or not isinstance(shape[-1], int):
        return None
    part = part_of(value, rewriter)
    if part is None:
        return Part(value, 0, shape[-1])
    around = region(part.value, rewriter)
    if around is None or around.step != 1:
        return part
    return Part(around.value, around.start + part.start, part.size, part.step)
