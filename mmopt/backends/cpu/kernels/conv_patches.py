"""How a direct convolution is cut into register tiles and tasks, and what each way is predicted to cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from mmopt.backends.cpu.choosing import UNKNOWN, Candidate, Workload, typical
from mmopt.backends.cpu.kernels.tile import LINE, lanes_of
from mmopt.backends.expressions import itemsize
from mmopt.backends.profile import Profile

WHOLE = 1 << 20
"""Tiles in a task that has a whole line."""

SHARED_BYTES = 7.0
"""Bytes a core gets from beyond its own caches in a cycle, when all cores ask."""

TILE_CYCLES = 24.0
"""Cycles of a tile besides its sums and results: clearing, filling the pipeline, jumps that are not foreseen."""

LOADS = 1.6
"""Loads in a cycle that tiles really get: some wait for lines that arrive from the second-level cache."""

TASKS = 4
"""Tasks for each core to aim for at least."""


@dataclasses.dataclass(frozen=True)
class Patch:
    """How the result is cut.

    Attributes:
        height: Lines of a register tile.
        width: Positions of a line.
        vectors: Vectors of output channels; they make up a panel of the packed weights.
        lanes: Lanes of a vector.
        piece: Tiles of one line in a task.
        panels_first: Whether tasks walk all positions before the next panel of weights, or all panels before the next
            positions.
        ahead: Whether the next panel is prefetched.
    """

    height: int
    width: int
    vectors: int
    lanes: int
    piece: int = WHOLE
    panels_first: bool = True
    ahead: bool = False

    @property
    def columns(self) -> int:
        """Output channels of a tile."""
        return self.vectors * self.lanes

    def vectors_of_a_line(self, dtype: str) -> int:
        """Vectors that share a cache line."""
        return max(1, LINE // (self.lanes * itemsize(dtype)))


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
    """Ways to cut ``conv`` with their predicted cycles on one core; :func:`patch_of` makes a patch of one."""
    lanes = lanes_of(profile, conv.dtype)
    widest = min(4 if profile.registers >= 32 else 2, -(-conv.channels // lanes))
    made = []
    for vectors in sorted(range(1, widest + 1), key=lambda v: abs(v - 2)):
        most = max(1, (profile.registers - vectors - 1) // vectors)
        for height, width in _shapes(conv, min(most, 28)):
            for panels_first in (True, False):
                patch = _tasks(profile, conv, Patch(height, width, vectors, lanes, panels_first=panels_first))
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


def _tasks(profile: Profile, conv: Convolved, patch: Patch) -> Patch:
    """``patch`` with lines divided so that there are tasks enough, and what one task reads stays in cache."""
    size = itemsize(conv.dtype)
    panels = conv.groups * -(-conv.channels // patch.columns)
    tiles = -(-typical(conv.space[-1], 28) // patch.width)
    strips = max(1, conv.positions() // max(1, typical(conv.space[-1], 28) * patch.height))
    piece = tiles
    if not patch.panels_first:
        read = conv.steps * size * patch.width * patch.height
        piece = max(1, min(piece, profile.l2_bytes // 4 // read))
    while piece > 1 and _unbalanced(profile, strips * -(-tiles // piece) * panels):
        piece = -(-piece // 2)
    if UNKNOWN in conv.space[-1:] or piece < tiles:
        patch = dataclasses.replace(patch, piece=max(piece, 1))
    weights = conv.steps * conv.channels * conv.groups * size
    return dataclasses.replace(
        patch, ahead=patch.panels_first and strips * tiles > 1 and weights > profile.l2_bytes // 8
    )


def _unbalanced(profile: Profile, tasks: int) -> bool:
    """Whether cores would wait for each other for more than a twentieth of the time."""
    if tasks < profile.cores:
        return True
    return -(-tasks // profile.cores) * profile.cores > 1.05 * tasks and tasks < TASKS * profile.cores * 5


def _cycles(profile: Profile, conv: Convolved, patch: Patch) -> float:
    """Predicted cycles on one core."""
    size = itemsize(conv.dtype)
    vectors, last = divmod(-(-conv.channels // patch.lanes), patch.vectors)
    panel = conv.steps * patch.columns * size
    cached = panel <= profile.l1_bytes // 2
    total = 0.0
    for rows, count in _tiles(conv, patch):
        for panels, wide in ((vectors, patch.vectors), (1, last)):
            if panels and wide:
                total += count * panels * conv.groups * _tile_cycles(conv, rows, wide, cached=cached)
    inputs = conv.steps / math.prod(conv.kernel) * conv.groups * conv.positions() * math.prod(conv.strides) * size
    weights = conv.steps * conv.channels * conv.groups * size
    return total + _traffic(profile, conv, patch, inputs, weights) / SHARED_BYTES


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


def _traffic(profile: Profile, conv: Convolved, patch: Patch, inputs: float, weights: float) -> float:
    """Bytes from beyond the second-level cache of a core; the core has a share of the tasks."""
    room = profile.l2_bytes / 2
    panels = conv.groups * -(-conv.channels // patch.columns)
    if patch.panels_first:
        again = max(1.0, panels / profile.cores) if inputs > room else 1.0
        return inputs * again + weights / profile.cores * (0.1 if patch.ahead else 1.0)
    strips = conv.positions() / (patch.height * patch.width * min(patch.piece, 64))
    again = max(1.0, strips / profile.cores) if weights > room else 1.0
    return inputs / profile.cores + weights * again
