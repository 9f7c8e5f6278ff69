"""Attention of operands rounded to bfloat16 against float64 of the rounded operands."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import scipy.special
from onnx import helper

from mmopt.autotune.peak import kind_of
from mmopt.backends.cpu.intrinsics import EXP2_COARSE
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
    mask: str = ""


def masked(s: Heads, random: np.random.Generator) -> np.ndarray | None:
    """A mask over the keys (``row``) or over all pairs (``full``), of flags or numbers; one row is closed to all."""
    if not s.mask:
        return None
    kind, dtype = s.mask.split()
    shape = (s.batch, 1, 1, s.keys) if kind == "row" else (1, s.heads, s.queries, s.keys)
    opened = random.random(shape) < 0.7
    opened[..., 0] = True
    if kind == "full":
        opened[0, 0, 3] = False
    if dtype == "bool":
        return opened
    closed = np.float32(-np.inf if dtype == "inf" else np.finfo(np.float32).min)
    return np.where(opened, random.standard_normal(shape).astype(np.float32), closed)


def softmax(scores: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Zeros where nothing is open."""
    if mask is None:
        return np.asarray(scipy.special.softmax(scores, axis=-1))
    # Added in float32, as the standard has it: beside the lowest number a score vanishes.
    added = np.where(mask, 0, -np.inf) if mask.dtype == bool else mask
    total = (scores.astype(np.float32) + added.astype(np.float32)).astype(np.float64)
    top = np.maximum(total.max(axis=-1, keepdims=True), np.finfo(np.float32).min)
    weights = np.exp(total - top)
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)


def example(s: Heads) -> Example:
    random = np.random.default_rng(0)
    shapes = [(s.heads, s.queries, s.size), (s.kv_heads, s.keys, s.size), (s.kv_heads, s.keys, s.value_size)]
    q, k, v = ((random.standard_normal((s.batch, *shape)) * s.spread).astype(np.float32) for shape in shapes)
    exact = [a.astype(ml_dtypes.bfloat16).astype(np.float64) for a in (q, k, v)]
    wide = [np.repeat(a, s.heads // a.shape[1], axis=1) for a in exact]
    scale = 1 / np.sqrt(s.size) if s.scale is None else s.scale
    mask = masked(s, random)
    want = softmax(wide[0] @ wide[1].swapaxes(2, 3) * scale, mask) @ wide[2]
    attributes: dict[str, object] = {} if s.scale is None else {"scale": s.scale}
    feeds = {"q": q, "k": k, "v": v}
    if s.flat:
        attributes |= {"q_num_heads": s.heads, "kv_num_heads": s.kv_heads}
        feeds = {n: a.swapaxes(1, 2).reshape(s.batch, a.shape[2], -1) for n, a in feeds.items()}
        want = want.swapaxes(1, 2).reshape(s.batch, s.queries, -1)
    feeds |= {} if mask is None else {"mask": mask}
    node = helper.make_node("Attention", list(feeds), ["y"], **attributes)
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
    Heads(64, 128, flat=True, batch=2, mask="row float"),
    Heads(50, 300, mask="full float"),
    Heads(50, 300, mask="full bool"),
    Heads(40, 520, mask="full inf", scale=0.3, spread=3.0),
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
    assert "attention_bf16" in templates(SHAPES[-3])
    assert "attention" in templates(Heads(8, 300)), "fewer rows than a tile"
    assert "attention" in templates(Heads(64, 64, size=48)), "features that do not fill a panel"


def test_its_rate_is_compared_with_the_peak_of_bfloat16() -> None:
    (workload,) = filter(None, Programs([narrowed(example(SHAPES[0]).model)], level(QUICK)).workloads)
    assert workload.startswith("attention_bf16(")
    assert kind_of(workload.rpartition(":")[2].split(",")) == "bfloat16"


def test_the_coarse_exponential_is_as_good_as_it_says() -> None:
    """It must be 1 at 0: the shift that puts in the exponent counts on those bits."""
    r = np.linspace(-0.5, 0.5, 100_001)
    value = np.polynomial.polynomial.polyval(r, EXP2_COARSE)
    assert np.abs(value / 2.0**r - 1).max() < 1.1e-4
    assert EXP2_COARSE[0] == 1.0
