"""Matrix products: a register tile of the result is kept in vector accumulators while the depth is walked.

    C[r, j] = Σ_k A[r, k] · B[k, j]

A constant B is packed into panels ``[N/NR][K][NR]`` at compile time, so that the inner loop reads one contiguous
stream. A B made at run time is read in place, or copied panel by panel into such a stream where enough rows use it.

A task is a chunk of rows by a group of panels. Rows of a chunk stay in the second-level cache while panels pass by; all
its tiles share the work of fetching the next panel of a constant B, which comes from far away, once for each inference.
A deep product is walked in blocks of the depth, with partial sums in between, so that the rows of a block stay in that
cache. The order in which a result is summed up depends on none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor
from mmopt.backends.cpu.kernels.matmul_blocking import Blocking
from mmopt.backends.cpu.kernels.tile import LINE, PartialSums, RegisterTile, fetch, spans
from mmopt.backends.cpu.loops import at_index, i64, kept, loop, product, seq, split_index, static, when
from mmopt.backends.cpu.plan import Plan, trace
from mmopt.backends.expressions import itemsize, simplify

FORK_WORK = 1 << 18
"""Multiply-adds from which forking threads pays: about two microseconds of one core."""

COLD_WORK = 32
"""Multiply-adds in the time that one element of a constant operand takes to arrive from memory."""

LONG_EPILOGUE = 6
"""Operations on each result from which their code is a loop, not repeated for every vector of the tile."""

STEPS = 4
"""Steps of the depth in one round of the inner loop."""

TAILS = (1, 4, 8, 11)
"""Heights of the tiles that take the rows left over when their number is known at run time only."""


def pack_panels(b: np.ndarray, columns: int) -> np.ndarray:
    """Rearrange ``[K, N]`` into ``[ceil(N/columns), K, columns]``, zero-padded."""
    depth, width = b.shape
    panels = -(-width // columns)
    padded = np.zeros((depth, panels * columns), b.dtype)
    padded[:, :width] = b
    return padded.reshape(depth, panels, columns).transpose(1, 0, 2)


class Matmul(LoopNest):
    """A (batched) product.

    Args:
        a: ``[*batch_a, M, K]``.
        b: ``[*batch_b, K, N]``, or packed panels when ``panels``. A view is read as it is copied.
        batch: Broadcast batch extents of the result.
        rows: M.
        columns: N.
        depth: K.
        blocking: How the work is cut.
        panels: Whether ``b`` is packed by :func:`pack_panels` with the columns of the tile.
        shape: Extents of the result, where rows are several axes of it walked as one.
    """

    name = "matmul"

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        *,
        batch: Sequence[Expr],
        rows: Expr,
        columns: Expr,
        depth: Expr,
        blocking: Blocking,
        panels: bool,
        shape: Sequence[Expr] | None = None,
    ) -> None:
        super().__init__()
        if not panels and not blocking.copy and static(columns) is None:
            raise ValueError("an operand of unknown width has to be copied")
        self.inputs = (a, b)
        self.a, self.b = a, b
        self.batch, self.rows, self.columns, self.depth = tuple(batch), rows, columns, depth
        self.blocking, self.panels = blocking, panels
        self.out_rows = tuple(shape[:-1]) if shape is not None else (*self.batch, rows)
        self.output = self.result((*self.out_rows, columns), a.dtype)

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return {**self.blocking.parameters(), "packed": self.panels}

    def emit(self, kernel: object, sinks: Sequence[Sink]) -> Stmt:
        """One loop over batch × chunks of rows × groups of panels, parallel where that pays."""
        plan: Plan = kernel.plan  # type: ignore[attr-defined]
        buffered = sum(trace(m, plan.stored).cost for m in plan.epilogues.get(self.output, [])) > LONG_EPILOGUE
        batches = simplify(product(self.batch))
        grid = _Grid(self)

        def task(at: Expr, chunk: Expr, group: Expr) -> Stmt:
            first = simplify(chunk * grid.each)
            before, first = (None, first) if static(grid.each) is not None else kept(first, "first")

            def matrix(*at: Expr) -> Stmt:
                return _Task(self, grid, sinks[0], at, first, group, buffered).emit()

            return seq(before, at_index(at, self.batch, matrix))

        extents = (batches, grid.chunks, grid.groups)
        count = simplify(product(extents))
        return self._spread(lambda kind: loop(count, lambda n: at_index(n, extents, task), kind, "task"), batches)

    def _spread(self, tasks: Callable[[str], Stmt], batches: Expr) -> Stmt:
        """``tasks`` on one thread or on all, decided at run time where the size is not known before."""
        each = simplify(self.columns * self.depth)
        work = simplify(each * (batches * self.rows + (COLD_WORK if self.panels else 0)))
        known = static(work)
        if known is not None:
            return tasks("serial" if known < FORK_WORK else "parallel")
        least = static(each)
        if least is None or least * (COLD_WORK + 1 if self.panels else 1) >= FORK_WORK:
            return tasks("parallel")
        return when(work < FORK_WORK, tasks("serial"), tasks("parallel"))


class _Grid:
    """How many tasks there are along rows and columns, and how large they are."""

    def __init__(self, nest: Matmul) -> None:
        blocking, tile = nest.blocking, nest.blocking.tile
        self.panels = _pieces(nest.columns, tile.columns)
        self.groups = _pieces(self.panels, blocking.panels)
        self.tiles = _pieces(nest.rows, tile.rows)
        self.full = simplify(tirx.floordiv(nest.rows, i64(tile.rows)))
        self.chunks, self.each = i64(1), self.tiles
        if blocking.tiles:
            self.chunks = _pieces(self.tiles, blocking.tiles)
            self.each = simplify(tirx.floordiv(self.tiles + (self.chunks - 1), self.chunks))
        known = static(self.tiles)
        self.most = min(n for n in (blocking.tiles, known) if n) if blocking.tiles or known else 0


def _pieces(extent: Expr, size: int) -> Expr:
    """How many pieces of ``size`` cover ``extent``; one at least, for others divide by it."""
    return simplify(tirx.max(tirx.floordiv(extent + (size - 1), i64(size)), i64(1)))


class _Task:
    """Code for one chunk of rows and one group of panels of one matrix of the batch."""

    def __init__(
        self, nest: Matmul, grid: _Grid, sink: Sink, at: tuple[Expr, ...], first: Expr, group: Expr, buffered: bool
    ) -> None:
        self.nest, self.grid, self.sink, self.at = nest, grid, sink, at
        self.group, self.buffered = group, buffered
        self.tile = nest.blocking.tile
        self.first_tile = first
        self.dtype = nest.output.dtype
        self.vectors = self.tile.vectors
        blocks = _pieces(nest.depth, nest.blocking.depth) if nest.blocking.depth else i64(1)
        self.blocks = static(blocks) or 1
        self.step = i64(nest.blocking.depth) if self.blocks > 1 else nest.depth
        self.copy = self._memory(self.step * self.tile.columns, "panel") if nest.blocking.copy else None
        room = grid.most * self.tile.rows * nest.blocking.panels * self.tile.columns
        self.partial = self._memory(i64(room), "partial") if self.blocks > 1 else None
        loose = buffered or static(nest.columns) is None
        self.scratch = self._memory(i64(self.tile.rows * self.tile.columns), "done") if loose else None

    def _memory(self, size: Expr, name: str) -> tirx.Buffer:
        return tirx.decl_buffer((simplify(tirx.max(size, i64(1))),), self.dtype, name)

    def emit(self) -> Stmt:
        """All blocks of the depth, in each all panels, for each all rows."""
        panels = self.nest.blocking.panels

        def block(number: Expr) -> Stmt:
            return loop(panels, lambda p: self._guarded(_Panel(self, number, p)), name="panel")

        memory = (tirx.AllocBuffer(b) for b in (self.copy, self.partial, self.scratch) if b is not None)
        return seq(*memory, loop(self.blocks, block, name="block"))

    def _guarded(self, panel: _Panel) -> Stmt:
        """``panel`` unless the last group ends before it."""
        known = static(self.grid.panels)
        if known is not None and known % self.nest.blocking.panels == 0:
            return panel.emit()
        return when(panel.number < self.grid.panels, panel.emit()) if self.nest.blocking.panels > 1 else panel.emit()


class _Panel:
    """Code for one panel of columns in one block of the depth: all tiles of the task's rows."""

    def __init__(self, task: _Task, block: Expr, place: Expr) -> None:
        self.task, self.nest, self.tile, self.block, self.place = task, task.nest, task.tile, block, place
        self.number = simplify(task.group * task.nest.blocking.panels + place)
        self.column = self.number * self.tile.columns
        self.start = block * task.step
        known = static(self.nest.depth)
        even = task.blocks == 1 or (known is not None and known % (static(task.step) or 1) == 0)
        self.depth = task.step if even else tirx.min(task.step, self.nest.depth - self.start)

    def emit(self) -> Stmt:
        """The panel, or the narrower last one."""
        width = self.tile.columns
        total = static(self.nest.columns)
        if total is None:
            left = tirx.min(i64(width), self.nest.columns - self.column)
            return self._with_copy(spans(width, self.tile.lanes), left)
        full, rest = divmod(total, width)
        last = self._with_copy(spans(rest, self.tile.lanes)) if rest else None
        if last is None or not full:
            return last or self._with_copy(spans(width, self.tile.lanes))
        return when(self.number < full, self._with_copy(spans(width, self.tile.lanes)), last)

    def _with_copy(self, used: list[int], left: Expr | None = None) -> Stmt:
        """Tiles of all rows; ``left`` columns when their number is known at run time only."""
        copying = None
        if self.task.copy is not None:
            copying = self._copied(used, left)
            if left is not None:
                copying = when(left.equal(i64(self.tile.columns)), self._copied(used, None), copying)
        return seq(copying, self._rows(used, left))

    def _copied(self, used: list[int], left: Expr | None) -> Stmt:
        """Copy the panel of a B made at run time, with zeros beyond its last column."""
        lanes, copy = self.tile.lanes, self.task.copy
        there = left if left is not None else i64(sum(used))
        exact = left is None and all(n == lanes for n in used)

        def store(k: Expr, j: Expr) -> Stmt:
            value = self.element(k, j)
            if not exact:
                value = tirx.if_then_else(j < there, value, tirx.const(0, self.task.dtype))
            return tirx.BufferStore(copy, value, [k * self.tile.columns + j])

        def row(k: Expr) -> Stmt:
            if not exact:
                return loop(len(used) * lanes, lambda j: store(k, j), name="j")
            vectors = (loop(lanes, lambda v, n=n: store(k, n * lanes + v), "vectorized", "v") for n in range(len(used)))  # type: ignore[misc]
            return seq(*vectors)

        return loop(self.depth, row, name="k")

    def _rows(self, used: list[int], left: Expr | None) -> Stmt:
        """Full tiles, then the rows left over at the end of the matrix."""
        grid, height = self.task.grid, self.tile.rows
        start = self.task.first_tile
        full, rows = static(grid.full), static(self.nest.rows)

        def tile(number: Expr, rows: int = height, limit: Expr | None = None) -> Stmt:
            return _TileCode(self, used, left, number, rows, limit).emit()

        alone = static(grid.chunks) == 1
        count = grid.full if alone else tirx.max(tirx.min(grid.each, grid.full - start), i64(0))
        before, count = (None, count) if rows is not None else kept(count, "count")
        main = seq(before, loop(count, tile, name="tile"))
        rest = None if rows is None or full is None else rows - full * height
        if rest == 0:
            return main
        tail = self._tail(tile, count) if rest is None else tile(count, rest)
        at_end = tirx.all(start + grid.each > grid.full, tirx.floormod(self.nest.rows, i64(height)) > 0)
        return seq(main, tail if alone and rest is not None else when(at_end, tail))

    def _tail(self, tile: Callable[..., Stmt], number: Expr) -> Stmt:
        """Rows left over when their number is known at run time only: the lowest tile that takes them."""
        height, end = self.tile.rows, self.nest.rows
        chosen = tile(number, height, end)
        for rows in sorted((h for h in TAILS if h < height), reverse=True):
            chosen = when(tirx.floormod(end, i64(height)) <= rows, tile(number, rows, end), chosen)
        return chosen

    def element(self, k: Expr, j: Expr) -> Expr:
        """B at step ``k`` of the block and column ``j`` of the panel."""
        tensor = self.nest.b
        k = self.start + k
        if self.nest.panels:
            return tensor[self.number, k, j]
        return tensor[(*self.batch_index(tensor), k, self.column + j)]

    def batch_index(self, tensor: Tensor) -> tuple[Expr, ...]:
        """Where the task's matrix lies in a stack that may be broadcast."""
        own = tensor.shape[:-2]
        skip = len(self.task.at) - len(own)
        return tuple(i64(0) if static(e) == 1 else self.task.at[skip + n] for n, e in enumerate(own))

    def following(self, offset: Expr) -> Expr:
        """An element of the panel that the thread will read after this one."""
        task, group = self.task, self.nest.blocking.panels
        after = tirx.floormod(self.number + 1, task.grid.panels)
        if task.blocks == 1:
            return self.nest.b[after, i64(0), offset]
        more = self.block + 1 < task.blocks
        inside = tirx.all(self.place + 1 < group, self.number + 1 < task.grid.panels)
        panel = tirx.Select(inside, self.number + 1, tirx.Select(more, self.number - self.place, after))
        step = tirx.Select(inside, self.start, tirx.Select(more, self.start + task.step, i64(0)))
        return self.nest.b[panel, step, offset]


class _TileCode:
    """One register tile of a panel. Rows at or beyond ``limit``, columns at or beyond ``left``, are dropped."""

    def __init__(
        self, panel: _Panel, used: list[int], left: Expr | None, number: Expr, rows: int, limit: Expr | None
    ) -> None:
        self.panel, self.task, self.nest, self.tile = panel, panel.task, panel.nest, panel.tile
        self.used, self.number, self.limit = used, number, limit
        self.row = (self.task.first_tile + number) * self.tile.rows
        padded = self.nest.panels or self.task.copy is not None
        self.lanes = 1 if used == [1] and not padded else self.tile.lanes
        missing = None if limit is None else limit - self.row
        self.register = RegisterTile(
            self.nest.output.dtype,
            rows,
            used,
            self.lanes,
            missing,
            self.task.buffered or left is not None,
            chains=self.tile.rows * self.tile.vectors,
            steps=STEPS,
            scratch=self.task.scratch,
            whole=padded,
            columns=left,
        )

    def emit(self) -> Stmt:
        """Sum up and deliver."""
        # On NEON, tiles are small enough for the code of fetching to cost more than what it hides.
        ahead = self._ahead if self.nest.panels and self.register.together == 1 else None
        depth = [self.panel.depth]
        return self.register.emit(depth, self._a, self._b, self._deliver, ahead=ahead, partial=self._partial())

    def _a(self, i: Expr, k: Expr) -> Expr:
        tensor = self.nest.a
        row = self.row + i if self.limit is None else tirx.min(self.row + i, self.limit - 1)
        return tensor[(*self.panel.batch_index(tensor), row, self.panel.start + k)]

    def _b(self, n: Expr, v: Expr, k: Expr) -> Expr:
        j = n * self.lanes + v
        if self.task.copy is not None:
            return self.task.copy[k * self.tile.columns + j]
        return self.panel.element(k, j)

    def _deliver(self, i: Expr, n: Expr, v: Expr, value: Expr) -> Stmt:
        row, column = self.row + i, self.panel.column + n * self.lanes + v
        if len(self.nest.out_rows) == len(self.nest.batch) + 1:
            return self.task.sink((*self.task.at, row, column), value)
        return self.task.sink((*split_index(row, self.nest.out_rows), column), value)

    def _partial(self) -> PartialSums | None:
        task, panel, width = self.task, self.panel, self.tile.columns
        if task.partial is None:
            return None

        def place(i: int, n: int, v: Expr) -> Expr:
            tile = panel.place * task.grid.most + self.number
            return (tile * self.tile.rows + i) * width + n * self.lanes + v

        return PartialSums(task.partial, place, panel.block.equal(i64(0)), panel.block.equal(i64(task.blocks - 1)))

    def _ahead(self, k: Expr) -> Stmt:
        """A share of the next panel, so that all tiles of the chunk together fetch all of it."""
        size = itemsize(self.task.dtype)
        elements = max(1, LINE // size)
        lines = max(1, self.tile.columns // elements)
        # ``k`` counts rounds of the register tile's loop.
        each = self.register.steps
        tiles, steps = static(self.task.grid.each), simplify(tirx.floordiv(self.task.step + (each - 1), i64(each)))

        def at(offset: Expr) -> Stmt:
            return fetch(self.panel.following(offset))

        if tiles is None:
            share = tirx.floordiv(each * self.tile.columns + (self.task.grid.each - 1), self.task.grid.each)
            first = (self.number * steps + k) * share
            others = seq(*(at(first + n * elements) for n in range(1, each * lines)))
            return seq(at(first), when(share > elements, others) if each * lines > 1 else None)
        every = 1 << max(1, tiles // (each * lines)).bit_length() - 1
        count = -(-each * lines * every // tiles)
        rounds = simplify(tirx.floordiv(steps + (every - 1), i64(every)))
        first = (self.number * rounds + tirx.floordiv(k, i64(every))) * count
        fetching = seq(*(at((first + n) * elements) for n in range(count)))
        return when(tirx.floormod(k, i64(every)).equal(i64(0)), fetching) if every > 1 else fetching
