"""Integers that are trained: which way each weight is rounded, as a number between 0 and 1 (AdaRound).

    q = clip(⌊w / s⌋ + z + h(V))        h(V) = clip(1.2 · sigmoid(V) − 0.1, 0, 1)

V starts where h(V) is what rounding cut off, so the start is the float weight; ``Σ 1 − |2h − 1|^β``, with β falling,
drives every h to 0 or 1 (Nagel et al., 2020). Where the float weight is not known, the integers themselves are trained
as floats that are rounded with straight-through gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from mmopt.training.lazy import torch
from mmopt.training.ops.quantize import straight_through
from mmopt.training.tensors import BOUNDS

if TYPE_CHECKING:
    from torch import Tensor

_STRETCH, _BELOW = 1.2, 0.1
_FIRST_BETA, _LAST_BETA = 20.0, 2.0
_WARM_UP = 0.2


def opening(v: Tensor) -> Tensor:
    """h(V)."""
    return torch.clamp(torch.sigmoid(v) * _STRETCH - _BELOW, 0, 1)


def rounded_by(base: Tensor, v: Tensor, *, low: int, high: int) -> Tensor:
    """Integers, carried in floats, that V is on the way to."""
    return torch.clamp(base + opening(v), low, high)


def rounded_through(latent: Tensor, *, low: int, high: int) -> Tensor:
    """Integers nearest to a float, with its gradient."""
    return torch.clamp(straight_through(latent, torch.round(latent)), low, high)


class Rounding:
    """One integer weight in training.

    Args:
        integers: Its elements as they are.
        dtype: Their type.
        target: ``w / s + z`` in float64, what is to be rounded; ``None`` where it is not known.
    """

    def __init__(self, integers: np.ndarray[Any, Any], dtype: ir.DataType, target: np.ndarray[Any, Any] | None) -> None:
        self.low, self.high = BOUNDS[dtype]
        self.dtype = dtype
        if target is None:
            self.base = None
            start = torch.from_numpy(integers.astype(np.float32))
        else:
            self.base = torch.from_numpy(np.floor(target).astype(np.float32))
            part = torch.from_numpy(target - np.floor(target)).clamp(0.001, 0.999)
            start = -torch.log(_STRETCH / (part + _BELOW) - 1).float()
        self.parameter = torch.nn.Parameter(start)

    def expression(self) -> tuple[Any, tuple[Tensor, ...], dict[str, int]]:
        """The function that makes the integers, and its operands."""
        bounds = {"low": self.low, "high": self.high}
        if self.base is None:
            return rounded_through, (self.parameter,), bounds
        return rounded_by, (self.base, self.parameter), bounds

    def penalty(self, progress: float) -> Tensor:
        """Mean distance from a decision; none before the warm-up is over.

        Args:
            progress: Part of the steps that are done.
        """
        if self.base is None or progress < _WARM_UP:
            return torch.zeros(())
        part = (progress - _WARM_UP) / (1 - _WARM_UP)
        beta = _FIRST_BETA + (_LAST_BETA - _FIRST_BETA) * part
        return (1 - (2 * opening(self.parameter) - 1).abs() ** beta).mean()

    def result(self) -> np.ndarray[Any, Any]:
        """The integers decided on, in their own type."""
        with torch.no_grad():
            latent = self.parameter
            made = torch.round(latent) if self.base is None else self.base + (opening(latent) >= 0.5)
            integers = made.clamp(self.low, self.high).numpy().astype(np.int32)
        return np.asarray(integers.astype(self.dtype.numpy()))
