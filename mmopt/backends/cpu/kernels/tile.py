"""The register tile: a small block of results kept in vector accumulators while a sum is walked once.

    T[i, j] = Σ_k a(i, k) · b(j, k)        i < rows, j < vectors × lanes

``a`` is broadcast, ``b`` is a vector of neighbouring columns; every accumulator is a register of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.cpu.loops import i64, loop, loops, seq, static, when
from mmopt.backends.expressions import itemsize, simplify
from mmopt.backends.profile import Profile

INDEPENDENT = 8
"""Chains of multiply-adds that fill two pipelines of latency four."""

LOADS = 1.6
"""Loads in a cycle that tiles really get: some wait for lines that arrive from the second-level cache."""

LINE = 64
"""Bytes of a cache line."""

NEON_BYTES = 16
"""Width of vectors whose multiply-add takes one element of a vector for all lanes: a load for each element is saved."""

ReadA = Callable[..., Expr]
"""``a(i, *k)``: one element for row ``i``."""

ReadB = Callable[..., Expr]
"""``b(vector, lane, *k)``: the element of a lane of a vector of columns."""

Deliver = Callable[..., Stmt]
"""``deliver(row, vector, lane, value)``: the statement that consumes one result; see ``RegisterTile.handed``."""

Ahead = Callable[..., Stmt]
"""``ahead(*k)``: what is done besides in each round of the loop over the depth, such as fetching what comes next."""


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


def most_rows(profile: Profile, vectors: int) -> int:
    """Rows of the largest tile of ``vectors`` vectors that fits the registers, beside a row of ``b`` and what is at
    hand of ``a``: one element, or on NEON a vector for each row."""
    if profile.vector_bytes == NEON_BYTES:
        return (profile.registers - vectors) // (vectors + 1)
    return (profile.registers - vectors - 1) // vectors


@dataclasses.dataclass(frozen=True)
class PartialSums:
    """Where sums wait while the depth is walked in blocks, with other tiles in between.

    Attributes:
        buffer: Memory for them.
        place: ``place(row, vector, lane)``: index of one of them.
        first: Whether this is the first block of the depth, so that sums start at zero.
        last: Whether it is the last, so that results are complete.
    """

    buffer: tirx.Buffer
    place: Callable[[int, int, Expr], Expr]
    first: Expr
    last: Expr


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
        chains: Accumulators of a full tile, where this one is cut off at the edge: it sums in the same order, so that
            equal rows and columns give equal results wherever they are.
        steps: Steps of the innermost depth in one round of its loop.
        scratch: Memory of ``rows × width`` elements for ``buffered``; the tile allocates its own when there is none.
        whole: Vectors are summed whole where fewer lanes are used; the right operand must be readable there.
        columns: Columns that are really there, when that is only known at run time; goes with ``buffered``.
        handed: Lanes that are handed over together, and that vectors are counted in then; ``lanes`` when 0, else a part
            of them that divides the width of the tile.
    """

    dtype: str
    rows: int
    spans: Sequence[int]
    lanes: int
    limit: Expr | None = None
    buffered: bool = False
    chains: int = 0
    steps: int = 1
    scratch: tirx.Buffer | None = None
    whole: bool = False
    columns: Expr | None = None
    handed: int = 0

    def __post_init__(self) -> None:
        self.handed = self.handed or self.lanes
        self._pieces = spans(sum(self.spans), self.handed)
        self._summed = [self.lanes] * len(self.spans) if self.whole else self.spans
        self.width = sum(self._summed)
        chains = self.chains or self.rows * len(self.spans)
        self.copies = max(1, -(-INDEPENDENT // chains))
        # Elements of a that are loaded as one vector for each row.
        self.together = self.lanes if self.lanes * itemsize(self.dtype) == NEON_BYTES else 1
        least = math.lcm(self.copies, self.together)
        self.steps = -(-self.steps // least) * least
        # One small buffer for each row: LLVM keeps those in registers whatever else the loop does.
        self.acc = [
            [tirx.decl_buffer((i64(self.width),), self.dtype, "acc") for _ in range(self.rows)]
            for _ in range(self.copies)
        ]

    def emit(
        self,
        depth: Sequence[Expr],
        a: ReadA,
        b: ReadB,
        deliver: Deliver,
        *,
        ahead: Ahead | None = None,
        partial: PartialSums | None = None,
    ) -> Stmt:
        """Clear, accumulate over ``depth``, hand over.

        Args:
            depth: Extents of the summed axes, outermost first.
            a: Reads the left operand.
            b: Reads the right operand.
            deliver: Consumes the results.
            ahead: Done once in each round of ``steps`` steps; gets the outer indices and the number of the round.
            partial: Where sums come from and go to when ``depth`` is but one block of the whole.
        """
        done = self._through_memory(deliver) if self.buffered and self.rows * self.width > 1 else self._hand(deliver)
        if partial is not None:
            done = when(partial.last, done, self._each(lambda i, n, v: self._put_away(partial, i, n, v)))
        return seq(self.accumulate(depth, a, b, ahead=ahead, partial=partial), done)

    def accumulate(
        self,
        depth: Sequence[Expr],
        a: ReadA,
        b: ReadB,
        *,
        ahead: Ahead | None = None,
        partial: PartialSums | None = None,
    ) -> Stmt:
        """Clear the accumulators and sum over ``depth``; arguments as for :meth:`emit`.

        A tile with few accumulators keeps several copies of each and walks the depth in steps of as many, because one
        chain of dependent multiply-adds cannot fill the pipeline.
        """

        def step(copy: int, a: ReadA, *k: Expr) -> Stmt:
            def update(i: int, n: int, v: Expr) -> Stmt:
                return self._set(i, n, v, self._get(i, n, v, copy) + a(i64(i), *k) * b(i64(n), v, *k), copy)

            return self._each(update)

        def steps(at: Sequence[Expr], first: Expr) -> Iterator[Stmt]:
            """A round, from index ``first`` on."""
            for start in range(0, self.steps, self.together):
                load, kept = self._elements(a, (*at, first + start))
                yield load
                for c in range(start, start + self.together):
                    yield step(c % self.copies, kept, *at, first + c)

        *outer, inner = depth
        rounds = simplify(tirx.floordiv(inner, i64(self.steps)))
        rest = simplify(tirx.floormod(inner, i64(self.steps)))

        def walk(*at: Expr) -> Stmt:
            def body(k: Expr) -> Stmt:
                return seq(None if ahead is None else ahead(*at, k), *steps(at, k * self.steps))

            tail = loop(rest, lambda k: step(0, a, *at, rounds * self.steps + k), name="k")
            return seq(loop(rounds, body, name="k"), tail if self.steps > 1 else None)

        return seq(
            *(tirx.AllocBuffer(row) for copy in self.acc for row in copy),
            self._begin(partial),
            loops(outer, walk, "k"),
            *(self._fold(copy) for copy in range(1, self.copies)),
        )

    def _elements(self, a: ReadA, first: Sequence[Expr]) -> tuple[Stmt | None, ReadA]:
        """The next ``together`` elements of every row: what loads vectors of them, and how to read one."""
        if self.together == 1:
            return None, a
        *outer, start = first
        rows = [tirx.decl_buffer((i64(self.together),), self.dtype, "a") for _ in range(self.rows)]

        def load(i: int, row: tirx.Buffer) -> Stmt:
            one = lambda c: tirx.BufferStore(row, a(i64(i), *outer, start + c), [c])  # noqa: E731
            return seq(tirx.AllocBuffer(row), loop(self.together, one, "vectorized", "c"))

        def read(i: Expr, *k: Expr) -> Expr:
            return rows[static(i) or 0][simplify(k[-1] - start)]

        return seq(*(load(i, row) for i, row in enumerate(rows))), read

    def _begin(self, partial: PartialSums | None) -> Stmt:
        zero = tirx.const(0, self.dtype)
        first, *others = (
            self._each(lambda i, n, v, c=copy: self._set(i, n, v, zero, c))  # type: ignore[misc]
            for copy in range(self.copies)
        )
        if partial is not None:
            resumed = self._each(lambda i, n, v: self._set(i, n, v, partial.buffer[partial.place(i, n, v)]))
            first = when(partial.first, first, resumed)
        return seq(first, *others)

    def _fold(self, copy: int) -> Stmt:
        """Add a copy of the accumulators to the first."""
        return self._each(lambda i, n, v: self._set(i, n, v, self._get(i, n, v) + self._get(i, n, v, copy)))

    def _put_away(self, partial: PartialSums, i: int, n: int, v: Expr) -> Stmt:
        return tirx.BufferStore(partial.buffer, self._get(i, n, v), [partial.place(i, n, v)])

    def _get(self, i: int, n: int, v: Expr, copy: int = 0) -> Expr:
        return self.acc[copy][i][i64(n * self.lanes) + v]

    def _set(self, i: int, n: int, v: Expr, value: Expr, copy: int = 0) -> Stmt:
        return tirx.BufferStore(self.acc[copy][i], value, [i64(n * self.lanes) + v])

    def _row(self, i: int, body: Callable[[int, int, Expr], Stmt], spans: Sequence[int]) -> Stmt:
        return seq(
            *(loop(used, lambda v, n=n: body(i, n, v), "vectorized", "v") for n, used in enumerate(spans))  # type: ignore[misc]
        )

    def _each(self, body: Callable[[int, int, Expr], Stmt]) -> Stmt:
        """``body(row, vector, lane)`` over the tile, fully unrolled."""
        return seq(*(self._row(i, body, self._summed) for i in range(self.rows)))

    def _hand(self, deliver: Deliver) -> Stmt:
        def hand(i: int, n: int, v: Expr) -> Stmt:
            return deliver(i64(i), i64(n), v, self.acc[0][i][i64(n * self.handed) + v])

        if self.limit is None:
            return seq(*(self._row(i, hand, self._pieces) for i in range(self.rows)))
        return seq(*(when(i64(i) < self.limit, self._row(i, hand, self._pieces)) for i in range(self.rows)))

    def _through_memory(self, deliver: Deliver) -> Stmt:
        copy, save = self._saved()

        def vector(i: Expr, n: Expr, used: int | Expr, kind: str = "vectorized") -> Stmt:
            return loop(used, lambda v: deliver(i, n, v, copy[i * self.width + n * self.handed + v]), kind, "v")

        def row(i: Expr) -> Stmt:
            if self.columns is not None:
                whole = tirx.floordiv(self.columns, i64(self.lanes))
                main = loop(whole, lambda n: vector(i, n, self.lanes), name="n")
                return seq(main, vector(i, whole, self.columns - whole * self.lanes, "serial"))
            full = sum(used == self.handed for used in self._pieces)
            main = loop(full, lambda n: vector(i, n, self.handed), name="n")
            return seq(main, vector(i, i64(full), self._pieces[-1]) if full < len(self._pieces) else None)

        return seq(save, loop(self._count(), row, name="i"))

    def _saved(self) -> tuple[tirx.Buffer, Stmt]:
        """A copy of the tile in memory, which may be indexed by loop variables, and the statement that makes it."""
        own = tirx.decl_buffer((i64(self.rows * self.width),), self.dtype, "done")
        copy = own if self.scratch is None else self.scratch

        def store(i: int, n: int, v: Expr) -> Stmt:
            return tirx.BufferStore(copy, self._get(i, n, v), [i64(i * self.width + n * self.lanes) + v])

        save = self._each(store)
        return copy, save if self.scratch is not None else seq(tirx.AllocBuffer(copy), save)

    def _count(self) -> Expr:
        """Rows that are really there."""
        return i64(self.rows) if self.limit is None else tirx.min(i64(self.rows), self.limit)


def spans(width: int, lanes: int) -> list[int]:
    """Lanes used of each vector that covers ``width`` columns."""
    return [min(lanes, width - o) for o in range(0, width, lanes)]


def fetch(element: Expr, level: int = 2) -> Stmt:
    """Start to load the cache line of ``element``, into the caches from ``level`` outwards."""
    read, data = tirx.const(0, "int32"), tirx.const(1, "int32")
    address = tirx.address_of(element)
    return tirx.Evaluate(
        tirx.call_llvm_intrin("void", "llvm.prefetch", address, read, tirx.const(4 - level, "int32"), data)
    )
