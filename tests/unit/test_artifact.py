"""The artifact on disk: layout, hashes, atomic replacement."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from mmopt.errors import LoadError, UserError
from mmopt.runtime import EntryPoint, Program, Segment, TensorSpec, atomic, load_artifact, manifest
from mmopt.runtime.store import open_store
from mmopt.runtime.weights import PADDING, map_weights, write_weights
from mmopt.runtime.writer import write_artifact
from tests import runtime_programs as rp


def write(output: pathlib.Path, program: Program | None = None) -> pathlib.Path:
    with write_artifact(output) as writer:
        writer.add_program(program or rp.program(), config={"level": 2})
        writer.add_json("report.json", {"schema_version": 1})
        writer.commit()
    return output


@pytest.fixture(params=["a.mmopt", "a.mmopt.zip"])
def artifact(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    return write(tmp_path / request.param)


def answer(path: pathlib.Path) -> bool:
    x = np.random.default_rng(3).standard_normal((2, 16)).astype(np.float32)
    return np.allclose(load_artifact(path, threads=1).run({"x": x})["z"], rp.expected_main(x), rtol=1e-5, atol=1e-5)


def test_folder_and_zip_run_alike_and_leave_nothing_else(artifact: pathlib.Path) -> None:
    assert answer(artifact)
    assert os.listdir(artifact.parent) == [artifact.name]


def test_manifest_says_what_is_inside(artifact: pathlib.Path) -> None:
    store = open_store(artifact)
    assert set(store.manifest.files) == {"lib.so", "weights.safetensors", "fallback/relu.onnx", "report.json"}
    store.verify(store.manifest.files)
    assert store.manifest.entries == rp.program().entries
    assert store.manifest.config == {"level": 2}
    assert store.manifest.versions["numpy"] == np.__version__


def test_zip_members_are_stored_and_aligned(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "a.zip")
    store = open_store(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    assert store.extent("weights.safetensors").offset % 64 == 0
    compressed = tmp_path / "compressed.zip"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(LoadError, match="compressed"):
        load_artifact(compressed)


def test_equal_programs_give_equal_bytes(tmp_path: pathlib.Path) -> None:
    assert write(tmp_path / "a.zip").read_bytes() == write(tmp_path / "b.zip").read_bytes()


@pytest.mark.parametrize("name", ["lib.so", "weights.safetensors", "fallback/relu.onnx"])
def test_a_flipped_bit_is_found_on_load(tmp_path: pathlib.Path, name: str) -> None:
    path = write(tmp_path / "a.mmopt")
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(LoadError, match=f"{name} is damaged"):
        load_artifact(path)


def test_files_no_run_reads_are_not_hashed_on_load(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "a.mmopt")
    text = (path / "report.json").read_text()
    (path / "report.json").write_text(text.replace("1", "2"))
    assert answer(path)
    with pytest.raises(LoadError, match=r"report\.json is damaged"):
        open_store(path).verify(["report.json"])


@pytest.mark.parametrize("name", ["lib.so", "report.json"])
@pytest.mark.parametrize("mode", ["full", "size"])
def test_sizes_are_always_checked(tmp_path: pathlib.Path, name: str, mode: str) -> None:
    path = write(tmp_path / "a.mmopt")
    with (path / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(LoadError, match=r"bytes, manifest\.json says"):
        load_artifact(path, verify_hashes=mode)
    (path / name).unlink()
    with pytest.raises(LoadError, match=f"there is no {name}"):
        load_artifact(path, verify_hashes=mode)


def test_long_files_are_checked_by_chunk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "CHUNK", 64)
    path = write(tmp_path / "a.mmopt")
    record = open_store(path).manifest.files["weights.safetensors"]
    assert len(record.chunks) == -(-record.size // 64)
    assert answer(path)
    data = bytearray((path / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "weights.safetensors").write_bytes(data)
    with pytest.raises(LoadError, match=r"weights\.safetensors is damaged"):
        load_artifact(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=99), "schema version 99"),
        (lambda m: m.update(format="other"), "not the manifest of an mmopt artifact"),
        (lambda m: m.pop("entries"), "damaged: KeyError 'entries'"),
        (lambda m: m["files"].update({"../x": {"size": 0, "sha256": ""}}), "leads out of the artifact"),
        (lambda m: m["files"].update({"/etc/passwd": {"size": 0, "sha256": ""}}), "leads out of the artifact"),
    ],
)
def test_a_manifest_that_cannot_be_used(tmp_path: pathlib.Path, change: object, message: str) -> None:
    path = write(tmp_path / "a.mmopt")
    data = json.loads((path / "manifest.json").read_text())
    change(data)  # type: ignore[operator]
    (path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(LoadError, match=message):
        load_artifact(path)


def test_what_is_not_an_artifact(tmp_path: pathlib.Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name, message in [("text", "neither"), ("empty", r"no manifest\.json"), ("absent", "no such file")]:
        with pytest.raises(LoadError, match=message):
            load_artifact(tmp_path / name)


def test_a_failed_write_leaves_the_old_artifact(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "a.mmopt")
    program = rp.program()
    program.fallback_models["fallback/broken.onnx"] = lambda _: (_ for _ in ()).throw(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        write(path, program)
    assert answer(path)
    assert os.listdir(tmp_path) == ["a.mmopt"]


@pytest.mark.parametrize("name", ["a.mmopt", "a.zip"])
@pytest.mark.parametrize("can_exchange", [True, False])
def test_replacing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, name: str, can_exchange: bool) -> None:
    if not can_exchange:
        monkeypatch.setattr(atomic, "exchange", lambda *_: False)
    path = write(tmp_path / name)
    program = rp.program()
    program.notes = ["second"]
    write(path, program)
    assert open_store(path).manifest.notes == ["second"]
    assert answer(path)
    assert os.listdir(tmp_path) == [name]


def test_a_folder_replaces_a_zip_of_the_same_name_and_back(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "a.zip")
    (tmp_path / "a.zip").rename(tmp_path / "a.mmopt")
    assert answer(write(tmp_path / "a.mmopt"))
    assert (tmp_path / "a.mmopt").is_dir()
    (tmp_path / "a.mmopt").rename(tmp_path / "b.zip")
    assert answer(write(tmp_path / "b.zip"))
    assert (tmp_path / "b.zip").is_file()
    assert sorted(os.listdir(tmp_path)) == ["b.zip"]


def test_exchange_is_atomic_on_this_system(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "in_a").touch()
    if not atomic.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("the file system of the temporary folder cannot exchange two folders")
    assert (tmp_path / "b" / "in_a").exists()
    assert not any((tmp_path / "a").iterdir())


def test_leftovers_of_killed_runs_go_and_running_ones_stay(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "a.mmopt"
    dead = tmp_path / ".a.mmopt.0123abcd.partial"
    dead.mkdir()
    (dead / "lib.so").touch()
    stranger = tmp_path / ".a.mmopt.notes"
    stranger.mkdir()
    with write_artifact(output) as other:
        alive = other.folder
        write(output)
        assert alive.exists()
    assert sorted(os.listdir(tmp_path)) == [".a.mmopt.notes", "a.mmopt"]


def test_an_output_caught_between_two_renames_comes_back(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "a.mmopt")
    path.rename(tmp_path / ".a.mmopt.0123abcd.replaced")
    atomic.clean_up(path)
    assert answer(path)


def test_other_peoples_files_are_not_replaced(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("text")
    (tmp_path / "mine.zip").write_text("text")
    for name in ("mine", "mine.zip"):
        with pytest.raises(UserError, match="not an artifact of mmopt"):
            write(tmp_path / name)
    assert (folder / "thesis.txt").read_text() == "text"
    with pytest.raises(UserError, match="there is no folder"):
        write(tmp_path / "absent" / "a.mmopt")
    assert not (tmp_path / "absent").exists()


def test_an_empty_folder_may_be_used(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.mmopt").mkdir()
    assert answer(write(tmp_path / "a.mmopt"))


def test_names_may_not_lead_out(tmp_path: pathlib.Path) -> None:
    with write_artifact(tmp_path / "a.mmopt") as writer, pytest.raises(ValueError, match="leads out"):
        writer.add("../evil", b"")


def many_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {
        "odd": rng.integers(0, 255, 7, np.uint8),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.5),
        "bool": np.array([True, False]),
        "half": rng.standard_normal((3, 5)).astype(np.float16),
        "bf16": rng.standard_normal(9).astype(ml_dtypes.bfloat16),
        "fp8": rng.standard_normal(9).astype(ml_dtypes.float8_e4m3fn),
        "strided": rng.standard_normal((4, 6))[:, ::2],
        "big-endian": np.arange(5, dtype=">i4"),
        "int64": np.arange(3),
    }
    return weights


def test_weights_are_aligned_and_read_by_the_formats_own_library(tmp_path: pathlib.Path) -> None:
    path, weights = tmp_path / "w.safetensors", many_weights()
    write_weights(weights, path)
    mapped = map_weights(path)
    assert set(mapped) == set(weights)
    for name, array in weights.items():
        assert mapped[name].ctypes.data % 64 == 0, name
        np.testing.assert_array_equal(mapped[name].astype(np.float64), array.astype(np.float64))
        assert mapped[name].dtype == array.dtype.newbyteorder("=")
    readable = {name: array for name, array in weights.items() if name not in ("bf16", "fp8")}
    with safe_open(path, "np") as file:
        assert set(file.keys()) - {name for name in file.keys() if name.startswith(PADDING)} == set(weights)  # noqa: SIM118
        for name, array in readable.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)


def test_dtypes_the_format_lacks(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "w.safetensors"
    weights = {"c": np.array([1 + 2j, 3]), "i4": np.array([[1, -2, 3]], ml_dtypes.int4)}
    write_weights(weights, path)
    mapped = map_weights(path)
    np.testing.assert_array_equal(mapped["c"], weights["c"])
    np.testing.assert_array_equal(mapped["i4"].astype(np.int8), [[1, -2, 3]])
    assert mapped["i4"].dtype == ml_dtypes.int4
    assert load_file(path)["c"].dtype == np.uint8


def test_weights_of_other_writers_can_be_mapped(tmp_path: pathlib.Path) -> None:
    from safetensors.numpy import save_file

    arrays = {"a": np.arange(3, dtype=np.int8), "b": np.arange(5.0)}
    save_file(arrays, tmp_path / "w.safetensors")
    for name, array in map_weights(tmp_path / "w.safetensors").items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:4],
        lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
        lambda data: data[:-64],
        lambda data: data.replace(b'"shape":[7]', b'"shape":[9]'),
        lambda data: data.replace(b'"U8"', b'"Q9"'),
        lambda data: data.replace(b'{"odd"', b'["odd"'),
    ],
    ids=["short", "header", "cut", "shape", "dtype", "json"],
)
def test_damaged_weights_are_refused(tmp_path: pathlib.Path, damage: object) -> None:
    path = tmp_path / "w.safetensors"
    write_weights(many_weights(), path)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(LoadError):
        map_weights(path)


def test_writing_into_a_mapped_weight_leaves_the_file_alone(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "w.safetensors"
    write_weights(many_weights(), path)
    before = path.read_bytes()
    map_weights(path)["int64"][0] = 99
    assert path.read_bytes() == before


def test_an_artifact_can_carry_the_runtime(tmp_path: pathlib.Path) -> None:
    from mmopt.runtime.libraries import installed_libraries

    program = rp.program()
    for library in installed_libraries():
        program.fallback_models[f"runtime/{library.name}"] = library
    path = write(tmp_path / "a.mmopt", program)
    assert (path / "runtime" / "libtvm_runtime.so").exists()
    assert answer(path)


def test_specs_survive_the_manifest() -> None:
    entry = EntryPoint(
        "main",
        (TensorSpec("x", "float32", ("n", 3)), TensorSpec("s", "string", None, "sequence")),
        (TensorSpec("y", "bool", ()),),
        (Segment("native", ("x",), ("y",), "f", ("w",)),),
    )
    assert EntryPoint.from_json(json.loads(json.dumps(entry.to_json()))) == entry
    assert str(entry.inputs[0]) == "float32[n, 3]"
    assert str(entry.inputs[1]) == "sequence(string[…])"


def test_moving_an_artifact_changes_nothing(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "a.mmopt")
    shutil.move(path, tmp_path / "b")
    assert answer(tmp_path / "b")
