"""Pruning from the command line: what it writes and says, and that nothing is written when it cannot be done."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import numpy as np
import pytest

import mmopt
from mmopt.cli import main
from mmopt.errors import ContractError, UserError
from mmopt.evaluation import load_evaluation
from mmopt.ir.module import save_model
from mmopt.pruning import (
    ModalityRecord,
    _Bench,
    _Cuts,
    _next_share,
    _settled,
    check_modalities,
    modality_report,
    share_for_speedup,
)
from mmopt.transforms.prune import PruneStructured, RepairLeastSquares
from mmopt.transforms.prune.reference import reference_of
from tests.prunable import convolutions, perceptron, samples_of, two_modalities


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("prune")
    module = two_modalities()
    save_model(module.model, path / "model.onnx")
    np.savez(path / "samples.npz", **samples_of(module, 96))  # type: ignore[arg-type]
    return path


def run(*arguments: object) -> int:
    return main.run([str(argument) for argument in arguments])


def test_prune_repairs_and_reports_modalities(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, report = tmp_path / "a.onnx", tmp_path / "report.json"
    arguments = ("--prune", "30%", "--calib", folder / "samples.npz", "--json", report)
    assert run("optimize", folder / "model.onnx", "-o", output, *arguments) == 0
    printed = capsys.readouterr()
    assert "of the pruned model" in printed.out
    assert "less macs: all" in printed.err
    assert "products repaired" in printed.err
    assert "image alone: outputs vary as before but for" in printed.err
    data = json.loads(report.read_text())
    assert {record["tower"] for record in data["modalities"]} == {"image", "text"}
    assert data["exactness"]["ok"]


def test_an_artifact_of_a_pruned_model(tmp_path: pathlib.Path) -> None:
    module = perceptron(hidden=64)
    save_model(module.model, tmp_path / "model.onnx")
    np.savez(tmp_path / "samples.npz", **samples_of(module, 96))  # type: ignore[arg-type]
    output = tmp_path / "a.mmopt"
    arguments = ("--prune", "30%", "--calib", tmp_path / "samples.npz", "-q")
    assert run("optimize", tmp_path / "model.onnx", "-o", output, *arguments) == 0
    feeds = samples_of(module, 32, seed=4)
    with mmopt.load_artifact(output, threads=1) as session:
        got = session.run(feeds)["y0"]
    want = mmopt.runnable.ModelRunnable(module, "original").run_all([feeds])[0]["y0"]
    assert 0 < ((got - want) ** 2).sum() < 0.2 * ((want - want.mean(0)) ** 2).sum()


def test_prune_without_samples_goes_by_magnitude(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "small.onnx"
    assert run("optimize", folder / "model.onnx", "-o", output, "--prune", "towers.image=40%", "-q") == 0
    before, after = (
        mmopt.analysis.cost.analyze_cost(mmopt.load(path), {"batch": 1}).macs
        for path in (folder / "model.onnx", output)
    )
    assert after < before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prune", "towers.txt=10%"), "did you mean 'text'"),
        (("--prune", "99.9%"), "cheaper"),
        (("--prune", "everything"), "no share to cut"),
        (("--prune", "20%", "--prune-to", "2x"), "given twice"),
        (("--prune-to", "fast"), "no speed-up"),
        (("--prune-to", "0.5x"), "no speed-up"),
        (("--pass", "prune-structured{criterion=taylor}"), "needs samples"),
        (("--pass", "prune-structured{kinds=[chanels]}"), "cheaper"),
    ],
)
def test_what_cannot_be_done_writes_nothing(
    folder: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert run("optimize", folder / "model.onnx", "-o", tmp_path / "a.mmopt", *arguments) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_an_evaluator_that_raises_writes_nothing(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "broken_task.py").write_text("def score(run):\n    raise ValueError('the data is gone')\n")
    monkeypatch.syspath_prepend(str(code))
    output = tmp_path / "a.mmopt"
    arguments = ("--prune", "30%", "--eval", "broken_task:score", "--trust-code")
    assert run("optimize", folder / "model.onnx", "-o", output, *arguments) == 2
    assert "the data is gone" in capsys.readouterr().err
    assert not output.exists()


def test_a_lost_modality_fails_the_run(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of what reads the picture is gone, by no criterion and without repair."""
    spec = 'prune-structured{share="towers.image=85%",criterion=random,compare=uniform,step=1,floor=0.05}'
    arguments = ("--pass", spec, "--calib", folder / "samples.npz")
    assert run("optimize", folder / "model.onnx", "-o", tmp_path / "a.mmopt", *arguments) == 6
    assert "the image modality collapsed" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_modalities_are_judged_alone_by_the_task_as_well() -> None:
    module = two_modalities()
    feeds = samples_of(module, 64, seed=2)
    pruned = module.clone()
    context = mmopt.PassContext(inputs=samples_of(module, 96))
    PruneStructured(share="30%").run(pruned, context)
    RepairLeastSquares().run(pruned, context)

    def spread(run: object) -> dict[str, float]:
        return {"spread": float(run(feeds)["y0"].std())}  # type: ignore[operator]

    records = modality_report(module, pruned, samples_of(module, 96), evaluation=load_evaluation(spread))
    assert [record.tower for record in records] == ["image", "text"]
    for record in records:
        assert 0 < record.moved < 0.5
        assert record.before["spread"] == pytest.approx(record.after["spread"], rel=0.5)
        assert f"{record.tower} alone" in str(record)
    assert records[0].before != records[1].before
    check_modalities(records)
    with pytest.raises(ContractError, match="text alone"):
        check_modalities([*records, ModalityRecord("text", 0.8)])
    same = modality_report(module, module, samples_of(module, 32))
    assert [record.moved for record in same] == [0.0, 0.0]


def test_the_next_share_lies_on_the_line_between_what_was_measured() -> None:
    assert _next_share([(0.5, 1 / 0.6)], 1 / 0.8 / 1.02) == pytest.approx(0.25, abs=0.01)
    # Not fast enough yet: on along the line, but not by more than a quarter at once.
    assert 0.5 < _next_share([(0.5, 1.2)], 3.0) <= 0.75
    assert _next_share([(0.4, 1.3), (0.6, 1.9)], 1.6) == pytest.approx(0.5, abs=0.03)


def test_the_model_measured_last_is_predicted_as_it_was_measured() -> None:
    feeds = {"x": samples_of(convolutions((16,)), 1)["x"]}
    with _Bench("cpu", feeds, 1) as bench:
        bench.add(convolutions((32, 32)))
        ratio = bench.add(convolutions((16, 16)))
        assert bench.speedup_predicted(convolutions((16, 16))) == pytest.approx(ratio, rel=1e-6)


def test_of_shares_predicted_to_be_fast_enough_the_least_is_tried() -> None:
    """Sizes make steps: between two shares that are fast enough may lie one that is not."""

    class Steps(_Cuts):
        def __init__(self) -> None:
            """Shares stand for modules."""

        def module(self, share: float) -> Any:
            return share

    class Bench(_Bench):
        def __init__(self) -> None:
            """What is predicted is known."""

        def speedup_predicted(self, module: Any) -> float:
            return 1.37 if 0.386 < module < 0.406 else 0.97 / (1 - module)

    found = Steps().share_predicted(Bench(), 1.6, [])
    assert Bench().speedup_predicted(found) >= 1.6
    assert found < 0.42


def test_the_search_ends_between_neighbours() -> None:
    assert _settled([(0.46, 1.72), (0.455, 1.5)], 1.6)
    assert not _settled([(0.46, 1.72), (0.42, 1.5)], 1.6)
    assert not _settled([(0.46, 1.5), (0.455, 1.4)], 1.6)
    assert not _settled([(0.46, 1.72), (0.465, 1.5)], 1.6), "the slower one is cut more: that was chance"


@pytest.mark.slow
def test_a_speedup_is_found_by_measuring() -> None:
    module = convolutions((64, 64))
    feeds = {"x": samples_of(module, 16)["x"]}
    found = share_for_speedup(module, 1.2, inputs=feeds, threads=1, validate="off")
    assert found.speedup >= 1.2
    assert found.before / found.after == pytest.approx(found.speedup)
    assert 0 < found.share < 0.9
    assert (found.share, found.speedup) in found.tried


def test_a_speedup_out_of_reach_is_said() -> None:
    module = convolutions((16,))
    with pytest.raises(UserError):
        share_for_speedup(module, 50.0, inputs=samples_of(module, 4), threads=1, validate="off")


def test_what_was_cut_is_not_written_to_files(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    module = mmopt.load(folder / "model.onnx")
    result = mmopt.optimize(module, passes=["prune-structured{share=20%}"], threads=1)
    assert reference_of(result.module) is not None
    save_model(result.module.model, tmp_path / "small.onnx")
    assert reference_of(mmopt.load(tmp_path / "small.onnx")) is None
