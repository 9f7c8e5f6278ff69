"""Normalisation over axes, groups, batches and neighbours."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mmopt.training.lazy import functional, torch
from mmopt.training.ops.common import at_least_float32
from mmopt.training.registry import rule

if TYPE_CHECKING:
    from torch import Tensor


@rule("BatchNormalization", several=True)
def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    spatial: int = 1,
) -> tuple[Tensor, ...]:
    """``(x − mean) / √(variance + ε) · scale + bias`` for every channel; in training mode with the batch's own."""
    wide = [1, -1, *[1] * (x.ndim - 2)]
    running: tuple[Tensor, ...] = ()
    if training_mode:
        axes = [n for n in range(x.ndim) if n != 1]
        own, spread = x.mean(axes), x.var(axes, unbiased=False)
        running = (mean * momentum + own * (1 - momentum), variance * momentum + spread * (1 - momentum))
        mean, variance = own, spread
    factor = scale * torch.rsqrt(variance + epsilon)
    return ((x - mean.reshape(wide)) * factor.reshape(wide) + bias.reshape(wide)).to(x.dtype), *running


@rule("LayerNormalization", several=True)
def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    n_outputs: int = 1,
) -> tuple[Tensor, ...]:
    """``(x − mean) / √(variance + ε) · scale + bias`` over ``axis`` and all behind it; also mean and 1/√."""
    axis %= x.ndim
    sizes = list(x.shape[axis:])
    if n_outputs == 1 and list(scale.shape) == sizes and (bias is None or list(bias.shape) == sizes):
        return (functional.layer_norm(x, sizes, scale, bias, epsilon),)
    axes = list(range(axis, x.ndim))
    wide = x.to(at_least_float32(x.dtype))
    mean = wide.mean(axes, keepdim=True)
    inverse = torch.rsqrt((wide - mean).square().mean(axes, keepdim=True) + epsilon)
    made = ((wide - mean) * inverse).to(x.dtype) * scale
    return (made if bias is None else made + bias), mean, inverse


@rule("InstanceNormalization")
def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """As a layer norm over the places of every channel."""
    axes, wide = list(range(2, x.ndim)), [-1, *[1] * (x.ndim - 2)]
    centred = x - x.mean(axes, keepdim=True)
    factor = torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon)
    return centred * factor * scale.reshape(wide) + bias.reshape(wide)


@rule("GroupNormalization")
def group_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """As a layer norm over groups of channels; before operator set 21, scale and bias were one for each group."""
    if len(scale) != x.shape[1]:
        scale, bias = (part.repeat_interleave(x.shape[1] // num_groups) for part in (scale, bias))
    return functional.group_norm(x, num_groups, scale, bias, epsilon)


@rule("LpNormalization")
def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """Divided by the norm along an axis; zero stays zero."""
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, torch.ones_like(norm), norm))


@rule("LRN")
def local_response_normalization(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    """Divided by a power of the sum of squares of neighbouring channels."""
    before, behind = (size - 1) // 2, math.ceil((size - 1) / 2)
    squares = functional.pad(x.square().movedim(1, -1), [before, behind]).unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    return x / (bias + alpha / size * squares) ** beta


@rule("RMSNormalization")
def rms_normalization(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Any:
    """``x / √(mean x² + ε) · scale``."""
    axes = list(range(axis % x.ndim, x.ndim))
    wide = x.to(at_least_float32(x.dtype))
    return (wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)).to(x.dtype) * scale


@rule("NegativeLogLikelihoodLoss")
def negative_log_likelihood(
    x: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int | None = None, reduction: str = "mean"
) -> Tensor:
    """Less the element of each target class, weighed; ``x`` is ``[N, C, places…]``."""
    ignored = -(1 << 31) if ignore_index is None else ignore_index
    return functional.nll_loss(x, target.to(torch.int64), weight, ignore_index=ignored, reduction=reduction)
