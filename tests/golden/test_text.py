"""The text form, against files in this folder (rewritten when ``UPDATE_GOLDEN`` is set), and notes beside nodes."""

from __future__ import annotations

import os
import pathlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmopt.frontends.onnx import module_from_proto
from mmopt.ir.module import MODULE_PATH_KEY, Module
from mmopt.ir.text import annotate, dtype_text, to_text

FOLDER = pathlib.Path(__file__).parent


def mlp() -> Module:
    """Weights, small constants, symbolic dimensions, module paths, floats that need all their digits."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gemm", ["pixel values", "w", "b"], ["h"], name="fc", transB=1, alpha=0.1, beta=1.0),
        helper.make_node("Clip", ["h", "", "six"], ["c"], name="clip"),
        helper.make_node("Reshape", ["c", "shape"], ["r"], name="reshape"),
        helper.make_node("Split", ["r"], ["s0", ""], name="split", axis=-1, num_outputs=2),
        helper.make_node("Dropout", ["s0"], ["y"], name="drop"),
    ]
    nodes[0].metadata_props.add(key=MODULE_PATH_KEY, value="encoder.layers.0.fc")
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("pixel values", TensorProto.FLOAT, ["batch", 8])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("c", 1, ["batch", 4]),
        ],
        [
            numpy_helper.from_array(rng.standard_normal((4, 8), dtype=np.float32), "w"),
            numpy_helper.from_array(np.array([0.1, -0.0, np.inf, 1e-30], np.float32), "b"),
            numpy_helper.from_array(np.array(6, np.float32), "six"),
            numpy_helper.from_array(np.array([0, 2, -1]), "shape"),
        ],
    )
    return module_from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11))


def control_flow() -> Module:
    """Subgraphs, functions with parameters, sequences and optionals, strings, 4-bit weights."""
    then = helper.make_graph(
        [helper.make_node("f", ["x"], ["t"], name="call", domain="mmopt.fused", slope=0.5)],
        "then",
        [],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, ["n"])],
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["e"], name="neg")],
        "else",
        [],
        [helper.make_tensor_value_info("e", TensorProto.FLOAT, ["n"])],
    )
    leaky = helper.make_node("LeakyRelu", ["a"], ["b"], name="leaky")
    leaky.attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name="slope")
    function = helper.make_function(
        "mmopt.fused",
        "f",
        ["a"],
        ["b"],
        [leaky],
        [helper.make_opsetid("", 23)],
        attribute_protos=[helper.make_attribute("slope", 0.25)],
    )
    nodes = [
        helper.make_node("If", ["c"], ["y"], name="if", then_branch=then, else_branch=other),
        helper.make_node("SequenceConstruct", ["y", "y"], ["s"], name="seq"),
        helper.make_node("Optional", ["s"], ["o"], name="opt"),
        helper.make_node("Constant", [], ["words"], name="words", value_strings=[b"a", b'say "hi"\n']),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["d"], name="dq"),
    ]  # fmt: skip
    sequence = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, ["n"]))
    graph = helper.make_graph(
        nodes,
        "flow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]), helper.make_tensor_value_info("c", 9, [])],
        [
            helper.make_value_info("o", helper.make_optional_type_proto(sequence)),
            helper.make_tensor_value_info("words", TensorProto.STRING, [2]),
            helper.make_tensor_value_info("d", TensorProto.FLOAT, [3]),
        ],
        [
            helper.make_tensor("q", TensorProto.INT4, [3], [1, -2, 7]),
            numpy_helper.from_array(np.array(0.5, np.float32), "scale"),
        ],
    )
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("mmopt.fused", 1)]
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=11)
    model.metadata_props.add(key="origin", value="two\nlines")
    return module_from_proto(model)


def against_file(name: str, text: str) -> None:
    path = FOLDER / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("build", [mlp, control_flow])
def test_text(build: object) -> None:
    module = build()  # type: ignore[operator]
    text = to_text(module)
    assert to_text(module.clone()) == text
    against_file(f"text-{build.__name__.replace('_', '-')}", text)  # type: ignore[attr-defined]


def test_text_does_not_depend_on_the_order_of_attributes() -> None:
    module = mlp()
    attributes = module.graph[0].attributes
    listed = list(attributes.values())
    attributes.clear()
    for attribute in reversed(listed):
        attributes.add(attribute)
    assert to_text(module) == to_text(mlp())


def test_text_shows_a_changed_weight_shape_and_name() -> None:
    base = to_text(mlp())
    for edit in (change_weight, change_shape, change_name):
        module = mlp()
        edit(module)
        assert to_text(module) != base


def change_weight(module: Module) -> None:
    weight = module.graph.initializers["w"]
    array = weight.const_value.numpy().copy()
    array[3, 7] = np.nextafter(array[3, 7], np.float32(1))
    weight.const_value = ir.tensor(array, name="w")


def change_shape(module: Module) -> None:
    module.graph.inputs[0].shape = ir.Shape(["b", 8])


def change_name(module: Module) -> None:
    module.graph[1].outputs[0].name = "renamed"


def test_notes_stand_below_their_nodes() -> None:
    module = control_flow()
    notes = {"leaky": "slope is a parameter", "neg": "two\nlines", "gone": "no such node", "if": "the branches differ"}
    against_file("annotated", annotate(module, notes))
    against_file("annotated-context", annotate(module, notes, context=1))


def test_node_without_a_name_is_found_by_its_output() -> None:
    module = mlp()
    module.graph[1].name = ""
    assert "(%h, _, %six)\n  ^ here\n" in annotate(module, {"c": "here"})


@pytest.mark.parametrize("value", [0.1, 1e-45, 3.4028235e38, 1 / 3, -0.0, 16777216.0])
def test_floats_read_back_exactly(value: float) -> None:
    module = mlp()
    module.graph[0].attributes.add(ir.AttrFloat32("alpha", value))
    text = to_text(module).split("alpha=")[1].split(",")[0]
    assert np.float32(text).tobytes() == np.float32(value).tobytes()
    assert any(mark in text for mark in ".e")


def test_every_dtype_has_a_short_name_of_its_own() -> None:
    names = [dtype_text(dtype) for dtype in ir.DataType]
    assert len(set(names)) == len(names)
    assert {"f32", "bf16", "i64", "u4", "f8e4m3fn", "bool", "str"} <= set(names)
