"""Projections of one attention become one product; weights that others need stay as they are."""

from __future__ import annotations

import numpy as np
import pytest

from mmopt.ir.module import Module
from mmopt.transforms.raising.raise_attention import RaiseAttention
from mmopt.transforms.rewrite.merge_projections import MergeProjections
from tests.attention_spellings import Spelling, build
from tests.canonical import count_ops, module_from
from tests.raising import raise_and_check


def _raised(spelling: Spelling) -> Module:
    module = build(spelling)
    module.model.opset_imports[""] = module.graph.opset_imports[""] = 23
    return raise_and_check(RaiseAttention(), module)[0]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_self_attention_has_one_projection(dynamic: bool) -> None:
    module = _raised(Spelling(dynamic=dynamic))
    weights = [
        np.asarray(v.const_value.numpy()) for v in module.graph.initializers.values() if v.const_value is not None
    ]
    merged, _ = raise_and_check(MergeProjections(), module)
    assert count_ops(merged) == {"MatMul": 1, "Add": 1, "Split": 1, "Attention": 1}
    (product,) = [node for node in merged.graph if node.op_type == "MatMul"]
    whole = np.asarray(product.inputs[1].const_value.numpy())  # type: ignore[union-attr]
    assert whole.shape == (8, 24)
    for number, weight in enumerate(weight for weight in weights if weight.shape == (8, 8)):
        np.testing.assert_array_equal(whole[:, 8 * number : 8 * number + 8], weight)


def test_cross_attention_merges_keys_and_values() -> None:
    merged, _ = raise_and_check(MergeProjections(), _raised(Spelling(keys=7)))
    assert count_ops(merged) == {"MatMul": 2, "Add": 1, "Split": 1, "Attention": 1}


def test_fewer_heads_for_keys_and_values() -> None:
    merged, _ = raise_and_check(MergeProjections(), _raised(Spelling(heads=4, kept=2)))
    (split,) = [node for node in merged.graph if node.op_type == "Split"]
    assert [None if output.shape is None else output.shape[-1] for output in split.outputs] == [16, 8, 8]


ATTENTION = """
g (float[2, 5, 8] x) => (float[2, 5, 8] y{result})
<float[8, 8] a = {{{ones}}}, float[8, 8] b = {{{twos}}}, float[8, 8] c = {{{threes}}}>
{{ q = MatMul(x, a) k = MatMul(x, {second}) v = MatMul(x, c)
   y = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v) {more} }}
"""


def _model(second: str = "b", more: str = "", result: str = "") -> Module:
    numbers = {name: ", ".join([str(n)] * 64) for n, name in ((0.1, "ones"), (0.2, "twos"), (0.3, "threes"))}
    return module_from(ATTENTION.format(second=second, more=more, result=result, **numbers), opset=23)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"second": "a"}, "weights"),
        ({"more": "z = MatMul(x, b)", "result": ", float[2, 5, 8] z"}, ""),
        ({"more": "z = Relu(k)", "result": ", float[2, 5, 8] z"}, "needed elsewhere"),
    ],
    ids=["shared weights", "equal products", "result needed"],
)
def test_stays(change: dict[str, str], reason: str) -> None:
    module, missed = raise_and_check(MergeProjections(), _model(**change))
    assert count_ops(module)["MatMul"] >= 2
    assert "Split" not in count_ops(module)
    assert not reason or any(reason in said for _, said in missed)


def test_merges_without_bias() -> None:
    module, _ = raise_and_check(MergeProjections(), _model())
    assert count_ops(module) == {"MatMul": 1, "Split": 1, "Attention": 1}


GATED_MODEL = """
g (float[2, 5, 8] x) => (float[2, 5, 6] y{result})
<float[8, 6] a = {{{ones}}}, float[8, 6] b = {{{twos}}}, float[6] c = {{0, 1, 2, 3, 4, 5}}, float f = {{1.702}}>
{{ z = Relu(x) g0 = MatMul(x, a) g = Add(g0, c) u = MatMul({source}, {weight}) {gate} y = Mul({order}) }}
"""


def _gated(gate: str, order: str = "h, u", weight: str = "b", source: str = "x", result: str = "") -> Module:
    rows = {name: ", ".join(f"{(n * k) % 7 - 3}" for n in range(48)) for name, k in (("ones", 3), ("twos", 5))}
    text = GATED_MODEL.format(**rows, gate=gate, order=order, weight=weight, source=source, result=result)
    return module_from(text, opset=23)


GATES = {
    "GLU": "h = Sigmoid(g)",
    "GEGLU": "h = Gelu(g)",
    "ReGLU": "h = Relu(g)",
    "SwiGLU": "s = Sigmoid(g) h = Mul(g, s)",
    "SwiGLU with a factor": "k = Mul(g, f) s = Sigmoid(k) h = Mul(s, g)",
    "bilinear": "h = Identity(g)",
}


@pytest.mark.parametrize("gate", list(GATES))
@pytest.mark.parametrize("order", ["h, u", "u, h"])
def test_gated_layers(gate: str, order: str) -> None:
    module, missed = raise_and_check(MergeProjections(gated=True), _gated(GATES[gate], order))
    assert count_ops(module)["MatMul"] == 1, missed
    assert count_ops(module)["Split"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"weight": "a"},
        {"source": "z"},
        {"result": ", float[2, 5, 6] u"},
        {"order": "h, g"},
        {"gate": "h = Sub(g, u)"},
    ],
    ids=["one weight", "other inputs", "an output", "one projection", "not one function of the gate"],
)
def test_gated_layers_that_stay(change: dict[str, str]) -> None:
    arguments = {"gate": GATES["GEGLU"], **change}
    module, _ = raise_and_check(MergeProjections(gated=True), _gated(**arguments))
    assert count_ops(module)["MatMul"] >= 1
    assert "Split" not in count_ops(module)


def test_gated_layers_stay_unless_asked_for() -> None:
    module, _ = raise_and_check(MergeProjections(), _gated(GATES["GEGLU"]))
    assert count_ops(module)["MatMul"] == 2
