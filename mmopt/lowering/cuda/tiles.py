"""Which tile a product gets: the one that was measured to be best, or that is predicted to be."""

from __future__ import annotations

import math

from mmopt.backends.cpu.choosing import Workload, typical
from mmopt.backends.cuda.kernels.product import Tile, tile_candidates
from mmopt.lowering.program import ProgramBuilder

Extent = int | str


def workload_of(template: str, dims: dict[str, Extent], dtypes: tuple[str, ...], sizes: tuple[Extent, ...]) -> Workload:
    """What a kernel that multiplies has to do; ``sizes`` are the extents whose product is its multiply-adds."""
    return Workload(template, tuple(dims.items()), dtypes, 2.0 * math.prod(typical(size) for size in sizes))


def chosen_tile(
    program: ProgramBuilder, workload: Workload, sizes: tuple[Extent, Extent, Extent], batch: Extent, kind: str
) -> Tile:
    """The tile of a product.

    Args:
        program: What is compiled; its chooser picks.
        workload: What is asked about.
        sizes: M, N and K.
        batch: Number of products.
        kind: Type of the operands.
    """
    offered = tile_candidates(sizes, batch, kind, program.profile)
    best = program.chooser.choose(workload, [candidate for candidate, _ in offered])
    return next(tile for candidate, tile in offered if candidate is best)
