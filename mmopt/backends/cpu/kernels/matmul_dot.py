"""Matrix products of narrow numbers, by micro-kernels of dot-product instructions.

    C[r, j] = Σ_k A[r, k] · B[k, j]        A, B: 8-bit integers or bfloat16;  C: int32 or float32

B is constant and packed into panels of a few vectors of columns (see :func:`mmopt.backends.cpu.dot.pack`). A block of
rows that stays in the second-level cache meets panel after panel; while one panel is at work, the next one is fetched.
The sums of a tile pass through a small buffer, from which the epilogue (zero points, scales, bias, activation, the next
quantization) takes them while they are in the first-level cache. With AMX the epilogue of one tile is done between the
steps of the next: the unit that multiplies tiles and those that work on vectors run at the same time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, LoopResult, Sink, Tensor
from mmopt.backends.cpu.amx_code import TILE_ROWS
from mmopt.backends.cpu.choosing import Candidate, Workload
from mmopt.backends.cpu.dot import (
    Code,
    Dot,
    MicroKernel,
    address,
    configure_tiles,
    importing,
    release_tiles,
)
from mmopt.backends.cpu.kernels.conv import long_epilogue
from mmopt.backends.cpu.kernels.matmul_overlap import Overlap
from mmopt.backends.cpu.kernels.tile import spans
from mmopt.backends.cpu.loops import i64, loop, seq, split_index, static, when
from mmopt.backends.expressions import itemsize, simplify
from mmopt.backends.profile import Profile

MAX_TASKS = 16
"""Parallel pieces at most; each sets up the tiles once."""

FORK_CYCLES = 16384
"""Work below which a product stays on one thread."""

LINE = 64

ROWS_AT_ONCE = 384
"""Rows of a chunk at most: each row of the result lies on pages of its own, and a core remembers few addresses."""


@dataclasses.dataclass(frozen=True)
class Blocking:
    """How a product is cut.

    Attributes:
        rows: Rows of a tile.
        vectors: Vectors of columns in a tile and a panel.
        chunk: Rows, a multiple of ``rows``, that meet all panels before the next rows do.
        prefetch: Cache lines of the next panel fetched in each step of the depth.
        near: Steps by which AMX kernels fetch rows of A into the first-level cache ahead of their use; 0 for never.
    """

    rows: int
    vectors: int
    chunk: int
    prefetch: int
    near: int = 0

    def parameters(self) -> dict[str, int | str | bool]:
        """As parameters of a candidate."""
        return dataclasses.asdict(self)


def candidates(profile: Profile, dot: Dot, rows: int, columns: int, depth: int) -> list[Candidate]:
    """Ways to cut a product, with the cycles they should take on one core.

    Args:
        profile: Caches.
        dot: The instruction.
        rows: M, or a typical one.
        columns: N.
        depth: K.
    """
    found = []
    for vectors in range(min(dot.vectors, -(-columns // dot.lanes)), 0, -1):
        near = (0, 2) if dot.tiled and dot.depth(depth) >= 4 * dot.step else (0,)
        for height in _heights(dot, rows, vectors):
            chunk = _chunk(profile, dot, height, (rows, columns, depth))
            lines = -(-vectors * dot.lanes * dot.step * itemsize(dot.b) // LINE)
            ahead = -(-lines // max(1, -(-min(chunk, rows) // height)))
            cycles = _cycles(profile, dot, (rows, columns, depth), height, vectors)
            fetched = (0,) if dot.neon else dict.fromkeys((ahead, 0))  # Arm's fetch what is read in a row by themselves
            cuts = [Blocking(height, vectors, chunk, n, m) for n in fetched for m in near]
            found += [Candidate(cut.parameters(), cycles) for cut in cuts]
    return found


def stays_in_registers(kernel: Any, dot: Dot, result: LoopResult) -> bool:
    """Whether sums of a tile should not pass through memory: what follows is short, and has registers left on NEON."""
    return dot.name == "sdot" and not long_epilogue(kernel, result)


def _heights(dot: Dot, rows: int, vectors: int) -> list[int]:
    """Rows of a tile: as many as fit the registers, evenly shared; with AMX half of them too."""
    most = dot.most_rows[vectors - 1]
    limits = [most, TILE_ROWS] if dot.tiled else [most]
    return list(dict.fromkeys(-(-rows // -(-rows // limit)) for limit in limits))


def _chunk(profile: Profile, dot: Dot, height: int, sizes: tuple[int, int, int]) -> int:
    """Rows of A that stay in the second-level cache, in whole tiles, of nearly equal chunks. Weights that fit there as
    well are read from it again by every chunk; others come from further away, and larger chunks read them less often.
    """
    rows, columns, depth = sizes
    line = dot.depth(depth) * itemsize(dot.a)
    share = 4 if columns * dot.depth(depth) * itemsize(dot.b) <= profile.l2_bytes else 2
    most = max(1, min(profile.l2_bytes // share // line, ROWS_AT_ONCE) // height)
    tiles = -(-rows // height)
    return -(-tiles // -(-tiles // most)) * height


def _cycles(profile: Profile, dot: Dot, sizes: tuple[int, int, int], height: int, vectors: int) -> float:
    """Multiplying, and reading the weights from memory at six bytes a cycle."""
    rows, columns, depth = sizes
    tiles, panels = -(-rows // height), -(-columns // (vectors * dot.lanes))
    steps = dot.depth(depth) // dot.step
    one = _tile_cycles if dot.tiled else _vector_cycles
    memory = panels * vectors * dot.lanes * dot.depth(depth) * itemsize(dot.b) / 6
    work = tiles * panels * one(profile, dot, height, vectors, steps)
    return work + memory if dot.tiled else max(work, memory)


def _vector_cycles(profile: Profile, dot: Dot, height: int, vectors: int, steps: int) -> float:
    """A tile in vector registers: two loads a cycle, sums that wait for each other, and handing over."""
    products = height * vectors * dot.lanes * dot.step / dot.rate
    return steps * max(products, (height + vectors) / 2, 4.0) + height * vectors * 8 + 40


def _tile_cycles(profile: Profile, dot: Dot, height: int, vectors: int, steps: int) -> float:
    """A tile of AMX sums: 16 cycles for each product of tiles, the next on the same sums after 52, if at least one
    operand is in the first-level cache; what comes from the second level comes at 31 bytes a cycle. Tiles are cleared
    and stored."""
    blocks = -(-height // TILE_ROWS)
    products = max(16.0 * blocks * vectors, 52.0)
    a, b = height * LINE, vectors * dot.lanes * LINE
    if steps * (a + b) > 0.8 * profile.l1_bytes:
        products = max(products, (a + b) / 31)
    return steps * products + 70.0 * blocks * vectors


class DotMatmul(LoopNest):
    """A product with a packed constant.

    Args:
        a: ``[M, depth]`` of type ``dot.a``, whose depth is whole steps of ``dot``.
        b: Panels as :func:`mmopt.backends.cpu.dot.pack` makes them, of ``blocking.vectors`` vectors.
        dot: The instruction.
        columns: N.
        blocking: How it is cut.
        shape: Extents of the result without the last; their product is M.
        name: Name of the template.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        *,
        dot: Dot,
        columns: int,
        blocking: Blocking,
        shape: Sequence[Expr],
        name: str,
        workload: Workload | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.inputs = (a, b)
        self.a, self.b, self.dot, self.blocking = a, b, dot, blocking
        self.rows, self.columns = a.shape[0], columns
        self.depth = static(a.shape[1]) or 0
        self.out_rows = tuple(shape)
        self.workload = workload
        self.output = self.result((*shape, i64(columns)), dot.total)

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return {"instruction": self.dot.name, **self.blocking.parameters()}

    def emit(self, kernel: object, sinks: Sequence[Sink]) -> Stmt:
        """One parallel loop over chunks of rows × blocks of panels."""
        return Emitter(self, sinks[0], kept=stays_in_registers(kernel, self.dot, self.output)).emit()


class Emitter:
    """Code of one product.

    Args:
        nest: The product.
        sink: Takes its results.
        kept: Whether results of a tile are handed over one by one, so that sums stay in registers.
    """

    def __init__(self, nest: DotMatmul, sink: Sink, *, kept: bool = False) -> None:
        self.nest, self.sink, self.dot, self.kept = nest, sink, nest.dot, kept
        self.cut = nest.blocking
        self.width = self.cut.vectors * self.dot.lanes
        self.panels = -(-nest.columns // self.width)
        self.steps = nest.depth // self.dot.step
        self.kernels: list[Code] = []
        self.size = self.cut.rows * self.width
        self.sums = tirx.decl_buffer((i64(self.size * (2 if self.dot.tiled else 1)),), self.dot.total, "sums")

    def emit(self) -> Stmt:
        nest = self.nest
        chunks = simplify(tirx.floordiv(nest.rows + (self.cut.chunk - 1), i64(self.cut.chunk)))
        blocks = max(1, min(self.panels, MAX_TASKS // (static(chunks) or 1)))
        each = -(-self.panels // blocks)
        blocks = -(-self.panels // each)

        def task(number: Expr) -> Stmt:
            chunk, block = split_index(number, (chunks, i64(blocks)))
            body = self._task(chunk * self.cut.chunk, block * each, each)
            return seq(tirx.AllocBuffer(self.sums), body, release_tiles() if self.dot.tiled else None)

        body = loop(simplify(chunks * blocks), task, self._kind(), "task")
        return importing(self.kernels, body)

    def _kind(self) -> str:
        rows = static(self.nest.rows)
        if rows is None:
            return "parallel"
        memory = self.nest.columns * self.nest.depth * itemsize(self.dot.b) / 6
        work = rows * self.nest.columns * self.nest.depth / self.dot.rate
        return "serial" if max(work, memory) < FORK_CYCLES else "parallel"

    def _task(self, first: Expr, panel: Expr, each: int) -> Stmt:
        """``each`` panels for one chunk of rows."""
        if self.dot.tiled:
            return self._overlapped(first, panel, each)
        rows = static(self.nest.rows)
        if rows is not None and (rows % self.cut.chunk == 0 or rows <= self.cut.chunk):
            return self._known(min(rows, self.cut.chunk), first, panel, each)
        count = tirx.min(self.nest.rows - first, i64(self.cut.chunk))
        full = tirx.floordiv(count, i64(self.cut.rows))
        rest = tirx.floormod(count, i64(self.cut.rows))
        tail = self._tiles(first + full * self.cut.rows, i64(1), panel, each, rest)
        return seq(self._tiles(first, full, panel, each), when(rest > 0, tail))

    def _known(self, count: int, first: Expr, panel: Expr, each: int) -> Stmt:
        full, rest = divmod(count, self.cut.rows)
        main = self._tiles(first, i64(full), panel, each) if full else None
        tail = self._tiles(first + full * self.cut.rows, i64(1), panel, each, i64(rest)) if rest else None
        return seq(main, tail)

    def _tiles(self, first: Expr, tiles: Expr, panel: Expr, each: int, count: Expr | None = None) -> Stmt:
        """``tiles`` tiles of rows for each of the panels; tiles of ``count`` rows when given."""
        height = self.cut.rows if count is None else static(count) or self.cut.rows
        present = i64(height) if count is None else count

        def one(p: Expr) -> Stmt:
            return loop(tiles, lambda t: self._tile(first + t * height, t, p, height, present), name="tile")

        def guarded(p: Expr) -> Stmt:
            exact = self.panels % each == 0
            return one(panel + p) if exact else when(panel + p < self.panels, one(panel + p))

        return loop(each, guarded, name="panel")

    def _overlapped(self, first: Expr, panel: Expr, each: int) -> Stmt:
        """A chunk by AMX: tiles of all panels in a row. The last tile of a matrix ends where the matrix does."""
        panels = i64(each) if self.panels % each == 0 else tirx.min(i64(each), self.panels - panel)
        total, height = self.nest.rows, self.cut.rows

        def run(rows: int, present: Expr, tiles: Expr) -> Stmt:
            return seq(configure_tiles(present), Overlap(self, rows, present, tiles, panels).emit(first, panel))

        count = simplify(tirx.min(total - first, i64(self.cut.chunk)))
        whole = run(height, i64(height), simplify(tirx.floordiv(count + (height - 1), i64(height))))
        if static(total) is not None:
            return whole
        few = run(min(height, TILE_ROWS), total, i64(1))
        if height > TILE_ROWS:  # tiles of the second half may have no rows
            few = when(total > TILE_ROWS, run(height, total, i64(1)), few)
        return when(total >= height, whole, few)

    def _tile(self, row: Expr, number: Expr, panel: Expr, height: int, present: Expr) -> Stmt:
        """One tile of ``height`` rows, ``present`` of which are there."""
        if static(present) is None:
            return self._partial(row, number, panel, present)
        multiply = self.multiply(address(self.nest.a[row, i64(0)]), number, panel, height)
        return seq(multiply, self._hand_over(row, panel, present))

    def _partial(self, row: Expr, number: Expr, panel: Expr, present: Expr) -> Stmt:
        """The last rows when their number is known at run time only: the end of a whole tile that starts further up, or
        one by one when there are not that many rows."""
        height, zero = self.cut.rows, i64(0)
        start = row + present - height
        whole = self.multiply(address(self.nest.a[start, zero]), number, panel, height)
        whole = seq(whole, self._hand_over(start, panel, present, height - present))

        def single(r: Expr) -> Stmt:
            multiply = self.multiply(address(self.nest.a[row + r, zero]), number, panel, 1)
            return seq(multiply, self._hand_over(row + r, panel, i64(1)))

        return when(start >= 0, whole, loop(present, single, name="r"))

    def multiply(self, start: Expr, number: Expr, panel: Expr, height: int) -> Stmt:
        """Code of one tile whose first row of A is at ``start``."""
        kernel = MicroKernel(self.dot, height, self.cut.vectors, prefetch=self.cut.prefetch)
        self.kernels.append(kernel)
        stride = self.nest.depth * itemsize(self.nest.a.dtype)
        group = self.width * self.dot.group * itemsize(self.dot.b)
        share = self.steps * self.cut.prefetch * LINE // group
        b, zero = self.nest.b, i64(0)
        ahead = address(b[panel + 1, number * share, zero, zero]) if share else None
        here = address(b[panel, zero, zero, zero])
        return kernel.call(address(self.sums[zero]), self.width * 4, start, stride, here, self.steps, ahead=ahead)

    def _hand_over(self, row: Expr, panel: Expr, present: Expr, skip: int | Expr = 0) -> Stmt:
        """Hand over ``present`` rows of a tile that starts at ``row``, behind the first ``skip``."""

        def rows(width: int) -> Stmt:
            kind = "unrolled" if self.kept and static(present) is not None else "serial"
            return loop(present, lambda i: self.row(row, i + skip, panel, width), kind, "i")

        return self.by_width(panel, rows)

    def by_width(self, panel: Expr, make: Callable[[int], Stmt]) -> Stmt:
        """``make`` for the columns that ``panel`` has: the last one may have fewer."""
        full, rest = divmod(self.nest.columns, self.width)
        if not rest:
            return make(self.width)
        return when(panel < full, make(self.width), make(rest)) if full else make(rest)

    def row(self, first: Expr, i: Expr, panel: Expr, width: int, offset: Expr | None = None) -> Stmt:
        """Hand over row ``i`` of a tile that starts at row ``first``; its sums start at ``offset``."""
        lanes, at = self.dot.lanes, split_index(first + i, self.nest.out_rows)
        start = i * self.width if offset is None else offset + i * self.width

        def vectors() -> Iterator[Stmt]:
            for n, used in enumerate(spans(width, lanes)):

                def element(v: Expr, n: int = n) -> Stmt:
                    return self.sink((*at, panel * self.width + n * lanes + v), self.sums[start + n * lanes + v])

                yield loop(used, element, "vectorized", "v")

        return seq(*vectors())

    def addresses(self, row: Expr, tile: Expr, panel: Expr, step: Expr) -> tuple[Expr, Expr, Expr]:
        """Addresses of a step in A and in B, and of what to fetch ahead meanwhile."""
        group = self.dot.step // self.dot.group
        share = self.cut.prefetch * LINE * group // (self.width * self.dot.step * itemsize(self.dot.b))
        b, zero = self.nest.b, i64(0)
        here = address(b[panel, step * group, zero, zero])
        ahead = address(b[panel + 1, (tile * self.steps + step) * share, zero, zero]) if share else here
        return address(self.nest.a[row, step * self.dot.step]), here, ahead
