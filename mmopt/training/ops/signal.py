"""Fourier transforms, and what draws random numbers or chooses boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from mmopt.training.lazy import torch
from mmopt.training.ops.common import integer
from mmopt.training.registry import Types, rule
from mmopt.training.tensors import dtypes

if TYPE_CHECKING:
    from torch import Tensor


@rule("DFT")
def dft(
    x: Tensor,
    length: Tensor | None = None,
    place: Tensor | None = None,
    *,
    axis: int | None = None,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    """Discrete Fourier transform along an axis; the last axis holds real, or real and imaginary parts."""
    along = integer(place) if place is not None else (axis if axis is not None else -2)
    along = along % x.ndim
    signal = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x.squeeze(-1)
    count = None if length is None else integer(length)
    if inverse and onesided:
        return torch.fft.irfft(signal, count, along).unsqueeze(-1)
    run = torch.fft.ifft if inverse else torch.fft.fft
    made = run(signal, count, along)
    if onesided:
        made = made.narrow(along, 0, made.shape[along] // 2 + 1)
    return torch.view_as_real(made)


@rule("STFT")
def stft(
    x: Tensor, step: Tensor, window: Tensor | None = None, length: Tensor | None = None, *, onesided: int = 1
) -> Tensor:
    """Fourier transforms of windows along a signal ``[batch, samples, 1 or 2]``."""
    signal = torch.view_as_complex(x.contiguous()) if x.ndim == 3 and x.shape[-1] == 2 else x.reshape(*x.shape[:2])
    size = integer(length) if length is not None else len(window) if window is not None else 0
    frames = signal.unfold(1, size, integer(step))
    frames = frames if window is None else frames * window
    made = torch.fft.fft(frames)
    if onesided:
        made = made[..., : size // 2 + 1]
    return torch.view_as_real(made)


@rule("MelWeightMatrix")
def mel_weight_matrix(
    bins: Tensor, length: Tensor, rate: Tensor, low: Tensor, high: Tensor, *, output_datatype: int = 1
) -> Tensor:
    """Triangles on the mel scale: ``[length // 2 + 1, bins]``."""
    count, size, sampling = integer(bins), integer(length), integer(rate)
    edges = 2595 * torch.log10(1 + torch.stack([low.reshape(()), high.reshape(())]).double() / 700)
    mels = edges[0] + torch.arange(count + 2) * (edges[1] - edges[0]) / (count + 2)
    places = torch.floor((size + 1) * 700 * (10 ** (mels / 2595) - 1) / sampling).to(torch.int64).tolist()
    made = torch.zeros(size // 2 + 1, count, dtype=torch.float64)
    for n in range(count):
        start, centre, end = places[n : n + 3]
        for k in range(start, centre + 1):
            made[k, n] = 1.0 if centre == start else (k - start) / (centre - start)
        for k in range(centre, end):
            made[k, n] = (end - k) / (end - centre)
    return made.to(dtypes()[ir.DataType(output_datatype)])


def _drawn(node: ir.Node, types: Types) -> Mapping[str, Any]:
    """The type of what is drawn, and a generator's seed where the node has one."""
    made = dict[str, Any]()
    if "dtype" in node.attributes:
        made["dtype"] = node.attributes["dtype"].as_int()
    if "seed" in node.attributes:
        made["seed"] = int(node.attributes["seed"].as_float())
    return made


def _generator(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


@rule("RandomNormal", static=_drawn)
def random_normal(
    *, shape: Sequence[int], mean: float = 0.0, scale: float = 1.0, dtype: int = 1, seed: int | None = None
) -> Tensor:
    """Normal numbers, from torch's generator."""
    made = torch.randn(list(shape), generator=_generator(seed))
    return (made * scale + mean).to(dtypes()[ir.DataType(dtype)])


@rule("RandomUniform", static=_drawn)
def random_uniform(
    *, shape: Sequence[int], low: float = 0.0, high: float = 1.0, dtype: int = 1, seed: int | None = None
) -> Tensor:
    """Evenly distributed numbers."""
    made = torch.rand(list(shape), generator=_generator(seed))
    return (made * (high - low) + low).to(dtypes()[ir.DataType(dtype)])


@rule("RandomNormalLike", static=_drawn)
def random_normal_like(
    x: Tensor, *, mean: float = 0.0, scale: float = 1.0, dtype: int | None = None, seed: int | None = None
) -> Tensor:
    """Normal numbers in the shape of a tensor."""
    made = torch.randn(x.shape, generator=_generator(seed)) * scale + mean
    return made.to(x.dtype if dtype is None else dtypes()[ir.DataType(dtype)])


@rule("RandomUniformLike", static=_drawn)
def random_uniform_like(
    x: Tensor, *, low: float = 0.0, high: float = 1.0, dtype: int | None = None, seed: int | None = None
) -> Tensor:
    """Evenly distributed numbers in the shape of a tensor."""
    made = torch.rand(x.shape, generator=_generator(seed)) * (high - low) + low
    return made.to(x.dtype if dtype is None else dtypes()[ir.DataType(dtype)])


@rule("Bernoulli", static=_drawn)
def bernoulli(x: Tensor, *, dtype: int | None = None, seed: int | None = None) -> Tensor:
    """One with the probability that the input is, else zero."""
    made = torch.bernoulli(x, generator=_generator(seed))
    return made.to(x.dtype if dtype is None else dtypes()[ir.DataType(dtype)])


@rule("Multinomial", static=_drawn)
def multinomial(x: Tensor, *, dtype: int = 6, sample_size: int = 1, seed: int | None = None) -> Tensor:
    """Classes drawn from logarithms of probabilities."""
    drawn = torch.multinomial(torch.softmax(x, -1), sample_size, True, generator=_generator(seed))
    return drawn.to(dtypes()[ir.DataType(dtype)])


@rule("NonMaxSuppression")
def non_max_suppression(
    boxes: Tensor,
    scores: Tensor,
    most: Tensor | None = None,
    overlap: Tensor | None = None,
    least: Tensor | None = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """Boxes that are not covered by a better one of their class: ``[count, (batch, class, box)]``."""
    limit = 0 if most is None else integer(most)
    allowed = 0.0 if overlap is None else float(overlap)
    found: list[list[int]] = []
    for batch in range(scores.shape[0]):
        corners = _corners(boxes[batch].detach(), bool(center_point_box))
        for kind in range(scores.shape[1]):
            row = scores[batch, kind].detach()
            chosen: list[int] = []
            for place in torch.argsort(row, descending=True, stable=True).tolist():
                if len(chosen) >= limit or (least is not None and float(row[place]) <= float(least)):
                    break
                if all(_overlap(corners[place], corners[other]) <= allowed for other in chosen):
                    chosen.append(place)
            found += [[batch, kind, place] for place in chosen]
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 3)


def _corners(boxes: Tensor, centred: bool) -> list[list[float]]:
    if centred:
        half = boxes[:, 2:] / 2
        pairs = torch.cat([boxes[:, :2] - half, boxes[:, :2] + half], 1)
    else:
        pairs = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], 1)
    return pairs.double().tolist()  # type: ignore[no-any-return]


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    inner = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    whole = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner
    return inner / whole if whole > 0 else 0.0
