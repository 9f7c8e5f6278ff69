"""Calibrating takes the memory of one sample, however many there are."""

from __future__ import annotations

import tracemalloc

import numpy as np

from mmopt.analysis.calibration import collect
from mmopt.ir.module import Module
from tests.canonical import module_from
from tests.unit.test_rewrite import weights

ROWS, WIDTH = 64, 256


def network() -> Module:
    """Eight layers whose activations are far larger than what goes in."""
    lines = ["h0 = MatMul(x, w)"]
    lines += [f"a{n} = Relu(h{n}) h{n + 1} = MatMul(a{n}, v)" for n in range(8)]
    text = f"float[{ROWS},4] x, float[4,{WIDTH}] w, float[{WIDTH},{WIDTH}] v"
    module = module_from(f"g ({text}) => (float[{ROWS},{WIDTH}] y) {{ {' '.join(lines)} y = Relu(h8) }}")
    return weights(module, w=(4, WIDTH), v=(WIDTH, WIDTH))


def peak(count: int) -> int:
    """Most bytes that Python and numpy held at a time, beyond the samples themselves."""
    module = network()
    samples = {"x": np.random.default_rng(0).standard_normal((count, ROWS, 4)).astype(np.float32) / 50}
    tracemalloc.start()
    try:
        found = collect(module, samples, threads=1)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.samples == count
    assert found.tensors["h8"].count == count * ROWS * WIDTH
    return most


def test_memory_does_not_grow_with_samples() -> None:
    peak(2)  # what is imported and cached once
    few, many = peak(4), peak(64)
    assert many < 1.1 * few
    assert many < 64 * 18 * ROWS * WIDTH * 4 / 8, "less than an eighth of all activations"
