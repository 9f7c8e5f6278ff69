"""Tuning for GPUs as far as a machine without one can go: candidates, what is exported, what comes back.

Nothing here measures; that takes a GPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tvm

import mmopt
from mmopt.autotune import measuring
from mmopt.autotune.build import Builders
from mmopt.autotune.database import Database, Scope, identity, kernel_version
from mmopt.autotune.lowered import LoweredModel
from mmopt.autotune.runner import Budget, build_candidates, tune
from mmopt.backends.cpu.choosing import Candidate, Chooser, Workload
from mmopt.backends.cuda.kernels import product
from mmopt.backends.cuda.kernels.product import OTHERS, STATIC_SHARED, TILES, choose_tile, fits, tile_candidates
from mmopt.backends.cuda.kernels.weights import columns_candidates
from mmopt.backends.cuda.pipeline import generate_kernel
from mmopt.backends.profile import load_profile
from mmopt.cli import main
from mmopt.errors import UnsupportedError
from mmopt.lowering.compiler import compile_module
from mmopt.runtime.gpu import present_gpu
from mmopt.runtime.libraries import load_runtime
from tests.cuda_emulator import Emulated, available, kernels_library
from tests.operators import example, numbers
from tests.programs import Example, assert_close, grouped
from tests.unit.test_cuda_artifact import FAT_BINARY, architectures
from tests.unit.test_cuda_attention import attention
from tests.unit.test_cuda_products import exact, quantized, toolkit, with_weight

emulated = pytest.mark.skipif(not available, reason="needs g++, to compile what a GPU would run")
no_gpu = pytest.mark.skipif(present_gpu() is not None, reason="a GPU is here")


class Each(Chooser):
    """Takes one candidate after the other, each time that it is asked."""

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.order, self.asked = order, 0

    def choose(self, workload: Workload, candidates: Sequence[Candidate]) -> Candidate:
        super().choose(workload, candidates)
        self.asked += 1
        return candidates[self.order[(self.asked - 1) % len(self.order)] % len(candidates)]


def answers(case: Example, order: Sequence[int]) -> list[np.ndarray]:
    """The answer with each of the candidates ``order`` names, all of them emulated."""
    chooser = Each(order)
    names = ["main", *(f"entry{n}" for n in range(1, len(order)))]
    made = Emulated({name: grouped(case.model) for name in names}, chooser=chooser, batched=False)
    assert chooser.asked == len(order)
    kernels = [k for k in made.builder.kernels.values() if "workload" in k]
    assert len({json.dumps(k["parameters"]) for k in kernels}) >= min(len(order), 2)
    return [next(iter(made.run(case.feeds, name).values())) for name in names]


# -- what is offered -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float16", "float32", "int8"])
@pytest.mark.parametrize("target", ["cuda-sm75", "cuda-sm80", "cuda-sm90"])
def test_the_predicted_tile_is_first_and_the_one_taken_unmeasured(kind: str, target: str) -> None:
    profile = load_profile(target)
    for m, n, k, batch in ((1, 768, 768, 1), (128, 768, 768, 1), (4096, 4096, 512, 1), ("?", 3072, 768, "?")):
        offered = tile_candidates((m, n, k), batch, kind, profile)
        first = choose_tile(m, n, batch, profile.cores, kind)
        assert offered[0][1] == first
        workload = Workload("tensor_product", (), (kind,))
        assert Chooser().choose(workload, [candidate for candidate, _ in offered]) is offered[0][0]
        assert len({identity(candidate.parameters) for candidate, _ in offered}) == len(offered) >= 10
        for candidate, tile in offered:
            assert candidate.cycles > 0
            assert tile.shared <= STATIC_SHARED
            assert tile.threads * (tile.mt * tile.nt * 4) < profile.multiprocessor_registers
            assert tile.mt * tile.nt <= (8 if kind == "float32" else 16)


def test_tiles_that_do_not_fit_are_not_offered() -> None:
    profile = load_profile("cuda-sm80")
    large = max((*TILES, *OTHERS), key=lambda tile: tile.threads)
    assert fits(large, "float16", profile)
    assert not fits(large, "float16", dataclasses.replace(profile, multiprocessor_registers=32 << 10))
    assert not fits(large, "float16", dataclasses.replace(profile, shared_bytes=large.shared - 1))
    assert not fits(dataclasses.replace(large, stages=8), "float16", profile)


def test_columns_of_few_rows() -> None:
    profile = load_profile("cuda-sm90")
    for rows, n, best, all_ in ((1, 50000, 4, {4, 2, 1}), (8, 50000, 2, {2, 1}), (1, 768, 1, {4, 2, 1})):
        offered = columns_candidates(rows, (n, 768), 16, profile)
        assert {c.number("columns") for c in offered} == all_
        assert min(offered, key=lambda c: c.cycles).number("columns") == best


# -- answers ---------------------------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("order", [(0, 6, 9, 14), pytest.param(range(24), marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_tile_gives_the_same_bits(order: Sequence[int]) -> None:
    ragged = with_weight(
        example(
            "t = MatMul (x, w) y = Relu (t)",
            {"x": numbers(70, 200, dtype="float16"), "w": numbers(200, 90, dtype="float16", seed=1)},
        )
    )
    for case in (ragged, exact(35, 40, 72, "float16")):
        first, *others = answers(case, order)
        assert np.any(first)
        assert all(np.array_equal(first, other) for other in others)


@emulated
def test_the_same_bits_of_floats_integers_and_convolutions() -> None:
    convolution = with_weight(
        example("y = Conv <pads = [1, 1, 1, 1]> (x, w)", {"x": numbers(1, 6, 9, 9), "w": numbers(40, 6, 3, 3)})
    )
    for case in (
        with_weight(example("y = MatMul (x, w)", {"x": numbers(33, 300), "w": numbers(300, 20, seed=1)})),
        quantized(20, 30, 100, dtype=np.int8, zero=-11, columns=True),
        convolution,
    ):
        first, *others = answers(case, (0, 5, 9))
        assert np.any(first)
        assert all(np.array_equal(first, other) for other in others)
        assert_close(first, case.expected()[0], 3e-6)


@emulated
def test_few_rows_give_the_same_bits_and_attention_the_same_numbers() -> None:
    rows = with_weight(example("y = MatMul (x, w)", {"x": numbers(3, 64), "w": numbers(64, 70, seed=1)}))
    first, *others = answers(rows, range(3))
    assert all(np.array_equal(first, other) for other in others)
    heads = attention((1, 2, 70, 32), (1, 2, 100, 32), causal=True)
    for answer in answers(heads, range(3)):
        assert_close(answer, heads.expected()[0], 1e-5)


# -- how calls are got ready; the emulator's own memory and graphs take the place of a GPU's -------------------------


@emulated
def test_recorded_calls_read_other_weights_each_time_and_do_all_their_work(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = with_weight(example("y = MatMul (x, w)", {"x": numbers(16, 32), "w": numbers(32, 20, seed=1)}))
    profile = load_profile("cuda-sm80")
    model = LoweredModel({"main": mmopt.Module(ir.from_proto(case.model))}, profile)
    ((key, space),) = model.spaces.items()
    (code,) = model.kernels(key, space.predicted.parameters)
    made = generate_kernel(tvm.ir.load_json(code.function), profile, emulated=True)
    host = made.executable.mod
    host.clear_imports()
    host.import_module(kernels_library(made.source, tmp_path))
    monkeypatch.setattr(measuring, "_MOST_COPIES", 3)
    ffi = load_runtime([])
    memory = measuring.DeviceMemory(ffi, ctypes.CDLL(str(tmp_path / "kernels.so")), ffi.device("cpu", 0))
    lists = memory.calls(code.arguments)
    seen = list(itertools.islice(lists, 4))
    assert len({arguments[1].data_ptr() for arguments in seen}) == 3  # the fourth call has the weights of the first
    assert len({arguments[0].data_ptr() for arguments in seen}) == 1
    x, w, y = (np.from_dlpack(tensor) for tensor in seen[0])
    launched = []

    def kernel(*arguments: object) -> None:
        launched.append(arguments)
        host["kernel"](*arguments)

    row = memory.row(kernel, lists, 5)
    assert len(launched) == 5
    assert not y.any()  # recorded, and nothing has run
    row()
    memory.wait()
    assert len(launched) == 5  # one call repeats them
    np.testing.assert_allclose(y, x @ w[:20, :32].T, rtol=2e-5)
    y[...] = 0
    row()
    assert y.any()
    memory.row(kernel, lists, 1)()
    assert len(launched) == 6  # what is called once is not worth a recording


@emulated
def test_calls_that_cannot_be_recorded_are_launched(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = Emulated(grouped(example("y = Exp (x)", {"x": numbers(40)}).model))
    ffi = load_runtime([])
    memory = measuring.DeviceMemory(ffi, ctypes.CDLL(str(made.kernels)), ffi.device("cpu", 0))
    recorder = memory.recorder
    assert recorder is not None
    done = []

    def wrong(value: int) -> None:  # ends the recording, as a call does that may not be recorded
        done.append(value)
        if len(done) == 1:
            recorder.call("cudaStreamEndCapture", ctypes.c_void_p(recorder.stream), ctypes.byref(ctypes.c_void_p()))

    row = memory.row(wrong, iter([[1], [2]]), 2)
    assert "calls are launched one by one: cudaStreamEndCapture failed" in capfd.readouterr().err
    assert memory.recorder is None
    done.clear()
    done.append(0)
    row()
    assert done == [0, 1, 2]


# -- out to a machine with a GPU, and back ---------------------------------------------------------------------------

TARGET = "cuda-sm90"


def model_file(folder: pathlib.Path) -> pathlib.Path:
    """A product of half precision with an epilogue, and one of few rows."""
    case = example(
        "t = MatMul (x, w) y = Relu (t)",
        {"x": numbers(64, 64, dtype="float16"), "w": numbers(64, 96, dtype="float16", seed=1)},
    )
    onnx.save(with_weight(case).model, folder / "model.onnx")
    return folder / "model.onnx"


def run(*arguments: object) -> int:
    return main.run([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An exported folder."""
    folder = tmp_path_factory.mktemp("cuda")
    code = run("tune", model_file(folder), "--target", TARGET, "--export", folder / "away", "--trials", 4, "--jobs", 1)
    assert code == 0
    return folder / "away"


@toolkit
def test_exported_candidates_are_machine_code_for_the_gpu(away: pathlib.Path) -> None:
    meta = json.loads((away / "meta.json").read_text())
    assert (meta["target"]["kind"], meta["target"]["sm"]) == ("cuda", 90)
    assert meta["scope"]["threads"] == 1
    tasks = [json.loads(line) for line in (away / "tasks.jsonl").read_text().splitlines()]
    assert {task["device"] for task in tasks} == {"cuda"}
    (task,) = tasks
    assert task["workload"].startswith("tensor_product(batch=1,m=64,n=96,k=64,read=rows_by_rows)")
    profile = load_profile(TARGET)
    predicted = choose_tile(64, 96, 1, profile.cores, "float16")
    assert task["candidates"][0]["parameters"] == dict(predicted.choice)
    assert len(task["candidates"]) == 4
    for candidate in task["candidates"]:
        (kernel,) = candidate["kernels"]
        data = (away / kernel["library"]).read_bytes()
        assert data.startswith(b"\x7fELF")
        assert data.count(FAT_BINARY) == 1
        assert architectures(data) == [90]
        assert b"__global__" not in data  # no source text that would need a compiler
        assert [(a["role"], a["dtype"], a["shape"]) for a in kernel["arguments"]] == [
            ("input", "float16", [64, 64]),
            ("weight", "float16", [96, 64]),
            ("output", "float16", [64, 96]),
        ]
    assert "nvidia-cuda-runtime" in (away / "README.txt").read_text()
    assert (away / "runtime" / "libtvm_runtime_cuda.so").is_file()


@toolkit
@no_gpu
def test_measuring_without_a_gpu_says_so(away: pathlib.Path, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "results.jsonl"
    command = [sys.executable, str(away / "measure.py"), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "these candidates are for cuda-sm90; there is no NVIDIA GPU here, or no driver for it"
    )
    assert not output.exists()


@no_gpu
def test_tuning_without_a_gpu_says_what_to_do(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tune", model_file(tmp_path), "--target", TARGET, "--database", tmp_path / "t.jsonl") != 0
    told = capsys.readouterr().err
    assert "there is no NVIDIA GPU here" in told
    assert "--export FOLDER" in told
    module = mmopt.load(tmp_path / "model.onnx")
    with pytest.raises(UnsupportedError, match="no NVIDIA GPU here"):
        tune({"main": module}, load_profile(TARGET), Database(tmp_path / "t.jsonl"), Budget(1))


@toolkit
def test_results_that_come_back_change_what_is_compiled(away: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (task,) = [json.loads(line) for line in (away / "tasks.jsonl").read_text().splitlines()]
    meta = json.loads((away / "meta.json").read_text())
    times = [1e-5, 2e-5, 6e-6, None]
    line = {**meta, "task": 0, "workload": task["workload"], "threads": 1, "machine": "NVIDIA H100"}
    line["results"] = [
        {"parameters": c["parameters"], **({"error": "the process died"} if t is None else {"seconds": t})}
        for c, t in zip(task["candidates"], times, strict=True)
    ]
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    database = tmp_path / "t.jsonl"
    assert run("tune", "--import", tmp_path, "--database", database) == 0
    best = task["candidates"][2]["parameters"]
    assert Database(database).best(Scope.of(load_profile(TARGET), 1), task["workload"]) == best
    assert line["scope"]["kernels"] == kernel_version()

    common = ("--target", TARGET, "-q", "--database", database, "--tune-minutes", 0)
    chosen = {}
    for name, options in (("o2", ("--target", TARGET, "-q")), ("o3", ("-O3", *common))):
        assert run("optimize", model_file(tmp_path), *options, "-o", tmp_path / name) == 0
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        (chosen[name],) = [kernel for kernel in manifest["kernels"] if "workload" in kernel]
    assert chosen["o2"]["choice"] == task["candidates"][0]["parameters"]
    assert chosen["o3"]["choice"] == best
    assert (chosen["o2"]["measured"], chosen["o3"]["measured"]) == (False, True)
    assert chosen["o3"]["parameters"]["stages"] == best["stages"]
    assert architectures((tmp_path / "o3" / "lib.so").read_bytes()) == [90]


@toolkit
def test_candidates_without_registers_enough_are_out_but_for_the_one_to_compare_with(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "TILES", (product.Tile(1, 2, 8, 8, 2, 1.0),))  # 256 sums a thread, of 255 registers
    profile = load_profile("cuda-sm80")
    module = mmopt.Module(ir.from_proto(exact(64, 64, 64, "float16").model))
    model = LoweredModel({"main": module}, profile)
    ((key, space),) = model.spaces.items()
    parameters = space.predicted.parameters
    codes = model.kernels(key, parameters)
    with Builders(profile, tmp_path, 1) as builders:
        first, second = build_candidates([(parameters, codes), (parameters, codes)], builders)
    assert first["error"] == ""
    assert architectures((tmp_path / first["kernels"][0]["library"]).read_bytes()) == [80]
    assert "do not find a register" in second["error"]


def test_a_program_names_its_choices() -> None:
    module = mmopt.Module(ir.from_proto(exact(64, 64, 64, "float16").model))
    (kernel,) = compile_module(module, load_profile("cuda-sm80")).kernels
    assert kernel["workload"].startswith("tensor_product(")
    assert kernel["candidates"] > 10
    assert kernel["operations"] == 2 * 64**3
