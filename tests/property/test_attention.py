"""Random attentions, in random blockings: what numpy gives in float64."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmopt.backends.cpu.kernels.attention_blocking import FEW
from tests.kernels import WIDEST, check
from tests.unit.test_kernel_attention import Layer, cases, small

QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much]


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Small attentions of any kind, mostly of many tiles, blocks and tasks."""
    batch, kv_heads, sharing = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2, 3]))
    heads, queries, keys = kv_heads * sharing, draw(st.integers(1, 40)), draw(st.integers(1, 150))
    few = queries * sharing <= FEW
    rows = queries * sharing if few else draw(st.sampled_from([1, 4, 6, 9, 13]))
    blocking = small(
        WIDEST, rows=rows, blocks=draw(st.integers(1, 3)), tiles=1 if few else draw(st.integers(1, 3)), packed=not few
    )
    mask = (*(draw(st.sampled_from([1, e])) for e in (batch, heads, queries)), draw(st.integers(1, keys)))
    return Layer(
        (batch, heads, kv_heads, queries, keys, draw(st.integers(1, 40)), draw(st.integers(1, 40))),
        draw(st.sampled_from([blocking, blocking, None])),
        mask=draw(st.sampled_from([None, mask])),
        mask_dtype=draw(st.sampled_from(["bool", "float32"])),
        lengths=draw(st.sampled_from([None, tuple(draw(st.integers(0, keys)) for _ in range(batch))])),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.5])),
        causal=draw(st.booleans()),
        order=draw(st.sampled_from(["bhsd", "bshd", "bsm"])),
    )


def check_layers(made: list[Layer]) -> None:
    check(cases(list(dict.fromkeys(made)), WIDEST), WIDEST)


@settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(st.lists(layers(), min_size=6, max_size=6))
def test_attention(made: list[Layer]) -> None:
    check_layers(made)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=QUIET)
@given(st.lists(layers(), min_size=8, max_size=8))
def test_attention_at_length(made: list[Layer]) -> None:
    check_layers(made)
