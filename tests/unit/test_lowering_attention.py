"""The Attention operator: its forms, what they become, and what is left to the standard's definition."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import pytest

from mmopt.ir.module import Module
from tests.kernels import WIDEST
from tests.operators import example, numbers
from tests.programs import Example, Programs, assert_close, check, grouped
from tests.unit.test_kernel_attention import reference

PROFILE = WIDEST
NAMES = ("q", "k", "v", "mask", "past_key", "past_value", "lengths")


def split(x: np.ndarray, heads: int) -> np.ndarray:
    """``[batch, sequence, heads · size]`` → ``[batch, heads, sequence, size]``."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def operator(
    feeds: Mapping[str, np.ndarray],
    *,
    symbolic: Mapping[str, Sequence[int | str]] | None = None,
    outputs: Sequence[str] = ("y",),
    opset: int = 24,
    **attributes: float,
) -> Example:
    """A model of one Attention with what it should give, caches included."""
    q, k, v = (feeds[n] for n in NAMES[:3])
    flat = q.ndim == 3
    if flat:
        q = split(q, int(attributes["q_num_heads"]))
        k, v = (split(x, int(attributes["kv_num_heads"])) for x in (k, v))
    past = feeds.get("past_key")
    if past is not None:
        k, v = np.concatenate([past, k], 2), np.concatenate([feeds["past_value"], v], 2)
    y = reference(
        q,
        k,
        v,
        mask=feeds.get("mask"),
        lengths=feeds.get("lengths"),
        scale=attributes.get("scale"),
        softcap=attributes.get("softcap", 0.0),
        causal=bool(attributes.get("is_causal")),
        past=0 if past is None else past.shape[2],
    )
    if flat:
        y = y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], -1)
    operands = [n if n in feeds else "" for n in NAMES]
    while not operands[-1]:
        operands.pop()
    given = ", ".join(f"{n} = {v}" for n, v in attributes.items())
    body = f"{', '.join(outputs)} = Attention{f'<{given}>' if given else ''}({', '.join(operands)})"
    made = example(body, feeds, symbolic=symbolic, outputs=[o for o in outputs if o], opset=opset)
    want = [y.astype(feeds["q"].dtype), k, v][: len([o for o in outputs if o])]
    return dataclasses.replace(made, want=want)


def qkv(batch: int, heads: int, queries: int, keys: int, size: int, kv_heads: int = 0) -> dict[str, np.ndarray]:
    shapes = [(batch, heads, queries, size)] + [(batch, kv_heads or heads, keys, size)] * 2
    return {n: numbers(*shape, seed=i) for i, (n, shape) in enumerate(zip(NAMES, shapes, strict=False))}


def flat(batch: int, heads: int, queries: int, keys: int, size: int, kv_heads: int = 0) -> dict[str, np.ndarray]:
    shapes = [(batch, queries, heads * size)] + [(batch, keys, (kv_heads or heads) * size)] * 2
    return {n: numbers(*shape, seed=i) for i, (n, shape) in enumerate(zip(NAMES, shapes, strict=False))}


def cached(heads: int, kv_heads: int, queries: int, past: int, size: int) -> dict[str, np.ndarray]:
    feeds = qkv(2, heads, queries, queries, size, kv_heads)
    return feeds | {n: numbers(2, kv_heads, past, size, seed=8) for n in ("past_key", "past_value")}


def test_operands_with_three_and_four_axes() -> None:
    check(
        [
            operator(qkv(2, 3, 9, 20, 16)),
            operator(flat(2, 4, 9, 20, 16), q_num_heads=4, kv_num_heads=4, scale=0.4),
            operator(flat(1, 4, 9, 9, 16, 2), q_num_heads=4, kv_num_heads=2, is_causal=1, opset=23),
            operator(qkv(1, 6, 4, 70, 8, 1), softcap=3.0),
        ],
        PROFILE,
    )


def test_masks_and_lengths() -> None:
    lengths = np.array([20, 7])
    check(
        [
            operator(qkv(2, 3, 9, 20, 16) | {"mask": numbers(9, 20)}),
            operator(qkv(2, 3, 9, 20, 16) | {"mask": numbers(20)}, is_causal=1),
            operator(qkv(2, 3, 9, 20, 16) | {"mask": numbers(3, 1, 20, dtype="bool")}),
            operator(qkv(2, 3, 9, 20, 16) | {"mask": numbers(2, 1, 1, 14, dtype="bool")}),
            operator(qkv(2, 3, 9, 20, 16) | {"lengths": lengths}),
            operator(qkv(2, 3, 9, 20, 16) | {"lengths": lengths, "mask": numbers(9, 20)}, is_causal=1),
        ],
        PROFILE,
    )


def test_caches_grow() -> None:
    three = ("y", "present_key", "present_value")
    check(
        [
            operator(cached(4, 2, 1, 40, 16), outputs=three, is_causal=1),
            operator(cached(4, 4, 5, 11, 16), outputs=three, is_causal=1),
            operator(cached(4, 4, 5, 11, 16)),
            operator(flat(2, 2, 5, 7, 16), outputs=three, q_num_heads=2, kv_num_heads=2),
        ],
        PROFILE,
    )


def test_sizes_known_at_run_time() -> None:
    axes = {"q": ["B", "S", 64], "k": ["B", "T", 32], "v": ["B", "T", 32]}
    heads = {"q_num_heads": 4, "kv_num_heads": 2}
    cache = {n: ["B", 2, "P", 16] for n in ("past_key", "past_value")}
    split_axes = {"q": ["B", 4, "S", 16], "k": ["B", 2, "S", 16], "v": ["B", 2, "S", 16]}
    check(
        [
            operator(flat(2, 4, 9, 20, 16, 2), symbolic=axes, **heads),
            operator(flat(1, 4, 1, 300, 16, 2), symbolic=axes, **heads),
            operator(flat(2, 4, 9, 9, 16, 2) | {"mask": numbers(2, 1, 1, 9)}, symbolic=axes, is_causal=1, **heads),
            operator(
                cached(4, 2, 1, 40, 16) | {"mask": numbers(1, 41)},
                symbolic={**split_axes, **cache, "mask": ["S", "A"]},
                outputs=("y", "present_key", "present_value"),
            ),
        ],
        PROFILE,
    )


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_types_of_floats(dtype: str) -> None:
    feeds = {n: a.astype(dtype) for n, a in qkv(2, 3, 9, 20, 16).items()}
    check([operator(feeds), operator(feeds | {"mask": numbers(9, 20, dtype=dtype)})], PROFILE)


def templates(made: Example) -> list[str]:
    return Programs([Module(ir.from_proto(made.model))], PROFILE).templates


def test_one_kernel_computes_it() -> None:
    assert templates(operator(flat(2, 4, 9, 20, 16), q_num_heads=4, kv_num_heads=4)) == ["attention"]
    assert sorted(templates(operator(cached(4, 2, 1, 40, 16)))) == ["attention", "join"]


def test_the_rest_is_left_to_the_definition_of_the_standard() -> None:
    """The scores as an output, windows, and masks of integers; onnxruntime is the oracle."""
    feeds = qkv(1, 2, 5, 6, 8)
    scores = example("y, , , s = Attention(q, k, v)", feeds, outputs=("y", "s"), opset=24)
    check([scores], PROFILE)
    assert "attention" not in templates(scores)


# -- in fusion groups ------------------------------------------------------------------------------------------

PACKED = """
    p = MatMul(x, w)
    z = Add(p, b)
    {forms}
    a = Attention{heads}(q, k, v)
    {back}
"""
SPLIT = "q, k, v = Split<axis = -1, num_outputs = 3>(z)"
HEADS = """
    h = Constant<value = int64[4] {0, 0, 3, 16}>()
    q0, k0, v0 = Split<axis = -1, num_outputs = 3>(z)
    q1 = Reshape(q0, h) k1 = Reshape(k0, h) v1 = Reshape(v0, h)
    q = Transpose<perm = [0, 2, 1, 3]>(q1)
    k = Transpose<perm = [0, 2, 1, 3]>(k1)
    v = Transpose<perm = [0, 2, 1, 3]>(v1)
"""
FIVE = """
    h = Constant<value = int64[5] {0, 0, 3, 3, 16}>()
    one = Constant<value = int64[1] {0}>()
    z5 = Reshape(z, h)
    zt = Transpose<perm = [2, 0, 3, 1, 4]>(z5)
    q1, k1, v1 = Split<axis = 0, num_outputs = 3>(zt)
    q = Squeeze(q1, one) k = Squeeze(k1, one) v = Squeeze(v1, one)
"""
BACK = """
    t = Transpose<perm = [0, 2, 1, 3]>(a)
    s = Constant<value = int64[3] {0, 0, 48}>()
    y = Reshape(t, s)
"""


def packed(forms: str, *, symbolic: bool, heads: str = "", back: str = BACK) -> Example:
    """Queries, keys and values from one product."""
    feeds = {"x": numbers(2, 21, 48), "w": numbers(48, 144, seed=1) / 7, "b": numbers(144, seed=2)}
    q, k, v = (split(part, 3) for part in np.split(feeds["x"] @ feeds["w"] + feeds["b"], 3, axis=-1))
    want = reference(q, k, v).swapaxes(1, 2).reshape(2, 21, 48).astype("float32")
    body = PACKED.format(forms=forms, heads=heads, back=back)
    names = {"x": ["B", "S", 48]} if symbolic else None
    return example(body, feeds, symbolic=names, opset=23, want=[want])


@pytest.mark.parametrize("symbolic", [False, True])
def test_views_of_a_packed_product_are_not_copied(symbolic: bool) -> None:
    whole = "<q_num_heads = 3, kv_num_heads = 3>"
    made = [
        packed(SPLIT, symbolic=symbolic, heads=whole, back="y = Identity(a)"),
        packed(HEADS, symbolic=symbolic),
        packed(FIVE, symbolic=symbolic),
    ]
    for one in made:
        programs = Programs([grouped(one.model)], PROFILE)
        assert_close(programs.run(0, one.feeds)[0], one.expected()[0])
        assert [t for t in programs.templates if t != "elementwise"] == ["matmul", "attention"]
        assert len(programs.templates) == 2 or one is made[0], "a view was copied"


def test_what_is_cast_behind_it_is_stored_so() -> None:
    feeds = qkv(2, 3, 9, 20, 16)
    want = operator(feeds).expected()[0]
    body = "a = Attention(q, k, v) y = Cast<to = 10>(a)"
    made = example(body, feeds, opset=23, want=[want.astype("float16")])
    programs = Programs([grouped(made.model)], PROFILE)
    assert programs.templates == ["attention"]
    assert_close(programs.run(0, feeds)[0], want.astype("float16"))
