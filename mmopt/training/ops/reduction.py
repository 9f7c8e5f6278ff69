"""Reductions, normalised exponentials, running sums, positions of extremes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from mmopt.training.lazy import torch
from mmopt.training.ops.common import Ints, axes_of, integer, ints
from mmopt.training.registry import add, rule

if TYPE_CHECKING:
    from torch import Tensor

Reduce: TypeAlias = "Callable[[Tensor, list[int], bool], Tensor]"


def _reduction(reduce: Reduce) -> Callable[..., Tensor]:
    def reduced(
        x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0, **attributes: Any
    ) -> Tensor:
        wanted = ints(attributes["axes"] if axes is None and "axes" in attributes else [] if axes is None else axes)
        if not wanted and noop_with_empty_axes:
            return _alone(reduce, x)
        along = axes_of(wanted, x.ndim) or list(range(x.ndim))
        return reduce(x, along, bool(keepdims)) if x.ndim else _alone(reduce, x)

    return reduced


def _alone(reduce: Reduce, x: Tensor) -> Tensor:
    """The reduction over no axis: over one of a single element, put there and taken away again."""
    return reduce(x.unsqueeze(-1), [x.ndim], False)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.dtype.is_floating_point:
        return torch.mean(x, axes, keepdim=keep)
    return torch.mean(x.double(), axes, keepdim=keep).to(x.dtype)


def _neutral(dtype: torch.dtype, least: bool) -> float | int:
    if dtype.is_floating_point:
        return math.inf if least else -math.inf
    return torch.iinfo(dtype).max if least else torch.iinfo(dtype).min  # type: ignore[no-any-return]


def _extreme(name: str, *, least: bool) -> Reduce:
    def reduced(x: Tensor, axes: list[int], keep: bool) -> Tensor:
        if x.dtype == torch.bool:
            return reduced(x.to(torch.uint8), axes, keep).bool()
        if any(x.shape[axis] == 0 for axis in axes):
            # torch refuses; the standard wants the neutral element.
            shape = [1 if n in axes else size for n, size in enumerate(x.shape)]
            filled = torch.full(shape, _neutral(x.dtype, least), dtype=x.dtype)
            return filled if keep else filled.reshape([s for n, s in enumerate(x.shape) if n not in axes])
        made: Tensor = getattr(torch, name)(x, axes, keepdim=keep)
        return made

    return reduced


def _l1(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _sum(torch.abs(x), axes, keep)


def _l2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if not x.dtype.is_floating_point:
        return _l2(x.double(), axes, keep).to(x.dtype)
    return torch.linalg.vector_norm(x, dim=axes, keepdim=keep)


def _log_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.log(_sum(x, axes, keep))


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keepdim=keep)


def _sum_square(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _sum(x * x, axes, keep)


for _name, _reduce in {
    "ReduceSum": _sum,
    "ReduceMean": _mean,
    "ReduceMax": _extreme("amax", least=False),
    "ReduceMin": _extreme("amin", least=True),
    "ReduceProd": _product,
    "ReduceL1": _l1,
    "ReduceL2": _l2,
    "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceSumSquare": _sum_square,
}.items():
    _made = _reduction(_reduce)
    _made.__name__ = _made.__qualname__ = f"reduce_{_name.removeprefix('Reduce').lower()}"
    globals()[_made.__name__] = _made  # FX writes calls by module and name
    add(_made, _name)


def _argument(x: Tensor, axis: int, keepdims: int, last: int, find: Callable[..., Tensor]) -> Tensor:
    if last:
        flipped = find(torch.flip(x, [axis]), dim=axis, keepdim=bool(keepdims))
        return x.shape[axis] - 1 - flipped
    return find(x, dim=axis, keepdim=bool(keepdims))


@rule("ArgMax")
def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Position of the largest; the first of several, or the last."""
    return _argument(x, axis, keepdims, select_last_index, torch.argmax)


@rule("ArgMin")
def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Position of the smallest."""
    return _argument(x, axis, keepdims, select_last_index, torch.argmin)


@rule("Softmax")
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Exponentials as shares of their sum."""
    return torch.softmax(x, axis)


@rule("LogSoftmax")
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Logarithms of these shares."""
    return torch.log_softmax(x, axis)


@rule("Hardmax")
def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """One at the first of the largest, else zero."""
    places = torch.argmax(x, axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, places, 1)


def _running(x: Tensor, axis: Tensor, exclusive: int, reverse: int, run: Callable[..., Tensor], first: int) -> Tensor:
    along = integer(axis) % x.ndim
    x = torch.flip(x, [along]) if reverse else x
    if exclusive:
        start = torch.full_like(x.narrow(along, 0, min(1, x.shape[along])), first)
        x = torch.cat([start, x.narrow(along, 0, max(0, x.shape[along] - 1))], along)
    made = run(x, along, dtype=x.dtype)
    return torch.flip(made, [along]) if reverse else made


@rule("CumSum")
def cumulative_sum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Sums of all up to each."""
    return _running(x, axis, exclusive, reverse, torch.cumsum, 0)


@rule("CumProd")
def cumulative_product(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Products of all up to each."""
    return _running(x, axis, exclusive, reverse, torch.cumprod, 1)


@rule("TopK", several=True)
def top_k(x: Tensor, k: Tensor, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """The k largest or smallest, and where they were; the earlier one of equals comes first."""
    order = torch.argsort(x, dim=axis, descending=bool(largest), stable=True)
    places = order.narrow(axis, 0, integer(k))
    return torch.gather(x, axis, places), places
