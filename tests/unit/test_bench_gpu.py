"""The benchmark for GPUs: what can be said of it without one."""

from __future__ import annotations

import json
import pathlib

import pytest

from benchmarks import gpu
from benchmarks.gpu import Line
from mmopt.runtime.gpu import present_gpu
from tests.unit.test_cuda_products import toolkit

pytest.importorskip("torch", reason="needs torch, the other contender")


def line(ours: float, theirs: float, *, agrees: bool = True, bar: float | None = 1.2) -> Line:
    return Line("model", ours, theirs, 1e-4, agrees, bar)


def test_verdicts() -> None:
    assert line(1.0, 1.2).passes
    assert not line(1.0, 1.19).passes
    assert not line(1.0, 5.0, agrees=False).passes
    assert line(1.0, 0.1, bar=None).passes
    assert str(line(0.001, 0.0015)).endswith("1.50×, bar 1.2×, error 1.0e-04: ok")
    assert "missed" in str(line(1.0, 1.0))
    assert "WRONG" in str(line(1.0, 2.0, agrees=False))


@toolkit
def test_dry_run_compiles_the_product(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = gpu._parser().parse_args(["--dry-run", "--size", "64", "--target", "cuda-sm80"])
    assert gpu.matmul(options, tmp_path) == []
    assert "matmul 64³ fp16: compiled" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "matmul.mmopt" / "manifest.json").read_text())
    assert [kernel["template"] for kernel in manifest["kernels"]] == ["tensor_product"]
    assert manifest["kernels"][0]["parameters"]["type"] == "float16"


@pytest.mark.skipif(present_gpu() is not None, reason="there is a GPU here")
def test_without_a_gpu_it_says_what_can_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--models", "resnet-50"]) == 2
    assert "--dry-run" in capsys.readouterr().err


@toolkit
@pytest.mark.slow
def test_dry_run_of_a_whole_model(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dry-run", "--models", "resnet-50", "--batches", "1", "--size", "64", "--target", "cuda-sm90"]
    assert gpu.main([*arguments, "--json", str(tmp_path / "gpu.json")]) == 0
    assert "resnet-50, batch 1, fp16: compiled" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu.json").read_text())["lines"] == []
