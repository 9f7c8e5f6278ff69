"""From statistics to the range that quantization keeps: what lies outside is clipped.

All methods work on the histogram of :class:`TensorStatistics` alone, so that merged statistics give the ranges of the
whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from mmopt.analysis.calibration.statistics import SIDE, Array, TensorStatistics
from mmopt.errors import UserError, did_you_mean

_CANDIDATES = 96
"""Clipping bounds that the searching methods try, evenly spaced."""

Range = tuple[float, float]


def choose_range(
    statistics: TensorStatistics,
    method: str = "minmax",
    *,
    bits: int = 8,
    symmetric: bool = False,
    share: float = 0.9999,
) -> Range:
    """The range to quantize a tensor over; it always holds 0.

    Args:
        statistics: Of the tensor.
        method: ``minmax``, ``percentile`` (keeps ``share`` of the values), ``mse`` (least squared error of rounding and
            clipping) or ``entropy`` (least divergence of the distributions).
        bits: Bits of the integers, for the methods that weigh clipping against rounding.
        symmetric: Whether the range must be symmetric around 0.
        share: Of the values, that ``percentile`` keeps.

    Raises:
        UserError: An unknown method, or statistics of nothing.
    """
    if method not in METHODS:
        raise UserError(f"there is no way {method!r} to choose a range", hint=did_you_mean(method, METHODS))
    if not statistics.count:
        raise UserError("there is nothing to choose a range from", hint="calibrate on samples that reach the tensor")
    low, high = min(statistics.low, 0.0), max(statistics.high, 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    if low == high:
        return low, high
    return METHODS[method](statistics, low, high, bits, symmetric, share)


def _minmax(statistics: TensorStatistics, low: float, high: float, bits: int, symmetric: bool, share: float) -> Range:
    return low, high


def _percentile(
    statistics: TensorStatistics, low: float, high: float, bits: int, symmetric: bool, share: float
) -> Range:
    """Cut off the same number of values on both sides (of magnitudes, when symmetric)."""
    counts, edges = statistics.histogram.counts, statistics.histogram.edges()
    if symmetric:
        folded = counts[SIDE:] + counts[:SIDE][::-1]
        bound = edges[SIDE + 1 + _first(np.cumsum(folded), share * statistics.count)]
        bound = min(float(bound), high)
        return -bound, bound
    cut = (1 - share) / 2 * statistics.count
    above = edges[1 + _first(np.cumsum(counts), statistics.count - cut)]
    below = edges[len(counts) - 1 - _first(np.cumsum(counts[::-1]), statistics.count - cut)]
    return max(low, min(float(below), 0.0)), min(high, max(float(above), 0.0))


def _first(cumulative: Array, wanted: float) -> int:
    return min(int(np.searchsorted(cumulative, wanted)), len(cumulative) - 1)


_ROUNDS = 3
"""Times that the searching methods go back and forth between the two ends."""


@dataclasses.dataclass(frozen=True)
class _Bins:
    """The bins in use of a histogram.

    Attributes:
        centers: Their middles.
        counts: Values in them.
        even: The same, without what stands out of its neighbours.
        width: Width of a bin.
    """

    centers: Array
    counts: Array
    even: Array
    width: float


def _searched(error: Callable[[_Bins, float, float, int], float]) -> Callable[..., Range]:
    """Try ranges that shrink from the whole: both ends together, then each in turn."""

    def search(
        statistics: TensorStatistics, low: float, high: float, bits: int, symmetric: bool, share: float
    ) -> Range:
        counts = statistics.histogram.counts
        used = np.flatnonzero(counts)
        edges, width = statistics.histogram.edges(), statistics.histogram.width
        bins = _Bins((edges[used] + edges[used + 1]) / 2, counts[used], _without_spikes(counts)[used], width)
        factors = np.linspace(1.0, 1.0 / _CANDIDATES, _CANDIDATES)

        def best(ranges: list[Range]) -> Range:
            errors = [error(bins, a, b, bits) for a, b in ranges]
            return ranges[int(np.argmin(errors))]

        together = best([(low * f, high * f) for f in factors])
        if symmetric or low == 0 or high == 0:
            return together
        found = [together]
        for start in ((low, high), together):
            a, b = start
            for _ in range(_ROUNDS):
                a, b = best([(a, high * f) for f in factors] + [(a, b)])
                a, b = best([(low * f, b) for f in factors] + [(a, b)])
            found.append((a, b))
        return best(found)

    return search


def _squared_error(bins: _Bins, low: float, high: float, bits: int) -> float:
    step = (high - low) / (2**bits - 1)
    clipped = np.clip(bins.centers, low, high)
    rounded = np.rint((clipped - low) / step) * step + low
    return float((bins.counts * (rounded - bins.centers) ** 2).sum())


_NEIGHBOURS = 8
"""Bins on each side that a bin is compared with to tell whether it stands out."""

_SPIKE = 4.0
"""How many times the mean of its neighbours a bin holds, at most, before what is above counts as a spike."""


def _without_spikes(counts: Array) -> Array:
    """Counts without what many equal values pile up: zeros behind a rectifier, silence, the flat end of an activation.

    A level of integers holds several bins. That equal values fill one of them alone is no loss to rounding, but the
    divergence takes it for one, so large that it is worth clipping nearly everything to give the spike its own level.
    """
    around = np.convolve(counts, np.ones(2 * _NEIGHBOURS + 1), "same") - counts
    return np.asarray(np.minimum(counts, np.maximum(_SPIKE * around / (2 * _NEIGHBOURS), 1)))


def _divergence(bins: _Bins, low: float, high: float, bits: int) -> float:
    """Kullback-Leibler divergence of the quantized from the clipped distribution (after Migacz, GTC 2017)."""
    # A bin that the end of the range cuts is inside: the extremes themselves lie in such bins.
    below, above = bins.centers + bins.width / 2 <= low, bins.centers - bins.width / 2 >= high
    inside = ~(below | above)
    if not inside.any():
        return math.inf
    even = bins.even[inside]
    p = even.astype(np.float64)
    p[0] += bins.counts[below].sum()
    p[-1] += bins.counts[above].sum()
    step = (high - low) / (2**bits - 1)
    level = np.rint((np.clip(bins.centers[inside], low, high) - low) / step).astype(np.int64)
    kept = np.bincount(level, even)
    members = np.bincount(level)
    q = (kept / np.maximum(members, 1))[level]
    # A bin that only clipping filled has no share of its level; the smallest one keeps the divergence finite.
    q = np.maximum(q, 1e-9 * p.sum())
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q, where=p > 0, out=np.zeros_like(p))).sum())


METHODS: dict[str, Callable[[TensorStatistics, float, float, int, bool, float], Range]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "mse": _searched(_squared_error),
    "entropy": _searched(_divergence),
}
