"""Small ONNX models for tests of the whole of mmopt."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def _weight(name: str, *shape: int, seed: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / 4, name)


def _save(path: pathlib.Path, graph: onnx.GraphProto) -> pathlib.Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def two_layers(path: pathlib.Path, *, activation: str = "Relu", seed: int = 0) -> pathlib.Path:
    """``y = W2 act(W1 x + b)`` with a symbolic batch, and an Identity for passes to remove."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Add", ["a", "b"], ["c"], name="bias"),
        helper.make_node(activation, ["c"], ["d"], name="activation"),
        helper.make_node("Identity", ["d"], ["e"], name="nothing"),
        helper.make_node("MatMul", ["e", "w2"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "two_layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [_weight("w1", 16, 32, seed=seed), _weight("b", 32, seed=seed + 1), _weight("w2", 32, 4, seed=seed + 2)],
    )
    return _save(path, graph)


def two_towers(path: pathlib.Path) -> pathlib.Path:
    """Two tabular towers whose features are added, and a head."""
    nodes = []
    for side in ("left", "right"):
        nodes += [
            helper.make_node("MatMul", [side, f"{side}_w1"], [f"{side}_a"], name=f"{side}_first"),
            helper.make_node("Tanh", [f"{side}_a"], [f"{side}_b"], name=f"{side}_tanh"),
            helper.make_node("MatMul", [f"{side}_b", f"{side}_w2"], [f"{side}_c"], name=f"{side}_second"),
            helper.make_node("Tanh", [f"{side}_c"], [f"{side}_d"], name=f"{side}_tanh2"),
        ]
    nodes += [
        helper.make_node("Concat", ["left_d", "right_d"], ["joined"], name="join", axis=1),
        helper.make_node("MatMul", ["joined", "head_w"], ["score"], name="head"),
    ]
    weights = [_weight(f"{side}_w1", 6, 8, seed=k) for k, side in enumerate(("left", "right"))]
    weights += [_weight(f"{side}_w2", 8, 8, seed=k + 2) for k, side in enumerate(("left", "right"))]
    graph = helper.make_graph(
        nodes,
        "two_towers",
        [helper.make_tensor_value_info(side, TensorProto.FLOAT, ["batch", 6]) for side in ("left", "right")],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch", 3])],
        [*weights, _weight("head_w", 16, 3, seed=9)],
    )
    return _save(path, graph)
