"""The benchmark of machine code for GPUs."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import cuda
from benchmarks.cuda import Line, examine
from mmopt.backends.cuda.resources import Resources
from mmopt.backends.profile import load_profile
from tests.operators import example, numbers
from tests.programs import grouped
from tests.unit.test_cuda_products import toolkit


def test_what_passes() -> None:
    assert Line("a", "cuda-sm80").passes
    assert Line("a", "cuda-sm80", others={"Softmax_kernel": 8}).passes
    assert not Line("a", "cuda-sm80", problem="no kernel").passes
    assert not Line("a", "cuda-sm80", without=["MatMul"]).passes
    assert not Line("a", "cuda-sm80", spilling={"MatMul_kernel": 8}).passes
    told = cuda._told(Line("a", "cuda-sm80", kernels=2, without=["MatMul"], spilling={"Conv_kernel": 8}))
    assert told.endswith("2 kernels in 0.0 s: no tensor cores in MatMul; Conv_kernel spills 8 bytes")


@toolkit
def test_kernels_of_a_model_are_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    case = example("t = MatMul (x, w) y = Softmax <axis = -1> (t)", {"x": numbers(40, 64), "w": numbers(64, 48)})
    line = examine(grouped(case.model), "tiny", load_profile("cuda-sm80"))
    assert line.passes
    assert line.native
    assert (line.templates, line.kernels) == (1, 2)
    assert 0 < line.occupancy < 1
    assert line.registers > 32
    assert cuda.sheet([line]).rows[0][:5] == ["tiny", "cuda-sm80", "2", "2", "1"]

    made = cuda.compiled_kernels

    def spilling(*given: object) -> object:
        compiled = made(*given)
        return dataclasses.replace(compiled, resources={n: Resources(64, 0, 8, 16) for n in compiled.resources})

    monkeypatch.setattr(cuda, "compiled_kernels", spilling)
    monkeypatch.setattr(
        cuda, "tensor_instructions", lambda compiled: {n: 4 for n in compiled.resources if "MatMul" in n}
    )
    line = examine(grouped(case.model), "tiny", load_profile("cuda-sm80"))
    assert list(line.spilling.values()) == [16]
    assert "MatMul" in next(iter(line.spilling))
    assert list(line.others.values()) == [16]
    assert not line.passes
    monkeypatch.setattr(cuda, "tensor_instructions", lambda compiled: {})
    assert examine(grouped(case.model), "tiny", load_profile("cuda-sm80")).without == ["MatMul"]
