"""Patch embeddings by reshaping and a product become the convolution they are."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest

from mmopt.ir.module import Module
from mmopt.transforms.raising.raise_patches import RaisePatches
from tests.canonical import count_ops, module_from
from tests.raising import raise_and_check

ORDERS = [(0, 2, 4, *rest) for rest in itertools.permutations((1, 3, 5))]


def patches(
    perm: tuple[int, ...] = (0, 2, 4, 3, 5, 1),
    *,
    batch: int | str = 2,
    size: tuple[int, int] = (2, 4),
    bias: bool = True,
    flat: bool = False,
) -> Module:
    """Images of 3 channels and 4 × 8 patches of ``size``, embedded in 5 features."""
    high, wide = size
    rows = "-1" if flat else f"{0 if batch == 'batch' else batch}, 12"
    before = f"{-1 if batch == 'batch' else batch}, 3, 4, {high}, 3, {wide}"
    shape = f"{'rows' if batch == 'batch' else 24}, 5" if flat else f"{batch}, 12, 5"
    width = 3 * high * wide
    last = "y = Add(m, b)" if bias else "y = Identity(m)"
    text = f"""
    g (float[{batch}, 3, {4 * high}, {3 * wide}] x, float[{width}, 5] w, float[5] b) => (float[{shape}] y)
    <int64[6] s = {{{before}}}, int64[{2 if flat else 3}] t = {{{rows}, {width}}}>
    {{ a = Reshape(x, s) c = Transpose<perm = [{", ".join(map(str, perm))}]>(a) p = Reshape(c, t)
       m = MatMul(p, w) {last} }}
    """
    module = module_from(text, opset=23)
    random = np.random.default_rng(0)
    for name, extents in (("w", (width, 5)), ("b", (5,))):
        value = ir.Value(
            name=name, const_value=ir.tensor(random.standard_normal(extents).astype(np.float32), name=name)
        )
        value.shape, value.dtype = ir.Shape(extents), ir.DataType.FLOAT
        old = next(v for v in module.graph.inputs if v.name == name)
        old.replace_all_uses_with(value)
        module.graph.inputs.remove(old)
        module.graph.register_initializer(value)
    return module


@pytest.mark.parametrize("perm", ORDERS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_order_within_a_patch(perm: tuple[int, ...], bias: bool) -> None:
    module, missed = raise_and_check(RaisePatches(), patches(perm, bias=bias))
    assert "MatMul" not in count_ops(module), missed
    (conv,) = [node for node in module.graph if node.op_type == "Conv"]
    assert list(conv.attributes["strides"].as_ints()) == [2, 4]
    assert len(conv.inputs) == (3 if bias else 2)
    assert "Add" not in count_ops(module)


@pytest.mark.parametrize(
    "change", [{"batch": 1}, {"batch": "batch"}, {"flat": True}, {"size": (1, 4)}, {"size": (4, 1)}]
)
def test_forms(change: dict[str, object]) -> None:
    module, missed = raise_and_check(RaisePatches(), patches(**change))  # type: ignore[arg-type]
    assert count_ops(module).get("Conv") == 1, missed


def test_patches_by_columns_stay() -> None:
    module, missed = raise_and_check(RaisePatches(), patches((0, 4, 2, 3, 5, 1)))
    assert "Conv" not in count_ops(module)
    assert any("order of rows and columns" in reason for _, reason in missed)


@pytest.mark.parametrize("perm", [(0, 3, 4, 2, 5, 1), (0, 2, 5, 3, 4, 1), (0, 2, 1, 3, 4, 5)])
def test_what_is_no_patch_stays(perm: tuple[int, ...]) -> None:
    module, _ = raise_and_check(RaisePatches(), patches(perm, size=(4, 3)))
    assert "Conv" not in count_ops(module)


def test_rows_of_features_stay() -> None:
    text = (
        "g (float[2, 8, 6] x) => (float[2, 8, 2] y) <float[6, 2] w = {1,2,3,4,5,6,7,8,9,10,11,12}> { y = MatMul(x, w) }"
    )
    module, missed = raise_and_check(RaisePatches(), module_from(text, opset=23))
    assert count_ops(module) == {"MatMul": 1}
    assert not missed


def test_heads_of_attention_stay() -> None:
    weight = ", ".join(str(n % 5 - 2) for n in range(48))
    text = f"""
    g (float[2, 3, 7, 4] x) => (float[2, 7, 4] y) <float[12, 4] w = {{{weight}}}, int64[3] t = {{2, 7, 12}}>
    {{ a = Transpose<perm = [0, 2, 1, 3]>(x) p = Reshape(a, t) y = MatMul(p, w) }}
    """
    module, _ = raise_and_check(RaisePatches(), module_from(text, opset=23))
    assert "Conv" not in count_ops(module)
