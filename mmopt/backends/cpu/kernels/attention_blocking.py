"""Parameters of the attention template: what there is to choose from, and what each choice should cost."""

from __future__ import annotations

import dataclasses

from mmopt.backends.cpu.choosing import Candidate, Workload, typical
from mmopt.backends.cpu.kernels.tile import most_rows
from mmopt.backends.expressions import itemsize
from mmopt.backends.profile import Profile

FEW = 3
"""Query rows of a group up to which dot products beat transposing the keys."""

WEIGHT_CYCLES = 9.0
"""A vector of scores on its way to weights: maximum, difference, exponential, sum."""

TILE_CYCLES = 350.0
"""What a tile costs for a block of keys, whatever its size, for every vector of rows."""

FEW_KEYS = 512
"""Keys of a block where scores are dot products."""

MOST_ROWS = 32
"""Query rows of a tile, at most."""

TILES = 16
"""Tiles of a task, where the number of query rows is not known."""


@dataclasses.dataclass(frozen=True)
class Blocking:
    """Parameters of the template.

    Attributes:
        rows: Query rows of a tile, whose scores for a block of keys lie in the first-level cache.
        height: Query rows of the register tile of scores.
        vectors: Vectors of neighbouring keys of the register tile of scores.
        keys: Keys of a block, a multiple of the lanes of ``vectors``.
        chunk: Query rows of a task, a multiple of ``rows``.
        packed: Whether keys are transposed and values copied; otherwise both are read in place.
    """

    rows: int
    height: int
    vectors: int
    keys: int
    chunk: int
    packed: bool

    @classmethod
    def of(cls, candidate: Candidate) -> Blocking:
        """The parameters of a candidate."""
        number = candidate.number
        return cls(
            number("rows"),
            number("height"),
            number("vectors"),
            number("keys"),
            number("chunk"),
            bool(candidate["packed"]),
        )


def step_cycles(rows: int, vectors: int) -> float:
    """Cycles of one step of the depth of a register tile.

    Two multiply-adds or two loads a cycle, a result can be used again after four, and loads get in the way a little.
    """
    if not rows or not vectors:
        return 0.0
    return max(rows * vectors / 2, (rows + vectors) / 2, 4.0) + 0.12 * (rows + vectors)


def value_tile(profile: Profile, rows: int, vectors: int) -> tuple[int, int]:
    """Rows and vectors of the register tile for the products of ``rows`` rows of weights with the values.

    Args:
        profile: Number of registers.
        rows: Rows to cover.
        vectors: Vectors of a value.
    """

    def cycles(height: int, width: int) -> float:
        full, rest = divmod(rows, height)
        panels, last = divmod(vectors, width)
        return sum(
            count * (full * step_cycles(height, wide) + step_cycles(rest, wide))
            for count, wide in ((panels, width), (1, last))
        )

    widest = min(4 if profile.registers >= 32 else 2, vectors)
    shapes = [
        (height, width)
        for width in range(1, widest + 1)
        for height in range(1, min(rows, _tallest(profile, width)) + 1)
    ]
    return min(shapes, key=lambda shape: (cycles(*shape), -shape[0]))


def _tallest(profile: Profile, vectors: int) -> int:
    """Most rows of a register tile: accumulators, one row of the right operand, one element of the left."""
    return max(1, min(most_rows(profile, vectors), 16))


@dataclasses.dataclass(frozen=True)
class Problem:
    """What an attention kernel has to do. Extents that are not known are :data:`~mmopt.backends.cpu.choosing.UNKNOWN`.

    Attributes:
        batch: Samples.
        heads: Heads of keys and values.
        sharing: Query heads to each of them.
        queries: Query length.
        keys: Key length.
        size: Features of queries and keys.
        value_size: Features of values.
        dtype: Type of the arithmetic.
        stored: Type of the operands.
        mask: ``none``, ``row`` (the same for all queries) or ``full``.
        causal: Whether half of the scores are not needed.
    """

    batch: int | str
    heads: int
    sharing: int
    queries: int | str
    keys: int | str
    size: int
    value_size: int
    dtype: str
    stored: str
    mask: str
    causal: bool

    @property
    def rows(self) -> int | None:
        """Query rows of a group, when known."""
        return None if isinstance(self.queries, str) else self.queries * self.sharing

    def workload(self) -> Workload:
        """The problem in the terms of the chooser."""
        names = ("batch", "heads", "sharing", "queries", "keys", "size", "value_size", "mask")
        dims = tuple((name, getattr(self, name)) for name in names)
        scores = typical(self.batch, 1) * self.heads * self.sharing * typical(self.queries) * typical(self.keys)
        operations = 2.0 * scores * (self.size + self.value_size) / (2 if self.causal else 1)
        return Workload("attention", (*dims, ("causal", int(self.causal))), (self.stored, self.dtype), operations)

    def candidates(self, profile: Profile) -> list[Candidate]:
        """Blockings for more than :data:`FEW` rows of a group, or for exactly as many as there are."""
        lanes = profile.vector_bytes // itemsize(self.dtype)
        if self.rows is not None and self.rows <= FEW:
            return [self._candidate(profile, self.few(lanes, self.rows), lanes)]
        found: dict[Blocking, None] = {}
        for vectors in range(1, 5 if profile.registers >= 32 else 3):
            height = self._height(profile, vectors)
            for rows in dict.fromkeys(height * parts for parts in (1, 2) if height * parts <= self._most_rows(height)):
                for keys in self._block_keys(profile, rows, vectors * lanes):
                    chunk = self._chunk(profile, rows, keys)
                    found[Blocking(rows, height, vectors, keys, chunk, packed=True)] = None
        return [self._candidate(profile, blocking, lanes) for blocking in found]

    def few(self, lanes: int, rows: int = FEW) -> Blocking:
        """Dot products in the order of memory."""
        keys = FEW_KEYS if isinstance(self.keys, str) else min(FEW_KEYS, self.keys)
        return Blocking(rows, rows, 1, max(1, -(-keys // lanes)) * lanes, rows, packed=False)

    def _height(self, profile: Profile, vectors: int) -> int:
        most = _tallest(profile, vectors)
        return most if self.rows is None else -(-self.rows // -(-self.rows // most))

    def _most_rows(self, height: int) -> int:
        """Rows of the tallest tile: a tile of unknown sequences stays low, for what it has too many is lost."""
        return height if self.rows is None else max(height, min(self.rows, MOST_ROWS))

    def _block_keys(self, profile: Profile, rows: int, panel: int) -> list[int]:
        """Sizes of blocks: everything at once where the scores of a tile fit the first level, and parts of it."""
        unit, operands = itemsize(self.dtype), self.size + self.value_size
        largest = profile.l2_bytes // (2 * unit * operands)
        found: list[int] = []
        for share in (0.7, 0.35, 0.18):
            most = max(1, min(int(profile.l1_bytes * share) // (unit * rows), largest) // panel) * panel
            if not isinstance(self.keys, str):
                blocks = -(-self.keys // most)
                most = max(1, -(-self.keys // (blocks * panel))) * panel if blocks else panel
            found.append(most)
        return list(dict.fromkeys(found))

    def _chunk(self, profile: Profile, rows: int, keys: int) -> int:
        """Query rows of a task: whole groups where they keep all cores equally busy, parts of them elsewhere."""
        carried = itemsize(self.dtype) * (self.value_size + 2)
        single = not isinstance(self.keys, str) and self.keys <= keys
        most = max(rows, (profile.l2_bytes // (4 * carried)) // rows * rows)
        if self.rows is None:
            return min(rows * TILES, most)
        tiles = -(-self.rows // rows)
        groups = typical(self.batch, 1) * self.heads
        parts = 1
        while (groups * parts) % profile.cores and groups * parts < 4 * profile.cores and parts < tiles:
            parts += 1
        return -(-tiles // parts) * rows if single else min(-(-tiles // parts) * rows, most)

    def _candidate(self, profile: Profile, blocking: Blocking, lanes: int) -> Candidate:
        return Candidate(dataclasses.asdict(blocking), self.cycles(profile, blocking, lanes))

    def cycles(self, profile: Profile, blocking: Blocking, lanes: int) -> float:
        """Predicted cycles on one core: two multiply-adds or two loads a cycle, four cycles until a result is back."""
        queries, keys = typical(self.queries) * self.sharing, typical(self.keys)
        groups = typical(self.batch, 1) * self.heads
        # Sizes that are not known are no reason to like the tiles that happen to fit a typical one.
        tiles = queries / blocking.rows if self.rows is None else -(-queries // blocking.rows)
        blocks = -(-keys // blocking.keys)
        score_vectors = -(-keys // lanes)
        value_vectors = -(-self.value_size // lanes)
        if not blocking.packed:
            each = score_vectors * lanes * (-(-self.size // lanes) + 2.0 * lanes.bit_length())
            return groups * queries * (each + score_vectors * WEIGHT_CYCLES + keys * max(2.0, value_vectors / 2))

        full, rest = divmod(blocking.rows, blocking.height)
        steps = full * step_cycles(blocking.height, blocking.vectors) + step_cycles(rest, blocking.vectors)
        panels = -(-score_vectors // blocking.vectors)
        scores = panels * (self.size * steps + blocking.rows * blocking.vectors)
        height, wide = value_tile(profile, blocking.rows, value_vectors)
        products = 0.0
        for count, vectors in ((value_vectors // wide, wide), (1, value_vectors % wide)):
            each = blocking.rows // height * step_cycles(height, vectors)
            products += count * keys * (each + step_cycles(blocking.rows % height, vectors))
        carried = blocks * (TILE_CYCLES * -(-blocking.rows // lanes) + blocking.rows * (10.0 + 2 * value_vectors))
        tile = scores + products + carried + blocking.rows * score_vectors * WEIGHT_CYCLES
        chunks = -(-queries // blocking.chunk)
        packing = chunks * score_vectors * lanes * (0.4 * self.size + 2.0 * value_vectors)
        return groups * (tiles * tile * (0.55 if self.causal and blocks > 1 else 1.0) + packing)
