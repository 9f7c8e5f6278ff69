"""The runtime: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto

from mmopt.errors import BackendError, LoadError, UnsupportedError, UserError
from mmopt.runtime import EntryPoint, Program, Segment, TensorSpec, load_artifact, native
from mmopt.runtime.session import Session
from mmopt.runtime.writer import write_artifact
from tests import runtime_programs as rp


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("artifact") / "small.mmopt"
    with write_artifact(path) as writer:
        writer.add_program(rp.program())
        writer.commit()
    return path


@pytest.fixture(scope="module")
def session(artifact: pathlib.Path) -> Session:
    return load_artifact(artifact, threads=2)


def fallback_only(tmp_path: pathlib.Path, spec_in: TensorSpec, spec_out: TensorSpec, model: bytes) -> Session:
    entry = EntryPoint("main", (spec_in,), (spec_out,), (Segment("onnxruntime", ("h",), ("y",), model="m.onnx"),))
    program = Program(None, {}, {"main": entry}, {"m.onnx": model}, {"name": "any"})
    with write_artifact(tmp_path / "f.mmopt") as writer:
        writer.add_program(program)
        writer.commit()
    return load_artifact(tmp_path / "f.mmopt", threads=1)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("batch", [1, 3, 17])
def test_segments_of_both_engines_make_one_answer(session: Session, batch: int) -> None:
    x = random(batch, 16)
    outputs = session.run({"x": x})
    assert list(outputs) == ["z"]
    np.testing.assert_allclose(outputs["z"], rp.expected_main(x), rtol=1e-5, atol=1e-5)


def test_entry_points_share_one_mapping_of_the_weights(session: Session) -> None:
    x = random(2, 16)
    np.testing.assert_allclose(
        session.entry("encode").run({"x": x})["h"], x @ rp.WEIGHT + rp.BIAS, rtol=1e-5, atol=1e-5
    )
    session.run({"x": x})
    weights = session.native._weights
    tensors = session.native._tensors
    assert tensors["weight"].data_ptr() == weights["weight"].ctypes.data


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: x[::-1][::-1],
        lambda x: x.astype(">f4"),
        lambda x: np.frombuffer(x.tobytes(), np.float32).reshape(x.shape),
        lambda x: np.ndarray(x.shape, np.float32, b"ab" + x.tobytes(), offset=2),
        lambda x: np.broadcast_to(x[:1], (3, 16)),
    ],
    ids=["plain", "fortran", "strided", "reversed", "big-endian", "read-only", "unaligned", "broadcast"],
)
def test_any_layout_of_an_input(session: Session, change: object) -> None:
    x = change(random(3, 16))  # type: ignore[operator]
    np.testing.assert_allclose(
        session.run({"x": x})["z"], rp.expected_main(np.asarray(x, np.float32)), rtol=1e-5, atol=1e-5
    )
    tensor = session.native.convert.to_tvm(x)
    assert tensor.data_ptr() % 64 == 0, "kernels load whole vectors"
    np.testing.assert_array_equal(session.native.convert.to_numpy(tensor), x)


def test_empty_batch(session: Session) -> None:
    assert session.run({"x": random(0, 16)})["z"].shape == (0, 8)
    assert session.entry("encode").run({"x": random(0, 16)})["h"].shape == (0, 8)


def test_dtypes_numpy_does_not_know_and_scalars(session: Session) -> None:
    x, ids = rp.bfloat16([1, -2.5, 3]), np.arange(4)
    outputs = session.entry("echo").run({"x": x, "flag": np.array(True), "ids": ids})
    assert outputs["same"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(outputs["same"].astype(np.float32), [1, -2.5, 3])
    assert outputs["not_flag"].shape == ()
    assert not outputs["not_flag"]
    np.testing.assert_array_equal(outputs["twice"], [0, 2, 4, 6])
    scalar = session.entry("echo").run({"x": x, "flag": np.bool_(False), "ids": ids})
    assert scalar["not_flag"]


def test_outputs_are_fresh_and_stay_valid(session: Session) -> None:
    x, ids = rp.bfloat16([1, 2, 3]), np.arange(3)
    echo = session.entry("echo")
    first = echo.run({"x": x, "flag": np.array(True), "ids": ids})
    first["same"][0], first["ids"][0] = 9, 9
    assert float(x[0]) == 1, "an output that passes an input through must not share its memory"
    assert ids[0] == 0
    kept = {name: value.copy() for name, value in first.items()}
    for other in range(5):
        echo.run({"x": rp.bfloat16([other] * 3), "flag": np.array(False), "ids": np.full(3, other)})
    for name, value in first.items():
        np.testing.assert_array_equal(value, kept[name])


def test_aligned_arrays_are_not_copied(session: Session) -> None:
    from mmopt.runtime.tensors import aligned_empty

    x = aligned_empty(3 * 16 * 4).view(np.float32).reshape(3, 16)
    convert = session.native.convert
    assert convert.to_tvm(x).data_ptr() == x.ctypes.data
    x.flags.writeable = False
    assert convert.to_tvm(x).data_ptr() == x.ctypes.data


def test_a_result_that_is_an_input_is_copied(session: Session) -> None:
    from mmopt.runtime.tensors import aligned_empty

    x = aligned_empty(4 * 4).view(np.float32)
    x[:] = [1, 2, 3, 4]
    same = session.entry("mirror").run({"x": x})["same"]
    assert not np.shares_memory(same, x)
    np.testing.assert_array_equal(same, [1, 2, 3, 4])


def test_dlpack_tensors(session: Session) -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    expected = rp.expected_main(x.numpy())
    np.testing.assert_allclose(session.run({"x": x})["z"], expected, rtol=1e-5, atol=1e-5)
    transposed = x.T.contiguous().T
    np.testing.assert_allclose(session.run({"x": transposed})["z"], expected, rtol=1e-5, atol=1e-5)
    echo = session.entry("echo").run(
        {"x": torch.tensor([1.0, 2.0, -3.0], dtype=torch.bfloat16), "flag": torch.tensor(True), "ids": torch.arange(2)}
    )
    np.testing.assert_array_equal(echo["same"].astype(np.float32), [1, 2, -3])


@pytest.mark.parametrize(
    ("entry", "inputs", "message"),
    [
        ("main", {"xx": np.zeros((1, 16), np.float32)}, r"no input 'xx'\n.*did you mean 'x'"),
        ("main", {}, r"'x' is missing\n.*float32\[batch, 16\]"),
        ("main", {"x": np.zeros((1, 16))}, r"dtype float64\n.*float32\[batch, 16\]"),
        ("main", {"x": np.zeros((1, 15), np.float32)}, r"shape \[1, 15\]\n.*\[batch, 16\]"),
        ("main", {"x": np.zeros(16, np.float32)}, r"shape \[16\]\n.*\[batch, 16\]"),
        ("main", {"x": [[0.0] * 16]}, r"is a list, not an array"),
        ("combine", {"x": np.zeros((2, 4), "f4"), "y": np.zeros((3, 4), "f4")}, r"'y' has n = 3, but 'x' has n = 2"),
    ],
    ids=["name", "missing", "dtype", "shape", "rank", "list", "symbol"],
)
def test_wrong_inputs_say_what_was_expected(session: Session, entry: str, inputs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        session.entry(entry).run(inputs)


def test_unknown_entry_point(session: Session) -> None:
    with pytest.raises(UserError, match="did you mean 'encode'"):
        session.entry("encod")


def test_concurrent_runs_of_one_session(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[str] = []
    busy: set[int] = set()
    find = native.Machine.function

    def watched(machine: native.Machine, name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if id(machine) in busy:
                failures.append("two runs share the state of one virtual machine")
            busy.add(id(machine))
            try:
                return find(machine, name)(*arguments)
            finally:
                busy.discard(id(machine))

        return call

    monkeypatch.setattr(native.Machine, "function", watched)

    def work(seed: int) -> None:
        # Long enough for the runs of several threads to overlap.
        x = np.random.default_rng(seed).standard_normal((3000 + seed, 16)).astype(np.float32)
        expected = rp.expected_main(x)
        for _ in range(20):
            try:
                z = session.run({"x": x})["z"]
            except BackendError as error:
                failures.append(str(error))
                continue
            if z.shape != expected.shape or not np.allclose(z, expected, rtol=1e-4, atol=1e-4):
                failures.append(f"thread {seed} got another thread's answer")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("order", [(1, 2), (2, 1), (3, 1)])
def test_thread_count_holds_whatever_ran_before_in_the_thread(artifact: pathlib.Path, order: tuple[int, int]) -> None:
    counts: list[int] = []

    def work() -> None:
        import tvm_ffi

        count = tvm_ffi.get_global_func("runtime.NumThreads")
        for threads in order:
            loaded = load_artifact(artifact, threads=threads)
            loaded.run({"x": random(1, 16)})
            counts.append(loaded.native._pool_size.call(count))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert tuple(counts) == order


def test_running_leaves_the_callers_cpu_affinity_alone(artifact: pathlib.Path) -> None:
    import os

    seen = []

    def work() -> None:
        before = os.sched_getaffinity(0)
        load_artifact(artifact, threads=1).run({"x": random(1, 16)})
        seen.append((before, os.sched_getaffinity(0)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen[0][0] == seen[0][1]


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4"])
def test_fallback_exchanges_dtypes_onnxruntime_has_no_numpy_type_for(tmp_path: pathlib.Path, name: str) -> None:
    number = {"bfloat16": 16, "float8_e4m3fn": 17, "float8_e5m2": 19, "uint4": 21, "int4": 22}[name]
    values = np.array([1, 2, 3] if name == "uint4" else [1, -2, 3], np.float32)
    dtype = np.dtype(getattr(ml_dtypes, name))
    make = fallback_only(
        tmp_path,
        TensorSpec("h", "float32", (3,)),
        TensorSpec("y", name, (3,)),
        rp.onnx_bytes("Cast", TensorProto.FLOAT, [3], to=number),
    )
    made = make.run({"h": values})["y"]
    assert made.dtype == dtype
    np.testing.assert_array_equal(made.astype(np.float32), values)
    take = fallback_only(
        tmp_path,
        TensorSpec("h", name, (3,)),
        TensorSpec("y", "float32", (3,)),
        rp.onnx_bytes("Cast", number, [3], to=TensorProto.FLOAT),
    )
    np.testing.assert_array_equal(take.run({"h": values.astype(dtype)})["y"], values)


def test_strings_and_sequences_pass_through_the_fallback(tmp_path: pathlib.Path) -> None:
    spec = TensorSpec("h", "string", (2,))
    text = fallback_only(
        tmp_path, spec, TensorSpec("y", "string", (2,)), rp.onnx_bytes("Identity", TensorProto.STRING, [2])
    )
    assert text.run({"h": np.array(["a", "bc"])})["y"].tolist() == ["a", "bc"]
    assert text.run({"h": np.array(["a", "bc"], object)})["y"].tolist() == ["a", "bc"]
    with pytest.raises(UserError, match=r"dtype float32\n.*string\[2\]"):
        text.run({"h": np.zeros(2, np.float32)})


def test_a_failing_function_is_an_error_and_the_session_goes_on(artifact: pathlib.Path) -> None:
    session = load_artifact(artifact, threads=1)
    segment = session.manifest.entries["encode"].segments[0]
    with pytest.raises(BackendError, match="linear failed"):
        session.execute(segment, [random(2, 15)])
    assert session.run({"x": random(2, 16)})["z"].shape == (2, 8)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"name": "board", "triple": "riscv64-linux-gnu"}, "compiled for board \\(riscv64\\), this machine is"),
        ({"name": "giant", "features": ["+avx9000"]}, r"has \+avx9000; this CPU does not"),
    ],
)
def test_another_cpu_is_refused_before_anything_is_loaded(tmp_path: pathlib.Path, target: dict, message: str) -> None:
    program = rp.program()
    program.target = target
    with write_artifact(tmp_path / "a.mmopt") as writer:
        writer.add_program(program)
        writer.commit()
    with pytest.raises(UnsupportedError, match=message):
        load_artifact(tmp_path / "a.mmopt")


def test_features_are_found_under_both_spellings() -> None:
    from mmopt.runtime.cpu import missing_features

    flags = frozenset({"avx512vnni", "pni", "sse42", "abm", "asimddp"})
    assert missing_features(["+avx512_vnni", "avx512vnni", "sse3", "sse4.2", "lzcnt", "dotprod", "-amx"], flags) == []
    assert missing_features(["avx512bf16"], flags) == ["avx512bf16"]


@pytest.mark.parametrize(("threads", "hashes"), [(0, "full"), (-1, "full"), (1, "some")])
def test_arguments_out_of_range(artifact: pathlib.Path, threads: int, hashes: str) -> None:
    with pytest.raises(UserError):
        load_artifact(artifact, threads=threads, verify_hashes=hashes)


def test_a_missing_weight_is_named(tmp_path: pathlib.Path) -> None:
    program = rp.program()
    del program.weights["bias"]
    with write_artifact(tmp_path / "a.mmopt") as writer:
        writer.add_program(program)
        writer.commit()
    with pytest.raises((BackendError, LoadError), match="no weight 'bias'"):
        load_artifact(tmp_path / "a.mmopt").run({"x": random(1, 16)})
