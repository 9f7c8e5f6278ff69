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

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor
from mmopt.backends.cpu.choosing import Candidate, Workload
from mmopt.backends.cpu.dot import (
    Code,
    Dot,
    MicroKernel,
    TilePhases,
    address,
    configure_tiles,
    importing,
    release_tiles,
)
from mmopt.backends.cpu.dot_code import TILE_ROWS
from mmopt.backends.cpu.kernels.tile import spans
from mmopt.backends.cpu.loops import i64, loop, seq, split_index, static, when
from mmopt.backends.expressions import itemsize, simplify
from mmopt.backends.profile import Profile

MAX_TASKS = 16
"""Parallel pieces at most; each sets up the tiles once."""

FORK_CYCLES = 16384
"""Work below which a product stays on one thread."""

LINE = 64


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
        tiles = -(-rows // dot.most_rows[vectors - 1])
        height = -(-rows // tiles)
        if dot.tiled:
            height = dot.most_rows[vectors - 1] if tiles > 1 else rows
        chunk = _chunk(profile, dot, height, rows, depth)
        lines = -(-vectors * dot.lanes * dot.step * itemsize(dot.b) // LINE)
        ahead = -(-lines // max(1, -(-min(chunk, rows) // height)))
        cycles = _cycles(profile, dot, (rows, columns, depth), height, vectors)
        near = (0, 2) if dot.tiled and dot.depth(depth) >= 4 * dot.step else (0,)
        cuts = [Blocking(height, vectors, chunk, n, m) for n in dict.fromkeys((ahead, 0)) for m in near]
        found += [Candidate(cut.parameters(), cycles) for cut in cuts]
    return found


def _chunk(profile: Profile, dot: Dot, height: int, rows: int, depth: int) -> int:
    """Rows of A that fill half of the second-level cache, in whole tiles, of nearly equal chunks."""
    most = max(1, profile.l2_bytes // 2 // (dot.depth(depth) * itemsize(dot.a)) // height)
    tiles = -(-rows // height)
    return -(-tiles // -(-tiles // most)) * height


def _cycles(profile: Profile, dot: Dot, sizes: tuple[int, int, int], height: int, vectors: int) -> float:
    """The larger of multiplying and reading the weights (at six bytes a cycle), and handing over the results."""
    rows, columns, depth = sizes
    tiles, panels = -(-rows // height), -(-columns // (vectors * dot.lanes))
    width = vectors * dot.lanes
    covered = tiles * (-(-height // 16) * 16 if dot.tiled and height > 4 else height)
    busy = min(1.0, height * vectors / (4 if dot.tiled else 8))
    loads = (height + vectors) / (height * vectors) if not dot.tiled else 0.5
    products = covered * panels * width * dot.depth(depth) / dot.rate / busy * max(1.0, loads * 1.5)
    memory = panels * width * dot.depth(depth) * itemsize(dot.b) / 6
    return max(products, memory) + tiles * panels * (height * vectors * 3 + 40)


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
        return Emitter(self, sinks[0]).emit()


class Emitter:
    """Code of one product."""

    def __init__(self, nest: DotMatmul, sink: Sink) -> None:
        self.nest, self.sink, self.dot = nest, sink, nest.dot
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
        each = max(1, -(-self.panels * (static(chunks) or 1) // MAX_TASKS))
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
        if self.dot.tiled:
            return self._overlapped(first, tiles, panel, each, height, present)

        def one(p: Expr) -> Stmt:
            return loop(tiles, lambda t: self._tile(first + t * height, t, p, height, present), name="tile")

        def guarded(p: Expr) -> Stmt:
            exact = self.panels % each == 0
            return one(panel + p) if exact else when(panel + p < self.panels, one(panel + p))

        return loop(each, guarded, name="panel")

    def _overlapped(self, first: Expr, tiles: Expr, panel: Expr, each: int, height: int, present: Expr) -> Stmt:
        """Tiles of all panels in a row; the results of each are handed over during the next."""
        panels = i64(each) if self.panels % each == 0 else tirx.min(i64(each), self.panels - panel)

        def run(rows: int) -> Stmt:
            return _Overlap(self, rows, present, tiles, panels).emit(first, panel)

        body = run(height)
        if static(present) is None and height > TILE_ROWS:  # tiles of the second half may have no rows
            body = when(present > TILE_ROWS, body, run(TILE_ROWS))
        return seq(configure_tiles(present), body)

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
            return loop(present, lambda i: self.row(row, i + skip, panel, width), name="i")

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


class _Overlap:
    """A sequence of tiles in which each one's results are handed over between the steps of the next.

    Args:
        emitter: The product.
        height: Rows the code is for.
        present: Rows that are there.
        tiles: Tiles of one panel.
        panels: Panels.
    """

    def __init__(self, emitter: Emitter, height: int, present: Expr, tiles: Expr, panels: Expr) -> None:
        self.emitter, self.present, self.tiles = emitter, present, tiles
        self.height = height
        self.count = simplify(tiles * panels)
        self.each = -(-height // emitter.steps)
        cut = emitter.cut
        self.kernel = TilePhases(emitter.dot, height, cut.vectors, cut.prefetch, near=cut.near > 0)
        emitter.kernels.append(self.kernel)

    def emit(self, first: Expr, panel: Expr) -> Stmt:
        """One round more than there are tiles: the last only hands over."""

        def place(number: Expr) -> tuple[Expr, Expr]:
            return first + tirx.floormod(number, self.tiles) * self.height, panel + tirx.floordiv(number, self.tiles)

        def turn(number: Expr) -> Stmt:
            there, some = number < self.count, number > 0
            now, before = place(number), place(number - 1)
            tile = tirx.floormod(number, self.tiles)

            def step(k: Expr) -> Stmt:
                multiply = when(there, self._step(now[0], tile, now[1], k, place(number + 1)[0]))
                return seq(multiply, when(some, self._hand_over(*before, k, self._offset(number - 1))))

            done = self.kernel.end(address(self.emitter.sums[self._offset(number)]), self.emitter.width * 4)
            steps = loop(self.emitter.steps, step, name="k")
            return seq(when(there, self.kernel.begin()), steps, when(there, done))

        return loop(self.count + 1, turn, name="tile")

    def _offset(self, number: Expr) -> Expr:
        return tirx.floormod(number, i64(2)) * self.emitter.size

    def _step(self, row: Expr, tile: Expr, panel: Expr, k: Expr, following: Expr) -> Stmt:
        """Step ``k`` of a tile; the one of rows from ``following`` comes next."""
        emitter, dot = self.emitter, self.emitter.dot
        a, b, ahead = emitter.addresses(row, tile, panel, k)
        if not emitter.cut.near:
            return self.kernel.step(a, emitter.nest.depth * itemsize(dot.a), b, ahead, a)
        soon = k + emitter.cut.near
        within = soon < emitter.steps
        near = emitter.nest.a[
            tirx.Select(within, row, following), tirx.Select(within, soon, soon - emitter.steps) * dot.step
        ]
        return self.kernel.step(a, emitter.nest.depth * itemsize(dot.a), b, ahead, address(near))

    def _hand_over(self, row: Expr, panel: Expr, k: Expr, offset: Expr) -> Stmt:
        """The rows that fall to step ``k``."""
        start = k * self.each
        count: Expr = i64(self.each)
        if static(self.present) is None or self.height % self.each:
            count = tirx.min(count, self.present - start)

        def rows(width: int) -> Stmt:
            return loop(count, lambda i: self.emitter.row(row, start + i, panel, width, offset), name="i")

        body = self.emitter.by_width(panel, rows)
        return body if self.each * self.emitter.steps <= self.height else when(start < self.present, body)
