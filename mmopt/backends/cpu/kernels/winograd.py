"""Convolutions with 3×3 kernels and steps of one by Winograd's algorithm: fewer multiplications, in large products.

A tile of ``m × m`` results costs ``(m+2)²`` multiplications a pair of channels instead of ``9 m²``: 2.25 times fewer
for ``m = 2``, 4 times fewer for ``m = 4``. Inputs are transformed, multiplied with transformed filters as ``(m+2)²``
matrix products of tiles × channels, and transformed back; see :mod:`mmopt.backends.cpu.kernels.winograd_transform`.

Error, as a fraction of the largest result, for normally distributed data in float32: below 2e-6 for ``m = 2`` (no more
than a direct sum of the same length), below 1e-5 for ``m = 4``, up to 512 input channels. The tests hold it to that.

Two orders of work: ``apart`` transforms all inputs first, then divides the output channels among the cores, so that
filters are read once; otherwise each task does everything for some tiles, which stay in its core's cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor, index
from mmopt.backends.cpu.kernels.conv import kind_for, spread
from mmopt.backends.cpu.kernels.tile import LINE, RegisterTile, spans
from mmopt.backends.cpu.kernels.winograd_cut import Cut
from mmopt.backends.cpu.kernels.winograd_transform import TAPS, Vectors, matrices
from mmopt.backends.cpu.loops import i64, loop, loops, product, seq, split_index, static, when
from mmopt.backends.expressions import itemsize, simplify

STEPS = 4
"""Input channels in one round of the inner loop."""


class WinogradConvolution(LoopNest):
    """A 3×3 convolution with a constant filter, steps of one, no dilation, no groups.

    Args:
        x: ``[N, C/B, H, W, B]``, without padding.
        filters: From :func:`mmopt.backends.cpu.kernels.winograd_transform.transform_filters`.
        channels: Output channels, a multiple of the lanes.
        before: Padding in front of both axes.
        space: Extents of the result.
        cut: Blocking; its lanes are the block of input and result.
    """

    name = "conv_winograd"

    def __init__(
        self, x: Tensor, filters: Tensor, *, channels: int, before: Sequence[Expr], space: Sequence[Expr], cut: Cut
    ) -> None:
        super().__init__()
        self.inputs = (x, filters)
        self.x, self.filters, self.cut, self.before, self.space = x, filters, cut, tuple(before), tuple(space)
        self.blocks = channels // cut.lanes
        self.output = self.result((x.shape[0], index(self.blocks), *self.space, index(cut.lanes)), x.dtype)
        self.grid = tuple(simplify(tirx.floordiv(s + (cut.tile - 1), i64(cut.tile))) for s in self.space)
        self.tiles = simplify(product(self.grid))

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return dataclasses.asdict(self.cut)

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        """One parallel loop over chunks of tiles, or two: over transforms, then over panels and chunks."""
        cut, images = self.cut, self.x.shape[0]
        chunks = simplify(tirx.floordiv(self.tiles + (cut.chunk - 1), i64(cut.chunk)))
        kind = kind_for(self.output.shape, self.filters.shape[2:4])
        panels, blocks = self.filters.shape[0], self.x.shape[1]
        if cut.apart:
            everything = self._transformed(simplify(images * chunks))

            def transform(flat: Expr) -> Stmt:
                image, chunk, block = split_index(flat, (images, chunks, blocks))
                run = _Chunk(self, sinks[0], image, chunk, image * chunks + chunk, everything)
                return run.transform_inputs(block)

            def multiply(flat: Expr) -> Stmt:
                panel, image, chunk = split_index(flat, (panels, images, chunks))
                return _Chunk(self, sinks[0], image, chunk, image * chunks + chunk, everything).panel(panel)

            return seq(
                tirx.AllocBuffer(everything),
                loop(simplify(images * chunks * blocks), transform, kind, "inputs"),
                loop(simplify(panels * images * chunks), multiply, kind, "panel"),
            )

        def task(flat: Expr) -> Stmt:
            image, chunk = split_index(flat, (images, chunks))
            own = self._transformed(i64(1))
            run = _Chunk(self, sinks[0], image, chunk, i64(0), own)
            return seq(
                tirx.AllocBuffer(own),
                loop(blocks, run.transform_inputs, name="block"),
                loop(panels, run.panel, name="panel"),
            )

        return loop(simplify(images * chunks), task, kind, "chunk")

    def _transformed(self, chunks: Expr) -> tirx.Buffer:
        """Memory for transformed inputs: ``[chunks, points, C/B, tiles, B]``."""
        cut = self.cut
        shape = (chunks, i64(cut.points), self.x.shape[1], i64(cut.chunk), i64(cut.lanes))
        return tirx.decl_buffer(shape, self.x.dtype, "transformed")


@dataclasses.dataclass
class _Chunk:
    """Work on some tiles of one image.

    Attributes:
        chunk: Number of the chunk in its image.
        slot: Where its transformed inputs lie.
        inputs: All transformed inputs.
    """

    nest: WinogradConvolution
    sink: Sink
    image: Expr
    chunk: Expr
    slot: Expr
    inputs: tirx.Buffer

    def __post_init__(self) -> None:
        cut = self.nest.cut
        self.first = self.chunk * cut.chunk
        self.count = simplify(tirx.min(self.nest.tiles - self.first, i64(cut.chunk)))
        self.side = cut.tile + TAPS - 1

    def _corner(self, tile: Expr) -> tuple[Expr, Expr]:
        """First result of a tile."""
        y, x = split_index(self.first + tile, self.nest.grid)
        return y * self.nest.cut.tile, x * self.nest.cut.tile

    # -- inputs ------------------------------------------------------------------------------------------------

    def transform_inputs(self, block: Expr) -> Stmt:
        """``Bᵀ d B`` for all tiles and one block of input channels."""
        nest, side, lanes = self.nest, self.side, self.nest.cut.lanes
        patch = tirx.decl_buffer((i64(side), i64(side), i64(lanes)), nest.x.dtype, "patch")

        def tile(number: Expr) -> Stmt:
            y, x = (corner - pad for corner, pad in zip(self._corner(number), nest.before, strict=True))

            def direct(i: int, j: int, v: Expr) -> Expr:
                return nest.x[(self.image, block, y + i, x + j, v)]

            inside = [y >= 0, x >= 0, y + side <= nest.x.shape[2], x + side <= nest.x.shape[3]]
            border = seq(self._padded(patch, block, y, x), self._inputs(block, number, lambda i, j, v: patch[i, j, v]))
            return when(tirx.all(*inside), self._inputs(block, number, direct), border)

        return seq(tirx.AllocBuffer(patch), loop(self.count, tile, name="tile"))

    def _padded(self, patch: tirx.Buffer, block: Expr, y: Expr, x: Expr) -> Stmt:
        """Copy the inputs of a tile at the border, with zeros for padding."""
        nest = self.nest

        def element(i: Expr, j: Expr) -> Stmt:
            at = [y + i >= 0, x + j >= 0, y + i < nest.x.shape[2], x + j < nest.x.shape[3]]

            def store(value: Callable[[Expr], Expr]) -> Stmt:
                fill = lambda v: tirx.BufferStore(patch, value(v), [i, j, v])  # noqa: E731
                return loop(nest.cut.lanes, fill, "vectorized", "v")

            inside = store(lambda v: nest.x[(self.image, block, y + i, x + j, v)])
            return when(tirx.all(*at), inside, store(lambda v: tirx.const(0, nest.x.dtype)))

        return loops([i64(self.side)] * 2, element, "p")

    def _inputs(self, block: Expr, tile: Expr, read: Callable[[int, int, Expr], Expr]) -> Stmt:
        rows, side, lanes = matrices(self.nest.cut.tile).inputs, self.side, self.nest.cut.lanes
        code = Vectors(lanes, self.nest.x.dtype)
        columns = []
        for j in range(side):
            values = [code.keep(lambda v, i=i, j=j: read(i, j, v)) for i in range(side)]  # type: ignore[misc]
            columns.append(code.apply(rows, values))
        for i in range(side):
            for j, value in enumerate(code.apply(rows, [column[i] for column in columns])):
                place = (self.slot, i64(i * side + j), block, tile)
                code.statements.append(
                    loop(lanes, lambda v, p=place, x=value: self._keep(p, v, x(v)), "vectorized", "v")  # type: ignore[misc]
                )
        return code.done()

    def _keep(self, place: tuple[Expr, ...], lane: Expr, value: Expr) -> Stmt:
        return tirx.BufferStore(self.inputs, value, [*place, lane])

    # -- products ----------------------------------------------------------------------------------------------

    def panel(self, panel: Expr) -> Stmt:
        """Products of all points for one panel of output channels, and their results."""
        cut = self.nest.cut
        shape = (i64(cut.points), i64(cut.chunk), i64(cut.vectors * cut.lanes))
        sums = tirx.decl_buffer(shape, self.nest.x.dtype, "sums")
        tall = simplify(tirx.floordiv(self.count + (cut.rows - 1), i64(cut.rows)))

        def point(p: Expr) -> Stmt:
            return loop(tall, lambda number: self._product(sums, panel, p, number, tall), name="rows")

        left = simplify(self.nest.blocks - panel * cut.vectors)
        vectors = i64(cut.vectors) if self.nest.blocks % cut.vectors == 0 else tirx.min(left, i64(cut.vectors))

        def results(tile: Expr) -> Stmt:
            return loop(vectors, lambda n: self._results(sums, panel * cut.vectors + n, n, tile), name="n")

        return seq(
            tirx.AllocBuffer(sums),
            loop(cut.points, point, name="point"),
            loop(self.count, results, name="tile"),
        )

    def _product(self, sums: tirx.Buffer, panel: Expr, point: Expr, number: Expr, tall: Expr) -> Stmt:
        nest, cut = self.nest, self.nest.cut
        used = spans(cut.vectors * cut.lanes, cut.lanes)
        tile = RegisterTile(nest.x.dtype, cut.rows, used, cut.lanes, steps=STEPS)
        first, filters = number * cut.rows, nest.filters
        depth = filters.shape[2:4]
        apart = max(1, LINE // (cut.lanes * itemsize(nest.x.dtype)))

        def a(i: Expr, c: Expr, k: Expr) -> Expr:
            return self.inputs[self.slot, point, c, first + i, k]

        def b(n: Expr, v: Expr, c: Expr, k: Expr) -> Expr:
            return filters[(panel, point, c, k, n * cut.lanes + v)]

        def deliver(i: Expr, n: Expr, v: Expr, value: Expr) -> Stmt:
            return tirx.BufferStore(sums, value, [point, first + i, n * cut.lanes + v])

        def ahead(c: Expr, k: Expr) -> Stmt:
            lines = -(-STEPS * cut.vectors // apart)

            def element(n: Expr) -> Expr:
                step, vector = split_index(n * apart, (i64(STEPS), i64(cut.vectors)))
                return filters[(panel, point + 1, c, k * STEPS + step, vector * cut.lanes)]

            return seq(*spread(lines, tall, tirx.floormod(number, i64(lines)), element))

        return tile.emit(depth, a, b, deliver, ahead=ahead)

    # -- results -----------------------------------------------------------------------------------------------

    def _results(self, sums: tirx.Buffer, block: Expr, vector: Expr, tile: Expr) -> Stmt:
        """``Aᵀ M A`` for one tile and one block of output channels, handed over."""
        nest, cut, side = self.nest, self.nest.cut, self.side
        rows, lanes = matrices(cut.tile).out, cut.lanes
        code = Vectors(lanes, nest.x.dtype)

        def read(i: int, j: int) -> Callable[[Expr], Expr]:
            return code.keep(lambda v: sums[i64(i * side + j), tile, vector * lanes + v])

        columns = [code.apply_transposed(rows, [read(i, j) for i in range(side)]) for j in range(side)]
        y, x = self._corner(tile)
        for i in range(cut.tile):
            line = code.apply_transposed(rows, [column[i] for column in columns])
            code.statements.append(self._line(block, (y + i, x), [i > 0, True], line))
        return code.done()

    def _line(
        self, block: Expr, start: tuple[Expr, Expr], tested: Sequence[bool], line: Sequence[Callable[[Expr], Expr]]
    ) -> Stmt:
        """Hand over a line of a tile, as far as it lies in the result."""
        nest = self.nest
        whole = [(static(s) or 1) % nest.cut.tile == 0 for s in nest.space]
        made = []
        for j, value in enumerate(line):
            at = (start[0], start[1] + j)
            give = lambda v, a=at, x=value: self.sink((self.image, block, *a, v), x(v))  # noqa: E731
            store = loop(nest.cut.lanes, give, "vectorized", "v")
            made.append(store if j == 0 or whole[1] else when(at[1] < nest.space[1], store))
        stores = seq(*made)
        return stores if not tested[0] or whole[0] else when(start[0] < nest.space[0], stores)
