"""Attention on tensor cores: right in the emulator, no spills in the machine code."""

from __future__ import annotations

import numpy as np
import pytest

from mmopt.backends.cuda.pipeline import compiled_kernels
from tests.cuda_emulator import Emulated, available
from tests.operators import example, numbers
from tests.programs import Example, grouped
from tests.unit.test_cuda_emulated import wrong_answers
from tests.unit.test_cuda_products import toolkit

pytestmark = pytest.mark.skipif(not available, reason="needs g++, to compile what a GPU would run")


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def attention(
    q: tuple[int, ...],
    k: tuple[int, ...],
    *,
    mask: np.ndarray | None = None,
    causal: bool = False,
    dtype: str = "float32",
    symbolic: dict[str, list[int | str]] | None = None,
) -> Example:
    """Attention over ``[batch, heads, sequence, size]``, with the answer computed in double precision."""
    feeds = {
        "q": numbers(*q, dtype=dtype),
        "k": numbers(*k, dtype=dtype, seed=1),
        "v": numbers(*k, dtype=dtype, seed=2),
    }
    wide = {name: array.astype(np.float64) for name, array in feeds.items()}
    groups = q[1] // k[1]
    keys, values = (np.repeat(wide[n], groups, axis=1) for n in "kv")
    scores = wide["q"] @ keys.swapaxes(-1, -2) / np.sqrt(q[-1])
    if mask is not None:
        feeds["m"] = mask
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    want = (softmax(scores) @ values).astype(feeds["q"].dtype)
    body = f"y = Attention <is_causal = {int(causal)}> (q, k, v{', m' if mask is not None else ''})"
    return example(body, feeds, want=[want], opset=23, symbolic=symbolic)


def test_kinds_of_attention() -> None:
    keep = numbers(2, 1, 9, 70, dtype="bool")
    keep[..., 0] = True
    cases = [
        attention((1, 2, 7, 16), (1, 2, 7, 16)),
        attention((2, 4, 70, 32), (2, 2, 100, 32)),
        attention((2, 2, 9, 24), (2, 2, 70, 24), mask=keep),
        attention((2, 2, 9, 24), (2, 2, 70, 24), mask=numbers(1, 2, 1, 70)),
        attention((1, 2, 80, 64), (1, 2, 80, 64), causal=True),
        attention((1, 1, 5, 10), (1, 1, 3, 10)),
        attention((1, 1, 9, 96), (1, 1, 40, 96)),
        attention(
            (1, 2, 33, 8), (1, 2, 40, 8), symbolic={"q": ["n", 2, "s", 8], "k": ["n", 2, "t", 8], "v": ["n", 2, "t", 8]}
        ),
    ]
    wrong = wrong_answers(cases, tolerance=5e-6)
    assert not wrong, "\n".join(wrong)
    assert "mmopt_attention<MMOPT_F32" in Emulated({"main": grouped(cases[0].model)}).generated.source


def test_halves() -> None:
    cases = [
        attention((1, 2, 70, 64), (1, 2, 90, 64), dtype="float16"),
        attention((1, 2, 9, 40), (1, 1, 20, 40), dtype="float16"),
        attention((1, 1, 9, 128), (1, 1, 40, 128), dtype="float16"),
    ]
    wrong = wrong_answers(cases, tolerance=2e-3)
    assert not wrong, "\n".join(wrong)
    assert "mmopt_attention<MMOPT_F16" in Emulated({"main": grouped(cases[0].model)}).generated.source


def test_heads_in_one_axis() -> None:
    feeds = {"q": numbers(2, 11, 32), "k": numbers(2, 13, 32, seed=1), "v": numbers(2, 13, 32, seed=2)}
    case = example("y = Attention <q_num_heads = 4, kv_num_heads = 4> (q, k, v)", feeds, opset=23)
    heads = {n: a.reshape(2, -1, 4, 8).swapaxes(1, 2).astype(np.float64) for n, a in feeds.items()}
    result = softmax(heads["q"] @ heads["k"].swapaxes(-1, -2) / np.sqrt(8)) @ heads["v"]
    want = result.swapaxes(1, 2).reshape(2, 11, 32).astype(np.float32)
    assert not wrong_answers([Example("heads", case.model, feeds, [want])], tolerance=5e-6)


@toolkit
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("float16", 64),
        ("float16", 112),
        ("float16", 128),
        ("float32", 96),
        pytest.param("float32", 64, marks=pytest.mark.slow),
    ],
)
def test_machine_code_spills_nothing(dtype: str, size: int) -> None:
    case = attention((1, 12, 128, size), (1, 12, 128, size), dtype=dtype)
    generated = Emulated({"main": grouped(case.model)}).generated
    assert "mmopt_attention<" in generated.source
    made = compiled_kernels(generated, 80)
    (name,) = [n for n in made.resources if "Attention" in n]
    assert (made.resources[name].spills, made.resources[name].stack) == (0, 0)
