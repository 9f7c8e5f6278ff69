"""Artifacts for several instruction sets: which code a machine gets, and what is stored once."""

from __future__ import annotations

import os
import pathlib
import platform

import numpy as np
import pytest

import mmopt
from mmopt.backends.levels import LEVELS, levels_below
from mmopt.backends.profile import load_profile, native_profile
from mmopt.building import build_artifact
from mmopt.cli import main
from mmopt.errors import LoadError, UnsupportedError, UserError
from mmopt.runtime import cpu, load_artifact, session
from mmopt.runtime.manifest import parse_manifest
from tests.small_models import two_layers

X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86-64")
AVX512 = pytest.mark.skipif(
    platform.machine() != "x86_64" or native_profile().vector_bytes < 64, reason="this machine has no AVX-512"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return two_layers(tmp_path_factory.mktemp("levels") / "m.onnx")


@pytest.fixture(scope="module")
def built(model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> mmopt.CompileResult:
    output = tmp_path_factory.mktemp("levels") / "m.mmopt"
    return mmopt.compile(mmopt.load(model), output=output, target="skylake-avx512", multi_isa=True)


def features_of(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """Make this machine look as if it had the features of ``target`` alone."""
    features = load_profile(target).features if target else ("fpu",)
    known = frozenset(name.replace("_", "") for name in features)
    monkeypatch.setattr(cpu, "running_features", lambda: known)


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 16)).astype(np.float32)


def test_levels_are_what_a_target_has_and_more() -> None:
    assert [p.name for p in levels_below(load_profile("sapphirerapids"))] == list(LEVELS["cpu"])
    assert [p.name for p in levels_below(load_profile("znver4"))] == list(LEVELS["cpu"])
    assert [p.name for p in levels_below(load_profile("skylake-avx512"))] == ["x86-64-v3"]
    assert [p.name for p in levels_below(load_profile("cortex-a76"))] == ["armv8.2", "armv8.0"]
    with pytest.raises(UserError, match="no instruction-set level below target x86-64-v3"):
        levels_below(load_profile("x86-64-v3"))


@AVX512
def test_the_best_that_runs_is_picked(built: mmopt.CompileResult, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for target, library in (("skylake-avx512", "lib.so"), ("x86-64-v3", "variants/x86-64-v3/lib.so")):
        features_of(monkeypatch, target)
        loaded = load_artifact(built.path, threads=1)
        assert loaded.manifest.target["name"] == target
        answers.append(loaded.run({"x": rows(5)})["y"])
        mapped = pathlib.Path("/proc/self/maps").read_text()
        assert str(built.path / library) in mapped
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-5, atol=1e-6)
    features_of(monkeypatch, "")
    with pytest.raises(UnsupportedError, match=r"compiled for x86-64-v3, which has .*avx2.*this CPU does not"):
        load_artifact(built.path)


@AVX512
def test_every_target_that_runs_is_verified(built: mmopt.CompileResult) -> None:
    assert set(built.checks) == {"main", "main for x86-64-v3"}
    assert all(check.ok for check in built.checks.values())
    assert [choice.target["name"] for choice in built.manifest.each()] == ["skylake-avx512", "x86-64-v3"]


@X86
def test_a_target_can_be_asked_for(built: mmopt.CompileResult) -> None:
    x = rows(3)
    asked = load_artifact(built.path, target="x86-64-v3")
    assert asked.manifest.target["name"] == "x86-64-v3"
    np.testing.assert_allclose(asked.run({"x": x})["y"], load_artifact(built.path).run({"x": x})["y"], rtol=1e-5)
    with pytest.raises(UserError, match="not compiled for 'icelake'"):
        load_artifact(built.path, target="icelake")


@X86
def test_equal_weights_are_stored_once(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """icelake has as wide vectors as skylake-avx512: the same packed weights."""
    profile = load_profile("icelake")
    built = build_artifact(
        mmopt.load(model), profile, tmp_path / "m.zip", further=[load_profile("skylake-avx512"), *levels_below(profile)]
    )
    names = set(built.manifest.files)
    assert {"variants/skylake-avx512/lib.so", "variants/x86-64-v3/weights.safetensors"} <= names
    assert "variants/skylake-avx512/weights.safetensors" not in names
    assert load_artifact(tmp_path / "m.zip", target="x86-64-v3").run({"x": rows(2)})["y"].shape == (2, 4)


@X86
def test_damage_in_what_is_used_is_found(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    profile = load_profile("skylake-avx512")
    built = build_artifact(mmopt.load(model), profile, tmp_path / "m.mmopt", further=levels_below(profile))
    library = built.path / "variants/x86-64-v3/lib.so"
    data = bytearray(library.read_bytes())
    data[100] ^= 1
    library.write_bytes(data)
    with pytest.raises(LoadError, match=r"variants/x86-64-v3/lib\.so is damaged"):
        load_artifact(built.path, target="x86-64-v3")
    manifest = (built.path / "manifest.json").read_bytes()
    with pytest.raises(LoadError, match="damaged"):
        parse_manifest(manifest.replace(b'"variants/x86-64-v3/"', b'"../x86-64-v3/"'), "here")


def test_the_commands(
    built: mmopt.CompileResult, model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["optimize", str(model), "-o", str(tmp_path / "m.mmopt"), "--multi-isa", "--target", "x86-64-v3"]
    assert main.run(arguments) == 2
    assert "--multi-isa" in capsys.readouterr().err
    assert main.run(["inspect", str(built.path)]) == 0
    assert "or, where that does not run, for x86-64-v3" in capsys.readouterr().out
    np.savez(tmp_path / "x.npz", x=rows(2))
    given = ["--inputs", str(tmp_path / "x.npz"), "--threads", "1", "--pin"]
    assert main.run(["run", str(built.path), *given]) == 0
    assert main.run(["run", str(model), *given]) == 2
    assert "--pin" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind threads to CPUs")
def test_pinned_threads_stay_and_the_caller_is_free_again(
    built: mmopt.CompileResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.sched_getaffinity(0)
    pinned = load_artifact(built.path, threads=1, pin=True)
    seen: list[set[int]] = []
    engine = pinned.native
    invoke = engine._invoke
    monkeypatch.setattr(engine, "_invoke", lambda *given: (seen.append(os.sched_getaffinity(0)), invoke(*given))[1])
    answer = pinned.run({"x": rows(4)})["y"]
    assert seen == [{min(before)}]
    assert os.sched_getaffinity(0) == before
    np.testing.assert_array_equal(answer, load_artifact(built.path, threads=1).run({"x": rows(4)})["y"])
    monkeypatch.setattr(session, "allowed_cpus", lambda: (0,))
    with pytest.raises(UserError, match="1 CPUs for 2 pinned threads"):
        load_artifact(built.path, threads=2, pin=True)
