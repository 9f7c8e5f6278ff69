"""Verdicts: what counts as a regression, what is noise, and what cannot be compared."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from mmopt.bench.answers import Agreement
from mmopt.bench.compare import Comparison, Outcome, Verdict, compare_in_run, compare_reports
from mmopt.bench.record import Report
from mmopt.errors import RegressionError, UserError
from tests.unit import bench_samples as samples

TRIALS = 100


def outcomes(comparison: Comparison) -> dict[str, Outcome]:
    return {verdict.metric: verdict.outcome for verdict in comparison.verdicts}


def verdict_on(comparison: Comparison, metric: str) -> Verdict:
    (found,) = [verdict for verdict in comparison.verdicts if verdict.metric == metric]
    return found


def two_runs(rng: np.random.Generator, growth: float = 1.0) -> tuple[Report, Report]:
    base = samples.report(samples.artifact(rng), samples.peer(rng))
    return base, samples.report(samples.artifact(rng, 0.02 * growth), samples.peer(rng))


def one_run(rng: np.random.Generator, growth: float = 1.0) -> Report:
    """Two artifacts in turns on a machine whose pace changes by a third from round to round."""
    pace = np.exp(0.3 * rng.standard_normal(10))
    sides = [samples.artifact(rng, level, label) for level, label in ((0.02, "base"), (0.02 * growth, "new"))]
    for side in sides:
        side.rounds = [[p * t for t in times] for p, times in zip(pace, side.rounds, strict=True)]
    return samples.report(*sides)


@pytest.mark.parametrize("paired", [False, True])
def test_the_same_thing_measured_twice_is_called_a_regression_in_less_than_one_of_twenty(paired: bool) -> None:
    rng = np.random.default_rng(11)
    compared = [compare_in_run(one_run(rng), 0.0) if paired else compare_reports(*two_runs(rng), 0.0)
                for _ in range(TRIALS)]  # fmt: skip
    assert sum(bool(comparison.regressions) for comparison in compared) < TRIALS / 20
    # The noise alone must hold the alarms back, so nothing is allowed for on top.
    assert all(comparison.fail_over == 0.0 for comparison in compared)


@pytest.mark.parametrize("paired", [False, True])
def test_ten_percent_slower_is_found(paired: bool) -> None:
    rng = np.random.default_rng(12)
    for _ in range(10):
        comparison = compare_in_run(one_run(rng, 1.1)) if paired else compare_reports(*two_runs(rng, 1.1))
        assert verdict_on(comparison, "p50").outcome is Outcome.REGRESSED
        with pytest.raises(RegressionError, match="p50") as caught:
            comparison.check()
        assert caught.value.exit_code == 7


def test_ten_percent_faster_is_an_improvement() -> None:
    comparison = compare_reports(*two_runs(np.random.default_rng(13), 1 / 1.12))
    assert outcomes(comparison)["p50"] is outcomes(comparison)["throughput"] is Outcome.IMPROVED
    comparison.check()


def test_a_change_below_the_allowance_is_the_same() -> None:
    base, new = two_runs(np.random.default_rng(14), 1.1)
    assert verdict_on(compare_reports(base, new, 0.2), "p50").outcome is Outcome.SAME
    assert verdict_on(compare_reports(base, new, 0.05), "p50").outcome is Outcome.REGRESSED


def test_noise_hides_a_change_and_says_so() -> None:
    rng = np.random.default_rng(15)
    wild = [[t * f for t in times] for f, times in zip(rng.uniform(0.5, 2, 10), samples.rounds(rng), strict=True)]
    slower = [[1.1 * t for t in times] for times in wild]
    base, new = samples.artifact(rng, rounds=wild), samples.artifact(rng, rounds=slower)
    found = verdict_on(compare_reports(samples.report(base), samples.report(new)), "p50")
    assert found.outcome is Outcome.SAME
    assert found.band is not None
    assert found.band > 0.1
    assert "noise" in found.reason


def test_a_machine_that_became_slower_is_no_regression_when_a_peer_shows_it() -> None:
    rng = np.random.default_rng(16)
    base = samples.report(samples.artifact(rng), samples.peer(rng))
    slow_day = samples.report(samples.artifact(rng, 0.023), samples.peer(rng, 0.03 * 1.15))
    comparison = compare_reports(base, slow_day)
    assert verdict_on(comparison, "p50").outcome is Outcome.SAME
    assert any("unchanged peers" in note for note in comparison.notes)
    alone = compare_reports(samples.report(base.results[0]), samples.report(slow_day.results[0]))
    assert verdict_on(alone, "p50").outcome is Outcome.REGRESSED
    assert any("no unchanged peer" in note for note in alone.notes)


@pytest.mark.parametrize("change", [{"version": "1.21.0"}, {"digest": "b" * 16}, {"digest": ""}, {"precision": "bf16"}])
def test_a_peer_that_changed_is_no_witness(change: dict[str, str]) -> None:
    rng = np.random.default_rng(17)
    old, young = samples.peer(rng), dataclasses.replace(samples.peer(rng), **change)
    if change.get("digest") == "":
        old.digest = ""
    comparison = compare_reports(
        samples.report(samples.artifact(rng), old), samples.report(samples.artifact(rng), young)
    )
    assert any("no unchanged peer" in note for note in comparison.notes)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"machine": {"cpu": "Another CPU"}}, "different cpu"),
        ({"machine": {"cores": 4}}, "different cores"),
        ({"machine": {"governor": "powersave"}}, "different governor"),
        ({"threads": 1}, "different threads"),
        ({"inputs_digest": "e" * 16}, "different inputs"),
    ],
)
def test_times_under_other_conditions_are_not_comparable(changed: dict[str, object], reason: str) -> None:
    rng = np.random.default_rng(18)
    base = samples.report(samples.artifact(rng))
    comparison = compare_reports(base, samples.report(samples.artifact(rng, 0.2), **changed))  # type: ignore[arg-type]
    judged = {v.metric for v in comparison.verdicts if v.outcome is not Outcome.NOT_COMPARABLE}
    assert judged == {"size on disk"}
    assert verdict_on(comparison, "p50").reason == reason
    with pytest.raises(UserError, match=reason) as caught:
        comparison.check()
    assert caught.value.exit_code == 2


def test_isolated_times_are_not_compared_with_shared_ones_but_starts_are() -> None:
    rng = np.random.default_rng(19)
    base, new = samples.report(samples.artifact(rng)), samples.report(samples.artifact(rng), isolate=True)
    found = outcomes(compare_reports(base, new))
    assert found["p50"] is Outcome.NOT_COMPARABLE
    assert found["first answer"] is found["peak memory"] is Outcome.SAME


def test_a_bigger_artifact_regresses_even_where_times_are_equal() -> None:
    rng = np.random.default_rng(20)
    base, new = samples.artifact(rng), samples.artifact(rng, size_bytes=1_100_000)
    comparison = compare_reports(samples.report(base), samples.report(new))
    assert [v.metric for v in comparison.regressions] == ["size on disk"]
    assert comparison.regressions[0].change == pytest.approx(0.1)


def test_more_memory_and_slower_starts_regress() -> None:
    rng = np.random.default_rng(21)
    base, new = samples.artifact(rng), samples.artifact(rng)
    new.starts = [
        dataclasses.replace(s, first_answer_s=s.first_answer_s * 1.5, peak_bytes=int(s.peak_bytes * 1.2))
        for s in base.starts
    ]
    comparison = compare_reports(samples.report(base), samples.report(new))
    assert {v.metric for v in comparison.regressions} == {"first answer", "peak memory"}


def test_a_slower_tower_regresses_and_a_lost_one_is_named() -> None:
    rng = np.random.default_rng(22)
    base = samples.artifact(rng, towers={"encode_image": samples.rounds(rng, 0.01), "gone": samples.rounds(rng)})
    new = samples.artifact(rng, towers={"encode_image": samples.rounds(rng, 0.012)})
    comparison = compare_reports(samples.report(base), samples.report(new))
    assert verdict_on(comparison, "encode_image p50").outcome is Outcome.REGRESSED
    assert verdict_on(comparison, "gone p50").reason == "only in BASE"


def test_percentiles_need_values_beyond_them() -> None:
    rng = np.random.default_rng(23)
    found = outcomes(compare_reports(*two_runs(rng)))
    assert found["p90"] is Outcome.SAME
    assert found["p99"] is Outcome.NOT_COMPARABLE
    many = [samples.artifact(rng, rounds=samples.rounds(rng, runs=120)) for _ in range(2)]
    assert outcomes(compare_reports(*map(samples.report, many)))["p99"] is Outcome.SAME


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_rounds_are_not_judged(count: int) -> None:
    rng = np.random.default_rng(24)
    few = [samples.artifact(rng, rounds=samples.rounds(rng, count=count)) for _ in range(2)]
    found = verdict_on(compare_reports(*map(samples.report, few)), "p50")
    assert found.outcome is Outcome.NOT_COMPARABLE
    assert "too few" in found.reason


def test_times_of_wrong_answers_are_not_compared() -> None:
    rng = np.random.default_rng(25)
    wrong = samples.artifact(rng, 0.001, agreement=Agreement("onnxruntime", False, math.inf, "2 outputs instead of 1"))
    comparison = compare_reports(samples.report(samples.artifact(rng)), samples.report(wrong))
    assert verdict_on(comparison, "p50").outcome is Outcome.NOT_COMPARABLE
    assert "wrong" in verdict_on(comparison, "p50").reason


def test_artifacts_pair_by_label_and_those_alone_are_named() -> None:
    rng = np.random.default_rng(26)
    base = samples.report(samples.artifact(rng, label="a"), samples.artifact(rng, label="b"))
    new = samples.report(samples.artifact(rng, label="b"), samples.artifact(rng, label="c"))
    comparison = compare_reports(base, new)
    reasons = {verdict.pair: verdict.reason for verdict in comparison.verdicts if verdict.metric == "p50"}
    assert set(reasons) == {"a", "b", "c"}
    assert (reasons["a"], reasons["c"]) == ("only in BASE", "only in NEW")


def test_single_artifacts_pair_whatever_their_labels() -> None:
    rng = np.random.default_rng(27)
    comparison = compare_reports(
        samples.report(samples.artifact(rng, label="old")), samples.report(samples.artifact(rng, label="new"))
    )
    assert {verdict.pair for verdict in comparison.verdicts} == {"old → new"}


def test_nothing_in_common_is_no_success() -> None:
    rng = np.random.default_rng(28)
    with pytest.raises(UserError, match="nothing to judge"):
        compare_reports(samples.report(samples.peer(rng)), samples.report(samples.peer(rng))).check()


def test_one_run_judges_every_later_artifact_against_the_first() -> None:
    rng = np.random.default_rng(29)
    report = samples.report(*(samples.artifact(rng, level, label) for level, label in
                              ((0.02, "a"), (0.02, "b"), (0.03, "c"))), samples.peer(rng))  # fmt: skip
    comparison = compare_in_run(report)
    assert {v.pair for v in comparison.verdicts} == {"a → b", "a → c"}
    assert {v.pair for v in comparison.regressions} == {"a → c"}
