"""Attention of operands rounded to bfloat16 against float64 of the rounded operands."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import scipy.special
from onnx import helper

from tests.programs import Example, Programs, model_of, wrong_answers
from tests.unit.test_conv_narrow import ANY_LEVEL, QUICK, level, narrowed


@dataclasses.dataclass(frozen=True)
class Heads:
    """Sizes of an attention: ``flat`` operands have the heads side by side."""

    queries: int
    keys: int
    size: int = 64
    value_size: int = 64
    heads: int = 2
    kv_heads: int = 2
    batch: int = 1
    flat: bool = False
    scale: float | None = None
    spread: float = 1.0


def example(s: Heads) -> Example:
    random = np.random.default_rng(0)
    shapes = [(s.heads, s.queries, s.size), (s.kv_heads, s.keys, s.size), (s.kv_heads, s.keys, s.value_size)]
    q, k, v = ((random.standard_normal((s.batch, *shape)) * s.spread).astype(np.float32) for shape in shapes)
    exact = [a.astype(ml_dtypes.bfloat16).astype(np.float64) for a in (q, k, v)]
    wide = [np.repeat(a, s.heads // a.shape[1], axis=1) for a in exact]
    scale = 1 / np.sqrt(s.size) if s.scale is None else s.scale
    want = scipy.special.softmax(wide[0] @ wide[1].swapaxes(2, 3) * scale, axis=-1) @ wide[2]
    attributes: dict[str, object] = {} if s.scale is None else {"scale": s.scale}
    feeds = {"q": q, "k": k, "v": v}
    if s.flat:
        attributes |= {"q_num_heads": s.heads, "kv_num_heads": s.kv_heads}
        feeds = {n: a.swapaxes(1, 2).reshape(s.batch, a.shape[2], -1) for n, a in feeds.items()}
        want = want.swapaxes(1, 2).reshape(s.batch, s.queries, -1)
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], **attributes)
    return Example(str(s), model_of([node], feeds, ["y"], {}, opset=23), feeds, [want.astype(np.float32)])


SHAPES = [
    Heads(32, 32),
    Heads(100, 300),
    Heads(77, 256, batch=2),
    Heads(64, 257, flat=True),
    Heads(33, 511, heads=4, kv_heads=2),
    Heads(50, 47, size=32, value_size=96, flat=True),
    Heads(40, 1000, size=128, value_size=128, heads=1, kv_heads=1),
    Heads(40, 520, scale=1.0, spread=3.0),
]


@pytest.mark.parametrize("name", ANY_LEVEL)
def test_against_float64_of_the_rounded_operands(name: str) -> None:
    # Weights are rounded to bfloat16 before they meet the values: half a unit in their ninth digit.
    wrong = wrong_answers([example(s) for s in SHAPES], level(name), 2.0**-8, prepare=narrowed)
    assert not wrong, "\n".join(wrong)


def test_the_template_is_used_where_it_fits() -> None:
    def templates(s: Heads) -> list[str]:
        return Programs([narrowed(example(s).model)], level(QUICK)).templates

    assert "attention_bf16" in templates(SHAPES[1])
    assert "attention" in templates(Heads(8, 300)), "fewer rows than a tile"
    assert "attention" in templates(Heads(64, 64, size=48)), "features that do not fill a panel"
