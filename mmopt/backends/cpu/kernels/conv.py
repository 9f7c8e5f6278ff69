"""Direct convolution over blocked channels.

    Y[n, o, y] = Σ_c Σ_t X[n, c, y·stride + t·dilation − pad] · W[o, c, t]

Activations are stored as ``[N, C/B, *space, B]`` with B the lanes of a vector, results likewise; weights as
``[O/NR, C/B, *kernel, B, NR]``. The register tile is a run of positions along the last axis by NR output channels: the
input element is broadcast, so the input may also be read in plain ``[N, C, *space]`` order, which the first layers of a
network (1 to 4 channels) do. Padding is done beforehand by a copy; the inner loops have no conditions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor, index
from mmopt.backends.cpu.kernels.tile import RegisterTile, Tile, spans
from mmopt.backends.cpu.loops import i64, loop, loops, product, seq, split_index, static
from mmopt.backends.expressions import simplify

PARALLEL_WORK = 1 << 18
"""Multiply-adds from which forking threads pays."""


@dataclasses.dataclass(frozen=True)
class Window:
    """Geometry of a convolution: one entry for each spatial axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]

    def output(self, padded: Sequence[Expr]) -> tuple[Expr, ...]:
        """Extents of the result for a padded input."""
        return tuple(
            simplify(tirx.floordiv(extent - (d * (k - 1) + 1), i64(s)) + 1)
            for extent, k, s, d in zip(padded, self.kernel, self.strides, self.dilations, strict=True)
        )

    def position(self, output: Sequence[Expr], tap: Sequence[Expr]) -> tuple[Expr, ...]:
        """Input coordinates that output coordinates see through a tap of the kernel."""
        return tuple(o * s + t * d for o, t, s, d in zip(output, tap, self.strides, self.dilations, strict=True))


def pack_filters(weight: np.ndarray, groups: int, block: int, columns: int) -> np.ndarray:
    """Rearrange ``[O, C/g, *kernel]`` into ``[panels, C/g/block, *kernel, block, columns]``, zero-padded columns.

    Panels do not cross groups.
    """
    out, depth, *kernel = weight.shape
    each = out // groups
    panels = -(-each // columns)
    padded = np.zeros((groups, panels * columns, depth, *kernel), weight.dtype)
    padded[:, :each] = weight.reshape(groups, each, depth, *kernel)
    split = padded.reshape(groups * panels, columns, depth // block, block, *kernel)
    space = range(4, 4 + len(kernel))
    return split.transpose(0, 2, *space, 3, 1)


def _kind(results: Sequence[Expr], depth: Sequence[Expr]) -> str:
    """``serial`` for work known to be too little for a fork of threads to pay."""
    work = static(simplify(product([*results, *depth])))
    return "serial" if work is not None and work < PARALLEL_WORK else "parallel"


class Convolution(LoopNest):
    """A grouped convolution with a constant filter.

    Args:
        x: Padded input: ``[N, C/block, *space, block]``, or ``[N, C, *space]`` when ``block`` is 1 and ``plain``.
        filters: From :func:`pack_filters`.
        channels: Output channels.
        groups: Number of groups.
        block: Channels of one input block.
        window: Geometry.
        tile: Register tile; its lanes are the block of the result.
        plain: Whether ``x`` has no block axis.
        flat: All taps are one, so that all spatial axes are walked as a single one.
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
        tile: Tile,
        plain: bool,
        flat: bool = False,
    ) -> None:
        super().__init__()
        self.inputs = (x, filters)
        self.flat = flat
        self.x, self.filters, self.window, self.tile = x, filters, window, tile
        self.channels, self.groups, self.block, self.plain = channels, groups, block, plain
        space = x.shape[2:] if plain else x.shape[2:-1]
        self.space = window.output(space)
        blocks = -(-channels // tile.lanes)
        self.output = self.result((x.shape[0], index(blocks), *self.space, index(tile.lanes)), x.dtype)

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return {"rows": self.tile.rows, "columns": self.tile.columns, "block": self.block, "kernel": self.window.kernel}

    def emit(self, kernel: object, sinks: Sequence[Sink]) -> Stmt:
        """One parallel loop over panels of channels × images × all spatial axes but the last."""
        buffered = bool(kernel.plan.epilogues.get(self.output))  # type: ignore[attr-defined]
        *outer, width = (simplify(product(self.space)),) if self.flat else self.space
        panels = self.filters.shape[0]
        extents = (panels, self.x.shape[0], *outer)
        each = self.channels // self.groups
        rest = each % self.tile.columns
        per_group = -(-each // self.tile.columns)

        def task(flat: Expr) -> Stmt:
            panel, image, *at = split_index(flat, extents)
            full = _Line(self, sinks[0], panel, image, tuple(at), spans(self.tile.columns, self.tile.lanes), buffered)
            if not rest:
                return full.emit(width)
            last = _Line(self, sinks[0], panel, image, tuple(at), spans(rest, self.tile.lanes), buffered)
            if per_group == 1:
                return last.emit(width)
            tail = tirx.floormod(panel, i64(per_group)).equal(i64(per_group - 1))
            return tirx.IfThenElse(tail, last.emit(width), full.emit(width))

        return loop(simplify(product(extents)), task, _kind(self.output.shape, self.filters.shape[1:-1]), "task")


class _Line:
    """All tiles along the last spatial axis for one panel of output channels."""

    def __init__(
        self,
        nest: Convolution,
        sink: Sink,
        panel: Expr,
        image: Expr,
        outer: tuple[Expr, ...],
        used: list[int],
        buffered: bool,
    ) -> None:
        self.nest, self.sink, self.panel, self.image, self.outer = nest, sink, panel, image, outer
        self.used, self.buffered = used, buffered
        each = nest.channels // nest.groups
        per_group = -(-each // nest.tile.columns)
        self.group = tirx.floordiv(panel, i64(per_group))
        first = self.group * each + tirx.floormod(panel, i64(per_group)) * nest.tile.columns
        self.first_block = simplify(tirx.floordiv(first, i64(nest.tile.lanes)))

    def emit(self, width: Expr) -> Stmt:
        height = self.nest.tile.rows
        total = static(width)
        if total is not None:
            full, rest = total // height, total % height
            main = loop(full, lambda t: self._tile(t * height, height, None), name="tile")
            return seq(main, self._tile(i64(full * height), rest, None) if rest else None)
        full_tiles = tirx.floordiv(width, i64(height))
        main = loop(full_tiles, lambda t: self._tile(t * height, height, None), name="tile")
        start = full_tiles * height
        return seq(main, tirx.IfThenElse(start < width, self._tile(start, height, width), None))

    def _place(self, column: Expr) -> tuple[Expr, ...]:
        """Output coordinates of position ``column`` of the line."""
        return split_index(column, self.nest.space) if self.nest.flat else (*self.outer, column)

    def _tile(self, start: Expr, rows: int, limit: Expr | None) -> Stmt:
        nest = self.nest
        left = None if limit is None else limit - start
        tile = RegisterTile(nest.output.dtype, rows, self.used, nest.tile.lanes, left, self.buffered)
        blocks = nest.filters.shape[1]

        def a(i: Expr, c: Expr, *rest: Expr) -> Expr:
            *tap, inner = rest
            column = start + i if limit is None else tirx.min(start + i, limit - 1)
            at = nest.window.position(self._place(column), tap)
            if nest.plain:
                return nest.x[(self.image, self.group * blocks + c, *at)]
            return nest.x[(self.image, self.group * blocks + c, *at, inner)]

        def b(n: Expr, v: Expr, c: Expr, *rest: Expr) -> Expr:
            return nest.filters[(self.panel, c, *rest, n * nest.tile.lanes + v)]

        def deliver(i: Expr, n: Expr, v: Expr, value: Expr) -> Stmt:
            return self.sink((self.image, self.first_block + n, *self._place(start + i), v), value)

        depth = nest.filters.shape[1:-1]
        return tile.emit(depth, a, b, deliver)


class DepthwiseConvolution(LoopNest):
    """One filter a channel, over blocked channels: ``[N, C/B, *space, B]`` with weights ``[C/B, *kernel, B]``."""

    name = "conv_depthwise"

    def __init__(self, x: Tensor, filters: Tensor, *, window: Window, rows: int) -> None:
        super().__init__()
        self.inputs = (x, filters)
        self.x, self.filters, self.window, self.rows = x, filters, window, rows
        self.lanes = static(x.shape[-1]) or 1
        self.space = window.output(x.shape[2:-1])
        self.output = self.result((x.shape[0], x.shape[1], *self.space, x.shape[-1]), x.dtype)

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return {"rows": self.rows, "kernel": self.window.kernel}

    def emit(self, kernel: object, sinks: Sequence[Sink]) -> Stmt:
        """One parallel loop over images × channel blocks × all spatial axes but the last."""
        *outer, width = self.space
        extents = (self.x.shape[0], self.x.shape[1], *outer)

        def task(flat: Expr) -> Stmt:
            image, block, *at = split_index(flat, extents)
            total = static(width)
            height = min(self.rows, total) if total else self.rows
            full = simplify(tirx.floordiv(width, i64(height)))
            rest = simplify(tirx.floormod(width, i64(height)))

            def tile(start: Expr, rows: int) -> Stmt:
                return self._tile(sinks[0], image, block, tuple(at), start, rows)

            return seq(
                loop(full, lambda t: tile(t * height, height), name="tile"),
                loop(rest, lambda r: tile(full * height + r, 1), name="r"),
            )

        return loop(simplify(product(extents)), task, _kind(self.output.shape, self.filters.shape[1:-1]), "task")

    def _tile(self, sink: Sink, image: Expr, block: Expr, outer: tuple[Expr, ...], start: Expr, rows: int) -> Stmt:
        acc = tirx.decl_buffer((i64(rows * self.lanes),), self.output.dtype, "acc")

        def each(body: object) -> Stmt:
            return seq(*(loop(self.lanes, lambda v, i=i: body(i, v), "vectorized", "v") for i in range(rows)))  # type: ignore[misc, operator]

        def at(i: int, v: Expr) -> Expr:
            return i64(i * self.lanes) + v

        def step(*tap: Expr) -> Stmt:
            def update(i: int, v: Expr) -> Stmt:
                where = self.window.position((*outer, start + i), tap)
                value = self.x[(image, block, *where, v)] * self.filters[(block, *tap, v)]
                return tirx.BufferStore(acc, acc[at(i, v)] + value, [at(i, v)])

            return each(update)

        clear = each(lambda i, v: tirx.BufferStore(acc, tirx.const(0, self.output.dtype), [at(i, v)]))
        done = each(lambda i, v: sink((image, block, *outer, start + i, v), acc[at(i, v)]))
        return seq(tirx.AllocBuffer(acc), clear, loops([i64(k) for k in self.window.kernel], step, "t"), done)
