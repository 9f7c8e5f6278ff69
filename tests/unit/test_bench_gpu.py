"""The benchmark for GPUs: what can be said of it without one."""

from __future__ import annotations

import json
import pathlib

import pytest

from benchmarks import gpu
from benchmarks.gpu import Answer, Line
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


def test_answers_are_told_with_what_is_wrong() -> None:
    right = Answer("clip", "fp16", 2e-4, True, True)
    assert str(right) == "clip, fp16: error 2.0e-04: ok"
    assert right.passes
    wrong = Answer("clip", "int8", 0.5, False, True)
    assert str(wrong) == "clip, int8: error 5.0e-01: WRONG"
    assert not wrong.passes
    assert str(Answer("a", "fp32", native=False)) == "a, fp32: compiled, partly on the host: ok"
    assert not Answer("a", "fp32", problem="no kernel").passes


def test_the_line_is_covered() -> None:
    """Without options: all models in three formats, four models at two batches in fp16, the product of 4096."""
    options = gpu._parser().parse_args([])
    assert set(options.answers.split(",")) == set(gpu.ZOO)
    assert options.answer_precisions.split(",") == ["fp32", "fp16", "int8"]
    assert options.models.split(",") == ["clip-vit-b32", "bert-base", "resnet-50", "whisper-tiny-encoder"]
    assert (options.batches, options.precision, options.size) == ("1,32", "fp16", 4096)
    assert gpu.BARS == {1: 1.2, 32: 0.8}
    assert gpu.MATMUL_BAR == 0.7


@toolkit
@pytest.mark.slow
def test_dry_run_of_answers(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dry-run", "--skip-matmul", "--answers", "siamese", "--models", "", "--target", "cuda-sm80"]
    assert gpu.main([*arguments, "--json", str(tmp_path / "gpu.json")]) == 0
    said = capsys.readouterr().out
    assert all(f"siamese, {precision}: compiled: ok" in said for precision in gpu.PRECISIONS)
    answers = json.loads((tmp_path / "gpu.json").read_text())["answers"]
    assert [one["precision"] for one in answers] == list(gpu.PRECISIONS)
    assert all(one["native"] for one in answers)


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
    arguments = [
        "--dry-run",
        "--answers",
        "",
        "--models",
        "resnet-50",
        "--batches",
        "1",
        "--size",
        "64",
        "--target",
        "cuda-sm90",
    ]
    assert gpu.main([*arguments, "--json", str(tmp_path / "gpu.json")]) == 0
    assert "resnet-50, batch 1, fp16: compiled" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu.json").read_text())["lines"] == []
