"""Transposed convolutions against their definition in float64."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from onnx import helper

from mmopt.lowering.ops.conv_transpose import phase_filters
from tests.kernels import PROFILES
from tests.programs import Example, check, model_of


@dataclasses.dataclass(frozen=True)
class Transposed:
    """``x`` is ``[N, C, *space]``, ``w`` is ``[C, O/groups, *kernel]``."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = True


def scattered(g: Transposed, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """Every input adds its multiple of the filter to the result."""
    rank = x.ndim - 2
    pads, extra, dilations = g.pads or (0,) * (2 * rank), g.extra or (0,) * rank, g.dilations or (1,) * rank
    sizes = zip(x.shape[2:], g.strides, w.shape[2:], dilations, extra, strict=True)
    full = [(e - 1) * s + d * (k - 1) + 1 + o for e, s, k, d, o in sizes]
    each = w.shape[1]
    y = np.zeros((x.shape[0], each * g.groups, *full))
    split = x.astype(np.float64).reshape(x.shape[0], g.groups, -1, *x.shape[2:])
    filters = w.astype(np.float64).reshape(g.groups, -1, *w.shape[1:])
    for tap in itertools.product(*(range(k) for k in w.shape[2:])):
        part = np.einsum("ngc...,gco->ngo...", split, filters[(..., *tap)]).reshape(x.shape[0], -1, *x.shape[2:])
        places = zip(tap, dilations, x.shape[2:], g.strides, strict=True)
        y[(..., *(slice(t * d, t * d + (e - 1) * s + 1, s) for t, d, e, s in places))] += part
    cut = y[(..., *(slice(b, f - e) for b, e, f in zip(pads[:rank], pads[rank:], full, strict=True)))]
    return cut if bias is None else cut + bias.astype(np.float64).reshape(-1, *[1] * rank)


def example(g: Transposed, symbolic: Sequence[int | str] | None = None) -> Example:
    """A model with one transposed convolution."""
    random = np.random.default_rng(0)
    x, w = (random.standard_normal(s).astype(np.float32) for s in (g.x, g.w))
    bias = random.standard_normal(g.w[1] * g.groups).astype(np.float32) if g.bias else None
    weights = {"w": w} | ({} if bias is None else {"bias": bias})
    given = {"strides": g.strides, "pads": g.pads, "output_padding": g.extra, "dilations": g.dilations}
    node = helper.make_node(
        "ConvTranspose", ["x", *weights], ["y"], group=g.groups, **{k: v for k, v in given.items() if v}
    )
    model = model_of([node], {"x": x}, ["y"], weights, symbolic={"x": symbolic} if symbolic else None)
    return Example(f"{g} {symbolic or ''}", model, {"x": x}, [scattered(g, x, w, bias)])


def examples() -> list[Example]:
    """Kernels larger than, equal to and smaller than the step; uneven padding; one to three axes; odd channels."""
    made = [example(g) for g in [
        Transposed((1, 16, 5, 6), (16, 32, 2, 2), (2, 2)),
        Transposed((2, 16, 5, 6), (16, 16, 4, 4), (2, 2), (1, 1, 1, 1)),
        Transposed((1, 16, 5, 6), (16, 20, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
        Transposed((1, 16, 4, 5), (16, 16, 2, 5), (3, 2), (0, 1, 0, 2), bias=False),
        Transposed((1, 3, 7), (3, 5, 6), (4,), (3, 0), (1,)),
        Transposed((1, 16, 3, 4, 2), (16, 16, 2, 3, 2), (2, 1, 2), (0, 1, 0, 1, 0, 1)),
        Transposed((1, 16, 6, 1), (16, 16, 3, 1), (2, 1), (1, 0, 2, 0)),
        Transposed((1, 16, 3, 3), (16, 16, 2, 2), (2, 2), (0, 0, 3, 3)),
        Transposed((1, 32, 4, 4), (32, 16, 3, 3), (2, 2), groups=2),
        Transposed((1, 16, 4, 4), (16, 16, 3, 3), (2, 2), dilations=(2, 1)),
        Transposed((1, 16, 4, 4), (16, 16, 3, 3), (1, 1), (1, 1, 1, 1)),
    ]]  # fmt: skip
    for n, h in [(1, 4), (2, 7)]:
        g = Transposed((n, 16, h, 5), (16, 16, 4, 4), (2, 2), (1, 1, 1, 1))
        made.append(example(g, ["n", 16, "h", 5]))
    return made


@pytest.mark.parametrize("profile", PROFILES)
def test_transposed_convolutions(profile: str) -> None:
    check(examples(), profile)


def test_phases_take_every_other_tap() -> None:
    w = np.arange(2 * 3 * 5.0).reshape(2, 3, 5)
    filters = phase_filters(w, (2,))
    assert filters.shape == (6, 2, 3)
    np.testing.assert_array_equal(filters[1], w[:, 1, 4::-2])
    np.testing.assert_array_equal(filters[3 + 1, :, 1:], w[:, 1, 3::-2])
    np.testing.assert_array_equal(filters[3 + 1, :, 0], 0)
