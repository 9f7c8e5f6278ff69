"""Conversion to the working opset: onnxruntime runs the old model and the new one, and must give the same."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from mmopt.frontends.onnx import module_from_proto
from mmopt.frontends.opset import WORKING_OPSET
from mmopt.frontends.opset_changes import changes_after
from mmopt.ir.module import Module
from mmopt.ir.verify import require_valid

RNG = np.random.default_rng(7)
X4 = RNG.standard_normal((2, 4, 6, 6), dtype=np.float32)
X3 = RNG.standard_normal((2, 3, 4), dtype=np.float32)


def build(
    op: str,
    opset: int,
    feeds: dict[str, np.ndarray],
    weights: dict[str, np.ndarray] | None = None,
    outputs: int = 1,
    typed: bool = True,
    kind: int = TensorProto.FLOAT,
    **attributes: object,
) -> onnx.ModelProto:
    """A model of one node. Inputs of the node are the feeds, then the weights, in order."""
    inputs = [
        helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape if typed else None)
        for k, v in feeds.items()
    ]
    names = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, [*feeds, *(weights or {})], names, name="n", **attributes)
    results = [helper.make_tensor_value_info(name, kind, None) for name in names]
    initializers = [onnx.numpy_helper.from_array(v, k) for k, v in (weights or {}).items()]
    graph = helper.make_graph([node], "g", inputs, results, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def convert(model: onnx.ModelProto) -> Module:
    return module_from_proto(onnx.ModelProto.FromString(model.SerializeToString()))


def check_same(model: onnx.ModelProto, feeds: dict[str, np.ndarray], opset: int = WORKING_OPSET) -> Module:
    expected = run(model, feeds)
    if model.graph.input[0].type.tensor_type.HasField("shape"):
        for info, value in zip(model.graph.output, expected, strict=True):
            info.CopyFrom(helper.make_tensor_value_info(info.name, info.type.tensor_type.elem_type, value.shape))
    module = convert(model)
    assert module.opset == opset, module.remarks
    if model.graph.input[0].type.tensor_type.HasField("shape"):
        require_valid(module)
    for old, new in zip(expected, run(ir.to_proto(module.model), feeds), strict=True):
        assert old.dtype == new.dtype
        np.testing.assert_allclose(new, old, rtol=1e-6, atol=1e-6)
    return module


BOXES = np.array([[0, 0, 5, 5], [1, 1, 4, 3]], np.float32)
CASES = {
    "slice": ("Slice", 9, {"x": X4}, {}, {"starts": [1, 0], "ends": [4, 3], "axes": [1, 2]}),
    "slice without axes": ("Slice", 7, {"x": X4}, {}, {"starts": [0, 1], "ends": [2, 3]}),
    "clip": ("Clip", 8, {"x": X4}, {}, {"min": -0.5, "max": 0.25}),
    "clip below": ("Clip", 10, {"x": X4}, {}, {"min": 0.0}),
    "pad": ("Pad", 10, {"x": X3}, {}, {"pads": [0, 1, 2, 0, 0, 1], "value": 2.5}),
    "pad edge": ("Pad", 7, {"x": X3}, {}, {"pads": [0, 1, 0, 0, 0, 1], "mode": "edge"}),
    "upsample nearest": ("Upsample", 7, {"x": X4}, {}, {"scales": [1.0, 1.0, 2.0, 3.0], "mode": "nearest"}),
    "upsample linear": ("Upsample", 8, {"x": X4}, {}, {"scales": [1.0, 1.0, 2.0, 2.0], "mode": "linear"}),
    "upsample 9": ("Upsample", 9, {"x": X4}, {"s": np.array([1, 1, 2, 2.5], np.float32)}, {}),
    "resize up": ("Resize", 10, {"x": X4}, {"s": np.array([1, 1, 1.5, 2.5], np.float32)}, {}),
    "resize down": ("Resize", 10, {"x": X4}, {"s": np.array([1, 1, 0.5, 0.7], np.float32)}, {}),
    "resize linear": ("Resize", 10, {"x": X4}, {"s": np.array([1, 1, 0.6, 2], np.float32)}, {"mode": "linear"}),
    "softmax default axis": ("Softmax", 11, {"x": X3}, {}, {}),
    "softmax last": ("Softmax", 9, {"x": X3}, {}, {"axis": 2}),
    "softmax negative": ("Softmax", 12, {"x": X3}, {}, {"axis": -2}),
    "softmax from 0": ("Softmax", 12, {"x": X3}, {}, {"axis": 0}),
    "log softmax": ("LogSoftmax", 7, {"x": X3}, {}, {"axis": 1}),
    "hardmax": ("Hardmax", 11, {"x": X3}, {}, {}),
    "squeeze": ("Squeeze", 11, {"x": X3[:, :1]}, {}, {"axes": [1]}),
    "squeeze all": ("Squeeze", 12, {"x": X3[:, :1]}, {}, {}),
    "unsqueeze": ("Unsqueeze", 12, {"x": X3}, {}, {"axes": [0, -1]}),
    "reduce sum": ("ReduceSum", 11, {"x": X3}, {}, {"axes": [1], "keepdims": 0}),
    "reduce mean": ("ReduceMean", 17, {"x": X3}, {}, {"axes": [0, 2]}),
    "reduce max all": ("ReduceMax", 13, {"x": X3}, {}, {}),
    "reduce l2": ("ReduceL2", 7, {"x": X3}, {}, {"axes": [1]}),
    "roi align": (
        "RoiAlign",
        10,
        {"x": X4},
        {"rois": BOXES, "batch": np.array([0, 1])},
        {"output_height": 2, "output_width": 3},
    ),
    "grid sample": (
        "GridSample",
        16,
        {"x": X4, "grid": RNG.uniform(-1, 1, (2, 3, 3, 2)).astype(np.float32)},
        {},
        {"mode": "bicubic"},
    ),
    "grid sample default": ("GridSample", 16, {"x": X4, "grid": np.zeros((2, 3, 3, 2), np.float32)}, {}, {}),
    "dft": ("DFT", 17, {"x": RNG.standard_normal((2, 8, 1), dtype=np.float32)}, {}, {"axis": 1}),
    "group norm": (
        "GroupNormalization",
        18,
        {"x": X4},
        {"scale": np.array([2, 3], np.float32), "bias": np.array([1, -1], np.float32)},
        {"num_groups": 2},
    ),
    "batch norm": (
        "BatchNormalization",
        7,
        {"x": X4},
        {k: np.array([1, 2, 0.5, 3], np.float32) for k in ("scale", "bias", "mean", "var")},
        {"epsilon": 1e-3},
    ),
    "scatter": (
        "Scatter",
        9,
        {"x": np.zeros((3, 3), np.float32)},
        {"i": np.array([[1, 0, 2]]), "u": np.array([[1.0, 2, 3]], np.float32)},
        {"axis": 0},
    ),
}


@pytest.mark.parametrize("typed", [True, False], ids=["shapes", "no shapes"])
@pytest.mark.parametrize("case", CASES)
def test_converted_node_computes_the_same(case: str, typed: bool) -> None:
    op, opset, feeds, weights, attributes = CASES[case]
    model = build(op, opset, feeds, weights, typed=typed, **attributes)
    check_same(model, feeds, 21 if op == "RoiAlign" else WORKING_OPSET)


def test_topk_split_and_dropout() -> None:
    feeds = {"x": X3}
    topk = build("TopK", 9, feeds, outputs=2, k=2, axis=-1)
    topk.graph.output[1].type.tensor_type.elem_type = TensorProto.INT64
    check_same(topk, feeds)
    check_same(build("Split", 11, feeds, outputs=2, axis=2, split=[1, 3]), feeds)
    check_same(build("Split", 13, feeds, outputs=3, axis=1), feeds)
    module = check_same(build("Dropout", 7, feeds, ratio=0.25), feeds)
    (constant, dropout) = module.graph
    assert constant.attributes["value"].as_tensor().numpy() == np.float32(0.25)
    assert dropout.inputs[1] is constant.outputs[0]


def test_hardmax_and_softmax_keep_their_node() -> None:
    """The node keeps name, metadata and outputs; helpers stand before it and carry its metadata."""
    model = build("Softmax", 11, {"x": X3})
    model.graph.node[0].metadata_props.add(key="k", value="v")
    module = convert(model)
    nodes = list(module.graph)
    assert [node.op_type for node in nodes] == ["Flatten", "Softmax", "Shape", "Reshape"]
    assert nodes[-1].name == "n"
    assert nodes[-1].outputs[0] is module.graph.outputs[0]
    assert all(node.metadata_props["k"] == "v" for node in nodes)


def test_clip_of_unknown_dtype_casts_its_bounds() -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Clip", ["h"], ["y"], min=-1.0, max=0.5)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=5)
    module = check_same(model, {"x": np.array([-1, 0.25, 2], np.float16)})
    assert "CastLike" in {node.op_type for node in module.graph}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            build("BatchNormalization", 7, {"x": X4}, {k: np.ones((4, 6, 6), np.float32) for k in "sbmv"}, spatial=0),
            "spatial",
        ),
        (build("Resize", 10, {"x": X4}, {"s": np.array([1, 1, 0.5, 2], np.float32)}), "shrinks another"),
        (build("Resize", 10, {"x": X4, "s": np.ones(4, np.float32)}), "computed"),
        (build("NoSuchOperator", 12, {"x": X4}), "no operator of this name"),
    ],
    ids=["spatial", "mixed resize", "computed scales", "unknown"],
)
def test_what_cannot_be_converted_stays_at_its_opset(model: onnx.ModelProto, reason: str) -> None:
    module = convert(model)
    assert module.opset == model.opset_import[0].version
    assert [node.op_type for node in module.graph] == [model.graph.node[0].op_type]
    assert any(reason in remark.message for remark in module.remarks)


def test_nothing_changes_when_one_node_fails() -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Squeeze", ["x"], ["h"], axes=[0]),
            helper.make_node("Resize", ["h", "s"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xs"],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    module = convert(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=5))
    assert module.opset == 10
    assert [node.op_type for node in module.graph] == ["Squeeze", "Resize"]
    assert module.graph[0].attributes["axes"].as_ints() == (0,)


def test_nodes_in_subgraphs_and_functions_are_converted() -> None:
    body = helper.make_graph(
        [helper.make_node("Squeeze", ["x"], ["a"], axes=[0])], "then", [], [helper.make_tensor_value_info("a", 1, None)]
    )
    other = helper.make_graph(
        [helper.make_node("f", ["x"], ["b"], domain="local", axes=[0])],
        "else",
        [],
        [helper.make_tensor_value_info("b", 1, None)],
    )
    squeeze = helper.make_node("Squeeze", ["u"], ["v"])
    squeeze.attribute.add(name="axes", type=onnx.AttributeProto.INTS, ref_attr_name="axes")
    double = helper.make_node("Add", ["v", "v"], ["w"])
    function = helper.make_function(
        "local", "f", ["u"], ["w"], [squeeze, double], [helper.make_opsetid("", 12)], attributes=["axes"]
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=other)],
        "g",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, []), helper.make_tensor_value_info("x", 1, [1, 3])],
        [helper.make_tensor_value_info("y", 1, None)],
    )
    imports = [helper.make_opsetid("", 12), helper.make_opsetid("local", 1)]
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8)
    module = convert(model)
    assert module.opset == WORKING_OPSET
    x = np.array([[1, 2, 3]], np.float32)
    proto = ir.to_proto(module.model)
    np.testing.assert_array_equal(run(proto, {"c": np.array(True), "x": x})[0], x[0])
    np.testing.assert_array_equal(run(proto, {"c": np.array(False), "x": x})[0], 2 * x[0])


@pytest.mark.parametrize("opset", [24, 26, 28, 31])
def test_newer_opset_with_unchanged_operators_is_relabelled(opset: int) -> None:
    model = build("Transpose", opset, {"x": X3}, perm=[0, 2, 1])
    module = convert(model)
    assert module.opset == WORKING_OPSET
    np.testing.assert_array_equal(run(ir.to_proto(module.model), {"x": X3})[0], X3.transpose(0, 2, 1))
    assert any("newer than the installed onnx" in r.message for r in module.remarks) == (opset == 31)


def test_newer_operator_keeps_the_lowest_opset_that_has_it() -> None:
    module = convert(build("Swish", 28, {"x": X3}))
    assert module.opset == 24
    module = convert(build("Cast", 28, {"x": X3}, kind=TensorProto.FLOAT8E8M0, to=TensorProto.FLOAT8E8M0))
    assert module.opset == 24
    assert module.model.ir_version >= 12


def test_opset_below_7_goes_through_the_library_converter() -> None:
    model = build("Add", 6, {"x": X3, "b": np.ones((3, 4), np.float32)}, broadcast=1, axis=1)
    model.ir_version = 3
    module = convert(model)
    assert module.opset == WORKING_OPSET
    feeds = {"x": X3, "b": np.full((3, 4), 2, np.float32)}
    np.testing.assert_allclose(run(ir.to_proto(module.model), feeds)[0], X3 + 2)


def test_channel_prelu_of_opset_6_is_not_converted_to_something_else() -> None:
    model = build("PRelu", 6, {"x": X4}, {"slope": np.ones(4, np.float32)})
    assert convert(model).opset == 6


def test_old_names_of_the_default_domain() -> None:
    model = build("Relu", 12, {"x": X3})
    model.opset_import[0].domain = "ai.onnx"
    model.graph.node[0].domain = "ai.onnx"
    assert convert(model).opset == WORKING_OPSET


def _shape_of(schema: onnx.defs.OpSchema) -> tuple[list[str], list[str], dict[str, tuple[str, bool, object]]]:
    attributes = {
        name: (str(a.type), a.required, helper.get_attribute_value(a.default_value) if a.default_value.name else None)
        for name, a in schema.attributes.items()
    }
    return [str(i.option) for i in schema.inputs], [str(o.option) for o in schema.outputs], attributes


def _extends(old: onnx.defs.OpSchema, new: onnx.defs.OpSchema) -> bool:
    """Every node valid for ``old`` is valid for ``new``, by signature: more optional parts only, no changed default."""
    old_in, old_out, old_attributes = _shape_of(old)
    new_in, new_out, new_attributes = _shape_of(new)
    optional = "FormalParameterOption.Optional"
    same_inputs = all(b in (a, optional) for a, b in zip(old_in, new_in, strict=False))
    return (
        not new.deprecated
        and len(new_in) >= len(old_in) and same_inputs and all(o == optional for o in new_in[len(old_in):])
        and new_out[: len(old_out)] == old_out and all(o == optional for o in new_out[len(old_out):])
        and all(name in new_attributes and new_attributes[name][::2] == a[::2] for name, a in old_attributes.items())
        and not any(a[1] for name, a in new_attributes.items() if name not in old_attributes)
    )  # fmt: skip


def test_list_of_changes_is_complete_by_signature() -> None:
    """No operator between opset 7 and the working one changed its signature without an adapter."""
    versions = collections.defaultdict(list)
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.since_version <= WORKING_OPSET:
            versions[schema.name].append(schema)
    missing = []
    for name, schemas in versions.items():
        schemas.sort(key=lambda schema: schema.since_version)
        for old, new in itertools.pairwise(schemas):
            listed = any(old.since_version < since <= new.since_version for since, _ in changes_after(name, 0))
            if new.since_version > 7 and not _extends(old, new) and not listed:
                missing.append(f"{name} {old.since_version} to {new.since_version}")
    assert not missing
