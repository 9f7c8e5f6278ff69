"""Scalar expressions in another form that computes the same."""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Call

from mmopt.backends.expressions import nodes, rectified
from mmopt.lowering.ops.activations import relu


def zero(dtype: str = "float32") -> tirx.FloatImm:
    return tirx.const(0.0, dtype)


def test_a_rectifier_becomes_a_maximum() -> None:
    x = tirx.Var("x", "float32")
    made = rectified(relu(x + zero()) * tirx.const(2.0, "float32"))
    calls = [node for node in nodes(made) if isinstance(node, Call)]
    assert len(calls) == 1
    assert not [node for node in nodes(made) if isinstance(node, tirx.Select)]


def test_other_choices_stay() -> None:
    x, y, half = tirx.Var("x", "float32"), tirx.Var("y", "float32"), tirx.Var("h", "float16")
    one = tirx.const(1.0, "float32")
    for kept in (
        tirx.Select(x < zero(), zero(), y),
        tirx.Select(x < one, zero(), x),
        tirx.Select(x < zero(), one, x),
        tirx.Select(x > zero(), zero(), x),
        relu(half),
        x + y,
    ):
        assert rectified(kept).same_as(kept)
