"""How a direct convolution is cut into register tiles and tasks, and what each way is predicted to cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from mmopt.backends.cpu.choosing import Candidate, Workload, typical
from mmopt.backends.cpu.kernels.tile import LINE, LOADS, NEON_BYTES, lanes_of, most_rows
from mmopt.backends.expressions import itemsize
from mmopt.backends.profile import Profile

SHARED_BYTES = 7.0
"""Bytes a core gets from beyond its own caches in a cycle, when all cores ask."""

MEMORY_BYTES = 4.3
"""The same for what lies in memory."""

OVERLAP = 0.4
"""Share of the shorter of arithmetic and reading that the longer does not hide."""

TILE_CYCLES = 24.0
"""Cycles of a tile besides its sums and results: clearing, filling the pipeline, jumps that are not foreseen."""


@dataclasses.dataclass(frozen=True)
class Patch:
    """How the result is cut.

    Attributes:
        height: Lines of a register tile.
        width: Positions of a line.
        vectors: Vectors of output channels; they make up a panel of the packed weights.
        lanes: Lanes of a vector.
        parts: Parts of the positions, in the order of tasks: all panels of weights walk one part before the next.
        ahead: Whether the next panel, and what is added to the results, are prefetched.
        inputs: Whether the inputs of the next tile are prefetched too.
    """

    height: int
    width: int
    vectors: int
    lanes: int
    parts: int = 1
    ahead: bool = False
    inputs: bool = False

    @property
    def columns(self) -> int:
        """Output channels of a tile."""
        return self.vectors * self.lanes

    @staticmethod
    def of_a_line(dtype: str, elements: int) -> int:
        """Blocks of so many elements that share a cache line."""
        return max(1, LINE // (elements * itemsize(dtype)))


@dataclasses.dataclass(frozen=True)
class Convolved:
    """What a convolution has to do, as far as it matters for cutting it.

    Attributes:
        images: Images, or unknown.
        depth: Input channels of a group.
        channels: Output channels of a group.
        groups: Number of groups.
        kernel: Taps.
        strides: Steps between positions.
        space: Extents of the result; a single one where all taps and strides are one.
        dtype: Element type.
    """

    images: int | str
    depth: int
    channels: int
    groups: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    space: tuple[int | str, ...]
    dtype: str

    @property
    def steps(self) -> int:
        """Multiply-adds of one result."""
        return self.depth * math.prod(self.kernel)

    def input_bytes(self) -> float:
        """Of all images."""
        per_image = self.depth * self.groups * math.prod(self.strides) * itemsize(self.dtype)
        return float(per_image * self.positions())

    def weight_bytes(self) -> float:
        """Of all groups."""
        return float(self.steps * self.channels * self.groups * itemsize(self.dtype))

    def positions(self) -> int:
        """Results of one channel; what is unknown counts as typical."""
        side = 28  # of an image, whose extents are below the typical extent of other things
        return typical(self.images, 1) * math.prod(typical(s, side) for s in self.space)

    def workload(self) -> Workload:
        """Its identity for choosing."""
        extents = (("n", self.images), ("c", self.depth), ("o", self.channels), ("groups", self.groups))
        taps = tuple((f"k{n}", k) for n, k in enumerate(self.kernel))
        steps = tuple((f"s{n}", s) for n, s in enumerate(self.strides))
        space = tuple((f"y{n}", y) for n, y in enumerate(self.space))
        operations = 2.0 * self.steps * self.channels * self.groups * self.positions()
        return Workload("conv", (*extents, *taps, *steps, *space), (self.dtype,), operations)


def direct_candidates(profile: Profile, conv: Convolved) -> list[Candidate]:
    """Ways to cut ``conv`` with the predicted cycles of all cores together; :func:`patch_of` makes a patch of one."""
    lanes = lanes_of(profile, conv.dtype)
    widest = min(4 if profile.registers >= 32 else 2, -(-conv.channels // lanes))
    ahead = conv.input_bytes() + conv.weight_bytes() > profile.l2_bytes // 16  # else all is close by anyway
    ahead = ahead and profile.vector_bytes > NEON_BYTES  # where four blocks share a cache line, and code costs more
    inputs = conv.input_bytes() > profile.l2_bytes // 4
    made = []
    for vectors in sorted(range(1, widest + 1), key=lambda v: abs(v - 2)):
        most = max(1, most_rows(profile, vectors))
        for height, width in _shapes(conv, min(most, 28)):
            for parts in (1, profile.cores, 8 * profile.cores):
                patch = Patch(height, width, vectors, lanes, parts, ahead, ahead and inputs)
                made.append(Candidate(dataclasses.asdict(patch), _cycles(profile, conv, patch)))
    return made


def patch_of(candidate: Candidate) -> Patch:
    """The patch a candidate stands for."""
    return Patch(**candidate.parameters)  # type: ignore[arg-type]


def _shapes(conv: Convolved, most: int) -> Iterator[tuple[int, int]]:
    """Lines and positions of tiles of at most ``most`` positions."""
    width = conv.space[-1]
    if isinstance(width, str):
        yield 1, most
        return
    tiles = -(-width // most)
    yield 1, -(-width // tiles)
    if tiles > 1 and width % most and -(-width // tiles) != most:
        yield 1, most
    if len(conv.space) > 1 and 2 * width <= most:
        lines = conv.space[-2]
        fitting = most // width if isinstance(lines, str) else min(most // width, lines)
        if fitting > 1:
            yield fitting, width


def _cycles(profile: Profile, conv: Convolved, patch: Patch) -> float:
    """Predicted cycles of all cores together."""
    size = itemsize(conv.dtype)
    vectors, last = divmod(-(-conv.channels // patch.lanes), patch.vectors)
    panel = conv.steps * patch.columns * size
    cached = panel <= profile.l1_bytes // 2
    total = 0.0
    for rows, count in _tiles(conv, patch):
        for panels, wide in ((vectors, patch.vectors), (1, last)):
            if panels and wide:
                total += count * panels * conv.groups * _tile_cycles(conv, rows, wide, cached=cached)
    return combined(profile, total * _imbalance(profile, conv, patch), *_traffic(profile, conv, patch))


def combined(profile: Profile, compute: float, shared: float, memory: float) -> float:
    """Cycles of all cores together for arithmetic and for what they read at the same time.

    Args:
        profile: How many cores there are.
        compute: Cycles of arithmetic.
        shared: Bytes that all cores read from the last-level cache and from each other.
        memory: Bytes that all cores read from memory.
    """
    reading = shared / SHARED_BYTES + memory / MEMORY_BYTES
    return max(compute, reading) + OVERLAP * min(compute, reading)


def _imbalance(profile: Profile, conv: Convolved, patch: Patch) -> float:
    """How much longer the last core takes than all would if tasks could be divided."""
    panels = conv.groups * -(-conv.channels // patch.columns)
    tasks = panels * max(1, round(sum(count for _, count in _tiles(conv, patch))))
    return -(-tasks // profile.cores) * profile.cores / tasks


def _tiles(conv: Convolved, patch: Patch) -> Sequence[tuple[int, float]]:
    """Positions of a tile and how many such tiles there are."""
    width = typical(conv.space[-1], 28)
    full, rest = divmod(width, patch.width)
    above = conv.positions() / width
    if patch.height == 1:
        return [(patch.width, above * full), (rest, above if rest else 0)]
    lines = typical(conv.space[-2], 28)
    strips, odd = divmod(lines, patch.height)
    images = above / lines
    return [(patch.height * patch.width, images * strips * full), (odd * patch.width, images * full if odd else 0)]


def _tile_cycles(conv: Convolved, rows: int, vectors: int, *, cached: bool) -> float:
    """Two multiply-adds a cycle, or :data:`LOADS`; weights arrive, and results leave, at a vector a cycle."""
    if not rows:
        return 0.0
    step = max(rows * vectors / 2, (rows + vectors) / LOADS) + (0.0 if cached else vectors)
    return conv.steps * step + 2 * rows * vectors + TILE_CYCLES


def _traffic(profile: Profile, conv: Convolved, patch: Patch) -> tuple[float, float]:
    """Bytes of inputs and of weights that all cores read from beyond their second-level caches."""
    inputs, weights = conv.input_bytes(), conv.weight_bytes()
    room, panels = profile.l2_bytes / 2, conv.groups * -(-conv.channels // patch.columns)
    if patch.parts == 1:
        return inputs * (panels if inputs > room else profile.cores), weights
    again = patch.parts if weights > room else profile.cores
    return inputs * (panels if inputs / patch.parts > room else 1), weights * max(again, 1)
