"""Resize, sampling on grids, regions: interpolation written as products with small matrices, one for every axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmopt.training.lazy import functional, torch
from mmopt.training.ops.common import ints
from mmopt.training.registry import rule

if TYPE_CHECKING:
    from torch import Tensor

_KEEP = ("not_larger", "not_smaller")


@rule("Resize")
def resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Other sizes by interpolation."""
    along = [axis % x.ndim for axis in axes] if axes is not None else list(range(x.ndim))
    given = sizes is not None and sizes.numel() > 0
    if given:
        assert sizes is not None
        wanted = ints(sizes)
        factors = [wanted[n] / x.shape[axis] for n, axis in enumerate(along)]
        if keep_aspect_ratio_policy in _KEEP:
            factor = (min if keep_aspect_ratio_policy == "not_larger" else max)(factors)
            factors = [factor] * len(along)
            wanted = [int(factor * x.shape[axis] + 0.5) for axis in along]
    else:
        assert scales is not None
        factors = [float(v) for v in scales.tolist()]
        wanted = [int(factor * x.shape[axis]) for factor, axis in zip(factors, along, strict=True)]
    regions = roi.tolist() if roi is not None and roi.numel() else [0.0] * len(along) + [1.0] * len(along)
    kind = x.dtype
    x = x if kind.is_floating_point else x.double()
    for n, axis in enumerate(along):
        crop = coordinate_transformation_mode == "tf_crop_and_resize"
        if wanted[n] == x.shape[axis] and factors[n] == 1 and not crop:
            continue
        places = _coordinates(
            wanted[n], x.shape[axis], factors[n], coordinate_transformation_mode,
            regions[n], regions[n + len(along)],
        )  # fmt: skip
        matrix = _matrix(
            places, x.shape[axis], factors[n] if antialias else 1.0, mode, nearest_mode, cubic_coeff_a, exclude_outside
        )
        x = _apply(x, axis, matrix.to(x.dtype))
        if crop:
            outside = (places < 0) | (places > x.new_tensor(float(_extent(matrix) - 1)))
            shape = [-1 if m == axis else 1 for m in range(x.ndim)]
            x = torch.where(outside.reshape(shape), x.new_tensor(extrapolation_value), x)
    return x if kind.is_floating_point else _to_integers(x, kind)


def _extent(matrix: Tensor) -> int:
    return int(matrix.shape[1])


def _to_integers(x: Tensor, kind: torch.dtype) -> Tensor:
    info = torch.iinfo(kind)
    return torch.round(x).clamp(info.min, info.max).to(kind)


def _apply(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """``matrix`` times ``x`` along ``axis``; what has no finite product (infinite elements off the taps) is avoided."""
    return torch.movedim(torch.movedim(x, axis, -1) @ matrix.t(), -1, axis)


def _coordinates(count: int, extent: int, factor: float, mode: str, start: float, end: float) -> Tensor:
    """Where in the input each place of the output lies."""
    places = torch.arange(count, dtype=torch.float64)
    length = factor * extent
    if mode == "asymmetric":
        return places / factor
    if mode == "align_corners":
        return places * 0 if length == 1 else places * (extent - 1) / (length - 1)
    if mode == "pytorch_half_pixel":
        return places * 0 - 0.5 + 0.5 if length <= 1 else (places + 0.5) / factor - 0.5
    if mode == "tf_half_pixel_for_nn":
        return (places + 0.5) / factor
    if mode == "tf_crop_and_resize":
        if length > 1:
            return start * (extent - 1) + places * (end - start) * (extent - 1) / (length - 1)
        return places * 0 + 0.5 * (start + end) * (extent - 1)
    if mode == "half_pixel_symmetric":
        adjusted = count / length
        centre = extent / 2
        return centre * (1 - adjusted) + (places + 0.5) / factor - 0.5
    return (places + 0.5) / factor - 0.5


def _matrix(
    places: Tensor, extent: int, factor: float, mode: str, nearest: str, a: float, exclude_outside: int
) -> Tensor:
    """Weights ``[outputs, inputs]`` of the interpolation."""
    if mode == "nearest":
        return functional.one_hot(_nearest(places, nearest).clamp(0, extent - 1), extent).double()
    shrink = min(factor, 1.0)
    reach = (2 if mode == "cubic" else 1) / shrink
    first = torch.floor(places - reach).to(torch.int64) + 1
    taps = first[:, None] + torch.arange(int(2 * reach + 1.999))
    distance = ((places[:, None] - taps) * shrink).abs()
    weights = _cubic(distance, a) if mode == "cubic" else (1 - distance).clamp(min=0)
    if exclude_outside:
        weights = torch.where((taps >= 0) & (taps < extent), weights, torch.zeros_like(weights))
    weights = weights / weights.sum(1, keepdim=True)
    made = torch.zeros(len(places), extent, dtype=torch.float64)
    return made.scatter_add(1, taps.clamp(0, extent - 1), weights)


def _nearest(places: Tensor, mode: str) -> Tensor:
    if mode == "round_prefer_ceil":
        found = torch.floor(places + 0.5)
    elif mode == "floor":
        found = torch.floor(places)
    elif mode == "ceil":
        found = torch.ceil(places)
    else:
        found = torch.ceil(places - 0.5)
    return found.to(torch.int64)


def _cubic(x: Tensor, a: float) -> Tensor:
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


@rule("Upsample")
def upsample(x: Tensor, scales: Tensor, *, mode: str = "nearest") -> Tensor:
    """Resize as it was once called."""
    return resize(x, None, scales, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor")


_SAMPLING = {"linear": "bilinear", "bilinear": "bilinear", "cubic": "bicubic", "bicubic": "bicubic"}


@rule("GridSample")
def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    """Elements at places of a grid, by interpolation."""
    return functional.grid_sample(
        x, grid, mode=_SAMPLING.get(mode, mode), padding_mode=padding_mode, align_corners=bool(align_corners)
    )


@rule("RoiAlign")
def roi_align(
    x: Tensor,
    rois: Tensor,
    batch: Tensor,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Every region on a small grid: means or maxima of samples that are interpolated."""
    half = coordinate_transformation_mode == "half_pixel"
    boxes = rois * spatial_scale - (0.5 if half else 0.0)
    made = [
        _region(x[int(batch[n])], boxes[n], (output_height, output_width), sampling_ratio, half, mode)
        for n in range(len(rois))
    ]
    return torch.stack(made) if made else torch.zeros(0, x.shape[1], output_height, output_width, dtype=x.dtype)


def _region(image: Tensor, box: Tensor, out: tuple[int, int], ratio: int, half: bool, mode: str) -> Tensor:
    weights, counts = [], []
    for axis, (start, end) in enumerate(((box[1], box[3]), (box[0], box[2]))):
        length = end - start if half else torch.clamp(end - start, min=1)
        cell = length / out[axis]
        count = ratio or max(1, int(torch.ceil(cell)))
        steps = (torch.arange(out[axis] * count, dtype=box.dtype) + 0.5) / count
        weights.append(_taps(start + steps * cell, image.shape[1 + axis]))
        counts.append(count)
    shape = (image.shape[0], out[0], counts[0], out[1], counts[1])
    if mode == "avg":
        return (weights[0] @ image @ weights[1].t()).reshape(shape).mean((2, 4))
    # The largest of the weighted neighbours, as the standard has it, rather than of the samples.
    rows, columns = weights[0], weights[1]
    near = [_two_largest(part) for part in (rows, columns)]
    parts = [
        image[:, near[0][1][:, i]][:, :, near[1][1][:, j]] * near[0][0][:, i, None] * near[1][0][None, :, j]
        for i in range(2)
        for j in range(2)
    ]
    return torch.stack(parts).amax(0).reshape(shape).amax((2, 4))


def _two_largest(weights: Tensor) -> tuple[Tensor, Tensor]:
    count = min(2, weights.shape[1])
    values, places = weights.topk(count, 1)
    if count == 1:
        values, places = values.repeat(1, 2), places.repeat(1, 2)
    return values, places


def _taps(places: Tensor, extent: int) -> Tensor:
    """Weights of linear interpolation; none beyond one element outside."""
    valid = (places >= -1) & (places <= extent)
    places = places.clamp(0, extent - 1)
    low = torch.floor(places.detach()).to(torch.int64)
    high = (low + 1).clamp(max=extent - 1)
    part = places - low
    made = torch.zeros(len(places), extent, dtype=places.dtype)
    made = made.scatter_add(1, low[:, None], (1 - part)[:, None]).scatter_add(1, high[:, None], part[:, None])
    return made * valid[:, None]
