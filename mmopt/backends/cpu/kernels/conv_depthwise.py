"""Depthwise convolution: one filter a channel, over blocked channels.

    Y[n, c, y] = Σ_t X[n, c, y·stride + t·dilation − pad] · W[c, t]

``X`` is ``[N, C/B, *space, B]`` with B the lanes of a vector, weights are ``[C/B, *kernel, B]``. A run of positions
along the last axis is kept in registers. Padding costs nothing: taps outside the input are left out, along the last
axis when the code is written, along the others by the bounds of the loops over taps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor
from mmopt.backends.cpu.choosing import Candidate, Workload, dim, typical
from mmopt.backends.cpu.kernels.conv import Window, kind_for
from mmopt.backends.cpu.loops import i64, loop, product, seq, split_index, static
from mmopt.backends.expressions import simplify
from mmopt.backends.profile import Profile

MOST_ROWS = 14
"""Positions of a tile at most: what is left of 16 registers holds a weight and an input."""

TILE_CYCLES = 12.0
"""Cycles of a tile besides its sums."""


def depthwise_workload(dtype: str, channels: int, window: Window, space: Sequence[Expr]) -> Workload:
    """The identity of a depthwise convolution for choosing."""
    extents = tuple((f"y{n}", dim(y)) for n, y in enumerate(space))
    taps = tuple((f"k{n}", k) for n, k in enumerate(window.kernel))
    steps = tuple((f"s{n}", s) for n, s in enumerate(window.strides))
    operations = 2.0 * channels * math.prod(window.kernel) * math.prod(typical(y, 28) for _, y in extents)
    return Workload("conv_depthwise", (("c", channels), *extents, *taps, *steps), (dtype,), operations)


def depthwise_candidates(profile: Profile, workload: Workload, lanes: int) -> list[Candidate]:
    """Runs of several lengths, with predicted cycles."""
    dims = dict(workload.dims)
    last = max(name for name in dims if name.startswith("y"))
    width = typical(dims[last], 28)
    taps = math.prod(int(k) for name, k in workload.dims if name.startswith("k"))
    lines = workload.operations / (2 * lanes * taps * width)
    made: list[Candidate] = []
    for most in (MOST_ROWS, 12, 10, 8, 6, 4):
        rows = -(-width // -(-width // most))
        tiles = -(-width // rows)
        cycles = lines * (width * taps / 2 + tiles * (TILE_CYCLES + taps * 0.5))
        if all(c["rows"] != rows for c in made):
            made.append(Candidate({"rows": rows}, cycles))
    return made


class DepthwiseConvolution(LoopNest):
    """A convolution of each channel with its own constant filter.

    Args:
        x: ``[N, C/B, *space, B]``.
        filters: ``[C/B, *kernel, B]``.
        window: Geometry.
        before: Padding in front of each axis, zeros that are not in memory; constant along the last axis, and only
            where the last axis of ``x`` has a constant extent.
        space: Extents of the result.
        rows: Positions of a tile.
    """

    name = "conv_depthwise"

    def __init__(
        self,
        x: Tensor,
        filters: Tensor,
        *,
        window: Window,
        before: Sequence[Expr],
        space: Sequence[Expr],
        rows: int,
    ) -> None:
        super().__init__()
        self.inputs = (x, filters)
        self.x, self.filters, self.window, self.rows = x, filters, window, rows
        self.before, self.space = tuple(before), tuple(space)
        self.lanes = static(x.shape[-1]) or 1
        self.output = self.result((x.shape[0], x.shape[1], *space, x.shape[-1]), x.dtype)

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
            if total is None or static(self.x.shape[-2]) is None:
                return self._any_length(sinks[0], image, block, tuple(at))
            return self._line(sinks[0], image, block, tuple(at), total)

        return loop(simplify(product(extents)), task, kind_for(self.output.shape, self.filters.shape[1:-1]), "task")

    def _any_length(self, sink: Sink, image: Expr, block: Expr, outer: tuple[Expr, ...]) -> Stmt:
        """A line of unknown length, without padding along it: tiles, then single positions."""
        full = simplify(tirx.floordiv(self.space[-1], i64(self.rows)))
        rest = simplify(tirx.floormod(self.space[-1], i64(self.rows)))

        def tile(start: Expr, rows: int) -> Stmt:
            return self._tile(sink, image, block, outer, start, rows, lambda i, t: True)

        return seq(
            loop(full, lambda t: tile(t * self.rows, self.rows), name="tile"),
            loop(rest, lambda r: tile(full * self.rows + r, 1), name="r"),
        )

    def _line(self, sink: Sink, image: Expr, block: Expr, outer: tuple[Expr, ...], width: int) -> Stmt:
        """Tiles that see padding on either side one by one, those between them in a loop."""
        length = static(self.x.shape[-2]) or 0
        starts = [(start, min(self.rows, width - start)) for start in range(0, width, self.rows)]

        def inside(position: int, tap: int) -> bool:
            shift = static(self.before[-1]) or 0
            return 0 <= position * self.window.strides[-1] + tap * self.window.dilations[-1] - shift < length

        def tile(start: Expr, rows: int, valid: Callable[[int, int], bool]) -> Stmt:
            return self._tile(sink, image, block, outer, start, rows, valid)

        made: list[Stmt] = []
        between: list[int] = []
        for start, rows in starts:
            taps = range(self.window.kernel[-1])
            if rows == self.rows and all(inside(start + i, t) for i in range(rows) for t in taps):
                between.append(start)
                continue
            made.append(tile(i64(start), rows, lambda i, t, s=start: inside(s + i, t)))  # type: ignore[misc]
        if between:
            first = between[0]
            whole = loop(len(between), lambda n: tile(first + n * self.rows, self.rows, lambda i, t: True), name="tile")
            made.append(whole)
        return seq(*made)

    def _taps(self, axis: int, position: Expr) -> tuple[Expr, Expr]:
        """First tap of an outer axis that lies in the input, and how many do."""
        stride, step, taps = self.window.strides[axis], self.window.dilations[axis], self.window.kernel[axis]
        start = position * stride - self.before[axis]
        low = tirx.max(tirx.floordiv(step - 1 - start, i64(step)), i64(0))
        high = tirx.min(tirx.floordiv(self.x.shape[2 + axis] - start + (step - 1), i64(step)), i64(taps))
        return simplify(low), simplify(tirx.max(high - low, i64(0)))

    def _tile(
        self,
        sink: Sink,
        image: Expr,
        block: Expr,
        outer: tuple[Expr, ...],
        start: Expr,
        rows: int,
        valid: Callable[[int, int], bool],
    ) -> Stmt:
        """``rows`` positions from ``start`` on; ``valid(position, tap)`` along the last axis."""
        acc = [tirx.decl_buffer((i64(self.lanes),), self.output.dtype, "acc") for _ in range(rows)]

        def each(body: Callable[[int, Expr], Stmt]) -> Stmt:
            return seq(*(loop(self.lanes, lambda v, i=i: body(i, v), "vectorized", "v") for i in range(rows)))  # type: ignore[misc]

        def add(i: int, tap: tuple[Expr, ...], v: Expr) -> Stmt:
            seen = self.window.position((*outer, start + i), tap)
            where = [s - b for s, b in zip(seen, self.before, strict=True)]
            value = self.x[(image, block, *where, v)] * self.filters[(block, *tap, v)]
            return tirx.BufferStore(acc[i], acc[i][v] + value, [v])

        def along(*tap: Expr) -> Stmt:
            def one(i: int, t: int) -> Stmt:
                return loop(self.lanes, lambda v: add(i, (*tap, i64(t)), v), "vectorized", "v")

            taps = range(self.window.kernel[-1])
            return seq(*(one(i, t) for t in taps for i in range(rows) if valid(i, t)))

        def across(axis: int, *tap: Expr) -> Stmt:
            if axis == len(outer):
                return along(*tap)
            first, count = self._taps(axis, outer[axis])
            return loop(count, lambda t: across(axis + 1, *tap, first + t), name="t")

        return seq(
            *(tirx.AllocBuffer(buffer) for buffer in acc),
            each(lambda i, v: tirx.BufferStore(acc[i], tirx.const(0, self.output.dtype), [v])),
            across(0),
            each(lambda i, v: sink((image, block, *outer, start + i, v), acc[i][v])),
        )
