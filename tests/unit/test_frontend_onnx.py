"""Reading and writing ONNX files: what must load does, what must not says why, and writing never loses or damages."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmopt.errors import LoadError, UserError
from mmopt.frontends.onnx import load_onnx, module_from_proto, save_onnx
from mmopt.frontends.opset import WORKING_OPSET
from mmopt.ir.module import MODULE_PATH_KEY

W = np.arange(12, dtype=np.float32).reshape(3, 4)
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def matmul(weight: TensorProto | None = None, opset: int = 17) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(W, "w") if weight is None else weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def external(**entries: object) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3, 4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "w.bin", **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def run(path: pathlib.Path, x: np.ndarray = X) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.fixture
def with_data(tmp_path: pathlib.Path) -> pathlib.Path:
    """A model whose weight lies at offset 8 of ``w.bin`` beside it."""
    (tmp_path / "w.bin").write_bytes(b"01234567" + W.tobytes() + b"tail")
    path = tmp_path / "m.onnx"
    onnx.save(matmul(external(offset=8, length=48)), path)
    return path


def test_external_weights_are_mapped_not_read(with_data: pathlib.Path) -> None:
    module = load_onnx(with_data)
    weight = module.graph.initializers["w"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    assert weight.raw is None
    np.testing.assert_array_equal(weight.numpy(), W)
    assert module.opset == WORKING_OPSET
    assert module.provenance == [f"loaded from {with_data}"]


def test_length_and_offset_may_be_left_out(with_data: pathlib.Path) -> None:
    with_data.with_name("w.bin").write_bytes(W.tobytes())
    onnx.save(matmul(external()), with_data)
    np.testing.assert_array_equal(load_onnx(with_data).graph.initializers["w"].const_value.numpy(), W)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "../w.bin"}, "leaves the model's folder"),
        ({"location": "sub/../../w.bin"}, "leaves the model's folder"),
        ({"location": "/etc/passwd"}, "leaves the model's folder"),
        ({"location": "C:\\w.bin"}, "leaves the model's folder"),
        ({"location": ""}, "leaves the model's folder"),
        ({"location": "gone.bin"}, "is missing"),
        ({"location": "folder"}, "not a regular file"),
        ({"location": "link.bin"}, "outside the model's folder"),
        ({"location": "hard.bin"}, "hard links"),
        ({"offset": 20}, "lie outside"),
        ({"offset": -4}, "lie outside"),
        ({"length": 1 << 60}, "needs 48 bytes"),
        ({"length": 44}, "needs 48 bytes"),
        ({"offset": "ten"}, "not a number"),
    ],
)
def test_external_data_that_does_not_hold(with_data: pathlib.Path, entries: dict[str, object], message: str) -> None:
    outside = with_data.parent.parent / f"{with_data.parent.name}-outside.bin"
    outside.write_bytes(W.tobytes())
    (with_data.parent / "folder").mkdir()
    (with_data.parent / "link.bin").symlink_to(outside)
    os.link(with_data.parent / "w.bin", with_data.parent / "hard.bin")
    if entries.get("location") != "hard.bin":
        (with_data.parent / "hard.bin").unlink()
    onnx.save(matmul(external(**entries)), with_data)
    with pytest.raises(LoadError, match=message) as raised:
        load_onnx(with_data)
    assert raised.value.exit_code == 3
    assert raised.value.hint


def test_huge_external_claim_takes_no_memory(with_data: pathlib.Path) -> None:
    tensor = external()
    del tensor.dims[:]
    tensor.dims.extend([1 << 40, 1 << 20])
    onnx.save(matmul(tensor), with_data)
    with pytest.raises(LoadError, match="lie outside"):
        load_onnx(with_data)


def test_download_cache_layout(with_data: pathlib.Path) -> None:
    """Model and data are links to files that lie side by side elsewhere under other names."""
    blobs, snapshot = with_data.parent / "blobs", with_data.parent / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    os.rename(with_data, blobs / "aa")
    os.rename(with_data.with_name("w.bin"), blobs / "bb")
    (snapshot / "m.onnx").symlink_to("../blobs/aa")
    (snapshot / "w.bin").symlink_to("../blobs/bb")
    np.testing.assert_array_equal(load_onnx(snapshot / "m.onnx").graph.initializers["w"].const_value.numpy(), W)


def damaged(name: str) -> bytes:
    good = matmul().SerializeToString()
    return {
        "empty": b"",
        "truncated": good[: len(good) // 2],
        "text": b"<!DOCTYPE html><html>not found</html>",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "no graph": onnx.ModelProto(ir_version=8).SerializeToString(),
        "zeros": bytes(100),
    }[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "is empty"),
        ("truncated", "cannot be read"),
        ("text", "cannot be read"),
        ("lfs", "Git LFS"),
        ("no graph", "holds no graph"),
        ("zeros", "cannot be read"),
    ],
)
def test_files_that_are_no_model(tmp_path: pathlib.Path, name: str, message: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(damaged(name))
    with pytest.raises(LoadError, match=message) as raised:
        load_onnx(path)
    assert raised.value.where == str(path)
    assert raised.value.hint


@pytest.mark.parametrize("cut", range(10, 150, 7))
def test_a_truncated_file_never_becomes_another_model(tmp_path: pathlib.Path, cut: int) -> None:
    """Wherever a file is cut, loading fails with the load error, or nothing of the graph is lost."""
    whole = matmul().SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    with pytest.raises(LoadError):
        load_onnx(path)


def test_missing_file_and_folder(tmp_path: pathlib.Path) -> None:
    with pytest.raises(LoadError, match="No such file"):
        load_onnx(tmp_path / "gone.onnx")
    with pytest.raises(LoadError, match="is a folder"):
        load_onnx(tmp_path)


def broken(name: str) -> onnx.ModelProto:
    model = matmul()
    weight, node = model.graph.initializer[0], model.graph.node[0]
    if name == "short data":
        weight.raw_data = weight.raw_data[:-4]
    elif name == "huge shape":
        weight.dims[:] = [1 << 40, 1 << 20]
    elif name == "negative shape":
        weight.dims[:] = [-3, -4]
    elif name == "dtype":
        weight.data_type = 99
    elif name == "undefined input":
        node.input[1] = "weight"
    elif name == "undefined output":
        model.graph.output[0].name = "z"
    elif name == "defined twice":
        model.graph.node.append(node)
    elif name == "circle":
        node.input[1] = "h"
        model.graph.node.append(helper.make_node("Relu", ["y"], ["h"]))
    return model


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short data", "needs 48 bytes, found 44"),
        ("huge shape", "needs .* bytes, found 48"),
        ("negative shape", "not a tensor"),
        ("dtype", "unknown data type 99"),
        ("undefined input", "'weight' is not defined"),
        ("undefined output", "'z' is not defined"),
        ("defined twice", "'y' is defined twice"),
        ("circle", "in a circle"),
    ],
)
def test_broken_models(name: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        module_from_proto(broken(name))


def test_typed_data_fields_are_counted() -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 4], W.reshape(-1).tolist())
    assert module_from_proto(matmul(weight)).graph.initializers["w"].const_value.size == 12
    weight.float_data.pop()
    with pytest.raises(LoadError, match="needs 12 elements, found 11"):
        module_from_proto(matmul(weight))


def test_unsorted_nodes_are_sorted() -> None:
    model = matmul()
    model.graph.node[0].input[0] = "h"
    model.graph.node.append(helper.make_node("Relu", ["x"], ["h"]))
    module = module_from_proto(model)
    assert [node.op_type for node in module.graph] == ["Relu", "MatMul"]
    assert any("topological order" in remark.message for remark in module.remarks)


def test_weights_listed_as_inputs() -> None:
    """Constants before IR version 4, defaults of inputs from then on."""
    for version, names in ((3, ["x"]), (8, ["x", "w"])):
        model = matmul()
        model.ir_version = version
        model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [3, 4]))
        module = module_from_proto(model)
        assert [value.name for value in module.graph.inputs] == names
        assert "w" in module.graph.initializers


def test_sparse_weights_become_dense() -> None:
    dense = np.zeros((3, 4), np.float32)
    dense[[0, 2], [1, 3]] = [5, 7]
    for indices in (np.array([1, 11]), np.array([[0, 1], [2, 3]])):
        values = helper.make_tensor("w", TensorProto.FLOAT, [2], [5.0, 7.0])
        model = matmul()
        del model.graph.initializer[:]
        model.graph.sparse_initializer.append(
            helper.make_sparse_tensor(values, numpy_helper.from_array(indices), [3, 4])
        )
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        np.testing.assert_array_equal(module_from_proto(model).graph.initializers["w"].const_value.numpy(), dense)
        copy.graph.sparse_initializer[0].dims[:] = [1 << 30, 1 << 30]
        with pytest.raises(LoadError, match="too large"):
            module_from_proto(copy)


@pytest.mark.parametrize(
    ("scopes", "path"),
    [
        ("['', 'encoder', 'encoder.proj', 'linear']", "encoder.proj"),
        ("['', 'linear']", None),
        ("['', '_empty_nn_module_stack_from_metadata_hook', 'add']", None),
        ("not a list", None),
        ("['', 1, 'add']", None),
    ],
)
def test_module_paths_of_torch_exports(scopes: str, path: str | None) -> None:
    model = matmul()
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    (node,) = module_from_proto(model).graph
    assert node.metadata_props.get(MODULE_PATH_KEY) == path


@pytest.mark.parametrize("outside", [None, True])
def test_saved_model_runs_and_is_complete(
    with_data: pathlib.Path, tmp_path: pathlib.Path, outside: bool | None
) -> None:
    module = load_onnx(with_data)
    target = tmp_path / "out.onnx"
    save_onnx(module, target, external=outside)
    np.testing.assert_allclose(run(target), X @ W)
    assert {p.name for p in tmp_path.iterdir()} == {"w.bin", "m.onnx", "out.onnx"} | (
        {"out.onnx.data"} if outside else set()
    )
    assert load_onnx(target).signature() == module.signature()
    assert isinstance(module.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_large_weights_go_to_a_data_file(tmp_path: pathlib.Path) -> None:
    large = np.ones((600, 600), np.float32)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [600, 600])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [600, 600])],
        [numpy_helper.from_array(large, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    save_onnx(module_from_proto(model), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size == large.nbytes
    assert (tmp_path / "m.onnx").stat().st_size < 1000
    np.testing.assert_array_equal(run(tmp_path / "m.onnx", large), 2 * large)
    again = load_onnx(tmp_path / "m.onnx")
    with pytest.raises(UserError, match="would overwrite"):
        save_onnx(again, tmp_path / "m.onnx")
    np.testing.assert_array_equal(run(tmp_path / "m.onnx", large), 2 * large)


def test_saving_into_nowhere(tmp_path: pathlib.Path) -> None:
    module = module_from_proto(matmul())
    with pytest.raises(UserError, match="no folder"):
        save_onnx(module, tmp_path / "gone" / "m.onnx")
    with pytest.raises(UserError, match="is a folder"):
        save_onnx(module, tmp_path)


def test_failed_save_leaves_the_old_file(tmp_path: pathlib.Path, with_data: pathlib.Path) -> None:
    module = load_onnx(with_data)
    target = tmp_path / "old.onnx"
    target.write_bytes(b"old")
    with_data.with_name("w.bin").write_bytes(b"short")
    with pytest.raises(Exception, match=r"shorter|buffer|bytes"):
        save_onnx(module, target, external=True)
    assert target.read_bytes() == b"old"
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "w.bin", "old.onnx"}


def test_constants_in_external_files_move_along(with_data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = matmul(external(offset=8, length=48))
    tensor = model.graph.initializer.pop()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))
    onnx.save(model, with_data)
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "m.onnx"
    save_onnx(load_onnx(with_data), target)
    np.testing.assert_allclose(run(target), X @ W)


def test_functions_are_kept_or_inlined(tmp_path: pathlib.Path) -> None:
    body = [helper.make_node("MatMul", ["a", "b"], ["c"]), helper.make_node("Relu", ["c"], ["d"])]
    function = helper.make_function("local", "f", ["a", "b"], ["d"], body, [helper.make_opsetid("", 17)])
    model = matmul()
    model.graph.node[0].CopyFrom(helper.make_node("f", ["x", "w"], ["y"], domain="local", name="call"))
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    module = module_from_proto(model)
    save_onnx(module, tmp_path / "kept.onnx")
    save_onnx(module, tmp_path / "inlined.onnx", inline=True)
    assert [f.name for f in onnx.load(tmp_path / "kept.onnx").functions] == ["f"]
    inlined = onnx.load(tmp_path / "inlined.onnx")
    assert not inlined.functions
    assert [node.op_type for node in inlined.graph.node] == ["MatMul", "Relu"]
    assert {entry.domain for entry in inlined.opset_import} == {""}
    for name in ("kept", "inlined"):
        np.testing.assert_allclose(run(tmp_path / f"{name}.onnx"), X @ W)
    assert len(module.model.functions) == 1


MEASURE = """
import pathlib, resource, sys
from mmopt.frontends.onnx import load_onnx, save_onnx
folder = pathlib.Path(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
save_onnx(load_onnx(folder / "m.onnx"), folder / "out.onnx", inline=True)
print((peak() - before) // 1024)
"""


def test_memory_stays_bounded(tmp_path: pathlib.Path) -> None:
    """200 MB of external weights pass from file to file through a process that grows by a fraction of that."""
    count, side = 50, 1024
    tensors = []
    for index in range(count):
        tensor = external(location="m.onnx.data", offset=index * side * side * 4)
        tensor.name, tensor.dims[:] = f"w{index}", [side, side]
        tensors.append(tensor)
    with open(tmp_path / "m.onnx.data", "wb") as file:
        file.truncate(count * side * side * 4)
    names = ["x", *[f"h{index}" for index in range(count)]]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(count)]
    inputs, outputs = [
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", side])] for n in (names[0], names[-1])
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, tensors),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, tmp_path / "m.onnx")
    result = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (tmp_path / "out.onnx.data").stat().st_size == count * side * side * 4
    assert int(result.stdout) < 60


def test_real_model_with_branches() -> None:
    path = pathlib.Path(__file__).parents[3] / "shared" / "models" / "silero_vad.onnx"
    if not path.exists():
        pytest.skip(f"no {path}")
    module = load_onnx(path)
    assert module.opset == WORKING_OPSET
    feeds = {
        "input": np.random.default_rng(0).standard_normal((2, 512), dtype=np.float32),
        "state": np.zeros((2, 2, 128), np.float32),
        "sr": np.array(16000, np.int64),
    }
    old, new = (
        onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feeds)
        for data in (path.read_bytes(), ir.to_proto(module.model).SerializeToString())
    )
    for a, b in zip(old, new, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_model_of_the_conformance_suite_loads() -> None:
    from onnx.backend.test.case.node import collect_testcases

    models = [case.model for case in collect_testcases(None) if case.model is not None]
    folder = pathlib.Path(onnx.__file__).parent / "backend" / "test" / "data"
    assert len(models) > 1000
    for model in models:
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        assert len(module_from_proto(copy).graph.outputs) == len(model.graph.output)
    for path in folder.rglob("*.onnx"):
        load_onnx(path)
