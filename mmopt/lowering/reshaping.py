"""Reshapes of lazy tensors."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map, Tensor
from mmopt.backends.cpu.loops import flat_index, split_index
from mmopt.backends.expressions import same, simplify


def reindexed(tensor: Tensor, extents: Sequence[Expr]) -> Map:
    """A lazy reshape. Axes are split and merged within the smallest groups of equal extent, with little division."""
    groups = _matching_axes(extents, tensor.shape)

    def body(*at: Expr) -> Expr:
        indices: list[Expr] = []
        for made, read in groups:
            flat = simplify(flat_index(at[made], extents[made]))
            indices.extend(split_index(flat, tensor.shape[read]))
        return tensor[tuple(indices)]

    return Map(extents, tensor.dtype, body, "reshape")


def _matching_axes(left: Sequence[Expr], right: Sequence[Expr]) -> list[tuple[slice, slice]]:
    """Runs of axes of two shapes of as many elements, outermost first, that have as many elements each."""
    groups: list[tuple[slice, slice]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        end_i, end_j = i + 1, j + 1
        a, b = left[i], right[j]
        while not same(a, b) and isinstance(a, tirx.IntImm) and isinstance(b, tirx.IntImm):
            if int(a.value) < int(b.value) and end_i < len(left):
                a, end_i = simplify(a * left[end_i]), end_i + 1
            elif int(a.value) > int(b.value) and end_j < len(right):
                b, end_j = simplify(b * right[end_j]), end_j + 1
            else:
                break
        if not same(a, b):
            break
        groups.append((slice(i, end_i), slice(j, end_j)))
        i, j = end_i, end_j
    if i < len(left) or j < len(right):
        groups.append((slice(i, len(left)), slice(j, len(right))))
    return groups
