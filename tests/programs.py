"""Runs whole models natively in tests: many compiled into one library, called through the runtime."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from mmopt.backends.profile import Profile
from mmopt.ir.module import Module
from mmopt.lowering.compiler import CompileOptions, compile_module
from mmopt.pipeline.base import PassContext
from mmopt.runtime.artifact import EntryPoint
from mmopt.runtime.cpu import request_permissions
from mmopt.runtime.native import NativeEngine
from mmopt.transforms.canonicalize import InferShapes
from mmopt.transforms.fuse.fuse_groups import FuseGroups
from tests.kernels import TOLERANCE, Memory, profiles

TYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "float16": TensorProto.FLOAT16,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


@dataclasses.dataclass
class Example:
    """A model with inputs and, where an oracle other than onnxruntime is at hand, expected outputs.

    Attributes:
        name: Says what the model is about.
        model: The model.
        feeds: Inputs by name.
        want: Expected outputs in order; onnxruntime's when absent.
    """

    name: str
    model: onnx.ModelProto
    feeds: Mapping[str, np.ndarray]
    want: Sequence[np.ndarray] | None = None

    def expected(self) -> list[np.ndarray]:
        """What the model should give."""
        if self.want is not None:
            return list(self.want)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(self.model.SerializeToString(), options, ["CPUExecutionProvider"])
        return list(session.run(None, dict(self.feeds)))


def model_of(
    nodes: Sequence[onnx.NodeProto],
    feeds: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    weights: Mapping[str, np.ndarray],
    *,
    symbolic: Mapping[str, Sequence[int | str | None]] | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    """A model whose inputs have the types of ``feeds``, with other (symbolic) extents where ``symbolic`` has them."""
    shapes = {name: list(array.shape) for name, array in feeds.items()} | dict(symbolic or {})
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(n, TYPES[str(a.dtype)], shapes[n]) for n, a in feeds.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


class Programs:
    """Models compiled together for one profile, each an entry point of its own; weights lie in ``memory`` if given."""

    def __init__(
        self, modules: Sequence[Module], profile: str | Profile, *, threads: int = 2, memory: Memory | None = None
    ) -> None:
        names = [f"entry{n}" for n in range(len(modules))]
        first, *others = modules
        chosen = profile if isinstance(profile, Profile) else profiles()[profile]
        request_permissions(chosen.features, where=chosen.name)
        self._program = compile_module(
            first,
            chosen,
            entries=dict(zip(names[1:], others, strict=True)),
            options=CompileOptions(allow_fallback=False),
        )
        self._folder = tempfile.TemporaryDirectory(prefix="mmopt-test-")
        library = pathlib.Path(self._folder.name, "lib.so")
        library.write_bytes(self._program.library or b"")
        weights = dict(self._program.weights)
        if memory is not None:
            weights = {name: memory.array(array) for name, array in weights.items()}
        self.weights = weights
        self._engine = NativeEngine(library, weights, threads)
        self.kernels = [str(k["name"]) for k in self._program.kernels]
        self.templates = [str(k["template"]) for k in self._program.kernels]
        self.workloads = [str(k.get("workload", "")) for k in self._program.kernels]

    def entry(self, number: int) -> EntryPoint:
        """The entry point of a module by its position."""
        return self._program.entries["main" if number == 0 else f"entry{number}"]

    def run(self, number: int, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs of a module by its position."""
        entry = self.entry(number)
        values: dict[str, object] = dict(feeds)
        for segment in entry.segments:
            results = self._engine.run(segment, [values[name] for name in segment.inputs])
            values.update(zip(segment.outputs, results, strict=True))
        return [np.from_dlpack(values[o.name]) for o in entry.outputs]


def grouped(model: onnx.ModelProto) -> Module:
    """``model`` with its fusion groups formed."""
    module = Module(ir.from_proto(model))
    InferShapes().run(module, PassContext())
    FuseGroups().run(module, PassContext())
    return module


def wrong_answers(
    examples: Sequence[Example],
    profile: str | Profile,
    tolerance: float | None = None,
    *,
    prepare: Callable[[onnx.ModelProto], Module] = lambda model: Module(ir.from_proto(model)),
) -> list[str]:
    """Compile all ``examples`` at once, run them, and describe each whose answer is not what is expected.

    A model that occurs several times is compiled once. ``prepare`` makes the module that is compiled.
    """
    texts = [e.model.SerializeToString(deterministic=True) for e in examples]
    models = {text: e.model for text, e in zip(texts, examples, strict=True)}
    programs = Programs([prepare(model) for model in models.values()], profile)
    found: list[str] = []
    for text, example in zip(texts, examples, strict=True):
        try:
            got = programs.run(list(models).index(text), example.feeds)
            for expected, actual in zip(example.expected(), got, strict=True):
                assert_close(actual, expected, tolerance)
        except Exception as error:
            found.append(f"{example.name}: {type(error).__name__}: {error}")
    return found


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float | None = None) -> None:
    """Equal shapes; numbers within a fraction of the largest one."""
    assert actual.shape == expected.shape, f"shape {actual.shape} instead of {expected.shape}"
    if expected.dtype.kind != "f":
        np.testing.assert_array_equal(actual, expected)
        return
    relative = tolerance or TOLERANCE[str(actual.dtype)]
    wide = expected.astype(np.float64)
    bound = relative * max(1.0, float(np.abs(wide).max(initial=0)))
    np.testing.assert_allclose(actual.astype(np.float64), wide, rtol=0, atol=bound)


def check(examples: Sequence[Example], profile: str, tolerance: float | None = None) -> None:
    """All ``examples`` give what is expected."""
    wrong = wrong_answers(examples, profile, tolerance)
    assert not wrong, f"{len(wrong)} of {len(examples)} models on {profile}:\n" + "\n".join(wrong)
