"""``mmopt bench`` and ``mmopt bench compare``: files, exit codes, messages."""

from __future__ import annotations

import json
import pathlib
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest
import typer

from mmopt.bench.answers import TOLERANCE
from mmopt.bench.compare import FAIL_OVER
from mmopt.bench.measure import Plan
from mmopt.bench.record import Report
from mmopt.bench.run import Options
from mmopt.cli import bench
from mmopt.cli.main import run
from tests.unit import bench_samples as samples
from tests.unit.bench_models import WIDTH, write_artifact_of, write_model

QUICK = ["--threads", "1", "--rounds", "3", "--time", "0.01", "--starts", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two artifacts of one model, and another model that takes the same inputs."""
    made = tmp_path_factory.mktemp("cli")
    write_artifact_of(write_model(made / "chain.onnx"), made / "base.mmopt")
    write_artifact_of(made / "chain.onnx", made / "same.mmopt.zip")
    write_model(made / "other.onnx", seed=9)
    return made


def save(path: pathlib.Path, report: Report) -> str:
    path.write_text(json.dumps(report.to_json()))
    return str(path)


def pair(tmp_path: pathlib.Path, growth: float, **changes: Any) -> list[str]:
    """Two result files, the second ``growth`` times as slow."""
    rng = np.random.default_rng(50)
    base = samples.report(samples.artifact(rng), samples.peer(rng))
    new = samples.report(samples.artifact(rng, 0.02 * growth), samples.peer(rng), **changes)
    return [save(tmp_path / "base.json", base), save(tmp_path / "new.json", new)]


def test_bench_writes_all_its_files(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "in.npz", x=np.ones((2, WIDTH), np.float32))
    files = {name: tmp_path / f"out.{name}" for name in ("json", "markdown", "junit")}
    options = [item for name, path in files.items() for item in (f"--{name}", str(path))]
    arguments = ["bench", str(folder / "base.mmopt"), str(folder / "same.mmopt.zip"), *QUICK, *options]
    assert run([*arguments, "--against", "onnxruntime", "--inputs", str(tmp_path / "in.npz")]) == 0
    captured = capsys.readouterr()
    assert "onnxruntime" in captured.out
    assert "start base" in captured.err
    data = json.loads(files["json"].read_text())
    assert [data["schema_version"], data["comparison"]["schema_version"]] == [1, 1]
    assert [c["label"] for c in data["contenders"]] == ["base", "same", "onnxruntime"]
    assert set(data["ratios"]) == {"same", "onnxruntime"}
    assert data["settings"]["inputs_from"] == "in.npz"
    assert {v["pair"] for v in data["comparison"]["verdicts"]} == {"base → same"}
    assert "| base | " in files["markdown"].read_text()
    assert ET.parse(files["junit"]).getroot().find("testsuite/testcase") is not None


def test_bench_makes_inputs_and_prints_json(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(folder / "base.mmopt"), *QUICK, "--against", "none", "--shape", f"x:4x{WIDTH}"]
    assert run([*arguments, "--json", "-", "-q"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    data = json.loads(captured.out)
    assert data["settings"]["inputs"] == {"x": f"float32[4, {WIDTH}]"}
    assert set(data["contenders"][0]["towers"]) == {"encode", "fuse"}


def test_a_wrong_answer_exits_5_and_is_still_reported(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", str(folder / "base.mmopt"), *QUICK, "--against", "onnxruntime"]
    assert run([*arguments, "--model", str(folder / "other.onnx"), "--junit", str(tmp_path / "j.xml")]) == 5
    captured = capsys.readouterr()
    assert "WRONG: onnxruntime disagrees with base" in captured.out
    assert "onnxruntime: disagrees with base" in captured.err
    assert ET.parse(tmp_path / "j.xml").getroot().find("testsuite/testcase/failure") is not None


def test_a_slower_artifact_exits_7(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    slow = write_artifact_of(write_model(tmp_path / "deep.onnx", layers=60), tmp_path / "slow.mmopt")
    base = str(folder / "base.mmopt")
    # Their answers differ too, which is not what is asked here.
    options = ["--against", "none", "--tolerance", "1e9", "--threads", "1", "--starts", "1"]
    judged = ["--rounds", "6", "--time", "0.1", "--fail-over", "5%", "--json", str(tmp_path / "o.json")]
    assert run(["bench", base, str(slow), *options, *judged]) == 7
    data = json.loads((tmp_path / "o.json").read_text())
    assert {v["metric"]: v["outcome"] for v in data["comparison"]["verdicts"]}["p50"] == "regressed"
    assert run(["bench", base, str(slow), *options, "--rounds", "1", "--time", "0"]) == 0


@pytest.mark.parametrize(("growth", "code"), [(1.0, 0), (1 / 1.2, 0), (1.2, 7)])
def test_compare_exits_7_on_a_regression(
    tmp_path: pathlib.Path, growth: float, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "compare", *pair(tmp_path, growth), "--fail-over", "5%"]) == code
    captured = capsys.readouterr()
    assert {0: "same", 7: "regressed"}[code] in captured.out
    assert ("regressed by more than 0.05: clip p50 +" in captured.err) == (code == 7)


def test_compare_writes_all_its_files_even_when_it_fails(tmp_path: pathlib.Path) -> None:
    files = [str(tmp_path / name) for name in ("c.json", "c.md", "c.xml")]
    options = [item for pair_ in zip(("--json", "--markdown", "--junit"), files, strict=True) for item in pair_]
    assert run(["bench", "compare", *pair(tmp_path, 1.2), *options]) == 7
    data = json.loads(pathlib.Path(files[0]).read_text())
    assert (data["schema_version"], data["kind"], data["regressed"]) == (1, "mmopt-bench-comparison", True)
    verdicts = {v["metric"]: v for v in data["verdicts"]}
    assert verdicts["p50"]["outcome"] == "regressed"
    assert verdicts["p50"]["change"] == pytest.approx(0.2, abs=0.06)
    assert "| clip | p50 | " in pathlib.Path(files[1]).read_text()
    assert ET.parse(files[2]).getroot().find("testsuite/testcase/failure") is not None


def test_another_machine_cannot_be_judged_and_that_is_no_success(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "compare", *pair(tmp_path, 1.0, threads=7)]) == 2
    captured = capsys.readouterr()
    assert "different threads" in captured.err
    assert "mmopt bench BASE.mmopt NEW.mmopt" in captured.err


@pytest.mark.parametrize("text", ["{", "[1]", '{"schema_version": 1}'])
def test_malformed_results_exit_2(tmp_path: pathlib.Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    good, _ = pair(tmp_path, 1.0)
    bad = tmp_path / "bad.json"
    bad.write_text(text)
    assert run(["bench", "compare", good, str(bad)]) == 2
    assert "bad.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["nowhere.mmopt"], 3, "no such file"),
        ([], 2, "ARTIFACT"),
        (["BASE", "--against", "onxruntime"], 2, "did you mean 'onnxruntime'"),
        (["BASE", "--fail-over", "5%"], 2, "base artifact first"),
        (["BASE", "--fail-over", "5"], 2, "5% or 0.05"),
        (["BASE", "--precision", "fp31"], 2, "fp32"),
        (["BASE", "--inputs", "nowhere.npz"], 2, "nowhere.npz"),
        (["BASE", "--inputs", "a.npz", "--shape", "x:1x2"], 2, "--shape"),
        (["BASE", "--shape", "z:1x2"], 2, "no input 'z'"),
        (["BASE", "--junit", "no/such/folder/j.xml"], 2, "create it first"),
        (["BASE", "--roundz", "3"], 2, "--rounds"),
        (["BASE", "--rounds", "0"], 2, "rounds"),
        (["compare", "only-one.json"], 2, "NEW.json"),
    ],
)
def test_usage_errors(
    folder: pathlib.Path, arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *(str(folder / "base.mmopt") if a == "BASE" else a for a in arguments)]) == code
    assert text in capsys.readouterr().err


def test_help_of_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--help"]) == 0
    assert "Usage: mmopt bench [OPTIONS]" in capsys.readouterr().out
    assert run(["bench", "compare", "--help"]) == 0
    assert "Usage: mmopt bench compare [OPTIONS]" in capsys.readouterr().out


def test_defaults_are_those_of_the_library() -> None:
    group = typer.main.get_command(bench.app)
    measure = {p.name: p.default for p in group.commands["artifacts"].params}  # type: ignore[attr-defined]
    assert (measure["rounds"], measure["time"]) == (Plan.rounds, Plan.seconds)
    assert (measure["starts"], measure["tolerance"]) == (Options.starts, TOLERANCE)
    judge = {p.name: p.default for p in group.commands["compare"].params}  # type: ignore[attr-defined]
    assert judge["fail_over"] == f"{FAIL_OVER:.0%}"
