"""Where tensors lie in a shared workspace: those that are never needed at the same time may have the same place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

ALIGNMENT = 64
"""Bytes to whose multiples every block is aligned."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Memory for one tensor.

    Attributes:
        size: Bytes.
        first: Step that writes it.
        last: Last step that reads it, ``first`` or later.
    """

    size: int
    first: int
    last: int

    def meets(self, other: Block) -> bool:
        """Whether both are needed during some step."""
        return self.first <= other.last and other.first <= self.last


def aligned(size: int) -> int:
    """``size`` rounded up to :data:`ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def arrange(blocks: Sequence[Block], meets: Callable[[int, int], bool] | None = None) -> tuple[list[int], int]:
    """Offsets at which no two blocks overlap that are needed at the same time.

    The largest block is placed first, each at the lowest offset where it fits ("greedy by size" of Pisarchyk and Lee,
    Efficient Memory Management for Deep Neural Net Inference, 2020).

    Args:
        blocks: What needs a place.
        meets: Whether two blocks, by number, are needed at the same time; :meth:`Block.meets` when None.

    Returns:
        An offset for each block, and the size of the workspace.
    """
    together = meets or (lambda one, other: blocks[one].meets(blocks[other]))
    offsets = [0] * len(blocks)
    placed: list[int] = []
    total = 0
    for number in sorted(range(len(blocks)), key=lambda n: (-blocks[n].size, blocks[n].first)):
        block, offset = blocks[number], 0
        for other in placed:  # by offset
            if together(other, number):
                if offset + aligned(block.size) <= offsets[other]:
                    break
                offset = max(offset, offsets[other] + aligned(blocks[other].size))
        offsets[number] = offset
        total = max(total, offset + aligned(block.size))
        placed.append(number)
        placed.sort(key=offsets.__getitem__)
    return offsets, total


def share(blocks: Sequence[Block]) -> list[int]:
    """For blocks of one size, however large: places, numbered from 0, so that blocks that meet have different ones."""
    places: list[int] = []
    places_of = [0] * len(blocks)
    for number in sorted(range(len(blocks)), key=lambda n: blocks[n].first):
        block = blocks[number]
        free = next((p for p, until in enumerate(places) if until < block.first), len(places))
        if free == len(places):
            places.append(block.last)
        places[free] = block.last
        places_of[number] = free
    return places_of
