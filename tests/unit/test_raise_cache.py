"""The cache of keys and values becomes part of the attention that reads it."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from mmopt.ir.module import Module
from mmopt.transforms.raising.raise_attention import RaiseAttention
from mmopt.transforms.raising.raise_cache import RaiseCache
from tests.canonical import count_ops, module_from
from tests.raising import raise_and_check

STEP = "float[{b},3,8] x, float[{b},2,{p},4] past_k, float[{b},2,{p},4] past_v, float[3,{t}] mask"
WEIGHTS = "float[8,8] w = {" + ", ".join(f"{n % 7 - 3}.5" for n in range(64)) + "}, int64[4] heads = {0, 3, 2, 4}"
PROJECTED = "{0}p = MatMul(x, w) {0}r = Reshape({0}p, heads) {0} = Transpose<perm = [0, 2, 1, 3]>({0}r)"
JOINED = "keys = Concat<axis = {axis}>(past_k, k) values = Concat<axis = {axis}>(past_v, v)"


def step(
    attention: str = "y = Attention(q, keys, values, mask)",
    *,
    axis: int = 2,
    size: str = "5",
    more: str = "",
    present: str = "float[{b},2,{t},4] keys, float[{b},2,{t},4] values",
    batch: str = "1",
) -> Module:
    """A decoder's attention over a cache of ``size`` positions and three new ones."""
    sizes = {"b": batch, "p": size, "t": str(int(size) + 3) if size.isdigit() else "t"}
    body = " ".join(PROJECTED.format(name) for name in "qkv")
    outputs = f"float[{sizes['b']},2,3,4] y" + (f", {present.format(**sizes)}" if present else "")
    body = f"{body} {JOINED.format(axis=axis)} {attention} {more}"
    text = f"g ({STEP.format(**sizes)}) => ({outputs}) <{WEIGHTS}> {{ {body} }}"
    return module_from(text, opset=23)


def cached(module: Module) -> ir.Node:
    (node,) = [node for node in module.graph if node.op_type == "Attention"]
    return node


@pytest.mark.parametrize("axis", [2, -2])
@pytest.mark.parametrize("batch", ["1", "batch"])
def test_cache(axis: int, batch: str) -> None:
    module, _ = raise_and_check(RaiseCache(), step(axis=axis, batch=batch))
    assert "Concat" not in count_ops(module)
    node = cached(module)
    assert [value.name for value in node.inputs[3:]] == ["mask", "past_k", "past_v"]  # type: ignore[union-attr]
    assert [value.name for value in node.outputs] == ["y", "keys", "values"]


def test_projections_are_read_as_they_are_written() -> None:
    module, _ = raise_and_check(RaiseCache(), step())
    module, _ = raise_and_check(RaiseAttention(), module)
    node = cached(module)
    assert node.attributes["q_num_heads"].as_int() == 2
    assert count_ops(module).get("Transpose", 0) == 1  # of the result
    assert [value.name for value in node.outputs[1:]] == ["keys", "values"]


def test_scaled_keys_stay_scaled_in_the_cache() -> None:
    module = step()
    scale = ir.Value(name="s", const_value=ir.tensor(0.5, ir.DataType.FLOAT, name="s"))
    scale.shape, scale.dtype = ir.Shape(()), ir.DataType.FLOAT
    module.graph.register_initializer(scale)
    join = next(node for node in module.graph if node.outputs[0].name == "keys")
    scaled = ir.node("Mul", [join.inputs[1], scale])
    scaled.outputs[0].name = "scaled"
    module.graph.insert_before(join, scaled)
    join.replace_input_with(1, scaled.outputs[0])
    module, _ = raise_and_check(RaiseCache(), module)
    module, _ = raise_and_check(RaiseAttention(), module)
    assert count_ops(module)["Mul"] == 1
    assert len(cached(module).outputs) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention": "y = Attention<is_causal = 1>(q, keys, values)"}, "counted from the first key"),
        ({"more": "z = Relu(keys)", "present": "float[1,2,8,4] z"}, "read elsewhere"),
        ({"attention": "y = Attention(q, keys, keys, mask)"}, "the same"),
        ({"present": "float[1,2,8,4] keys"}, "not kept"),
        ({"attention": "y, a, c, s = Attention(q, keys, values, mask)", "present": "float[1,2,3,8] s"}, "hands out"),
    ],
)
def test_stays(change: dict[str, str], reason: str) -> None:
    module, missed = raise_and_check(RaiseCache(), step(**change))
    assert "Concat" in count_ops(module)
    assert any(reason in message for _, message in missed), missed


def test_three_parts_stay() -> None:
    body = JOINED.format(axis=2).replace("(past_k, k)", "(past_k, k, k)").replace("(past_v, v)", "(past_v, v, v)")
    inputs = "float[1,2,3,4] q, float[1,2,3,4] k, float[1,2,3,4] v, float[1,2,5,4] past_k, float[1,2,5,4] past_v"
    outputs = "float[1,2,3,4] y, float[1,2,11,4] keys, float[1,2,11,4] values"
    text = f"g ({inputs}) => ({outputs}) {{ {body} y = Attention(q, keys, values) }}"
    _, missed = raise_and_check(RaiseCache(), module_from(text, opset=23))
    assert any("two sequences" in message for _, message in missed)
