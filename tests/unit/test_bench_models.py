"""The benchmark over whole models: what it picks, sums up, and says about models it cannot measure."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from benchmarks import models
from benchmarks.zoo import ZOO, TorchModel
from mmopt.bench.answers import Agreement
from mmopt.bench.record import Report
from mmopt.errors import UserError
from mmopt.frontends.onnx import load_onnx
from mmopt.runnable import spec_of
from mmopt.runtime import EntryPoint, Program, Segment
from mmopt.runtime.writer import write_artifact
from tests.unit import bench_samples as samples

FILE_MODEL = "silero-vad-ifless"


def fixed(peer_seconds: float, *, wrong: bool = False) -> Report:
    """A report of ours at 10 ms against a peer, without noise."""
    rng = np.random.default_rng(0)
    ours = samples.artifact(rng, label=models.OURS, rounds=[[0.01] * 3] * 4)
    agreement = Agreement(models.OURS, not wrong, 0.5 if wrong else 0.0, "output 'y': off" if wrong else "")
    return samples.report(ours, samples.peer(rng, rounds=[[peer_seconds] * 3] * 4, agreement=agreement))


def test_ratios_are_averaged_geometrically_and_wrong_answers_do_not_count() -> None:
    reports = [fixed(0.02), fixed(0.005), fixed(0.04), fixed(0.0001, wrong=True)]
    ((ratio, count),) = models.geometric_means(reports).values()
    assert (ratio, count) == (pytest.approx((2 * 0.5 * 4) ** (1 / 3)), 3)


def test_the_table_shows_every_model_and_what_was_slower_or_wrong() -> None:
    reports = {"fast": fixed(0.02), "slow": fixed(0.005), "odd": fixed(0.02, wrong=True)}
    rows = models.sheet(reports, ["onnxruntime", "openvino"]).rows
    assert [row[0] for row in rows] == ["fast", "slow", "odd", "geometric mean"]
    assert rows[0][1:] == ["10 ms", "20 ms 2.00×", "–"]
    assert rows[2][2] == "20 ms WRONG"
    assert rows[3][2:] == ["1.00×", "–"]
    lines = models.notes(reports, {"broken": "no lowering"})
    assert "slower: on slow mmopt is 2.00× slower than (interval 2.00 to 2.00) onnxruntime" in lines
    assert not any("on fast" in line for line in lines)
    assert any(line.startswith("WRONG: odd: onnxruntime") for line in lines)
    assert "failed: broken: no lowering" in lines


def test_the_file_holds_reports_means_and_failures() -> None:
    data = json.loads(json.dumps(models.as_json({"m": fixed(0.03)}, {"n": "why"}, 2), allow_nan=False))
    assert (data["schema_version"], data["threads"], data["failed"]) == (1, 2, {"n": "why"})
    assert data["geometric_means"] == {"onnxruntime": {"ratio": pytest.approx(3.0), "models": 1}}
    assert data["models"]["m"]["contenders"][0]["label"] == models.OURS


def test_names_are_checked() -> None:
    assert models.chosen("", ["a", "b"], "--models") == ["a", "b"]
    assert models.chosen("b, a", ["a", "b"], "--models") == ["b", "a"]
    with pytest.raises(UserError, match="bert-base"):
        models.chosen("bert-bas", ZOO, "--models")
    assert models.main(["--models", "bert-bas"]) == 2


def test_torch_contenders_find_a_builder_for_each_torch_model() -> None:
    for name, model in ZOO.items():
        assert callable(getattr(models, f"{models.BUILDER}{name}", None)) == isinstance(model, TorchModel)
    with pytest.raises(AttributeError):
        _ = models.no_such_name


QUICK = ["--threads", "1", "--rounds", "2", "--time", "0", "--starts", "1"]


def write_fallback_artifact(work: pathlib.Path, name: str) -> None:
    """The model as an artifact that onnxruntime runs, where ``--reuse`` looks for it."""
    if missing := ZOO[FILE_MODEL].missing():
        pytest.skip(f"{FILE_MODEL} cannot be had here: {missing} is missing")
    source = ZOO[FILE_MODEL].export(work / "models")
    module = load_onnx(source)
    ends = [tuple(spec_of(v) for v in values) for values in (module.graph.inputs, module.graph.outputs)]
    names = [tuple(spec.name for spec in specs) for specs in ends]
    entry = EntryPoint("main", *ends, (Segment("onnxruntime", *names, model="fallback/m.onnx"),))
    (work / "artifacts").mkdir()
    with write_artifact(work / "artifacts" / name) as artifact:
        artifact.add_program(Program(None, {}, {"main": entry}, {"fallback/m.onnx": source}))
        artifact.commit()


def test_a_model_is_measured_from_its_name_to_the_file(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_fallback_artifact(tmp_path, f"{FILE_MODEL}-b1.mmopt")
    where = ["--work", str(tmp_path), "--reuse", "--json", str(tmp_path / "out.json")]
    assert models.main(["--models", FILE_MODEL, "--against", "onnxruntime,torch", *QUICK, *where]) == 0
    assert f"left out: {FILE_MODEL}: torch: the model is an ONNX file" in capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())["models"][FILE_MODEL]
    assert [c["label"] for c in report["contenders"]] == [models.OURS, "onnxruntime"]
    assert report["contenders"][1]["agreement"]["ok"]


def test_in_bf16_all_who_can_compute_in_it(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    write_fallback_artifact(tmp_path, f"{FILE_MODEL}-b1-bf16.mmopt")
    command = ["--models", FILE_MODEL, "--precision", "bf16", "--against", "onnxruntime,openvino", *QUICK]
    assert models.main([*command, "--work", str(tmp_path), "--reuse", "--json", str(tmp_path / "out.json")]) == 0
    assert f"left out: {FILE_MODEL}: onnxruntime: it has no bf16 arithmetic on CPUs" in capsys.readouterr().out
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["dtype"] == "bfloat16"
    contenders = data["models"][FILE_MODEL]["contenders"]
    assert [c["label"] for c in contenders] == [models.OURS, "openvino"]
    assert contenders[1]["agreement"]["ok"]


def test_a_model_that_cannot_be_compiled_is_named_and_fails_the_run(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing := ZOO[FILE_MODEL].missing():
        pytest.skip(f"{FILE_MODEL} cannot be had here: {missing} is missing")
    folder = tmp_path / "artifacts" / f"{FILE_MODEL}-b1.mmopt"
    folder.mkdir(parents=True)
    (folder / "somebody's file").write_text("not an artifact, so optimize refuses to replace it")
    assert models.main(["--models", FILE_MODEL, "--against", "onnxruntime", "--work", str(tmp_path)]) == 4
    out = capsys.readouterr().out
    assert f"failed: {FILE_MODEL}: " in out
    assert "is not replaced" in out
