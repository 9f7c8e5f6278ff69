"""The passes in passes/examples, in all their forms, on models that they fire on and models that they leave alone."""

from __future__ import annotations

import pathlib
import re

import numpy as np
import pytest

from mmopt.pipeline.registry import resolve
from mmopt.testing import check_pass
from tests.pass_models import FLOAT, audio_model, make_module, text_image_model

EXAMPLES = pathlib.Path(__file__).parents[2] / "passes" / "examples"


def example(name: str):
    return resolve(f"{EXAMPLES}/{name}")


def ops(module):
    return [node.op_type for node in module.graph]


def clip_model(low, high):
    from onnx import helper

    inputs = ["x", "low", "high" if high is not None else ""]
    weights = {"low": np.float32(low)} | ({} if high is None else {"high": np.float32(high)})
    nodes = [helper.make_node("Clip", inputs, ["y"], name="clip")]
    return make_module(nodes, [("x", FLOAT, ["n", 3])], [("y", FLOAT, ["n", 3])], weights)


def test_every_example_file_is_tested_here():
    source = pathlib.Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert path.name in source, path


def test_class_form_replaces_clip():
    checked = check_pass(example("clip_to_relu.py:ClipToRelu"), clip_model(0, None))

    assert ops(checked.module) == ["Relu"]


@pytest.mark.parametrize(("low", "high"), [(-1, None), (0, 6)])
def test_class_form_says_why_it_left_a_clip_alone(low, high):
    checked = check_pass(example("clip_to_relu.py:ClipToRelu"), clip_model(low, high), fires=False)

    assert [remark.kind for remark in checked.record.remarks] == ["missed"]


def test_class_form_takes_an_option():
    check_pass(example("clip_to_relu.py:ClipToRelu{largest=100}"), clip_model(0, 1000))


def test_function_form_caps_constants():
    checked = check_pass(example("cap_constants.py:cap_constants{largest=1000}"), text_image_model())

    assert checked.module.graph.initializers["fill"].const_value.numpy() == -1000
    check_pass(example("cap_constants.py:cap_constants"), text_image_model(), fires=False)


def dense_model(bias_width=3):
    from onnx import helper

    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], name="product"),
        helper.make_node("Add", ["b", "p"], ["y"], name="bias"),
    ]
    weights = {
        "w": rng.standard_normal((4, 3)).astype(np.float32),
        "b": rng.standard_normal(bias_width).astype(np.float32),
    }
    return make_module(nodes, [("x", FLOAT, ["n", 4])], [("y", FLOAT, ["n", 3])], weights)


def test_graphsurgeon_form_joins_product_and_bias():
    checked = check_pass(example("matmul_add_to_gemm.py:matmul_add_to_gemm"), dense_model())

    assert ops(checked.module) == ["Gemm"]


def test_graphsurgeon_form_leaves_other_additions_alone():
    check_pass(example("matmul_add_to_gemm.py:matmul_add_to_gemm"), dense_model(bias_width=1), fires=False)
    check_pass(example("matmul_add_to_gemm.py:matmul_add_to_gemm"), audio_model(), fires=False)


def test_fx_form_runs_before_export():
    torch = pytest.importorskip("torch")
    from mmopt.frontends.torch import load_torch

    class Twice(torch.nn.Module):
        def forward(self, x):
            return torch.relu(torch.relu(x)) + 1

    inputs = (torch.randn(2, 3),)
    pass_ = example("relu_once.py:relu_once")
    rewritten = pass_.run_fx(torch.export.export(Twice(), inputs).graph_module)
    module = load_torch(Twice(), inputs, fx_passes=[pass_])

    assert sum(node.target is torch.ops.aten.relu.default for node in rewritten.graph.nodes) == 1
    assert ("relu-once", "applied") in [(remark.source, remark.kind) for remark in module.remarks]


def test_fx_form_leaves_a_remark_on_a_model_that_is_onnx_already():
    checked = check_pass(example("relu_once.py:relu_once"), text_image_model(), fires=False)

    assert "before export" in checked.record.remarks[0].message


def test_class_in_the_readme_runs(tmp_path):
    readme = (EXAMPLES.parent / "README.md").read_text()
    code = re.search(r"```python\n(import dataclasses.*?)```", readme, flags=re.DOTALL).group(1)
    (tmp_path / "drop_docs.py").write_text(code)
    model = text_image_model()
    next(iter(model.graph)).doc_string = "to be removed"

    check_pass(resolve(f"{tmp_path}/drop_docs.py:DropDocs{{keep=nothing}}"), model)
