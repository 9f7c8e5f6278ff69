"""What moves elements without computing: shapes, joins, cuts, padding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from mmopt.training.lazy import torch
from mmopt.training.ops.common import Ints, integer, ints
from mmopt.training.registry import Types, rule
from mmopt.training.tensors import dtypes, to_torch

if TYPE_CHECKING:
    from torch import Tensor


@rule("Identity", integers="keep")
def identity(x: Any) -> Any:
    """The input."""
    return x


@rule("Shape")
def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """Sizes, as int64."""
    return torch.tensor(list(x.shape)[slice(start, end)], dtype=torch.int64)


@rule("Size")
def size(x: Tensor) -> Tensor:
    """Number of elements, as int64."""
    return torch.tensor(x.numel(), dtype=torch.int64)


@rule("Reshape", integers="keep")
def reshape(x: Tensor, sizes: Ints, *, allowzero: int = 0) -> Tensor:
    """Other sizes; 0 takes over that of the input, -1 what is left."""
    wanted = ints(sizes)
    if not allowzero:
        wanted = [x.shape[n] if extent == 0 else extent for n, extent in enumerate(wanted)]
    if -1 in wanted and x.numel() == 0:
        rest = math.prod(extent for extent in wanted if extent != -1)
        wanted = [x.numel() // rest if extent == -1 and rest else max(extent, 0) for extent in wanted]
    return x.reshape(wanted)


@rule("Flatten", integers="keep")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """Two axes: those before ``axis``, and the others."""
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@rule("Transpose", integers="keep")
def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Axes in another order; reversed without one."""
    return x.permute(list(perm) if perm is not None else list(range(x.ndim))[::-1])


@rule("Squeeze", integers="keep")
def squeeze(x: Tensor, places: Ints | None = None, *, axes: Sequence[int] | None = None) -> Tensor:
    """Without axes of size 1: those named, or all."""
    named = axes if places is None else places
    gone = (
        {axis % x.ndim for axis in ints(named)} if named is not None else {n for n, s in enumerate(x.shape) if s == 1}
    )
    return x.reshape([extent for n, extent in enumerate(x.shape) if n not in gone])


@rule("Unsqueeze", integers="keep")
def unsqueeze(x: Tensor, places: Ints | None = None, *, axes: Sequence[int] | None = None) -> Tensor:
    """With axes of size 1 at places of the result."""
    new = ints(places if places is not None else axes or [])
    rank = x.ndim + len(new)
    for axis in sorted(axis % rank for axis in new):
        x = x.unsqueeze(axis)
    return x


@rule("Expand", integers="keep")
def expand(x: Tensor, sizes: Ints) -> Tensor:
    """Broadcast to sizes, in both directions."""
    return x.expand(torch.broadcast_shapes(x.shape, tuple(ints(sizes))))


@rule("Tile", integers="keep")
def tile(x: Tensor, repeats: Ints) -> Tensor:
    """Repeated along every axis."""
    return x.repeat(ints(repeats))


@rule("Concat", integers="keep")
def concat(*xs: Tensor, axis: int) -> Tensor:
    """Joined along an axis."""
    return torch.cat(xs, axis)


@rule("Split", several=True, integers="keep")
def split(
    x: Tensor,
    sizes: Ints | None = None,
    *,
    axis: int = 0,
    num_outputs: int = 0,
    n_outputs: int,
    split: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Cut along an axis, into given sizes or equal ones (the last may be smaller)."""
    extents = split if sizes is None and split is not None else sizes
    if extents is None:
        count, length = num_outputs or n_outputs, x.shape[axis]
        each = -(-length // count)
        extents = [max(0, min(each, length - n * each)) for n in range(count)]
    return tuple(torch.split(x, ints(extents), axis))


@rule("Slice", integers="keep")
def slice_(
    x: Tensor,
    starts: Ints | None = None,
    ends: Ints | None = None,
    axes: Ints | None = None,
    steps: Ints | None = None,
) -> Tensor:
    """From start to end, by steps that may be negative; ends beyond the edges are cut."""
    first = ints(starts) if starts is not None else []
    last = ints(ends) if ends is not None else []
    along = ints(axes) if axes is not None else list(range(len(first)))
    by = ints(steps) if steps is not None else [1] * len(first)
    for start, end, axis, step in zip(first, last, along, by, strict=True):
        extent = x.shape[axis]
        if step > 0:
            low, high = _clamp(start, extent, 0, extent), _clamp(end, extent, 0, extent)
            x = x.narrow(axis, low, max(0, high - low))
            x = x if step == 1 else x[(slice(None),) * (axis % x.ndim) + (slice(None, None, step),)]
        else:
            places = list(range(_clamp(start, extent, 0, extent - 1), _clamp(end, extent, -1, extent - 1), step))
            x = x.index_select(axis, torch.tensor(places, dtype=torch.int64, device=x.device))
    return x


def _clamp(place: int, extent: int, low: int, high: int) -> int:
    return min(max(place + extent if place < 0 else place, low), high)


@rule("Pad", integers="keep")
def pad(
    x: Tensor, pads: Ints, value: Tensor | float | None = None, axes: Ints | None = None, *, mode: str = "constant"
) -> Tensor:
    """Elements before and behind along axes; negative numbers cut."""
    amounts = ints(pads)
    along = [axis % x.ndim for axis in ints(axes)] if axes is not None else list(range(x.ndim))
    for n, axis in enumerate(along):
        before, behind = amounts[n], amounts[n + len(along)]
        if mode == "constant":
            x = _fill(x, axis, before, behind, value)
        elif before or behind:
            x = x.index_select(axis, _sources(x.shape[axis], before, behind, mode).to(x.device))
    return x


def _fill(x: Tensor, axis: int, before: int, behind: int, value: Tensor | float | None) -> Tensor:
    start, end = max(0, -before), x.shape[axis] + min(0, behind)
    parts = [x.narrow(axis, start, end - start)]
    for amount, place in ((before, 0), (behind, len(parts))):
        if amount > 0:
            extents = [amount if n == axis else extent for n, extent in enumerate(x.shape)]
            fill = torch.as_tensor(0 if value is None else value).reshape(()).to(x.dtype)
            edge = fill.to(x.device).expand(extents)
            parts = [edge, *parts] if place == 0 else [*parts, edge]
    return torch.cat(parts, axis) if len(parts) > 1 else parts[0]


def _sources(extent: int, before: int, behind: int, mode: str) -> Tensor:
    """Where each element of a padded axis comes from."""
    places = torch.arange(-before, extent + behind)
    if mode == "edge":
        return places.clamp(0, extent - 1)
    if mode == "wrap":
        return places % extent
    if mode == "reflect":
        period = max(1, 2 * (extent - 1))
        places = places % period
        return torch.where(places >= extent, period - places, places)
    raise ValueError(f"there is no mode {mode!r} of Pad")


@rule("DepthToSpace", integers="keep")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Channels into blocks of places."""
    n, c, h, w = x.shape
    b = blocksize
    if mode == "DCR":
        x = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(n, c // (b * b), h * b, w * b)


@rule("SpaceToDepth", integers="keep")
def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Blocks of places into channels."""
    n, c, h, w = x.shape
    b = blocksize
    x = x.reshape(n, c, h // b, b, w // b, b)
    x = x.permute(0, 3, 5, 1, 2, 4) if mode == "DCR" else x.permute(0, 1, 3, 5, 2, 4)
    return x.reshape(n, c * b * b, h // b, w // b)


@rule("Trilu")
def trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    """The upper or lower triangle."""
    diagonal = 0 if k is None else integer(k)
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


@rule("ReverseSequence")
def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """The first so many elements of each sequence backwards."""
    moved = x.movedim((time_axis, batch_axis), (0, 1))
    steps = torch.arange(moved.shape[0], device=x.device)[:, None]
    places = torch.where(steps < lengths, lengths - 1 - steps, steps)
    batch = torch.arange(moved.shape[1], device=x.device)
    return moved[places, batch].movedim((0, 1), (time_axis, batch_axis))


def _fill_value(node: ir.Node, types: Types) -> Mapping[str, Any]:
    """The one element of the attribute as a number and its type's name, which FX can write."""
    if "value" not in node.attributes:
        return {}
    tensor = node.attributes["value"].as_tensor()
    return {"value": (to_torch(tensor).reshape(-1)[0].item(), tensor.dtype.name)}


@rule("ConstantOfShape", static=_fill_value)
def constant_of_shape(sizes: Tensor, *, value: Any = None) -> Tensor:
    """A tensor of one number."""
    if value is None:
        return torch.zeros(ints(sizes))
    number, dtype = value
    return torch.full(ints(sizes), number, dtype=dtypes()[ir.DataType[dtype]])


@rule("Range")
def range_(start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    """Numbers from start to limit by steps."""
    return torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype, device=start.device)


def _dtype_name(node: ir.Node, types: Types) -> Mapping[str, Any]:
    attribute = node.attributes.get("dtype")
    return {} if attribute is None else {"dtype": ir.DataType(attribute.as_int()).name}


@rule("EyeLike", static=_dtype_name)
def eye_like(x: Tensor, *, k: int = 0, dtype: str = "") -> Tensor:
    """Ones on a diagonal."""
    made = torch.zeros(x.shape, dtype=dtypes()[ir.DataType[dtype]] if dtype else x.dtype, device=x.device)
    count = min(x.shape[0] + min(k, 0), x.shape[1] - max(k, 0))
    if count > 0:
        made.diagonal(k).fill_(1)
    return made
