"""Modules as graphsurgeon graphs: nothing is lost on the way there and back, and edits arrive."""

from __future__ import annotations

import collections
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmopt.errors import PassError
from mmopt.frontends.graphsurgeon import from_graphsurgeon, to_graphsurgeon
from mmopt.frontends.onnx import module_from_proto
from mmopt.ir.modality import Modality
from mmopt.ir.module import Module
from mmopt.ir.verify import require_valid

W = np.arange(12, dtype=np.float32).reshape(3, 4)


def everything() -> Module:
    """A model with all that could be lost: metadata on each level, functions, subgraphs, dtypes, unused weights."""
    add = helper.make_node("Add", ["s", "p"], ["q"], name="inner")
    leaky = helper.make_node("LeakyRelu", ["q"], ["r"])
    leaky.attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name="slope")
    function = helper.make_function(
        "local",
        "f",
        ["s", "p"],
        ["r"],
        [add, leaky],
        [helper.make_opsetid("", 23)],
        attribute_protos=[helper.make_attribute("slope", 0.25)],
        doc_string="function doc",
    )
    function.metadata_props.add(key="fk", value="fv")
    then = helper.make_graph(
        [helper.make_node("Add", ["m", "one"], ["t"])],
        "then",
        [],
        [helper.make_tensor_value_info("t", 1, None)],
        [numpy_helper.from_array(np.ones(1, np.float32), "one")],
    )
    other = helper.make_graph(
        [helper.make_node("Sub", ["m", "inner_only"], ["e"])], "else", [], [helper.make_tensor_value_info("e", 1, None)]
    )
    cast = helper.make_node("Cast", ["half"], ["h"], name="cast", to=TensorProto.FLOAT)
    cast.metadata_props.add(key="nk", value="nv")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="mm", doc_string="node doc"),
        helper.make_node("If", ["c"], ["i"], name="branch", then_branch=then, else_branch=other),
        cast,
        helper.make_node("f", ["i", "h"], ["y"], name="call", domain="local", slope=0.5),
        helper.make_node("Resize", ["x4", "", "scales"], ["z"], name="resize", mode="nearest"),
        helper.make_node("Constant", [], ["k"], name="k", value=numpy_helper.from_array(np.arange(3), "kt")),
        helper.make_node("SequenceConstruct", ["k"], ["seq"], name="seq"),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3]),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x4", TensorProto.FLOAT, [1, 1, "h", None]),
        helper.make_tensor_value_info("scales", TensorProto.FLOAT, [4]),
    ]
    inputs[0].metadata_props.add(key="vk", value="vv")
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4]),
        helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 1, "2*h", None]),
        helper.make_tensor_sequence_value_info("seq", TensorProto.INT64, [3]),
    ]
    initializers = [
        numpy_helper.from_array(np.ones(2, np.float32), "unused"),
        numpy_helper.from_array(W, "w"),
        numpy_helper.from_array(np.ones(4, np.float32), "inner_only"),
        numpy_helper.from_array(np.ones(4, ml_dtypes.bfloat16), "half"),
        numpy_helper.from_array(np.array([1, -2, 3], ml_dtypes.int4), "four"),
        numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"),
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers, doc_string="graph doc")
    graph.metadata_props.add(key="gk", value="gv")
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("local", 1)]
    model = helper.make_model(
        graph, opset_imports=imports, ir_version=11, functions=[function], producer_name="p", producer_version="1",
        domain="d", model_version=4, doc_string="model doc",
    )  # fmt: skip
    model.metadata_props.add(key="mk", value="mv")
    module = module_from_proto(model)
    module.modalities["x"] = Modality.IMAGE
    return module


def back(graph: gs.Graph, like: Module) -> Module:
    module = from_graphsurgeon(graph, like)
    require_valid(module)
    return module


def test_round_trip_loses_nothing() -> None:
    module = everything()
    before = ir.to_proto(module.model)
    again = back(to_graphsurgeon(module), module)
    assert ir.to_proto(again.model) == before
    assert (again.modalities, again.remarks, again.provenance) == (module.modalities, module.remarks, module.provenance)
    assert again.signature() == module.signature()


def test_weights_are_neither_read_nor_copied() -> None:
    module = everything()
    graph = to_graphsurgeon(module)
    weight = graph.tensors()["w"]
    assert isinstance(weight._values, gs.ir.tensor.LazyValues)
    again = back(graph, module)
    assert again.graph.initializers["w"].const_value is module.graph.initializers["w"].const_value
    np.testing.assert_array_equal(weight.values, W)
    with pytest.raises(ValueError, match="read-only"):
        weight.values[0, 0] = 1
    assert back(graph, module).graph.initializers["w"].const_value is module.graph.initializers["w"].const_value


def test_dtypes_numpy_lacks() -> None:
    module = everything()
    graph = to_graphsurgeon(module)
    half = graph.tensors()["half"]
    assert half.values.dtype == ml_dtypes.bfloat16
    half.values = half.values * ml_dtypes.bfloat16(3)
    weight = graph.tensors()["w"]
    weight.values = weight.values.astype(ml_dtypes.bfloat16)
    again = from_graphsurgeon(graph, module).graph.initializers
    assert again["half"].const_value.dtype == again["w"].const_value.dtype == ir.DataType.BFLOAT16
    assert again["half"].const_value.numpy().astype(np.float32).tolist() == [3.0] * 4


def test_edits_arrive() -> None:
    module = everything()
    graph = to_graphsurgeon(module)
    (matmul,) = [node for node in graph.nodes if node.op == "MatMul"]
    product = matmul.outputs[0]
    biased = gs.Variable("biased", np.float32, ["batch", 4])
    bias = gs.Constant("bias", np.full(4, 2, np.float32))
    for consumer in list(product.outputs):
        consumer.inputs[list(consumer.inputs).index(product)] = biased
    for node in graph.nodes:
        for inner in node.subgraphs():
            for consumer in inner.nodes:
                consumer.inputs = [biased if tensor is product else tensor for tensor in consumer.inputs]
    graph.nodes.append(gs.Node("Add", "bias_add", inputs=[product, bias], outputs=[biased]))
    (resize,) = [node for node in graph.nodes if node.op == "Resize"]
    resize.attrs["nearest_mode"] = "floor"
    resize.attrs["cubic_coeff_a"] = -1
    resize.attrs["axes"] = np.array([0, 1, 2, 3]).tolist()
    again = back(graph, module)
    nodes = {node.name: node for node in again.graph}
    assert nodes["bias_add"].inputs[0].producer().name == "mm"
    assert [n.name for n in again.graph].index("bias_add") < [n.name for n in again.graph].index("branch")
    assert nodes["resize"].attributes["cubic_coeff_a"].as_float() == -1.0
    assert nodes["resize"].attributes["axes"].as_ints() == (0, 1, 2, 3)
    assert nodes["mm"].doc_string == "node doc"
    assert again.graph.initializers["bias"].const_value.numpy().tolist() == [2.0] * 4
    assert nodes["bias_add"].outputs[0].shape == ir.Shape(["batch", 4])


def test_float_attributes_stay_floats() -> None:
    module = everything()
    graph = to_graphsurgeon(module)
    (call,) = [node for node in graph.nodes if node.op == "f"]
    call.attrs["slope"] = 1
    attribute = {node.name: node for node in back(graph, module).graph}["call"].attributes["slope"]
    assert attribute.type == ir.AttributeType.FLOAT
    assert attribute.as_float() == 1.0


def test_graphsurgeon_own_methods_work_on_it() -> None:
    module = everything()
    graph = to_graphsurgeon(module)
    graph.cleanup().toposort(mode="nodes")  # graphsurgeon's sorting of functions never ends beside subgraphs
    assert {node.name for node in back(graph, module).graph} == {n.name for n in module.graph}
    copy = graph.copy()
    again = {node.name: node for node in back(copy, module).graph}
    assert again["cast"].metadata_props == {"nk": "nv"}
    assert again["mm"].doc_string == "node doc"


def test_folding_with_graphsurgeon() -> None:
    """graphsurgeon's own constant folding, which exports the graph and runs it, sees the right weights."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["w", "w"], ["w2"], name="twice"), helper.make_node("MatMul", ["x", "w2"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [numpy_helper.from_array(W, "w")],
    )
    module = module_from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    folded = back(to_graphsurgeon(module).fold_constants().cleanup(), module)
    assert [node.op_type for node in folded.graph] == ["MatMul"]
    np.testing.assert_array_equal(folded.graph.initializers["w2"].const_value.numpy(), 2 * W)


def test_new_function_with_a_constant() -> None:
    module = everything()
    graph = to_graphsurgeon(module)
    s, r = gs.Variable("s", np.float32), gs.Variable("r", np.float32)
    one = gs.Constant("one", np.ones(1, np.float32))
    graph.functions.append(
        gs.Function("g", domain="local", inputs=[s], outputs=[r], nodes=[gs.Node("Add", inputs=[s, one], outputs=[r])],
                    opset=23)
    )  # fmt: skip
    (call,) = [node for node in graph.nodes if node.op == "f"]
    call.op, call.attrs, call.inputs = "g", {}, call.inputs[:1]
    again = from_graphsurgeon(graph, module)
    assert [node.op_type for node in again.model.functions["local", "g", ""]] == ["Constant", "Add"]


def orphan(graph: gs.Graph) -> None:
    graph.nodes[0].inputs[0] = gs.Variable("nowhere", np.float32)


def twice(graph: gs.Graph) -> None:
    graph.nodes.append(gs.Node("Neg", inputs=[graph.inputs[0]], outputs=[gs.Variable("m", np.float32)]))


def bad_dtype(graph: gs.Graph) -> None:
    graph.nodes[0].outputs[0].dtype = np.dtype("datetime64[s]")


def bad_attribute(graph: gs.Graph) -> None:
    graph.nodes[0].attrs["what"] = object()


def cycle(graph: gs.Graph) -> None:
    graph.nodes[0].inputs[0] = graph.outputs[0]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (orphan, r"nothing produces tensor 'nowhere', which node 'mm' \(MatMul\) uses"),
        (twice, "two tensors named 'm'"),
        (bad_dtype, r"tensor 'm': datetime64\[s\] is no ONNX dtype"),
        (bad_attribute, "attribute 'what' has a value ONNX cannot hold"),
        (cycle, "cycle"),
    ],
)
def test_broken_graphs_are_refused(edit: Callable[[gs.Graph], None], message: str) -> None:
    module = everything()
    graph = to_graphsurgeon(module)
    edit(graph)
    with pytest.raises(PassError, match=message):
        from_graphsurgeon(graph, module)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_conformance_suite_round_trips() -> None:
    from onnx.backend.test.case.node import collect_testcases

    seen = collections.Counter()
    for case in collect_testcases(None):
        if case.model is not None:
            module = module_from_proto(onnx.ModelProto.FromString(case.model.SerializeToString()))
            same = ir.to_proto(from_graphsurgeon(to_graphsurgeon(module), module).model) == ir.to_proto(module.model)
            seen[same] += 1
    assert set(seen) == {True}
    assert seen[True] > 1000
