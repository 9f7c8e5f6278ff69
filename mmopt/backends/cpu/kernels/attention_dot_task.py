"""The code of one task of the template for attention of bfloat16 operands: all rows of one head of one image."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import Sink
from mmopt.backends.cpu.avx512 import bfloat16_bits
from mmopt.backends.cpu.dot import Code, MicroKernel, TilePanels, address, configure_tiles, release_tiles
from mmopt.backends.cpu.intrinsics import exp2_below_zero
from mmopt.backends.cpu.loops import i64, keep, loop, loops, seq, static

if TYPE_CHECKING:
    from mmopt.backends.cpu.kernels.attention_dot import DotAttention

PANEL = 32
"""Columns of a panel: keys for the scores, features for the result."""

LANES = 16

WIDTH = 2 * LANES
"""Scores taken together: one instruction rounds two vectors."""

LOWEST = -3.4028234663852886e38
"""Where the maximum of a masked row starts: closed keys, at minus infinity, lie below, masks of finite numbers not."""


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


@dataclasses.dataclass(frozen=True)
class _Product:
    """Operands of a product: widths are in elements, ``b`` is the first of its panels, which lie a stride apart."""

    a: tirx.Buffer
    a_width: int
    b: Expr
    b_stride: int
    c: tirx.Buffer
    c_width: int


class Task:
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
        self.scale = memory(rows, "float32", "scale")
        self.lanes = memory(WIDTH, "float32", "lanes")

    def emit(self) -> Stmt:
        nest = self.nest
        operands = (self.k, self.v, self.q, self.scores, self.weights, self.sums)
        buffers = (*operands, self.largest, self.total, self.scale, self.lanes)
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
        keys = self.k[tirx.floordiv(key, i64(PANEL)) * (nest.size // 2 * PANEL)]
        values = self.v[tirx.floordiv(key, i64(2)) * PANEL]
        score = _Product(self.q, nest.size, keys, nest.size // 2 * PANEL, self.scores, nest.block)
        steps = panels * PANEL // nest.dot.step
        add = _Product(self.weights, nest.block, values, self.padded // 2 * PANEL, self.sums, nest.value_size)
        return seq(
            self._multiply(score, height, nest.size // nest.dot.step, panels),
            loop(height, lambda i: self._peak(i, count, first + i, key), name="i"),
            self._adjust(height),
            loop(height, lambda i: self._rescale(i), name="i"),
            loop(height, lambda i: self._weights(i, count), name="i"),
            self._multiply(add, height, steps, nest.value_size // PANEL, accumulate=True),
        )

    def _multiply(self, product: _Product, height: int, steps: int, panels: int, *, accumulate: bool = False) -> Stmt:
        """Rows times panels of 32 columns."""
        dot, zero = self.nest.dot, i64(0)
        a, a_stride, c_stride = address(product.a[zero]), product.a_width * 2, product.c_width * 4
        if dot.tiled:
            tiles = TilePanels(dot, height, steps, accumulate)
            self.kernels.append(tiles)
            b = address(product.b)
            return tiles.call(address(product.c[zero]), c_stride, a, a_stride, b, product.b_stride * 4, panels)
        kernel = MicroKernel(dot, height, 2, accumulate=accumulate)
        self.kernels.append(kernel)
        (at,) = product.b.indices

        def panel(p: Expr) -> Stmt:
            b = address(product.b.buffer[at + p * product.b_stride])
            return kernel.call(address(product.c[p * PANEL]), c_stride, a, a_stride, b, steps)

        return loop(panels, panel, name="p")

    # -- softmax -----------------------------------------------------------------------------------------------
    # Each step goes through all rows before the next begins: what a row has to wait for is there by then.

    def _peak(self, i: Expr, count: int, query: Expr, key: Expr) -> Stmt:
        """Mask row ``i``, which is ``query``, for keys from ``key`` on, and put its largest score into ``scale``."""
        start = i * self.nest.block

        def widest(n: Expr, v: Expr) -> Stmt:
            if self.nest.mask is None:
                return self._put(self.lanes, v, tirx.max(self.lanes[v], self.scores[start + n]))
            masked = self._put(self.scores, start + n, self._masked(self.scores[start + n], query, key + n))
            return seq(masked, self._put(self.lanes, v, tirx.max(self.lanes[v], self.scores[start + n])))

        found = self._put(self.scale, i, self.lanes[i64(0)])
        return seq(self._fill(-math.inf), self._spread(count, widest), self._fold(tirx.max), found)

    def _adjust(self, height: int) -> Stmt:
        """New maxima of all rows, from what is in ``scale``; that gets what earlier results are to be multiplied by."""

        def row(i: Expr) -> Stmt:
            before, old = keep(self.largest[i], "before")
            found, new = keep(tirx.max(old, self._in_units(self.scale[i])), "new")
            parts, scale = self._power(self._apart(old, new))
            kept, scale = keep(scale, "scale")
            total = self._put(self.total, i, self.total[i] * scale)
            return seq(
                before, found, *parts, kept, self._put(self.largest, i, new), self._put(self.scale, i, scale), total
            )

        return self._vectors(height, LANES, lambda i, _: row(i))

    def _rescale(self, i: Expr) -> Stmt:
        """Bring the results of row ``i`` so far to its new maximum."""
        kept, scale = keep(self.scale[i], "scale")

        def one(d: Expr) -> Stmt:
            at = i * self.nest.value_size + d
            return self._put(self.sums, at, self.sums[at] * scale)

        return seq(kept, loop(self.nest.value_size, one, "vectorized", "d"))

    def _weights(self, i: Expr, count: int) -> Stmt:
        """Exponentials of row ``i``, and their sum."""
        start = i * self.nest.block
        kept, new = keep(self.largest[i], "new")

        def weight(n: Expr, v: Expr) -> Stmt:
            parts, value = self._power(self._apart(self._in_units(self.scores[start + n]), new))
            stored = self._put(self.weights, start + n, _rounded(value, self.native))
            return seq(*parts, stored, self._put(self.lanes, v, self.lanes[v] + value))

        beyond = -(-count // PANEL) * PANEL - count
        nothing = loop(beyond, lambda v: self._put(self.weights, start + count + v, tirx.const(0, "uint16")))
        summed = self._put(self.total, i, self.total[i] + self.lanes[i64(0)])
        filled = nothing if beyond else None
        fold = self._fold(lambda a, b: a + b)
        return seq(kept, self._fill(0.0), self._spread(count, weight), filled, fold, summed)

    def _in_units(self, score: Expr) -> Expr:
        """A score in the units of maxima: powers of two, or those of the mask where there is one."""
        return score if self.nest.mask is not None else score * tirx.const(self.nest.factor, "float32")

    def _apart(self, low: Expr, high: Expr) -> Expr:
        """The difference of two numbers in the units of maxima, as a power of two."""
        return low - high if self.nest.mask is None else (low - high) * tirx.const(math.log2(math.e), "float32")

    def _fill(self, value: float) -> Stmt:
        return loop(WIDTH, lambda v: self._put(self.lanes, v, tirx.const(value, "float32")), "vectorized", "v")

    def _spread(self, count: int, body: Callable[[Expr, Expr], Stmt]) -> Stmt:
        """``body(index, lane)`` over the keys of a block."""
        return self._vectors(count, WIDTH, body)

    def _vectors(self, count: int, width: int, body: Callable[[Expr, Expr], Stmt]) -> Stmt:
        """``body(index, lane)`` for ``count`` indices, ``width`` at a time."""
        whole, rest = divmod(count, width)
        main = loop(whole, lambda n: loop(width, lambda v: body(n * width + v, v), "vectorized", "v"), name="n")
        return seq(main, loop(rest, lambda v: body(whole * width + v, v), "vectorized", "v") if rest else None)

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

        return seq(*(halve(width) for width in (16, 8, 4, 2, 1)))

    def _power(self, x: Expr) -> tuple[list[Stmt], Expr]:
        """2^x for x ≤ 0: statements, and the value."""
        parts: list[Stmt] = []

        def kept(value: Expr) -> Expr:
            statement, name = keep(value, "x")
            parts.append(statement)
            return name

        value = kept(exp2_below_zero(kept(x), kept, coarse=True, scaling=self.native))
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
