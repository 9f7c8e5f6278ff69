"""Is the new artifact slower, bigger or hungrier than the old one, or is the difference noise?

Each metric gets a verdict. A change counts when it exceeds both what the user allows (``fail_over``) and the noise
band: how far the figure would move if the same thing were measured twice. The band comes from resampling the rounds of
both sides (see :func:`mmopt.bench.stats.change`). For two files it is widened by what unchanged peers moved between
the two runs, since the machine may have been slower that day.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mmopt.bench import machine, stats
from mmopt.bench.record import SCHEMA_VERSION, Report, Result
from mmopt.errors import RegressionError, UserError

FAIL_OVER = 0.05


class Outcome(enum.Enum):
    """What became of one metric."""

    IMPROVED = "improved"
    SAME = "same"
    REGRESSED = "regressed"
    NOT_COMPARABLE = "not comparable"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one metric of one pair.

    Attributes:
        pair: The two contenders, or the one name they share.
        metric: ``p50``, ``peak memory``, ``encode_image p50``, …
        unit: ``s``, ``1/s`` or ``bytes``.
        base: The older figure, None when there is none.
        new: The newer figure, likewise.
        change: How much the newer one is above the older, as a fraction. In one run it is the median over rounds,
            and differs a little from what ``base`` and ``new`` give.
        band: The noise band, as a fraction; None when the metric was not judged.
        outcome: The verdict.
        reason: Why it could not be compared, or what limits the verdict.
    """

    pair: str
    metric: str
    unit: str
    base: float | None
    new: float | None
    change: float | None
    band: float | None
    outcome: Outcome
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """The form a file holds."""
        band = self.band if self.band is not None and math.isfinite(self.band) else None
        return {**dataclasses.asdict(self), "band": band, "outcome": self.outcome.value}


@dataclasses.dataclass
class Comparison:
    """All verdicts of a comparison.

    Attributes:
        verdicts: One for each metric of each pair.
        fail_over: Change allowed, as a fraction.
        notes: What the reader should know about the comparison as a whole.
    """

    verdicts: list[Verdict]
    fail_over: float
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def regressions(self) -> list[Verdict]:
        """What got worse."""
        return [v for v in self.verdicts if v.outcome is Outcome.REGRESSED]

    def check(self) -> None:
        """Raise when something got worse, or when no latency could be judged.

        Raises:
            RegressionError: Something regressed (exit code 7).
            UserError: The two cannot be compared, so a success would mean nothing (exit code 2).
        """
        if self.regressions:
            named = ", ".join(f"{v.pair} {v.metric} {v.change:+.1%}" for v in self.regressions)
            raise RegressionError(f"regressed by more than {self.fail_over:.3g}: {named}")
        latencies = [v for v in self.verdicts if v.metric == "p50"]
        if all(v.outcome is Outcome.NOT_COMPARABLE for v in latencies):
            reasons = sorted({v.reason for v in latencies}) or ["no artifact is in both"]
            hint = "measure both in one run: mmopt bench BASE.mmopt NEW.mmopt --fail-over 5%"
            raise UserError(f"nothing to judge: {'; '.join(reasons)}", hint=hint)

    def to_json(self) -> dict[str, Any]:
        """The form of the file."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "mmopt-bench-comparison",
            "fail_over": self.fail_over,
            "regressed": bool(self.regressions),
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "notes": self.notes,
        }


@dataclasses.dataclass(frozen=True)
class Metric:
    """Something two results can be compared by.

    Attributes:
        name: What it is called.
        unit: ``s``, ``1/s`` or ``bytes``.
        statistic: The figure, from rounds.
        rounds: What it is computed from.
        needs: Fewest single values for the figure to mean something.
        higher_is_better: Direction.
        timed: Whether it depends on who shares the process and the turn (latency, not size).
    """

    name: str
    unit: str
    statistic: stats.Statistic
    rounds: Callable[[Result], stats.Rounds]
    needs: int = 1
    higher_is_better: bool = False
    timed: bool = True


def _percentile(q: float) -> stats.Statistic:
    return lambda rounds: stats.percentile(rounds, q)


def _starts(field: str) -> Callable[[Result], stats.Rounds]:
    return lambda result: [[float(getattr(start, field))] for start in result.starts]


def _tower(name: str) -> Callable[[Result], stats.Rounds]:
    return lambda result: result.towers.get(name, [])


# A percentile needs some ten values beyond it, or it is the story of one outlier.
LATENCY = (
    Metric("p50", "s", _percentile(50), lambda r: r.rounds),
    Metric("p90", "s", _percentile(90), lambda r: r.rounds, needs=100),
    Metric("p99", "s", _percentile(99), lambda r: r.rounds, needs=1000),
    Metric("throughput", "1/s", stats.throughput, lambda r: r.rounds, higher_is_better=True),
)
STARTS = (
    Metric("first answer", "s", _percentile(50), _starts("first_answer_s"), timed=False),
    Metric("peak memory", "bytes", _percentile(50), _starts("peak_bytes"), timed=False),
)


def compare_reports(base: Report, new: Report, fail_over: float = FAIL_OVER) -> Comparison:
    """Compare the artifacts of two runs. They pair by label, or, when each run has just one, with each other."""
    comparison = Comparison([], fail_over)
    drift, controls = _drift(base, new)
    refusal = _refusal(base, new)
    if controls:
        comparison.notes.append(f"unchanged peers moved by up to {drift:.1%} between the runs: {', '.join(controls)}")
    elif not refusal:
        comparison.notes.append(
            "no unchanged peer is in both files, so a slower machine cannot be told from a slower artifact; "
            "one run of `mmopt bench BASE NEW` can"
        )
    pairs, alone = _pairs(base, new)
    for name, side in alone:
        reason = f"only in {side}"
        comparison.verdicts.append(_not_comparable(name, "p50", "s", None, None, reason))
    isolation = "" if base.settings.get("isolate") == new.settings.get("isolate") else "one of the runs was isolated"
    for old, young in pairs:
        judge = _Judge(fail_over, drift=drift, refusal=refusal, timed_refusal=isolation)
        comparison.verdicts.extend(judge.verdicts(old, young))
    return comparison


def compare_in_run(report: Report, fail_over: float = FAIL_OVER) -> Comparison:
    """Judge the later artifacts of one run against its first; rounds are paired, so the machine's drift cancels."""
    artifacts = [result for result in report.results if result.kind == "mmopt"]
    judge = _Judge(fail_over, paired=True)
    verdicts = [verdict for new in artifacts[1:] for verdict in judge.verdicts(artifacts[0], new)]
    return Comparison(verdicts, fail_over)


@dataclasses.dataclass(frozen=True)
class _Judge:
    fail_over: float
    paired: bool = False
    drift: float = 0.0
    refusal: str = ""
    timed_refusal: str = ""

    def verdicts(self, base: Result, new: Result) -> Iterator[Verdict]:
        pair = base.label if base.label == new.label else f"{base.label} → {new.label}"
        wrong = _wrong_answers(base, new)
        for metric in (*LATENCY, *STARTS, *_towers(base, new)):
            refusal = self.refusal or wrong or (self.timed_refusal if metric.timed else "")
            yield self._judge(pair, metric, base, new, refusal)
        yield self._size(pair, base, new)

    def _judge(self, pair: str, metric: Metric, base: Result, new: Result, refusal: str) -> Verdict:
        old, young = metric.rounds(base), metric.rounds(new)
        before, after = (metric.statistic(rounds) if rounds else None for rounds in (old, young))
        refusal = refusal or _too_little(metric, old, young)
        if refusal or before is None or after is None:
            return _not_comparable(pair, metric.name, metric.unit, before, after, refusal)
        found = stats.change(old, young, metric.statistic, paired=self.paired and metric.timed)
        if metric.unit != "bytes":
            found = dataclasses.replace(found, band=(1 + found.band) * (1 + self.drift) - 1)
        return self._verdict(pair, metric, before, after, found)

    def _verdict(self, pair: str, metric: Metric, base: float, new: float, found: stats.Change) -> Verdict:
        band = found.band
        worsening = 1 / found.ratio if metric.higher_is_better else found.ratio
        limit = 1 + max(self.fail_over, band)
        reason = ""
        outcome = Outcome.SAME
        if worsening > limit:
            outcome = Outcome.REGRESSED
        elif worsening < 1 / limit:
            outcome = Outcome.IMPROVED
        elif band > self.fail_over:
            reason = "the noise is wider than the change allowed; more rounds or time make it narrower"
        return Verdict(pair, metric.name, metric.unit, base, new, found.ratio - 1, band, outcome, reason)

    def _size(self, pair: str, base: Result, new: Result) -> Verdict:
        metric = Metric("size on disk", "bytes", _percentile(50), lambda r: [[r.size_bytes]], timed=False)
        if not base.size_bytes or not new.size_bytes:
            return _not_comparable(pair, metric.name, metric.unit, None, None, "size is not known")
        found = stats.Change(new.size_bytes / base.size_bytes, 0.0)
        return self._verdict(pair, metric, base.size_bytes, new.size_bytes, found)


def _not_comparable(pair: str, metric: str, unit: str, base: float | None, new: float | None, reason: str) -> Verdict:
    change = new / base - 1 if base and new is not None else None
    return Verdict(pair, metric, unit, base, new, change, None, Outcome.NOT_COMPARABLE, reason)


def _towers(base: Result, new: Result) -> Iterator[Metric]:
    for name in dict.fromkeys([*base.towers, *new.towers]):
        yield Metric(f"{name} p50", "s", _percentile(50), _tower(name))


def _too_little(metric: Metric, base: stats.Rounds, new: stats.Rounds) -> str:
    if not base or not new:
        return f"only in {'NEW' if new else 'BASE'}" if base or new else "not measured"
    values = min(sum(map(len, base)), sum(map(len, new)))
    if values < metric.needs:
        return f"{values} runs are too few, it takes {metric.needs}"
    if min(len(base), len(new)) < 3:
        return "too few repetitions, it takes 3"
    return ""


def _wrong_answers(base: Result, new: Result) -> str:
    for result in (base, new):
        if result.agreement is not None and not result.agreement.ok:
            return f"the answers of {result.label} are wrong"
    return ""


def _pairs(base: Report, new: Report) -> tuple[list[tuple[Result, Result]], list[tuple[str, str]]]:
    """Artifacts that belong together, and those that stand alone with the side they are on."""
    old = {r.label: r for r in base.results if r.kind == "mmopt"}
    young = {r.label: r for r in new.results if r.kind == "mmopt"}
    if len(old) == len(young) == 1:
        return list(zip(old.values(), young.values(), strict=True)), []
    alone = [(name, "BASE") for name in old if name not in young] + [(name, "NEW") for name in young if name not in old]
    return [(old[name], young[name]) for name in old if name in young], alone


def _refusal(base: Report, new: Report) -> str:
    """Why no time or memory of the two runs may be compared; "" when they may."""
    reasons = [f"different {key}" for key in _differences(base.machine, new.machine, machine.IDENTITY)]
    settings = _differences(base.settings, new.settings, ("threads", "inputs_digest"))
    reasons += [f"different {key.removesuffix('_digest')}" for key in settings]
    return ", ".join(reasons)


def _differences(base: dict[str, Any], new: dict[str, Any], keys: Iterable[str]) -> list[str]:
    return [key for key in keys if base.get(key) != new.get(key)]


def _drift(base: Report, new: Report) -> tuple[float, list[str]]:
    """How far peers that did not change moved between the runs, and which they are."""
    old = {_identity(r): r for r in base.results if r.kind != "mmopt" and r.digest}
    moved = {}
    for result in new.results:
        twin = old.get(_identity(result))
        if twin is not None:
            ratio = stats.percentile(result.rounds, 50) / stats.percentile(twin.rounds, 50)
            moved[result.label] = max(ratio, 1 / ratio) - 1
    return max(moved.values(), default=0.0), list(moved)


def _identity(result: Result) -> tuple[str, str, str, str]:
    return (result.kind, result.version, result.digest, result.precision)
