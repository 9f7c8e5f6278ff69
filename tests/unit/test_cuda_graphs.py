"""Recorded launches: the runtime's own code, with the emulator's version of the functions that NVIDIA's has for it."""

from __future__ import annotations

import ctypes
import warnings

import numpy as np
import pytest

from mmopt.backends.cpu.ordering import Access, Span, behind, waits
from mmopt.runtime.graphs import GraphRuntime, edges
from tests.cuda_emulator import Emulated, EmulatedEngine, available
from tests.operators import example, numbers
from tests.programs import Example, grouped
from tests.unit.test_cuda_products import with_weight

emulated = pytest.mark.skipif(not available, reason="needs g++, to compile what a GPU would run")


def test_steps_wait_for_what_they_need_and_for_memory_in_use() -> None:
    a, b, c = Span("w", 0, 8), Span("w", 8, 16), Span("w", 4, 12)
    steps = [
        Access((), (a,)),
        Access((), (b,)),
        Access((a,), (Span("x"),)),
        Access((b,), (Span("y"),)),
        Access((), (c,)),
        Access((Span("x"), Span("y")), ()),
    ]
    order = waits(steps)
    assert order == [(), (), (0,), (1,), (2, 3), (2, 3)]
    assert behind(order)[4] == 0b1111


def test_edges_of_a_row() -> None:
    order = ((1, ()), (2, ()), (0, (0, 1)), (1, (2,)), (1, (3,)))
    assert edges(order) == ([(0, 1)], [(0, 3)])
    assert edges(()) == ([], [])


def compared(engine: EmulatedEngine, case: Example, seeds: range) -> None:
    """Runs with new inputs each time agree with onnxruntime, and leave earlier results alone."""
    segment = engine.segment()
    kept = []
    for seed in seeds:
        feeds = {name: numbers(*array.shape, seed=seed + n) for n, (name, array) in enumerate(case.feeds.items())}
        got = engine.run(segment, [feeds[name] for name in segment.inputs])
        kept.append((got, Example(case.name, case.model, feeds).expected()))
    for got, want in kept:
        for tensor, expected in zip(got, want, strict=True):
            scale = float(np.abs(expected).max())
            np.testing.assert_allclose(engine.convert.to_numpy(tensor), expected, rtol=0, atol=2e-5 * scale)


def launched(engine: EmulatedEngine) -> int:
    """How many recordings were run so far, in all tests: libraries share the emulator's variables."""
    return int(ctypes.CDLL(str(engine._emulated.kernels)).emulator_launched())


TOWERS = """
    a1 = MatMul (x, u) a2 = Softmax <axis = -1> (a1) a3 = MatMul (a2, v) a4 = Tanh (a3)
    a5 = ReduceMean <keepdims = 1> (a4, i)
    b1 = MatMul (y, u) b2 = LogSoftmax <axis = -1> (b1) b3 = MatMul (b2, v) b4 = Sigmoid (b3)
    b5 = ReduceMax <keepdims = 1> (b4, i)
    s = Concat <axis = 0> (a5, b5) z = MatMul (s, v) t = MatMul (b3, u)
"""


def towers() -> Example:
    feeds = {
        "x": numbers(9, 16),
        "y": numbers(5, 16, seed=1),
        "u": numbers(16, 16, seed=2),
        "v": numbers(16, 16, seed=3),
    }
    feeds["i"] = np.array([0])
    made = example(TOWERS, feeds, outputs=("z", "t"))
    for name in ("u", "v", "i"):
        made = with_weight(made, name)
    return made


@emulated
def test_towers_are_recorded_as_branches() -> None:
    case = towers()
    engine = EmulatedEngine(Emulated(grouped(case.model), batched=False))
    segment = engine.segment()
    assert segment.repeats
    order = segment.order
    assert sum(1 for count, after in order if count and not after) == 2  # both towers begin at once
    before = launched(engine)
    compared(engine, case, range(12))
    assert launched(engine) - before == 11  # all but the first


@emulated
def test_without_an_edge_answers_are_wrong() -> None:
    """The emulator does what edges leave open in every order."""
    case = towers()
    engine = EmulatedEngine(Emulated(grouped(case.model), batched=False))
    segment = engine.segment()
    loose = tuple((count, ()) for count, _ in segment.order)
    object.__setattr__(segment, "order", loose)
    engine.segment = lambda name="main": segment  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        compared(engine, case, range(12))


@emulated
def test_sizes_known_at_run_time_are_recorded_for_each_shape() -> None:
    case = example(
        "t = Softmax <axis = -1> (x) y = MatMul (t, w)",
        {"x": numbers(3, 8), "w": numbers(8, 4)},
        symbolic={"x": ["n", 8]},
    )
    engine = EmulatedEngine(Emulated(grouped(case.model)))
    segment = engine.segment()
    assert segment.repeats
    assert segment.order == ()
    before = launched(engine)
    for count in (3, 5, 3, 3, 5, 5):
        feeds = {"x": numbers(count, 8, seed=count), "w": numbers(8, 4)}
        (got,) = engine.run(segment, [feeds[name] for name in segment.inputs])
        (want,) = Example(case.name, case.model, feeds).expected()
        np.testing.assert_allclose(engine.convert.to_numpy(got), want, rtol=0, atol=2e-5)
    assert launched(engine) - before == 4


@emulated
def test_what_cannot_be_recorded_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = towers()
    engine = EmulatedEngine(Emulated(grouped(case.model)))
    before = launched(engine)
    monkeypatch.setattr(GraphRuntime, "_row", lambda self, graph: self._call("cudaStreamEndCapture", None, None))
    with pytest.warns(RuntimeWarning, match="kernel by kernel: cudaStreamEndCapture failed: invalid argument"):
        compared(engine, case, range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compared(engine, case, range(2))
    assert launched(engine) == before


@emulated
def test_sizes_that_are_data_are_not_recorded() -> None:
    case = example("t = NonZero (x) y = Cast <to = 1> (t)", {"x": numbers(4, 4)})
    engine = EmulatedEngine(Emulated(grouped(case.model)))
    assert not engine.segment().repeats
