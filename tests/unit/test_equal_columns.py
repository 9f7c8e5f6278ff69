"""Equal columns of a weight give equal columns of the product, also in the tile at the edge.

A softmax over large equal logits is far off when they differ in their last bits.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.native import compiled


@pytest.mark.parametrize("columns", [1000, 97, 33])
@pytest.mark.parametrize("rows", [1, 2])
def test_equal_columns_stay_equal(rows: int, columns: int) -> None:
    random = np.random.default_rng(0)
    weight = np.repeat(random.random((700, 1), np.float32), columns, axis=1)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [rows, 700])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [rows, columns])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    found = compiled(model, {"x": random.random((rows, 700), np.float32)})
    assert found.kinds == ["native"]
    assert (found.outputs[0]["y"] == found.outputs[0]["y"][:, :1]).all()
