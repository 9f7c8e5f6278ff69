"""Attention on tensor cores; see ``attention.cuh``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink
from mmopt.backends.cpu.choosing import Candidate, dim, typical
from mmopt.backends.cpu.loops import i64, static, when
from mmopt.backends.cuda.kernels.operand import CHUNK, Operand
from mmopt.backends.cuda.kernels.product import (
    KINDS,
    ROW_BYTES,
    STATIC_SHARED,
    UNPREDICTED,
    Tile,
    as_int,
    call,
    multiplied,
    pointer,
    tile_statement,
)
from mmopt.backends.cuda.launching import unless_empty
from mmopt.backends.cuda.threads import launch
from mmopt.backends.expressions import itemsize, simplify
from mmopt.backends.profile import Profile

QUERIES = 64
"""Queries of a block."""

WIDE = 112
"""Size of a value up to which scores of 64 keys find registers beside the sums."""

MASKS = {"bool": "MMOPT_BOOL_MASK", "float32": "MMOPT_F32_MASK", "float16": "MMOPT_F16_MASK"}
"""Types a mask may have."""

ANY_REACH = (1 << 30) - 1
"""How far queries see ahead where attention is not causal."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """Extents of an attention.

    Attributes:
        batch: Batch.
        heads: Heads of queries.
        kv_heads: Heads of keys and values, a divisor of ``heads``.
        queries: Queries of a head.
        keys: Keys of a head.
        size: Size of a query and a key.
        values: Size of a value.
    """

    batch: Expr
    heads: int
    kv_heads: int
    queries: Expr
    keys: Expr
    size: int
    values: int


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a block's work lies in memory.

    Attributes:
        panels: Pieces of 64 bytes that a query is made of.
        columns: Products of eight values.
        keys: Keys of a tile.
    """

    panels: int
    columns: int
    keys: int

    def shared(self, size: int) -> int:
        """Bytes of shared memory, with numbers of ``size`` bytes."""
        return self.tile(size).shared

    def tile(self, size: int) -> Tile:
        """Where sums lie: as those of a product of 64 rows by the values, with memory for numbers of ``size`` bytes."""
        tiles = self.panels * (QUERIES + self.keys) + self.keys * size // ROW_BYTES * self.columns * 8
        bytes_ = max(tiles * ROW_BYTES, QUERIES * self.columns * 8 * 4 // 2)
        return Tile(4, 1, 1, self.columns, -(-bytes_ // ((QUERIES + self.columns * 8) * ROW_BYTES)), 1.0)


def cut_of(heads: Heads, dtype: str) -> Cut | None:
    """The cut with the longest tile of keys that fits; None for heads that are too large."""
    tiles = (32, 16) if itemsize(dtype) == 4 else (64, 32) if heads.values <= WIDE else (32,)
    return next(iter(_cuts(heads, dtype, tiles)), None)


def _cuts(heads: Heads, dtype: str, keys: Sequence[int]) -> list[Cut]:
    """Cuts with tiles of so many keys that fit."""
    size = itemsize(dtype)
    panels, columns = -(-heads.size * size // ROW_BYTES), -(-heads.values // 16) * 2
    if columns > (16 if size == 2 else 12):
        return []
    return [cut for n in keys if (cut := Cut(panels, columns, n)).shared(size) <= STATIC_SHARED]


def cut_candidates(heads: Heads, dtype: str, profile: Profile) -> list[tuple[Candidate, Cut]]:
    """The cuts there are for an attention, with the cycles they are predicted to take; :func:`cut_of`'s is first.

    Args:
        heads: Extents; with a cut.
        dtype: Of the operands.
        profile: A ``cuda`` profile.
    """
    first = cut_of(heads, dtype)
    assert first is not None
    tiles = (16, 32, 64, 128) if itemsize(dtype) == 4 else (32, 64, 128)
    others = [cut for cut in _cuts(heads, dtype, tiles) if cut != first]
    queries, keys = -(-typical(dim(heads.queries)) // QUERIES) * QUERIES, typical(dim(heads.keys))
    blocks = typical(dim(heads.batch), 1) * heads.heads * queries // QUERIES
    rate = multiplied(dtype, profile)

    def cycles(cut: Cut) -> float:
        work = QUERIES * -(-keys // cut.keys) * cut.keys * (heads.size + heads.values)
        return -(-blocks // profile.cores) * work / rate

    least = cycles(first)
    made = [(Candidate({"keys": first.keys}, least), first)]
    return made + [(Candidate({"keys": c.keys}, max(cycles(c), UNPREDICTED * least)), c) for c in others]


class TensorAttention(LoopNest):
    """``softmax(scale · q kᵀ + mask) v`` of every head.

    Args:
        q: ``[batch, heads, queries, size]``.
        k: ``[batch, kv_heads, keys, size]``.
        v: ``[batch, kv_heads, keys, values]``.
        mask: Added to scores, or True where a key counts: ``[batch, heads, queries, keys]``, with a stride of 0 along
            repeated axes.
        heads: Extents.
        cut: How a block's work lies in memory.
        scale: Factor of scores.
        reach: Query i sees keys up to i + reach; None for all.
        order: Axes of the result: ``bhsd``, ``bshd``, or ``bsm`` with heads and values in one.
    """

    name = "tensor_attention"

    def __init__(
        self,
        q: Operand,
        k: Operand,
        v: Operand,
        *,
        mask: Operand | None,
        heads: Heads,
        cut: Cut,
        scale: float,
        reach: Expr | None,
        order: str,
    ) -> None:
        super().__init__()
        self.q, self.k, self.v, self.mask, self.heads, self.cut = q, k, v, mask, heads, cut
        self.scale, self.reach, self.order = scale, i64(ANY_REACH) if reach is None else reach, order
        sources = [operand.source for operand in (q, k, v, mask) if operand is not None]
        self.inputs = tuple(dict.fromkeys(sources))
        h = heads
        shapes = {
            "bhsd": (h.batch, i64(h.heads), h.queries, i64(h.values)),
            "bshd": (h.batch, h.queries, i64(h.heads), i64(h.values)),
            "bsm": (h.batch, h.queries, i64(h.heads * h.values)),
        }
        self.output = self.result(shapes[order], "float32", "attention")

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return {"queries": QUERIES, "keys": self.cut.keys, "type": self.q.source.dtype}

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        h = self.heads
        blocks = simplify(tirx.floordiv(h.queries + (QUERIES - 1), i64(QUERIES)))
        layers = simplify(h.batch * h.heads)

        def block(number: Expr, layer: Expr, thread: Expr) -> Stmt:
            first = number * QUERIES
            image, head = tirx.floordiv(layer, i64(h.heads)), tirx.floormod(layer, i64(h.heads))

            def store(r: Expr, c: Expr, value: Expr) -> Stmt:
                write = sinks[0](self._place(image, head, first + r, c), value)
                return when(tirx.all(first + r < h.queries, c < h.values), write)

            def attend(total: Expr, memory: Expr) -> Stmt:
                return self._attend(kernel, total, memory, image, head, first)

            return tile_statement(self.cut.tile(itemsize(self.q.source.dtype)), "float32", thread, attend, store)

        return unless_empty(simplify(blocks * layers), launch([blocks, layers], 4 * 32, block))

    def _place(self, image: Expr, head: Expr, row: Expr, column: Expr) -> tuple[Expr, ...]:
        if self.order == "bhsd":
            return image, head, row, column
        if self.order == "bshd":
            return image, row, head, column
        return image, row, head * self.heads.values + column

    def _attend(self, kernel: Any, total: Expr, memory: Expr, image: Expr, head: Expr, first: Expr) -> Stmt:
        h, cut = self.heads, self.cut
        shared_head = tirx.floordiv(head, i64(h.heads // h.kv_heads))
        dtype = self.q.source.dtype
        direct = all(o.aligned(3, i64(h.size)) for o in (self.q, self.k)) and h.size * itemsize(dtype) % CHUNK == 0
        kind, mask = KINDS[dtype, dtype], "MMOPT_NO_MASK" if self.mask is None else MASKS[self.mask.source.dtype]
        q = pointer(kernel, self.q, (image, head))
        k, v = (pointer(kernel, o, (image, shared_head)) for o in (self.k, self.v))
        masked = q if self.mask is None else pointer(kernel, self.mask, (image, head))
        mask_steps = (i64(0), i64(0)) if self.mask is None else self.mask.strides[2:]
        steps = [*self.q.strides[2:], *self.k.strides[2:], *self.v.strides[2:], *mask_steps]
        sizes = [first, h.queries, h.keys, i64(h.size), i64(h.values), self.reach]
        function = f"mmopt_attention<{kind}, {str(direct).lower()}, {cut.panels}, {cut.columns}, {cut.keys}, {mask}>"
        factor = tirx.const(self.scale * math.log2(math.e), "float32")
        return call(function, total, memory, q, k, v, masked, *steps, *map(as_int, sizes), factor)


def repeated(mask: Operand, shape: Sequence[Expr]) -> Operand:
    """``mask`` with a stride of 0 along axes it has one index of."""
    steps = [i64(0) if static(n) == 1 else step for n, step in zip(shape, mask.strides, strict=True)]
    return dataclasses.replace(mask, strides=tuple(steps))
