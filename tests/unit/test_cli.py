"""The command line: what each command prints and writes, and the exit code of every way to fail."""

from __future__ import annotations

import json
import os
import pathlib

import numpy as np
import onnx
import pytest

from mmopt.cli import main
from mmopt.cli.main import COMMANDS
from mmopt.runtime import load_artifact
from tests.small_models import two_layers, two_towers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("cli")
    two_layers(path / "model.onnx")
    two_layers(path / "other.onnx", activation="Abs")
    np.savez(path / "inputs.npz", x=np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def artifact(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "model.mmopt"
    assert main.run(["optimize", str(folder / "model.onnx"), "-o", str(path), "-q"]) == 0
    return path


def run(*arguments: object) -> int:
    return main.run([str(argument) for argument in arguments])


def test_optimize_answers_the_four_questions(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.mmopt"
    assert run("optimize", folder / "model.onnx", "-o", output) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["graph", "size", "speed", "exactness", "written"]
    assert "nodes" in lines[0]
    assert "of onnxruntime fp32 on the original model" in lines[2]
    assert "er (same inputs, turn by turn" in lines[2]
    assert float(lines[3].split("largest error ")[1].split()[0]) < 1e-5
    assert lines[4].endswith(str(output))
    assert "optimize [1/" in printed.err
    assert os.listdir(tmp_path) == ["a.mmopt"]


def test_optimize_quietly_and_as_json(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "r.json"
    assert run("optimize", folder / "model.onnx", "-o", tmp_path / "a.zip", "-q", "--json", target) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "speed: not measured (--quiet)" in printed.out
    data = json.loads(target.read_text())
    assert data["schema_version"] == 1
    assert data["artifact"] == str(tmp_path / "a.zip")
    assert data["exactness"]["ok"]
    assert data["speed"]["reason"] == "--quiet"
    assert data["config"]["level"] == 2
    assert {record["name"] for record in data["pipeline"]["passes"]} > {"remove-no-ops", "infer-shapes"}


def test_what_optimize_wrote_is_complete(artifact: pathlib.Path, folder: pathlib.Path) -> None:
    for name in ("manifest.json", "lib.so", "weights.safetensors", "optimized.onnx", "report.json", "verify.json"):
        assert (artifact / name).is_file(), name
    for name in ("report.json", "verify.json", "manifest.json"):
        assert json.loads((artifact / name).read_text())["schema_version"] == 1
    onnx.checker.check_model(str(artifact / "optimized.onnx"))
    session = load_artifact(artifact)
    assert session.manifest.config["model"] == str(folder / "model.onnx")
    assert session.manifest.versions["mmopt"]


def test_optimize_twice_replaces(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "a.mmopt"
    assert run("optimize", folder / "model.onnx", "-o", output, "-q") == 0
    assert run("optimize", folder / "other.onnx", "-o", output, "-q") == 0
    assert run("verify", output, folder / "other.onnx") == 0
    assert run("verify", output, folder / "model.onnx") == 5
    assert os.listdir(tmp_path) == ["a.mmopt"]


def test_default_output_is_named_like_the_model(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("optimize", folder / "model.onnx", "-q", "-O", 1) == 0
    assert run("optimize", folder / "model.onnx", "-q", "--emit", "onnx") == 0
    assert sorted(os.listdir(tmp_path)) == ["model.mmopt", "model.optimized.onnx"]


def test_towers_become_entry_points(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = two_towers(tmp_path / "m.onnx")
    output = tmp_path / "a.mmopt"
    assert run("optimize", model, "-o", output, "-q") == 0
    session = load_artifact(output)
    encoders = [name for name in session.entries if name.startswith("encode_")]
    assert len(encoders) == 2
    sides = {
        name: np.random.default_rng(k).standard_normal((2, 6)).astype(np.float32)
        for k, name in enumerate(["left", "right"])
    }
    features: dict[str, np.ndarray] = {}
    for name in encoders:
        entry = session.entry(name)
        features |= entry.run({spec.name: sides[spec.name] for spec in entry.inputs})
    fused = session.entry("fuse").run(features)["score"]
    np.testing.assert_allclose(fused, session.run(sides)["score"], rtol=1e-4, atol=1e-5)
    checks = json.loads((output / "verify.json").read_text())["entries"]
    assert set(checks) == set(session.entries)
    capsys.readouterr()
    assert run("inspect", output) == 0
    printed = capsys.readouterr().out
    assert all(f"entry point {name}" in printed for name in session.entries)


def test_emit_onnx_runs_in_onnxruntime(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    import onnxruntime

    output = tmp_path / "out.onnx"
    output.write_text("old")
    assert run("optimize", folder / "model.onnx", "-o", output, "-q") == 0
    assert os.listdir(tmp_path) == ["out.onnx"]
    x = np.load(folder / "inputs.npz")["x"]
    before, after = (onnxruntime.InferenceSession(str(path)) for path in (folder / "model.onnx", output))
    np.testing.assert_allclose(after.run(None, {"x": x})[0], before.run(None, {"x": x})[0], rtol=1e-5, atol=1e-6)
    assert len(onnx.load(output).graph.node) < len(onnx.load(folder / "model.onnx").graph.node)


def test_fixed_shapes(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "a.mmopt"
    assert run("optimize", folder / "model.onnx", "-o", output, "-q", "--shape", "x:3x16") == 0
    session = load_artifact(output)
    assert session.inputs[0].shape == (3, 16)
    assert session.outputs[0].shape == (3, 4)


def test_dry_run_writes_nothing(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("optimize", folder / "model.onnx", "-o", tmp_path / "a.mmopt", "--dry-run", "--strict") == 0
    printed = capsys.readouterr().out
    assert "remove-no-ops" in printed
    assert "strict = True" in printed
    assert f"would write artifact {tmp_path / 'a.mmopt'}" in printed
    assert os.listdir(tmp_path) == []


def test_a_pass_from_a_file_and_dumps(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text(
        "import dataclasses\nfrom mmopt import Pass\n\n\n"
        "@dataclasses.dataclass(frozen=True)\nclass BreakModel(Pass):\n"
        "    def run(self, module, context):\n"
        "        node = next(n for n in module.graph if n.op_type in ('Relu', 'Abs'))\n"
        "        node.op_type = 'Neg'\n        return True\n"
    )
    arguments = [
        "optimize",
        folder / "model.onnx",
        "-q",
        "-O1",  # leaves operators as they are; fusion hides them in functions
        "--pass",
        f"{source}:BreakModel",
        "--dump-dir",
        tmp_path / "d",
    ]
    report = tmp_path / "r.json"
    assert run(*arguments, "-o", tmp_path / "a.mmopt", "--json", report) == 0
    records = json.loads(report.read_text())["pipeline"]["passes"]
    assert [record["status"] for record in records if record["name"] == "break-model"] == ["failed"]
    assert run("verify", tmp_path / "a.mmopt", folder / "model.onnx") == 0
    assert any("break-model" in name for name in os.listdir(tmp_path / "d"))
    assert run(*arguments, "-o", tmp_path / "b.mmopt", "--strict") == 4
    assert not (tmp_path / "b.mmopt").exists()
    # Nobody checks this one, so the last check of the artifact has to find it.
    unchecked = [*arguments, "-o", tmp_path / "c.mmopt", "--validate", "off"]
    assert run(*unchecked) == 5
    assert not (tmp_path / "c.mmopt").exists()
    assert run(*unchecked, "--allow-mismatch") == 5
    assert not json.loads((tmp_path / "c.mmopt" / "verify.json").read_text())["ok"]
    assert run(*unchecked, "--emit", "onnx") == 2
    assert run(*arguments[:-2], "-o", tmp_path / "c.onnx", "--validate", "off") == 5
    assert not (tmp_path / "c.onnx").exists()


def test_torch_models_with_fx_passes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    (tmp_path / "zoo_of_mine.py").write_text(
        "import torch\nfrom mmopt.pipeline.decorators import fx_pass\n\n\n"
        "def build():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU()), torch.ones(2, 8)\n\n\n"
        "@fx_pass\ndef leave_alone(graph_module):\n    print('fx pass ran')\n    return graph_module\n"
    )
    monkeypatch.chdir(tmp_path)
    base = ["optimize", "zoo_of_mine:build", "-q", "-o", tmp_path / "a.mmopt"]
    assert run(*base) == 2
    assert "--trust-code" in capsys.readouterr().err
    assert run(*base, "--trust-code", "--pass", "zoo_of_mine.py:leave_alone") == 0
    assert "fx pass ran" in capsys.readouterr().out
    assert run("verify", "a.mmopt", "zoo_of_mine:build", "--trust-code") == 0


def test_run_writes_outputs(folder: pathlib.Path, artifact: pathlib.Path, tmp_path: pathlib.Path) -> None:
    paths = [tmp_path / "a.npz", tmp_path / "m.npz"]
    for what, path in zip([artifact, folder / "model.onnx"], paths, strict=True):
        assert run("run", what, "--inputs", folder / "inputs.npz", "-o", path) == 0
    first, second = (np.load(path)["y"] for path in paths)
    assert first.shape == (3, 4)
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "m.npz"]


def test_run_prints_a_summary_or_json(
    folder: pathlib.Path, artifact: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("run", artifact, "--inputs", folder / "inputs.npz") == 0
    assert "float32  [3, 4]" in capsys.readouterr().out
    assert run("run", artifact, "--inputs", folder / "inputs.npz", "--json", "-", "-q") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["outputs"][0]["shape"] == "[3, 4]"
    assert data["schema_version"] == 1


@pytest.mark.parametrize("reverse", [False, True])
def test_verify_tells_agreement_in_any_combination(
    folder: pathlib.Path, artifact: pathlib.Path, capsys: pytest.CaptureFixture[str], reverse: bool
) -> None:
    def check(a: pathlib.Path, b: pathlib.Path, *more: object) -> int:
        return run("verify", *((b, a) if reverse else (a, b)), *more)

    assert check(artifact, folder / "model.onnx") == 0
    assert "agree" in capsys.readouterr().out
    assert check(artifact, artifact) == 0
    assert check(folder / "model.onnx", folder / "model.onnx", "--inputs", folder / "inputs.npz") == 0
    assert check(artifact, folder / "model.onnx", "--shape", "x:5x16") == 0
    capsys.readouterr()
    assert check(artifact, folder / "other.onnx", "--json", "-") == 5
    printed = capsys.readouterr()
    data = json.loads(printed.out)
    assert not data["ok"]
    assert not data["outputs"]["y"]["ok"]
    assert "output 'y'" in printed.err
    assert check(artifact, folder / "other.onnx", "--tolerance", "10") == 0


def test_verify_compares_at_the_shapes_asked_for(
    folder: pathlib.Path, artifact: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", artifact, folder / "model.onnx", "--shape", "x:5x16", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["outputs"]["y"]["shape"] == [5, 4]


def test_inspect_a_model(folder: pathlib.Path, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    target = tmp_path / "i.json"
    assert run("inspect", folder / "model.onnx", "--shape", "x:2x16", "--json", target) == 0
    printed = capsys.readouterr().out
    assert "672 parameters" in printed
    assert "runs fully native on cpu" in printed
    data = json.loads(target.read_text())
    assert data["parameters"] == 16 * 32 + 32 + 32 * 4
    assert data["macs"] == 2 * (16 * 32 + 32 * 4)
    assert data["operators"] == {"MatMul": 2, "Add": 1, "Relu": 1, "Identity": 1}
    assert data["native"]["native"]


def test_inspect_an_artifact(
    artifact: pathlib.Path, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    target = tmp_path / "i.json"
    assert run("inspect", artifact, "--json", target) == 0
    printed = capsys.readouterr().out
    assert "float32[batch, 16]" in printed
    assert "verified: yes" in printed
    assert json.loads(target.read_text())["entries"]["main"]["inputs"][0]["name"] == "x"
    data = bytearray((artifact / "report.json").read_bytes())
    damaged = tmp_path / "damaged.mmopt"
    damaged.mkdir()
    for file in artifact.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "report.json").write_bytes(data.replace(b"{", b"[", 1))
    assert run("inspect", damaged) == 3


def test_passes_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("passes") == 0
    assert "fold-constants" in capsys.readouterr().out
    assert run("passes", "fold-constants", "--json", "-") == 0
    assert [info["name"] for info in json.loads(capsys.readouterr().out)["passes"]] == ["fold-constants"]
    assert run("targets") == 0
    assert "x86-64-v3" in capsys.readouterr().out
    assert run("targets", "cpu", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["targets"][0]["runs_here"]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("mmopt ")
    for command in COMMANDS:
        assert run(command, "--help") == 0


USAGE = [
    (["optimise"], "did you mean 'optimize'"),
    (["optimize"], "Missing argument 'MODEL'"),
    (["optimize", "{m}", "--taget", "cpu"], "--target"),
    (["optimize", "{m}", "--target", "znver"], "did you mean 'znver4'"),
    (["optimize", "{m}", "-O", "5"], "less than or equal to 3"),
    (["optimize", "{m}", "--recipe", "o7"], "there is no recipe 'o7'"),
    (["optimize", "{m}", "--pass", "fold-constant"], "did you mean 'fold-constants'"),
    (["optimize", "{m}", "--pass", "fold-constants{max_byte=1}"], "did you mean 'max_bytes'"),
    (["optimize", "{m}", "--precision", "int2"], "precision 'int2'"),
    (["optimize", "{m}", "--emit", "onx"], "did you mean 'onnx'"),
    (["optimize", "{m}", "--emit", "artifact", "-o", "x.onnx"], "folder or a .zip"),
    (["optimize", "{m}", "--validate", "never"], "never"),
    (["optimize", "{m}", "--shape", "x=3"], "is no shape"),
    (["optimize", "{m}", "--shape", "xx:3x16"], "did you mean 'x'"),
    (["optimize", "{m}", "--shape", "x:3x15"], "not [3, 15]"),
    (["optimize", "{m}", "--modality", "x=picture"], "there is no modality 'picture'"),
    (["optimize", "{m}", "--modality", "xx=image"], "did you mean 'x'"),
    (["optimize", "{m}", "--inputs", "{f}/absent.npz"], "absent.npz"),
    (["optimize", "{m}", "--calib", "{f}/absent.npz"], "absent.npz"),
    (["optimize", "{m}", "-o", "{f}/absent/a.mmopt"], "there is no folder"),
    (["optimize", "{m}", "-o", "{m}"], "overwritten by its own result"),
    (["optimize", "{m}", "--json", "{f}/absent/r.json"], "there is no folder"),
    (["run", "{a}", "--inputs", "{f}/absent.npz"], "absent.npz"),
    (["run", "{a}", "--inputs", "{m}"], "is not an .npz file"),
    (["run", "{a}", "--inputs", "{f}/inputs.npz", "--entry", "mian"], "did you mean 'main'"),
    (["run", "{a}", "--inputs", "{f}/inputs.npz", "-o", "{f}/absent/o.npz"], "there is no folder"),
    (["run", "{a}", "--inputs", "{f}/inputs.npz", "--threads", "0"], "greater than or equal to 1"),
    (["verify", "{m}", "{a}", "--inputs", "{f}/inputs.npz", "--shape", "x:1x16"], "shapes of their own"),
    (["verify", "{m}", "{a}", "--shape", "y:1x16"], "there is no input 'y'"),
    (["passes", "fold-constant"], "did you mean 'fold-constants'"),
    (["targets", "nope"], "there is no target 'nope'"),
    (["inspect", "{m}", "--target", "nope"], "there is no target 'nope'"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=[" ".join(a)[:60] for a, _ in USAGE])
def test_usage_errors_say_what_would_be_right(
    folder: pathlib.Path,
    artifact: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"m": folder / "model.onnx", "f": folder, "a": artifact}
    before = sorted(os.listdir(folder))
    filled = [part if "{max" in part else part.format(**names) for part in arguments]
    assert run(*filled) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert os.listdir(tmp_path) == []
    assert sorted(os.listdir(folder)) == before


def test_bad_models_exit_3_and_leave_everything_alone(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.onnx").write_text("this is no model")
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "folder").mkdir()
    old = tmp_path / "old.mmopt"
    assert run("optimize", folder / "model.onnx", "-o", old, "-q") == 0
    before = {path: path.read_bytes() for path in old.iterdir()}
    for name in ("text.onnx", "empty.onnx", "absent.onnx", "absent"):
        for command in (["optimize", tmp_path / name, "-o", old], ["inspect", tmp_path / name]):
            assert run(*command) == 3, command
            assert name in capsys.readouterr().err
    assert run("run", tmp_path / "folder", "--inputs", folder / "inputs.npz") == 3
    assert run("verify", tmp_path / "text.onnx", folder / "model.onnx") == 3
    assert {path: path.read_bytes() for path in old.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["empty.onnx", "folder", "old.mmopt", "text.onnx"]


def test_a_failed_run_of_another_model_keeps_the_old_artifact(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "a.mmopt"
    assert run("optimize", folder / "model.onnx", "-o", output, "-q") == 0
    assert run("optimize", folder / "other.onnx", "-o", output, "-q", "--tolerance", "0") in (0, 5)
    assert run("optimize", folder / "other.onnx", "-o", output, "-q", "--inputs", folder / "model.onnx") == 2
    assert load_artifact(output).run({"x": np.zeros((1, 16), np.float32)})["y"].shape == (1, 4)


def test_wrong_inputs_name_what_is_expected(
    folder: pathlib.Path, artifact: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "wrong.npz", x=np.zeros((3, 15), np.float32))
    for what in (artifact, folder / "model.onnx"):
        assert run("run", what, "--inputs", tmp_path / "wrong.npz") == 2
        assert "float32[batch, 16]" in capsys.readouterr().err
    np.savez(tmp_path / "pickle.npz", x=np.array([{"a": 1}]))
    assert run("run", artifact, "--inputs", tmp_path / "pickle.npz") == 2


def test_verify_of_models_that_do_not_match(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", two_towers(tmp_path / "t.onnx"), folder / "model.onnx") == 2
    assert "has no input" in capsys.readouterr().err


def test_an_internal_error_exits_1_and_says_where_the_log_is(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmopt.runtime import session

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("somebody divided")

    monkeypatch.setattr(session, "open_store", broken)
    monkeypatch.setattr("mmopt.cli.run.load_artifact", broken)
    assert run("run", folder, "--inputs", folder / "inputs.npz") == 1
    printed = capsys.readouterr().err
    assert "this is a bug in mmopt" in printed
    log = pathlib.Path(printed.strip().rpartition("the log is ")[2])
    assert "somebody divided" in log.read_text()
    assert "Traceback" in log.read_text()
    log.unlink()
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("error", "code"), [(OSError(28, "No space left on device"), 4), (MemoryError(), 4), (KeyboardInterrupt(), 130)]
)
def test_what_the_system_does_to_us(
    folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mmopt.cli.run.load_artifact", broken)
    assert run("run", folder, "--inputs", folder / "inputs.npz") == code
    assert "Traceback" not in capsys.readouterr().err


def test_verbose_and_quiet_exclude_each_other(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("optimize", folder / "model.onnx", "-v", "-q") == 2
    assert "exclude each other" in capsys.readouterr().err


def test_verbose_shows_the_traceback_of_a_users_error(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", folder / "absent.mmopt", "--inputs", folder / "inputs.npz", "-v") == 3
    assert "Traceback" in capsys.readouterr().err
