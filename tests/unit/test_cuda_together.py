"""Small kernels in common launches: the right ones, with the right answers."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from tvm import tirx

from mmopt.backends.cpu.loops import nothing
from mmopt.backends.cuda.together import Small
from mmopt.backends.profile import load_profile
from tests.cuda_emulator import Emulated, EmulatedEngine, available
from tests.operators import example, numbers
from tests.programs import Example, grouped
from tests.unit.test_cuda_graphs import compared, towers
from tests.unit.test_cuda_products import with_weight

emulated = pytest.mark.skipif(not available, reason="needs g++, to compile what a GPU would run")


def launches(made: Emulated) -> int:
    """Launches of one run."""
    (order,) = made.generated.repeatable.values()
    return sum(count for count, _ in order)


def agrees(made: Emulated, case: Example) -> None:
    got = made.run(case.feeds)
    for name, want in zip(got, case.expected(), strict=True):
        np.testing.assert_allclose(got[name], want, rtol=0, atol=2e-5 * float(np.abs(want).max()), err_msg=name)


@emulated
def test_towers_share_launches() -> None:
    """As many launches as the longer tower has, and those behind both."""
    case = towers()
    apart, made = Emulated(grouped(case.model), batched=False), Emulated(grouped(case.model))
    assert not apart.generated.together
    assert launches(made) < launches(apart)
    compared(EmulatedEngine(made), case, range(4))
    source = made.generated.source
    assert all(re.search(rf"void .*{name}\w*_kernel", source) for name in made.generated.together.values())
    alone = set(made.builder.kernels) - set(made.generated.together)
    assert len(alone) + len(made.generated.together) == len(made.builder.kernels)


HEADS = "\n".join(f"h{n} = MatMul (x, w{n}) y{n} = {kind} (h{n})" for n, kind in enumerate(("Tanh", "Relu", "Sigmoid")))


@emulated
def test_heads_of_different_sizes_are_one_product() -> None:
    """Blocks of one product are followed by those of the next; each reads its own weights."""
    feeds = {"x": numbers(3, 32)} | {f"w{n}": numbers(32, width, seed=n) for n, width in enumerate((5, 64, 17))}
    case = example(HEADS, feeds, outputs=("y0", "y1", "y2"))
    for n in range(3):
        case = with_weight(case, f"w{n}")
    made = Emulated(grouped(case.model))
    assert launches(made) == 1
    assert len(set(made.generated.together.values())) == 1
    agrees(made, case)


@emulated
def test_a_kernel_used_twice_is_in_a_launch_twice() -> None:
    """The same code for different inputs needs variables of its own."""
    feeds = {"x": numbers(3, 16), "y": numbers(3, 16, seed=1), "w": numbers(16, 16, seed=2)}
    case = with_weight(example("a = MatMul (x, w) b = MatMul (y, w)", feeds, outputs=("a", "b")), "w")
    made = Emulated(grouped(case.model))
    assert launches(made) == 1
    agrees(made, case)


@emulated
def test_a_short_branch_meets_the_end_of_a_long_one() -> None:
    """What is wanted at the same time is made at the same time, however many steps are before it."""
    feeds = {"x": numbers(3, 16), "y": numbers(3, 16, seed=1), "w": numbers(16, 16, seed=2)}
    body = "a = MatMul (x, w) b = MatMul (y, w) t = Tanh (b) c = MatMul (t, w) z = Sub (a, c)"
    case = with_weight(example(body, feeds, outputs=("z",)), "w")
    made, apart = Emulated(grouped(case.model)), Emulated(grouped(case.model), batched=False)
    assert launches(made) < launches(apart)
    agrees(made, case)


def test_nobody_waits_for_a_long_kernel() -> None:
    variables = [tirx.Var(name, "int64") for name in ("block", "thread")]
    short = Small(((variables[0], 4),), variables[1], 128, nothing(), 0, 1, multiplies=False, cooperates=False)
    long = dataclasses.replace(short, steps=2000)
    wide = dataclasses.replace(short, threads=256)
    assert short.meets([short], 8)
    assert not short.meets([short, short], 8), "more blocks than multiprocessors"
    assert not short.meets([long], 8)
    assert long.meets([long], 8)
    assert short.meets([wide], 8)
    assert not wide.meets([dataclasses.replace(short, cooperates=True)], 8), "threads that wait for each other"
    assert not dataclasses.replace(short, shared=30000).meets([dataclasses.replace(short, shared=30000)], 8)


@emulated
@pytest.mark.parametrize("symbolic", [False, True], ids=["known", "unknown"])
def test_a_concatenation_is_one_launch(symbolic: bool) -> None:
    """A thread for each element of each part: short ones, long ones, and at run time an empty one."""
    shapes: dict[str, list[object]] = {name: [name, 7] for name in "abc"} if symbolic else {}
    parts = {"a": numbers(3, 7), "b": numbers(90, 7, seed=1), "c": numbers(0 if symbolic else 1, 7, seed=2)}
    case = example(
        "y = Concat <axis = 0> (a, b, c) z = Concat <axis = 1> (y, y)", parts, outputs=("z",), symbolic=shapes
    )
    made = Emulated(grouped(case.model))
    assert len(re.findall(r"^extern \"C\" __global__.*\{$", made.generated.source, re.MULTILINE)) == 2
    agrees(made, case)


@emulated
def test_what_needs_each_other_stays_apart() -> None:
    feeds = {"x": numbers(3, 16), "w": numbers(16, 16, seed=2)}
    case = with_weight(example("a = MatMul (x, w) b = Softmax (a) c = MatMul (b, w)", feeds, outputs=("c",)), "w")
    made = Emulated(grouped(case.model))
    assert not made.generated.together
    agrees(made, case)


@emulated
@pytest.mark.parametrize(
    ("body", "rows", "symbolic"),
    [
        ("a = Softmax <axis = 0> (x) b = Softmax <axis = 0> (y)", 2 * load_profile("cuda-sm80").cores, False),
        ("a = Softmax <axis = -1> (x) b = Softmax <axis = -1> (y)", 8, True),
    ],
    ids=["many blocks", "unknown sizes"],
)
def test_others_stay_apart(body: str, rows: int, symbolic: bool) -> None:
    feeds = {"x": numbers(4, 64 * rows), "y": numbers(4, 64 * rows, seed=1)}
    shapes = {name: ["n", 64 * rows] for name in feeds} if symbolic else {}
    case = example(body, feeds, outputs=("a", "b"), symbolic=shapes)
    made = Emulated(grouped(case.model))
    assert not made.generated.together
    agrees(made, case)


@emulated
def test_a_product_does_not_wait_for_what_is_none() -> None:
    """A product and an elementwise kernel side by side stay in launches of their own."""
    feeds = {"x": numbers(3, 16), "w": numbers(16, 16, seed=2), "z": numbers(3, 16, seed=3)}
    case = with_weight(example("a = MatMul (x, w) b = Tanh (z)", feeds, outputs=("a", "b")), "w")
    made = Emulated(grouped(case.model))
    assert not made.generated.together
    assert launches(made) == 2
    agrees(made, case)
