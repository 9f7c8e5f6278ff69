"""A sample of the conformance suite, and the farm that runs it."""

from __future__ import annotations

import faulthandler
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from tests.compat.cases import Case, all_cases, light, on_disk
from tests.compat.farm import run_cases
from tests.compat.judge import CRASHED, RIGHT, judge
from tests.compat.report import as_json, failures, page, table, totals

ROOT = pathlib.Path(__file__).resolve().parents[2]
SAMPLE = 40
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return all_cases()


def test_the_suite_is_complete(cases: list[Case]) -> None:
    assert len(cases) >= 2033 - 100  # other releases of onnx have a few more or less
    assert len(on_disk()) + len(light()) >= 149
    assert len({case.name for case in cases}) == len(cases)
    assert all(case.content[1] for case in cases[::100])


def test_a_sample_of_the_suite(cases: list[Case]) -> None:
    """Models at equal distances; all of them take ``make compat``."""
    small = [case for case in cases if not case.name.startswith("light/")]
    chosen = small[:: len(small) // SAMPLE + 1]
    problems = [record for record in map(judge, chosen) if record["status"] not in RIGHT]
    bad = [r for r in problems if r["status"] != "refused" or r["onnxruntime"] == "right"]
    assert not bad, json.dumps(bad, indent=1)


@pytest.mark.slow
def test_the_whole_suite(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "compat.json"
    run = subprocess.run(
        [sys.executable, "-m", "tests.compat", "-o", str(output)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-5000:]
    assert json.loads(output.read_text())["passed"]


def _fake(number: int) -> Case:
    return Case(f"test_{number}", 0.0, 0.0, lambda: pytest.fail("not needed"))


def _work(case: Case) -> dict[str, Any]:
    number = int(case.name.removeprefix("test_"))
    if number == 3:
        faulthandler.disable()
        os.abort()
    if number == 5:
        time.sleep(60)
    return {
        "name": case.name,
        "family": "f",
        "operators": [],
        "status": "native",
        "seconds": 0.0,
        "process": os.getpid(),
    }


def test_a_crash_and_a_hang_cost_one_case_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Case, "operators", [])
    records = {r["name"]: r for r in run_cases([_fake(n) for n in range(8)], jobs=2, timeout=3.0, work=_work)}
    assert len(records) == 8
    assert {name for name, r in records.items() if r["status"] == CRASHED} == {"test_3", "test_5"}
    assert "ended with -6" in records["test_3"]["reason"]
    assert "longer than 3 s" in records["test_5"]["reason"]
    assert all(r["process"] != os.getpid() for r in records.values() if r["status"] != CRASHED)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "compat.json"
    command = [
        sys.executable,
        "-m",
        "tests.compat",
        "--jobs",
        "1",
        "-o",
        str(output),
        "--only",
        "^test_(abs|neg|neg_example)$",
    ]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "3 models, 0 known" in first.stderr
    journal = output.with_suffix(".jsonl")
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:2], lines[2][:40]]))
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "3 models, 2 known" in second.stderr
    found = json.loads(output.read_text())
    assert found["totals"]["native"] == 3
    assert second.returncode == 0


def test_a_wrong_output_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in all_cases() if c.name == "test_abs")
    model, [(given, expected)] = case.content
    off = [expected[0] + np.float32(0.1)]
    wrong = judge(Case("test_abs", case.rtol, case.atol, lambda: (model, [(given, off)])))
    # onnxruntime gives what mmopt gives, so that the expectation is what is wrong
    assert wrong["status"] == "native"
    assert wrong["differs"]
    monkeypatch.setattr("tests.compat.judge._onnxruntime", lambda _: [off])
    judged = judge(Case("test_abs", case.rtol, case.atol, lambda: (model, [(given, off)])))
    assert judged["status"] == "wrong"
    assert judged["onnxruntime"] == "right"


RECORDS = [
    {"name": "a", "family": "Abs", "status": "native", "operators": ["Abs"], "notes": []},
    {
        "name": "b",
        "family": "Abs",
        "status": "fallback",
        "operators": ["Abs"],
        "notes": ["main: Abs runs in onnxruntime: why"],
    },
    {"name": "c", "family": "Neg", "status": "refused", "operators": ["Neg"], "reason": "no", "onnxruntime": "cannot"},
]


def test_tables_count() -> None:
    assert totals(RECORDS)["native"] == 1
    assert "| Abs | 2 | 1 |  | 1 |" in table(RECORDS)
    assert "| **all** | 3 | 1 |  | 1 | 1 |" in table(RECORDS)
    assert "| Abs | why | 1 |" in page(RECORDS)
    assert as_json(RECORDS)["models"] == 3


def test_what_fails_the_suite() -> None:
    assert [p for p in failures(RECORDS) if "natively" not in p] == []
    assert any("less than 85%" in p for p in failures(RECORDS))
    hidden = {**RECORDS[1], "notes": ["main: Abs 'a' runs in onnxruntime: its lowering failed (IndexError: 3)"]}
    assert any("IndexError" in p for p in failures([hidden]))
    for bad in (
        {"status": "wrong"},
        {"status": "crashed"},
        {"status": "error"},
        {"status": "refused", "onnxruntime": "right"},
    ):
        assert any(
            p.startswith("z: ") for p in failures([*RECORDS, {"name": "z", "family": "Z", "reason": "r", **bad}])
        )
