"""Whole benchmark runs on real contenders, their processes, and the result file."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mmopt.bench import arrays
from mmopt.bench.answers import Agreement, compare_answers
from mmopt.bench.inputs import made_up_inputs
from mmopt.bench.measure import Plan
from mmopt.bench.peers import Spec
from mmopt.bench.record import Report, read_report
from mmopt.bench.run import Options, benchmark
from mmopt.bench.towers import tower_racers
from mmopt.bench.worker import Worker
from mmopt.errors import BackendError, UserError
from mmopt.frontends.onnx import load_onnx
from tests.unit import bench_samples as samples
from tests.unit.bench_models import WIDTH, write_artifact_of, write_model

QUICK = Options(Plan(rounds=3, seconds=0.01, pause=0.0), starts=1)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("run")
    return write_artifact_of(write_model(folder / "chain.onnx"), folder / "chain.mmopt")


@pytest.fixture
def values() -> dict[str, Any]:
    return {"x": np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float32)}


def specs_for(artifact: pathlib.Path, model: pathlib.Path | None = None) -> list[Spec]:
    source = model or artifact / "optimized.onnx"
    return [Spec("mmopt", "chain", str(artifact), 1), Spec("onnxruntime", "onnxruntime", str(source), 1)]


@pytest.mark.parametrize("isolate", [False, True])
def test_a_run_measures_everything_it_promises(artifact: pathlib.Path, values: dict[str, Any], isolate: bool) -> None:
    steps: list[tuple[str, int, int, str]] = []
    report = benchmark(
        specs_for(artifact),
        values,
        dataclasses.replace(QUICK, isolate=isolate, starts=2),
        progress=lambda *step: steps.append(step),
    )
    ours, peer = report.results
    for result in (ours, peer):
        assert [len(result.rounds), len(result.starts)] == [3, 2]
        assert all(t > 0 for times in result.rounds for t in times)
        assert all(s.baseline_bytes < s.peak_bytes < 2**30 for s in result.starts)
        assert all(0 < s.load_s < s.first_answer_s < 30 for s in result.starts)
    assert ours.size_bytes == sum(p.stat().st_size for p in artifact.rglob("*") if p.is_file())
    assert peer.size_bytes == (artifact / "optimized.onnx").stat().st_size
    assert ours.agreement is None
    assert peer.agreement == Agreement("chain", True, 0.0)
    assert set(ours.towers) == {"encode", "fuse"}
    assert [len(rounds) for rounds in ours.towers.values()] == [3, 3]
    assert ours.towers_left_out == {"lost": "its inputs are no inputs of the model: secret"}
    assert (report.settings["isolate"], report.settings["inputs"]) == (isolate, {"x": f"float32[3, {WIDTH}]"})
    starts = [(kind, index, count, name) for kind, index, count, name in steps if kind == "start"]
    assert starts == [("start", i, 4, name) for i, name in enumerate(["chain", "onnxruntime"] * 2)]
    assert [step[:3] for step in steps if step[0] == "round"] == [("round", i, 3) for i in range(3)]


def test_a_fast_wrong_answer_is_flagged(artifact: pathlib.Path, values: dict[str, Any], tmp_path: pathlib.Path) -> None:
    other = write_model(tmp_path / "other.onnx", seed=7)
    report = benchmark(specs_for(artifact, other), values, QUICK)
    (wrong,) = report.disagreements
    assert wrong.label == "onnxruntime"
    assert wrong.agreement is not None
    assert "'y'" in wrong.agreement.detail


def test_a_peer_that_fails_is_left_out_with_its_reason(
    artifact: pathlib.Path, values: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model at all")
    report = benchmark(specs_for(artifact, broken), values, QUICK)
    assert [result.label for result in report.results] == ["chain"]
    assert report.left_out["onnxruntime"].startswith("failed: ")
    with pytest.raises(BackendError, match="no contender"):
        benchmark(specs_for(artifact, broken)[1:], values, QUICK)


def test_inputs_that_do_not_fit_an_artifact_are_the_users_mistake(artifact: pathlib.Path) -> None:
    with pytest.raises(UserError, match="shape"):
        benchmark(specs_for(artifact), {"x": np.zeros((3, 5), np.float32)}, QUICK)
    with pytest.raises(UserError, match="no input"):
        benchmark(specs_for(artifact), {"z": np.zeros((3, 5), np.float32)}, QUICK)


def test_a_process_that_hangs_or_dies_says_so(
    values: dict[str, Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, time\ndef hang():\n    time.sleep(60)\ndef die():\n    print('last words')\n    os._exit(3)\n"
    (tmp_path / "bench_bad.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("torch")
    with pytest.raises(BackendError, match="code 3") as died:
        Worker(Spec("torch", "dying", "bench_bad:die", 1), values)
    assert "last words" in died.value.hint
    with pytest.raises(BackendError, match="no answer within"):
        Worker(Spec("torch", "hanging", "bench_bad:hang", 1), values, timeout=0.5)


def test_a_worker_takes_turns_for_each_entry_point(artifact: pathlib.Path, values: dict[str, Any]) -> None:
    with Worker(specs_for(artifact)[0], values) as worker:
        assert len(worker.turn(0.0)) == 1
        assert [len(tower.turn(0.0)) for tower in worker.towers().values()] == [1, 1]
        assert worker.outputs["y"].shape == (3, WIDTH)
        with pytest.raises(BackendError, match="KeyError"):
            worker.turn(0.0, "no such entry")


def test_values_survive_the_way_between_processes(tmp_path: pathlib.Path) -> None:
    given = {
        "scalar": np.float32(2),
        "half": np.arange(4, dtype=ml_dtypes.bfloat16).reshape(2, 2),
        "text": np.array(["a", "ü"], dtype=object),
        "a/b:c": np.arange(3),
        "list": [np.zeros((1, 2)), np.zeros((2, 2))],
        "absent": None,
        "empty": np.zeros((0, 3), np.int8),
    }
    arrays.save_values(tmp_path / "v.npz", given)
    found = arrays.load_values(tmp_path / "v.npz")
    assert list(found) == [name for name in given if name != "absent"]
    for name, value in found.items():
        for got, wanted in zip(*([v] if not isinstance(v, list) else v for v in (value, given[name])), strict=True):
            assert (got.dtype, got.shape) == (np.asarray(wanted).dtype, np.asarray(wanted).shape)
            np.testing.assert_array_equal(got, wanted)


def test_the_digest_of_inputs_sees_values_dtypes_shapes_and_names_but_not_order() -> None:
    x, y = np.arange(6), np.ones(2)
    same = arrays.digest({"x": x, "y": y})
    assert arrays.digest({"y": y, "x": x}) == same
    others = [{"x": x + 1, "y": y}, {"x": x.reshape(2, 3), "y": y}, {"x": x.astype(float), "y": y}, {"y": x, "x": y}]
    assert len({arrays.digest(other) for other in others} | {same}) == 5


def test_tower_inputs_come_from_the_model_and_from_other_towers(artifact: pathlib.Path, values: dict[str, Any]) -> None:
    from mmopt.bench.peers import ArtifactContender

    contender = ArtifactContender(specs_for(artifact)[0])
    contender.load()
    racers, left_out = tower_racers(contender, values)
    assert [racer.name for racer in racers.values()] == ["chain:encode", "chain:fuse"]
    np.testing.assert_array_equal(racers["fuse"].inputs["features"], contender.tower("encode").run(values)["features"])
    assert set(left_out) == {"lost"}


@pytest.mark.parametrize(
    ("other", "ok", "text"),
    [
        ({"y": np.array([0.0, 1.0])}, True, ""),
        ({"renamed": np.array([0.0, 1.0005])}, True, ""),
        ({"y": np.array([0.0, 1.01])}, False, "0.01"),
        ({"y": np.array([0.0, np.nan])}, False, "NaN"),
        ({"y": np.array([[0.0, 1.0]])}, False, "shape"),
        ({"y": np.array([0, 1])}, False, "dtype"),
        ({"y": np.array([0.0, 1.0]), "z": np.zeros(1)}, False, "2 outputs"),
    ],
)
def test_answers(other: dict[str, np.ndarray], ok: bool, text: str) -> None:
    found = compare_answers({"y": np.array([0.0, 1.0])}, other, "first", 1e-3)
    assert found.ok is ok
    assert text in found.detail
    assert found.reference == "first"
    assert json.dumps(found.to_json(), allow_nan=False)


def test_made_up_inputs_have_batch_one_and_the_shapes_asked_for(artifact: pathlib.Path) -> None:
    module = load_onnx(artifact / "optimized.onnx")
    assert made_up_inputs(module, {})["x"].shape == (1, WIDTH)
    assert made_up_inputs(module, {"x": (5, WIDTH)})["x"].shape == (5, WIDTH)
    first, same, other = (made_up_inputs(module, {}, seed)["x"] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


def written(tmp_path: pathlib.Path, report: Report, **changes: Any) -> pathlib.Path:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**report.to_json(), **changes}, allow_nan=False))
    return path


def test_a_result_file_reads_back_as_it_was(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(30)
    wrong = samples.peer(rng, agreement=Agreement("clip", False, math.inf, "2 outputs instead of 1"))
    report = samples.report(samples.artifact(rng, towers={"encode": samples.rounds(rng)}), wrong)
    for result in report.results:
        result.rounds = [[round(t, 9) for t in times] for times in result.rounds]
        result.towers = {n: [[round(t, 9) for t in times] for times in r] for n, r in result.towers.items()}
    report.left_out = {"torch": "not installed"}
    assert read_report(written(tmp_path, report)) == report


def test_the_summary_in_the_file_is_what_numpy_says(tmp_path: pathlib.Path) -> None:
    result = samples.artifact(np.random.default_rng(31))
    everything = np.concatenate(result.rounds) * 1e3
    data = json.loads(written(tmp_path, samples.report(result)).read_text())
    summary = data["contenders"][0]["summary"]
    assert data["schema_version"] == 1
    assert [summary[f"p{q}_ms"] for q in (50, 90, 99)] == pytest.approx(np.percentile(everything, [50, 90, 99]))
    assert summary["first_answer_s"] == pytest.approx(np.median([s.first_answer_s for s in result.starts]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "not a benchmark result"),
        ('{"kind": "mmopt-bench", "schema_version": 99}', "schema version 99"),
        ('{"kind": "mmopt-bench", "schema_version": 1}', "'contenders'"),
        ('{"kind": "mmopt-bench", "schema_version": 1, "contenders": []}', "no contenders"),
        ('{"kind": "mmopt-bench", "schema_version": 1, "contenders": [3]}', r"contenders\[0\]"),
    ],
)
def test_files_that_are_no_results_are_refused(tmp_path: pathlib.Path, text: str | None, message: str) -> None:
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_report(path)
    assert caught.value.exit_code == 2
    assert "bad.json" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rounds", []),
        ("rounds", [[]]),
        ("rounds", [[0.1, -1.0]]),
        ("rounds", [[0.1, "fast"]]),
        ("rounds", [[True]]),
        ("towers", {"encode": [[0]]}),
        ("label", 3),
        ("size_bytes", True),
        ("starts", [{"load_s": 1.0}]),
        ("agreement", {"ok": "yes"}),
    ],
)
def test_a_damaged_contender_names_the_place(tmp_path: pathlib.Path, key: str, value: object) -> None:
    data = samples.report(samples.artifact(np.random.default_rng(32))).to_json()
    data["contenders"][0][key] = value
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"damaged.json: contenders\[0\]"):
        read_report(path)
