"""Whole models compiled for Arm processors, and run by the C++ runner under emulation."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnxruntime
import pytest

from benchmarks.zoo import ZOO
from mmopt.backends.profile import load_profile
from mmopt.building import build_artifact
from mmopt.cli import main
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.fuse.fuse_groups import FuseGroups
from mmopt.transforms.quantize import recurrent_layers
from tests.arm.emulation import emulate, needs_emulation, run_artifact
from tests.programs import Example, assert_close, grouped
from tests.small_models import two_layers
from tests.unit import (
    test_conv_narrow,
    test_kernel_conv,
    test_kernel_matmul,
    test_kernel_recurrent,
    test_narrow_products,
)
from tests.unit import test_kernel_recurrent_integers as recurrent_integers
from tests.unit.test_kernel_conv import Geometry

pytestmark = [pytest.mark.arm, needs_emulation]

TARGETS = ["cortex-a76", "armv8.0"]
BATCHES = {"all-minilm-l6": 2}
"""Models whose single-item form has nothing to mix up."""

TOLERANCE = 1e-4
"""Largest error allowed, as a fraction of an output's range."""


def onnxruntime_answers(model: pathlib.Path, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


@pytest.mark.parametrize("name", list(ZOO))
def test_reference_models(name: str, tmp_path: pathlib.Path) -> None:
    model = ZOO[name]
    if why := model.missing():
        pytest.skip(why)
    batch = BATCHES.get(name, 1)
    path, feeds = model.export(tmp_path, batch=batch), model.inputs(batch=batch)
    want = onnxruntime_answers(path, feeds)
    for target in TARGETS:
        artifact = tmp_path / f"{target}.mmopt"
        assert main.run(["optimize", str(path), "--target", target, "-o", str(artifact), "-q"]) == 0
        got = run_artifact(target, artifact, feeds)
        for output, expected in want.items():
            assert_close(got[output], expected, TOLERANCE)


def models_agree(
    examples: list[Example],
    target: str,
    folder: pathlib.Path,
    prepare: Callable[[onnx.ModelProto], Module] = grouped,
    tolerance: float | None = None,
) -> None:
    """Compile all ``examples`` into one artifact, an entry point each, and compare what each gives."""
    modules = {f"entry{n}": prepare(example.model) for n, example in enumerate(examples)}
    artifact = folder / "examples.mmopt"
    first, *_ = modules.values()
    build_artifact(first, load_profile(target), artifact, entries=modules)
    wrong = []
    for number, example in enumerate(examples):
        got = run_artifact(target, artifact, example.feeds, "--entry", f"entry{number}")
        for value, expected in zip(example.model.graph.output, example.expected(), strict=True):
            try:
                assert_close(got[value.name], expected, tolerance)
            except AssertionError as error:
                wrong.append(f"{example.name}: {error}")
    assert not wrong, f"{len(wrong)} of {len(examples)} on {target}:\n" + "\n".join(wrong)


def integer_convolutions() -> list[Example]:
    """Both signs, groups, strides, padding, one channel at a time; integer operators and dequantized operands."""
    shapes = [
        Geometry((1, 64, 9, 9), (64, 64, 3, 3), pads=(1, 1, 1, 1)),
        Geometry((2, 3, 12, 12), (32, 3, 3, 3), strides=(2, 2), pads=(1, 1, 1, 1)),
        Geometry((1, 32, 6, 5), (32, 1, 3, 3), groups=32, pads=(1, 1, 1, 1)),
        Geometry((1, 20, 7), (12, 20, 3), pads=(1, 0)),
    ]
    kinds = [("uint8", "int8"), ("int8", "int8")]
    made = [test_conv_narrow.conv_integer(g, kind, x_zero=3, w_zero=None) for g in shapes for kind in kinds]
    return made + [test_conv_narrow.dequantized(g, per_channel=True, bias=True) for g in shapes]


def all_integer_convolutions() -> list[Example]:
    """Every geometry there is, with a zero point that padding has to count as."""
    return [test_conv_narrow.conv_integer(g, ("uint8", "int8"), 117, None) for g in test_conv_narrow.geometries()]


FAMILIES: dict[str, Callable[[], list[Example]]] = {
    "quantized products": test_narrow_products.quantized,
    "integer products": test_narrow_products.integer_operators,
    "integer convolutions": integer_convolutions,
    "all integer convolutions": all_integer_convolutions,
    "narrow floats": test_narrow_products.halves,
    "stored weights": test_narrow_products.stored,
    "convolutions": lambda: [*test_kernel_conv.ranks(), *test_kernel_conv.channels(), *test_kernel_conv.groups()],
    "branches": test_kernel_conv.branches,
    "products": test_kernel_matmul.operators,
}


@pytest.mark.parametrize("target", [*TARGETS, "neoverse-v1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_operators(family: str, target: str, tmp_path: pathlib.Path) -> None:
    models_agree(FAMILIES[family](), target, tmp_path)


@pytest.mark.parametrize("target", [*TARGETS, "neoverse-v1"])
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_convolutions_of_narrow_floats(kind: str, target: str, tmp_path: pathlib.Path) -> None:
    """Neoverse V1's instruction rounds each pair of products by itself, and drops the smallest numbers."""
    shapes = [
        Geometry((1, 32, 9, 9), (48, 32, 3, 3), pads=(1, 1, 1, 1)),
        Geometry((2, 3, 12, 12), (32, 3, 3, 3), strides=(2, 2), pads=(1, 1, 1, 1)),
    ]
    examples = [test_conv_narrow.rounded_example(g, kind) for g in shapes]
    models_agree(examples, target, tmp_path, lambda model: test_conv_narrow.narrowed(model, kind), 1e-5)


@pytest.mark.parametrize("target", [*TARGETS, "neoverse-v1"])
def test_recurrences_in_integers(target: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is that of integer arithmetic, with each processor's way to multiply bytes."""
    monkeypatch.setattr(recurrent_layers, "SMALLEST_HIDDEN", 16)
    layers = recurrent_integers.layers()
    modules = [recurrent_integers.quantized(layer) for layer in layers]
    entries = {f"entry{number}": module.clone() for number, module in enumerate(modules)}
    for entry in entries.values():
        FuseGroups().run(entry, PassContext())
    artifact = tmp_path / "layers.mmopt"
    build_artifact(entries["entry0"], load_profile(target), artifact, entries=entries)
    wrong = []
    for (name, entry), module, layer in zip(entries.items(), modules, layers, strict=True):
        arrays = test_kernel_recurrent.tensors(layer)
        feeds = {str(v.name): arrays[str(v.name)] for v in module.graph.inputs}
        made = run_artifact(target, artifact, feeds, "--entry", name)
        got = [made[str(value.name)] for value in entry.graph.outputs]
        want = recurrent_integers.step_by_step(module, layer, got[0].astype(np.float64))
        errors = [float(np.abs(a - b).max()) for a, b in zip(got, want, strict=True)]
        if max(errors) > 2e-5:
            wrong.append(f"{layer}: {errors}")
    assert not wrong, f"{len(wrong)} of {len(layers)} on {target}:\n" + "\n".join(wrong)


def test_one_artifact_for_several_processors(tmp_path: pathlib.Path) -> None:
    """The runner takes the first target that the processor can run, and refuses when there is none."""
    model = two_layers(tmp_path / "model.onnx")
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)}
    np.savez(tmp_path / "x.npz", **feeds)
    want = onnxruntime_answers(model, feeds)
    for options, runs in ((["--multi-isa"], True), ([], False)):
        artifact = tmp_path / f"{len(options)}.mmopt"
        compile = ["optimize", str(model), "--target", "cortex-a76", "-o", str(artifact), "-q", *options]
        assert main.run(compile) == 0
        assert_close(run_artifact("cortex-a76", artifact, feeds)["y"], want["y"], TOLERANCE)
        done = emulate("cortex-a72", "mmopt-run", str(artifact), "--inputs", str(tmp_path / "x.npz"))
        assert (done.returncode == 0) == runs, done.stderr
        assert runs or "asimddp" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "x=short.npy"], "the input x is float32[3,15], not float32[batch,16]"),
        (["--input", "y=x.npy", "--input", "x=x.npy"], "there is no input y"),
        ([], "the input x is missing"),
        (["--entry", "mian"], "there is no entry point mian; there are: main"),
        (["--input", "x=turned.npy"], "Fortran order"),
        (["--inputs", "packed.npz"], "it is compressed"),
        (["--input", "x=nothing.npy"], "it cannot be read"),
        (["--threads", "two"], "--threads wants a number"),
    ],
)
def test_the_runner_says_what_is_wrong(
    options: list[str], message: str, small: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small)
    done = emulate("cortex-a76", "mmopt-run", "small.mmopt", *options)
    assert done.returncode in (2, 4)
    assert message in done.stderr


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with an artifact and inputs that do and do not fit."""
    folder = tmp_path_factory.mktemp("small")
    model = two_layers(folder / "model.onnx")
    assert main.run(["optimize", str(model), "--target", "cortex-a76", "-o", str(folder / "small.mmopt"), "-q"]) == 0
    x = np.ones((3, 16), np.float32)
    np.save(folder / "x.npy", x)
    np.save(folder / "short.npy", x[:, 1:].copy())
    np.save(folder / "turned.npy", np.asfortranarray(x))
    np.savez_compressed(folder / "packed.npz", x=x)
    return folder


def test_the_runner_writes_what_it_tells(small: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Into a folder too; an incomplete artifact is refused."""
    arguments = ["--input", f"x={small / 'x.npy'}", "--repeat", "3", "--threads", "1"]
    done = emulate("cortex-a76", "mmopt-run", str(small / "small.mmopt"), *arguments, "-o", f"{tmp_path}/made/")
    assert done.returncode == 0, done.stderr
    assert "y: float32[3,4]" in done.stdout
    assert "3 runs: median" in done.stdout
    want = onnxruntime_answers(small / "model.onnx", {"x": np.load(small / "x.npy")})
    assert_close(np.load(tmp_path / "made" / "y.npy"), want["y"], TOLERANCE)
    shutil.copytree(small / "small.mmopt", tmp_path / "cut.mmopt")
    library = tmp_path / "cut.mmopt" / "lib.so"
    library.write_bytes(library.read_bytes()[:-1])
    done = emulate("cortex-a76", "mmopt-run", str(tmp_path / "cut.mmopt"), *arguments)
    assert done.returncode == 4
    assert "it is not complete" in done.stderr
