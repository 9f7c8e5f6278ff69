"""The register tile: a small block of results kept in vector accumulators while a sum is walked once.

    T[i, j] = Σ_k a(i, k) · b(j, k)        i < rows, j < vectors × lanes

``a`` is broadcast, ``b`` is a vector of neighbouring columns; every accumulator is a register of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.cpu.choosing import Candidate, Chooser, Workload, typical
from mmopt.backends.cpu.loops import i64, loop, loops, seq, when
from mmopt.backends.expressions import itemsize, simplify
from mmopt.backends.profile import Profile

INDEPENDENT = 8
"""Chains of multiply-adds that fill two pipelines of latency four."""

ReadA = Callable[..., Expr]
"""``a(i, *k)``: one element for row ``i``."""

ReadB = Callable[..., Expr]
"""``b(vector, lane, *k)``: the element of a lane of a vector of columns."""

Deliver = Callable[[Expr, Expr, Expr], Stmt]
"""``deliver(vector, lane, value)`` bound to a row: the statement that consumes one result."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """Register tile: ``rows`` × (``vectors`` × ``lanes``) elements of the result."""

    rows: int
    vectors: int
    lanes: int

    @property
    def columns(self) -> int:
        return self.vectors * self.lanes


def lanes_of(profile: Profile, dtype: str) -> int:
    """Elements of ``dtype`` in a vector register."""
    return profile.vector_bytes // itemsize(dtype)


def choose_tile(profile: Profile, dtype: str, rows: int | None, columns: int) -> Tile:
    """The tile that fills the registers: accumulators, one row of b, one element of a.

    Args:
        profile: Vector width and number of registers.
        dtype: Element type.
        rows: Rows to cover, when known; tiles are balanced so that the last is not a sliver.
        columns: Columns to cover.
    """
    candidates = tile_candidates(profile, dtype, rows, columns)
    return min(candidates, key=lambda tile: (_cycles(tile, rows or 12 * tile.rows, columns), -tile.columns))


def tile_candidates(profile: Profile, dtype: str, rows: int | None, columns: int) -> list[Tile]:
    """Tiles of all sensible widths, the widest first; see :func:`choose_tile`."""
    lanes = lanes_of(profile, dtype)
    widest = min(4 if profile.registers >= 32 else 2, max(1, -(-columns // lanes)))
    return [_balanced(profile, rows, vectors, lanes) for vectors in range(widest, 0, -1)]


def tile_choice(chooser: Chooser, workload: Workload, tiles: Sequence[Tile]) -> Tile:
    """The best of ``tiles`` for a workload with dims ``m``, ``n`` and ``k``, and perhaps ``batch``."""
    dims = dict(workload.dims)
    columns, steps = typical(dims["n"]), typical(dims["k"]) * typical(dims.get("batch", 1))
    options = [
        Candidate(
            {"rows": tile.rows, "vectors": tile.vectors},
            steps * _cycles(tile, typical(dims["m"], 12 * tile.rows), columns),
        )
        for tile in tiles
    ]
    return tiles[options.index(chooser.choose(workload, options))]


def _balanced(profile: Profile, rows: int | None, vectors: int, lanes: int) -> Tile:
    most = max(1, min((profile.registers - vectors - 1) // vectors, 16))
    return Tile(-(-rows // -(-rows // most)) if rows else most, vectors, lanes)


def _cycles(tile: Tile, rows: int, columns: int) -> float:
    """Cycles of one step of the depth over ``rows`` × ``columns``.

    Two multiply-adds or two loads a cycle; a result can be used again after four.
    """

    def one(height: int, vectors: int) -> float:
        return max(height * vectors / 2, (height + vectors) / 2, 4.0) if height and vectors else 0.0

    full, rest = divmod(rows, tile.rows)
    panels, last = divmod(-(-columns // tile.lanes), tile.vectors)
    total = 0.0
    for count, vectors in ((panels, tile.vectors), (1, last)):
        total += count * (full * one(tile.rows, vectors) + one(rest, vectors))
    return total


@dataclasses.dataclass
class RegisterTile:
    """Code of one tile.

    Attributes:
        dtype: Element type of the accumulators.
        rows: Rows of the tile.
        spans: Lanes used of each vector of columns; all but the last are full.
        lanes: Lanes of a full vector.
        limit: Rows that are really there when that is only known at run time; reads beyond it must be legal.
        buffered: Results pass through memory, so that long epilogues are loops and not unrolled code.
        vectors: Vectors of a full tile, where this one is cut off at the edge: it sums in the same order, so that equal
            columns give equal results wherever they are.
    """

    dtype: str
    rows: int
    spans: Sequence[int]
    lanes: int
    limit: Expr | None = None
    buffered: bool = False
    vectors: int = 0

    def __post_init__(self) -> None:
        self.width = sum(self.spans)
        chains = self.rows * (self.vectors or len(self.spans))
        alone = self.width == 1 and self.vectors <= 1
        self.copies = 1 if chains >= INDEPENDENT or alone else -(-INDEPENDENT // chains)
        self.acc = tirx.decl_buffer((i64(self.copies * self.rows * self.width),), self.dtype, "acc")

    def emit(self, depth: Sequence[Expr], a: ReadA, b: ReadB, deliver: Callable[..., Stmt]) -> Stmt:
        """Clear, accumulate over ``depth``, hand over.

        Args:
            depth: Extents of the summed axes, outermost first.
            a: Reads the left operand.
            b: Reads the right operand.
            deliver: ``deliver(row, vector, lane, value)``.
        """
        done = self._through_memory(deliver) if self.buffered and self.rows * self.width > 1 else self._hand(deliver)
        return seq(self.accumulate(depth, a, b), done)

    def emit_rows(
        self, depth: Sequence[Expr], a: ReadA, b: ReadB, deliver: Callable[..., Stmt], used: int | None = None
    ) -> Stmt:
        """Like :meth:`emit`, but ``deliver(row, lane, values)`` gets the same lane of all (full) vectors at once.

        Only the first ``used`` lanes are delivered when given.
        """

        values, save = self.acc, None
        if self.rows > 1:
            values, save = self._saved()

        def row(i: Expr) -> Stmt:
            def lane(v: Expr) -> Stmt:
                return deliver(i, v, [values[i * self.width + n * self.lanes + v] for n in range(len(self.spans))])

            return loop(used or self.lanes, lane, "vectorized", "v")

        return seq(self.accumulate(depth, a, b), save, loop(self._count(), row, name="i"))

    def accumulate(self, depth: Sequence[Expr], a: ReadA, b: ReadB) -> Stmt:
        """Clear the accumulators and sum over ``depth``.

        A tile with few accumulators keeps several copies of each and walks the depth in steps of as many, because one
        chain of dependent multiply-adds cannot fill the pipeline.
        """

        def step(copy: int, *k: Expr) -> Stmt:
            def update(i: int, n: int, v: Expr) -> Stmt:
                at = self._at(i, n, v, copy)
                return tirx.BufferStore(self.acc, self.acc[at] + a(i64(i), *k) * b(i64(n), v, *k), [at])

            return self._each(update)

        def clear(copy: int) -> Stmt:
            zero = tirx.const(0, self.dtype)
            return self._each(lambda i, n, v: tirx.BufferStore(self.acc, zero, [self._at(i, n, v, copy)]))

        def fold(copy: int) -> Stmt:
            def add(i: int, n: int, v: Expr) -> Stmt:
                at = self._at(i, n, v)
                return tirx.BufferStore(self.acc, self.acc[at] + self.acc[self._at(i, n, v, copy)], [at])

            return self._each(add)

        *outer, inner = depth
        blocks = simplify(tirx.floordiv(inner, i64(self.copies)))
        rest = simplify(tirx.floormod(inner, i64(self.copies)))

        def walk(*at: Expr) -> Stmt:
            def block(k: Expr) -> Stmt:
                return seq(*(step(c, *at, k * self.copies + c) for c in range(self.copies)))

            tail = loop(rest, lambda k: step(0, *at, blocks * self.copies + k), name="k")
            return seq(loop(blocks, block, name="k"), tail if self.copies > 1 else None)

        copies = range(self.copies)
        return seq(
            tirx.AllocBuffer(self.acc),
            *(clear(c) for c in copies),
            loops(outer, walk, "k"),
            *(fold(c) for c in copies if c),
        )

    def _at(self, i: int, n: int, v: Expr, copy: int = 0) -> Expr:
        return i64((copy * self.rows + i) * self.width + n * self.lanes) + v

    def _row(self, i: int, body: Callable[[int, int, Expr], Stmt]) -> Stmt:
        return seq(
            *(loop(used, lambda v, n=n: body(i, n, v), "vectorized", "v") for n, used in enumerate(self.spans))  # type: ignore[misc]
        )

    def _each(self, body: Callable[[int, int, Expr], Stmt]) -> Stmt:
        """``body(row, vector, lane)`` over the tile, fully unrolled."""
        return seq(*(self._row(i, body) for i in range(self.rows)))

    def _hand(self, deliver: Callable[..., Stmt]) -> Stmt:
        def hand(i: int, n: int, v: Expr) -> Stmt:
            return deliver(i64(i), i64(n), v, self.acc[self._at(i, n, v)])

        if self.limit is None:
            return self._each(hand)
        return seq(*(when(i64(i) < self.limit, self._row(i, hand)) for i in range(self.rows)))

    def _through_memory(self, deliver: Callable[..., Stmt]) -> Stmt:
        copy, save = self._saved()

        def vector(i: Expr, n: Expr, used: int) -> Stmt:
            return loop(used, lambda v: deliver(i, n, v, copy[i * self.width + n * self.lanes + v]), "vectorized", "v")

        def row(i: Expr) -> Stmt:
            full = sum(used == self.lanes for used in self.spans)
            main = loop(full, lambda n: vector(i, n, self.lanes), name="n")
            return seq(main, vector(i, i64(full), self.spans[-1]) if full < len(self.spans) else None)

        return seq(save, loop(self._count(), row, name="i"))

    def _saved(self) -> tuple[tirx.Buffer, Stmt]:
        """A copy of the tile in memory, which may be indexed by loop variables, and the statement that makes it."""
        copy = tirx.decl_buffer((i64(self.rows * self.width),), self.dtype, "done")
        save = self._each(lambda i, n, v: tirx.BufferStore(copy, self.acc[self._at(i, n, v)], [self._at(i, n, v)]))
        return copy, seq(tirx.AllocBuffer(copy), save)

    def _count(self) -> Expr:
        """Rows that are really there."""
        return i64(self.rows) if self.limit is None else tirx.min(i64(self.rows), self.limit)


def spans(width: int, lanes: int) -> list[int]:
    """Lanes used of each vector that covers ``width`` columns."""
    return [min(lanes, width - o) for o in range(0, width, lanes)]
