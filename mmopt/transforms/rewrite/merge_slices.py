"""Follows pieces through what was put together or cut before: Slice, Split and Concat along one axis.

    Slice_a[2:5](Slice_a[10:30](x))             →  Slice_a[12:15](x)
    Slice_a[0:3](Concat_a(x: 3, y: 4))          →  x
    Slice_a[1:3](Concat_a(x: 3, y: 4))          →  Slice_a[1:3](x)
    Concat_a(Split_a(x))                        →  x
    Concat_a(Slice_a[0:3](x), Slice_a[3:7](x))  →  Slice_a[0:7](x), and x where that is all of it
    Concat_a(Concat_a(x, y), z)                 →  Concat_a(x, y, z)

Bounds must be constants and steps 1; sizes of pieces must be known.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import constant_ints, integer, is_onnx, new_initializer
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass


@dataclasses.dataclass(frozen=True)
class Piece:
    """``source[start:stop]`` along ``axis``, bounds within it."""

    source: ir.Value
    axis: int
    start: int
    stop: int


def piece_of(value: ir.Value | None, rewriter: Rewriter) -> Piece | None:
    """What a value is a contiguous piece of along one axis, when a Slice or Split with known bounds makes it."""
    node = None if value is None else value.producer()
    if node is None or value is None or not node.inputs or node.inputs[0] is None:
        return None
    if is_onnx(node, "Split"):
        return _split_piece(node, value, rewriter)
    return _slice_piece(node, rewriter) if is_onnx(node, "Slice") else None


def _extent(value: ir.Value | None, axis: int, rewriter: Rewriter) -> int | None:
    shape = rewriter.shape(value)
    size = None if shape is None or axis >= len(shape) else shape[axis]
    return size if isinstance(size, int) else None


def _axis(value: ir.Value, axis: int, rewriter: Rewriter) -> int | None:
    shape = rewriter.shape(value)
    return axis if axis >= 0 else None if shape is None else axis + len(shape)


def _slice_piece(node: ir.Node, rewriter: Rewriter) -> Piece | None:
    parts = [constant_ints(node.inputs[i]) if len(node.inputs) > i else None for i in range(1, 5)]
    starts, stops, axes, steps = parts
    source = node.inputs[0]
    if rewriter.opset(node) < 10 or source is None or not starts or not stops or len(starts) != 1 or len(stops) != 1:
        return None
    given = [i for i in range(3, len(node.inputs)) if node.inputs[i] is not None]
    if any(parts[i - 1] is None for i in given) or steps not in (None, [1]):
        return None
    axis = _axis(source, axes[0] if axes else 0, rewriter)
    size = None if axis is None else _extent(source, axis, rewriter)
    if axis is None or size is None:
        return None
    start, stop, _ = slice(starts[0], stops[0]).indices(size)
    return Piece(source, axis, start, max(start, stop))


def _split_piece(node: ir.Node, value: ir.Value, rewriter: Rewriter) -> Piece | None:
    source, number = node.inputs[0], integer(node, "axis", 0)
    axis = None if source is None or number is None else _axis(source, number, rewriter)
    if source is None or axis is None:
        return None
    sizes = [_extent(output, axis, rewriter) for output in node.outputs]
    place = node.outputs.index(value)
    before = [size for size in sizes[:place] if size is not None]
    own = sizes[place]
    if own is None or len(before) != place:
        return None
    return Piece(source, axis, sum(before), sum(before) + own)


def _emit(piece: Piece, node: ir.Node, rewriter: Rewriter) -> ir.Value | None:
    """The value of ``piece``; a Slice is made in front of ``node`` unless it is all of its source."""
    if piece.start == 0 and piece.stop == _extent(piece.source, piece.axis, rewriter):
        return piece.source
    if node.graph is None:
        return None
    base = node.outputs[0].name
    bounds = [
        new_initializer(node.graph, ir.tensor(np.array([number], np.int64)), rewriter.names.fresh(f"{base}_{name}"))
        for name, number in (("start", piece.start), ("stop", piece.stop), ("axis", piece.axis))
    ]
    return rewriter.emit("Slice", [piece.source, *bounds], node, like=node.outputs[0]).outputs[0]


def _slice(node: ir.Node, rewriter: Rewriter) -> bool:
    """A Slice of a piece, or of a Concat of which it takes part of one operand."""
    outer = _slice_piece(node, rewriter)
    if outer is None:
        return False
    inner = piece_of(outer.source, rewriter)
    if inner is not None and inner.axis == outer.axis:
        found: Piece | None = Piece(inner.source, inner.axis, inner.start + outer.start, inner.start + outer.stop)
    else:
        found = _operand_piece(outer, rewriter)
    new = None if found is None else _emit(found, node, rewriter)
    return new is not None and rewriter.replace(node, new)


def _operand_piece(outer: Piece, rewriter: Rewriter) -> Piece | None:
    concat = outer.source.producer()
    if concat is None or not is_onnx(concat, "Concat"):
        return None
    number = integer(concat, "axis", 0)
    axis = None if number is None else _axis(outer.source, number, rewriter)
    if axis != outer.axis:
        return None
    offset = 0
    for operand in concat.inputs:
        size = _extent(operand, outer.axis, rewriter)
        if operand is None or size is None:
            return None
        if offset <= outer.start and outer.stop <= offset + size:
            return Piece(operand, outer.axis, outer.start - offset, outer.stop - offset)
        offset += size
    return None


def _concat(node: ir.Node, rewriter: Rewriter) -> bool:
    """Neighbouring pieces of one tensor become one piece; operands of a Concat along the same axis become its own."""
    number = integer(node, "axis", 0)
    axis = None if number is None else _axis(node.outputs[0], number, rewriter)
    if axis is None or any(value is None for value in node.inputs):
        return False
    return _join_pieces(node, axis, rewriter) or _flatten(node, axis, rewriter)


def _join_pieces(node: ir.Node, axis: int, rewriter: Rewriter) -> bool:
    merged: list[ir.Value | Piece] = []
    for value in node.inputs:
        piece = piece_of(value, rewriter)
        last = merged[-1] if merged else None
        mine = piece is not None and piece.axis == axis
        if mine and isinstance(last, Piece) and last.source is piece.source and last.stop == piece.start:  # type: ignore[union-attr]
            merged[-1] = Piece(last.source, axis, last.start, piece.stop)  # type: ignore[union-attr]
        else:
            merged.append(piece if mine else value)  # type: ignore[arg-type]
    if len(merged) == len(node.inputs) or len(merged) > 1:
        return False
    (whole,) = merged
    new = _emit(whole, node, rewriter) if isinstance(whole, Piece) else whole
    return new is not None and rewriter.replace(node, new)


def _flatten(node: ir.Node, axis: int, rewriter: Rewriter) -> bool:
    operands: list[ir.Value | None] = []
    for value in node.inputs:
        inner = value.producer() if value is not None else None
        alone = value is not None and len(value.uses()) == 1 and not value.is_graph_output()
        same = inner is not None and is_onnx(inner, "Concat") and _same_axis(inner, axis, rewriter)
        operands.extend(inner.inputs if alone and same and inner is not None else [value])
    if len(operands) == len(node.inputs):
        return False
    attribute = ir.AttrInt64("axis", axis)
    joined = rewriter.emit("Concat", operands, node, like=node.outputs[0], attributes=[attribute])
    return rewriter.replace(node, joined.outputs[0])


def _same_axis(concat: ir.Node, axis: int, rewriter: Rewriter) -> bool:
    number = integer(concat, "axis", 0)
    return number is not None and _axis(concat.outputs[0], number, rewriter) == axis


RULES = (Rule("slice-of-piece", ("Slice",), _slice), Rule("concat-of-pieces", ("Concat",), _concat))


@dataclasses.dataclass(frozen=True)
class MergeSlices(RulePass):
    """Follows slices through slices, splits and concatenations."""

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
