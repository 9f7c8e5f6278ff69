"""Tables and JUnit XML: right figures, well-formed, nothing lost."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from rich.console import Console

from mmopt.bench import render
from mmopt.bench.answers import Agreement
from mmopt.bench.compare import compare_in_run, compare_reports
from mmopt.bench.stats import Interval
from tests.unit import bench_samples as samples


def text_of(sheet: render.Sheet) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100).print(sheet.rich())
    return stream.getvalue()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "s", "–"),
        (2.0, "s", "2 s"),
        (0.1234, "s", "123 ms"),
        (0.01234, "s", "12.3 ms"),
        (0.00001234, "s", "12.3 µs"),
        (512, "bytes", "512 B"),
        (1_500_000, "bytes", "1.5 MB"),
        (2_340_000_000, "bytes", "2.3 GB"),
        (12.345, "1/s", "12.3"),
        (81234.5, "1/s", "81234"),
    ],
)
def test_quantities(value: float | None, unit: str, text: str) -> None:
    assert render.quantity(value, unit) == text


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(1.25, 1.2, 1.3), "1.25× faster than (interval 1.20 to 1.30)"),
        (Interval(0.8, 0.5, 0.9), "1.25× slower than (interval 1.11 to 2.00)"),
        (Interval(1.01, 0.98, 1.03), "as fast as (ratio 1.01, interval 0.98 to 1.03)"),
    ],
)
def test_speed_in_words(interval: Interval, text: str) -> None:
    assert render.speed(interval) == text


def test_markdown_has_one_row_for_each_contender_and_escapes_bars() -> None:
    rng = np.random.default_rng(40)
    report = samples.report(samples.artifact(rng, label="a|b"), samples.peer(rng))
    lines = render.report_sheets(report)[0].markdown().splitlines()
    assert lines[2] == "| contender | p50 | p90 | p99 | runs/s | time / a\\|b |"
    assert lines[4].startswith("| a\\|b | ")
    assert lines[5].startswith("| onnxruntime | ")
    assert lines[4].count("|") == 8


def test_the_tables_name_figures_towers_and_wrong_answers() -> None:
    rng = np.random.default_rng(41)
    ours = samples.artifact(rng, rounds=[[0.02] * 4] * 5, towers={"encode_image": [[0.005] * 4] * 5})
    wrong = samples.peer(rng, rounds=[[0.03] * 4] * 5, agreement=Agreement("clip", False, 0.5, "output 'y': off"))
    report = samples.report(ours, wrong)
    latency, resources, towers = map(text_of, render.report_sheets(report))
    assert "20 ms" in latency
    assert "1.50 (1.50–1.50)" in latency
    assert "WRONG" in resources
    assert "clip: encode_image" in towers
    assert "25%" in towers
    report.left_out = {"openvino": "not installed"}
    lines = render.report_lines(report)
    assert "clip is 1.50× faster than (interval 1.50 to 1.50) onnxruntime 1.20.0 on clip.onnx" in lines
    assert "left out: openvino: not installed" in lines
    assert "WRONG: onnxruntime disagrees with clip: output 'y': off" in lines


def test_text_in_brackets_survives_the_terminal() -> None:
    assert "x[3]" in text_of(render.Sheet("t", ("name", "value"), [("x[3]", "[bold]")]))
    assert "[bold]" in text_of(render.Sheet("t", ("name", "value"), [("x[3]", "[bold]")]))


def test_reasons_are_told_once_for_all_their_metrics() -> None:
    rng = np.random.default_rng(42)
    other = samples.report(samples.artifact(rng), machine={"cpu": "Another"})
    comparison = compare_reports(samples.report(samples.artifact(rng)), other)
    (reason,) = [line for line in render.comparison_lines(comparison) if "different cpu" in line]
    assert reason == "clip, p50, p90, p99, throughput, first answer, peak memory: different cpu"
    assert render.comparison_lines(comparison)[-1] == "1 same, 6 not comparable"


def test_junit_holds_every_verdict_and_answer() -> None:
    rng = np.random.default_rng(43)
    report = samples.report(
        samples.artifact(rng, 0.02, "old <1>"),
        samples.artifact(rng, 0.03, 'new "2"', agreement=Agreement("old <1>", True, 1e-6)),
        samples.peer(rng, agreement=Agreement("old <1>", False, 0.5, "off & away")),
    )
    comparison = compare_in_run(report)
    root = ET.fromstring(render.junit("mmopt bench", comparison, report).encode())
    (suite,) = root.findall("testsuite")
    cases = suite.findall("testcase")
    assert suite.get("tests") == str(len(cases)) == str(len(comparison.verdicts) + 2)
    assert {case.get("classname") for case in cases} == {'old <1> → new "2"', 'new "2"', "onnxruntime"}
    failed = {case.get("name") for case in cases if case.find("failure") is not None}
    assert failed == {verdict.metric for verdict in comparison.regressions} | {"answers like old <1>"}
    assert {"p50", "throughput"} <= failed
    assert suite.get("failures") == str(len(failed))
    skipped = [case for case in cases if case.find("skipped") is not None]
    assert suite.get("skipped") == str(len(skipped))
    assert [case.get("name") for case in skipped] == ["p99"]
