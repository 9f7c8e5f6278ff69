from __future__ import annotations

import resource

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmopt.errors import BackendError
from mmopt.ir.evaluate import ONNXRUNTIME, REFERENCE, ReferenceRunner, is_random
from mmopt.ir.module import Module
from tests.pass_models import FLOAT, audio_model, fused_model, make_module

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(scope="module")
def runner():
    with ReferenceRunner(threads=1) as opened:
        yield opened


def cast_model(source, target):
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=target), helper.make_node("Cast", ["y"], ["z"], to=FLOAT)]
    return make_module(nodes, [("x", source, [2, 3])], [("y", target, [2, 3]), ("z", FLOAT, [2, 3])], {})


@pytest.mark.parametrize(
    ("onnx_type", "dtype"),
    [
        (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
        (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
        (TensorProto.FLOAT8E5M2, ml_dtypes.float8_e5m2),
        (TensorProto.INT4, ml_dtypes.int4),
        (TensorProto.UINT4, ml_dtypes.uint4),
        (TensorProto.FLOAT16, np.float16),
    ],
)
def test_every_dtype_comes_out_and_goes_in(runner, onnx_type, dtype):
    out = runner.run(cast_model(FLOAT, onnx_type), {"x": X})
    assert out.engine == ONNXRUNTIME
    assert out["y"].dtype == dtype
    np.testing.assert_array_equal(out["y"].astype(np.float32), X)
    np.testing.assert_array_equal(out["z"], X)

    back = runner.run(cast_model(onnx_type, FLOAT), {"x": X.astype(dtype)})
    np.testing.assert_array_equal(back["z"], X)


@pytest.mark.parametrize("dtype", ["FLOAT", "BFLOAT16", "INT4", "FLOAT8E4M3FN"])
def test_large_weights_of_every_width_are_handed_over(runner, dtype):
    kind = ir.DataType[dtype]
    array = (np.arange(90_000) % 7).reshape(300, 300).astype(kind.numpy())
    value = ir.Value(
        name="w", type=ir.TensorType(kind), shape=ir.Shape(array.shape), const_value=ir.Tensor(array, name="w")
    )
    node = ir.node("Cast", [value], {"to": FLOAT})
    node.outputs[0].name = "y"
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    graph = ir.Graph([], [node.outputs[0]], nodes=[node], initializers=[value], opset_imports={"": 21}, name="g")

    out = runner.run(Module(ir.Model(graph, ir_version=10)), {})

    np.testing.assert_array_equal(out["y"], array.astype(np.float32))
    np.testing.assert_array_equal(value.const_value.numpy(), array)


def test_strings_and_sequences(runner):
    nodes = [helper.make_node("StringConcat", ["x", "mark"], ["y"])]
    module = make_module(
        nodes, [("x", TensorProto.STRING, [2])], [("y", TensorProto.STRING, [2])], {"mark": np.array(["!"], object)}
    )
    assert runner.run(module, {"x": np.array(["a", "b"], object)})["y"].tolist() == ["a!", "b!"]

    graph = helper.make_graph(
        [helper.make_node("SequenceInsert", ["s", "x"], ["t"])],
        "g",
        [helper.make_tensor_sequence_value_info("s", FLOAT, None), helper.make_tensor_value_info("x", FLOAT, [2, 3])],
        [helper.make_tensor_sequence_value_info("t", FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    out = runner.run(Module(ir.from_proto(model)), {"s": [X], "x": X + 1})
    assert [array.tolist() for array in out["t"]] == [X.tolist(), (X + 1).tolist()]


def test_local_functions_and_branches(runner):
    module = fused_model()
    w, b = (module.graph.initializers[name].const_value.numpy() for name in "wb")
    x = np.ones((5, 4), np.float32)
    np.testing.assert_allclose(runner.run(module, {"x": x})["y"], x @ w + b, rtol=1e-6)

    rng = np.random.default_rng(0)
    inputs = {"frames": rng.standard_normal((4, 2, 5)).astype(np.float32), "lengths": np.array([4, 2], np.int32)}
    module = audio_model()
    yes, no = runner.run_all(module, [{**inputs, "flag": np.array(flag)} for flag in (True, False)])
    assert not np.allclose(yes["audio"], no["audio"])


def test_versions_of_one_module_run_with_their_own_weights(runner):
    module = fused_model()
    x = np.ones((1, 4), np.float32)
    first = runner.run(module, {"x": x})["y"]

    w = module.graph.initializers["w"]
    w.const_value = ir.tensor(np.zeros((4, 3), np.float32), name="w")

    np.testing.assert_array_equal(
        runner.run(module, {"x": x})["y"], module.graph.initializers["b"].const_value.numpy()[None]
    )
    assert not np.array_equal(first, runner.run(module, {"x": x})["y"])


def test_model_that_onnxruntime_refuses_runs_in_the_reference_evaluator(runner):
    graph = helper.make_graph(
        [helper.make_node("Sum", ["x", "x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [2])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    out = runner.run(Module(ir.from_proto(model)), {"x": np.array([1, 2], ml_dtypes.bfloat16)})

    assert out.engine == REFERENCE
    assert "Sum" in out.reason
    assert out["y"].tolist() == [2, 4]


def test_errors_name_inputs_and_engines(runner):
    with pytest.raises(BackendError, match=r"x float32\[5, 3\]"):
        runner.run(fused_model(), {"x": np.ones((5, 3), np.float32)})

    graph = helper.make_graph(
        [helper.make_node("Nope", ["x"], ["y"])], "g", [helper.make_tensor_value_info("x", FLOAT, [1])], []
    )
    graph.output.append(helper.make_tensor_value_info("y", FLOAT, [1]))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(BackendError, match=r"onnxruntime: .*onnx reference evaluator: "):
        runner.run(Module(ir.from_proto(model)), {"x": np.ones(1, np.float32)})


def test_runner_is_a_context_manager():
    with pytest.raises(RuntimeError, match="with statement"):
        ReferenceRunner().run(fused_model(), {})


def test_weights_in_a_file_are_neither_read_nor_copied(tmp_path):
    """Loading and running a model whose weights lie in a file of 32 MB takes a small part of that as new memory."""
    width, layers = 1024, 8
    nodes = [helper.make_node("Gather", [f"w{i}", "row"], [f"y{i}"]) for i in range(layers)]
    weights = [numpy_helper.from_array(np.full((width, width), i, np.float32), f"w{i}") for i in range(layers)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("row", TensorProto.INT64, [])],
        [helper.make_tensor_value_info(f"y{i}", FLOAT, [width]) for i in range(layers)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data")
    del model, weights, graph
    module = Module(ir.load(tmp_path / "m.onnx"))

    with ReferenceRunner(threads=1) as runner:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        out = runner.run(module, {"row": np.array(5)})
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    assert [float(out[f"y{i}"][0]) for i in range(layers)] == list(range(layers))
    assert grown < 8 * 1024, f"grew by {grown} KiB"


def test_unseeded_random_operators_are_recognized():
    def module(op, **attributes):
        return make_module([helper.make_node(op, [], ["y"], shape=[3], **attributes)], [], [("y", FLOAT, [3])], {})

    assert is_random(module("RandomNormal"))
    assert not is_random(module("RandomNormal", seed=1.0))
    assert not is_random(fused_model())
