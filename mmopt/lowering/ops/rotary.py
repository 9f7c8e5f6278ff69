"""Rotary position embedding."""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map
from mmopt.backends.expressions import simplify
from mmopt.lowering.ops.elementwise import accumulator
from mmopt.lowering.ops.extents import i64
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import NotLowered, Value


@lowers("RotaryEmbedding")
def rotary_embedding(node: OpNode) -> Value:
    """Pairs of features turned by the angle of their position (Su et al. 2021).

    The operand is ``[batch, heads, sequence, size]`` or ``[batch, sequence, heads · size]``; the pairs are neighbours
    (interleaved) or lie half the rotated size apart. Features behind the rotated ones are passed on.
    """
    data, cosine, sine, positions = node.input(0), node.input(1), node.input(2), node.optional(3)
    for value in (cosine, sine, positions):
        if value is not None:
            node.context.tensor(value)
    split = _split(node, data)
    size, heads_first = split.shape[-1], data.ndim == 4
    turned = node.attr("rotary_embedding_dim", 0)
    extent = i64(turned) if turned else size
    half = simplify(tirx.floordiv(extent, i64(2)))
    interleaved, wide = bool(node.attr("interleaved", 0)), accumulator(data.dtype)
    node.context.tensor(split)

    def angle(table: Value, batch: Expr, step: Expr, pair: Expr) -> Expr:
        row = (i64(positions.tensor[batch, step]),) if positions is not None else (batch, step)
        return table.tensor[(*row, pair)].astype(wide)

    def body(*at: Expr) -> Expr:
        *lead, i = at
        step = at[2] if heads_first else at[1]
        first = tirx.EQ(tirx.floormod(i, i64(2)), i64(0)) if interleaved else i < half
        pair = tirx.floordiv(i, i64(2)) if interleaved else tirx.floormod(i, half)
        partner = tirx.Select(first, i + 1, i - 1) if interleaved else tirx.Select(first, i + half, i - half)
        inside = i < extent
        whole = extent.same_as(size)
        if not whole:
            pair, partner = tirx.min(pair, half - 1), tirx.Select(inside, partner, i)
        x, other = split.tensor[at].astype(wide), split.tensor[(*lead, partner)].astype(wide)
        c, s = angle(cosine, at[0], step, pair), angle(sine, at[0], step, pair)
        rotated = x * c + tirx.Select(first, tirx.const(-1.0, wide), tirx.const(1.0, wide)) * (other * s)
        return (rotated if whole else tirx.Select(inside, rotated, x)).astype(data.dtype)

    result = Value(Map(split.shape, data.dtype, body, "rotary"), name=node.name)
    if split is data:
        return result
    node.context.realize([result], "rotary")
    return node.context.reshape(result, data.shape)


def _split(node: OpNode, data: Value) -> Value:
    """The operand with heads and features as separate axes."""
    if data.ndim == 4:
        return data
    heads = node.attr("num_heads", 0)
    if data.ndim != 3 or not heads:
        raise NotLowered("rotary embedding of a 3-D operand without num_heads")
    batch, steps, width = data.shape
    return node.context.reshape(data, [batch, steps, i64(heads), simplify(tirx.floordiv(width, i64(heads)))])
