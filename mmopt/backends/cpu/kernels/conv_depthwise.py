"""Depthwise convolution: one filter a channel, over blocked channels.

    Y[n, c, y] = Σ_t X[n, c, y·stride + t·dilation − pad] · W[c, t]

``X`` is ``[N, C/B, *space, B]`` with B a multiple of a vector's lanes L, weights are ``[C/L, *kernel, L]``. A run of
positions along the last axis is kept in registers. Padding costs nothing: taps outside the input are left out, along
the last axis when the code is written, along the others by the bounds of the loops over taps.

``X`` may hold narrower numbers: they become floats in registers, each once for all taps along the last axis, and never
lie in memory as floats.
"""

from __future__ import annotations

import dataclasses
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
        x: ``[N, C/B, *space, B]``, float32 or float64, or narrower numbers with ``widened``.
        filters: ``[C/L, *kernel, L]``; their type is the result's.
        window: Geometry.
        before: Padding in front of each axis, zeros that are not in memory; constant along the last axis, and only
            where the last axis of ``x`` has a constant extent.
        space: Extents of the result.
        rows: Positions of a tile.
        widened: The number that an element of ``x`` stands for, where that is not the element itself.
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
        widened: Callable[[Expr], Expr] | None = None,
    ) -> None:
        super().__init__()
        self.inputs = (x, filters)
        self.x, self.filters, self.window, self.rows, self.widened = x, filters, window, rows, widened
        self.before, self.space = tuple(before), tuple(space)
        self.lanes = static(filters.shape[-1]) or 1
        self.parts = (static(x.shape[-1]) or 1) // self.lanes
        self.output = self.result((x.shape[0], x.shape[1], *space, x.shape[-1]), filters.dtype)

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return {"rows": self.rows, "kernel": self.window.kernel}

    def emit(self, kernel: object, sinks: Sequence[Sink]) -> Stmt:
        """One parallel loop over images × channel blocks × all spatial axes but the last × vectors of a block."""
        *outer, width = self.space
        extents = (self.x.shape[0], self.x.shape[1], *outer, i64(self.parts))

        def task(flat: Expr) -> Stmt:
            image, block, *at, part = split_index(flat, extents)
            place = _Channels(image, block, part * self.lanes, block * self.parts + part)
            total = static(width)
            if total is None or static(self.x.shape[-2]) is None:
                return self._any_length(sinks[0], place, tuple(at))
            return self._line(sinks[0], place, tuple(at), total)

        return loop(simplify(product(extents)), task, kind_for(self.output.shape, self.filters.shape[1:-1]), "task")

    def _any_length(self, sink: Sink, place: _Channels, outer: tuple[Expr, ...]) -> Stmt:
        """A line of unknown length, without padding along it: tiles, then single positions."""
        full = simplify(tirx.floordiv(self.space[-1], i64(self.rows)))
        rest = simplify(tirx.floormod(self.space[-1], i64(self.rows)))

        def tile(start: Expr, rows: int) -> Stmt:
            return self._tile(sink, place, outer, start, rows, lambda i, t: True)

        return seq(
            loop(full, lambda t: tile(t * self.rows, self.rows), name="tile"),
            loop(rest, lambda r: tile(full * self.rows + r, 1), name="r"),
        )

    def _line(self, sink: Sink, place: _Channels, outer: tuple[Expr, ...], width: int) -> Stmt:
        """Tiles that see padding on either side one by one, those between them in a loop."""
        length = static(self.x.shape[-2]) or 0
        starts = [(start, min(self.rows, width - start)) for start in range(0, width, self.rows)]

        def inside(position: int, tap: int) -> bool:
            shift = static(self.before[-1]) or 0
            return 0 <= position * self.window.strides[-1] + tap * self.window.dilations[-1] - shift < length

        def tile(start: Expr, rows: int, valid: Callable[[int, int], bool]) -> Stmt:
            return self._tile(sink, place, outer, start, rows, valid)

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
        place: _Channels,
        outer: tuple[Expr, ...],
        start: Expr,
        rows: int,
        valid: Callable[[int, int], bool],
    ) -> Stmt:
        """``rows`` positions from ``start`` on; ``valid(position, tap)`` along the last axis."""
        acc = [tirx.decl_buffer((i64(self.lanes),), self.output.dtype, "acc") for _ in range(rows)]

        def each(body: Callable[[int, Expr], Stmt]) -> Stmt:
            return seq(*(loop(self.lanes, lambda v, i=i: body(i, v), "vectorized", "v") for i in range(rows)))  # type: ignore[misc]

        def seen(i: int, tap: tuple[Expr, ...], v: Expr) -> Expr:
            at = self.window.position((*outer, start + i), tap)
            where = [s - b for s, b in zip(at, self.before, strict=True)]
            return self.x[(place.image, place.block, *where, place.first + v)]

        def add(i: int, tap: tuple[Expr, ...], v: Expr, value: Expr) -> Stmt:
            return tirx.BufferStore(acc[i], acc[i][v] + value * self.filters[(place.vector, *tap, v)], [v])

        def along(*tap: Expr) -> Stmt:
            def one(i: int, t: int) -> Stmt:
                at = (*tap, i64(t))
                return loop(self.lanes, lambda v: add(i, at, v, seen(i, at, v)), "vectorized", "v")

            pairs = [(i, t) for t in range(self.window.kernel[-1]) for i in range(rows) if valid(i, t)]
            return self._once(pairs, tap, seen, add) if self.widened else seq(*(one(i, t) for i, t in pairs))

        def across(axis: int, *tap: Expr) -> Stmt:
            if axis == len(outer):
                return along(*tap)
            first, count = self._taps(axis, outer[axis])
            return loop(count, lambda t: across(axis + 1, *tap, first + t), name="t")

        return seq(
            *(tirx.AllocBuffer(buffer) for buffer in acc),
            each(lambda i, v: tirx.BufferStore(acc[i], tirx.const(0, self.output.dtype), [v])),
            across(0),
            each(lambda i, v: sink((place.image, place.block, *outer, start + i, place.first + v), acc[i][v])),
        )

    def _once(
        self,
        pairs: Sequence[tuple[int, int]],
        tap: tuple[Expr, ...],
        seen: Callable[[int, tuple[Expr, ...], Expr], Expr],
        add: Callable[[int, tuple[Expr, ...], Expr, Expr], Stmt],
    ) -> Stmt:
        """One line of taps, position of the input by position, which becomes floats once."""
        assert self.widened is not None
        widened, stride, dilation = self.widened, self.window.strides[-1], self.window.dilations[-1]
        made: list[Stmt] = []
        for position in sorted({i * stride + t * dilation for i, t in pairs}):
            users = [(i, t) for i, t in pairs if i * stride + t * dilation == position]
            value = tirx.decl_buffer((i64(self.lanes),), self.output.dtype, "value")

            def load(v: Expr, value: tirx.Buffer = value, first: tuple[int, int] = users[0]) -> Stmt:
                return tirx.BufferStore(value, widened(seen(first[0], (*tap, i64(first[1])), v)), [v])

            made += [tirx.AllocBuffer(value), loop(self.lanes, load, "vectorized", "v")]
            made += [
                loop(self.lanes, lambda v, i=i, t=t, x=value: add(i, (*tap, i64(t)), v, x[v]), "vectorized", "v")  # type: ignore[misc]
                for i, t in users
            ]
        return seq(*made)


@dataclasses.dataclass(frozen=True)
class _Channels:
    """A vector of channels of an image.

    Attributes:
        image: The image.
        block: The block they are in.
        first: The first of them in the block.
        vector: Their number among all vectors.
    """

    image: Expr
    block: Expr
    first: Expr
    vector: Expr
