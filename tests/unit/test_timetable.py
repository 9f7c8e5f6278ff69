"""Times of kernels from a table: what was measured comes back, what lies between is between, others stay apart."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest

from mmopt.autotune.contest import compiled
from mmopt.autotune.timetable import TimeTable, within
from mmopt.backends.cpu.choosing import Chooser
from mmopt.backends.profile import load_profile
from mmopt.runtime.profiling import KernelTime, ModelTime
from tests.prunable import convolutions


def product(name: str, size: int, cycles: float, calls: int = 1, formats: str = "float32") -> dict[str, Any]:
    workload = f"matmul(batch=1,m=?,n={size},k=64,b=packed):{formats}"
    return {"name": name, "template": "matmul", "calls": calls, "workload": workload, "cycles": cycles}


def measured(seconds: float, **kernels: tuple[int, float]) -> ModelTime:
    return ModelTime(seconds, [KernelTime(name, calls, spent) for name, (calls, spent) in kernels.items()], 10)


def test_what_was_measured_comes_back() -> None:
    records = [product("small", 16, 100.0, calls=3), product("large", 1024, 9000.0)]
    table = TimeTable()
    table.learn(records, measured(50e-6, small=(3, 9e-6), large=(1, 31e-6)))
    assert table.between(0.0) == pytest.approx(10e-6)
    assert table.seconds(records) == pytest.approx(50e-6, rel=0.01)
    assert table.seconds(records[:1]) == pytest.approx(19e-6, rel=0.01)


def test_sizes_between_take_what_lies_between_and_the_nearest_counts_most() -> None:
    """Small kernels take twice what is predicted, large ones what is predicted."""
    records = [product("small", 15, 1e6), product("large", 1023, 64e6)]
    table = TimeTable()
    table.learn(records, measured(0.0, small=(1, 2e-3), large=(1, 64e-3)))
    ratios = [table.seconds([product("other", n, 1e6)]) / 1e-3 for n in (15, 31, 127, 511, 1023)]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] == pytest.approx(2, rel=0.01)
    assert ratios[2] == pytest.approx(2**0.5, rel=0.01)
    assert ratios[-1] == pytest.approx(1, rel=0.01)


def test_a_call_does_not_shrink_with_what_is_computed() -> None:
    """A kernel with a hundredth of the arithmetic takes more than a hundredth of the time, one with more no more."""
    table = TimeTable()
    table.learn([product("known", 64, 100e3)], measured(0.0, known=(1, 10e-6)))
    small, large = (table.seconds([product("new", 64, cycles)]) for cycles in (1e3, 10e6))
    assert small == pytest.approx(10e-6 * 2 / 101, rel=1e-3)
    assert large == pytest.approx(1e-3, rel=0.02)


def test_other_number_formats_and_templates_tell_little() -> None:
    records = [product("wide", 63, 1e3), product("narrow", 63, 1e3, formats="bfloat16")]
    table = TimeTable()
    table.learn(records, measured(0.0, wide=(1, 1e-6), narrow=(1, 5e-6)))
    assert table.seconds([product("new", 127, 1e3, formats="bfloat16")]) == pytest.approx(5e-6, rel=0.03)


def test_full_vectors_tell_more_of_full_vectors_than_of_nearer_ragged_ones() -> None:
    """Kernels of 24 channels take twice what is predicted, as half of a vector is empty; those of 64 take as much."""
    records = [product("ragged", 24, 1e3), product("full", 64, 1e3)]
    table = TimeTable()
    table.learn(records, measured(0.0, ragged=(1, 2e-6), full=(1, 1e-6)))
    assert table.seconds([product("new", 32, 1e3)]) < 1.2e-6
    assert table.seconds([product("new", 40, 1e3)]) > 1.8e-6


def test_what_has_no_prediction_goes_by_what_it_moves() -> None:
    records = [{"name": f"e{size}", "template": "elementwise", "calls": 1, "bytes": size} for size in (4096, 8192)]
    table = TimeTable()
    table.learn(records, measured(0.0, e4096=(1, 1e-6), e8192=(1, 2e-6)))
    middle = table.seconds([{"name": "new", "template": "elementwise", "calls": 1, "bytes": 6000}])
    assert 1e-6 < middle < 2e-6


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ((10e-6, 20e-6), 15e-6),  # a constant of 0 and a tenth of the kernels
        ((15e-6, 20e-6), 17.5e-6),
        ((20e-6, 10e-6), 15e-6),  # no share of the kernels is below 0
        ((4e-6, 20e-6), 13.2e-6),  # and no constant
    ],
)
def test_what_is_between_kernels_is_a_constant_and_a_share_of_them(
    between: tuple[float, float], expected: float
) -> None:
    table = TimeTable()
    for spent, rest in zip((100e-6, 200e-6), between, strict=True):
        table.learn([], measured(spent + rest, all=(1, spent)))
    assert table.between(150e-6) == pytest.approx(expected, rel=1e-3)


def test_of_one_model_what_is_more_than_a_call_takes_is_a_share() -> None:
    table = TimeTable()
    table.learn([], measured(135e-6, all=(1, 100e-6)))
    assert table.between(100e-6) == pytest.approx(35e-6)
    assert table.between(50e-6) == pytest.approx(25e-6)
    short = TimeTable()
    short.learn([], measured(110e-6, all=(1, 100e-6)))
    assert short.between(50e-6) == pytest.approx(10e-6)


def test_sizes_that_are_known_at_run_time_only_count_as_plausible() -> None:
    """Two kernels that move data, of a model with a symbolic batch: what a third takes depends on what it moves."""
    records = [
        {"name": name, "template": "elementwise", "calls": 1, "bytes": None, "plausible_bytes": size}
        for name, size in (("small", 1000), ("large", 100000))
    ]
    table = TimeTable()
    table.learn(records, measured(0.0, small=(1, 1e-6), large=(1, 20e-6)))
    new = {"name": "new", "template": "elementwise", "calls": 1, "bytes": None}
    assert table.seconds([{**new, "plausible_bytes": 100000}]) == pytest.approx(20e-6, rel=0.05)
    assert table.seconds([{**new, "plausible_bytes": 1000}]) == pytest.approx(1e-6, rel=0.05)


def test_a_table_without_measurements_predicts_nothing() -> None:
    assert TimeTable().seconds([product("a", 16, 100.0)]) == 0.0


def test_a_model_whose_kernels_are_known_is_predicted_as_measured(tmp_path: pathlib.Path) -> None:
    """The kernels of a prediction, made without generating code, are those of the artifact."""
    module, profile = convolutions((16, 24)), load_profile("cpu")
    inputs = {"x": np.zeros((1, 3, 8, 8), np.float32)}
    table = TimeTable()
    with compiled(module, profile, Chooser(), tmp_path / "m.mmopt", 1) as session:
        found = table.observe(session, inputs)
    assert len(found.kernels) >= 3
    assert found.runs > 100, "a model of some microseconds is run often"
    assert table.between(0.0) > 0
    kernels = sum(kernel.seconds for kernel in found.kernels)
    assert table.predict(module, profile) == pytest.approx(table.between(kernels) + kernels, rel=0.05)


def test_share_of_predictions_near_enough() -> None:
    assert within([1.0, 1.2, 0.9, 2.0], [1.0, 1.0, 1.0, 1.0], 0.15) == 0.5
