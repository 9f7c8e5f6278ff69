"""Attention is recognised in every spelling, means the same afterwards, and nothing else is taken for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.raising.raise_attention import RaiseAttention
from tests.attention_spellings import LAYOUTS, MASKS, SCALES, Spelling, build, feeds_for
from tests.canonical import count_ops, evaluate, module_from
from tests.raising import raise_and_check


def raised(module: Module, *, feeds: dict[str, Any] | None = None) -> tuple[Module, list[tuple[str, str]]]:
    """``module`` with its attention raised, and the misses."""
    return raise_and_check(RaiseAttention(), module, feeds_for(module) if feeds is None else feeds)


def _working(spelling: Spelling) -> Module:
    module = build(spelling)
    module.model.opset_imports[""] = 23
    module.graph.opset_imports[""] = 23
    return module


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(layout: str, mask: str, dynamic: bool) -> None:
    module, missed = raised(_working(Spelling(layout=layout, mask=mask, dynamic=dynamic)))
    if layout == "bmm" and dynamic and mask in ("added", "chosen", "bert", "scaled"):
        # The mask of flattened heads has rows of the literal 5, which nothing says is the length of the sequence.
        assert any("an axis of the mask" in reason for _, reason in missed)
        return
    assert count_ops(module).get("Attention") == 1, missed
    assert "Softmax" not in count_ops(module)
    (node,) = [n for n in module.graph if n.op_type == "Attention"]
    assert ("is_causal" in node.attributes) is mask.startswith("causal")
    assert len(node.inputs) == (3 if mask == "none" or mask.startswith("causal") else 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", SCALES)
def test_scales(layout: str, scale: str) -> None:
    module, missed = raised(_working(Spelling(layout=layout, scale=scale)))
    (node,) = [n for n in module.graph if n.op_type == "Attention"]
    assert node.attributes["scale"].as_float() == pytest.approx(1.0 if scale == "none" else 0.5)
    assert not any(n.op_type in ("Mul", "Div") for n in module.graph), missed


@pytest.mark.parametrize(
    "change",
    [
        {"keys": 7},
        {"keys": 7, "mask": "chosen"},
        {"softcap": 2.0},
        {"softcap": 2.0, "mask": "added", "scale": "query"},
        {"guard": True, "mask": "chosen"},
        {"merged": False},
        {"heads": 4, "kept": 2},
        {"heads": 4, "kept": 1},
        {"heads": 1, "kept": 1},
        {"size": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["heads", "bmm", "einsum"])
def test_variants(layout: str, change: dict[str, Any]) -> None:
    spelling = dataclasses.replace(Spelling(layout=layout), **change)
    module, missed = raised(_working(spelling))
    assert count_ops(module).get("Attention") == 1, missed
    (node,) = [n for n in module.graph if n.op_type == "Attention"]
    if spelling.kept < spelling.heads and layout != "bmm":
        assert "Expand" not in count_ops(module)
    assert ("softcap" in node.attributes) is bool(spelling.softcap)


@pytest.mark.parametrize("layout", ["heads", "split", "gather"])
def test_projections_are_read_where_they_are(layout: str) -> None:
    module, _ = raised(_working(Spelling(layout=layout)))
    assert "Transpose" not in count_ops(module)
    assert "Reshape" not in count_ops(module)


HEADS = """
g (float[2, 2, 5, 4] q, float[2, 2, 6, 4] k, float[2, 2, 6, 3] v) => (float[2, 2, 5, 3] y{more_type})
<float scale = {{0.5}}, float zero = {{0.0}}>
{{
  kt = Transpose<perm=[0, 1, 3, 2]>(k)
  s = MatMul(q, kt)
  t = Mul(s, scale)
  p = Softmax<axis={axis}>(t)
  y = MatMul(p, v)
  {more}
}}
"""


def _heads(axis: int = -1, more: str = "", more_type: str = "") -> Module:
    return module_from(HEADS.format(axis=axis, more=more, more_type=more_type), opset=23)


def test_fires_on_plain_heads() -> None:
    module, _ = raised(_heads())
    assert count_ops(module) == {"Attention": 1}


@pytest.mark.parametrize(
    ("more", "more_type", "reason"),
    [
        ("z = Identity(p)", ", float[2, 2, 5, 6] z", "weights are needed elsewhere"),
        ("z = Identity(t)", ", float[2, 2, 5, 6] z", "scores of"),
        ("z = Relu(s)", ", float[2, 2, 5, 6] z", "scores of"),
    ],
)
def test_keeps_what_is_needed_elsewhere(more: str, more_type: str, reason: str) -> None:
    module, missed = raised(_heads(more=more, more_type=more_type))
    assert "Attention" not in count_ops(module)
    assert any(reason in said for _, said in missed)


NOT_ATTENTION = {
    "softmax over the queries": (
        "float[2, 5, 4] q, float[2, 5, 4] k, float[2, 5, 3] v",
        "kt = Transpose<perm=[0, 2, 1]>(k) s = MatMul(q, kt) p = Softmax<axis=1>(s) y = MatMul(p, v)",
    ),
    "a negative scale": (
        "float[2, 5, 4] q, float[2, 5, 4] k, float[2, 5, 3] v",
        "kt = Transpose<perm=[0, 2, 1]>(k) s0 = MatMul(q, kt) c = Constant<value = float {-1.0}>() s = Mul(s0, c) "
        "p = Softmax<axis=-1>(s) y = MatMul(p, v)",
    ),
    "a scale for each head": (
        "float[2, 3, 5, 4] q, float[2, 3, 5, 4] k, float[2, 3, 5, 3] v, float[3, 1, 1] c",
        "kt = Transpose<perm=[0, 1, 3, 2]>(k) s0 = MatMul(q, kt) s = Mul(s0, c) "
        "p = Softmax<axis=-1>(s) y = MatMul(p, v)",
    ),
    "a mask that leaves weight": (
        "float[2, 5, 4] q, float[2, 5, 4] k, float[2, 5, 3] v, bool[5, 5] m",
        "kt = Transpose<perm=[0, 2, 1]>(k) s0 = MatMul(q, kt) c = Constant<value = float {-2.0}>() s = Where(m, s0, c) "
        "p = Softmax<axis=-1>(s) y = MatMul(p, v)",
    ),
    "batches of queries against one of keys": (
        "float[2, 5, 4] q, float[5, 4] k, float[5, 3] v",
        "kt = Transpose<perm=[1, 0]>(k) s = MatMul(q, kt) p = Softmax<axis=-1>(s) y = MatMul(p, v)",
    ),
    "values from the left": (
        "float[2, 5, 4] q, float[2, 5, 4] k, float[2, 3, 5] v",
        "kt = Transpose<perm=[0, 2, 1]>(k) s = MatMul(q, kt) p = Softmax<axis=-1>(s) y = MatMul(v, p)",
    ),
    "weights of a classifier": (
        "float[2, 5, 4] q, float[2, 6, 3] v",
        "w = Constant<value_floats=[1.0, 2.0, 3.0, 4.0]>() c = Constant<value_ints=[4, 1]>() w2 = Reshape(w, c) "
        "s0 = MatMul(q, w2) n = Constant<value_ints=[1, 1, 6]>() s = Tile(s0, n) p = Softmax<axis=-1>(s) "
        "y = MatMul(p, v)",
    ),
}


@pytest.mark.parametrize("case", NOT_ATTENTION)
def test_is_not_attention(case: str) -> None:
    inputs, nodes = NOT_ATTENTION[case]
    result = "float[2, 3, 5, 3]" if case == "a scale for each head" else "float[a, b, c]"
    module = module_from(f"g ({inputs}) => ({result} y) {{ {nodes} }}", opset=23)
    random = np.random.default_rng(0)
    feeds = {}
    for value in module.graph.inputs:
        array = random.standard_normal([d for d in value.shape or () if isinstance(d, int)])
        feeds[str(value.name)] = array > 0 if value.name == "m" else array.astype(np.float32)
    module, _ = raised(module, feeds=feeds)
    assert "Attention" not in count_ops(module)


def test_leaves_older_models_alone() -> None:
    module = _heads()
    module.model.opset_imports[""] = module.graph.opset_imports[""] = 21
    assert RaiseAttention().run(module, PassContext()) is False


def test_rows_without_a_key_are_zero() -> None:
    module = _working(Spelling(mask="chosen", guard=True))
    for node in module.graph:
        if node.op_type == "Constant" and node.attributes["value"].as_tensor().numpy().min() < -1e30:
            node.attributes.add(ir.AttrTensor("value", ir.tensor(np.array(-np.inf, dtype=np.float32))))
    feeds = feeds_for(module)
    feeds["mask"][1] = False
    module, _ = raised(module, feeds=feeds)
    assert count_ops(module)["Attention"] == 1
    assert np.array_equal(evaluate(module, feeds)["y"][1], np.zeros((5, 8), dtype=np.float32))


def test_rows_without_a_key_keep_their_mean_under_a_finite_mask() -> None:
    module = _working(Spelling(mask="chosen"))
    feeds = feeds_for(module)
    feeds["mask"][1] = False
    module, _ = raised(module, feeds=feeds)
    assert count_ops(module)["Attention"] == 1


CACHE = """
g (float[batch, 4, 1, 8] q, float[batch, 2, 1, 8] k, float[batch, 2, 1, 8] v, float[batch, 2, past, 8] old_k,
   float[batch, 2, past, 8] old_v) => (float[batch, 4, 1, 8] y, float[batch, 2, total, 8] new_k,
   float[batch, 2, total, 8] new_v)
<float scale = {0.35355338}, int64[1] two = {2}, int64[5] twice = {1, 1, 2, 1, 1}, int64[4] flat = {0, 4, -1, 8}>
{
  new_k = Concat<axis=2>(old_k, k)
  new_v = Concat<axis=2>(old_v, v)
  k5 = Unsqueeze(new_k, two)  k6 = Expand(k5, twice)  k7 = Reshape(k6, flat)
  v5 = Unsqueeze(new_v, two)  v6 = Expand(v5, twice)  v7 = Reshape(v6, flat)
  kt = Transpose<perm=[0, 1, 3, 2]>(k7)
  s0 = MatMul(q, kt)
  s = Mul(s0, scale)
  p = Softmax<axis=-1>(s)
  y = MatMul(p, v7)
}
"""


def test_a_cache_of_keys_and_values_is_read_where_it_is() -> None:
    module = module_from(CACHE, opset=23)
    random = np.random.default_rng(0)
    sizes = {"batch": 2, "past": 3}
    feeds = {
        str(value.name): random.standard_normal(
            [dim if isinstance(dim, int) else sizes[str(dim)] for dim in value.shape or ()]
        ).astype(np.float32)
        for value in module.graph.inputs
    }
    module, missed = raised(module, feeds=feeds)
    assert count_ops(module) == {"Concat": 2, "Attention": 1}, missed
    (node,) = [n for n in module.graph if n.op_type == "Attention"]
    assert [value.name for value in node.inputs if value is not None] == ["q", "new_k", "new_v"]


OPERATOR = """
g (float[batch, seq, 16] x, float[batch, seq, 8] m) => (float[batch, seq, 16] y)
<int64[4] four = {0, 0, 4, 4}, int64[4] two = {0, 0, 2, 4}, int64[1] last = {2}, int64[5] twice = {1, 1, 2, 1, 1},
 int64[4] heads = {0, 4, -1, 4}, int64[3] merged = {0, 0, 16}, float half = {0.5}>
{
  q0 = Reshape(x, four)  q1 = Transpose<perm=[0, 2, 1, 3]>(q0)  q = Mul(q1, half)
  k0 = Reshape(m, two)  k1 = Transpose<perm=[0, 2, 1, 3]>(k0)
  k2 = Unsqueeze(k1, last)  k3 = Expand(k2, twice)  k = Reshape(k3, heads)
  a = Attention(q, k, k)
  t = Transpose<perm=[0, 2, 1, 3]>(a)
  y = Reshape(t, merged)
}
"""


def test_the_operator_takes_in_what_stands_around_it() -> None:
    module = module_from(OPERATOR, opset=23)
    module, _ = raised(module)
    (node,) = module.graph
    assert [value.name for value in node.inputs if value is not None] == ["x", "m", "m"]
    assert (node.attributes["q_num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()) == (4, 2)
    assert node.attributes["scale"].as_float() == pytest.approx(0.25)
