"""Instructions that kernels execute, counted under emulation."""

from __future__ import annotations

import pathlib

import pytest

from benchmarks.arm_counts import Emulator, executed, multiplied_at_once
from benchmarks.zoo.layers import Product
from mmopt.backends.profile import load_profile
from tests.arm.emulation import needs_emulation

pytestmark = [pytest.mark.arm, needs_emulation]


def test_products_execute_little_but_multiplies(tmp_path: pathlib.Path) -> None:
    """Counts have a lower bound: each instruction multiplies so many numbers and no more."""
    layer = Product(1, 80, 512, 256)
    emulator = Emulator.built(tmp_path)
    for target, precision, most in (
        ("cortex-a76", "fp32", 1.3),
        ("cortex-a76", "int8", 1.25),
        ("neoverse-v1", "int8", 2.2),
    ):
        ideal = layer.operations / 2 / multiplied_at_once(load_profile(target), precision)
        assert ideal < executed(emulator, layer, precision, target) < most * ideal
