"""Every small reference model, emulated; every one, compiled. The exports are those of the zoo."""

from __future__ import annotations

import pathlib

import numpy as np
import onnxruntime
import pytest

from benchmarks.zoo import ZOO
from mmopt.api import load, optimize
from mmopt.backends.cuda.pipeline import compiled_kernels, generate
from mmopt.backends.profile import load_profile
from mmopt.lowering.compiler import CompileOptions
from mmopt.lowering.partition import partition
from mmopt.lowering.program import ProgramBuilder
from tests.cuda_emulator import Emulated, available
from tests.unit.test_cuda_products import toolkit

pytestmark = pytest.mark.slow

SMALL = ("cnn-rnn", "siamese", "recommendation", "hci", "fusion-concat", "fusion-attention", "fusion-scatter")
TEMPLATES = ("tensor_product", "tensor_attention")


@pytest.mark.skipif(not available, reason="needs g++, to compile what a GPU would run")
@pytest.mark.parametrize("name", SMALL)
def test_small_models_agree_with_onnxruntime(name: str, tmp_path: pathlib.Path) -> None:
    model = ZOO[name]
    if model.missing():
        pytest.skip(f"{model.missing()} is missing")
    path, inputs = model.export(tmp_path), model.inputs(1)
    got = Emulated(optimize(load(path)).module).run(inputs)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for output, want in zip(session.get_outputs(), session.run(None, dict(inputs)), strict=True):
        scale = float(np.abs(want).max(initial=0)) or 1.0
        np.testing.assert_allclose(got[output.name], want, rtol=0, atol=1e-4 * scale)


@toolkit
@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_model_compiles_without_spills_in_templates(name: str, tmp_path: pathlib.Path) -> None:
    model = ZOO[name]
    if model.missing():
        pytest.skip(f"{model.missing()} is missing")
    module = optimize(load(model.export(tmp_path))).module
    for sm in (80, 90):
        profile = load_profile(f"cuda-sm{sm}")
        builder = ProgramBuilder(profile)
        partition(module, "main", builder, CompileOptions())
        collected = builder.module()
        made = compiled_kernels(generate(collected, profile, list(builder.kernels)), sm)
        assert made.resources or not builder.kernels
        from_templates = {k["name"] for k in builder.kernels.values() if k["template"] in TEMPLATES}
        spilling = {k: r for k, r in made.resources.items() if k.split("_bare")[0] in from_templates and r.spills}
        assert not spilling
