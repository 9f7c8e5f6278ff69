"""The bound on what equality saturation could save: right on islands whose best form is known."""

from __future__ import annotations

import pytest

from benchmarks.saturation import examine
from tests.canonical import module_from


@pytest.mark.parametrize(
    ("body", "before", "after"),
    [
        ("p = Mul(x, a) q = Mul(x, b) y = Add(p, q)", 24, 16),
        ("p = Mul(x, s) y = Mul(p, t)", 16, 9),
        ("p = Add(x, a) y = Add(p, b)", 16, 16),
        ("p = Div(x, s) q = Mul(p, t) y = Mul(q, a)", 48, 21),
        ("p = Sub(x, a) y = Add(p, a)", 16, 16),
        ("p = Exp(x) q = Exp(x) y = Add(p, q)", 168, 88),
        ("p = Add(c, d) y = Mul(x, p)", 9, 8),
    ],
    ids=["factor", "numbers first", "nothing", "one division", "inverse not searched", "shared", "constant"],
)
def test_island(body: str, before: float, after: float) -> None:
    inputs = "float[8] x, float[8] a, float[8] b, float[1] s, float[1] t"
    text = f"g ({inputs}) => (float[8] y) <float[1] c = {{2}}, float[1] d = {{3}}> {{ {body} }}"
    found = examine(module_from(text))
    assert (found.islands, found.work, found.work - found.saved) == (1, before, after)
    assert found.improved == (after < before)
    assert found.given_up == 0
