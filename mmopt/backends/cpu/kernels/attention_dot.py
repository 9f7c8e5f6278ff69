"""Attention of bfloat16 operands by dot-product instructions, with online softmax in float32.

    Y = softmax(scale · Q·Kᵀ + mask) · V      tiles of query rows against blocks of keys; no matrix of scores in memory

A task takes the rows of one head. It packs that head's keys and values once, as the micro-kernels want them, and then
walks the tiles of rows: products with a block of keys, their exponentials as bfloat16, products of those with the
values, added to what earlier blocks gave after that is brought to the new maximum. A row that no key is open to gives
zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor
from mmopt.backends.cpu.choosing import Workload
from mmopt.backends.cpu.dot import Code, Dot, MicroKernel, address, configure_tiles, importing, release_tiles
from mmopt.backends.cpu.intrinsics import EXP2_COARSE, Rounding, bfloat16_bits, exp2_below_zero, has_bfloat16
from mmopt.backends.cpu.loops import i64, keep, loop, loops, seq, split_index, static
from mmopt.backends.expressions import simplify

PANEL = 32
"""Columns of a panel: keys for the scores, features for the result."""

LANES = 16

LOWEST = -3.4028234663852886e38
"""Where the maximum of a masked row starts: closed keys, at minus infinity, lie below, masks of finite numbers not."""


class DotAttention(LoopNest):
    """Attention of whole sequences, with or without a mask.

    Args:
        q: ``[batch, heads, queries, size]``, bfloat16; extents but the batch are constants.
        k: ``[batch, kv heads, keys, size]``.
        v: ``[batch, kv heads, keys, value size]``.
        scale: Factor of the scores, above zero.
        dot: The instruction.
        keys: Keys of a block, a multiple of :data:`PANEL`.
        order: Axes of the result: ``bhsd``, ``bshd``, or ``bsm`` with the heads side by side.
        workload: What was chosen for.
        mask: ``[batch|1, heads|1, queries|1, keys]``: flags of the keys that are open, or float32 to add to the scores.
    """

    name = "attention_bf16"

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        dot: Dot,
        keys: int,
        order: str,
        workload: Workload | None = None,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.inputs = tuple(dict.fromkeys(t for t in (q, k, v, mask) if t is not None))
        self.q, self.k, self.v, self.dot, self.order, self.block = q, k, v, dot, order, keys
        self.mask, self.scale = mask, scale
        self.factor = scale * math.log2(math.e)
        self.workload = workload
        self.batch = q.shape[0]
        self.heads, self.queries, self.size = (static(d) or 1 for d in q.shape[1:])
        self.sharing = self.heads // (static(k.shape[1]) or 1)
        self.keys, self.value_size = static(k.shape[2]) or 1, static(v.shape[3]) or 1
        self.rows = min(dot.most_rows[1], self.queries)
        shapes: dict[str, tuple[Expr | int, ...]] = {
            "bhsd": (self.batch, self.heads, self.queries, self.value_size),
            "bshd": (self.batch, self.queries, self.heads, self.value_size),
            "bsm": (self.batch, self.queries, self.heads * self.value_size),
        }
        self.output = self.result(shapes[order], "float32", "attention")

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return {"instruction": self.dot.name, "rows": self.rows, "keys": self.block}

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        """One parallel loop over images and heads."""
        kernels: list[Code] = []
        if native := has_bfloat16(kernel.profile):
            kernels.append(Rounding())

        def task(number: Expr) -> Stmt:
            batch, head = split_index(number, (self.batch, i64(self.heads)))
            return _Task(self, sinks[0], batch, head, kernels, native).emit()

        body = loop(simplify(self.batch * self.heads), task, "parallel", "task")
        return importing(kernels, body)

    def at(self, batch: Expr, head: Expr, query: Expr, d: Expr) -> tuple[Expr, ...]:
        """Indices of an element of the result."""
        if self.order == "bhsd":
            return batch, head, query, d
        return (batch, query, head, d) if self.order == "bshd" else (batch, query, head * self.value_size + d)


def _bits(value: Expr) -> Expr:
    return tirx.reinterpret("uint16", value)


def _rounded(value: Expr, native: bool) -> Expr:
    """The bits of a float32 from 0 to 1 rounded to bfloat16, halves up where there is no instruction for it."""
    if native:
        return bfloat16_bits(value)
    bits = tirx.reinterpret("uint32", value)
    return tirx.shift_right(bits + tirx.const(0x8000, "uint32"), tirx.const(16, "uint32")).astype("uint16")


def _pair(low: Expr, high: Expr | None) -> Expr:
    """Two neighbours in depth, as one lane takes them."""
    word = _bits(low).astype("uint32")
    if high is None:
        return word
    return tirx.bitwise_or(word, tirx.shift_left(_bits(high).astype("uint32"), tirx.const(16, "uint32")))


class _Task:
    """All rows of one head of one image."""

    def __init__(
        self, nest: DotAttention, sink: Sink, batch: Expr, head: Expr, kernels: list[Code], native: bool
    ) -> None:
        self.nest, self.sink, self.batch, self.head, self.kernels = nest, sink, batch, head, kernels
        self.native = native
        self.kv_head = tirx.floordiv(head, i64(nest.sharing))
        self.padded = -(-nest.keys // PANEL) * PANEL
        rows, size = nest.rows, nest.size

        def memory(count: int, dtype: str, name: str) -> tirx.Buffer:
            return tirx.decl_buffer((i64(count),), dtype, name)

        self.k = memory(self.padded * size // 2, "uint32", "packed_k")
        self.v = memory(self.padded * nest.value_size // 2, "uint32", "packed_v")
        self.q = memory(rows * size, "uint16", "rows")
        self.scores = memory(rows * nest.block, "float32", "scores")
        self.weights = memory(rows * nest.block, "uint16", "weights")
        self.sums = memory(rows * nest.value_size, "float32", "sums")
        self.largest, self.total = memory(rows, "float32", "largest"), memory(rows, "float32", "total")
        self.lanes = memory(LANES, "float32", "lanes")

    def emit(self) -> Stmt:
        nest = self.nest
        buffers = (self.k, self.v, self.q, self.scores, self.weights, self.sums, self.largest, self.total, self.lanes)
        full, rest = divmod(nest.queries, nest.rows)
        main = loop(full, lambda t: self._tile(t * nest.rows, nest.rows), name="tile")
        tail = self._tile(i64(full * nest.rows), rest) if rest else None
        tiled = nest.dot.tiled
        return seq(
            *(tirx.AllocBuffer(b) for b in buffers),
            self._pack_keys(),
            self._pack_values(),
            configure_tiles(nest.rows) if tiled else None,
            main,
            configure_tiles(rest) if tiled and rest else None,
            tail,
            release_tiles() if tiled else None,
        )

    # -- packing -----------------------------------------------------------------------------------------------

    def _pack_keys(self) -> Stmt:
        """``[keys / PANEL][size / 2][PANEL]`` of pairs; zeros beyond the last key."""
        half, k = self.nest.size // 2, self.nest.k

        def place(key: Expr, d: Expr) -> Expr:
            panel, column = tirx.floordiv(key, i64(PANEL)), tirx.floormod(key, i64(PANEL))
            return (panel * half + d) * PANEL + column

        def one(key: Expr, d: Expr) -> Stmt:
            at = (self.batch, self.kv_head, key)
            return tirx.BufferStore(self.k, _pair(k[(*at, d * 2)], k[(*at, d * 2 + 1)]), [place(key, d)])

        def nothing(key: Expr, d: Expr) -> Stmt:
            return tirx.BufferStore(self.k, tirx.const(0, "uint32"), [place(key + self.nest.keys, d)])

        more = loops([i64(self.padded - self.nest.keys), i64(half)], nothing)
        return seq(loops([i64(self.nest.keys), i64(half)], one), more)

    def _pack_values(self) -> Stmt:
        """``[value size / PANEL][keys / 2][PANEL]`` of pairs; zeros beyond the last key."""
        nest, pairs = self.nest, self.padded // 2
        whole, odd = divmod(nest.keys, 2)

        def row(t: Expr, make: Callable[[Expr], Expr]) -> Stmt:
            def panel(p: Expr) -> Stmt:
                def lane(c: Expr) -> Stmt:
                    return tirx.BufferStore(self.v, make(p * PANEL + c), [(p * pairs + t) * PANEL + c])

                return loop(PANEL, lane, "vectorized", "c")

            return loop(nest.value_size // PANEL, panel, name="p")

        def read(key: Expr, d: Expr) -> Expr:
            return nest.v[(self.batch, self.kv_head, key, d)]

        main = loop(whole, lambda t: row(t, lambda d: _pair(read(t * 2, d), read(t * 2 + 1, d))), name="t")
        last = row(i64(whole), lambda d: _pair(read(i64(whole * 2), d), None)) if odd else None
        first = whole + odd
        none = loop(pairs - first, lambda t: row(t + first, lambda _: tirx.const(0, "uint32")), name="t")
        return seq(main, last, none)

    # -- tiles -------------------------------------------------------------------------------------------------

    def _tile(self, first: Expr, height: int) -> Stmt:
        nest = self.nest
        size, block = nest.size, nest.block

        def copy(i: Expr) -> Stmt:
            def lane(d: Expr) -> Stmt:
                value = nest.q[(self.batch, self.head, first + i, d)]
                return tirx.BufferStore(self.q, _bits(value), [i * size + d])

            return loop(size, lane, "vectorized", "d")

        def clear(i: Expr) -> Stmt:
            zero = tirx.const(0.0, "float32")
            wide = loop(nest.value_size, lambda d: self._put(self.sums, i * nest.value_size + d, zero), "vectorized")
            low = tirx.const(float("-inf") if nest.mask is None else LOWEST, "float32")
            return seq(wide, self._put(self.largest, i, low), self._put(self.total, i, zero))

        full, rest = divmod(nest.keys, block)
        main = loop(full, lambda b: self._block(b * block, block, height, first), name="block")
        tail = self._block(i64(full * block), rest, height, first) if rest else None
        finish = loop(height, lambda i: self._finish(first + i, i), name="i")
        return seq(loop(height, copy, name="i"), loop(height, clear, name="i"), main, tail, finish)

    def _put(self, buffer: tirx.Buffer, at: Expr, value: Expr) -> Stmt:
        return tirx.BufferStore(buffer, value, [at])

    def _block(self, key: Expr, count: int, height: int, first: Expr) -> Stmt:
        """One block of keys for the rows from query ``first`` on: scores, exponentials, products with the values."""
        nest, panels = self.nest, -(-count // PANEL)
        scoring, adding = MicroKernel(nest.dot, height, 2), MicroKernel(nest.dot, height, 2, accumulate=True)
        self.kernels += [scoring, adding]
        zero, half = i64(0), nest.size // 2

        def score(p: Expr) -> Stmt:
            panel = address(self.k[(tirx.floordiv(key, i64(PANEL)) + p) * (half * PANEL)])
            out = address(self.scores[p * PANEL])
            rows = address(self.q[zero])
            return scoring.call(out, nest.block * 4, rows, nest.size * 2, panel, nest.size // nest.dot.step)

        def add(p: Expr) -> Stmt:
            panel = address(self.v[(p * (self.padded // 2) + tirx.floordiv(key, i64(2))) * PANEL])
            out = address(self.sums[p * PANEL])
            rows = address(self.weights[zero])
            steps = panels * PANEL // nest.dot.step
            return adding.call(out, nest.value_size * 4, rows, nest.block * 2, panel, steps)

        return seq(
            loop(panels, score, name="p"),
            loop(height, lambda i: self._exponentials(i, count, first + i, key), name="i"),
            loop(nest.value_size // PANEL, add, name="p"),
        )

    def _exponentials(self, i: Expr, count: int, query: Expr, key: Expr) -> Stmt:
        """Weights of row ``i``, which is ``query``, for keys from ``key`` on; its maximum, sum and earlier results are
        brought up to date."""
        nest = self.nest
        start = i * nest.block
        # Units of the maximum: powers of two, or those of the mask where there is one.
        unit = tirx.const(nest.factor if nest.mask is None else math.log2(math.e), "float32")
        whole, rest = divmod(count, LANES)

        def spread(body: Callable[[Expr, Expr], Stmt]) -> Stmt:
            """``body(index, lane)`` over all keys of the block, in vectors."""
            main = loop(whole, lambda n: loop(LANES, lambda v: body(n * LANES + v, v), "vectorized", "v"), name="n")
            return seq(main, loop(rest, lambda v: body(whole * LANES + v, v), "vectorized", "v") if rest else None)

        def fill(value: float) -> Stmt:
            return loop(LANES, lambda v: self._put(self.lanes, v, tirx.const(value, "float32")), "vectorized", "v")

        def widest(n: Expr, v: Expr) -> Stmt:
            if nest.mask is None:
                return self._put(self.lanes, v, tirx.max(self.lanes[v], self.scores[start + n]))
            masked = self._put(self.scores, start + n, self._masked(self.scores[start + n], query, key + n))
            return seq(masked, self._put(self.lanes, v, tirx.max(self.lanes[v], self.scores[start + n])))

        steps = [fill(float("-inf")), spread(widest), self._fold(tirx.max)]
        before, old = keep(self.largest[i], "before")
        block = self.lanes[i64(0)]
        found, new = keep(tirx.max(old, block if nest.mask is not None else block * unit), "new")
        correction, scale = self._power(old - new if nest.mask is None else (old - new) * unit)
        steps += [before, found, *correction, self._put(self.largest, i, new), fill(0.0)]

        def weight(n: Expr, v: Expr) -> Stmt:
            score = self.scores[start + n]
            parts, value = self._power(score * unit - new if nest.mask is None else (score - new) * unit)
            stored = self._put(self.weights, start + n, _rounded(value, self.native))
            return seq(*parts, stored, self._put(self.lanes, v, self.lanes[v] + value))

        beyond = -(-count // PANEL) * PANEL - count
        nothing = loop(beyond, lambda v: self._put(self.weights, start + count + v, tirx.const(0, "uint16")))
        steps += [spread(weight), nothing if beyond else None, self._fold(lambda a, b: a + b)]
        steps.append(self._put(self.total, i, self.total[i] * scale + self.lanes[i64(0)]))

        def rescale(d: Expr) -> Stmt:
            at = i * nest.value_size + d
            return self._put(self.sums, at, self.sums[at] * scale)

        return seq(*steps, loop(nest.value_size, rescale, "vectorized", "d"))

    def _masked(self, score: Expr, query: Expr, key: Expr) -> Expr:
        """A score after scaling and masking."""
        mask = self.nest.mask
        assert mask is not None
        wanted = (self.batch, self.head, query, key)
        at = [i64(0) if static(extent) == 1 else n for extent, n in zip(mask.shape, wanted, strict=True)]
        value, scaled = mask[tuple(at)], score * tirx.const(self.nest.scale, "float32")
        if mask.dtype == "bool":
            return tirx.Select(value, scaled, tirx.const(float("-inf"), "float32"))
        return scaled + value

    def _fold(self, combine: Callable[[Expr, Expr], Expr]) -> Stmt:
        """All lanes combined into the first."""

        def halve(width: int) -> Stmt:
            def lane(v: Expr) -> Stmt:
                return self._put(self.lanes, v, combine(self.lanes[v], self.lanes[v + width]))

            return loop(width, lane, "vectorized", "v")

        return seq(*(halve(width) for width in (8, 4, 2, 1)))

    def _power(self, x: Expr) -> tuple[list[Stmt], Expr]:
        """2^x for x ≤ 0: statements, and the value."""
        parts: list[Stmt] = []

        def kept(value: Expr) -> Expr:
            statement, name = keep(value, "x")
            parts.append(statement)
            return name

        value = kept(exp2_below_zero(kept(x), kept, EXP2_COARSE))
        return parts, value

    def _finish(self, query: Expr, i: Expr) -> Stmt:
        one, total = tirx.const(1.0, "float32"), self.total[i]
        quotient = one / total
        if self.nest.mask is not None:
            quotient = tirx.Select(total > 0, quotient, tirx.const(0.0, "float32"))
        computed, inverse = keep(quotient, "inverse")

        def vector(n: Expr) -> Stmt:
            def lane(v: Expr) -> Stmt:
                d = n * LANES + v
                value = self.sums[i * self.nest.value_size + d] * inverse
                return self.sink(self.nest.at(self.batch, self.head, query, d), value)

            return loop(LANES, lane, "vectorized", "v")

        return seq(computed, loop(self.nest.value_size // LANES, vector, name="n"))
