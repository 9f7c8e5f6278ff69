"""Direct convolution over blocked channels.

    Y[n, o, y] = Σ_c Σ_t X[n, c, y·stride + t·dilation − pad] · W[o, c, t]

Activations are stored as ``[N, C/B, *space, B]`` with B the lanes of a vector, results likewise; weights as
``[O/NR, C/B, *kernel, B, NR]``. The register tile is a patch of positions of the last two axes by NR output channels:
the input element is broadcast, so the input may also be read in plain ``[N, C, *space]`` order, which the first layers
of a network (1 to 4 channels) do. Padding is done beforehand by a copy; the inner loops have no conditions.

Weights stream from the second-level cache once for each tile, so that tall tiles pay: their traffic for each
multiply-add falls with the number of positions. Parallel tasks are in an order that keeps either a part of the input or
a panel of weights in that cache; see :mod:`mmopt.backends.cpu.kernels.conv_patches`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor, index
from mmopt.backends.cpu.kernels.conv import Window, kind_for, long_epilogue
from mmopt.backends.cpu.kernels.conv_patches import Patch
from mmopt.backends.cpu.kernels.tile import RegisterTile, fetch, spans
from mmopt.backends.cpu.loops import i64, loop, product, seq, split_index, static, when
from mmopt.backends.expressions import simplify

STEPS = 4
"""Input channels in one round of the inner loop."""

UNROLLED = 8
"""Taps of a line up to which all are one round, where channels are not blocked."""


class DirectConvolution(LoopNest):
    """A grouped convolution with a constant filter.

    Args:
        x: Padded input: ``[N, C/block, *space, block]``, or ``[N, C, *space]`` when ``block`` is 1 and ``plain``.
        filters: From :func:`mmopt.backends.cpu.kernels.conv.pack_filters`.
        channels: Output channels.
        groups: Number of groups.
        block: Channels of one input block.
        window: Geometry.
        patch: Blocking; its lanes are the block of the result.
        plain: Whether ``x`` has no block axis.
        flat: All taps and strides are one, so that all spatial axes are walked as a single one.
    """

    name = "conv"

    def __init__(
        self,
        x: Tensor,
        filters: Tensor,
        *,
        channels: int,
        groups: int,
        block: int,
        window: Window,
        patch: Patch,
        plain: bool,
        flat: bool = False,
    ) -> None:
        super().__init__()
        self.inputs = (x, filters)
        self.x, self.filters, self.window, self.patch = x, filters, window, patch
        self.channels, self.groups, self.block, self.plain, self.flat = channels, groups, block, plain, flat
        self.space = window.output(x.shape[2:] if plain else x.shape[2:-1])
        blocks = -(-channels // patch.lanes)
        self.output = self.result((x.shape[0], index(blocks), *self.space, index(patch.lanes)), x.dtype)
        walked = (simplify(product(self.space)),) if flat else self.space
        *self.outer, self.lines, self.width = (i64(1), *walked)[-max(2, len(walked)) :]
        self.depth = filters.shape[1:-1] if block > 1 else filters.shape[1:-2]
        self.strips = simplify(tirx.floordiv(self.lines + (patch.height - 1), i64(patch.height)))
        self.tiles = simplify(tirx.floordiv(self.width + (patch.width - 1), i64(patch.width)))

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return {**dataclasses.asdict(self.patch), "block": self.block, "kernel": self.window.kernel}

    @property
    def per_group(self) -> int:
        """Panels of one group."""
        return -(-(self.channels // self.groups) // self.patch.columns)

    def emit(self, kernel: object, sinks: Sequence[Sink]) -> Stmt:
        """One parallel loop over panels of channels and pieces of lines."""
        buffered = long_epilogue(kernel, self.output)
        patch, count = self.patch, static(self.tiles)
        piece = patch.piece if count is None else min(patch.piece, count)
        pieces = simplify(tirx.floordiv(self.tiles + (piece - 1), i64(piece)))
        places = (self.x.shape[0], *self.outer, self.strips, pieces)
        panels = self.filters.shape[0]

        def task(flat: Expr) -> Stmt:
            if patch.panels_first:
                panel, image, *at, strip, number = split_index(flat, (panels, *places))
            else:
                image, *at, strip, number, panel = split_index(flat, (*places, panels))
            return _Task(self, sinks[0], panel, image, tuple(at), strip, number * piece, piece, buffered).emit()

        total = simplify(product((*places, panels)))
        return loop(total, task, kind_for(self.output.shape, self.filters.shape[1:-1]), "task")


@dataclasses.dataclass
class _Task:
    """Some tiles of one strip of lines, for one panel of output channels.

    Attributes:
        outer: Position on all spatial axes but the last two.
        strip: Number of the strip, of as many lines as a tile has.
        first: Number of the first tile along the lines.
        piece: Tiles along the lines.
    """

    nest: DirectConvolution
    sink: Sink
    panel: Expr
    image: Expr
    outer: tuple[Expr, ...]
    strip: Expr
    first: Expr
    piece: int
    buffered: bool

    def __post_init__(self) -> None:
        nest = self.nest
        self.group = tirx.floordiv(self.panel, i64(nest.per_group))
        number = tirx.floormod(self.panel, i64(nest.per_group))
        first = self.group * (nest.channels // nest.groups) + number * nest.patch.columns
        self.first_block = simplify(tirx.floordiv(first, i64(nest.patch.lanes)))

    def emit(self) -> Stmt:
        """Whole panels, or the last of a group, which may be narrower."""
        patch, each = self.nest.patch, self.nest.channels // self.nest.groups
        rest = each % patch.columns
        full = spans(patch.columns, patch.lanes)
        if not rest:
            return self._strip(full)
        last = self._strip(spans(rest, patch.lanes))
        if self.nest.per_group == 1:
            return last
        tail = tirx.floormod(self.panel, i64(self.nest.per_group)).equal(i64(self.nest.per_group - 1))
        return when(tail, last, self._strip(full))

    def _strip(self, used: list[int]) -> Stmt:
        """Lines that fill a tile, or the last ones."""
        height, lines = self.nest.patch.height, self.nest.lines
        start, total = self.strip * height, static(lines)
        if height == 1 or (total is not None and total % height == 0):
            return self._tiles(used, start, height)
        full = self._tiles(used, start, height)
        if total is None:
            rest = loop(lines - start, lambda y: self._tiles(used, start + y, 1), name="y")
            return when(start + height <= lines, full, rest)
        rest = self._tiles(used, start, total % height)
        return rest if total < height else when(start + height <= lines, full, rest)

    def _tiles(self, used: list[int], line: Expr, height: int) -> Stmt:
        """The piece of ``height`` lines from ``line`` on."""
        step, width = self.nest.patch.width, self.nest.width
        total = static(width)

        def tile(number: Expr) -> Stmt:
            return self._tile(used, line, height, (self.first + number) * step, step)

        if total is not None and total <= self.piece * step:
            full, rest = divmod(total, step)
            last = self._tile(used, line, height, i64(full * step), rest) if rest else None
            return seq(loop(full, tile, name="tile"), last)
        whole = simplify(tirx.floordiv(width, i64(step)))
        here = tirx.max(tirx.min(whole - self.first, i64(self.piece)), i64(0))
        main = loop(simplify(here), tile, name="tile")
        if total is not None and total % step == 0:
            return main
        start = whole * step
        mine = tirx.all(self.first <= whole, whole < self.first + self.piece)
        if total is not None:
            return seq(main, when(mine, self._tile(used, line, height, start, total % step)))
        return seq(main, when(tirx.all(mine, start < width), self._limited(used, line, height, start, width)))

    def _limited(self, used: list[int], line: Expr, height: int, start: Expr, limit: Expr) -> Stmt:
        """Positions left over when their number is known at run time only: a tile, or half of one if that is enough."""
        step = self.nest.patch.width
        half = -(-step // 2)

        def lines(rows: int) -> Stmt:
            return seq(*(self._tile(used, line + y, 1, start, rows, limit) for y in range(height)))

        return when(start + half < limit, lines(step), lines(half)) if step > 2 else lines(step)

    def _place(self, y: Expr, x: Expr) -> tuple[Expr, ...]:
        """Output coordinates of a position."""
        if self.nest.flat:
            return split_index(x, self.nest.space)
        return (*self.outer, y, x)[-len(self.nest.space) :]

    def _tile(self, used: list[int], y: Expr, height: int, x: Expr, width: int, limit: Expr | None = None) -> Stmt:
        """The register tile at line ``y`` and position ``x``; positions from ``limit`` on are dropped."""
        nest, lanes = self.nest, self.nest.patch.lanes
        taps = static(nest.depth[-1]) or 1
        tile = RegisterTile(
            nest.output.dtype,
            height * width,
            used,
            lanes,
            None if limit is None else limit - x,
            self.buffered,
            steps=STEPS if nest.block > 1 else taps if taps <= UNROLLED else 1,
        )

        def at(i: Expr) -> tuple[Expr, Expr]:
            return (y, x + i) if height == 1 else (y + tirx.floordiv(i, i64(width)), x + tirx.floormod(i, i64(width)))

        def a(i: Expr, c: Expr, *rest: Expr) -> Expr:
            tap, inner = (rest[:-1], rest[-1:]) if nest.block > 1 else (rest, () if nest.plain else (i64(0),))
            line, column = at(i)
            where = nest.window.position(
                self._place(line, column if limit is None else tirx.min(column, limit - 1)), tap
            )
            return nest.x[(self.image, self.group * nest.filters.shape[1] + c, *where, *inner)]

        def b(n: Expr, v: Expr, *k: Expr) -> Expr:
            return self._filter(self.panel, k, n * lanes + v)

        def deliver(i: Expr, n: Expr, v: Expr, value: Expr) -> Stmt:
            return self.sink((self.image, self.first_block + n, *self._place(*at(i)), v), value)

        number = self.strip * nest.tiles + tirx.floordiv(x, i64(nest.patch.width))
        ahead = self._ahead(number, tile.steps) if nest.patch.ahead else None
        return tile.emit(nest.depth, a, b, deliver, ahead=ahead)

    def _filter(self, panel: Expr, k: Sequence[Expr], column: Expr) -> Expr:
        inner = () if self.nest.block > 1 else (i64(0),)
        return self.nest.filters[(panel, *k, *inner, column)]

    def _ahead(self, number: Expr, steps: int) -> Callable[..., Stmt]:
        """Each tile fetches its share of the next panel of weights, while it uses the same place of its own."""
        patch = self.nest.patch
        apart = patch.vectors_of_a_line(self.nest.filters.dtype)
        lines = [(s, v) for s in range(steps) for v in range(0, patch.vectors, apart)]
        tiles = static(simplify(self.nest.strips * self.nest.tiles))
        share = 1 if tiles is None else -(-len(lines) // tiles)

        def fetches(*k: Expr) -> Stmt:
            made = []
            for n in range(share):
                chosen = tirx.floormod(number * share + n, i64(len(lines)))
                step, vector = split_index(chosen, (i64(steps), i64(len(lines) // steps)))
                place = (*k[:-1], k[-1] * steps + step)
                made.append(fetch(self._filter(self.panel + 1, place, vector * (apart * patch.lanes))))
            return seq(*made)

        return fetches
