"""What the functions of a program share: weights and kernels."""

from __future__ import annotations

import numpy as np

from mmopt.backends.compute import Source, compute
from mmopt.lowering.program import ProgramBuilder
from mmopt.lowering.values import Value
from tests.kernels import WIDEST, profiles


def builder() -> ProgramBuilder:
    return ProgramBuilder(profiles()[WIDEST])


def test_weights_made_on_the_fly_are_not_taken_for_one_another() -> None:
    program = builder()
    for number in range(50):
        made = program.packed(Value(constant=np.full((4, 4), number, np.float32)), "same", lambda a: a + 1)
        assert made.data[0, 0] == number + 1


def test_a_weight_is_packed_once_for_each_key() -> None:
    program, weight = builder(), Value(constant=np.ones((2, 3), np.float32), name="w")
    first = program.packed(weight, "a", lambda a: a.T)
    assert program.packed(weight, "a", lambda a: a * 0) is first
    assert program.packed(weight, "b", lambda a: a * 0) is not first
    assert first.data.flags.c_contiguous
    assert program.weight_key(first) == program.weight_key(first) == "w"
    assert program.weight_key(program.packed(weight, "b", lambda a: a)) == "w.1"
    assert set(program.weights) == {"w", "w.1"}


def test_equal_kernels_are_shared_and_different_ones_are_not() -> None:
    program = builder()

    def kernel(factor: float, size: int = 8) -> str:
        x = Source((size,), "float32", "x")
        doubled = compute((size,), "float32", lambda i: x[i] * np.float32(factor))
        return str(program.kernel([doubled], "scale")[0].name_hint)

    assert kernel(2) == kernel(2)
    assert len({kernel(2), kernel(3), kernel(2, 9)}) == 3
    assert program.kernels[kernel(2)]["calls"] == 4
    assert program.kernels[kernel(2)]["template"] == "elementwise"
