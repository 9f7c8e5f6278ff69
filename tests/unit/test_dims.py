"""Symbolic sizes: one normal form, exact for every value of the names in it."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmopt.analysis import dims
from mmopt.analysis.dims import Size, evaluate, parse_dim, symbol

SEQ, BATCH = symbol("seq"), symbol("batch")

PRINTED = {
    "2*seq": SEQ + SEQ,
    "2*seq + 2": 2 * (SEQ + 1),
    "seq - 1": SEQ - 1,
    "1 - seq": 1 - SEQ,
    "batch*seq": SEQ * BATCH,
    "64*seq": SEQ * BATCH * 768 // (BATCH * 12),
    "2*seq + 1": (4 * SEQ + 3) // 2,
    "(seq + 1)//4": (SEQ + 1) // 2 // 2,
    "3*((seq + 1)//2) - 2": 3 * ((SEQ + 1) // 2) - 2,
    "Max(0, seq - 1)": dims.maximum(SEQ - 1, 0),
    "Min(5, seq)": dims.minimum(SEQ, 5),
    "Mod(seq, 8)": SEQ % 8,
}


@pytest.mark.parametrize(("text", "size"), PRINTED.items(), ids=PRINTED)
def test_prints_in_normal_form_and_reads_back(text: str, size: Size) -> None:
    assert str(size) == text
    assert parse_dim(text) == size


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("floor(seq/2)", SEQ // 2),
        ("floor(seq/2) + 1", SEQ // 2 + 1),
        ("seq**2", SEQ * SEQ),
        ("12", 12),
        ("(2*seq)/2", SEQ),
    ],
)
def test_reads_what_others_write(text: str, want: Size) -> None:
    assert parse_dim(text) == want


@pytest.mark.parametrize("name", ["batch-size", "/Add.1_dim_0", "unk__3", "a.b", "seq/2", "f(seq)", "2 seq", "x[0]"])
def test_anything_else_is_one_name(name: str) -> None:
    assert parse_dim(name) == symbol(name)
    assert dims.symbols(parse_dim(name)) == {name}


def test_cancels_to_numbers() -> None:
    assert SEQ - SEQ == 0
    assert (SEQ + 3) - SEQ == 3
    assert (64 * SEQ + 64) // (SEQ + 1) == 64
    assert (4 * SEQ + 3) % 2 == 1
    assert dims.product([SEQ, 0]) == 0


def test_a_leading_minus_is_read_back_as_it_was_meant() -> None:
    for size in (-(SEQ // 2), BATCH - SEQ // 2, -(SEQ // 2) - BATCH, -2 * (SEQ // 3)):
        assert parse_dim(str(size)) == size


def test_bounds_hold_for_empty_sizes_too() -> None:
    assert dims.at_least(SEQ, 0)
    assert not dims.at_least(SEQ, 1)
    assert dims.maximum(SEQ, 0) == SEQ
    assert dims.maximum(SEQ + 2, SEQ) == SEQ + 2
    assert dims.lower_bound(dims.maximum(SEQ - 1, 0)) == 0
    assert math.isinf(dims.lower_bound(SEQ - BATCH))
    assert dims.lower_bound(7 - SEQ % 8) == 0


def test_gives_up_on_what_grows_without_end() -> None:
    factors = [symbol(f"n{i}") + 1 for i in range(20)]
    with pytest.raises(dims.DimTooComplex):
        dims.product(factors)


def _expressions() -> st.SearchStrategy[tuple[Size, str]]:
    """Expressions built by our operators, each with the same expression as Python source."""
    leaves = st.one_of(
        st.integers(-4, 6).map(lambda i: (i, f"({i})")),
        st.sampled_from(["a", "b"]).map(lambda n: (symbol(n), n)),
    )

    def combine(children: st.SearchStrategy[tuple[Size, str]]) -> st.SearchStrategy[tuple[Size, str]]:
        pairs = st.tuples(children, children)
        divisor = st.integers(1, 5)
        return st.one_of(
            pairs.map(lambda p: (p[0][0] + p[1][0], f"({p[0][1]} + {p[1][1]})")),
            pairs.map(lambda p: (p[0][0] - p[1][0], f"({p[0][1]} - {p[1][1]})")),
            pairs.map(lambda p: (p[0][0] * p[1][0], f"({p[0][1]} * {p[1][1]})")),
            pairs.map(lambda p: (dims.maximum(p[0][0], p[1][0]), f"max({p[0][1]}, {p[1][1]})")),
            pairs.map(lambda p: (dims.minimum(p[0][0], p[1][0]), f"min({p[0][1]}, {p[1][1]})")),
            st.tuples(children, divisor).map(lambda p: (p[0][0] // p[1], f"({p[0][1]} // {p[1]})")),
            st.tuples(children, divisor).map(lambda p: (p[0][0] % p[1], f"({p[0][1]} % {p[1]})")),
        )

    return st.recursive(leaves, combine, max_leaves=8)


@settings(max_examples=300, deadline=None)
@given(_expressions())
def test_equals_python_arithmetic_for_all_values(expression: tuple[Size, str]) -> None:
    size, source = expression
    again = parse_dim(str(size))
    for a, b in itertools.product(range(4), range(4)):
        want = eval(source, {"a": a, "b": b, "max": max, "min": min})
        assert evaluate(size, {"a": a, "b": b}) == want
        assert evaluate(again, {"a": a, "b": b}) == want
        assert dims.lower_bound(size) <= want
