"""Pooling: windows reduced to one element, by windows that ``unfold`` cuts where torch has no such pool."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmopt.training.lazy import functional, torch
from mmopt.training.ops.common import ints, negative_extreme
from mmopt.training.ops.linear import for_torch, padding
from mmopt.training.registry import rule

if TYPE_CHECKING:
    from torch import Tensor

Pairs = list[tuple[int, int]]


def _geometry(
    x: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int] | None,
    dilations: Sequence[int] | None,
    pads: Sequence[int] | None,
    auto_pad: str,
    ceil_mode: int,
) -> tuple[list[int], list[int], Pairs, list[int]]:
    """Strides, dilations, padding, and what the last windows reach beyond it."""
    rank = len(kernel)
    steps, spread = list(strides or [1] * rank), list(dilations or [1] * rank)
    pairs = padding(x.shape[2:], kernel, steps, spread, pads, auto_pad)
    beyond = [0] * rank
    for n, (before, behind) in enumerate(pairs):
        room = x.shape[2 + n] + before + behind - (kernel[n] - 1) * spread[n] - 1
        if ceil_mode and room % steps[n]:
            count = room // steps[n] + 1
            # A last window that would begin behind the input and its padding is left out.
            if count * steps[n] < x.shape[2 + n] + before:
                beyond[n] = steps[n] - room % steps[n]
    return steps, spread, pairs, beyond


def windows(x: Tensor, kernel: Sequence[int], steps: Sequence[int], spread: Sequence[int]) -> Tensor:
    """``[N, C, places…, taps…]``: a view with an axis of taps for every spatial axis."""
    rank = len(kernel)
    for n in range(rank):
        x = x.unfold(2 + n, (kernel[n] - 1) * spread[n] + 1, steps[n])[..., :: spread[n]]
    return x


def _padded(x: Tensor, pairs: Pairs, beyond: Sequence[int], value: float) -> Tensor:
    amounts = [(before, behind + more) for (before, behind), more in zip(pairs, beyond, strict=True)]
    return functional.pad(x, for_torch(amounts), value=value) if any(map(any, amounts)) else x


@rule("MaxPool", several=True, integers="keep")
def max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    storage_order: int = 0,
    n_outputs: int = 1,
) -> tuple[Tensor, ...]:
    """The largest of each window, and where in the input it was."""
    steps, spread, pairs, beyond = _geometry(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    rank = len(kernel_shape)
    padded = _padded(x, pairs, beyond, negative_extreme(x.dtype))
    if x.dtype.is_floating_point and rank in (1, 2, 3) and n_outputs == 1:
        pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[rank - 1]
        return (pool(padded, list(kernel_shape), steps, 0, spread),)
    cut = windows(padded, kernel_shape, steps, spread).flatten(2 + rank)
    values, taps = cut.max(-1)
    return values, _positions(taps, x, kernel_shape, steps, spread, pairs, storage_order)


def _positions(
    taps: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    steps: Sequence[int],
    spread: Sequence[int],
    pairs: Pairs,
    storage_order: int,
) -> Tensor:
    """Places in the flat input of the taps that won."""
    rank = len(kernel)
    places: list[Tensor] = []
    for n in reversed(range(rank)):
        shape = [-1 if m == n else 1 for m in range(rank)]
        start = (torch.arange(taps.shape[2 + n]) * steps[n] - pairs[n][0]).reshape(shape)
        places.insert(0, start + taps % kernel[n] * spread[n])
        taps = taps // kernel[n]
    sizes = x.shape[2:]
    flat = torch.zeros((), dtype=torch.int64)
    for n in range(rank) if storage_order == 0 else reversed(range(rank)):
        flat = flat * sizes[n] + places[n]
    planes = torch.arange(x.shape[0] * x.shape[1]).reshape(x.shape[0], x.shape[1], *[1] * rank)
    return flat + planes * math.prod(sizes)


@rule("AveragePool")
def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
) -> Tensor:
    """The mean of each window; padding counts where that is asked for, what lies beyond it never."""
    steps, spread, pairs, beyond = _geometry(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    rank = len(kernel_shape)
    total = windows(_padded(x, pairs, beyond, 0), kernel_shape, steps, spread).flatten(2 + rank).sum(-1)
    inside = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    inside = _padded(inside, pairs, [0] * rank, float(bool(count_include_pad)))
    inside = _padded(inside, [(0, 0)] * rank, beyond, 0)
    return total / windows(inside, kernel_shape, steps, spread).flatten(2 + rank).sum(-1)


@rule("LpPool")
def lp_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    p: int = 2,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
) -> Tensor:
    """The p-norm of each window."""
    steps, spread, pairs, beyond = _geometry(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    cut = windows(_padded(x, pairs, beyond, 0), kernel_shape, steps, spread).flatten(2 + len(kernel_shape))
    return torch.linalg.vector_norm(cut, p, -1)


@rule("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    """The mean of every channel."""
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@rule("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    """The largest of every channel."""
    return x.amax(list(range(2, x.ndim)), keepdim=True)


@rule("GlobalLpPool")
def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    """The p-norm of every channel."""
    return torch.linalg.vector_norm(x, p, list(range(2, x.ndim)), keepdim=True)


@rule("MaxUnpool")
def max_unpool(
    x: Tensor,
    indices: Tensor,
    sizes: Tensor | None = None,
    *,
    kernel_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
) -> Tensor:
    """Elements back to where they were the largest, zero elsewhere."""
    rank = len(kernel_shape)
    steps, given = list(strides or [1] * rank), list(pads or [0] * (2 * rank))
    own = [(x.shape[2 + n] - 1) * steps[n] - given[n] - given[n + rank] + kernel_shape[n] for n in range(rank)]
    whole = [*x.shape[:2], *own]
    flat = torch.zeros(math.prod(whole), dtype=x.dtype).scatter(0, indices.reshape(-1), x.reshape(-1)).reshape(whole)
    if sizes is None:
        return flat
    wanted = ints(sizes)
    return functional.pad(flat, for_torch([(0, wanted[n] - whole[n]) for n in range(len(whole))]))
