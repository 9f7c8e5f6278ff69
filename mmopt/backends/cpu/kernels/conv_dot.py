"""Convolutions of narrow numbers, by micro-kernels of dot-product instructions.

    Y[n, o, y] = Σ_c Σ_t X[n, c, y·stride + t·dilation] · W[o, c, t]      X, W: bfloat16 or bytes; sums of 32 bits

Activations are ``[N, C/B, *space, B]`` with padding in place, B channels side by side being a row of an AMX tile where
there are as many, and more on Arm. A micro-kernel takes neighbouring positions as its rows, an equal distance apart,
and walks a list of segments: one for each block of channels and tap, or for each row of taps where few channels make a
short block, and on Arm always. Their addresses are worked out once a call. Weights are panels of a few vectors of
output channels, in the order of the walk.

Positions count along the last axis; where strides allow it, along the last two or all, over the padding too, whose sums
are thrown away: for small images this fills tiles better than lines would. A strided convolution reads its input in
phases: an image of the even and one of the odd positions, for stride two, over which its positions are neighbours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor, index
from mmopt.backends.cpu.choosing import Candidate, Workload
from mmopt.backends.cpu.dot import Dot, MicroKernel, address, configure_tiles, importing, pack, release_tiles
from mmopt.backends.cpu.kernels.conv import Window
from mmopt.backends.cpu.kernels.matmul_dot import stays_in_registers
from mmopt.backends.cpu.kernels.tile import spans
from mmopt.backends.cpu.loops import flat_index, i64, loop, product, seq, split_index, static, when
from mmopt.backends.expressions import itemsize, simplify
from mmopt.backends.profile import Profile

FORK_CYCLES = 16384
"""Work below which a convolution stays on one thread."""

HAND_OVER_CYCLES = 8
"""Cycles that a vector of sums takes to be scaled, rounded and stored."""

TASKS = 16
"""Parallel pieces wanted at least, so that threads end together."""

ROW_BYTES = 64
"""Bytes of a row of an AMX tile."""

BLOCK_BYTES = 256
"""Bytes of channels side by side for Arm's instructions, which are not bound to rows of a length."""


def block_of(channels: int, dot: Dot) -> int:
    """Channels side by side in memory that suit ``dot``: a tile row's worth, less, or all of them, filled up."""
    if dot.neon:
        units: tuple[int, ...] = tuple(BLOCK_BYTES // itemsize(dot.a) // n for n in (1, 2, 4, 8, 16))
    else:
        unit = ROW_BYTES // itemsize(dot.a) if dot.tiled else max(16, 2 * dot.lanes)
        units = (unit, unit // 2, unit // 4)
    for block in units:
        if channels % block == 0 and block % dot.group == 0 and block >= 16:
            return block
    return -(-channels // dot.group) * dot.group


def _filled(length: int, dot: Dot) -> int:
    """``length`` in whole groups."""
    return -(-length // dot.group) * dot.group


@dataclasses.dataclass(frozen=True)
class Walk:
    """How the depth of a convolution is cut.

    Attributes:
        dot: The instruction, whose step fits the segments.
        block: Channels side by side in the input.
        joined: Whether a segment is a row of taps, and not one tap. It may end in the middle of a group: what follows
            in memory is multiplied by zeros then.
    """

    dot: Dot
    block: int
    joined: bool

    @classmethod
    def of(cls, dot: Dot, block: int, window: Window, channels: int = 0) -> Walk:
        """The walk for blocks of ``block`` channels.

        Args:
            dot: The instruction.
            block: From :func:`block_of`.
            window: Geometry.
            channels: Channels that there are, where the block is filled up and need not be.
        """
        short = block * itemsize(dot.a) < ROW_BYTES or dot.neon
        joined = short and window.dilations[-1] == 1 and window.kernel[-1] > 1
        if joined and 0 < channels < block and dot.name == "sdot":
            block = channels
        length = _filled(block * (window.kernel[-1] if joined else 1), dot)
        if dot.step == dot.group:
            return cls(dot, block, joined)
        most = max(dot.step, dot.deepest)
        pieces = next(n for n in range(-(-length // most), length + 1) if length % (n * dot.group) == 0)
        return cls(dataclasses.replace(dot, step=length // pieces), block, joined)

    def length(self, window: Window) -> int:
        """Elements of a segment."""
        return _filled(self._known(window.kernel), self.dot)

    def overlong(self, window: Window) -> bool:
        """Whether segments end behind their last tap."""
        return self.length(window) > self._known(window.kernel)

    def _known(self, kernel: Sequence[int]) -> int:
        return self.block * (kernel[-1] if self.joined else 1)

    def segments(self, weight: np.ndarray, kernel: Sequence[int]) -> np.ndarray:
        """``[groups, depth, outputs]`` with zeros behind each segment, where it is too short."""
        groups, depth, outputs = weight.shape
        length = self._known(kernel)
        split = weight.reshape(groups, depth // length, length, outputs)
        missing = _filled(length, self.dot) - length
        return np.pad(split, ((0, 0), (0, 0), (0, missing), (0, 0))).reshape(groups, -1, outputs)

    def taps(self, window: Window) -> tuple[int, ...]:
        """Kernel axes that segments are counted along."""
        return window.kernel[:-1] if self.joined else window.kernel


def pack_filters(weight: np.ndarray, groups: int, walk: Walk, columns: int) -> np.ndarray:
    """Rearrange ``[O, C/g, *kernel]`` into panels: ``[g · panels each, depth / dot.group, columns, dot.group]``."""
    out, depth, *kernel = weight.shape
    blocks = -(-depth // walk.block)
    padded = np.zeros((out, blocks * walk.block, *kernel), weight.dtype)
    padded[:, :depth] = weight
    split = padded.reshape(groups, out // groups, blocks, walk.block, *kernel)
    turned = split.transpose(0, 2, *range(4, 4 + len(kernel)), 3, 1)
    flat = walk.segments(turned.reshape(groups, -1, out // groups), kernel)
    return np.concatenate([pack(group, walk.dot, columns) for group in flat])


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a convolution is cut.

    Attributes:
        rows: Positions of a tile.
        vectors: Vectors of output channels of a tile and a panel.
        merged: Spatial axes, counted from the last, that positions run along.
        chunk: Positions of one parallel piece, in whole tiles.
        panels: Panels of one parallel piece.
        prefetch: Cache lines of the next panel fetched in each step of the depth.
    """

    rows: int
    vectors: int
    merged: int
    chunk: int
    panels: int
    prefetch: int

    def parameters(self) -> dict[str, int | str | bool]:
        """As parameters of a candidate."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a convolution whose spatial extents are known.

    Attributes:
        padded: Spatial extents of the padded input.
        split: Whether the input lies in phases.
        channels: Input channels of a group, in whole blocks.
        outputs: Output channels of a group.
        groups: Number of groups.
        window: Geometry.
        slack: Positions behind each line in memory, for segments that end behind their last tap.
    """

    padded: tuple[int, ...]
    split: bool
    channels: int
    outputs: int
    groups: int
    window: Window
    slack: int = 0

    @property
    def space(self) -> tuple[int, ...]:
        """Spatial extents of the result."""
        return tuple(static(d) or 0 for d in self.window.output([i64(p) for p in self.padded]))

    @property
    def phases(self) -> tuple[int, ...]:
        """Phases that the input is stored in along each axis."""
        taps = zip(self.window.kernel, self.window.strides, self.window.dilations, strict=True)
        return tuple(min(s, (k - 1) * d + 1) if self.split and d % s else 1 for k, s, d in taps)

    @property
    def strides(self) -> tuple[int, ...]:
        """Distances of neighbouring positions in a phase."""
        return tuple(1 if self.split else s for s in self.window.strides)

    @property
    def extents(self) -> tuple[int, ...]:
        """Spatial extents of a phase."""
        if not self.split:
            return (*self.padded[:-1], self.padded[-1] + self.slack)
        taps = zip(self.space, self.window.kernel, self.window.strides, self.window.dilations, strict=True)
        return tuple(out + (k - 1) * d // s for out, k, s, d in taps)

    @property
    def depth(self) -> int:
        """Products of one sum."""
        return self.channels * math.prod(self.window.kernel)

    def mergeable(self) -> list[int]:
        """Numbers of axes that positions may run along: the last, the last two, all; they must not be strided."""
        rank = len(self.padded)
        found = [1]
        if rank >= 2 and self.strides[-2:] == (1, 1):
            found.append(2)
        if rank >= 3 and all(s == 1 for s in self.strides) and self.extents[1:] == self.space[1:]:
            found.append(rank)
        return found

    def positions(self, merged: int) -> int:
        """Positions of one run, those over the padding included."""
        if merged == 1:
            return self.space[-1]
        count = 0
        for out, extent in zip(self.space[-merged:], self.extents[-merged:], strict=True):
            count = count * extent + out - 1
        return count + 1

    def runs(self, merged: int) -> int:
        """Runs in an image."""
        return math.prod(self.space[:-merged])


def candidates(profile: Profile, dot: Dot, shape: Shape) -> list[Candidate]:
    """Ways to cut a convolution, with the cycles they should take on one core for one image."""
    found = []
    for merged in shape.mergeable():
        for vectors in range(min(dot.vectors, -(-shape.outputs // dot.lanes)), 0, -1):
            positions = shape.positions(merged)
            most = dot.most_rows[vectors - 1]
            tiles = -(-positions // most)
            height = min(positions, most) if dot.tiled else -(-positions // tiles)
            cut = _parallel(profile, dot, shape, height, vectors, merged)
            without = dataclasses.replace(cut, prefetch=0)
            found += [Candidate(c.parameters(), _cycles(dot, shape, c)) for c in dict.fromkeys((cut, without))]
    return sorted(found, key=lambda c: c.cycles)


def _parallel(profile: Profile, dot: Dot, shape: Shape, rows: int, vectors: int, merged: int) -> Cut:
    """Pieces small enough to share out, with weights that stay in the second-level cache."""
    panels = -(-shape.outputs // (vectors * dot.lanes))
    panel_bytes = vectors * dot.lanes * shape.depth * itemsize(dot.b)
    each = max(1, min(panels, profile.l2_bytes // 2 // panel_bytes))
    tiles = -(-shape.positions(merged) // rows)
    runs = shape.runs(merged) * shape.groups
    while each > 1 and runs * tiles * -(-panels // each) < TASKS:
        each = -(-each // 2)
    pieces = max(1, min(tiles, -(-TASKS // (runs * -(-panels // each)))))
    chunk = -(-tiles // pieces)
    lines = -(-vectors * dot.lanes * dot.step * itemsize(dot.b) // ROW_BYTES)
    streamed = panel_bytes * panels * shape.groups > profile.l2_bytes // 4 and not dot.neon
    return Cut(rows, vectors, merged, chunk * rows, each, -(-lines // chunk) if streamed else 0)


def _cycles(dot: Dot, shape: Shape, cut: Cut) -> float:
    """Multiplying, and handing over the results."""
    positions = shape.positions(cut.merged)
    full, rest = divmod(positions, cut.rows)
    width = cut.vectors * dot.lanes
    panels = -(-shape.outputs // width)

    def one(rows: int) -> float:
        covered = -(-rows // 16) * 16 if dot.tiled else rows
        busy = min(1.0, (-(-rows // 16) if dot.tiled else rows) * cut.vectors / (4 if dot.tiled else 8))
        return covered * width * shape.depth / dot.rate / max(busy, 0.5) + 3 * rows * cut.vectors + 60

    total = full * one(cut.rows) + (one(rest) + 100 if rest else 0)
    return shape.groups * shape.runs(cut.merged) * panels * total


def worth_forking(dot: Dot, shape: Shape, images: int | None) -> bool:
    """Whether a convolution takes long enough for several threads: matrix units are often done before their results are
    handed over.

    Args:
        dot: The instruction.
        shape: Sizes.
        images: Images, if their number is known.
    """
    if images is None:
        return True
    weights = shape.depth * shape.outputs * shape.groups
    results = images * math.prod(shape.space) * shape.groups * -(-shape.outputs // dot.lanes)
    multiplying = images * math.prod(shape.space) * weights / dot.rate
    cycles = max(multiplying, weights * itemsize(dot.b) / 6) + results * HAND_OVER_CYCLES
    return cycles >= FORK_CYCLES


class DotConvolution(LoopNest):
    """A convolution with a packed constant.

    Args:
        x: Padded input ``[N, C/block · phases, *extents, block]`` of type ``dot.a``.
        filters: From :func:`pack_filters`.
        shape: Sizes.
        walk: How the depth is walked.
        cut: How the rest is cut.
        block: Channels side by side in the result.
        name: Name of the template.
    """

    def __init__(
        self,
        x: Tensor,
        filters: Tensor,
        *,
        shape: Shape,
        walk: Walk,
        cut: Cut,
        block: int,
        name: str,
        workload: Workload | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.inputs = (x, filters)
        self.x, self.filters, self.sizes, self.walk, self.cut, self.block = x, filters, shape, walk, cut, block
        self.workload = workload
        blocks = -(-shape.outputs * shape.groups // block)
        extents = (x.shape[0], index(blocks), *map(index, shape.space), index(block))
        self.output = self.result(extents, walk.dot.total)

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return {"instruction": self.walk.dot.name, "block": self.walk.block, **self.cut.parameters()}

    def emit(self, kernel: object, sinks: Sequence[Sink]) -> Stmt:
        """One parallel loop over groups × pieces of panels × images × runs × pieces of runs."""
        return _Emitter(self, sinks[0], kept=stays_in_registers(kernel, self.walk.dot, self.output)).emit()


class _Emitter:
    """Code of one convolution; ``kept`` where sums are to stay in registers."""

    def __init__(self, nest: DotConvolution, sink: Sink, *, kept: bool) -> None:
        self.nest, self.sink, self.dot, self.cut, self.sizes = nest, sink, nest.walk.dot, nest.cut, nest.sizes
        self.kept = kept
        self.width = self.cut.vectors * self.dot.lanes
        self.panels = -(-self.sizes.outputs // self.width)
        self.taps = nest.walk.taps(self.sizes.window)
        self.blocks = -(-self.sizes.channels // nest.walk.block)
        self.phases = math.prod(self.sizes.phases)
        self.segments = self.blocks * math.prod(self.taps)
        self.steps = nest.walk.length(self.sizes.window) // self.dot.step
        self.kernels: list[MicroKernel] = []
        self.sums = tirx.decl_buffer((i64(self.cut.rows * self.width),), self.dot.total, "sums")
        self.offsets = tirx.decl_buffer((i64(self.segments),), "int64", "offsets")

    def emit(self) -> Stmt:
        sizes, cut = self.sizes, self.cut
        positions = sizes.positions(cut.merged)
        chunks, pieces = -(-positions // cut.chunk), -(-self.panels // cut.panels)
        runs = sizes.space[: -cut.merged]
        extents = (i64(sizes.groups), i64(pieces), self.nest.x.shape[0], *map(i64, runs), i64(chunks))

        def task(number: Expr) -> Stmt:
            group, piece, image, *run, chunk = split_index(number, extents)
            place = _Place(group, image, tuple(run))
            body = self._task(place, piece * cut.panels, chunk, positions)
            return seq(tirx.AllocBuffer(self.sums), body, release_tiles() if self.dot.tiled else None)

        count = simplify(product(extents))
        body = loop(count, task, self._kind(), "task")
        return importing(self.kernels, seq(tirx.AllocBuffer(self.offsets), self._fill_offsets(), body))

    def _kind(self) -> str:
        return "parallel" if worth_forking(self.dot, self.sizes, static(self.nest.x.shape[0])) else "serial"

    def _fill_offsets(self) -> Stmt:
        """Where each segment starts, from the first row, in bytes."""
        extents = (self.blocks, *self.taps)
        last = (0,) if self.nest.walk.joined else ()

        def one(number: Expr) -> Stmt:
            block, *tap = split_index(number, [i64(e) for e in extents])
            reach = [t * d for t, d in zip((*tap, *map(i64, last)), self.sizes.window.dilations, strict=True)]
            phase, at = self._phase_of(reach)
            place = flat_index((block * self.phases + phase, *at), (i64(1), *map(i64, self.sizes.extents)))
            return tirx.BufferStore(self.offsets, simplify(place * self._position_bytes), [number])

        return loop(self.segments, one, name="segment")

    def _phase_of(self, reach: Sequence[Expr]) -> tuple[Expr, Sequence[Expr]]:
        """The phase that holds what lies ``reach`` behind a position, and where in it."""
        if not self.sizes.split:
            return i64(0), reach
        strides, phases = self.sizes.window.strides, [i64(p) for p in self.sizes.phases]
        inside = [tirx.floormod(r, i64(s)) for r, s in zip(reach, strides, strict=True)]
        return flat_index(inside, phases), [tirx.floordiv(r, i64(s)) for r, s in zip(reach, strides, strict=True)]

    @property
    def _position_bytes(self) -> int:
        return self.nest.walk.block * itemsize(self.dot.a)

    def _task(self, place: _Place, panel: Expr, chunk: Expr, positions: int) -> Stmt:
        """Some panels for one chunk of positions."""
        cut = self.cut
        chunks = -(-positions // cut.chunk)
        last = positions - (chunks - 1) * cut.chunk
        first = chunk * cut.chunk
        if last == cut.chunk:
            return self._chunk(place, panel, first, cut.chunk)
        end = self._chunk(place, panel, first, last)
        return end if chunks == 1 else when(chunk < chunks - 1, self._chunk(place, panel, first, cut.chunk), end)

    def _chunk(self, place: _Place, panel: Expr, first: Expr, count: int) -> Stmt:
        full, rest = divmod(count, self.cut.rows)
        main = self._tiles(place, panel, first, full, self.cut.rows) if full else None
        tail = self._tiles(place, panel, first + full * self.cut.rows, 1, rest) if rest else None
        return seq(main, tail)

    def _tiles(self, place: _Place, panel: Expr, first: Expr, tiles: int, height: int) -> Stmt:
        exact = self.panels % self.cut.panels == 0

        def one(p: Expr) -> Stmt:
            body = loop(tiles, lambda t: self._tile(place, panel + p, first + t * height, height, t), name="tile")
            return body if exact else when(panel + p < self.panels, body)

        shape = configure_tiles(height, self._step_bytes) if self.dot.tiled else None
        return seq(shape, loop(self.cut.panels, one, name="panel"))

    @property
    def _step_bytes(self) -> int:
        return self.dot.step * itemsize(self.dot.a)

    def _tile(self, place: _Place, panel: Expr, first: Expr, height: int, number: Expr) -> Stmt:
        ahead = self.cut.prefetch if height == self.cut.rows else 0
        kernel = MicroKernel(self.dot, height, self.cut.vectors, indexed=self.segments > 1, prefetch=ahead)
        self.kernels.append(kernel)
        stride = 1 if self.cut.merged > 1 else self.sizes.strides[-1]
        zero, filters = i64(0), self.nest.filters
        here = place.group * self.panels + panel
        group_bytes = self.width * self.dot.group * itemsize(self.dot.b)
        share = self.segments * self.steps * ahead * ROW_BYTES // group_bytes
        multiply = kernel.call(
            address(self.sums[zero]),
            self.width * 4,
            address(self.nest.x[self._start(place, first)]),
            stride * self._position_bytes,
            address(filters[here, zero, zero, zero]),
            self.steps,
            segments=self.segments,
            offsets=address(self.offsets[zero]),
            ahead=address(filters[here + 1, number * share, zero, zero]) if ahead else None,
        )
        return seq(multiply, self._hand_over(place, panel, first, height))

    def _start(self, place: _Place, first: Expr) -> tuple[Expr, ...]:
        """Where the first row of a tile starts in the input."""
        strides, merged = self.sizes.strides, self.cut.merged
        outer = [o * s for o, s in zip(place.run, strides, strict=False)]
        if merged == 1:
            inner: tuple[Expr, ...] = (first * strides[-1],)
        else:
            inner = split_index(first, [i64(p) for p in self.sizes.extents[-merged:]])
        return (place.image, place.group * (self.blocks * self.phases), *outer, *inner, i64(0))

    def _hand_over(self, place: _Place, panel: Expr, first: Expr, height: int) -> Stmt:
        full, rest = divmod(self.sizes.outputs, self.width)
        if not rest:
            return self._deliver(place, panel, first, height, self.width)
        last = self._deliver(place, panel, first, height, rest)
        return when(panel < full, self._deliver(place, panel, first, height, self.width), last) if full else last

    def _deliver(self, place: _Place, panel: Expr, first: Expr, height: int, width: int) -> Stmt:
        channel = place.group * self.sizes.outputs + panel * self.width
        lanes, block = self.dot.lanes, self.nest.block

        def vectors(i: Expr, at: tuple[Expr, ...]) -> Iterator[Stmt]:
            for n, used in enumerate(spans(width, lanes)):
                start = simplify(channel + n * lanes)
                outer, inner = tirx.floordiv(start, i64(block)), tirx.floormod(start, i64(block))

                def element(v: Expr, n: int = n, outer: Expr = outer, inner: Expr = inner) -> Stmt:
                    where = (place.image, simplify(outer), *at, simplify(inner) + v)
                    return self.sink(where, self.sums[i * self.width + n * lanes + v])

                yield loop(used, element, "vectorized", "v")

        def row(i: Expr) -> Stmt:
            at, inside = self._coordinates(place, first + i)
            body = seq(*vectors(i, at))
            return body if inside is None else when(inside, body)

        return loop(height, row, "unrolled" if self.kept else "serial", "i")

    def _coordinates(self, place: _Place, position: Expr) -> tuple[tuple[Expr, ...], Expr | None]:
        """Output coordinates of a position of a run, and whether it is one."""
        merged = self.cut.merged
        if merged == 1:
            return (*place.run, position), None
        padded, space = self.sizes.extents[-merged:], self.sizes.space[-merged:]
        at = split_index(position, [i64(p) for p in padded])
        doubtful = [i < i64(s) for i, s, p in zip(at[1:], space[1:], padded[1:], strict=True) if s != p]
        return (*place.run, *at), tirx.all(*doubtful) if doubtful else None


@dataclasses.dataclass(frozen=True)
class _Place:
    """What a parallel piece works on: a group, an image, and output coordinates of the axes that runs do not cover."""

    group: Expr
    image: Expr
    run: tuple[Expr, ...]
