"""Small real models and artifacts to measure."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mmopt.runtime import EntryPoint, Program, Segment, TensorSpec
from mmopt.runtime.writer import write_artifact

WIDTH = 32


def write_model(path: pathlib.Path, *, layers: int = 2, seed: int = 0) -> pathlib.Path:
    """A chain of matrix products, each halved where negative: ``x [b, 32] → y [b, 32]``."""
    rng = np.random.default_rng(seed)
    weights = [(rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32) for _ in range(layers)]
    nodes, current = [], "x"
    for i in range(layers):
        nodes.append(helper.make_node("MatMul", [current, f"w{i}"], [f"h{i}"]))
        current = "y" if i == layers - 1 else f"a{i}"
        nodes.append(helper.make_node("LeakyRelu", [f"h{i}"], [current], alpha=0.5))
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", WIDTH]) for name in "xy"]
    initializers = [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)]
    graph = helper.make_graph(nodes, "chain", value[:1], value[1:], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def write_artifact_of(model: pathlib.Path, output: pathlib.Path) -> pathlib.Path:
    """An artifact that runs ``model`` by its onnxruntime fallback, with three entry points besides ``main``.

    ``encode`` takes what main takes, ``fuse`` what ``encode`` gives, ``lost`` something nobody gives.
    """

    def entry(name: str, source: str, result: str) -> EntryPoint:
        specs = [TensorSpec(value, "float32", ("b", WIDTH)) for value in (source, result)]
        path = f"fallback/{source}-{result}.onnx"
        return EntryPoint(name, (specs[0],), (specs[1],), (Segment("onnxruntime", (source,), (result,), model=path),))

    places = {"main": ("x", "y"), "encode": ("x", "features"), "fuse": ("features", "y"), "lost": ("secret", "y")}
    entries = {name: entry(name, *ends) for name, ends in places.items()}
    models = {entries[name].segments[0].model: _renamed(model, *ends) for name, ends in places.items()}
    program = Program(library=None, weights={}, entries=entries, fallback_models=models)
    with write_artifact(output) as artifact:
        artifact.add_program(program)
        artifact.add("optimized.onnx", model)
        artifact.commit()
    return output


def _renamed(path: pathlib.Path, source: str, result: str) -> bytes:
    """The same model with other names for its input and output."""
    model = onnx.load(path)
    names = {"x": source, "y": result}
    for value in (*model.graph.input, *model.graph.output):
        value.name = names[value.name]
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    return bytes(model.SerializeToString())
