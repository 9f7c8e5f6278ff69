"""Pooling: windows, padding, rounding of sizes, positions."""

from __future__ import annotations

import numpy as np
import pytest

from tests.operators import example, numbers
from tests.programs import check

PROFILE = "x86-64-v3"
GEOMETRIES = [
    "kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]",
    "kernel_shape = [2, 3], strides = [1, 2], pads = [0, 1, 1, 2]",
    "kernel_shape = [3, 2], strides = [2, 3], ceil_mode = 1, pads = [1, 0, 1, 1]",
    "kernel_shape = [2, 2], dilations = [2, 3]",
    'kernel_shape = [3, 3], strides = [2, 2], auto_pad = "SAME_UPPER"',
    'kernel_shape = [4, 3], strides = [2, 2], auto_pad = "SAME_LOWER"',
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_windows(geometry: str) -> None:
    x = numbers(2, 3, 11, 37)
    bodies = [f"y = MaxPool<{geometry}>(x)", f"y = AveragePool<{geometry}>(x)", f"y = LpPool<{geometry}, p = 2>(x)"]
    bodies.append(f"y = AveragePool<{geometry}, count_include_pad = 1>(x)")
    examples = [example(body, {"x": x}) for body in bodies]
    examples.append(example(bodies[0], {"x": x}, symbolic={"x": ["N", 3, "H", "W"]}))
    check(examples, PROFILE)


def test_other_ranks_types_and_positions() -> None:
    line, cube = numbers(2, 3, 50), numbers(1, 2, 5, 6, 7)
    places = "y, i = MaxPool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(x)"
    check(
        [
            example("y = MaxPool<kernel_shape = [5], strides = [2], pads = [2, 2]>(x)", {"x": line}),
            example("y = AveragePool<kernel_shape = [4]>(x)", {"x": line}, symbolic={"x": ["N", 3, "T"]}),
            example("y = MaxPool<kernel_shape = [2, 3, 2], strides = [2, 1, 3]>(x)", {"x": cube}),
            example("y = MaxPool<kernel_shape = [3]>(x)", {"x": numbers(1, 2, 9, dtype="uint8", low=0, high=255)}),
            example(places, {"x": numbers(2, 2, 7, 8)}, outputs=["y", "i"]),
        ],
        PROFILE,
    )


def test_whole_images() -> None:
    x = numbers(2, 3, 9, 33)
    names = {"x": ["N", 3, "H", "W"]}
    check(
        [
            example("y = GlobalAveragePool(x)", {"x": x}, symbolic=names),
            example("y = GlobalMaxPool(x)", {"x": x}, symbolic=names),
            example("y = GlobalLpPool<p = 1>(x)", {"x": x}, want=[np.abs(x).sum((2, 3), keepdims=True)]),
        ],
        PROFILE,
    )


def test_wide_windows() -> None:
    x = numbers(1, 2, 200)
    want = np.lib.stride_tricks.sliding_window_view(x, 100, axis=2)[:, :, ::10]
    check(
        [
            example("y = MaxPool<kernel_shape = [100], strides = [10]>(x)", {"x": x}, want=[want.max(-1)]),
            example("y = AveragePool<kernel_shape = [100], strides = [10]>(x)", {"x": x}, want=[want.mean(-1)]),
        ],
        PROFILE,
    )
