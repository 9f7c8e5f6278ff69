"""Weights that lie in integers of 8 or 4 bits in the artifact and are floats once they are loaded.

w = integers · scale        scale: repeated along the axes that share one
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmopt.runtime.tensors import Array

_RUNS = (128, 64, 32, 16, 8)
"""Lengths of blocks that scales are looked for in, besides whole axes."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A float32 weight in integers.

    Attributes:
        integers: int8, of the weight's shape.
        scales: float32, shorter along axes where neighbours share a scale.
        repeats: How many neighbours do, by axis.
        bits: 8, or 4 when the integers lie between −8 and 7.
    """

    integers: Array
    scales: Array
    repeats: tuple[int, ...]
    bits: int

    @classmethod
    def of(cls, integers: Array, scales: Array, bits: int) -> Encoded:
        """From one scale for each element."""
        repeats = []
        for axis, extent in enumerate(scales.shape):
            run = next((r for r in (extent, *_RUNS) if r and extent % r == 0 and _is_repeated(scales, axis, r)), 1)
            scales = scales.take(range(0, extent, run), axis)
            repeats.append(run)
        return cls(np.ascontiguousarray(integers, np.int8), np.ascontiguousarray(scales), tuple(repeats), bits)

    def decoded(self) -> Array:
        """The weight, float32."""
        wide = self.scales
        for axis, run in enumerate(self.repeats):
            wide = wide.repeat(run, axis)
        return np.asarray(self.integers.astype(np.float32) * wide)

    @property
    def nbytes(self) -> int:
        """Bytes in the artifact."""
        return -(-self.integers.size * self.bits // 8) + self.scales.nbytes

    def parts(self) -> tuple[Array, Array, dict[str, Any]]:
        """Bytes of the integers, the scales, and what else it takes to put them together."""
        facts = {"shape": list(self.integers.shape), "repeats": list(self.repeats), "bits": self.bits}
        return (self.integers if self.bits == 8 else _pairs(self.integers)), self.scales, facts

    @classmethod
    def joined(cls, integers: Array, scales: Array, facts: Mapping[str, Any]) -> Encoded:
        """Inverse of :meth:`parts`.

        Raises:
            ValueError: The parts do not fit together.
        """
        shape, bits = tuple(int(n) for n in facts["shape"]), int(facts["bits"])
        whole = integers.reshape(shape) if bits == 8 else _singles(integers, shape)
        repeats = tuple(int(n) for n in facts["repeats"])
        if len(repeats) != len(shape) or any(a * r != n for a, r, n in zip(scales.shape, repeats, shape, strict=True)):
            raise ValueError(f"scales of shape {list(scales.shape)} do not fit a weight of shape {list(shape)}")
        return cls(whole, scales, repeats, bits)


def _is_repeated(scales: Array, axis: int, run: int) -> bool:
    """Whether every ``run`` neighbours along ``axis`` are equal."""
    shape = scales.shape
    split = scales.reshape(*shape[:axis], shape[axis] // run, run, *shape[axis + 1 :])
    return bool((split == split.take([0], axis + 1)).all())


def _pairs(integers: Array) -> Array:
    """Two to a byte, the first in the lower half."""
    flat = integers.reshape(-1).view(np.uint8) & 15
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return np.asarray(flat[::2] | flat[1::2] << 4)


def _singles(pairs: Array, shape: Sequence[int]) -> Array:
    size = int(np.prod(shape))
    halves = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[:size]
    return np.asarray(((halves ^ 8).astype(np.int8) - np.int8(8)).reshape(shape))
