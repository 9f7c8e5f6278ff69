"""Compiling for a GPU on a machine without one: what is inside the artifact, and who may load it."""

from __future__ import annotations

import importlib.util
import pathlib
import struct

import numpy as np
import onnx_ir as ir
import pytest
import tvm_ffi

from mmopt.backends.cuda.compiler import compile_source, fat_binary
from mmopt.backends.cuda.pipeline import with_image
from mmopt.backends.cuda.resources import Resources, described, launcher, occupancy, parse_resources
from mmopt.backends.levels import levels_below
from mmopt.backends.profile import GPU_ASSUMED, cuda_profile, load_profile, read_profile
from mmopt.building import build_artifact
from mmopt.cli.main import run
from mmopt.errors import BackendError, UnsupportedError, UserError
from mmopt.ir.module import Module
from mmopt.runtime import load_artifact
from mmopt.runtime.device import DeviceConverter, labelled
from mmopt.runtime.gpu import present_gpu
from mmopt.runtime.libraries import load_runtime
from tests.operators import example, numbers

toolkit = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("cuda") is None,
    reason="needs NVIDIA's compiler: pip install 'mmopt[cuda]'",
)
EM_CUDA = 190
FAT_BINARY = struct.pack("<I", 0xBA55ED50)


def architectures(data: bytes) -> list[int]:
    """Compute capabilities of the cubins in ``data``, as 10 · major + minor."""
    found, at = [], data.find(FAT_BINARY)
    while (at := data.find(b"\x7fELF", at + 1)) >= 0:
        machine, flags = struct.unpack_from("<H", data, at + 18)[0], struct.unpack_from("<I", data, at + 48)[0]
        if machine == EM_CUDA:
            found.append(flags >> 8 & 0xFF)
    return found


def small_module() -> Module:
    case = example("t = MatMul (x, w) y = Softmax <axis = -1> (t)", {"x": numbers(4, 8), "w": numbers(8, 6)})
    return Module(ir.from_proto(case.model))


@toolkit
@pytest.mark.parametrize("target", ["cuda-sm80", pytest.param("cuda-sm90", marks=pytest.mark.slow)])
def test_artifact_holds_machine_code_of_its_architecture(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    made = build_artifact(small_module(), load_profile(target), tmp_path / "g.mmopt")
    library = (made.path / "lib.so").read_bytes()
    assert library.startswith(b"\x7fELF")
    assert library.count(FAT_BINARY) == 1
    assert architectures(library) == [load_profile(target).sm]
    assert b"__global__" not in library  # no source text
    assert made.manifest.target["kind"] == "cuda"
    for kernel in made.manifest.kernels:
        assert all(part["registers"] > 0 and part["spills"] == 0 and part["occupancy"] > 0 for part in kernel["device"])
    assert made.native
    capsys.readouterr()
    assert run(["inspect", str(made.path), "--kernels"]) == 0
    told = capsys.readouterr().out
    assert "occupancy" in told
    assert all(str(part["registers"]) in told for kernel in made.manifest.kernels for part in kernel["device"])
    if present_gpu() is None:
        assert "no NVIDIA GPU" in made.unverified
        with pytest.raises(UnsupportedError, match="no NVIDIA GPU"):
            load_artifact(made.path)


@toolkit
def test_one_artifact_for_several_gpus(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = load_profile("cuda-sm90")
    made = build_artifact(small_module(), profile, tmp_path / "g.mmopt", further=levels_below(profile))
    libraries = {c.target["name"]: (made.path / c.folder / "lib.so").read_bytes() for c in made.manifest.each()}
    assert {name: architectures(data) for name, data in libraries.items()} == {
        "cuda-sm90": [90],
        "cuda-sm80": [80],
        "cuda-sm75": [75],
    }
    for present, chosen in ((90, "cuda-sm90"), (100, "cuda-sm90"), (89, "cuda-sm80"), (75, "cuda-sm75")):
        monkeypatch.setattr("mmopt.runtime.gpu.present_gpu", lambda sm=present: sm)
        with load_artifact(made.path) as session:
            assert session.manifest.target["name"] == chosen


def test_levels_of_gpus() -> None:
    assert [level.name for level in levels_below(load_profile("cuda-sm89"))] == ["cuda-sm80", "cuda-sm75"]
    assert [level.sm for level in levels_below(load_profile("cuda-sm80"))] == [75]
    with pytest.raises(UserError, match="below target cuda-sm75"):
        levels_below(load_profile("cuda-sm75"))


@toolkit
def test_fat_binary_holds_each_architecture_and_text_for_later_ones() -> None:
    source = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2.0f; }'
    compiled = [compile_source(source, sm) for sm in (75, 86, 90)]
    assert architectures(fat_binary(compiled)) == [75, 86, 90]
    assert all(one.cubin.startswith(b"\x7fELF") for one in compiled)
    assert b".target sm_90" in compiled[-1].ptx
    assert compiled[0].resources["twice"].spills == 0
    assert 0 < compiled[0].resources["twice"].registers <= 255


@toolkit
def test_wrong_source_is_an_error_with_what_the_compiler_says() -> None:
    with pytest.raises(BackendError, match="undefined_thing"):
        compile_source('extern "C" __global__ void f() { undefined_thing(); }', 80)


def test_what_the_assembler_says_is_read() -> None:
    log = """ptxas info    : Compiling entry function 'f' for 'sm_80'
ptxas info    : Function properties for f
    24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 24 bytes cumulative stack size, 2048 bytes smem, 380 bytes cmem[0]
"""
    assert parse_resources(log) == {"f": Resources(registers=40, shared=2048, stack=24, spills=20)}


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "expected"),
    [(32, 0, 256, 1.0), (64, 0, 256, 0.5), (255, 0, 256, 0.125), (32, 80 << 10, 256, 0.25), (16, 0, 32, 0.5)],
)
def test_occupancy_follows_the_allocator(registers: int, shared: int, threads: int, expected: float) -> None:
    assert occupancy(Resources(registers, shared, 0, 0), threads, load_profile("cuda-sm80")) == expected


def test_resources_are_told_of_the_function_that_launches() -> None:
    source = "void __launch_bounds__(128) Conv_1_bare_kernel(float* x) {}\nvoid Conv_1_bare_kernel_2() {}"
    taken = {"Conv_1_bare_kernel": Resources(64, 0, 0, 0), "Conv_1_bare_kernel_2": Resources(16, 0, 8, 4)}
    found = described(taken, source, load_profile("cuda-sm80"))
    assert found == {
        "Conv_1": [
            {"registers": 64, "shared": 0, "stack": 0, "spills": 0, "threads": 128, "occupancy": 0.5},
            {"registers": 16, "shared": 0, "stack": 8, "spills": 4},
        ]
    }
    assert launcher("Softmax_kernel") == "Softmax"


def test_image_takes_the_place_of_text() -> None:
    def string(data: bytes) -> bytes:
        return struct.pack("<Q", len(data)) + data

    module = string(b"cuda") + b"functions" + string(b"text")
    body = b"tree" + string(b"_lib") + string(b"cuda") + string(module) + b"more"
    blob = struct.pack("<Q", len(body)) + body
    packed = with_image(blob, b"image", "text")
    changed = body.replace(string(module), string(string(b"cubin") + b"functions" + string(b"image")))
    assert packed == struct.pack("<Q", len(changed)) + changed
    with pytest.raises(BackendError, match="does not know"):
        with_image(blob, b"image", "another text")
    with pytest.raises(BackendError, match="no CUDA kernels"):
        with_image(blob[:20], b"image", "text")


def test_target_of_the_gpu_at_hand() -> None:
    assert cuda_profile(None).name == GPU_ASSUMED
    assert cuda_profile(87).name == "cuda-sm86"
    assert cuda_profile(120).name == "cuda-sm90"
    with pytest.raises(UserError, match="older than every target"):
        cuda_profile(70)


@pytest.mark.parametrize(("text", "message"), [("sm = 70", "sm is 70"), ("shared_bytes = 65536", "shared_bytes must")])
def test_wrong_gpus_are_named(tmp_path: pathlib.Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'kind = "cuda"\n{text}\n')
    with pytest.raises(UserError, match=message):
        read_profile(path)


def test_table_of_addresses_seems_to_be_on_the_device() -> None:
    table = np.arange(5, dtype=np.int64)
    tensor = labelled(tvm_ffi, table, 2)
    assert tensor.device.dlpack_device_type() == 2
    assert tuple(tensor.shape) == (5,)
    assert tensor.data_ptr() == table.ctypes.data


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "bfloat16"])
def test_arrays_go_to_a_device_and_back(dtype: str) -> None:
    """With the CPU for a device: the same calls of TVM's runtime."""
    converter = DeviceConverter(load_runtime())
    converter.device = tvm_ffi.device("cpu", 0)
    array = numbers(3, 5, dtype=dtype)
    tensor = converter.to_tvm(array)
    assert tensor.data_ptr() != array.ctypes.data
    np.testing.assert_array_equal(converter.to_numpy(tensor), array)
    assert converter.to_numpy(converter.to_tvm(array[:0])).shape == (0, 5)
