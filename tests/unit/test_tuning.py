"""Measured search: spaces, crashes, budgets, resuming, and the way to another machine and back."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest

import mmopt
from mmopt.autotune import contest
from mmopt.autotune.build import Builders, compile_kernel
from mmopt.autotune.contest import Contest, decide
from mmopt.autotune.database import Database, Scope, identity
from mmopt.autotune.export import export, import_results
from mmopt.autotune.lowered import LoweredModel
from mmopt.autotune.measuring import Supervisor
from mmopt.autotune.runner import Budget, TuningReport, tune
from mmopt.autotune.space import Space
from mmopt.backends.cpu.choosing import Candidate, Chooser, Workload
from mmopt.backends.profile import Profile, load_profile
from mmopt.cli import main
from mmopt.errors import UserError
from mmopt.lowering.compiler import CompileOptions, compile_module
from mmopt.runtime.cpu import default_threads
from tests.small_models import two_layers


def product(rows: int = 40, depth: int = 32, columns: int = 64) -> mmopt.Module:
    """One product with a bias and a ReLU: one workload with several candidates."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((rows, depth)))
    weights = [
        ir.Value(name=name, const_value=ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name))
        for name, shape in (("w", (depth, columns)), ("b", (columns,)))
    ]
    gemm = ir.node("Gemm", [x, *weights])
    relu = ir.node("Relu", gemm.outputs)
    relu.outputs[0].name, relu.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x], relu.outputs, nodes=[gemm, relu], initializers=weights, opset_imports={"": 20}, name="product"
    )
    return mmopt.optimize(mmopt.Module(ir.Model(graph, ir_version=10)), validate="off").module


def test_sizes_known_at_run_time_are_typical_ones(tmp_path: pathlib.Path) -> None:
    """A batch is one when kernels are measured."""
    module = mmopt.load(two_layers(tmp_path / "model.onnx"))
    model = LoweredModel({"main": module}, load_profile("x86-64-v3"))
    assert model.spaces
    for key, space in model.spaces.items():
        for code in model.kernels(key, space.predicted.parameters):
            assert {"symbol": 1} in code.arguments
            results = [a["shape"] for a in code.arguments if a.get("role") == "output"]
            assert results
            assert all(shape[0] == 1 for shape in results)


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile("cpu")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, profile: Profile) -> tuple[TuningReport, Database]:
    """A search cut short after a few trials."""
    database = Database(tmp_path_factory.mktemp("tuning") / "t.jsonl")
    return tune({"main": product()}, profile, database, Budget(5, 2), threads=1, jobs=1), database


# -- spaces --------------------------------------------------------------------------------------------------------


def space(rows: int, columns: int) -> Space:
    """Cycles fall with both parameters' distance from the greatest."""
    candidates = tuple(
        Candidate({"r": r, "c": c}, 100.0 - r - 10 * c) for r, c in itertools.product(range(rows), range(columns))
    )
    return Space(Workload("matmul", (), ()), candidates, 1)


def test_a_small_space_is_measured_whole_the_best_predictions_first() -> None:
    small, measured = space(3, 4), {}
    first = small.next(measured, 5)
    assert first == [{"r": r, "c": c} for r, c in ((2, 3), (1, 3), (0, 3), (2, 2), (1, 2))]
    while batch := small.next(measured, 5):
        assert batch[0] == {"r": 2, "c": 3}  # always there, to compare with
        measured.update({identity(parameters): 1.0 for parameters in batch})
    assert len(measured) == 12


def test_a_large_space_is_walked_along_its_neighbours_to_the_best() -> None:
    large, measured = space(10, 10), {}

    def time(parameters: object) -> float:
        r, c = parameters["r"], parameters["c"]  # type: ignore[index]
        return 1.0 + abs(r - 2) + abs(c - 7)  # the prediction is wrong about r

    while batch := large.next(measured, 6):
        measured.update({identity(parameters): time(parameters) for parameters in batch})
    assert min(measured, key=lambda key: measured[key]) == identity({"r": 2, "c": 7})
    assert len(measured) < 60


def test_what_failed_or_is_missing_is_not_asked_for_again() -> None:
    small = space(1, 3)
    small.missing[identity({"r": 0, "c": 1})] = "why not"
    measured = {identity({"r": 0, "c": 2}): 1.0, identity({"r": 0, "c": 0}): None}
    assert small.next(measured) == []


def test_another_base_serves_where_the_predicted_candidate_is_missing() -> None:
    small, measured = space(1, 3), {}
    small.missing[identity({"r": 0, "c": 2})] = "the compiler crashed"
    assert small.next(measured) == [{"r": 0, "c": 1}, {"r": 0, "c": 0}]
    assert small.next({identity({"r": 0, "c": c}): 1.0 for c in (0, 1)}) == []


def test_nothing_is_measured_where_there_is_no_choice() -> None:
    assert space(1, 1).next({}) == []


# -- searching -----------------------------------------------------------------------------------------------------


def test_every_candidate_is_lowered_with_its_fused_epilogue(profile: Profile) -> None:
    model = LoweredModel({"main": product()}, profile)
    (key,) = model.spaces
    found = model.spaces[key]
    assert key.startswith("matmul(batch=1,m=40,n=64,k=32")
    assert len(found.candidates) > 1
    functions = set()
    for candidate in found.candidates:
        (code,) = model.kernels(key, candidate.parameters)
        functions.add(code.function)
        roles = [(argument["role"], argument["dtype"]) for argument in code.arguments]
        assert roles.count(("output", "float32")) == 1
        assert sorted(role for role, _ in roles) == ["input", "output", "weight", "weight"]
    assert len(functions) == len(found.candidates)


def test_processes_that_compile_know_the_operations_of_every_kernel(tmp_path: pathlib.Path) -> None:
    """Exponentials and rounding of attention are operations that TVM learns from this package."""
    inputs = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((1, 2, 40, 32))) for name in "qkv"
    ]
    node = ir.node("Attention", inputs)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 23}, name="attention")
    target = load_profile("sapphirerapids")
    for precision in ("fp32", "bf16"):
        module = mmopt.Module(ir.Model(graph.clone(), ir_version=11))
        module = mmopt.optimize(module, precision=precision, target="sapphirerapids", validate="off").module
        model = LoweredModel({"main": module}, target)
        (key,) = (k for k in model.spaces if k.startswith("attention"))
        (code,) = model.kernels(key, model.spaces[key].predicted.parameters)
        with Builders(target, tmp_path, 1) as builders:
            ((library, problem),) = builders.build([code.function])
        assert not problem
        assert (tmp_path / library).is_file()


def test_a_search_measures_within_its_budget_and_goes_on_later(
    first: tuple[TuningReport, Database], profile: Profile
) -> None:
    report, database = first
    assert report.stopped == "trials"
    assert report.trials == 2
    (tuned,) = report.workloads
    assert tuned.measured == 2
    assert tuned.candidates > 2

    told: list[tuple[int, int, str]] = []
    later = Database(database.path)
    second = tune(
        {"main": product()}, profile, later, Budget(5), threads=1, jobs=1, progress=lambda *at: told.append(at)
    )
    assert second.stopped == "everything is measured"
    (tuned,) = second.workloads
    assert tuned.measured == tuned.candidates
    assert second.trials < tuned.candidates  # what was known, but for the one to compare with, was left out
    assert told[-1][:2] == (tuned.candidates, tuned.candidates)
    assert "the predicted one's speed" in told[-1][2]
    times = later.measured(Scope.of(profile, 1), tuned.workload)
    assert len(times) == tuned.candidates
    assert all(time is not None and time > 0 for time in times.values())
    third = tune({"main": product()}, profile, Database(database.path), Budget(5), threads=1, jobs=1)
    assert third.trials == 0


def test_the_best_of_the_database_is_compiled(profile: Profile, tmp_path: pathlib.Path) -> None:
    module = product()
    predicted = compile_module(module, profile).kernels[0]
    other = next(
        candidate.parameters
        for candidate in LoweredModel({"main": module}, profile).spaces[predicted["workload"]].candidates
        if candidate.parameters != predicted["choice"]
    )
    options = CompileOptions(chooser=Chooser(lambda workload: other))
    program = compile_module(module, profile, options=options)
    assert program.kernels[0]["choice"] == other
    assert program.kernels[0]["measured"]


@pytest.mark.parametrize(("minutes", "trials"), [(-1, None), (float("nan"), None), (float("inf"), None), (1, -1)])
def test_budgets_that_make_no_sense(minutes: float, trials: int | None) -> None:
    with pytest.raises(UserError, match="makes no sense"):
        Budget(minutes, trials)


# -- measuring -----------------------------------------------------------------------------------------------------

BROKEN = """
#include <cstdlib>
extern "C" int __tvm_ffi_kernel(void*, const void*, int, void*) { %s; return 0; }
"""


def broken(folder: pathlib.Path, body: str) -> str:
    """A library whose kernel does ``body``."""
    (folder / "broken.cc").write_text(BROKEN % body)
    subprocess.run(["g++", "-shared", "-fPIC", str(folder / "broken.cc"), "-o", str(folder / "broken.so")], check=True)
    return "broken.so"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("body", "timeout", "error"),
    [
        ("abort()", 120.0, "the process died (exit status -6)"),
        pytest.param("for (;;) {}", 20.0, "no answer for 20 s", marks=pytest.mark.slow),
    ],
)
def test_a_candidate_that_crashes_or_hangs_takes_nothing_else_along(
    profile: Profile, tmp_path: pathlib.Path, body: str, timeout: float, error: str
) -> None:
    model = LoweredModel({"main": product()}, profile)
    (key,) = model.spaces
    (code,) = model.kernels(key, model.spaces[key].predicted.parameters)
    compile_kernel(code.function, profile, str(tmp_path / "good.so"))
    (tmp_path / "junk.so").write_text("not a library")
    candidates = [
        {"kernels": [{"library": name, "function": "kernel", "calls": 1, "arguments": code.arguments}]}
        for name in ("good.so", broken(tmp_path, body), "good.so", "junk.so")
    ]
    supervisor = Supervisor(tmp_path, timeout=timeout)
    try:
        results = supervisor.measure({"threads": 1, "candidates": candidates})
    finally:
        supervisor.close()
    assert results[0]["seconds"] > 0
    assert results[1] == {"error": error}
    assert results[2]["seconds"] > 0
    assert "junk.so" in results[3]["error"]


# -- the whole model -----------------------------------------------------------------------------------------------


def test_the_slower_way_is_never_kept() -> None:
    assert Contest(1.0, 0.9, 0.9, 5).keep_tuned
    assert not Contest(1.0, 1.1, 1.1, 5).keep_tuned
    assert not Contest(1.0, 1.0, 1.0, 5).keep_tuned


def test_both_ways_are_compared_when_the_database_prefers_another_candidate(
    profile: Profile, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest, "TURN_SECONDS", 0.01)
    module, database = product(), Database(tmp_path / "t.jsonl")
    threads = default_threads()
    tune({"main": module}, profile, database, Budget(5), threads=threads, jobs=1)
    scope = Scope.of(profile, threads)
    (found,) = LoweredModel({"main": module}, profile).spaces.values()
    worst = max(found.candidates, key=lambda candidate: candidate.cycles).parameters
    records = [record for records in database._records[scope, found.workload.key()].values() for record in records]
    claimed = [dataclasses.replace(record, relative=0.01 if record.parameters == worst else 1.0) for record in records]
    lying = Database(tmp_path / "lying.jsonl")
    lying.add(claimed)
    decision = decide({"main": module}, profile, lying, Budget(0))
    assert decision.contest is not None
    assert decision.contest.turns >= 3
    kept = compile_module(module, profile, options=CompileOptions(chooser=decision.chooser)).kernels[0]["choice"]
    assert kept == (worst if decision.contest.ratio < 1 else found.predicted.parameters)
    assert ("measured parameters are kept" in decision.reason) == (decision.contest.ratio < 1)
    assert json.loads(json.dumps(decision.to_json()))["contest"]["turns"] == decision.contest.turns


# -- to another machine and back -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, profile: Profile) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("export") / "candidates"
    made = export({"main": product()}, profile, folder, jobs=1)
    assert made.failed == {}
    assert made.workloads == 1
    return folder


NO_COMPILER = """
import builtins, runpy, sys
real = builtins.__import__
def refuse(name, *rest, **more):
    if name.partition(".")[0] in ("tvm", "mmopt", "onnx", "onnxruntime", "torch", "onnx_ir"):
        raise ImportError(f"{name} is not on this machine")
    return real(name, *rest, **more)
builtins.__import__ = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def measure_elsewhere(folder: pathlib.Path, tmp_path: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Run the folder's script where nothing but numpy and tvm_ffi can be imported, in its worker process too."""
    site = tmp_path / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(NO_COMPILER.partition("sys.argv")[0])
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, str(folder / "measure.py"), "--threads", "1"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_an_exported_folder_measures_itself_without_a_compiler_and_results_come_back(
    exported: pathlib.Path, profile: Profile, tmp_path: pathlib.Path
) -> None:
    away = tmp_path / "away"
    shutil.copytree(exported, away)
    done = measure_elsewhere(away, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (away / "results.jsonl").read_text().splitlines()
    tasks = (away / "tasks.jsonl").read_text().splitlines()
    assert len(lines) == len(tasks) > 0
    assert measure_elsewhere(away, tmp_path).returncode == 0  # nothing left to do
    assert (away / "results.jsonl").read_text().splitlines() == lines

    database = Database(tmp_path / "t.jsonl")
    found = import_results(away, database)
    candidates = json.loads(tasks[0])["candidates"]
    assert found.records >= len(candidates) > 1
    assert found.damaged == []
    known = Database(database.path).measured(Scope.of(profile, 1), json.loads(tasks[0])["workload"])
    assert set(known) >= {identity(candidate["parameters"]) for candidate in candidates}
    assert known[identity(candidates[0]["parameters"])] == 1.0

    half = tmp_path / "half.jsonl"
    half.write_text("\n".join(lines) + "\n" + lines[0][:50])
    again = import_results(half, Database(tmp_path / "other.jsonl"))
    assert again.records == found.records
    assert len(again.damaged) == 1


def test_results_of_other_kernels_or_targets_are_refused(exported: pathlib.Path, tmp_path: pathlib.Path) -> None:
    meta = json.loads((exported / "meta.json").read_text())
    line = {
        **meta,
        "task": 0,
        "workload": "matmul(m=1):float32",
        "threads": 1,
        "machine": "somewhere",
        "results": [{"parameters": {"rows": 1}, "seconds": 1.0, "spread": 0.0, "turns": 3}],
    }
    database = Database(tmp_path / "t.jsonl")
    for field, message in (("kernels", "version other of the kernels"), ("profile", "target profile other")):
        path = tmp_path / f"{field}.jsonl"
        path.write_text(json.dumps({**line, "scope": {**line["scope"], field: "other"}}))
        with pytest.raises(UserError, match=message):
            import_results(path, database)
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(line))
    with pytest.raises(UserError, match="target profile"):
        import_results(good, database, "x86-64-v3" if load_profile("cpu").name != "x86-64-v3" else "icelake")
    with pytest.raises(UserError, match="there are no results"):
        import_results(tmp_path / "nowhere", database)
    assert len(database) == 0
    assert not database.path.exists()
    assert import_results(good, database).records == 1


def test_a_folder_in_use_is_not_exported_over(tmp_path: pathlib.Path, profile: Profile) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="is in use"):
        export({"main": product()}, profile, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# -- the command line ----------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    return main.run([str(argument) for argument in arguments])


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    return two_layers(tmp_path / "model.onnx")


def test_tune_and_then_optimize_with_what_it_found(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database, report = tmp_path / "t.jsonl", tmp_path / "r.json"
    common = ("--shape", "x:24x16", "--database", database, "--jobs", 1)
    assert run("tune", model, *common, "--trials", 9, "--json", report) == 0
    printed = capsys.readouterr().out
    assert "matmul(batch=1,m=24,n=32,k=16" in printed
    assert f"database: {database}" in printed
    data = json.loads(report.read_text())
    assert data["schema_version"] == 1
    assert data["trials"] == sum(workload["measured"] for workload in data["workloads"]) > 0
    size = database.stat().st_size

    output = tmp_path / "model.mmopt"
    assert run("optimize", model, *common, "-O3", "-o", output, "--json", report, "-q") == 0
    assert database.stat().st_size == size  # nothing is measured twice
    assert any(line.startswith("tuning: ") for line in capsys.readouterr().out.splitlines())
    tuning = json.loads(report.read_text())["tuning"]
    assert tuning["search"]["trials"] == 0
    assert json.loads((output / "report.json").read_text())["tuning"] == tuning


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tune",), "which model"),
        (("tune", "MODEL", "--minutes", "-1"), "makes no sense"),
        (("tune", "MODEL", "--minutes", "nan"), "makes no sense"),
        (("tune", "MODEL", "--trials", "-1"), "makes no sense"),
        (("tune", "MODEL", "--target", "nonsense"), "no target 'nonsense'"),
        (("tune", "MODEL", "--import", "x"), "without a model"),
        (("tune", "--import", "nowhere"), "there are no results"),
        (("tune", "MODEL", "--export", "FOLDER", "--minutes", "1"), "no time limit"),
        (("optimize", "MODEL", "--tune-minutes", "1"), "only -O3 tunes"),
        (("optimize", "MODEL", "-O3", "--tune-trials", "-1"), "makes no sense"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: tuple[str, ...],
    message: str,
    model: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MMOPT_TUNING_DATABASE", str(tmp_path / "t.jsonl"))
    monkeypatch.chdir(tmp_path)
    filled = [{"MODEL": str(model), "FOLDER": str(tmp_path / "new")}.get(argument, argument) for argument in arguments]
    assert run(*filled) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx"]


def test_a_target_that_is_not_this_machine_cannot_be_measured(
    model: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "other.toml"
    target.write_text('kind = "cpu"\nmcpu = "x86-64-v3"\nfeatures = ["a-feature-nobody-has"]\n')
    database = tmp_path / "t.jsonl"
    assert run("tune", model, "--target", target, "--database", database, "-q") == 4
    assert "a-feature-nobody-has" in capsys.readouterr().err
    arguments = ("--target", target, "--database", database, "-O3", "-o", tmp_path / "m.mmopt", "-q")
    assert run("optimize", model, *arguments) == 0
    assert "nothing measured: target other is not this machine" in capsys.readouterr().out
