"""Which steps of a program have to wait for which others: all that a graph of launches, or a workspace, has to keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Span:
    """Bytes of a memory.

    Attributes:
        memory: Which one; spans of different memories never overlap.
        start: First byte.
        stop: Behind the last one.
    """

    memory: Hashable
    start: int = 0
    stop: int = 1

    def overlaps(self, other: Span) -> bool:
        """Whether they have a byte in common."""
        return self.memory == other.memory and self.start < other.stop and other.start < self.stop


@dataclasses.dataclass(frozen=True)
class Access:
    """What a step does to memory.

    Attributes:
        reads: What it reads.
        writes: What it writes.
    """

    reads: tuple[Span, ...]
    writes: tuple[Span, ...]

    def conflicts(self, later: Access) -> bool:
        """Whether a later step has to wait: it needs what this one writes, or writes what this one uses."""
        return _meet(self.writes, later.reads) or _meet(self.writes, later.writes) or _meet(self.reads, later.writes)


def _meet(some: Iterable[Span], others: Sequence[Span]) -> bool:
    return any(one.overlaps(other) for one in some for other in others)


def waits(steps: Sequence[Access]) -> list[tuple[int, ...]]:
    """For each step the earlier ones that it has to wait for, without those that these wait for already."""
    found: list[tuple[int, ...]] = []
    before: list[int] = []  # bit n of a step: it comes behind step n
    for number, step in enumerate(steps):
        direct: list[int] = []
        reached = 0
        for earlier in range(number - 1, -1, -1):
            if not reached >> earlier & 1 and steps[earlier].conflicts(step):
                direct.append(earlier)
                reached |= before[earlier] | 1 << earlier
        found.append(tuple(reversed(direct)))
        before.append(reached)
    return found


def behind(order: Sequence[Iterable[int]]) -> list[int]:
    """For each step the set of all steps that come before it, as bits, given those it waits for."""
    found: list[int] = []
    for direct in order:
        reached = 0
        for earlier in direct:
            reached |= found[earlier] | 1 << earlier
        found.append(reached)
    return found
