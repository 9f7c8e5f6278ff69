"""Winograd's convolution against exact arithmetic and numpy in float64, in every way it can be cut."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from tvm import tirx

from mmopt.backends.compute import Map, index
from mmopt.backends.cpu.choosing import Chooser
from mmopt.backends.cpu.kernels.conv_patches import Convolved, direct_candidates
from mmopt.backends.cpu.kernels.tile import lanes_of
from mmopt.backends.cpu.kernels.winograd import WinogradConvolution
from mmopt.backends.cpu.kernels.winograd_cut import Cut, cut_of, winograd_candidates
from mmopt.backends.cpu.kernels.winograd_transform import POINTS, matrices, transform_filters
from tests.kernels import PROFILES, WIDEST, Arrays, Case, check, profiles
from tests.unit.test_kernel_conv import Geometry, convolved

BOUNDS = {2: 2e-6, 4: 1e-5}
"""Largest error that the template promises, as a fraction of the largest result."""


def blocked(x: np.ndarray, lanes: int) -> np.ndarray:
    """``[N, C, H, W]`` as ``[N, C/lanes, H, W, lanes]``."""
    n, c, h, w = x.shape
    return np.ascontiguousarray(x.reshape(n, c // lanes, lanes, h, w).transpose(0, 1, 3, 4, 2))


def case(
    cut: Cut,
    shape: tuple[int, int, int, int],
    channels: int,
    pads: tuple[int, int, int, int] = (1, 1, 1, 1),
    *,
    symbolic: bool = False,
    relu: bool = False,
) -> Case:
    """A convolution of ``shape`` that is cut in one way; ``relu`` adds an epilogue."""
    data, (n, c, h, w) = Arrays(), shape
    x = data.data(shape, "float32")
    weight = data.data((channels, c, 3, 3), "float32") / np.sqrt(9 * c).astype(np.float32)
    names = [tirx.Var(s, "int64") for s in "nhw"] if symbolic else [index(d) for d in (n, h, w)]
    source = data.constant(blocked(x, cut.lanes))
    if symbolic:
        values = data.feeds.pop(source)
        source = type(source)((names[0], index(c // cut.lanes), names[1], names[2], index(cut.lanes)), "float32", "x")
        data.feeds[source] = values
    filters = data.constant(
        np.ascontiguousarray(transform_filters(weight, cut.tile, cut.lanes, cut.vectors * cut.lanes))
    )
    space = [names[1] + (pads[0] + pads[2] - 2), names[2] + (pads[1] + pads[3] - 2)]
    before = [index(pads[0]), index(pads[1])]
    nest = WinogradConvolution(source, filters, channels=channels, before=before, space=space, cut=cut)
    result = nest.output
    want = convolved(Geometry(shape, weight.shape, pads=pads), x, weight, None)
    if relu:
        result = Map(result.shape, "float32", lambda *at: tirx.max(nest.output[at], tirx.const(0, "float32")), "relu")
        want = np.maximum(want, 0)
    sizes = {"n": n, "h": h, "w": w} if symbolic else {}
    label = f"{cut} of {shape} to {channels} pads {pads}{' symbolic' if symbolic else ''}"
    return data.case(label, result, blocked(want, cut.lanes), sizes=sizes, tolerance=BOUNDS[cut.tile])


@pytest.mark.parametrize("tile", sorted(POINTS))
def test_the_transforms_are_exact(tile: int) -> None:
    """In rational arithmetic the algorithm is the definition."""
    random, m = np.random.default_rng(tile), matrices(tile)
    side = tile + 2
    d = [[Fraction(int(v)) for v in row] for row in random.integers(-9, 10, (side, side))]
    g = [[Fraction(int(v)) for v in row] for row in random.integers(-9, 10, (3, 3))]

    def product(a: object, b: object) -> np.ndarray:
        return np.array(a, object).dot(np.array(b, object))

    u = product(product(m.filters, g), np.array(m.filters, object).T)
    v = product(product(m.inputs, d), np.array(m.inputs, object).T)
    y = product(product(m.out, u * v), np.array(m.out, object).T)
    for i in range(tile):
        for j in range(tile):
            assert y[i][j] == sum(d[i + a][j + b] * g[a][b] for a in range(3) for b in range(3))


def test_filters_are_transformed_and_packed() -> None:
    w = np.random.default_rng(0).standard_normal((5, 4, 3, 3)).astype(np.float32)
    packed = transform_filters(w, 2, block=2, columns=4)
    assert packed.shape == (2, 16, 2, 2, 4)
    assert packed.dtype == np.float32
    g = np.array(matrices(2).filters, np.float64)
    np.testing.assert_allclose(packed[1, :, 1, 0, 0].reshape(4, 4), g @ w[4, 2] @ g.T, rtol=1e-6)
    np.testing.assert_array_equal(packed[1, ..., 1:], 0)


def grid(lanes: int) -> list[Case]:
    """Tiles that do and do not fill the result, every side of padding, chunks that do not divide, several images."""
    cases = []
    for tile in sorted(POINTS):
        for apart in (False, True):
            cases += [
                case(Cut(tile, 3, 2, lanes, 6, apart), (2, 2 * lanes, 7, 9), 3 * lanes),
                case(Cut(tile, 5, 1, lanes, 5, apart), (1, lanes, 8, 8), lanes, relu=True),
                case(Cut(tile, 2, 2, lanes, 4, apart), (1, lanes, 5, 6), 2 * lanes, (0, 0, 0, 0)),
                case(Cut(tile, 4, 2, lanes, 8, apart), (1, lanes, 3, 11), 2 * lanes, (1, 0, 2, 1)),
                case(Cut(tile, 1, 1, lanes, 1, apart), (3, lanes, 1, 1), lanes),
            ]
        cut = Cut(tile, 3, 2, lanes, 6)
        cases += [case(cut, s, 2 * lanes, symbolic=True) for s in [(1, lanes, 4, 4), (2, lanes, 9, 5)]]
    return cases


@pytest.mark.parametrize("profile", PROFILES)
def test_results(profile: str) -> None:
    check(grid(lanes_of(profiles()[profile], "float32")), profile)


def test_the_bound_holds_for_many_channels() -> None:
    lanes = lanes_of(profiles()[WIDEST], "float32")
    check([case(Cut(tile, 8, 2, lanes, 16, apart=True), (1, 512, 14, 14), lanes) for tile in sorted(POINTS)], WIDEST)


def test_every_candidate_is_right() -> None:
    """Tuning may pick any of them."""
    profile = profiles()[WIDEST]
    lanes = lanes_of(profile, "float32")
    conv = Convolved(2, lanes, 3 * lanes, 1, (3, 3), (1, 1), (10, 13), "float32")
    cuts = [cut for c in winograd_candidates(profile, conv) if (cut := cut_of(c)) is not None]
    assert len(cuts) > 4
    check([case(cut, (2, lanes, 10, 13), 3 * lanes) for cut in dict.fromkeys(cuts)], WIDEST)


@pytest.mark.parametrize(
    ("change", "fits"),
    [({}, True), ({"groups": 2}, False), ({"kernel": (3, 1)}, False), ({"strides": (2, 2)}, False),
     ({"depth": 20}, False), ({"channels": 60}, False), ({"dtype": "float64"}, False)],
)  # fmt: skip
def test_where_it_fits(change: dict[str, object], fits: bool) -> None:
    conv = dataclasses.replace(Convolved(1, 64, 64, 1, (3, 3), (1, 1), (56, 56), "float32"), **change)
    assert bool(winograd_candidates(profiles()[WIDEST], conv)) == fits


def test_the_model_of_cost_prefers_it_where_it_wins() -> None:
    """Large images of few channels yes, small ones whose transformed filters would not fit any cache no."""
    profile = profiles()[WIDEST]

    def winner(channels: int, side: int) -> bool:
        conv = Convolved(1, channels, channels, 1, (3, 3), (1, 1), (side, side), "float32")
        offered = [*direct_candidates(profile, conv), *winograd_candidates(profile, conv)]
        return cut_of(Chooser().choose(conv.workload(), offered)) is not None

    assert winner(64, 56)
    assert winner(128, 28)
    assert not winner(1024, 7)
    assert not winner(16, 2)
