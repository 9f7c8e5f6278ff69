"""What rules of several families need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from mmopt.training.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


Ints: TypeAlias = "Tensor | Sequence[int] | int"


def ints(values: Ints) -> list[int]:
    """Sizes, axes and the like as plain numbers, from a tensor or from an attribute."""
    if isinstance(values, torch.Tensor):
        return [int(v) for v in values.reshape(-1).tolist()]
    return [int(values)] if isinstance(values, int) else [int(v) for v in values]


def integer(value: Tensor | int) -> int:
    """One number."""
    return int(value.reshape(()).item()) if isinstance(value, torch.Tensor) else int(value)


def axes_of(axes: Ints | None, rank: int) -> list[int]:
    """Axes counted from the front; none given as none."""
    return [] if axes is None else [axis % rank if rank else 0 for axis in ints(axes)]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type, or the wider float32: what sums of halves are computed in."""
    return torch.promote_types(dtype, torch.float32)


def negative_extreme(dtype: torch.dtype) -> float | int:
    """What a maximum starts from."""
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min
