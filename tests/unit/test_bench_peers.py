"""Contenders run real models and give numpy's answers; what cannot take part is named."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from mmopt.bench import peers
from mmopt.bench.peers import Spec, files_of, open_contender, peer_specs
from mmopt.bench.request import artifact_specs, contenders, parse_fraction
from mmopt.errors import LoadError, UserError
from mmopt.runtime.store import open_store
from tests.unit.bench_models import WIDTH, write_artifact_of, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_model(tmp_path_factory.mktemp("peers") / "chain.onnx")


@pytest.fixture(scope="module")
def artifact(model: pathlib.Path) -> pathlib.Path:
    return write_artifact_of(model, model.with_name("chain.mmopt"))


@pytest.fixture
def values() -> dict[str, Any]:
    return {"x": np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float32)}


def by_numpy(model: pathlib.Path, x: np.ndarray) -> np.ndarray:
    for tensor in onnx.load(model).graph.initializer:
        x = x @ numpy_helper.to_array(tensor)
        x = np.where(x < 0, 0.5 * x, x)
    return x


def answer(spec: Spec, values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    contender = open_contender(spec)
    contender.load()
    try:
        return contender.version, contender.run(values)
    finally:
        contender.unload()


@pytest.mark.parametrize("kind", ["onnxruntime", "openvino"])
def test_runtimes_of_onnx_files_give_numpys_answer(kind: str, model: pathlib.Path, values: dict[str, Any]) -> None:
    pytest.importorskip(kind)
    version, outputs = answer(Spec(kind, kind, str(model), 1), values)
    assert version
    assert list(outputs) == ["y"]
    np.testing.assert_allclose(outputs["y"], by_numpy(model, values["x"]), atol=1e-5)


def test_openvino_computes_in_the_precision_it_is_told(model: pathlib.Path) -> None:
    pytest.importorskip("openvino")
    for precision, name in (("fp32", "float"), ("bf16", "bf16")):
        contender = open_contender(Spec("openvino", "openvino", str(model), 1, precision))
        contender.load()
        compiled = contender._request.get_compiled_model()  # type: ignore[attr-defined]
        told = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        # A processor without bf16 makes OpenVINO go back to fp32; fp32 must never become anything else.
        assert told == {"float": "f32", "bf16": "bf16"}[name] or (precision == "bf16" and told == "f32")
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_an_artifact_gives_its_models_answer_and_its_towers(artifact: pathlib.Path, values: dict[str, Any]) -> None:
    contender = peers.ArtifactContender(Spec("mmopt", "chain", str(artifact), 1))
    contender.load()
    expected = by_numpy(artifact / "optimized.onnx", values["x"])
    np.testing.assert_allclose(contender.run(values)["y"], expected, atol=1e-5)
    assert contender.towers() == ["encode", "fuse", "lost"]
    tower = contender.tower("encode")
    assert tower.name == "chain:encode"
    np.testing.assert_allclose(tower.run(values)["features"], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["torch", pytest.param("torch.compile", marks=pytest.mark.slow)])
def test_torch_runs_functions_and_exported_programs(
    kind: str, tmp_path: pathlib.Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    (tmp_path / "bench_net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return {'double': 2 * x, 'parts': (x + 1, None)}\n"
        "def build():\n"
        "    return Net(), {'x': torch.zeros(3, 32)}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import bench_net  # type: ignore[import-not-found]

    program = torch.export.export(bench_net.Net(), (), {"x": torch.zeros(3, 32)})
    torch.export.save(program, tmp_path / "net.pt2")
    for source in ("bench_net:build", str(tmp_path / "net.pt2")):
        _, outputs = answer(Spec(kind, kind, source, 1), values)
        expected = [2 * values["x"], values["x"] + 1]
        for got, wanted in zip(outputs.values(), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_torch_computes_in_the_precision_it_is_told(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    (tmp_path / "bench_product.py").write_text(
        "import torch\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Linear(32, 4), {'input': torch.zeros(3, 32)}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    found = {}
    for precision in ("fp32", "bf16"):
        _, outputs = answer(Spec("torch", "torch", "bench_product:build", 1, precision), {"input": x})
        (found[precision],) = outputs.values()
    assert found["bf16"].dtype == np.float32
    np.testing.assert_array_equal(found["bf16"], torch.from_numpy(found["bf16"]).bfloat16().float().numpy())
    assert 0 < np.abs(found["bf16"] - found["fp32"]).max() < 0.05


def test_peers_that_cannot_take_part_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", lambda kind: kind != "openvino")
    specs, left_out = peer_specs(["onnxruntime", "openvino", "torch"], {"onnx": "m.onnx"}, 3)
    assert specs == [Spec("onnxruntime", "onnxruntime", "m.onnx", 3)]
    assert left_out["openvino"] == "not installed"
    assert "--model" in left_out["torch"]


def test_an_unknown_peer_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="openvino"):
        peer_specs(["openvno"], {}, 1)


def test_installed_looks_at_the_package_behind_the_name() -> None:
    assert peers.installed("onnxruntime")
    assert not peers.installed("no_such_runtime")


def test_files_include_external_weights_and_whole_artifacts(tmp_path: pathlib.Path, artifact: pathlib.Path) -> None:
    path = write_model(tmp_path / "plain.onnx")
    outside = tmp_path / "outside.onnx"
    onnx.save(onnx.load(path), outside, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert {p.name for p in files_of(Spec("onnxruntime", "a", str(outside), 1))} == {"outside.onnx", "weights.bin"}
    named = {p.name for p in files_of(Spec("mmopt", "a", str(artifact), 1))}
    assert {"manifest.json", "optimized.onnx"} <= named
    assert files_of(Spec("torch", "a", "some.module:function", 1)) == []


def test_artifacts_are_labelled_by_name_or_by_path_where_names_repeat() -> None:
    assert [s.label for s in artifact_specs(["x/clip.mmopt", "y/bert.mmopt.zip"], 1)] == ["clip", "bert"]
    assert [s.label for s in artifact_specs(["base/clip.mmopt", "new/clip.mmopt"], 1)] == [
        "base/clip.mmopt",
        "new/clip.mmopt",
    ]
    assert [s.label for s in artifact_specs(["openvino.mmopt"], 1)] == ["openvino.mmopt"]
    with pytest.raises(UserError, match="twice"):
        artifact_specs(["a.mmopt", "a.mmopt"], 1)


def request(artifact: pathlib.Path, **changes: Any) -> tuple[list[Spec], dict[str, str]]:
    usual = {"against": "onnxruntime", "models": [], "threads": 1, "precision": "fp32", "trust_code": False}
    return contenders([str(artifact)], open_store(artifact), **{**usual, **changes})


def test_peers_run_the_artifacts_model_unless_another_is_given(artifact: pathlib.Path, model: pathlib.Path) -> None:
    assert [s.source for s in request(artifact)[0]] == [str(artifact), str(artifact / "optimized.onnx")]
    assert request(artifact, models=[str(model)])[0][1].source == str(model)
    assert [s.kind for s in request(artifact, against="none")[0]] == ["mmopt"]
    # torch has nothing to run here, and nobody asked for it, so it is not mentioned.
    assert "torch" not in request(artifact, against=None)[1]


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"models": ["a:b"]}, UserError, "--trust-code"),
        ({"models": ["nowhere.onnx"]}, LoadError, "no such file"),
        ({"models": ["model.bin"]}, UserError, "not a model"),
        ({"precision": "fp31"}, UserError, "fp32"),
    ],
)
def test_wrong_requests_say_what_to_do(
    artifact: pathlib.Path, changes: dict[str, Any], error: type[UserError], text: str
) -> None:
    with pytest.raises(error, match=text):
        request(artifact, **changes)


def test_two_models_of_one_kind_are_refused(artifact: pathlib.Path, model: pathlib.Path) -> None:
    with pytest.raises(UserError, match="one kind"):
        request(artifact, models=[str(model), str(model)])


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), ("0.05", 0.05), (" 12.5 % ", 0.125), ("0", 0.0)])
def test_fractions(text: str, value: float) -> None:
    assert parse_fraction(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["5", "x", "-1%", "", "nan", "1.0"])
def test_wrong_fractions_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="5%"):
        parse_fraction(text)
