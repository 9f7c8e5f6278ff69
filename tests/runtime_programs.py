"""Small compiled programs for tests of the artifact and the runtime, built with TVM itself."""

from __future__ import annotations

import functools
import pathlib
import tempfile

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from mmopt.runtime.artifact import EntryPoint, Program, Segment, TensorSpec


@functools.cache
def library() -> bytes:
    """A library with the VM functions ``linear``, ``project``, ``echo``, ``mirror`` and ``combine``."""
    import tvm
    from tvm.script import ir as I
    from tvm.script import relax as R

    @I.ir_module
    class Functions:
        @R.function
        def linear(
            x: R.Tensor(("n", 16), "float32"),
            params: R.Tuple(R.Tensor((16, 8), "float32"), R.Tensor((8,), "float32")),
        ) -> R.Tuple(R.Tensor(("n", 8), "float32")):
            with R.dataflow():
                result = (R.add(R.matmul(x, params[0]), params[1]),)
                R.output(result)
            return result

        @R.function
        def project(x: R.Tensor(("n", 8), "float32"), params: R.Tuple(R.Tensor((8,), "float32"))) -> R.Tuple(
            R.Tensor(("n", 8), "float32")
        ):
            with R.dataflow():
                result = (R.multiply(x, params[0]),)
                R.output(result)
            return result

        @R.function
        def echo(
            x: R.Tensor(("n",), "bfloat16"), flag: R.Tensor((), "bool"), ids: R.Tensor(("m",), "int64")
        ) -> R.Tuple(R.Tensor(("n",), "bfloat16"), R.Tensor((), "bool"), R.Tensor(("m",), "int64")):
            with R.dataflow():
                result = (x, R.logical_not(flag), R.add(ids, ids))
                R.output(result)
            return result

        @R.function
        def mirror(x: R.Tensor(("n",), "float32")) -> R.Tuple(R.Tensor(("n",), "float32")):
            with R.dataflow():
                result = (x,)
                R.output(result)
            return result

        @R.function
        def combine(x: R.Tensor(("n", 4), "float32"), y: R.Tensor(("n", 4), "float32")) -> R.Tuple(
            R.Tensor(("n", 4), "float32")
        ):
            with R.dataflow():
                result = (R.multiply(x, y),)
                R.output(result)
            return result

    executable = tvm.compile(Functions, tvm.target.Target({"kind": "llvm", "num-cores": 2}))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "lib.so"
        executable.export_library(str(path))
        return path.read_bytes()


def onnx_bytes(op: str, dtype: int, shape: list[int | str], *, to: int | None = None) -> bytes:
    """A model with one unary node from ``h`` to ``y``."""
    attributes = {} if to is None else {"to": to}
    graph = helper.make_graph(
        [helper.make_node(op, ["h"], ["y"], **attributes)],
        "fallback",
        [helper.make_tensor_value_info("h", dtype, shape)],
        [helper.make_tensor_value_info("y", to or dtype, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


WEIGHT = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
BIAS = np.random.default_rng(1).standard_normal(8).astype(np.float32)
SCALE = np.random.default_rng(2).standard_normal(8).astype(np.float32)


def native(function: str, inputs: tuple[str, ...], outputs: tuple[str, ...], params: tuple[str, ...] = ()) -> Segment:
    """A native segment."""
    return Segment("native", inputs, outputs, function=function, params=params)


def program() -> Program:
    """Entry points ``main`` (native, fallback, native), ``encode`` (its first part) and three for one function each."""
    x = TensorSpec("x", "float32", ("batch", 16))
    encode = native("linear", ("x",), ("h",), ("weight", "bias"))
    relu = Segment("onnxruntime", ("h",), ("y",), model="fallback/relu.onnx")
    project = native("project", ("y",), ("z",), ("scale",))
    echo_inputs = (
        TensorSpec("x", "bfloat16", ("n",)),
        TensorSpec("flag", "bool", ()),
        TensorSpec("ids", "int64", ("m",)),
    )
    echo_outputs = (
        TensorSpec("same", "bfloat16", ("n",)),
        TensorSpec("not_flag", "bool", ()),
        TensorSpec("twice", "int64", ("m",)),
        TensorSpec("ids", "int64", ("m",)),
    )
    pair = (TensorSpec("x", "float32", ("n", 4)), TensorSpec("y", "float32", ("n", 4)))
    entries = [
        EntryPoint("main", (x,), (TensorSpec("z", "float32", ("batch", 8)),), (encode, relu, project)),
        EntryPoint("encode", (x,), (TensorSpec("h", "float32", ("batch", 8)),), (encode,)),
        EntryPoint(
            "echo",
            echo_inputs,
            echo_outputs,
            (native("echo", ("x", "flag", "ids"), ("same", "not_flag", "twice")),),
        ),
        EntryPoint(
            "mirror",
            (TensorSpec("x", "float32", ("n",)),),
            (TensorSpec("same", "float32", ("n",)),),
            (native("mirror", ("x",), ("same",)),),
        ),
        EntryPoint("combine", pair, (TensorSpec("p", "float32", ("n", 4)),), (native("combine", ("x", "y"), ("p",)),)),
    ]
    return Program(
        library=library(),
        weights={"weight": WEIGHT, "bias": BIAS, "scale": SCALE},
        entries={entry.name: entry for entry in entries},
        fallback_models={"fallback/relu.onnx": onnx_bytes("Relu", TensorProto.FLOAT, ["n", 8])},
        target={"name": "test", "features": []},
        notes=["Relu runs in onnxruntime so that the test has a fallback."],
    )


def expected_main(x: np.ndarray) -> np.ndarray:
    """What ``main`` of :func:`program` computes."""
    return np.maximum(x @ WEIGHT + BIAS, 0) * SCALE


def bfloat16(values: list[float]) -> np.ndarray:
    """An array of ``bfloat16``."""
    return np.array(values, ml_dtypes.bfloat16)
