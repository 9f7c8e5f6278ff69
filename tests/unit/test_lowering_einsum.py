"""Einsum, determinants, Fourier transforms and rotary embedding."""

from __future__ import annotations

import numpy as np
import pytest

from tests.operators import example, numbers
from tests.programs import check

PROFILE = "x86-64-v3"


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bhqd,bhkd->bhqk", [(2, 3, 4, 8), (2, 3, 5, 8)]),
        ("bqhd,bkhd->bhqk", [(2, 4, 3, 8), (2, 5, 3, 8)]),
        ("ij,jk", [(3, 4), (4, 5)]),
        ("...ij,...jk->...ik", [(2, 1, 3, 4), (6, 4, 5)]),
        ("ii->i", [(4, 4)]),
        ("ii", [(4, 4)]),
        ("i,j,k->kij", [(2,), (3,), (4,)]),
        ("bij->b", [(2, 3, 4)]),
        ("bi,bi->b", [(3, 20), (3, 20)]),
    ],
)
def test_einsum(equation: str, shapes: list[tuple[int, ...]]) -> None:
    operands = {f"x{n}": numbers(*shape, seed=n) for n, shape in enumerate(shapes)}
    want = np.einsum(equation, *operands.values())
    body = f'y = Einsum<equation = "{equation}">({", ".join(operands)})'
    symbolic = {"x0": ["B", *shapes[0][1:]]} if equation[0] == "b" else None
    check([example(body, operands, want=[want], symbolic=symbolic)], PROFILE)


def test_determinants() -> None:
    x = numbers(3, 5, 5)
    swapped = np.array([[0, 1, 2], [1, 0, 3], [4, -3, 8]], dtype="float32")
    check(
        [
            example("y = Det(x)", {"x": x}, want=[np.linalg.det(x)], symbolic={"x": ["N", 5, 5]}),
            example("y = Det(x)", {"x": swapped}, want=[np.linalg.det(swapped)]),
            example("y = Det(x)", {"x": np.ones((2, 2), "float32")}, want=[np.array(0, "float32")]),
        ],
        PROFILE,
        1e-4,
    )


def pairs(x: np.ndarray) -> np.ndarray:
    return np.stack([x.real, x.imag], axis=-1).astype("float32")


def test_fourier_transforms() -> None:
    x = numbers(2, 12, 3)
    real, both = x[..., None], numbers(2, 12, 2)
    complex_ = both[..., 0] + 1j * both[..., 1]
    axis = "a = Constant<value = int64 {1}>() "
    n = "n = Constant<value = int64 {8}>() "
    wave, window = numbers(2, 64, 1), numbers(16, low=0.1, high=1)
    frames = np.lib.stride_tricks.sliding_window_view(wave[..., 0], 16, axis=1)[:, ::8] * window
    step = "h = Constant<value = int64 {8}>() "
    check(
        [
            example(axis + "y = DFT(x, , a)", {"x": real}, want=[pairs(np.fft.fft(x, axis=1))]),
            example(axis + "y = DFT<onesided = 1>(x, , a)", {"x": real}, want=[pairs(np.fft.rfft(x, axis=1))]),
            example(axis + n + "y = DFT(x, n, a)", {"x": real}, want=[pairs(np.fft.fft(x, 8, axis=1))]),
            example(axis + "y = DFT<inverse = 1>(x, , a)", {"x": both}, want=[pairs(np.fft.ifft(complex_, axis=1))]),
            example(step + "y = STFT(x, h, w)", {"x": wave, "w": window}, want=[pairs(np.fft.rfft(frames))]),
            example("y = STFT(x, h, w)", {"x": wave, "h": np.array(8), "w": window}, want=[pairs(np.fft.rfft(frames))]),
        ],
        PROFILE,
    )


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rotary_embedding(interleaved: int) -> None:
    batch, heads, steps, size = 2, 3, 5, 8
    x = numbers(batch, heads, steps, size)
    angles = numbers(10, size // 2)
    cos, sin = np.cos(angles), np.sin(angles)
    places = np.array([[0, 1, 2, 3, 4], [5, 9, 2, 0, 1]], dtype="int64")
    c, s = cos[places][:, None], sin[places][:, None]
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., : size // 2], x[..., size // 2 :])
    a, b = first * c - second * s, first * s + second * c
    want = np.stack([a, b], -1).reshape(x.shape) if interleaved else np.concatenate([a, b], -1)
    flat = x.transpose(0, 2, 1, 3).reshape(batch, steps, heads * size)
    body = f"y = RotaryEmbedding<interleaved = {interleaved}>(x, c, s, p)"
    packed = f"y = RotaryEmbedding<interleaved = {interleaved}, num_heads = {heads}>(x, c, s, p)"
    tables = {"c": cos, "s": sin, "p": places}
    check(
        [
            example(body, {"x": x, **tables}, want=[want], opset=23, symbolic={"x": ["N", heads, "S", size]}),
            example(packed, {"x": flat, **tables}, opset=23, want=[want.transpose(0, 2, 1, 3).reshape(flat.shape)]),
        ],
        PROFILE,
    )
