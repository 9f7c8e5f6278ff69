"""The code of a tile of the attention template: scores of some query rows, their weights, products with the values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.cpu.avx512 import has_scaling
from mmopt.backends.cpu.intrinsics import exp2_below_zero
from mmopt.backends.cpu.kernels.attention_blocking import value_tile
from mmopt.backends.cpu.kernels.tile import RegisterTile, spans
from mmopt.backends.cpu.kernels.transpose import combine_lanes
from mmopt.backends.cpu.loops import i64, keep, loop, seq, static, when
from mmopt.backends.expressions import simplify

if TYPE_CHECKING:
    from mmopt.backends.cpu.kernels.attention_task import Task

LOG2_E = math.log2(math.e)

STEPS = 4
"""Features, or keys, in one round of the inner loop of a product."""

Pair = Callable[[Expr, Expr], Expr]
"""Combines two values."""


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

        power = difference * task.number(LOG2_E) if task.natural else difference
        value = exp2_below_zero(power, stored, scaling=has_scaling(task.kernel.profile))
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
