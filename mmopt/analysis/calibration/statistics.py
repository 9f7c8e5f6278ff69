"""Statistics of one tensor, collected in a stream and mergeable in any order.

The histogram has bins of a power of two, aligned at zero. When a value falls outside, neighbouring bins are joined in
pairs, exactly, until it fits. So the width of the bins follows from the largest magnitude alone, and statistics merged
from parts have the histogram of the whole, to the last count.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

SIDE = 2048
"""Bins on each side of zero: at least half of them are in use on the longer side."""

_EXPONENT_OF_NOTHING = -1074
"""Exponent of the bins of a histogram of zeros alone."""


@dataclasses.dataclass
class Histogram:
    """Counts over ``2 × SIDE`` bins ``[i, i + 1) · 2**exponent``, i from ``-SIDE``.

    Attributes:
        exponent: Of the width of a bin.
        counts: int64 ``[2 * SIDE]``.
    """

    exponent: int = _EXPONENT_OF_NOTHING
    counts: Array = dataclasses.field(default_factory=lambda: np.zeros(2 * SIDE, np.int64))

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent)

    def edges(self) -> Array:
        """Bounds of the bins, float64 ``[2 * SIDE + 1]``."""
        return np.arange(-SIDE, SIDE + 1) * self.width

    def update(self, values: Array) -> None:
        """Count finite values, of any shape."""
        if values.size == 0:
            return
        self._widen(_exponent_for(float(np.abs(values).max())))
        places = np.floor(values.reshape(-1).astype(np.float64) / self.width).astype(np.int64) + SIDE
        self.counts += np.bincount(places, minlength=2 * SIDE)

    def merge(self, other: Histogram) -> None:
        """Add the counts of ``other``."""
        joined = Histogram(other.exponent, other.counts.copy())
        joined._widen(self.exponent)
        self._widen(joined.exponent)
        self.counts += joined.counts

    def _widen(self, exponent: int) -> None:
        steps = exponent - self.exponent
        if steps <= 0:
            return
        places = (np.arange(-SIDE, SIDE) >> min(steps, 62)) + SIDE
        self.counts = np.bincount(places, self.counts, minlength=2 * SIDE).astype(np.int64)
        self.exponent = exponent


def _exponent_for(largest: float) -> int:
    """The least exponent of a width with which ``SIDE`` bins hold ``largest``."""
    if largest == 0:
        return _EXPONENT_OF_NOTHING
    return max(math.frexp(largest)[1] - (SIDE.bit_length() - 1), _EXPONENT_OF_NOTHING)


@dataclasses.dataclass
class ChannelStatistics:
    """Per channel, float64 ``[channels]`` each.

    Attributes:
        axis: Axis of the channels.
        low: Smallest value.
        high: Largest value.
        total: Sum.
        magnitude: Sum of magnitudes.
        squares: Sum of squares.
        count: Values seen in each channel.
    """

    axis: int
    low: Array
    high: Array
    total: Array
    magnitude: Array
    squares: Array
    count: int = 0

    @classmethod
    def empty(cls, axis: int, channels: int) -> ChannelStatistics:
        """Of nothing."""
        full = np.full(channels, np.inf)
        return cls(axis, full, -full, np.zeros(channels), np.zeros(channels), np.zeros(channels))

    def update(self, rows: Array) -> None:
        """Take in ``[values, channels]``."""
        if not len(rows):
            return
        self.low = np.minimum(self.low, rows.min(axis=0))
        self.high = np.maximum(self.high, rows.max(axis=0))
        self.total += rows.sum(axis=0, dtype=np.float64)
        self.magnitude += np.abs(rows).sum(axis=0, dtype=np.float64)
        self.squares += np.einsum("nc,nc->c", rows, rows, dtype=np.float64)
        self.count += len(rows)

    def merge(self, other: ChannelStatistics) -> None:
        """Take in what ``other`` has seen."""
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        self.total, self.magnitude = self.total + other.total, self.magnitude + other.magnitude
        self.squares = self.squares + other.squares
        self.count += other.count

    def rescaled(self, index: Array, factors: Array, offsets: Array) -> ChannelStatistics:
        """Of channels ``factors · x[index] + offsets``; sums of magnitudes are those of the first term alone."""
        total = factors * self.total[index]
        return ChannelStatistics(
            self.axis,
            factors * self.low[index] + offsets,
            factors * self.high[index] + offsets,
            total + self.count * offsets,
            factors * self.magnitude[index],
            factors**2 * self.squares[index] + 2 * offsets * total + self.count * offsets**2,
            self.count,
        )

    @property
    def mean(self) -> Array:
        """Mean of each channel."""
        return self.total / max(1, self.count)

    @property
    def mean_square(self) -> Array:
        """Mean x² of each channel."""
        return self.squares / max(1, self.count)

    @property
    def mean_magnitude(self) -> Array:
        """Mean |x| of each channel."""
        return self.magnitude / max(1, self.count)


@dataclasses.dataclass
class TensorStatistics:
    """What was seen of one tensor, padding left out.

    Attributes:
        histogram: Of all finite values.
        low: Smallest finite value; ``inf`` before the first.
        high: Largest finite value.
        count: Finite values.
        infinite: Infinite values, as additive masks have.
        channels: Per channel, for tensors with an axis of channels.
        gram: ``XᵀX`` over rows X of channels, float64 ``[channels, channels]``, where asked for.
    """

    histogram: Histogram = dataclasses.field(default_factory=Histogram)
    low: float = math.inf
    high: float = -math.inf
    count: int = 0
    infinite: int = 0
    channels: ChannelStatistics | None = None
    gram: Array | None = None

    def update(self, values: Array, axis: int | None = None, *, gram: bool = False) -> None:
        """Take in one array.

        Args:
            values: Floating-point values without NaN.
            axis: Axis of the channels, when it has one.
            gram: Whether to add to the Gram matrix.
        """
        finite = values
        if not np.isfinite(values).all():
            finite = values[np.isfinite(values)]
            self.infinite += int(values.size - finite.size)
        self.histogram.update(finite)
        self.count += int(finite.size)
        if finite.size:
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))
        if axis is not None and finite.size == values.size:
            self._update_channels(values, axis, gram)

    def _update_channels(self, values: Array, axis: int, gram: bool) -> None:
        rows = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
        if self.channels is None:
            self.channels = ChannelStatistics.empty(axis, rows.shape[1])
        self.channels.update(rows)
        if gram:
            wide = rows.astype(np.float64)
            product = wide.T @ wide
            self.gram = product if self.gram is None else self.gram + product

    def rescaled(self, index: Array, factors: Array, offsets: Array) -> TensorStatistics:
        """Statistics of a tensor that has channel ``index[k]`` times ``factors[k]`` plus ``offsets[k]`` for its k-th.

        Extremes, means and the Gram matrix are exact; a histogram cannot be had, and is left empty.

        Args:
            index: int64 ``[new channels]``.
            factors: Positive, ``[new channels]``.
            offsets: ``[new channels]``.

        Raises:
            ValueError: There are no statistics by channel.
        """
        if self.channels is None:
            raise ValueError("there are no statistics by channel")
        channels = self.channels.rescaled(index, factors, offsets)
        gram = None
        if self.gram is not None:
            # Σ (f x + o)(g y + p) = f g Σ x y + f p Σ x + o g Σ y + n o p
            total = factors * self.channels.total[index]
            gram = self.gram[np.ix_(index, index)] * np.outer(factors, factors)
            gram += np.outer(total, offsets) + np.outer(offsets, total)
            gram += self.channels.count * np.outer(offsets, offsets)
        return TensorStatistics(
            low=float(channels.low.min(initial=math.inf)),
            high=float(channels.high.max(initial=-math.inf)),
            count=channels.count * len(index),
            infinite=self.infinite,
            channels=channels,
            gram=gram,
        )

    def merge(self, other: TensorStatistics) -> None:
        """Take in what ``other`` has seen.

        Raises:
            ValueError: The channels do not fit together.
        """
        if self.channels is not None and other.channels is not None:
            if self.channels.axis != other.channels.axis or self.channels.low.shape != other.channels.low.shape:
                raise ValueError("their channels differ")
            self.channels.merge(other.channels)
        elif self.channels is None:
            self.channels = other.channels
        if self.gram is not None and other.gram is not None:
            self.gram = self.gram + other.gram
        elif other.gram is not None and self.count == 0:
            self.gram = other.gram
        elif other.count:
            self.gram = None if other.gram is None else self.gram
        self.histogram.merge(other.histogram)
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.count += other.count
        self.infinite += other.infinite
