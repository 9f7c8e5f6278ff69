from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper
from onnx.backend.test.case.node import collect_testcases

from mmopt.errors import VerifyError
from mmopt.ir.module import Module
from mmopt.ir.verify import describe, require_valid, verify
from tests.pass_models import FLOAT, INT64, audio_model, fused_model, make_module, text_image_model
from tests.wrong_passes import find


def codes(module, **options):
    return [problem.code for problem in verify(module, **options)]


@pytest.mark.parametrize("build", [text_image_model, audio_model, fused_model])
def test_valid_modules_have_no_problems_and_stay_as_they_are(build):
    module = build()
    text = ir.to_proto(module.model).SerializeToString(deterministic=True)

    assert verify(module) == []
    assert ir.to_proto(module.model).SerializeToString(deterministic=True) == text
    require_valid(module)


def test_all_problems_are_collected_not_the_first():
    module = text_image_model()
    find(module, "activated").op_type = "Rellu"
    find(module, "weights").attributes["axes"] = ir.AttrInt64("axes", -1)
    module.graph.initializers["half"].const_value = None

    problems = verify(module)

    assert {problem.code for problem in problems} >= {"unknown-operator", "unknown-attribute", "empty-initializer"}
    assert "did you mean 'Relu'?" in describe(problems)
    with pytest.raises(VerifyError, match=r"model\.onnx: 3 problems") as caught:
        require_valid(module, where="model.onnx")
    assert "make_activated (Rellu)" in str(caught.value)


def test_same_names_in_sibling_branches_are_no_duplicates():
    module = audio_model()
    node = find(module, "chosen")
    for branch in ("then_branch", "else_branch"):
        inner = next(iter(node.attributes[branch].as_graph()))
        inner.name, inner.outputs[0].name = "same", "same_out"

    assert verify(module) == []


def test_name_of_an_outer_value_inside_a_branch_is_a_duplicate():
    module = audio_model()
    inner = next(iter(find(module, "chosen").attributes["then_branch"].as_graph()))
    inner.outputs[0].name = "gelu"

    assert "duplicate-name" in codes(module)


def test_value_used_in_a_branch_before_it_is_made():
    module = audio_model()
    inner = next(iter(find(module, "chosen").attributes["then_branch"].as_graph()))
    inner.replace_input_with(1, find(module, "audio").outputs[0])

    assert "undefined-value" in codes(module)


def test_value_made_inside_a_branch_cannot_be_seen_outside():
    module = audio_model()
    inner = next(iter(find(module, "chosen").attributes["then_branch"].as_graph()))
    find(module, "audio").replace_input_with(2, inner.outputs[0])

    problems = verify(module)
    assert any("cannot be seen from here" in problem.message for problem in problems)


def test_function_that_calls_itself():
    module = fused_model()
    function = next(iter(module.model.functions.values()))
    function.opset_imports["mmopt.fused"] = 1
    first = next(iter(function))
    call = ir.node("MatMulBias", [*function.inputs], domain="mmopt.fused")
    call.outputs[0].name = "again"
    function.insert_before(first, call)

    assert "recursive-function" in codes(module)


def test_function_called_with_too_many_inputs():
    module = fused_model()
    call = next(iter(module.graph))
    call.resize_inputs(4)
    call.replace_input_with(3, call.inputs[0])

    assert codes(module) == ["arity"]


def test_wrong_annotations_are_found_by_inference():
    def build(dtype, shape):
        nodes = [
            helper.make_node("Shape", ["x"], ["s"], name="shape"),
            helper.make_node("Transpose", ["x"], ["t"], name="turn", perm=[1, 0]),
            helper.make_node("Shape", ["t"], ["y"], name="out"),
        ]
        module = make_module(nodes, [("x", FLOAT, ["n", 3])], [("y", INT64, [2])], {})
        value = find(module, "t").outputs[0]
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        return module

    assert verify(build(ir.DataType.FLOAT, [3, "anything"])) == []
    assert codes(build(ir.DataType.FLOAT, [3, 3, 1])) == ["stale-shape"]
    assert codes(build(ir.DataType.FLOAT, [4, "n"])) == ["stale-shape"]
    assert codes(build(ir.DataType.INT64, [3, "n"])) == ["stale-type"]
    assert codes(build(ir.DataType.INT64, [3, "n"]), infer=False) == []


def test_large_weights_are_checked_without_being_serialized():
    rows = 300
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    weights = {"w": np.zeros((rows, rows), np.float32)}
    module = make_module(nodes, [("x", FLOAT, ["n", rows])], [("y", FLOAT, ["n", rows])], weights)
    assert verify(module) == []

    module.graph.outputs[0].shape = ir.Shape(["n", rows + 1])

    assert codes(module) == ["stale-shape"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_standard_operator_tests_are_valid():
    """No false alarm on one in ten of the operator tests that come with onnx."""
    wrong = {}
    for case in list(collect_testcases(None))[::10]:
        if problems := verify(Module(ir.from_proto(case.model))):
            wrong[case.name] = str(problems[0])

    assert wrong == {}
