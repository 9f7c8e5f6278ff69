"""Distillation: what is learned, what resuming gives, and mistakes that are told before anything is written."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
import textwrap
import time
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import mmopt  # noqa: E402
from mmopt.cli import main  # noqa: E402
from mmopt.errors import UserError  # noqa: E402
from mmopt.ir.evaluate import ReferenceRunner  # noqa: E402
from mmopt.ir.module import Module, save_model  # noqa: E402
from mmopt.training import Distillation, distill  # noqa: E402
from tests.small_models import two_layers, two_towers  # noqa: E402

SETTINGS = Distillation(epochs=8, rate=0.02, batch=16)


def _damaged(module: Module, *names: str) -> Module:
    """A copy with noise on weights; which outputs change and which do not is known."""
    copy, random = module.clone(), np.random.default_rng(0)
    for name in names or tuple(copy.graph.initializers):
        value = copy.graph.initializers[name]
        array = value.const_value.numpy()
        noise = 0.3 * array.std() * random.standard_normal(array.shape)
        value.const_value = ir.tensor((array + noise).astype(np.float32), name=name)
    return copy


def _narrowed(module: Module, kept: int) -> Module:
    """A copy of the two layers with fewer hidden units."""
    copy = module.clone()
    cuts = {"w1": np.s_[:, :kept], "b": np.s_[:kept], "w2": np.s_[:kept]}
    for name, cut in cuts.items():
        value = copy.graph.initializers[name]
        value.const_value = ir.tensor(np.ascontiguousarray(value.const_value.numpy()[cut]), name=name)
        value.shape = value.const_value.shape
    for node in copy.graph:
        for value in node.outputs:
            value.shape = None if not value.is_graph_output() else value.shape
    return copy


def _samples(count: int = 160, seed: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((count, 16)).astype(np.float32)}


def _error(student: Module, teacher: Module, inputs: dict[str, Any]) -> float:
    with ReferenceRunner(threads=1) as runner:
        pairs = [(runner.run(student, inputs)[name], want) for name, want in runner.run(teacher, inputs).items()]
    return max(float(np.mean((got - want) ** 2) / np.var(want)) for got, want in pairs)


@pytest.fixture
def teacher(tmp_path: pathlib.Path) -> Module:
    return mmopt.load(two_layers(tmp_path / "teacher.onnx", activation="Tanh"))


def _bytes(module: Module) -> dict[str, bytes]:
    return {name: value.const_value.tobytes() for name, value in module.graph.initializers.items()}


@pytest.mark.parametrize("narrow", [False, True], ids=["damaged", "narrowed"])
def test_the_student_learns_without_labels(teacher: Module, narrow: bool) -> None:
    """Judged by onnxruntime on samples that nothing was trained on."""
    student = _narrowed(teacher, 24) if narrow else _damaged(teacher)
    before, unseen = _bytes(student), _samples(64, seed=9)
    result = distill(student, teacher, _samples(), settings=SETTINGS)
    assert _bytes(student) == before, "the student itself is left as it was"
    assert _error(result.module, teacher, unseen) < 0.25 * _error(student, teacher, unseen)
    assert result.best.loss < 0.3 * result.before.loss
    assert set(result.trained) == {"w1", "b", "w2"}
    assert (result.samples, result.stacked, result.stopped) == ((144, 16), True, "epochs")
    assert [str(v) for v in result.module.graph.initializers] == [str(v) for v in student.graph.initializers]
    # What is reported is what onnxruntime finds on the samples held out.
    assert result.before.parts["output y"] > 0


def test_the_loss_reported_is_that_of_the_outputs(teacher: Module) -> None:
    """Mean squared error over the variance of the teacher's, on the held-out samples, by numpy."""
    student, samples = _damaged(teacher), _samples(40)
    settings = Distillation(epochs=1, held_out=0.25, batch=64, rate=1e-6)
    result = distill(student, teacher, samples, settings=settings)
    order = np.random.default_rng([0, 0]).permutation(40)
    held = {"x": samples["x"][np.sort(order[:10])]}
    with ReferenceRunner(threads=1) as runner:
        got, want = (runner.run(module, held)["y"] for module in (student, teacher))
    expected = np.mean((got - want) ** 2) / np.mean((want - want.mean(0)) ** 2)
    assert result.before.parts["output y"] == pytest.approx(expected, rel=1e-4)


def test_labels_are_learned_too(teacher: Module) -> None:
    """Labels that contradict the teacher pull the student their way, as far as their weight says."""
    samples = _samples(200)
    labels = (samples["x"][:, 0] > 0).astype(np.int64)
    plain = distill(teacher, teacher, samples, settings=SETTINGS).module
    for weight, right in ((20.0, True), (0.0, False)):
        settings = Distillation(epochs=20, rate=0.05, task_weight=weight)
        result = distill(teacher, teacher, samples, labels=labels, settings=settings)
        with ReferenceRunner(threads=1) as runner:
            answers = runner.run(result.module, samples)["y"].argmax(1)
        assert ((answers == labels).mean() > 0.95) == right
        assert "task" in result.before.parts
    assert _bytes(plain) == _bytes(teacher), "a student that is its own teacher stays"


def test_tower_features_pull_the_towers(tmp_path: pathlib.Path) -> None:
    """With features alone in the loss, towers become those of the teacher; the head, which they do not see, stays."""
    teacher = mmopt.load(two_towers(tmp_path / "teacher.onnx"))
    student = _damaged(teacher)
    random = np.random.default_rng(3)
    samples = {str(v.name): random.standard_normal((120, 6)).astype(np.float32) for v in teacher.graph.inputs}
    settings = Distillation(epochs=15, rate=0.03, output_weight=0.0, feature_weight=1.0)
    result = distill(student, teacher, samples, settings=settings)
    features = [name for name in result.before.parts if name.startswith("feature ")]
    assert len(features) == 2
    assert all(result.best.parts[name] < 0.3 * result.before.parts[name] for name in features)
    assert _bytes(result.module)["head_w"] == _bytes(student)["head_w"]
    towers = [name.removeprefix("feature ") for name in features]
    one = distill(student, teacher, samples, settings=Distillation(epochs=1, features=(towers[0],)))
    assert [name for name in one.before.parts if name.startswith("feature ")] == features[:1]
    none = distill(student, teacher, samples, settings=Distillation(epochs=1, features=()))
    assert not [name for name in none.before.parts if name.startswith("feature ")]
    with pytest.raises(UserError, match="there is no tower 'touch'"):
        distill(student, teacher, samples, settings=Distillation(features=("touch",)))


def test_frozen_weights_stay(teacher: Module) -> None:
    student = _damaged(teacher)
    result = distill(student, teacher, _samples(), settings=Distillation(epochs=1, freeze=("w*",)))
    assert result.trained == ("b",)
    assert {name for name in _bytes(student) if _bytes(student)[name] != _bytes(result.module)[name]} == {"b"}
    with pytest.raises(UserError, match="no weight to train"):
        distill(student, teacher, _samples(), settings=Distillation(freeze=("*",)))


def test_a_batch_fixed_at_one_goes_sample_by_sample(tmp_path: pathlib.Path, teacher: Module) -> None:
    """With the gradients added up, and so to the same weights but for rounding."""
    settings = Distillation(epochs=2, batch=8, held_out=0.2)
    samples = _samples(40)
    fixed = [mmopt.load(two_layers(tmp_path / "one.onnx", activation="Tanh"), shapes={"x": (1, 16)}) for _ in range(2)]
    one = distill(_damaged(fixed[0]), fixed[1], samples, settings=settings)
    assert not one.stacked
    assert one.steps == 8
    assert one.best.parts["output y"] < one.before.parts["output y"]


@pytest.mark.parametrize("stop", [1, 7, 18])
def test_a_run_that_is_cut_off_goes_on_to_the_same_bits(teacher: Module, tmp_path: pathlib.Path, stop: int) -> None:
    student, path = _damaged(teacher), tmp_path / "state.checkpoint"
    settings = Distillation(epochs=4, batch=16, rate=3e-3)
    whole = distill(student, teacher, _samples(100), settings=settings)

    def cut(done: int, total: int, text: str) -> None:
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(student, teacher, _samples(100), settings=settings, checkpoint=path, progress=cut)
    seen: list[int] = []
    if stop < 6:
        assert not path.exists(), "an epoch has six steps, and no minute has passed"
        return
    resumed = distill(
        student, teacher, _samples(100), settings=settings, checkpoint=path, resume=True,
        progress=lambda done, total, text: seen.append(done),
    )  # fmt: skip
    assert seen[0] == stop // 6 * 6 + 1
    assert _bytes(resumed.module) == _bytes(whole.module)
    assert resumed.history == whole.history
    other = Distillation(epochs=4, batch=16, rate=1e-3)
    with pytest.raises(UserError, match="other models, samples or settings"):
        distill(student, teacher, _samples(100), settings=other, checkpoint=path, resume=True)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="is no checkpoint"):
        distill(student, teacher, _samples(100), settings=settings, checkpoint=path, resume=True)


def test_the_seed_decides(teacher: Module) -> None:
    student = _damaged(teacher)
    runs = [
        _bytes(distill(student, teacher, _samples(60), settings=Distillation(epochs=2, seed=seed)).module)
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_the_best_is_kept_and_patience_ends(teacher: Module) -> None:
    """With a rate that only destroys, the student is given back as it came, before the epochs are over."""
    student = _damaged(teacher)
    result = distill(student, teacher, _samples(40), settings=Distillation(epochs=50, rate=5.0, patience=2))
    assert result.stopped == "patience"
    assert result.steps < 50 * 3
    assert result.best.loss == min(one.loss for one in result.history)
    if result.best.step == 0:
        assert _bytes(result.module) == _bytes(student)


def test_minutes_limit_the_steps(teacher: Module) -> None:
    result = distill(_damaged(teacher), teacher, _samples(40), settings=Distillation(minutes=0.02, patience=0))
    assert result.stopped == "minutes"
    assert 3 < result.steps < 5000


WRONG = [
    ({"settings": Distillation(outputs=("z",))}, "no output 'z'"),
    ({"settings": Distillation(classes=("z",))}, "no output 'z'"),
    ({"settings": Distillation(labelled="z")}, "no output 'z'"),
    ({"settings": Distillation(epochs=0)}, "epochs is 0"),
    ({"settings": Distillation(rate=-1.0)}, "rate is -1"),
    ({"settings": Distillation(held_out=1.0)}, "held_out is 1"),
    ({"samples": {}}, "input 'x'"),
    ({"samples": {"x": np.ones((1, 16), np.float32)}}, "two samples at least"),
    ({"samples": {"x": np.ones((9, 17), np.float32)}}, "shape"),
    ({"samples": {"x": np.full((9, 16), np.nan, np.float32)}}, "NaN or infinity"),
    ({"labels": np.zeros(3, np.int64)}, "3 labels for 160 samples"),
    ({"labels": np.full(160, 4)}, "labels reach from 4"),
    ({"labels": np.zeros((160, 3))}, "do not fit"),
    ({"resume": True}, "no checkpoint"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message for _, message in WRONG])
def test_mistakes_are_named(teacher: Module, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        distill(_damaged(teacher), teacher, **{"samples": _samples(), **arguments})


def test_a_loss_that_is_no_number_names_step_and_samples(teacher: Module) -> None:
    """A sample so large that its square is infinite, in the part that is trained on."""
    samples = _samples(40)
    order = np.random.default_rng([0, 0]).permutation(40)
    bad = int(order[-1])
    labels = np.zeros((40, 4), np.float32)
    labels[bad] = 3e38
    with pytest.raises(UserError, match=rf"step \d+, samples [\d, ]*\b{bad}\b"):
        distill(_damaged(teacher), teacher, samples, labels=labels, settings=Distillation(epochs=1))


def test_outputs_without_namesake_are_told(teacher: Module) -> None:
    other = teacher.clone()
    other.graph.outputs[0].name = "answer"
    with pytest.raises(UserError, match="the student's outputs are answer, the teacher's y"):
        distill(other, teacher, _samples())


# -- the pass ---------------------------------------------------------------------------------------------------


def test_the_pass_learns_from_what_was_pruned(teacher: Module, tmp_path: pathlib.Path) -> None:
    """After a pass that cuts, in one pipeline, with the module before the cut as the teacher."""
    passes = ["prune-structured{share=40%,step=1}", "distill{epochs=10,rate=0.02}"]
    cut, both = (mmopt.optimize(teacher, passes=passes[:n], samples=_samples(), level=0) for n in (1, 2))
    assert [record.name for record in both.report.passes if record.status == "applied"][-1] == "distill"
    assert "fell from" in next(remark.message for remark in both.module.remarks if remark.source == "distill")
    assert sum(v.const_value.size for v in both.module.graph.initializers.values()) < 0.7 * (16 * 32 + 32 + 32 * 4)
    unseen = _samples(64, seed=9)
    assert _error(both.module, teacher, unseen) < 0.7 * _error(cut.module, teacher, unseen)


def test_the_pass_takes_a_teacher_from_a_file(teacher: Module, tmp_path: pathlib.Path) -> None:
    student, unseen = _damaged(teacher), _samples(64, seed=9)
    spec = f'distill{{teacher="{tmp_path / "teacher.onnx"}",epochs=8,rate=0.02,freeze=[b]}}'
    result = mmopt.optimize(student, passes=[spec], samples=_samples(), level=0)
    assert _error(result.module, teacher, unseen) < 0.4 * _error(student, teacher, unseen)
    assert _bytes(result.module)["b"] == _bytes(student)["b"]


def test_the_pass_needs_a_teacher_and_samples(teacher: Module, tmp_path: pathlib.Path) -> None:
    result = mmopt.optimize(teacher, passes=["distill"], samples=_samples(), level=0)
    assert "no teacher is given" in next(
        remark.message for remark in result.module.remarks if remark.source == "distill"
    )
    with pytest.raises(UserError, match="distillation needs samples"):
        mmopt.optimize(teacher, passes=[f'distill{{teacher="{tmp_path / "teacher.onnx"}"}}'], level=0)


def test_zeros_of_a_sparse_weight_stay(teacher: Module) -> None:
    student = _damaged(teacher)
    value = student.graph.initializers["w1"]
    sparse = value.const_value.numpy() * (np.random.default_rng(2).random((16, 32)) < 0.5)
    value.const_value = ir.tensor(sparse.astype(np.float32), name="w1")
    made = distill(student, teacher, _samples(), settings=SETTINGS).module.graph.initializers["w1"].const_value.numpy()
    np.testing.assert_array_equal(made == 0, sparse == 0)
    assert not np.array_equal(made, sparse)


# -- command line ----------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: pathlib.Path, teacher: Module) -> pathlib.Path:
    save_model(_damaged(teacher).model, tmp_path / "student.onnx")
    np.savez(tmp_path / "samples.npz", **_samples(), labels=np.zeros(160, np.int64))
    np.savez(tmp_path / "plain.npz", **_samples())
    return tmp_path


def _run(files: pathlib.Path, *arguments: str) -> int:
    named = [str(files / a) if a.endswith((".onnx", ".npz", ".json")) else a for a in arguments]
    return main.run(["distill", *named])


def test_command_line(files: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--data", "plain.npz", "-o", "out.onnx", "--epochs", "6", "--rate", "0.02", "--json", "report.json")
    assert _run(files, "student.onnx", "teacher.onnx", *options) == 0
    printed = capsys.readouterr()
    assert "whole loss" in printed.out
    assert "54 steps on 144 samples in batches, 16 held out, until epochs" in printed.out
    assert "distill [54/54]" in printed.err
    report = json.loads((files / "report.json").read_text())
    assert report["best"]["loss"] < report["before"]["loss"]
    assert len(report["history"]) == 7
    student, teacher, made = (mmopt.load(files / f"{name}.onnx") for name in ("student", "teacher", "out"))
    assert _error(made, teacher, _samples(64, seed=9)) < 0.5 * _error(student, teacher, _samples(64, seed=9))
    assert not (files / "out.onnx.checkpoint").exists()


def test_labels_from_the_command_line(files: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("student.onnx", "teacher.onnx", "--data", "samples.npz", "-o", "out.onnx", "--epochs", "1")
    assert _run(files, *arguments) == 2
    assert "there is no input 'labels'" in capsys.readouterr().err
    assert _run(files, *arguments, "--labels", "label") == 2
    assert "did you mean 'labels'" in capsys.readouterr().err
    assert _run(files, *arguments, "--labels", "labels") == 0
    assert "task" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there are no samples"),
        (("--data", "nothing.npz"), "cannot be read as samples"),
        (("--data", "plain.npz", "--features", "touch"), "no tower 'touch'"),
        (("--data", "plain.npz", "--output-name", "z"), "no output 'z'"),
        (("--data", "plain.npz", "--epochs", "-1"), "epochs is -1"),
        (("--data", "plain.npz", "--resume"), "no checkpoint to resume from"),
        (("--data", "plain.npz", "-o", "student.onnx"), "would be overwritten"),
        (("--data", "plain.npz", "-o", "out.mmopt"), "written as .onnx"),
        (("--data", "plain.npz", "-o", "none/out.onnx"), "there is no folder"),
    ],
)
def test_mistakes_write_nothing(
    files: pathlib.Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments if "-o" in arguments else (*arguments, "-o", "out.onnx")
    before = {path: path.read_bytes() for path in files.iterdir()}
    assert _run(files, "student.onnx", "teacher.onnx", *given) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in files.iterdir()} == before


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_file(files: pathlib.Path) -> None:
    """SIGKILL at a moment of its own choosing, then --resume in a new process."""
    folders = [files / "whole", files / "cut"]
    commands = []
    for folder in folders:
        folder.mkdir()
        names = ["student.onnx", "teacher.onnx", "--data", "plain.npz", "-o", str(folder / "out.onnx")]
        commands.append(
            [sys.executable, "-m", "mmopt.cli.main", "distill", *names, "--epochs", "60", "--patience", "0"]
        )
    subprocess.run(commands[0], cwd=files, check=True, capture_output=True)
    cut = subprocess.Popen(commands[1], cwd=files, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folders[1] / "out.onnx.checkpoint").exists() and cut.poll() is None:
        time.sleep(0.005)
    cut.kill()
    assert cut.wait() == -9, "it was not done yet"
    resumed = subprocess.run([*commands[1], "--resume"], cwd=files, check=True, capture_output=True, text=True)
    first = int(re.search(r"distill \[(\d+)/540\]", resumed.stderr).group(1))
    assert first > 9
    assert (folders[0] / "out.onnx").read_bytes() == (folders[1] / "out.onnx").read_bytes()


def test_without_torch_the_extra_is_named(files: pathlib.Path) -> None:
    """In a process where torch cannot be imported."""
    code = f"""
        import sys
        sys.modules["torch"] = None
        from mmopt.cli import main
        folder = {str(files)!r}
        names = [folder + "/student.onnx", folder + "/teacher.onnx", "--data", folder + "/plain.npz"]
        sys.exit(main.run(["distill", *names]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, cwd=files
    )
    assert done.returncode == 2
    assert "distillation needs torch" in done.stderr
    assert "pip install 'mmopt[torch]'" in done.stderr
