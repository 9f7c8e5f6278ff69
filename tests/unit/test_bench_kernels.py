"""The benchmark over layers: its data, its models of single layers, and a run from end to end."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import onnx
import onnxruntime
import pytest

from benchmarks import kernels
from benchmarks.zoo.layers import MODELS, Convolution, Product
from mmopt.autotune.peak import Peaks, kind_of

PEAKS = Peaks({"float32": 100e9}, 10e9, 3e9, 2)

# Multiply-adds of whole models in 10^9, from the papers or the models themselves; products with activations (attention)
# are not among the layers here.
GIGA_MULTIPLY_ADDS = {
    "bert-base": 12 * 128 * (4 * 768**2 + 2 * 768 * 3072) / 1e9,
    "vit-b-32": 12 * 50 * (4 * 768**2 + 2 * 768 * 3072) / 1e9 + 49 * 3 * 32**2 * 768 / 1e9,
    "whisper-tiny": 4 * 1500 * (4 * 384**2 + 2 * 384 * 1536) / 1e9 + (3000 * 80 + 1500 * 384) * 384 * 3 / 1e9,
    "resnet-50": 4.09,
    "mobilenet-v2": 0.30,
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_add_up_to_their_model(name: str) -> None:
    total = sum(layer.calls * layer.operations for layer in MODELS[name]) / 2e9
    assert total == pytest.approx(GIGA_MULTIPLY_ADDS[name], rel=0.01)
    assert len({layer.label for layer in MODELS[name]}) == len(MODELS[name])


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    "layer",
    [
        Product(1, 3, 8, 5),
        Convolution(1, 4, 6, 3, 2, (9, 9)),
        Convolution(1, 4, 4, 3, 1, (8, 8), groups=4),
        Convolution(1, 3, 4, 3, 2, (20,)),
        Convolution(1, 3, 4, 4, 4, (8, 8), padding=0),
    ],
    ids=lambda layer: layer.label,
)
def test_a_layer_becomes_a_valid_model_of_the_stated_size(layer: kernels.Layer, precision: str) -> None:
    proto = kernels.onnx_of(layer, precision)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    x = np.ones(taken.shape, np.uint8 if precision == "int8" else np.float32)
    (y,) = session.run(None, {"x": x})
    shape = [layer.m, layer.n] if isinstance(layer, Product) else [1, layer.filters, *layer.outputs]
    assert list(y.shape) == shape
    assert y.dtype == (np.uint8 if precision == "int8" else np.float32)
    weight = next(i for i in proto.graph.initializer if i.name == "w")
    assert np.prod(weight.dims) == layer.weights


def test_shares_of_the_peak_and_of_what_bounds_it() -> None:
    case = kernels.Case("m", Product(2, 100, 1000, 1000), "fp32", seconds=4e-3)
    assert case.rate == pytest.approx(50e9)
    assert case.of_peak(PEAKS) == case.of_bound(PEAKS) == pytest.approx(0.5)
    vector = kernels.Case("m", Product(2, 1, 1000, 1000), "fp32", seconds=5e-4)
    assert vector.of_peak(PEAKS) == pytest.approx(0.04)
    assert vector.of_bound(PEAKS) == pytest.approx(4e6 / 10e9 / 5e-4)
    assert kernels.Case("m", Product(1, 1, 1, 1), "bf16", seconds=1.0).of_peak(PEAKS) is None
    assert kernels.remark(case, PEAKS, 0.5) == "SLOW"
    assert kernels.remark(case, PEAKS, 0.01) == ""
    means = kernels.means(
        [case, kernels.Case("m", case.layer, "fp32", problem="computed in float32", seconds=1)], PEAKS
    )
    assert means["share_of_peak"] == pytest.approx(0.5)


def test_warm_weights_are_the_same_in_every_call() -> None:
    case = kernels.Case("m", Product(2, 100, 1000, 1000), "fp32", seconds=8e-3, warm_seconds=4e-3)
    assert case.warm_of_peak(PEAKS) == pytest.approx(0.5)
    taken, weight, size = {"role": "input", "shape": [1]}, {"role": "weight", "shape": [2]}, {"symbol": 7}
    changed = kernels.warm({"library": "0.so", "arguments": [taken, weight, size]})
    assert changed == {"library": "0.so", "arguments": [taken, {"role": "input", "shape": [2]}, size]}
    assert weight["role"] == "weight"


def test_kinds_of_arithmetic() -> None:
    assert kind_of(["uint8", "int8", "int32"]) == "int8"
    assert kind_of(["bfloat16", "bfloat16"]) == "bfloat16"
    assert kind_of(["float32", "int8"]) == "float32"
    assert kind_of([]) == "float32"


def test_a_run_from_end_to_end(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "small", (Product(3, 32, 64, 64), Convolution(1, 16, 32, 3, 1, (14, 14))))
    command = ["--models", "small", "--precision", "fp32", "--threads", "1", "--jobs", "1"]
    where = ["--work", str(tmp_path / "w")]
    assert kernels.main([*command, *where, "--compile-only"]) == 0
    assert kernels.main([*command, *where, "--reuse", "--json", str(tmp_path / "k.json")]) == 0
    out = capsys.readouterr().out
    assert "small, fp32" in out
    assert "peak with 1 threads: float32" in out
    data = json.loads((tmp_path / "k.json").read_text())
    assert [layer["label"] for layer in data["layers"]] == ["32x64x64", "16->32 3 @14x14"]
    for layer in data["layers"]:
        assert layer["problem"] == ""
        assert layer["template"]
        assert layer["seconds"] > 0
        assert layer["warm_seconds"] > 0
        assert layer["share_of_peak"] == pytest.approx(layer["rate"] / data["peaks"]["operations"]["float32"])
    assert kernels.main(["--models", "small", "--precision", "bf16", *where, "--reuse"]) == 2


@pytest.mark.parametrize("arguments", [["--models", "nonsense"], ["--precision", "fp31"], ["--reuse"]])
def test_mistakes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        kernels.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err
