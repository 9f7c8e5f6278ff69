"""Reading from and writing to places given by tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmopt.training.lazy import torch
from mmopt.training.ops.common import integer
from mmopt.training.registry import rule

if TYPE_CHECKING:
    from torch import Tensor


def _from_front(places: Tensor, extent: int) -> Tensor:
    places = places.to(torch.int64)
    return torch.where(places < 0, places + extent, places)


@rule("Gather", integers="keep")
def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Slices along an axis, at places of any shape."""
    axis %= x.ndim
    places = _from_front(indices, x.shape[axis])
    taken = x.index_select(axis, places.reshape(-1))
    return taken.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


@rule("GatherElements", integers="keep")
def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """One element for each index."""
    return torch.gather(x, axis, _from_front(indices, x.shape[axis]))


@rule("GatherND", integers="keep")
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Slices at tuples of places."""
    depth = indices.shape[-1]
    batch = [
        torch.arange(x.shape[n], device=x.device).reshape([-1 if m == n else 1 for m in range(indices.ndim - 1)])
        for n in range(batch_dims)
    ]
    places = [_from_front(indices[..., n], x.shape[batch_dims + n]) for n in range(depth)]
    return x[(*batch, *places)]


_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@rule("ScatterElements", "Scatter")
def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    """One update for each index."""
    places = _from_front(indices, x.shape[axis])
    if reduction == "none":
        return torch.scatter(x, axis, places, updates)
    return torch.scatter_reduce(x, axis, places, updates, _REDUCE[reduction], include_self=True)


@rule("ScatterND")
def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """Slices written to tuples of places."""
    depth = indices.shape[-1]
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for n in range(depth):
        flat = flat * x.shape[n] + _from_front(indices[..., n], x.shape[n])
    rows = x.reshape([-1, *x.shape[depth:]])
    new = updates.reshape([-1, *x.shape[depth:]])
    places = flat.reshape(-1)
    if reduction == "none":
        return rows.index_put((places,), new).reshape(x.shape)
    spread = places.reshape(-1, *[1] * (rows.ndim - 1)).expand(new.shape)
    return torch.scatter_reduce(rows, 0, spread, new, _REDUCE[reduction], include_self=True).reshape(x.shape)


@rule("TensorScatter")
def tensor_scatter(
    past: Tensor, update: Tensor, places: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """A cache with new entries behind the old ones, for every sequence of a batch."""
    axis %= past.ndim
    length, new = past.shape[axis], update.shape[axis]
    start = torch.zeros(past.shape[0], dtype=torch.int64) if places is None else places.to(torch.int64)
    rows = start[:, None] + torch.arange(new)
    rows = rows % length if mode == "circular" else rows
    extents = [past.shape[0], *[1] * (axis - 1), new, *[1] * (past.ndim - axis - 1)]
    return torch.scatter(past, axis, rows.reshape(extents).expand(update.shape), update)


@rule("OneHot")
def one_hot(indices: Tensor, depth: Tensor, values: Tensor, *, axis: int = -1) -> Tensor:
    """An axis with one value at the index and another elsewhere."""
    count = integer(depth)
    axis = axis + indices.ndim + 1 if axis < 0 else axis
    places = indices.to(torch.int64)
    places = torch.where(places < 0, places + count, places)
    extents = [1] * (indices.ndim + 1)
    extents[axis] = count
    hit = places.unsqueeze(axis) == torch.arange(count, device=indices.device).reshape(extents)
    return torch.where(hit, values[1], values[0])


@rule("NonZero")
def non_zero(x: Tensor) -> Tensor:
    """Places of what is not zero: ``[rank, count]``."""
    return torch.stack(torch.nonzero(x, as_tuple=True)) if x.ndim else torch.nonzero(x).t()


@rule("Compress")
def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """Slices for which the condition holds."""
    x, along = (x.reshape(-1), 0) if axis is None else (x, axis)
    places = torch.nonzero(condition[: x.shape[along]]).reshape(-1)
    return x.index_select(along, places)


@rule("Unique", several=True)
def unique(x: Tensor, *, axis: int | None = None, sorted: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Different slices, where each was first, which is which, and how often each comes."""
    rows, along = (x.reshape(-1), 0) if axis is None else (x, axis)
    values, inverse, counts = torch.unique(rows, sorted=True, return_inverse=True, return_counts=True, dim=along)
    first = torch.full(counts.shape, inverse.numel(), dtype=torch.int64)
    first = first.scatter_reduce(0, inverse.reshape(-1), torch.arange(inverse.numel()), "amin")
    order: Sequence[int] | Tensor = torch.arange(len(counts)) if sorted else torch.argsort(first)
    assert isinstance(order, torch.Tensor)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
    return values.index_select(along, order), first[order], rank[inverse.reshape(-1)], counts[order]
