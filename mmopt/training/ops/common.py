"""What rules of several families need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Ints: TypeAlias = Tensor | Sequence[int] | int


def ints(values: Ints) -> list[int]:
    """Sizes, axes and the like as plain numbers, from a tensor or from an attribute."""
    if isinstance(values, Tensor):
        return [int(v) for v in values.reshape(-1).tolist()]
    return [int(values)] if isinstance(values, int) else [int(v) for v in values]


def integer(value: Tensor | int) -> int:
    """One number."""
    return int(value.reshape(()).item()) if isinstance(value, Tensor) else int(value)


def axes_of(axes: Ints | None, rank: int) -> list[int]:
    """Axes counted from the front; none given as none."""
    return [] if axes is None else [axis % rank if rank else 0 for axis in ints(axes)]


def at_least(dtype: torch.dtype, least: torch.dtype = torch.float32) -> torch.dtype:
    """The wider of two types of floats: what sums of halves are computed in."""
    return torch.promote_types(dtype, least)


def negative_extreme(dtype: torch.dtype) -> float | int:
    """What a maximum starts from."""
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min
