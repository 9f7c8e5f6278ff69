"""How a matrix product is cut into tasks, blocks and tiles, and what that costs.

The prediction counts cycles of one core for multiply-adds and loads of the register tiles, for the traffic between
first- and second-level cache, and for what comes from beyond: the weights once for each chunk of rows, the rows once
for each task or, where they do not fit the second-level cache, once for each panel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from mmopt.backends.cpu.choosing import Candidate, Chooser, Parameter, Workload, typical
from mmopt.backends.cpu.kernels.tile import INDEPENDENT, NEON_BYTES, Tile, lanes_of, most_rows
from mmopt.backends.expressions import itemsize
from mmopt.backends.profile import Profile

NEAR_RATE = 32.0
"""Bytes a cycle from the second-level cache."""

FAR_RATE = 4.0
"""Bytes a cycle and core from beyond it."""

SCATTERED = 4
"""How much longer short pieces at large distances take to arrive than a stream that is announced."""

TILE_CYCLES = 40.0
"""Cycles to begin and end one register tile."""

EXPOSED = 0.15
"""Part of the shorter of computing and loading that does not hide behind the longer."""

KEPT = 0.45
"""Part of the second-level cache in which data survives while other data streams through."""

ALIASED = 1.06
"""Slowdown when the rows of a tile compete for the same lines of the first-level cache."""

WAYS = 10
"""Rows at a distance of a page that the first-level cache holds beside the stream of b."""

PAGE = 4096

DEEP = (512, 768)
"""Steps that a block of the depth has about."""


@dataclasses.dataclass(frozen=True)
class Blocking:
    """How the work is cut.

    Attributes:
        tile: Register tile; its columns are the width of a panel.
        tiles: Tiles along the rows in a task at most; 0 for all.
        panels: Panels in a task.
        depth: Steps of the depth in a block; 0 for all.
        copy: Whether each panel of an operand made at run time is copied into one contiguous stream.
    """

    tile: Tile
    tiles: int = 0
    panels: int = 1
    depth: int = 0
    copy: bool = False

    def parameters(self) -> dict[str, Parameter]:
        """Names and values that tell one blocking of a workload from another."""
        return {
            "rows": self.tile.rows,
            "vectors": self.tile.vectors,
            "tiles": self.tiles,
            "panels": self.panels,
            "depth": self.depth,
            "copy": self.copy,
        }


@dataclasses.dataclass(frozen=True)
class _Product:
    """A workload in numbers; unknown extents are typical ones."""

    profile: Profile
    batch: int
    m: int
    n: int
    k: int
    size: int
    packed: bool
    rows_known: bool
    depth_known: bool
    must_copy: bool


def choose_blocking(profile: Profile, chooser: Chooser, workload: Workload) -> Blocking:
    """The best blocking for a workload with dims ``batch``, ``m``, ``n``, ``k`` and ``b``.

    ``b`` is ``packed`` for a constant, ``in-place`` for an operand in memory, ``view`` for one that is read through
    other indices, such as a transposition.
    """
    dims = dict(workload.dims)
    known = {name: not isinstance(dims[name], str) for name in "mnk"}
    task = _Product(
        profile,
        typical(dims["batch"]),
        typical(dims["m"]),
        typical(dims["n"]),
        typical(dims["k"]),
        itemsize(workload.dtypes[0]),
        dims["b"] == "packed",
        known["m"],
        known["k"],
        dims["b"] != "packed" and (dims["b"] == "view" or not known["n"]),
    )
    lanes = lanes_of(profile, workload.dtypes[0])
    found = {blocking: _cycles(task, blocking) for blocking in _blockings(task, lanes)}
    options = [Candidate(blocking.parameters(), cycles) for blocking, cycles in found.items()]
    chosen = chooser.choose(workload, options)
    return list(found)[options.index(chosen)]


def _blockings(task: _Product, lanes: int) -> Iterator[Blocking]:
    for tile in _tiles(task, lanes):
        for tiles in _chunk_sizes(task, tile):
            for copy in _copies(task):
                yield Blocking(tile, tiles, copy=copy)
            yield from _deep(task, tile, tiles)


def _tiles(task: _Product, lanes: int) -> Iterator[Tile]:
    """Tiles that fill the registers: accumulators, a row of b, an element of a."""
    registers = task.profile.registers
    widths = (2, 3, 1) if registers >= 32 else (2, 1)
    for vectors in widths:
        if vectors > max(1, -(-task.n // lanes)) or (vectors == 1 and task.n > 4 * lanes):
            continue
        most = max(1, min(most_rows(task.profile, vectors), 16))
        rows = -(-task.m // -(-task.m // most)) if task.rows_known and task.m else most
        yield Tile(rows, vectors, lanes)


def _copies(task: _Product) -> tuple[bool, ...]:
    if task.packed:
        return (False,)
    return (True,) if task.must_copy else (True, False)


def _chunk_sizes(task: _Product, tile: Tile) -> list[int]:
    """Tiles in a chunk: as many as fit the second-level cache, or fewer for the sake of more tasks."""
    row_bytes = tile.rows * min(task.k, DEEP[-1]) * task.size
    fitting = max(1, int(task.profile.l2_bytes * KEPT * 0.75 / row_bytes))
    if not task.rows_known:
        return [min(fitting, 32)]
    count = max(1, -(-task.m // tile.rows))
    cores = task.profile.cores
    least = -(-count // fitting)
    parts = {least, -(-least // cores) * cores}
    return [0 if p == 1 else -(-count // p) for p in sorted(parts) if p <= count]


def _deep(task: _Product, tile: Tile, tiles: int) -> Iterator[Blocking]:
    """Blocks of the depth, with groups of panels that give every core as much to do."""
    if not (task.packed and task.depth_known and tile.rows * tile.vectors >= INDEPENDENT):
        return
    panels = -(-task.n // tile.columns)
    height = (tiles or -(-task.m // tile.rows)) * tile.rows
    for depth in sorted({-(-task.k // (-(-task.k // most) * 16)) * 16 for most in DEEP}):
        for share in (1, 2):
            group = max(1, -(-panels // (task.profile.cores * share)))
            sums = height * group * tile.columns * task.size
            if depth < task.k and sums <= task.profile.l2_bytes * KEPT / 2:
                yield Blocking(tile, tiles, group, depth)


def _cycles(task: _Product, blocking: Blocking) -> float:
    """Predicted cycles of the whole workload on one core, idle cores' share included."""
    tile = blocking.tile
    count = -(-task.m // tile.rows)
    each = min(blocking.tiles or count, count)
    chunks = -(-count // each)
    panels = -(-task.n // tile.columns)
    blocks = -(-task.k // blocking.depth) if blocking.depth else 1
    compute = task.batch * panels * _walk(task, blocking, blocks)
    compute += task.batch * (blocks - 1) * task.m * task.n * task.size * 2 / NEAR_RATE
    if blocking.copy:
        per_vector = 12.0 if task.must_copy else 1.5
        compute += task.batch * chunks * task.k * panels * tile.vectors * per_vector
    far = _far_bytes(task, blocking, each, chunks, panels, blocks) / FAR_RATE
    total = max(compute, far) + EXPOSED * min(compute, far)
    tasks = task.batch * chunks * -(-panels // blocking.panels)
    cores = task.profile.cores
    longest = math.ceil(tasks / cores) * min(blocking.panels, panels)
    return total * longest * cores / (task.batch * chunks * panels)


def _walk(task: _Product, blocking: Blocking, blocks: int) -> float:
    """Cycles of all row tiles of one panel."""
    tile = blocking.tile
    full, rest = divmod(task.m, tile.rows)
    streamed = task.packed or blocking.copy

    def one(rows: int) -> float:
        singles = rows / tile.lanes if task.profile.vector_bytes == NEON_BYTES else rows
        loads = singles + tile.vectors * (1.0 if streamed else 2.0)
        near = (rows + tile.columns) * task.size / NEAR_RATE
        aliased = rows > WAYS and task.k * task.size % PAGE == 0
        slow = ALIASED if aliased else 1.0
        return max(rows * tile.vectors / 2, loads / 2, near) * task.k * slow + TILE_CYCLES * blocks

    return full * one(tile.rows) + (one(rest) if rest else 0.0)


def _far_bytes(task: _Product, blocking: Blocking, each: int, chunks: int, panels: int, blocks: int) -> float:
    """Bytes that come from beyond the second-level cache."""
    step = blocking.depth or task.k
    rows = min(task.m, each * blocking.tile.rows)
    kept = step * (rows + 2 * blocking.tile.columns) * task.size
    if blocks > 1:
        kept += rows * blocking.panels * blocking.tile.columns * task.size
    passes = 1 if kept <= task.profile.l2_bytes * KEPT else panels
    if blocks > 1 and passes == 1:
        passes = max(1, -(-panels // blocking.panels) // task.profile.cores)
    weights = task.k * panels * blocking.tile.columns * chunks
    if not (task.packed or blocking.copy) and rows > blocking.tile.rows:
        weights *= SCATTERED
    return float(task.batch * task.size * (weights + task.m * task.k * passes))
