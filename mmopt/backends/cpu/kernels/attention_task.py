"""The code of one task of the attention template: some query rows of one group of heads of one sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import Sink
from mmopt.backends.cpu.kernels.attention_blocking import Blocking
from mmopt.backends.cpu.kernels.attention_tile import Pair, Tile
from mmopt.backends.cpu.kernels.transpose import transpose_square
from mmopt.backends.cpu.loops import i64, keep, loop, seq, static, when
from mmopt.backends.expressions import simplify

if TYPE_CHECKING:
    from mmopt.backends.cpu.kernels.attention import Attention

REST = (8, 4)
"""Smaller tiles for rows left over, when their number is only known at run time."""


class Visibility:
    """Which keys are open to the queries of one sample: always those before an end.

    Args:
        nest: The template.
        batch: The sample.
    """

    def __init__(self, nest: Attention, batch: Expr) -> None:
        self.nest = nest
        self.limit, self.offset = nest.keys, nest.rules.offset
        if nest.mask is not None:
            self.limit = _smaller(self.limit, nest.mask.shape[3])
        if nest.lengths is not None:
            length = nest.lengths[(batch,)].astype("int64")
            self.limit = tirx.max(tirx.min(self.limit, length), i64(0))
            self.offset = length - nest.queries

    def end(self, query: Expr) -> Expr:
        """Number of keys open to a query."""
        if not self.nest.rules.causal:
            return self.limit
        seen = query + 1 if self.offset is None else query + self.offset + 1
        return tirx.max(tirx.min(self.limit, seen), i64(0))

    def reach(self, first: Expr, rows: Expr) -> Expr:
        """Number of keys open to any of some rows of a group."""
        nest = self.nest
        if not nest.rules.causal:
            return self.limit
        last = tirx.min(first + rows, nest.rows) - 1
        if nest.sharing == 1:
            return self.end(last)
        crosses = tirx.NE(tirx.floordiv(first, nest.queries), tirx.floordiv(last, nest.queries))
        return self.end(tirx.Select(crosses, nest.queries - 1, tirx.floormod(last, nest.queries)))


def _smaller(a: Expr, b: Expr) -> Expr:
    return simplify(tirx.min(a, b))


class Task:
    """Statements for the rows ``first`` … ``first + chunk`` of a group.

    Args:
        nest: The template.
        kernel: The emitter.
        sink: Takes the results.
        blocking: Parameters.
        batch: The sample.
        head: The head of keys and values.
    """

    def __init__(self, nest: Attention, kernel: Any, sink: Sink, blocking: Blocking, batch: Expr, head: Expr) -> None:
        self.nest, self.kernel, self.sink, self.blocking = nest, kernel, sink, blocking
        self.batch, self.head, self.lanes, self.dtype = batch, head, nest.lanes, nest.accumulator
        self.panel = blocking.vectors * nest.lanes
        self.sees = Visibility(nest, batch)
        known = static(nest.keys)
        self.single = known is not None and known <= blocking.keys
        # Numbers to add keep the scores in natural units: the smallest float32 must not overflow when it is scaled.
        self.natural = self.dtype != "float32" or (nest.mask is not None and nest.mask.dtype != "bool")
        self.common = self._rows_share_mask()
        self._declare()

    def _rows_share_mask(self) -> bool:
        mask = self.nest.mask
        if mask is None or static(mask.shape[2]) != 1:
            return False
        return self.nest.sharing == 1 or static(mask.shape[1]) == 1

    def _declare(self) -> None:
        nest, blocking, lanes = self.nest, self.blocking, self.lanes
        features, values = (-(-size // lanes) * lanes for size in (nest.size, nest.value_size))
        self.buffers: list[tirx.Buffer] = []
        self.query = self._buffer("query", blocking.rows, features)
        self.scores = self._buffer("scores", blocking.rows, blocking.keys)
        padded = -(-blocking.rows // lanes) * lanes
        self.partial = self._buffer("partial", blocking.rows, lanes)
        self.peak = self._buffer("peak", padded)
        self.total = self._buffer("total", padded)
        self.factor = self._buffer("factor", padded)
        carried = blocking.rows if self.single else blocking.chunk
        self.maxima = self._buffer("maxima", carried)
        self.sums = self._buffer("sums", carried)
        self.results = self._buffer("results", carried, values)
        if blocking.packed:
            self.panels = self._buffer("panels", blocking.keys // self.panel, features, self.panel)
            self.values = self._buffer("values", blocking.keys, values)
            self.square = self._buffer("square", lanes, features)
        if self.common:
            self.bias = self._buffer("bias", blocking.keys)

    def _buffer(self, name: str, *extents: int) -> tirx.Buffer:
        self.buffers.append(tirx.decl_buffer([i64(e) for e in extents], self.dtype, name))
        return self.buffers[-1]

    def number(self, value: float) -> Expr:
        """A constant of the accumulator's type."""
        return tirx.const(value, self.dtype)

    # -- order of work -----------------------------------------------------------------------------------------

    def emit(self, first: Expr) -> Stmt:
        """All blocks of keys for the rows from ``first`` on."""
        nest, blocking = self.nest, self.blocking
        self.first, self.count = first, simplify(tirx.min(i64(blocking.chunk), nest.rows - first))
        known = static(nest.rows)
        if known is not None and known % blocking.chunk == 0:
            self.count = i64(blocking.chunk)
        reach = self.sees.reach(first, self.count)
        kept = None
        if static(reach) is None:
            kept, reach = keep(reach, "reach")
        blocks = simplify(tirx.floordiv(reach + (blocking.keys - 1), i64(blocking.keys)))
        work = self._block(i64(0), reach)
        if not self.single:
            work = seq(
                self._clear(),
                loop(blocks, lambda b: self._block(b * blocking.keys, reach), name="block"),
                loop(self.count, lambda row: self.finish(row, row), name="row"),
            )
        return seq(*(tirx.AllocBuffer(b) for b in self.buffers), kept, work)

    def _clear(self) -> Stmt:
        width = int(self.results.shape[1].value)

        def row(i: Expr) -> Stmt:
            return seq(
                tirx.BufferStore(self.maxima, self.number(-math.inf), [i]),
                tirx.BufferStore(self.sums, self.number(0), [i]),
                self.vectors(width, lambda v: tirx.BufferStore(self.results, self.number(0), [i, v])),
            )

        return loop(self.count, row, name="row")

    def _block(self, start: Expr, reach: Expr) -> Stmt:
        """One block of keys for all rows."""
        keys = simplify(tirx.min(i64(self.blocking.keys), reach - start))
        take = [self._pack(start, keys) if self.blocking.packed else None, self._bias(start) if self.common else None]
        return seq(*take, self._tiles(lambda row, rows: Tile(self, row, rows, start, keys).emit()))

    def _tiles(self, body: Callable[[Expr, int], Stmt]) -> Stmt:
        """``body`` for every tile of rows; what is left over gets the smallest of a few tiles that holds it."""
        most, known = self.blocking.rows, static(self.count)
        if known is not None:
            full, rest = divmod(known, most)
            whole = loop(full, lambda t: body(t * most, most), name="tile")
            return seq(whole, body(i64(full * most), rest) if rest else None)
        smaller = [rows for rows in REST if rows < most]
        # What a smaller tile cannot hold gets a full one.
        room = most - 1 - (smaller[0] if smaller else 0)
        full = simplify(tirx.floordiv(self.count + room, i64(most)))
        rest = self.count - full * most
        last: Stmt | None = None
        bound = 0
        for rows in reversed(smaller):
            tile = body(full * most, rows)
            last = when(rest > 0, tile) if last is None else when(rest <= bound, last, tile)
            bound = rows
        return seq(loop(full, lambda t: body(t * most, most), name="tile"), last)

    def finish(self, i: Expr, row: Expr) -> Stmt:
        """Hand over a row of the chunk, whose sums are at ``i``; zeros when no key was open."""
        total = self.sums[i]
        share = tirx.Select(total.equal(self.number(0)), self.number(0), self.number(1) / total)
        statement, share = keep(share, "share")

        def store(d: Expr) -> Stmt:
            value = (self.results[i, d] * share).astype(self.nest.output.dtype)
            return self.sink(self.nest.at(self.batch, self.head, self.first + row, d), value)

        return seq(statement, self.kernel.vector(i64(self.nest.value_size), self.lanes, store))

    # -- a block's operands ------------------------------------------------------------------------------------

    def _pack(self, start: Expr, keys: Expr) -> Stmt:
        """Transpose the keys of a block into panels, copy its values."""
        nest, lanes = self.nest, self.lanes

        def key(at: Expr, i: Expr) -> Stmt:
            return self.kernel.vector(
                i64(nest.size),
                lanes,
                lambda d: self._set(self.square, [i, d], nest.k[(self.batch, self.head, at, d)]),
            )

        def turn(panel: Expr, column: Expr, d: Expr) -> Stmt:
            kind = f"{self.dtype}x{lanes}"
            return transpose_square(
                lanes,
                self.dtype,
                lambda i: self.square.vload([i64(i), d * lanes], kind),
                lambda i, x: self.panels.vstore([panel, d * lanes + i, column], x),
            )

        def group(g: Expr) -> Stmt:
            panel = tirx.floordiv(g, i64(self.blocking.vectors))
            column = tirx.floormod(g, i64(self.blocking.vectors)) * lanes
            rows = loop(lanes, lambda i: key(tirx.min(start + g * lanes + i, nest.keys - 1), i), name="i")
            return seq(rows, loop(-(-nest.size // lanes), lambda d: turn(panel, column, d), name="d"))

        def value(j: Expr) -> Stmt:
            return self.kernel.vector(
                i64(nest.value_size),
                lanes,
                lambda d: self._set(self.values, [j, d], nest.v[(self.batch, self.head, start + j, d)]),
            )

        groups = simplify(tirx.floordiv(keys + (lanes - 1), i64(lanes)))
        return seq(loop(groups, group, name="group"), loop(keys, value, name="j"))

    def _set(self, buffer: tirx.Buffer, at: list[Expr], value: Expr) -> Stmt:
        return tirx.BufferStore(buffer, value.astype(self.dtype), at)

    def _bias(self, start: Expr) -> Stmt:
        """The mask that all rows have in common, with the keys beyond its end closed."""
        keys = self.blocking.keys
        closed = self.vectors(keys, lambda j: tirx.BufferStore(self.bias, self.number(-math.inf), [j]))

        def store(j: Expr) -> Stmt:
            mask = self.mask(i64(0), start + j)
            if str(mask.ty) == "bool":
                mask = tirx.Select(mask, self.number(0), self.number(-math.inf))
            return self._set(self.bias, [j], mask)

        count = simplify(tirx.min(i64(keys), self.sees.limit - start))
        return seq(closed, self.kernel.vector(count, self.lanes, lambda j: self.kernel.point(lambda: store(j))))

    def mask(self, row: Expr, key: Expr) -> Expr:
        """The mask's element for a row of the group."""
        mask = self.nest.mask
        assert mask is not None
        at = (self.batch, *self.nest.place(self.head, row))
        return mask[(*(i64(0) if static(e) == 1 else i for e, i in zip(mask.shape, at, strict=False)), key)]

    # -- vectors -----------------------------------------------------------------------------------------------

    def vectors(self, extent: int, body: Callable[[Expr], Stmt]) -> Stmt:
        """``body`` at every index below a multiple of the lanes."""
        lanes = self.lanes
        return loop(extent // lanes, lambda b: loop(lanes, lambda v: body(b * lanes + v), "vectorized", "v"), name="b")

    def fold(self, buffer: tirx.Buffer, combine: Pair) -> Stmt:
        """Combine the lanes of a vector into the first, halving it each time."""
        steps: list[Stmt] = []
        half = self.lanes // 2
        while half:

            def step(v: Expr, half: int = half) -> Stmt:
                return tirx.BufferStore(buffer, combine(buffer[v], buffer[v + half]), [v])

            steps.append(loop(half, step, "vectorized", "v"))
            half //= 2
        return seq(*steps)

    def gathered(self, start: float, body: Callable[[tirx.Buffer], Stmt], combine: Pair) -> tuple[Stmt, Expr]:
        """A vector set to ``start``, worked on by ``body`` and folded; gives the result."""
        buffer = tirx.decl_buffer((i64(self.lanes),), self.dtype, "lanes")
        begin = self.vectors(self.lanes, lambda v: tirx.BufferStore(buffer, self.number(start), [v]))
        return seq(tirx.AllocBuffer(buffer), begin, body(buffer), self.fold(buffer, combine)), buffer[i64(0)]
