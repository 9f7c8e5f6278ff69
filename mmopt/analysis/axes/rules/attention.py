"""Attention and rotary embeddings: an axis of projections is ``heads × head size``.

With fewer heads of keys than of queries, query head ``r · k + i`` reads key head k, so that queries are
``key heads × queries per key head × head size``: a key head goes with its queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from mmopt.analysis.axes.group import Mixing, Role
from mmopt.analysis.axes.rules.registry import axis_rule, present
from mmopt.analysis.axes.space import Space

_Q, _K, _V, _MASK, _PAST_KEY, _PAST_VALUE = range(6)


@axis_rule("Attention")
def attention(node: ir.Node, space: Space) -> None:
    """The standard's operator, with heads in an axis of their own (rank 4) or in that of the projections (rank 3)."""
    q, k, v, y = *(space.operand(node, i) for i in (_Q, _K, _V)), space.of(node.outputs[0])
    if len(q) == 4:
        heads, kept, qk_size, v_size = q[1], k[1], q[3], v[3]
        space.same_all((k[3], v[1], y[1], y[3]), (qk_size, kept, heads, v_size))
    else:
        heads = space.new(node.attributes.get_int("q_num_heads", 0))
        kept = space.new(node.attributes.get_int("kv_num_heads", 0))
        qk_size, v_size = (space.new(_over(space.extent(axes[2]), space.extent(kept))) for axes in (k, v))
        space.count(heads, node, "q_num_heads")
        space.count(kept, node, "kv_num_heads")
        for axes, count, size in ((q, heads, qk_size), (k, kept, qk_size), (v, kept, v_size), (y, heads, v_size)):
            space.product(axes[2], (count, size))
    _query_groups(space, heads, kept)
    space.kind(qk_size, "head size")
    space.kind(v_size, "head size")
    space.kind(kept, "heads")
    _attention_sums(node, space, rank=len(q), size=qk_size)
    _sequences(node, space, (q, k, v, y), (heads, kept, qk_size, v_size))


def _over(whole: int | None, part: int | None) -> int | None:
    return whole // part if whole is not None and part else None


def _query_groups(space: Space, heads: int, kept: int) -> None:
    counts = space.extent(heads), space.extent(kept)
    if counts[0] is None or counts[1] is None:
        space.freeze_all((heads, kept), "the number of heads is not fixed")
    elif counts[0] == counts[1]:
        space.same(heads, kept)
    else:
        each = space.new(counts[0] // counts[1])
        space.kind(each, "heads")
        space.product(heads, (kept, each))


def _attention_sums(node: ir.Node, space: Space, rank: int, size: int) -> None:
    """Scores sum over the head size: what queries have there is masked. Heads do not act on each other."""
    space.reads(node, _Q, rank - 1, Mixing.ZERO)
    if "scale" not in node.attributes:
        space.count(size, node, "scale")


def _sequences(node: ir.Node, space: Space, operands: tuple[list[int], ...], parts: tuple[int, int, int, int]) -> None:
    q, k, v, y = operands
    heads, kept, qk_size, v_size = parts
    rows = len(q) - 2 if len(q) == 4 else 1
    for axes in (k, v, y):
        space.same(q[0], axes[0])
    space.same(q[rows], y[rows])
    space.freeze_all((k[rows], v[rows]), "attention weighs its positions against each other")
    if present(node, _MASK):
        mask = space.operand(node, _MASK)
        space.broadcast(mask[:-2], (q[0], heads))
        space.freeze_all(mask[-2:], "attention weighs its positions against each other")
    cached = [(_PAST_KEY, qk_size), (_PAST_VALUE, v_size)]
    tensors = [(space.operand(node, i), size) for i, size in cached if present(node, i)]
    tensors += [(space.of(o), size) for o, size in zip(node.outputs[1:3], (qk_size, v_size), strict=False) if o.name]
    for axes, size in tensors:
        space.same_all((axes[0], axes[1], axes[3]), (q[0], kept, size))
        space.freeze(axes[2], "attention weighs its positions against each other")
    if len(node.outputs) > 3 and node.outputs[3].name:
        scores = space.of(node.outputs[3])
        space.same_all(scores[:2], (q[0], heads))
        space.freeze_all(scores[2:], "attention weighs its positions against each other")


@axis_rule("RotaryEmbedding")
def rotary(node: ir.Node, space: Space) -> None:
    """Coordinates are turned in pairs, each with one column of the tables."""
    x, y = space.operand(node, 0), space.of(node.outputs[0])
    space.same_all(x, y)
    count = node.attributes.get_int("num_heads", 0)
    size = x[-1]
    if len(x) == 3:
        heads = space.new(count)
        size = space.new(_over(space.extent(x[2]), count))
        space.product(x[2], (heads, size))
        space.count(heads, node, "num_heads")
        space.kind(heads, "heads")
    extent = space.extent(size)
    if extent is None:
        space.unknown(node, "the head size of RotaryEmbedding is not fixed")
        return
    space.kind(size, "head size")
    turned = node.attributes.get_int("rotary_embedding_dim", 0) or extent
    _pairs(node, space, size, turned, bool(node.attributes.get_int("interleaved", 0)))


def _pairs(node: ir.Node, space: Space, size: int, turned: int, interleaved: bool) -> None:
    half = turned // 2
    picks: Sequence[range] = (
        (range(0, turned, 2), range(1, turned, 2))
        if interleaved
        else (
            range(half),
            range(half, turned),
        )
    )
    for index in (1, 2):
        table = space.operand(node, index)
        for pick in picks:
            space.part(size, pick, table[-1])
        space.reads(node, index, len(table) - 1, Role.PARAMETER)
        space.freeze_all(table[:-1], "it is a position")
    if "rotary_embedding_dim" in node.attributes and node.attributes["rotary_embedding_dim"].as_int():
        partial = space.new(turned)
        space.part(size, range(turned), partial)
        space.count(partial, node, "rotary_embedding_dim")
