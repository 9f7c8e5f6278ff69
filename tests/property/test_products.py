"""Matrix products of random sizes, cut in random ways, against numpy in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import tirx

from mmopt.backends.cpu.kernels.matmul_blocking import Blocking
from mmopt.backends.cpu.kernels.tile import Tile, lanes_of
from tests.kernels import PROFILES, WIDEST, Arrays, Case, check, profiles
from tests.unit.test_kernel_matmul import packed, product, turned_of

QUIET = [HealthCheck.too_slow]


@dataclasses.dataclass(frozen=True)
class Cut:
    """A product and how its work is cut; ``symbols`` names the extents that kernels learn at run time only."""

    operand: str
    dtype: str
    batch: int
    rows: int
    depth: int
    columns: int
    height: int
    vectors: int
    tiles: int
    panels: int
    step: int
    symbols: frozenset[str]


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """Any cut that the template allows."""
    operand = draw(st.sampled_from(["packed", "in place", "copied", "view"]))
    free = {"packed": "m", "in place": "bmk", "copied": "bmkn", "view": "bmkn"}[operand]
    symbols = draw(st.frozensets(st.sampled_from(sorted(free)), max_size=len(free)))
    tiles = draw(st.integers(0, 4))
    blocks = operand == "packed" and ("m" not in symbols or tiles > 0)
    return Cut(
        operand,
        draw(st.sampled_from(["float32", "float32", "float64"])),
        1 if operand == "packed" else draw(st.integers(1, 3)),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 70)),
        draw(st.integers(1, 100)),
        draw(st.integers(1, 6)),
        draw(st.integers(1, 3)),
        tiles,
        draw(st.integers(1, 3)),
        draw(st.sampled_from([0, 16, 24, 33])) if blocks else 0,
        symbols,
    )


def case_of(cut: Cut, profile: str) -> Case:
    """The kernel of a cut, with data."""
    sizes = {"b": cut.batch, "m": cut.rows, "k": cut.depth, "n": cut.columns}
    b, m, k, n = (tirx.Var(s, "int64") if s in cut.symbols else sizes[s] for s in "bmkn")
    lanes = lanes_of(profiles()[profile], cut.dtype)
    tile = Tile(cut.height, cut.vectors, lanes)
    blocking = Blocking(tile, cut.tiles, cut.panels, cut.step, copy=cut.operand in ("copied", "view"))
    data = Arrays(seed=cut.rows)
    if cut.operand == "packed":
        a = data.source((m, k), cut.dtype, **sizes)
        weight = data.data((cut.depth, cut.columns), cut.dtype)
        output = product(a, packed(data, weight, tile.columns), blocking, columns=cut.columns).output
        return data.case(str(cut), output, data[a] @ weight.astype(np.float64), sizes=sizes)
    a = data.source((b, m, k), cut.dtype, **sizes)
    right = data.source((b, n, k) if cut.operand == "view" else (b, k, n), cut.dtype, **sizes)
    output = product(a, turned_of(right) if cut.operand == "view" else right, blocking).output
    want = data[a] @ (data[right].swapaxes(1, 2) if cut.operand == "view" else data[right])
    return data.case(str(cut), output, want, sizes=sizes)


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(st.lists(cuts(), min_size=5, max_size=5))
def test_products(drawn: list[Cut]) -> None:
    check([case_of(cut, WIDEST) for cut in drawn], WIDEST)


@pytest.mark.slow
@pytest.mark.parametrize("profile", [p.values[0] for p in PROFILES])
@settings(max_examples=20, deadline=None, suppress_health_check=QUIET)
@given(drawn=st.lists(cuts(), min_size=6, max_size=6))
def test_products_at_length(drawn: list[Cut], profile: str) -> None:
    check([case_of(cut, profile) for cut in drawn], profile)
