"""``mmopt inspect ARTIFACT --kernels``, and the timing of kernels behind it."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from mmopt.cli import main
from mmopt.runtime import load_artifact
from mmopt.runtime.profiling import time_kernels
from tests.small_models import two_layers


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("kernels")
    model = two_layers(folder / "model.onnx")
    path = folder / "model.mmopt"
    assert main.run(["optimize", str(model), "-o", str(path), "--shape", "x:24x16", "-q"]) == 0
    return path


def inspect(*arguments: object) -> int:
    return main.run(["inspect", *(str(argument) for argument in arguments)])


def test_every_kernel_with_its_choice_its_prediction_and_its_time(
    artifact: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "kernels.json"
    assert inspect(artifact, "--kernels", "--threads", 1, "--json", report) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["kernel", "template", "workload", "parameters"]
    assert any("matmul(batch=1,m=24,n=32,k=16" in line for line in lines)
    assert lines[-1].startswith("peak, measured in this run with 1 thread: float32 ")

    data = json.loads(report.read_text())
    assert data["measured"]
    assert data["model_seconds"] > 0
    products = [kernel for kernel in data["kernels"] if kernel["template"] == "matmul"]
    assert len(products) == 2
    for kernel in products:
        assert kernel["measured_calls"] == kernel["calls"] == 1
        assert kernel["measured_seconds"] > 0
        assert kernel["predicted_seconds"] > 0
        assert kernel["rate"] == pytest.approx(kernel["operations"] / kernel["measured_seconds"])
        assert kernel["share_of_peak"] == pytest.approx(kernel["rate"] / data["peaks"]["operations"]["float32"])
        assert 0 < kernel["share_of_time"] < 1
        assert kernel["choice"]["rows"] > 0
    times = [kernel["measured_seconds"] for kernel in data["kernels"]]
    assert times == sorted(times, reverse=True)


def test_kernels_of_another_machine_are_listed_and_not_measured(
    artifact: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.mmopt"
    foreign.mkdir()
    for file in artifact.iterdir():
        (foreign / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((foreign / "manifest.json").read_text())
    manifest["target"]["features"] = ["a-feature-nobody-has"]
    (foreign / "manifest.json").write_text(json.dumps(manifest))
    assert inspect(foreign, "--kernels") == 0
    printed = capsys.readouterr().out
    assert "matmul(batch=1,m=24,n=32,k=16" in printed
    assert "not measured: the artifact is compiled for" in printed
    assert "a-feature-nobody-has" in printed


def test_inputs_can_be_given_and_are_checked(
    artifact: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "right.npz", x=np.zeros((24, 16), np.float32))
    np.savez(tmp_path / "wrong.npz", x=np.zeros((23, 16), np.float32))
    assert inspect(artifact, "--kernels", "--inputs", tmp_path / "right.npz", "--threads", 1) == 0
    assert inspect(artifact, "--kernels", "--inputs", tmp_path / "wrong.npz", "--threads", 1) == 2
    assert "x" in capsys.readouterr().err


def test_only_artifacts_have_kernels(artifact: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(artifact.parent / "model.onnx", "--kernels") == 2
    assert "is not an artifact" in capsys.readouterr().err


def test_observed_runs_compute_the_same_and_cover_the_time(artifact: pathlib.Path) -> None:
    inputs = {"x": np.random.default_rng(0).standard_normal((24, 16)).astype(np.float32)}
    with load_artifact(artifact, threads=1) as session:
        before = session.run(inputs)
        timed = time_kernels(session, inputs, runs=8)
        after = session.run(inputs)
    np.testing.assert_array_equal(before["y"], after["y"])
    assert timed.runs == 8
    assert {kernel.name for kernel in timed.kernels} == {kernel["name"] for kernel in session.manifest.kernels}
    assert 0 < sum(kernel.seconds for kernel in timed.kernels) < timed.seconds * 5
