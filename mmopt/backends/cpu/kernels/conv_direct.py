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
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor, index
from mmopt.backends.cpu.kernels.conv import Window, kind_for, long_epilogue, read_with, spread
from mmopt.backends.cpu.kernels.conv_patches import Patch
from mmopt.backends.cpu.kernels.tile import RegisterTile, spans
from mmopt.backends.cpu.loops import at_index, flat_index, i64, loop, product, seq, split_index, static, when
from mmopt.backends.expressions import simplify

STEPS = 4
"""Input channels in one round of the inner loop."""


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
        result_block: Channels of one block of the result, a part of the patch's lanes; all of them when 0.
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
        result_block: int = 0,
        flat: bool = False,
    ) -> None:
        super().__init__()
        self.inputs = (x, filters)
        self.x, self.filters, self.window, self.patch = x, filters, window, patch
        self.channels, self.groups, self.block, self.plain, self.flat = channels, groups, block, plain, flat
        self.space = window.output(x.shape[2:] if plain else x.shape[2:-1])
        self.result_block = result_block or patch.lanes
        blocks = -(-channels // self.result_block)
        self.output = self.result((x.shape[0], index(blocks), *self.space, index(self.result_block)), x.dtype)
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

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        """One parallel loop over parts of the positions × panels of channels × tiles of a part."""
        buffered = long_epilogue(kernel, self.output)
        added = read_with(kernel, self.output) if self.patch.ahead else []
        places = (self.x.shape[0], *self.outer, self.strips, self.tiles)
        count, panels, parts = simplify(product(places)), self.filters.shape[0], self.patch.parts
        known = static(count)
        parts = parts if known is None else min(parts, known)
        each = simplify(tirx.floordiv(count + (parts - 1), i64(parts)))

        def task(part: Expr, panel: Expr, number: Expr) -> Stmt:
            place = simplify(part * each + number)

            def tile(image: Expr, *at: Expr) -> Stmt:
                run = _Tile(self, sinks[0], panel, image, at[:-2], number, each, buffered, added)
                return run.emit(*at[-2:])

            emitted = at_index(place, places, tile)
            return emitted if known is not None and known % parts == 0 else when(place < count, emitted)

        total = simplify(panels * each * parts)
        kind = kind_for(self.output.shape, self.filters.shape[1:-1])
        return loop(total, lambda flat: at_index(flat, (i64(parts), panels, each), task), kind, "task")


@dataclasses.dataclass
class _Tile:
    """One register tile, for one panel of output channels.

    Attributes:
        outer: Position on all spatial axes but the last two.
        number: Which tile of its part this is.
        count: Tiles of the part.
        added: Reads an element at the same place of each tensor that is read along with the results.
    """

    nest: DirectConvolution
    sink: Sink
    panel: Expr
    image: Expr
    outer: tuple[Expr, ...]
    number: Expr
    count: Expr
    buffered: bool
    added: list[Callable[..., Expr]]

    def __post_init__(self) -> None:
        nest = self.nest
        self.group = tirx.floordiv(self.panel, i64(nest.per_group))
        number = tirx.floormod(self.panel, i64(nest.per_group))
        first = self.group * (nest.channels // nest.groups) + number * nest.patch.columns
        self.first_block = simplify(tirx.floordiv(first, i64(nest.result_block)))

    def emit(self, strip: Expr, tile: Expr) -> Stmt:
        """A whole panel, or the last of a group, which may be narrower."""
        patch, each = self.nest.patch, self.nest.channels // self.nest.groups
        rest = each % patch.columns
        full = spans(patch.columns, patch.lanes)
        if not rest:
            return self._lines(full, strip, tile)
        last = self._lines(spans(rest, patch.lanes), strip, tile)
        if self.nest.per_group == 1:
            return last
        tail = tirx.floormod(self.panel, i64(self.nest.per_group)).equal(i64(self.nest.per_group - 1))
        return when(tail, last, self._lines(full, strip, tile))

    def _lines(self, used: list[int], strip: Expr, tile: Expr) -> Stmt:
        """Lines that fill the tile, or the last ones."""
        height, lines = self.nest.patch.height, self.nest.lines
        start, total = strip * height, static(lines)
        if height == 1 or (total is not None and total % height == 0):
            return self._columns(used, start, height, tile)
        full = self._columns(used, start, height, tile)
        if total is None:
            rest = loop(lines - start, lambda y: self._columns(used, start + y, 1, tile), name="y")
            return when(start + height <= lines, full, rest)
        rest = self._columns(used, start, total % height, tile)
        return rest if total < height else when(start + height <= lines, full, rest)

    def _columns(self, used: list[int], line: Expr, height: int, tile: Expr) -> Stmt:
        """Positions that fill the tile, or the last ones."""
        step, width = self.nest.patch.width, self.nest.width
        start, total = tile * step, static(width)
        full = self._sum(used, line, height, start, step)
        if total is None:
            return when(start + step <= width, full, self._limited(used, line, height, start, width))
        if total % step == 0:
            return full
        rest = self._sum(used, line, height, start, total % step)
        return rest if total < step else when(start + step <= width, full, rest)

    def _limited(self, used: list[int], line: Expr, height: int, start: Expr, limit: Expr) -> Stmt:
        """Positions left over when their number is known at run time only: a tile, or half of one if that is enough."""
        step = self.nest.patch.width
        half = -(-step // 2)

        def lines(rows: int) -> Stmt:
            return seq(*(self._sum(used, line + y, 1, start, rows, limit) for y in range(height)))

        return when(start + half < limit, lines(step), lines(half)) if step > 2 else lines(step)

    def _place(self, y: Expr, x: Expr) -> tuple[Expr, ...]:
        """Output coordinates of a position."""
        if self.nest.flat:
            return split_index(x, self.nest.space)
        return (*self.outer, y, x)[-len(self.nest.space) :]

    def _sum(self, used: list[int], y: Expr, height: int, x: Expr, width: int, limit: Expr | None = None) -> Stmt:
        """The register tile at line ``y`` and position ``x``; positions from ``limit`` on are dropped."""
        nest, lanes = self.nest, self.nest.patch.lanes
        left = None if limit is None else limit - x
        steps = STEPS if nest.block > 1 else 1
        dtype, together = nest.output.dtype, nest.result_block
        tile = RegisterTile(dtype, height * width, used, lanes, left, self.buffered, steps=steps, handed=together)

        def at(i: Expr) -> tuple[Expr, Expr]:
            return (y, x + i) if height == 1 else (y + tirx.floordiv(i, i64(width)), x + tirx.floormod(i, i64(width)))

        def a(i: Expr, *k: Expr) -> Expr:
            line, column = at(i)
            return self._input(line, column if limit is None else tirx.min(column, limit - 1), k)

        def b(n: Expr, v: Expr, *k: Expr) -> Expr:
            return self._filter(self.panel, k, n * lanes + v)

        def result(i: Expr, n: Expr, v: Expr) -> tuple[Expr, ...]:
            return (self.image, self.first_block + n, *self._place(*at(i)), v)

        def deliver(i: Expr, n: Expr, v: Expr, value: Expr) -> Stmt:
            return self.sink(result(i, n, v), value)

        def ahead(*k: Expr) -> Stmt:
            further = (y, x + width) if height == 1 else (y + height, x)
            return seq(
                *(self._next_inputs(k, further, width) if nest.patch.inputs else ()),
                *self._next_filters(k, tile.steps),
                *self._added(k, tile.steps, lambda i, n: result(i, n, i64(0)), height * width, sum(used)),
            )

        hook = ahead if nest.patch.ahead and nest.block > 1 and limit is None else None
        return tile.emit(nest.depth, a, b, deliver, ahead=hook)

    def _input(self, line: Expr, column: Expr, k: Sequence[Expr]) -> Expr:
        nest = self.nest
        c, *tap = k if nest.block == 1 else k[:-1]
        inner = k[-1:] if nest.block > 1 else () if nest.plain else (i64(0),)
        where = nest.window.position(self._place(line, column), tap)
        return nest.x[(self.image, self.group * nest.filters.shape[1] + c, *where, *inner)]

    def _filter(self, panel: Expr, k: Sequence[Expr], column: Expr) -> Expr:
        inner = () if self.nest.block > 1 else (i64(0),)
        return self.nest.filters[(panel, *k, *inner, column)]

    # -- what is fetched ahead: k are the indices of the depth but the last, and the round ----------------------

    def _next_inputs(self, k: Sequence[Expr], start: tuple[Expr, Expr], width: int) -> list[Stmt]:
        """The last line that the next tile reads, from the same block of channels."""
        nest = self.nest
        rounds = simplify(product(nest.depth[1:-1]) * (nest.block // STEPS))
        number = flat_index(k[1:], (*nest.depth[1:-1], i64(nest.block // STEPS)))
        last = [extent - 1 for extent in nest.depth[1:-1]]
        y, x = start

        apart = nest.patch.of_a_line(nest.x.dtype, nest.block)

        def element(n: Expr) -> Expr:
            return self._input(y, x + n * apart, (k[0], *last[:-1], i64(0), i64(0)))

        return spread(-(-width // apart), rounds, number, element)

    def _next_filters(self, k: Sequence[Expr], steps: int) -> list[Stmt]:
        """This tile's share of the next panel, at the place that is in use of its own panel.

        The first tile's share touches all of the panel here and there, so that the hardware fetches the rest.
        """
        patch = self.nest.patch
        apart = patch.of_a_line(self.nest.filters.dtype, patch.lanes)
        lines = steps * -(-patch.vectors // apart)

        def element(n: Expr) -> Expr:
            step, vector = split_index(n, (i64(steps), i64(lines // steps)))
            return self._filter(self.panel + 1, (*k[:-1], k[-1] * steps + step), vector * (apart * patch.lanes))

        return spread(lines, self.count, tirx.floormod(self.number, i64(lines)), element)

    def _added(
        self, k: Sequence[Expr], steps: int, place: Callable[[Expr, Expr], tuple[Expr, ...]], rows: int, columns: int
    ) -> list[Stmt]:
        """What is added to results on the way, or else goes into what is made of them."""
        extents, block = (*self.nest.depth[:-1], i64(self.nest.block // steps)), self.nest.result_block
        number = flat_index(k, extents)
        apart, blocks = self.nest.patch.of_a_line(self.nest.output.dtype, block), -(-columns // block)
        lines = -(-rows // apart)
        made: list[Stmt] = []
        for read in self.added:

            def element(n: Expr, read: Callable[..., Expr] = read) -> Expr:
                vector, line = split_index(n, (i64(blocks), i64(lines)))
                return read(place(line * apart, vector))

            made += spread(lines * blocks, simplify(product(extents)), number, element)
        return made
