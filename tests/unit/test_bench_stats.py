"""Statistics of timings against numpy and scipy, and by simulation with fixed seeds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from mmopt.bench import stats


def simulate(rng: np.random.Generator, *, level: float = 1.0, rounds: int = 10, runs: int = 20) -> list[list[float]]:
    """Timings as machines give them: each round has its own pace, runs have a one-sided tail."""
    paces = level * np.exp(0.02 * rng.standard_normal(rounds))
    return [list(pace * (1 + 0.03 * rng.exponential(size=runs))) for pace in paces]


def median(rounds: stats.Rounds) -> float:
    return stats.percentile(rounds, 50)


@pytest.mark.parametrize("q", [0, 50, 90, 99, 100])
def test_percentile_agrees_with_scipy(q: float) -> None:
    rounds = simulate(np.random.default_rng(1))
    everything = list(itertools.chain.from_iterable(rounds))
    oracle = scipy_stats.mstats.mquantiles(everything, [q / 100], alphap=1, betap=1)[0]
    assert stats.percentile(rounds, q) == pytest.approx(oracle, rel=1e-12)


def test_percentile_of_uneven_rounds_weighs_runs_not_rounds() -> None:
    assert stats.percentile([[1.0, 1.0, 1.0], [5.0]], 50) == 1.0


def test_throughput_is_the_inverse_of_the_mean_run() -> None:
    rounds = [[0.1, 0.3], [0.2]]
    assert stats.throughput(rounds) == pytest.approx(1 / np.mean([0.1, 0.3, 0.2]))


def test_geometric_mean_agrees_with_scipy() -> None:
    values = np.random.default_rng(2).uniform(0.2, 5, 30)
    assert stats.geometric_mean(list(values)) == pytest.approx(scipy_stats.gmean(values), rel=1e-12)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 18, 101])
@pytest.mark.parametrize("probability", [0.6, 0.975, 1 - stats.BAND_TAIL])
def test_student_quantile_agrees_with_scipy(freedom: int, probability: float) -> None:
    assert stats.student_quantile(probability, freedom) == pytest.approx(
        scipy_stats.t.ppf(probability, freedom), rel=1e-6
    )


@pytest.mark.parametrize(("probability", "freedom"), [(0.5, 3), (1.0, 3), (0.9, 0)])
def test_student_quantile_refuses_what_has_none(probability: float, freedom: int) -> None:
    with pytest.raises(ValueError, match="quantile"):
        stats.student_quantile(probability, freedom)


def test_paired_ratio_interval_agrees_with_scipys_bootstrap() -> None:
    rng = np.random.default_rng(3)
    base = simulate(rng, rounds=15)
    slower = simulate(rng, level=1.3, rounds=15)
    found = stats.paired_ratio(slower, base)
    ratios = [np.median(a) / np.median(b) for a, b in zip(slower, base, strict=True)]
    oracle = scipy_stats.bootstrap((ratios,), np.median, method="percentile", n_resamples=5000, rng=rng)
    assert found.value == pytest.approx(np.median(ratios))
    # Both intervals are random; they end at order statistics of the ratios, so they differ by little or by a step.
    step = np.diff(np.sort(ratios)).max()
    assert found.low == pytest.approx(oracle.confidence_interval.low, abs=step)
    assert found.high == pytest.approx(oracle.confidence_interval.high, abs=step)
    assert found.certain


def test_pairing_cancels_a_machine_that_slows_down() -> None:
    pace = [1.0, 1.5, 2.0, 3.0, 4.0]
    base = [[p, p, p] for p in pace]
    found = stats.paired_ratio([[1.1 * t for t in times] for times in base], base)
    assert (found.low, found.value, found.high) == pytest.approx((1.1, 1.1, 1.1))


def test_paired_ratio_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    covered = 0
    for seed in range(200):
        found = stats.paired_ratio(simulate(rng, level=1.2), simulate(rng), seed=seed)
        covered += found.low <= 1.2 <= found.high
    assert 0.89 <= covered / 200 <= 0.99


@pytest.mark.parametrize(("numerator", "denominator"), [([], []), ([[1.0]], [[1.0], [1.0]])])
def test_paired_ratio_refuses_rounds_that_do_not_pair(
    numerator: list[list[float]], denominator: list[list[float]]
) -> None:
    with pytest.raises(ValueError, match="pairs"):
        stats.paired_ratio(numerator, denominator)


def test_interval_is_certain_only_without_one() -> None:
    assert stats.Interval(1.1, 1.05, 1.2).certain
    assert stats.Interval(0.9, 0.8, 0.99).certain
    assert not stats.Interval(1.1, 0.99, 1.2).certain


def test_band_is_as_wide_as_repeating_the_measurement_scatters() -> None:
    rng = np.random.default_rng(5)
    bands = [stats.change(simulate(rng), simulate(rng), median, paired=False).band for _ in range(30)]
    logs = [math.log(median(simulate(rng)) / median(simulate(rng))) for _ in range(2000)]
    quantile = scipy_stats.t.ppf(1 - stats.BAND_TAIL, 18)
    assert np.median(bands) == pytest.approx(math.expm1(quantile * np.std(logs)), rel=0.25)


def test_band_shrinks_with_rounds_and_is_infinite_without() -> None:
    rng = np.random.default_rng(6)
    few, many = (stats.change(simulate(rng, rounds=n), simulate(rng, rounds=n), median, paired=False) for n in (4, 40))
    assert many.band < few.band / 2
    assert stats.change(simulate(rng, rounds=2), simulate(rng), median, paired=False).band == math.inf


def test_paired_band_ignores_what_both_sides_share() -> None:
    rng = np.random.default_rng(7)
    base = [[pace * (1 + 0.001 * rng.random()) for _ in range(9)] for pace in rng.uniform(1, 3, 10)]
    new = [[1.1 * t for t in times] for times in base]
    found = stats.change(base, new, median, paired=True)
    assert found.ratio == pytest.approx(1.1)
    assert found.band < 0.001 < 0.1 < stats.change(base, new, median, paired=False).band


def test_paired_rounds_must_pair() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        stats.change([[1.0]] * 3, [[1.0]] * 4, median, paired=True)


@pytest.mark.parametrize("paired", [False, True])
def test_equal_times_have_no_noise(paired: bool) -> None:
    rounds = [[0.5, 0.5]] * 5
    assert stats.change(rounds, rounds, median, paired=paired) == stats.Change(1.0, 0.0)
