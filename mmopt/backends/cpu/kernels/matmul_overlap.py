"""The order of work of AMX products: the results of each tile are handed over while the next one is multiplied."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.cpu.dot import TilePhases, address
from mmopt.backends.cpu.loops import i64, loop, seq, static, when
from mmopt.backends.expressions import itemsize, simplify

if TYPE_CHECKING:
    from mmopt.backends.cpu.kernels.matmul_dot import Emitter


class Overlap:
    """A sequence of tiles in which each one's results are handed over between the steps of the next.

    Args:
        emitter: The product.
        height: Rows the code is for.
        present: Rows that are there: ``height``, or all rows of a matrix that has fewer.
        tiles: Tiles of one panel.
        panels: Panels.
    """

    def __init__(self, emitter: Emitter, height: int, present: Expr, tiles: Expr, panels: Expr) -> None:
        self.emitter, self.present, self.tiles = emitter, present, tiles
        self.height = height
        self.count = simplify(tiles * panels)
        self.each = -(-height // emitter.steps)
        cut, rows = emitter.cut, static(emitter.nest.rows)
        self.even = static(present) is None or (rows is not None and rows % height == 0)
        self.kernel = TilePhases(emitter.dot, height, cut.vectors, cut.prefetch, near=cut.near > 0)
        emitter.kernels.append(self.kernel)

    def emit(self, first: Expr, panel: Expr) -> Stmt:
        """One round more than there are tiles: the last only hands over."""

        def place(number: Expr) -> tuple[Expr, Expr]:
            row = first + tirx.floormod(number, self.tiles) * self.height
            return row, panel + tirx.floordiv(number, self.tiles)

        def turn(number: Expr) -> Stmt:
            there, some = number < self.count, number > 0
            now, before = place(number), place(number - 1)
            tile = tirx.floormod(number, self.tiles)

            def step(k: Expr) -> Stmt:
                following = self._start(place(number + 1)[0])
                multiply = when(there, self._step(self._start(now[0]), tile, now[1], k, following))
                return seq(multiply, when(some, self._hand_over(*before, k, self._offset(number - 1))))

            done = self.kernel.end(address(self.emitter.sums[self._offset(number)]), self.emitter.width * 4)
            steps = loop(self.emitter.steps, step, name="k")
            return seq(when(there, self.kernel.begin()), steps, when(there, done))

        return loop(self.count + 1, turn, name="tile")

    def _start(self, row: Expr) -> Expr:
        """Where a tile really starts: the last one starts further up, so that it has all its rows."""
        return row if self.even else tirx.min(row, self.emitter.nest.rows - self.height)

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
        """The rows that fall to step ``k``; those above ``row`` belong to the tile before."""
        begin, start = self._start(row), k * self.each
        low = start if self.even else tirx.max(start, row - begin)
        whole = self.even and self.each * self.emitter.steps == self.height and static(self.present) == self.height
        count = i64(self.each) if whole else tirx.min(start + self.each, self.present) - low

        def rows(width: int) -> Stmt:
            return loop(count, lambda i: self.emitter.row(begin, low + i, panel, width, offset), name="i")

        body = self.emitter.by_width(panel, rows)
        return body if whole else when(count > 0, body)
