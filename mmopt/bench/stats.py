"""Statistics of repeated timings: percentiles, paired ratios with a bootstrap interval, and the noise of a comparison.

A *round* is one turn of one contender: the times of several runs in a row. Runs of one round share the state of the
machine (clock, caches, neighbours), so they are not independent; rounds are what is resampled.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

Round = Sequence[float] | np.ndarray
Rounds = Sequence[Round]
"""Times in seconds, by round."""

Statistic = Callable[[Rounds], float]

RESAMPLES = 2000
POOLED_RESAMPLES = 300
BAND_TAIL = 0.00135
"""One-sided chance of a false alarm of one metric: that of three standard deviations of a normal distribution."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A point estimate and its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether the interval excludes 1, that is, whether a ratio is surely a gain or a loss."""
        return self.low > 1 or self.high < 1


@dataclasses.dataclass(frozen=True)
class Change:
    """How a figure moved.

    Attributes:
        ratio: New over base.
        band: How far the ratio may lie from 1 when nothing changed, as a fraction: 0.04 stands for 4 %.
    """

    ratio: float
    band: float


def percentile(rounds: Rounds, q: float) -> float:
    """The ``q``-th percentile (0 to 100, linear interpolation) of the runs of all rounds together."""
    values = np.sort(np.concatenate(rounds))  # np.percentile spends ten times as long on so few values
    position = q / 100 * (len(values) - 1)
    below = int(position)
    above = min(below + 1, len(values) - 1)
    return float(values[below] + (position - below) * (values[above] - values[below]))


def throughput(rounds: Rounds) -> float:
    """Runs a second of measured time, pauses and warm-up left out."""
    return sum(len(r) for r in rounds) / float(sum(np.sum(r) for r in rounds))


def geometric_mean(values: Sequence[float]) -> float:
    """The n-th root of the product of n positive numbers: the mean to use for ratios."""
    return math.exp(statistics.fmean(math.log(v) for v in values))


def paired_ratio(numerator: Rounds, denominator: Rounds, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Median over rounds of the ratio of the rounds' medians, with a percentile-bootstrap confidence interval.

    Round ``i`` of both sides was measured close together, so a slow phase of the machine cancels in the ratio.

    Args:
        numerator: Rounds of one contender.
        denominator: As many rounds of the other, taken in turn with the first.
        confidence: Coverage of the interval.
        seed: Seed of the resampling.

    Raises:
        ValueError: The two have different numbers of rounds, or none.
    """
    if not numerator or len(numerator) != len(denominator):
        raise ValueError(f"rounds must come in pairs, got {len(numerator)} and {len(denominator)}")
    pairs = zip(numerator, denominator, strict=True)
    ratios = np.array([percentile([a], 50) / percentile([b], 50) for a, b in pairs])
    picks = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.median(ratios[picks], axis=1), [tail, 100 - tail])
    return Interval(float(np.median(ratios)), float(low), float(high))


def change(base: Rounds, new: Rounds, statistic: Statistic, *, paired: bool, seed: int = 0) -> Change:
    """How much ``statistic`` changed, and how much of that may be noise.

    Rounds of one run are compared in pairs, and the median over the pairs is the change: a machine that slows down
    slows down both. Rounds of two runs are pooled on each side. Either way they are resampled to imitate repeating the
    measurement; the spread of the log ratio, times a Student quantile for the number of rounds, is the band.

    Args:
        base: Rounds of the older side.
        new: Rounds of the newer side.
        statistic: What is compared; positive.
        paired: Whether round ``i`` of both sides was measured in turn, in one run.
        seed: Seed of the resampling.

    Returns:
        The change; its band is infinite when a side has fewer than three rounds.

    Raises:
        ValueError: The rounds are paired, but their numbers differ.
    """
    rng = np.random.default_rng(seed)
    base, new = [np.asarray(r, float) for r in base], [np.asarray(r, float) for r in new]
    fewest = min(len(base), len(new))
    if paired:
        logs = np.log([statistic([n]) / statistic([b]) for b, n in zip(base, new, strict=True)])
        picks = rng.integers(0, len(logs), (RESAMPLES, len(logs)))
        ratio, repeated, freedom = math.exp(np.median(logs)), np.median(logs[picks], axis=1), fewest - 1
    else:
        ratio = statistic(new) / statistic(base)
        sides = [_repeat(side, statistic, rng) for side in (new, base)]
        repeated, freedom = sides[0] - sides[1], len(base) + len(new) - 2
    if fewest < 3:
        return Change(ratio, math.inf)
    # Resampling n values underestimates their variance by (n - 1) / n.
    spread = float(np.std(repeated)) * math.sqrt(fewest / (fewest - 1))
    return Change(ratio, math.expm1(student_quantile(1 - BAND_TAIL, freedom) * spread))


def _repeat(rounds: Rounds, statistic: Statistic, rng: np.random.Generator) -> np.ndarray:
    """Logarithms of ``statistic`` over rounds drawn again with replacement."""
    picks = rng.integers(0, len(rounds), (POOLED_RESAMPLES, len(rounds)))
    return np.log([statistic([rounds[i] for i in pick]) for pick in picks])


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution for ``probability`` > 0.5, by bisection on its integrated density.

    Raises:
        ValueError: ``freedom`` is below 1 or ``probability`` is outside (0.5, 1).
    """
    if freedom < 1 or not 0.5 < probability < 1:
        raise ValueError(f"no t quantile for probability {probability} with {freedom} degrees of freedom")
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < probability:
        low, high = high, high * 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, freedom: int) -> float:
    """Closed form for t >= 0 (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(freedom))
    cos_squared = math.cos(theta) ** 2
    odd = freedom % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for k in range(freedom // 2):
        total += term
        term *= cos_squared * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    inside = 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
    return 0.5 + inside / 2
