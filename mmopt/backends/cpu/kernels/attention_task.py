"""The code of one task of the attention template: some query rows of one group of heads of one sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import Sink
from mmopt.backends.cpu.intrinsics import exp2_below_zero
from mmopt.backends.cpu.kernels.attention_blocking import Blocking, value_tile
from mmopt.backends.cpu.kernels.tile import RegisterTile, spans
from mmopt.backends.cpu.kernels.transpose import combine_lanes, transpose_square
from mmopt.backends.cpu.loops import i64, keep, loop, seq, static, when
from mmopt.backends.expressions import simplify

if TYPE_CHECKING:
    from mmopt.backends.cpu.kernels.attention import Attention

LOG2_E = math.log2(math.e)

REST = (8, 4)
"""Smaller tiles for rows left over, when their number is only known at run time."""

STEPS = 4
"""Features, or keys, in one round of the inner loop of a product."""

Pair = Callable[[Expr, Expr], Expr]


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


class Tile:
    """Statements for a tile of query rows and a block of keys.

    Args:
        task: The task.
        row: First row of the tile, from the task's first.
        rows: Rows; those beyond the task's end are computed and dropped.
        start: First key of the block.
        keys: Keys of the block.
    """

    def __init__(self, task: Task, row: Expr, rows: int, start: Expr, keys: Expr) -> None:
        self.task, self.nest, self.row, self.rows, self.start = task, task.nest, row, rows, start
        self.open, self.keys = keys, keys
        self.lanes, self.blocking, self.kernel = task.lanes, task.blocking, task.kernel
        self.carry = i64(0) if task.single else row

    def emit(self) -> Stmt:
        """Scores, weights, products with the values."""
        task, causal = self.task, self.nest.rules.causal
        kept = None
        if causal:
            reach = task.sees.reach(task.first + self.row, i64(self.rows)) - self.start
            kept, self.keys = keep(tirx.min(self.open, reach), "open")
        work = seq(self._queries(), self._scores(), self._weights(), self._products())
        if task.single:
            real = simplify(tirx.min(i64(self.rows), task.count - self.row))
            return seq(kept, work, loop(real, lambda i: task.finish(i, self.row + i), name="row"))
        return seq(kept, when(self.keys > 0, work) if causal else work)

    def _at(self, i: Expr) -> Expr:
        """Row ``i`` of the tile among the rows of the group; rows beyond the end repeat the last."""
        at = self.task.first + self.row + i
        return at if static(self.task.count) is not None else tirx.min(at, self.nest.rows - 1)

    def _queries(self) -> Stmt:
        """Scaled queries."""
        task, nest, rules = self.task, self.nest, self.nest.rules
        factor = rules.scale / rules.softcap if rules.softcap else rules.scale
        if not (rules.softcap or task.natural):
            factor *= LOG2_E

        def one(i: Expr) -> Stmt:
            head, query = nest.place(task.head, self._at(i))

            def store(d: Expr) -> Stmt:
                value = nest.q[(task.batch, head, query, d)].astype(task.dtype) * task.number(factor)
                return tirx.BufferStore(task.query, value, [i, d])

            return self.kernel.vector(i64(nest.size), self.lanes, store)

        return loop(self.rows, one, name="i")

    # -- scores ------------------------------------------------------------------------------------------------

    def _scores(self) -> Stmt:
        """Products of the queries with the keys."""
        if not self.blocking.packed:
            return loop(self.keys, lambda j: loop(self.rows, lambda i: self._dot(i, j), name="i"), name="j")
        vectors, panel, known = self.blocking.vectors, self.task.panel, static(self.keys)
        if known is not None:
            full, rest = divmod(-(-known // self.lanes), vectors)
            wide = loop(full, lambda p: self._panel(p, vectors), name="panel")
            return seq(wide, self._panel(i64(full), rest) if rest else None)
        half = -(-vectors // 2) if vectors > 1 else 0  # what half a panel can hold gets no more
        count = simplify(tirx.floordiv(self.keys + (panel - 1 - half * self.lanes), i64(panel)))
        last = when(count * panel < self.keys, self._panel(count, half)) if half else None
        return seq(loop(count, lambda p: self._panel(p, vectors), name="panel"), last)

    def _panel(self, panel: Expr, vectors: int) -> Stmt:
        task, lanes = self.task, self.lanes

        def deliver(i: Expr, n: Expr, v: Expr, value: Expr) -> Stmt:
            return tirx.BufferStore(task.scores, value, [i, panel * task.panel + n * lanes + v])

        def part(first: Expr, rows: int) -> Stmt:
            tile = RegisterTile(task.dtype, rows, [lanes] * vectors, lanes, steps=STEPS)
            return tile.emit(
                [i64(self.nest.size)],
                lambda i, k: task.query[first + i, k],
                lambda n, v, k: task.panels[panel, k, n * lanes + v],
                lambda i, n, v, value: deliver(first + i, n, v, value),
            )

        return self._parts(self.blocking.height, part)

    def _parts(self, height: int, body: Callable[[Expr, int], Stmt]) -> Stmt:
        """``body(first row, rows)`` for register tiles of at most ``height`` rows."""
        full, rest = divmod(self.rows, height)
        last = body(i64(full * height), rest) if rest else None
        return seq(loop(full, lambda p: body(p * height, height), name="part"), last)

    def _dot(self, i: Expr, j: Expr) -> Stmt:
        """One score in the order of memory: lanes lie along the features."""
        task, nest, lanes = self.task, self.nest, self.lanes
        full, rest = divmod(nest.size, lanes)

        def body(total: tirx.Buffer) -> Stmt:
            def add(v: Expr, d: Expr) -> Stmt:
                key = nest.k[(task.batch, task.head, self.start + j, d)].astype(task.dtype)
                return tirx.BufferStore(total, total[v] + task.query[i, d] * key, [v])

            main = loop(full, lambda b: loop(lanes, lambda v: add(v, b * lanes + v), "vectorized", "v"), name="d")
            return seq(main, loop(rest, lambda v: add(v, full * lanes + v), "vectorized", "v"))

        work, total = task.gathered(0.0, body, lambda a, b: a + b)
        return seq(work, tirx.BufferStore(task.scores, total, [i, j]))

    # -- weights -----------------------------------------------------------------------------------------------

    def _weights(self) -> Stmt:
        """Largest scores of the rows, then weights in their place, and their sums."""
        task = self.task
        return seq(
            loop(self.rows, self._largest, name="i"),
            self._combined(tirx.max, task.peak),
            loop(self.rows, self._shrink, "vectorized", "i"),
            loop(self.rows, self._exponentials, name="i"),
            self._combined(lambda a, b: a + b, task.total),
            loop(self.rows, self._add, "vectorized", "i"),
        )

    def _combined(self, combine: Pair, result: tirx.Buffer) -> Stmt:
        """The lanes of each row's partial results as one."""
        task, lanes = self.task, self.lanes
        kind = f"{task.dtype}x{lanes}"

        def some(first: int) -> Stmt:
            def load(i: int) -> Expr:
                return task.partial.vload([i64(min(first + i, self.rows - 1)), i64(0)], kind)

            return combine_lanes(lanes, task.dtype, load, combine, lambda x: result.vstore([i64(first)], x))

        return seq(*(some(first) for first in range(0, self.rows, lanes)))

    def _gathered(self, i: Expr, start: float, body: Callable[[tirx.Buffer], Stmt]) -> Stmt:
        """A vector set to ``start`` and worked on by ``body`` becomes the row's partial result."""
        task, lanes = self.task, self.lanes
        buffer = tirx.decl_buffer((i64(lanes),), task.dtype, "lanes")
        begin = task.vectors(lanes, lambda v: tirx.BufferStore(buffer, task.number(start), [v]))
        end = task.vectors(lanes, lambda v: tirx.BufferStore(task.partial, buffer[v], [i, v]))
        return seq(tirx.AllocBuffer(buffer), begin, body(buffer), end)

    def _largest(self, i: Expr) -> Stmt:
        task, lanes = self.task, self.lanes
        _, query = self.nest.place(task.head, self._at(i))
        end = simplify(tirx.min(self.keys, task.sees.end(query) - self.start))
        kept = None
        if static(end) is None:
            kept, end = keep(tirx.max(end, i64(0)), "end")
        full = simplify(tirx.floordiv(end, i64(lanes)))
        vectors = simplify(tirx.floordiv(self.keys + (lanes - 1), i64(lanes)))
        masked = self._masked_rest(i, full * lanes, simplify(end - full * lanes))

        def body(peak: tirx.Buffer) -> Stmt:
            def vector(b: Expr, score: Callable[[Expr], Expr]) -> Stmt:
                def one(v: Expr) -> Stmt:
                    before, value = keep(score(b * lanes + v), "score")
                    largest = tirx.BufferStore(peak, tirx.max(peak[v], value), [v])
                    return seq(before, tirx.BufferStore(task.scores, value, [i, b * lanes + v]), largest)

                return loop(lanes, lambda v: self.kernel.point(lambda: one(v)), "vectorized", "v")

            def closed(j: Expr) -> Expr:
                value = task.scores[i, j] if masked is not None else self._score(i, j)
                return tirx.Select(j < end, value, task.number(-math.inf))

            return seq(
                loop(full, lambda b: vector(b, lambda j: self._score(i, j)), name="b"),
                masked,
                loop(simplify(vectors - full), lambda b: vector(full + b, closed), name="b"),
            )

        return seq(kept, self._gathered(i, -math.inf, body))

    def _score(self, i: Expr, j: Expr) -> Expr:
        """Score of key ``j`` of the block after the rules and the mask."""
        task, rules = self.task, self.nest.rules
        value = task.scores[i, j]
        if rules.softcap:
            factor = rules.softcap if task.natural else rules.softcap * LOG2_E
            value = tirx.tanh(value) * task.number(factor)
        if task.common:
            return value + task.bias[j]
        if self.nest.mask is None:
            return value
        mask = task.mask(self._at(i), self.start + j)
        if str(mask.ty) == "bool":
            return tirx.Select(mask, value, task.number(-math.inf))
        return value + mask.astype(task.dtype)

    def _masked_rest(self, i: Expr, first: Expr, count: Expr) -> Stmt | None:
        """A mask is not read beyond its end: the last keys, fewer than a vector, get theirs beforehand."""
        if self.nest.mask is None or self.task.common or static(count) == 0:
            return None

        def store(j: Expr) -> Stmt:
            return tirx.BufferStore(self.task.scores, self._score(i, first + j), [i, first + j])

        return self.kernel.tail(count, self.lanes, lambda j: self.kernel.point(lambda: store(j)))

    def _shrink(self, i: Expr) -> Stmt:
        """The maximum so far, and by what factor the row shrinks for it.

        A maximum of −∞, where no key was open, counts as 0 for differences with it.
        """
        task = self.task
        if task.single:
            return tirx.BufferStore(task.peak, self._finite(task.peak[i]), [i])
        old = task.maxima[self.carry + i]
        before, largest = keep(tirx.max(old, task.peak[i]), "largest")
        shrink, factor = self._exponential(old - self._finite(largest))
        return seq(
            before,
            shrink,
            tirx.BufferStore(task.factor, factor, [i]),
            tirx.BufferStore(task.peak, self._finite(largest), [i]),
            tirx.BufferStore(task.maxima, largest, [self.carry + i]),
        )

    def _finite(self, value: Expr) -> Expr:
        lowest = self.task.number(-math.inf)
        return tirx.Select(value.equal(lowest), self.task.number(0), value)

    def _exponential(self, difference: Expr) -> tuple[Stmt, Expr]:
        """The weight of a score from its difference to the maximum."""
        task = self.task
        if task.dtype != "float32":
            return seq(), tirx.exp(difference)
        statements: list[Stmt] = []

        def stored(value: Expr) -> Expr:
            statement, kept = keep(value, "part")
            statements.append(statement)
            return kept

        value = exp2_below_zero(difference * task.number(LOG2_E) if task.natural else difference, stored)
        return seq(*statements), value

    def _exponentials(self, i: Expr) -> Stmt:
        task, lanes = self.task, self.lanes
        vectors = simplify(tirx.floordiv(self.keys + (lanes - 1), i64(lanes)))

        def body(total: tirx.Buffer) -> Stmt:
            def one(v: Expr, j: Expr) -> Stmt:
                statements, weight = self._exponential(task.scores[i, j] - task.peak[i])
                before, weight = keep(weight, "weight")
                added = tirx.BufferStore(total, total[v] + weight, [v])
                return seq(statements, before, tirx.BufferStore(task.scores, weight, [i, j]), added)

            return loop(vectors, lambda b: loop(lanes, lambda v: one(v, b * lanes + v), "vectorized", "v"), name="b")

        return self._gathered(i, 0.0, body)

    def _add(self, i: Expr) -> Stmt:
        """The row's sum so far."""
        task, at = self.task, self.carry + i
        total = task.total[i] if task.single else task.sums[at] * task.factor[i] + task.total[i]
        return tirx.BufferStore(task.sums, total, [at])

    # -- products ----------------------------------------------------------------------------------------------

    def _products(self) -> Stmt:
        """Weights times values, added to what there is."""
        task, nest, lanes = self.task, self.nest, self.lanes
        width = nest.value_size if not self.blocking.packed else -(-nest.value_size // lanes) * lanes
        height, vectors = value_tile(task.kernel.profile, self.rows, -(-nest.value_size // lanes))
        full, rest = divmod(width, vectors * lanes)

        def part(start: Expr, rows: int, first: Expr, used: list[int]) -> Stmt:
            def deliver(i: Expr, n: Expr, v: Expr, value: Expr) -> Stmt:
                at = [self.carry + start + i, first + n * lanes + v]
                if not task.single:
                    value = task.results[tuple(at)] * task.factor[start + i] + value
                return tirx.BufferStore(task.results, value, at)

            def b(n: Expr, v: Expr, k: Expr) -> Expr:
                column = first + n * lanes + v
                if self.blocking.packed:
                    return task.values[k, column]
                return nest.v[(task.batch, task.head, self.start + k, column)].astype(task.dtype)

            tile = RegisterTile(task.dtype, rows, used, lanes, steps=STEPS)
            return tile.emit([self.keys], lambda i, k: task.scores[start + i, k], b, deliver)

        def panel(first: Expr, used: list[int]) -> Stmt:
            return self._parts(height, lambda start, rows: part(start, rows, first, used))

        wide = loop(full, lambda p: panel(p * (vectors * lanes), [lanes] * vectors), name="panel")
        return seq(wide, panel(i64(full * vectors * lanes), spans(rest, lanes)) if rest else None)
