"""Sequences, which are lists of tensors, and optionals, which are a value or None."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmopt.training.lazy import torch
from mmopt.training.ops.common import integer, ints
from mmopt.training.registry import rule

if TYPE_CHECKING:
    from torch import Tensor


@rule("SequenceConstruct")
def sequence_construct(*items: Tensor) -> list[Tensor]:
    """A sequence of its inputs."""
    return list(items)


@rule("SequenceEmpty")
def sequence_empty(*, dtype: int = 1) -> list[Tensor]:
    """A sequence of nothing."""
    return []


@rule("SequenceAt")
def sequence_at(items: list[Tensor], place: Tensor) -> Tensor:
    """One item."""
    return items[integer(place)]


@rule("SequenceInsert")
def sequence_insert(items: list[Tensor], item: Tensor, place: Tensor | None = None) -> list[Tensor]:
    """With an item before a place, or at the end."""
    at = len(items) if place is None else integer(place)
    at = at + len(items) if at < 0 else at
    return [*items[:at], item, *items[at:]]


@rule("SequenceErase")
def sequence_erase(items: list[Tensor], place: Tensor | None = None) -> list[Tensor]:
    """Without the item at a place, or the last."""
    at = (len(items) - 1 if place is None else integer(place)) % max(len(items), 1)
    return [*items[:at], *items[at + 1 :]]


@rule("SequenceLength")
def sequence_length(items: list[Tensor]) -> Tensor:
    """How many items."""
    return torch.tensor(len(items), dtype=torch.int64)


@rule("SplitToSequence")
def split_to_sequence(x: Tensor, sizes: Tensor | None = None, *, axis: int = 0, keepdims: int = 1) -> list[Tensor]:
    """Cut along an axis into pieces of one size, of given sizes, or slices."""
    if sizes is None:
        return [part if keepdims else part.squeeze(axis) for part in torch.split(x, 1, axis)]
    return list(torch.split(x, integer(sizes) if sizes.ndim == 0 else ints(sizes), axis))


@rule("ConcatFromSequence")
def concat_from_sequence(items: list[Tensor], *, axis: int, new_axis: int = 0) -> Tensor:
    """Joined along an axis, or stacked."""
    return torch.stack(items, axis) if new_axis else torch.cat(items, axis)


@rule("Optional")
def optional(value: Any = None, *, type: Any = None) -> Any:
    """The value, or none."""
    return value


@rule("OptionalGetElement")
def optional_get_element(value: Any) -> Any:
    """The value."""
    return value


@rule("OptionalHasElement")
def optional_has_element(value: Any = None) -> Tensor:
    """Whether there is a value."""
    return torch.tensor(value is not None)
