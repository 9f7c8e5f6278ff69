"""Tables for the terminal and for pull requests, and JUnit XML for CI, from reports and comparisons."""

from __future__ import annotations

import dataclasses
import pathlib
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from mmopt.bench import machine
from mmopt.bench.compare import Comparison, Outcome, Verdict
from mmopt.bench.record import Report, Result
from mmopt.bench.stats import Interval

MARKS = {
    Outcome.IMPROVED: "green",
    Outcome.SAME: "",
    Outcome.REGRESSED: "bold red",
    Outcome.NOT_COMPARABLE: "dim",
}


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table before it takes a form.

    Attributes:
        title: What it shows.
        columns: Heads; the first column is text, the others are set to the right.
        rows: Cells, one for each column.
        styles: A rich style for each row; empty for none.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    styles: Sequence[str] = ()

    def rich(self) -> Table:
        """For a terminal, without the title: rich would break it to the width of the table."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left", overflow="fold")
        for i, row in enumerate(self.rows):
            table.add_row(*map(escape, row), style=self.styles[i] if self.styles else None)
        return table

    def markdown(self) -> str:
        """For a pull request."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

        rule = "| --- |" + " ---: |" * (len(self.columns) - 1)
        return "\n".join([f"**{self.title}**", "", line(self.columns), rule, *map(line, self.rows), ""])


def report_sheets(report: Report) -> list[Sheet]:
    """Latency, resources, and the towers of artifacts when there are any."""
    ratios = report.ratios()
    first = report.results[0].label
    settings = report.settings
    title = (
        f"latency of one inference; threads: {settings['threads']}, rounds in turn: {settings['rounds']}, "
        f"inputs: {settings['inputs_from']}"
    )
    styles = ["bold red" if result in report.disagreements else "" for result in report.results]
    latency = [_latency_row(result, ratios.get(result.label)) for result in report.results]
    resources = [_resources_row(result) for result in report.results]
    sheets = [
        Sheet(title, ("contender", "p50", "p90", "p99", "runs/s", f"time / {first}"), latency, styles),
        Sheet("resources", ("contender", "first answer", "peak memory", "size", "answers"), resources, styles),
    ]
    towers = [_tower_row(result, name) for result in report.results for name in result.towers]
    if towers:
        sheets.append(Sheet("entry points alone", ("entry point", "p50", "of main"), towers))
    return sheets


def report_lines(report: Report) -> list[str]:
    """What the run found, in sentences: machine, who is faster, who is wrong, who is missing."""
    first = report.results[0]
    by_label = {result.label: result for result in report.results}
    lines = [machine.describe(report.machine)]
    for label, ratio in report.ratios().items():
        peer = by_label[label]
        lines.append(f"{first.label} is {speed(ratio)} {_who(peer)}")
    for result in report.results:
        lines.extend(f"not timed: {result.label} {entry}: {why}" for entry, why in result.towers_left_out.items())
    lines.extend(f"left out: {name}: {why}" for name, why in report.left_out.items())
    for result in report.disagreements:
        if result.agreement is not None:
            lines.append(
                f"WRONG: {result.label} disagrees with {result.agreement.reference}: {result.agreement.detail}"
            )
    return lines


def speed(ratio: Interval) -> str:
    """``1.20× faster than (1.15 to 1.26)``, from a ratio of times over ours."""
    if not ratio.certain:
        return f"as fast as (ratio {ratio.value:.2f}, interval {ratio.low:.2f} to {ratio.high:.2f})"
    if ratio.value >= 1:
        return f"{ratio.value:.2f}× faster than (interval {ratio.low:.2f} to {ratio.high:.2f})"
    return f"{1 / ratio.value:.2f}× slower than (interval {1 / ratio.high:.2f} to {1 / ratio.low:.2f})"


def comparison_sheet(comparison: Comparison) -> Sheet:
    """One row for each metric."""
    columns = ("pair", "metric", "base", "new", "change", "noise", "verdict")
    rows = [_verdict_row(verdict) for verdict in comparison.verdicts]
    title = f"verdicts: a change counts above {comparison.fail_over:.3g} of the base and above the noise"
    return Sheet(title, columns, rows, [MARKS[verdict.outcome] for verdict in comparison.verdicts])


def comparison_lines(comparison: Comparison) -> list[str]:
    """Notes, reasons (each once, with the metrics it holds for), and how many of each verdict."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for verdict in comparison.verdicts:
        if verdict.reason:
            reasons.setdefault((verdict.pair, verdict.reason), []).append(verdict.metric)
    why = [f"{pair}, {', '.join(metrics)}: {reason}" for (pair, reason), metrics in reasons.items()]
    return [*why, *comparison.notes, _counts(comparison)]


def _counts(comparison: Comparison) -> str:
    counts = {outcome: sum(v.outcome is outcome for v in comparison.verdicts) for outcome in Outcome}
    return ", ".join(f"{count} {outcome.value}" for outcome, count in counts.items() if count) or "nothing compared"


def junit(suite: str, comparison: Comparison | None, report: Report | None = None) -> str:
    """JUnit XML: a test case for each verdict, and one for the answers of each contender but the first."""
    root = ET.Element("testsuite", name=suite)
    for verdict in comparison.verdicts if comparison else ():
        _verdict_case(root, verdict)
    for result in report.results if report else ():
        _answers_case(root, result)
    for outcome, tag in (("failures", "failure"), ("skipped", "skipped")):
        root.set(outcome, str(len(root.findall(f"testcase/{tag}"))))
    root.set("tests", str(len(root)))
    root.set("errors", "0")
    suites = ET.Element("testsuites")
    suites.append(root)
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def quantity(value: float | None, unit: str) -> str:
    """A figure with its unit, to three or four digits."""
    if value is None:
        return "–"
    if unit == "bytes":
        for scale, prefix in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if value >= scale:
                return f"{value / scale:.1f} {prefix}"
        return f"{value:.0f} B"
    if unit == "1/s":
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    scaled, suffix = (value, "s") if value >= 1 else (value * 1e3, "ms") if value >= 1e-3 else (value * 1e6, "µs")
    return f"{scaled:.3g} {suffix}" if scaled < 100 else f"{scaled:.0f} {suffix}"


def _latency_row(result: Result, ratio: Interval | None) -> list[str]:
    figures = result.summary()
    return [
        result.label,
        *(quantity(figures[f"p{q}_ms"] / 1e3, "s") for q in (50, 90, 99)),
        quantity(figures["throughput_per_s"], "1/s"),
        f"{ratio.value:.2f} ({ratio.low:.2f}–{ratio.high:.2f})" if ratio else "1",
    ]


def _resources_row(result: Result) -> list[str]:
    figures = result.summary()
    return [
        result.label,
        quantity(figures.get("first_answer_s"), "s"),
        quantity(figures.get("peak_bytes"), "bytes"),
        quantity(result.size_bytes or None, "bytes"),
        _answers(result),
    ]


def _answers(result: Result) -> str:
    if result.agreement is None:
        return "reference"
    return f"within {result.agreement.error:.1e}" if result.agreement.ok else "WRONG"


def _tower_row(result: Result, name: str) -> list[str]:
    figures = result.summary()
    alone = figures[f"{name}_p50_ms"]
    return [f"{result.label}: {name}", quantity(alone / 1e3, "s"), f"{alone / figures['p50_ms']:.0%}"]


def _who(peer: Result) -> str:
    if peer.kind == "mmopt":
        return peer.label
    precision = f" {peer.precision}" if peer.kind == "openvino" else ""
    return f"{peer.label} {peer.version}{precision} on {pathlib.PurePath(peer.source).name}"


def _verdict_row(verdict: Verdict) -> list[str]:
    return [
        verdict.pair,
        verdict.metric,
        quantity(verdict.base, verdict.unit),
        quantity(verdict.new, verdict.unit),
        "–" if verdict.change is None else f"{verdict.change:+.1%}",
        _noise(verdict.band),
        verdict.outcome.value,
    ]


def _noise(band: float | None) -> str:
    if band is None:
        return "–"
    return f"±{band:.1%}" if band < 1 else "> 100%"


def _verdict_case(root: ET.Element, verdict: Verdict) -> None:
    case = ET.SubElement(root, "testcase", classname=verdict.pair, name=verdict.metric)
    row = _verdict_row(verdict)
    text = f"{row[2]} → {row[3]} ({row[4]}, noise {row[5]})"
    if verdict.outcome is Outcome.REGRESSED:
        ET.SubElement(case, "failure", message=f"regressed: {text}")
    elif verdict.outcome is Outcome.NOT_COMPARABLE:
        ET.SubElement(case, "skipped", message=verdict.reason)
    else:
        ET.SubElement(case, "system-out").text = f"{verdict.outcome.value}: {text}"


def _answers_case(root: ET.Element, result: Result) -> None:
    if result.agreement is None:
        return
    case = ET.SubElement(root, "testcase", classname=result.label, name=f"answers like {result.agreement.reference}")
    if not result.agreement.ok:
        ET.SubElement(case, "failure", message=result.agreement.detail)
