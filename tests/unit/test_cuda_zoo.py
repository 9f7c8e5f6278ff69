"""Every small reference model, emulated; every one, compiled. The exports are those of the zoo."""

from __future__ import annotations

import pathlib

import numpy as np
import onnxruntime
import pytest

from benchmarks.cuda import examine
from benchmarks.gpu import calibration_samples
from benchmarks.zoo import ZOO
from mmopt.api import load, optimize
from mmopt.backends.profile import load_profile
from mmopt.frontends.onnx import save_onnx
from tests.cuda_emulator import Emulated, EmulatedEngine, available
from tests.unit.test_cuda_products import toolkit

pytestmark = pytest.mark.slow

SMALL = ("cnn-rnn", "siamese", "recommendation", "hci", "fusion-concat", "fusion-attention", "fusion-scatter")
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-3, "int8": 3e-2}
"""Largest error as a fraction of the range; a sum at the border between two narrow numbers may go either way."""

ROUNDS = 4
"""Runs of a model: all but the first are recorded launches, which the emulator does in another order each time."""


@pytest.mark.skipif(not available, reason="needs g++, to compile what a GPU would run")
@pytest.mark.parametrize("precision", sorted(TOLERANCE))
@pytest.mark.parametrize("name", SMALL)
def test_small_models_agree_with_onnxruntime(name: str, precision: str, tmp_path: pathlib.Path) -> None:
    """In float32 with the model as exported, otherwise with the optimized one, which rounds at the same places."""
    model = ZOO[name]
    if model.missing():
        pytest.skip(f"{model.missing()} is missing")
    path, inputs = model.export(tmp_path), model.inputs(1)
    samples = calibration_samples(model, precision)
    module = optimize(load(path), target="cuda-sm80", precision=precision, samples=samples).module
    if precision != "fp32":
        path = tmp_path / "optimized.onnx"
        save_onnx(module, path, inline=True)
    engine = EmulatedEngine(Emulated(module))
    segment = engine.segment()
    assert segment.repeats
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    want = dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(inputs)), strict=True))
    for _ in range(ROUNDS):
        results = engine.run(segment, [inputs[name] for name in segment.inputs])
        for output, tensor in zip(segment.outputs, results, strict=True):
            room = TOLERANCE[precision] * (float(np.abs(want[output]).max(initial=0)) or 1.0)
            np.testing.assert_allclose(engine.convert.to_numpy(tensor), want[output], rtol=0, atol=room)


@toolkit
@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_model_compiles_without_spills_in_templates(name: str, tmp_path: pathlib.Path) -> None:
    model = ZOO[name]
    if model.missing():
        pytest.skip(f"{model.missing()} is missing")
    module = optimize(load(model.export(tmp_path))).module
    for target in ("cuda-sm80", "cuda-sm90"):
        line = examine(module, name, load_profile(target))
        assert line.passes, line
