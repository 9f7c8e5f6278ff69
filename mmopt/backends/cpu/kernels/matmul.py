"""Matrix products: a register tile of the result is kept in vector accumulators while the depth is walked once.

    C[r, j] = Σ_k A[r, k] · B[k, j]

A constant B is packed into panels ``[N/NR][K][NR]`` at compile time, so that the inner loop reads one contiguous
stream; a B made at run time is read in place. The tile is ``MR`` rows by ``NR`` columns, chosen to fill the register
file; rows and columns that do not fill a tile get a smaller tile of their own, so nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor
from mmopt.backends.cpu.kernels.tile import RegisterTile, Tile, spans
from mmopt.backends.cpu.loops import i64, loop, product, seq, split_index, static, when
from mmopt.backends.expressions import simplify

MIN_PIECES = 8
"""Parallel pieces to aim for, so that threads finish together."""


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
        b: ``[*batch_b, K, N]``, or packed panels when ``panels``.
        batch: Broadcast batch extents of the result.
        rows: M.
        columns: N, a constant.
        depth: K.
        tile: Register tile.
        panels: Whether ``b`` is packed by :func:`pack_panels` with ``tile.columns``.
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
        tile: Tile,
        panels: bool,
        shape: Sequence[Expr] | None = None,
    ) -> None:
        super().__init__()
        self.inputs = (a, b)
        self.a, self.b = a, b
        self.batch, self.rows, self.columns, self.depth = tuple(batch), rows, columns, depth
        self.tile, self.panels = tile, panels
        self.out_rows = tuple(shape[:-1]) if shape is not None else (*self.batch, rows)
        self.output = self.result((*self.out_rows, columns), a.dtype)

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return {"rows": self.tile.rows, "columns": self.tile.columns, "packed": self.panels}

    def emit(self, kernel: object, sinks: Sequence[Sink]) -> Stmt:
        """One parallel loop over batch × panels × chunks of rows."""
        buffered = bool(kernel.plan.epilogues.get(self.output))  # type: ignore[attr-defined]
        width = self.tile.columns
        panels = simplify(tirx.floordiv(self.columns + (width - 1), i64(width)))
        batches = simplify(product(self.batch))
        chunks, rows_each = self._chunks(batches, panels)

        def piece(task: Expr) -> Stmt:
            at, panel, chunk = split_index(task, (batches, panels, chunks))
            run = _Panel(self, sinks[0], split_index(at, self.batch), buffered)
            return run.emit(panel, panels, chunk * rows_each, rows_each, exact=static(chunks) == 1)

        work = static(simplify(batches * self.rows * self.columns * self.depth))
        kind = "serial" if work is not None and work < 1 << 16 else "parallel"
        return loop(simplify(batches * panels * chunks), piece, kind, "task")

    def _chunks(self, batches: Expr, panels: Expr) -> tuple[Expr, Expr]:
        """Pieces the rows are split into, and rows in each (a multiple of the tile's)."""
        pieces, rows = static(simplify(batches * panels)), static(self.rows)
        if (pieces is not None and pieces >= MIN_PIECES) or (rows is not None and rows <= self.tile.rows):
            return i64(1), self.rows
        wanted = -(-MIN_PIECES // (pieces or 1))
        if rows is None:
            each = self.tile.rows * 4
            return simplify(tirx.floordiv(self.rows + (each - 1), i64(each))), i64(each)
        tiles = -(-rows // self.tile.rows)
        each = -(-tiles // min(wanted, tiles)) * self.tile.rows
        return i64(-(-rows // each)), i64(each)


class _Panel:
    """Code for one panel of columns of one matrix of the batch."""

    def __init__(self, nest: Matmul, sink: Sink, at: tuple[Expr, ...], buffered: bool) -> None:
        self.nest, self.sink, self.at, self.buffered = nest, sink, at, buffered

    def emit(self, panel: Expr, panels: Expr, first: Expr, count: Expr, *, exact: bool) -> Stmt:
        width = self.nest.tile.columns
        total = static(self.nest.columns)
        if total is None:
            full = self._rows(panel, spans(width, self.nest.tile.lanes), first, count, exact)
            rest = self._narrow(panel, first, count)
            return when((panel + 1) * width <= self.nest.columns, full, rest)
        full, rest = total // width, total % width
        if not rest:
            return self._rows(panel, spans(width, self.nest.tile.lanes), first, count, exact)
        last = self._rows(panel, spans(rest, self.nest.tile.lanes), first, count, exact)
        if not full:
            return last
        return when(panel < full, self._rows(panel, spans(width, self.nest.tile.lanes), first, count, exact), last)

    def _narrow(self, panel: Expr, first: Expr, count: Expr) -> Stmt:
        """Columns left over when their number is only known at run time: one at a time."""
        start = panel * self.nest.tile.columns
        last = tirx.min(first + count, self.nest.rows)

        def column(j: Expr) -> Stmt:
            return loop(last - first, lambda r: self._tile(first + r, 1, None, start + j, [1]), name="r")

        return loop(self.nest.columns - start, column, name="j")

    def _rows(self, panel: Expr, used: list[int], first: Expr, count: Expr, exact: bool) -> Stmt:
        height = self.nest.tile.rows
        start = panel * self.nest.tile.columns
        total, each = static(self.nest.rows), static(count)

        def tile(number: Expr, rows: int = height, limit: Expr | None = None) -> Stmt:
            return self._tile(first + number * height, rows, limit, start, used)

        if total is not None and each is not None and (exact or total % each == 0):
            full, rest = each // height, each % height
            return seq(loop(full, tile, name="tile"), tile(i64(full), rest) if rest else None)
        last = tirx.min(first + count, self.nest.rows)
        full_tiles = tirx.floordiv(last - first, i64(height))
        partial = when(tirx.floormod(last - first, i64(height)) > 0, tile(full_tiles, limit=last))
        return seq(loop(full_tiles, tile, name="tile"), partial)

    def _tile(self, row: Expr, rows: int, limit: Expr | None, column: Expr, used: list[int]) -> Stmt:
        """One register tile. Rows at or beyond ``limit`` are dropped."""
        nest = self.nest
        lanes = nest.tile.lanes if used != [1] else 1
        left = None if limit is None else limit - row
        vectors = -(-nest.tile.columns // nest.tile.lanes)
        tile = RegisterTile(nest.output.dtype, rows, used, lanes, left, self.buffered, vectors)

        def a(i: Expr, k: Expr) -> Expr:
            return self._a(row + i if limit is None else tirx.min(row + i, limit - 1), k)

        def b(n: Expr, v: Expr, k: Expr) -> Expr:
            return self._b(column, n * lanes + v, k)

        def deliver(i: Expr, n: Expr, v: Expr, value: Expr) -> Stmt:
            return self._deliver(row + i, column + n * lanes + v, value)

        return tile.emit([nest.depth], a, b, deliver)

    def _a(self, row: Expr, k: Expr) -> Expr:
        tensor = self.nest.a
        return tensor[(*self._batch_index(tensor, 2), row, k)]

    def _b(self, column: Expr, j: Expr, k: Expr) -> Expr:
        tensor = self.nest.b
        if self.nest.panels:
            return tensor[tirx.floordiv(column, i64(self.nest.tile.columns)), k, j]
        return tensor[(*self._batch_index(tensor, 2), k, column + j)]

    def _batch_index(self, tensor: Tensor, inner: int) -> tuple[Expr, ...]:
        own = tensor.shape[: tensor.ndim - inner]
        skip = len(self.at) - len(own)
        return tuple(i64(0) if static(e) == 1 else self.at[skip + n] for n, e in enumerate(own))

    def _deliver(self, row: Expr, column: Expr, value: Expr) -> Stmt:
        if len(self.nest.out_rows) == len(self.nest.batch) + 1:
            return self.sink((*self.at, row, column), value)
        return self.sink((*split_index(row, self.nest.out_rows), column), value)
