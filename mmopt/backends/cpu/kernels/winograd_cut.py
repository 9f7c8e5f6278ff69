"""How a convolution by Winograd's algorithm is cut, and what each way is predicted to cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from mmopt.backends.cpu.choosing import Candidate, typical
from mmopt.backends.cpu.kernels.conv_patches import TILE_CYCLES, Convolved, combined
from mmopt.backends.cpu.kernels.tile import lanes_of, most_rows
from mmopt.backends.cpu.kernels.winograd_transform import POINTS, TAPS
from mmopt.backends.expressions import itemsize
from mmopt.backends.profile import Profile

INPUT_CYCLES = {2: 50.0, 4: 140.0}
"""Cycles to transform a vector of channels of one tile of inputs, by the tile's extent."""

OUTPUT_CYCLES = {2: 40.0, 4: 110.0}
"""Cycles to transform a vector of channels of one tile of results."""

SLOWER = 1.15
"""How much longer the many small products take than their parts do when nothing comes between them."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """Parameters of the template.

    Attributes:
        tile: Extent of a tile of results, 2 or 4.
        rows: Tiles of a register tile.
        vectors: Vectors of output channels of a register tile.
        lanes: Lanes of a vector.
        chunk: Tiles of one task, a multiple of ``rows``.
        apart: Whether all inputs are transformed before the first product.
    """

    tile: int
    rows: int
    vectors: int
    lanes: int
    chunk: int
    apart: bool = False

    @property
    def points(self) -> int:
        """Matrix products."""
        return (self.tile + TAPS - 1) ** 2


def winograd_candidates(profile: Profile, conv: Convolved) -> list[Candidate]:
    """Ways to do ``conv`` by this template with their predicted cycles, none where it does not fit.

    Padding is taken care of; what matters is one group of two axes, taps 3×3, steps of one, channels in whole vectors.
    """
    lanes = lanes_of(profile, conv.dtype)
    fits = conv.kernel == (TAPS, TAPS) and conv.strides == (1, 1) and conv.groups == 1 and conv.dtype == "float32"
    if not fits or conv.depth % lanes or conv.channels % lanes:
        return []
    cuts = [cut for tile in POINTS for cut in _cuts(profile, conv, tile, lanes)]
    return [Candidate(dataclasses.asdict(cut), _cycles(profile, conv, cut)) for cut in cuts]


def cut_of(candidate: Candidate) -> Cut | None:
    """The cut a candidate stands for; none if it stands for another template."""
    return Cut(**candidate.parameters) if "tile" in candidate.parameters else None  # type: ignore[arg-type]


def tiles_of(conv: Convolved, tile: int) -> int:
    """Tiles of one image."""
    height, width = (-(-typical(extent, 28) // tile) for extent in conv.space)
    return height * width


def _cuts(profile: Profile, conv: Convolved, tile: int, lanes: int) -> Iterator[Cut]:
    vectors = min(2, conv.channels // lanes)
    most = most_rows(profile, vectors)
    tiles = tiles_of(conv, tile)
    for share in (1, profile.cores, 4 * profile.cores):
        wanted = -(-tiles // share)
        rows = -(-wanted // -(-wanted // most))
        chunk = -(-wanted // rows) * rows
        if any(isinstance(s, str) for s in conv.space):
            rows, chunk = most, 2 * most
        yield Cut(tile, rows, vectors, lanes, chunk, apart=share == 1)
    chunk = most * max(1, tiles // (most * profile.cores * 8))
    yield Cut(tile, most, vectors, lanes, chunk)


def _cycles(profile: Profile, conv: Convolved, cut: Cut) -> float:
    """Predicted cycles of all cores together."""
    size, images = itemsize(conv.dtype), typical(conv.images, 1)
    tiles = tiles_of(conv, cut.tile)
    chunks = images * -(-tiles // cut.chunk)
    into, out = conv.depth // cut.lanes, conv.channels // cut.lanes
    panels = -(-out // cut.vectors)
    step = cut.rows * cut.vectors / 2 + cut.vectors
    product = conv.depth * step + 2 * cut.rows * cut.vectors + TILE_CYCLES
    tall = images * sum(-(-min(cut.chunk, tiles - first) // cut.rows) for first in range(0, tiles, cut.chunk))
    products = cut.points * panels * tall * product
    transforms = images * tiles * (into * INPUT_CYCLES[cut.tile] + out * OUTPUT_CYCLES[cut.tile])
    tasks = panels * chunks if cut.apart else chunks
    balance = -(-tasks // profile.cores) * profile.cores / tasks
    weights = float(cut.points * conv.depth * conv.channels * size)
    inputs = float(conv.input_bytes())
    compute = SLOWER * (products + transforms) * balance
    spread = inputs * cut.points / cut.tile**2
    if cut.apart:
        return combined(profile, compute, inputs + spread * profile.cores, weights)
    if spread / chunks > profile.l2_bytes / 8:
        inputs += spread
    again = max(1.0, chunks / profile.cores) if weights > profile.l2_bytes / 2 else 1.0
    return combined(profile, compute, inputs, weights * profile.cores * again)
