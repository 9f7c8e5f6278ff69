"""Resizing and other reading between pixels."""

from __future__ import annotations

import numpy as np
import pytest

from tests.operators import example, numbers
from tests.programs import check

PROFILE = "x86-64-v3"


def scales(*values: float) -> str:
    """A statement that makes the scales."""
    return f"s = Constant<value = float[{len(values)}] {{{', '.join(map(str, values))}}}>() "


COORDINATES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_resizing(coordinates: str) -> None:
    x = numbers(1, 2, 6, 7)
    how = f'coordinate_transformation_mode = "{coordinates}"'
    up, down = scales(1, 1, 2, 3), scales(1, 1, 0.5, 1)
    names = {"x": ["N", 2, "H", "W"]}
    check(
        [
            example(up + f'y = Resize<mode = "linear", {how}>(x, , s)', {"x": x}, symbolic=names),
            example(up + f'y = Resize<mode = "cubic", {how}>(x, , s)', {"x": x}),
            example(down + f'y = Resize<mode = "linear", {how}>(x, , s)', {"x": x}),
            example(
                up + f'y = Resize<mode = "nearest", {how}, nearest_mode = "floor">(x, , s)', {"x": x}, symbolic=names
            ),
        ],
        PROFILE,
        1e-4,
    )


def test_resizing_to_sizes() -> None:
    x = numbers(1, 2, 6, 7)
    fixed = "z = Constant<value = int64[4] {1, 2, 9, 4}>() "
    check(
        [
            example(fixed + 'y = Resize<mode = "linear">(x, , , z)', {"x": x}),
            example('y = Resize<mode = "linear">(x, , , z)', {"x": x, "z": np.array([1, 2, 9, 4])}),
            example('y = Resize<mode = "nearest">(x, , s)', {"x": x, "s": np.array([1, 1, 1.5, 2], "float32")}),
            example("t = Shape(w) " + 'y = Resize<mode = "linear">(x, , , t)', {"x": x, "w": numbers(1, 2, 8, 5)},
                    symbolic={"x": ["N", 2, "H", "W"], "w": ["N", 2, "A", "B"]}),
        ],
        PROFILE,
        1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_sampling_grids(padding: str) -> None:
    x = numbers(2, 3, 5, 6)
    grid = numbers(2, 4, 4, 2, low=-1.4, high=1.4, seed=1)
    examples = []
    for mode in ("linear", "nearest", "cubic"):
        for align in (0, 1):
            body = f'y = GridSample<mode = "{mode}", padding_mode = "{padding}", align_corners = {align}>(x, g)'
            examples.append(example(body, {"x": x, "g": grid}))
    check(examples, PROFILE, 1e-4)


def test_regions_windows_and_columns() -> None:
    x = numbers(2, 3, 8, 9)
    regions = np.array([[0, 0, 6, 5], [1, 2, 7.5, 8], [3, 3, 4, 4]], dtype="float32")
    which = np.array([0, 1, 0], dtype="int64")
    roi = "y = RoiAlign<output_height = 2, output_width = 3, spatial_scale = 0.8, sampling_ratio = {}>(x, r, b)"
    feeds = {"x": x, "r": regions, "b": which}
    columns = numbers(1, 2 * 4, 9)
    sizes = "h = Constant<value = int64[2] {4, 4}>() k = Constant<value = int64[2] {2, 2}>() "
    theta = numbers(2, 2, 3)
    check(
        [
            example(roi.format(2), feeds),
            example(roi.format(0), feeds),
            example(sizes + "y = Col2Im(c, h, k)", {"c": columns}),
            example("n = Constant<value = int64[4] {2, 3, 4, 5}>() y = AffineGrid(t, n)", {"t": theta}),
        ],
        PROFILE,
        1e-4,
    )
