"""Sorting, selecting by truth, and results whose sizes are data."""

from __future__ import annotations

import numpy as np

from tests.operators import example, numbers
from tests.programs import check

PROFILE = "x86-64-v3"


def test_largest_and_smallest_elements() -> None:
    ties = np.array([[3, 1, 3, 2, 1, 3], [0, 0, 0, 0, 0, 0]], dtype="float32")
    x = numbers(3, 37, 2)
    k = "k = Constant<value = int64[1] {4}>() "
    both = ["y", "i"]
    check(
        [
            example(k + "y, i = TopK(x, k)", {"x": ties}, outputs=both),
            example(k + "y, i = TopK<largest = 0>(x, k)", {"x": ties}, outputs=both),
            example(k + "y, i = TopK<axis = 1>(x, k)", {"x": x}, outputs=both, symbolic={"x": ["N", "S", 2]}),
            example("y, i = TopK(x, k)", {"x": ties, "k": np.array([2], "int64")}, outputs=both),
        ],
        PROFILE,
    )


def test_selecting_by_truth() -> None:
    x = numbers(4, 5)
    mask = np.array([True, False, True, True])
    none = np.zeros(4, bool)
    sparse = np.where(x > 1, x, 0).astype("float32")
    check(
        [
            example("y = Compress<axis = 0>(x, c)", {"x": x, "c": mask}),
            example("y = Compress<axis = 0>(x, c)", {"x": x, "c": none}),
            example("y = Compress(x, c)", {"x": x, "c": mask}, symbolic={"x": ["N", 5], "c": ["M"]}),
            example("y = NonZero(x)", {"x": sparse}, symbolic={"x": ["N", "D"]}),
        ],
        PROFILE,
    )


def test_sizes_found_at_run_time_go_on() -> None:
    x = numbers(6, 3)
    mask = np.array([True, False, True, True, False, True])
    body = "p = Compress<axis = 0>(x, c) q = Add(p, p) a = Constant<value = int64[1] {1}>() "
    body += "y = ReduceSum(q, a) n = Shape(q)"
    check([example(body, {"x": x, "c": mask}, outputs=["y", "n"], symbolic={"x": ["N", 3], "c": ["N"]})], PROFILE)


def test_different_elements() -> None:
    x = np.array([2, 1, 1, 3, 4, 3, 2], dtype="float32")
    rows = np.array([[1, 0, 0], [1, 0, 0], [2, 3, 4], [0, 9, 9]], dtype="float32")
    all_ = ["y", "first", "which", "often"]
    statement = "y, first, which, often = "
    check(
        [
            example(statement + "Unique(x)", {"x": x}, outputs=all_),
            example(statement + "Unique<sorted = 0>(x)", {"x": x}, outputs=all_),
            example(statement + "Unique<axis = 0>(x)", {"x": rows}, outputs=all_),
        ],
        PROFILE,
    )


def test_overlapping_boxes() -> None:
    random = np.random.default_rng(0)
    corners = random.random((2, 12, 2)).astype("float32") * 4
    boxes = np.concatenate([corners, corners + random.random((2, 12, 2)).astype("float32") * 2], axis=2)
    feeds = {"b": boxes, "s": random.random((2, 3, 12)).astype("float32")}
    limits = "m = Constant<value = int64[1] {4}>() i = Constant<value = float[1] {0.2}>() "
    limits += "t = Constant<value = float[1] {0.3}>() "
    check(
        [
            example(limits + "y = NonMaxSuppression(b, s, m, i, t)", feeds),
            example(limits + "y = NonMaxSuppression<center_point_box = 1>(b, s, m, i)", feeds),
        ],
        PROFILE,
    )
