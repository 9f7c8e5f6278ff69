"""Merging adjacent loop axes that memory sees as one."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.ir import Expr

from mmopt.backends.cpu.loops import split_index
from mmopt.backends.cpu.plan import Traced
from mmopt.backends.expressions import same, strides, variables


def collapse(inside: Traced, axes: Sequence[int], extents: Sequence[Expr]) -> list[list[int]]:
    """Group neighbours among ``axes`` that every read walks as one contiguous axis.

    Args:
        inside: The traced rule.
        axes: Positions in ``inside.axes`` to group, outermost first.
        extents: Extent of every position.

    Returns:
        Groups of positions, outermost first.
    """
    names = [inside.axes[a] for a in axes]
    fixed = set().union(*(variables(v) for v in inside.values)) if inside.values else set()
    steps = [strides(read.offset, names) for read in inside.reads]
    groups = [[axes[0]]]
    for position in range(1, len(axes)):
        outer, inner = position - 1, position
        free = names[outer] not in fixed and names[inner] not in fixed
        if free and all(_contiguous(s[outer], s[inner], extents[axes[inner]]) for s in steps):
            groups[-1].append(axes[position])
        else:
            groups.append([axes[position]])
    return groups


def _contiguous(outer: Expr | None, inner: Expr | None, extent: Expr) -> bool:
    return outer is not None and inner is not None and same(outer, inner * extent)


def expand(at: Sequence[Expr], groups: Sequence[Sequence[int]], extents: Sequence[Expr]) -> tuple[Expr, ...]:
    """Indices of the original axes from one index for each group."""
    indices: list[Expr] = []
    for flat, group in zip(at, groups, strict=True):
        indices.extend(split_index(flat, [extents[a] for a in group]))
    return tuple(indices)
