"""Matrix products of narrow numbers, by micro-kernels of dot-product instructions.

    C[r, j] = Σ_k A[r, k] · B[k, j]        A, B: 8-bit integers or bfloat16;  C: int32 or float32

B is constant and packed into panels of a few vectors of columns (see :func:`mmopt.backends.cpu.dot.pack`). A block of
rows that stays in the second-level cache meets panel after panel; while one panel is at work, the next one is fetched.
The sums of a tile pass through a small buffer, from which the epilogue (zero points, scales, bias, activation, the next
quantization) takes them while they are in the first-level cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor
from mmopt.backends.cpu.choosing import Candidate, Workload
from mmopt.backends.cpu.dot import Dot, MicroKernel, address, configure_tiles, importing, release_tiles
from mmopt.backends.cpu.kernels.tile import spans
from mmopt.backends.cpu.loops import i64, loop, seq, split_index, static, when
from mmopt.backends.expressions import itemsize, simplify
from mmopt.backends.profile import Profile

MAX_TASKS = 64
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
    """

    rows: int
    vectors: int
    chunk: int
    prefetch: int

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
        cuts = [Blocking(height, vectors, chunk, lines) for lines in dict.fromkeys((ahead, 0))]
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
        return _Emitter(self, sinks[0]).emit()


class _Emitter:
    """Code of one product."""

    def __init__(self, nest: DotMatmul, sink: Sink) -> None:
        self.nest, self.sink, self.dot = nest, sink, nest.dot
        self.cut = nest.blocking
        self.width = self.cut.vectors * self.dot.lanes
        self.panels = -(-nest.columns // self.width)
        self.steps = nest.depth // self.dot.step
        self.kernels: list[MicroKernel] = []
        size = self.cut.rows * self.width
        self.sums = tirx.decl_buffer((i64(size),), self.dot.total, "sums")

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

        def one(p: Expr) -> Stmt:
            return loop(tiles, lambda t: self._tile(first + t * height, t, p, height, present), name="tile")

        def guarded(p: Expr) -> Stmt:
            exact = self.panels % each == 0
            return one(panel + p) if exact else when(panel + p < self.panels, one(panel + p))

        shape = configure_tiles(present) if self.dot.tiled else None
        return seq(shape, loop(each, guarded, name="panel"))

    def _tile(self, row: Expr, number: Expr, panel: Expr, height: int, present: Expr) -> Stmt:
        """One tile of ``height`` rows, ``present`` of which are there."""
        if static(present) is None:
            return self._partial(row, number, panel, present)
        multiply = self._multiply(address(self.nest.a[row, i64(0)]), number, panel, height)
        return seq(multiply, self._hand_over(row, panel, present))

    def _partial(self, row: Expr, number: Expr, panel: Expr, present: Expr) -> Stmt:
        """A tile whose number of rows is known at run time only."""
        height = self.cut.rows
        if self.dot.tiled:  # tiles are configured to touch no more rows; those of the second half may have none
            start = address(self.nest.a[row, i64(0)])
            multiply = self._multiply(start, number, panel, height)
            if height > 16:
                multiply = when(present > 16, multiply, self._multiply(start, number, panel, 16))
            return seq(multiply, self._hand_over(row, panel, present))
        depth = self.nest.depth
        copy = tirx.decl_buffer((i64(height * depth),), self.nest.a.dtype, "rows")

        def element(r: Expr, k: Expr) -> Stmt:
            return tirx.BufferStore(copy, self.nest.a[row + r, k], [r * depth + k])

        fill = loop(present, lambda r: loop(depth, lambda k: element(r, k), name="k"), name="r")
        multiply = self._multiply(address(copy[i64(0)]), number, panel, height)
        return seq(tirx.AllocBuffer(copy), fill, multiply, self._hand_over(row, panel, present))

    def _multiply(self, start: Expr, number: Expr, panel: Expr, height: int) -> Stmt:
        kernel = MicroKernel(self.dot, height, self.cut.vectors, prefetch=self.cut.prefetch)
        self.kernels.append(kernel)
        stride = self.nest.depth * itemsize(self.nest.a.dtype)
        group = self.width * self.dot.group * itemsize(self.dot.b)
        share = self.steps * self.cut.prefetch * LINE // group
        b, zero = self.nest.b, i64(0)
        ahead = address(b[panel + 1, number * share, zero, zero]) if share else None
        here = address(b[panel, zero, zero, zero])
        return kernel.call(address(self.sums[zero]), self.width * 4, start, stride, here, self.steps, ahead=ahead)

    def _hand_over(self, row: Expr, panel: Expr, present: Expr) -> Stmt:
        full, rest = divmod(self.nest.columns, self.width)
        if not rest:
            return self._deliver(row, panel, present, self.width)
        last = self._deliver(row, panel, present, rest)
        return when(panel < full, self._deliver(row, panel, present, self.width), last) if full else last

    def _deliver(self, row: Expr, panel: Expr, present: Expr, width: int) -> Stmt:
        lanes = self.dot.lanes

        def vectors(i: Expr) -> Iterator[Stmt]:
            at = split_index(row + i, self.nest.out_rows)
            for n, used in enumerate(spans(width, lanes)):

                def element(v: Expr, n: int = n) -> Stmt:
                    column = panel * self.width + n * lanes + v
                    return self.sink((*at, column), self.sums[i * self.width + n * lanes + v])

                yield loop(used, element, "vectorized", "v")

        return loop(present, lambda i: seq(*vectors(i)), name="i")
