"""Convolutions on tensor cores, run by the emulator, compared with onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest

from mmopt.backends.cuda.kernels import product
from mmopt.backends.cuda.kernels.product import TILES, Tile
from mmopt.backends.cuda.pipeline import compiled_kernels
from tests.cuda_emulator import Emulated, available
from tests.operators import example, numbers
from tests.programs import Example, grouped
from tests.unit.test_cuda_emulated import wrong_answers
from tests.unit.test_cuda_products import toolkit, with_weight

pytestmark = pytest.mark.skipif(not available, reason="needs g++, to compile what a GPU would run")


def convolution(
    attributes: str, x: tuple[int, ...], w: tuple[int, ...], symbolic: dict[str, list[int | str]] | None = None
) -> Example:
    feeds = {"x": numbers(*x), "w": numbers(*w, seed=1), "b": numbers(w[0], seed=2)}
    return with_weight(example(f"y = Conv <{attributes}> (x, w, b)", feeds, symbolic=symbolic))


def quantized(dtype: type, zero: int, pads: str) -> Example:
    random = np.random.default_rng(3)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    feeds = {
        "q": random.integers(low, high + 1, (2, 5, 7, 6)).astype(dtype),
        "w": random.integers(-127, 128, (9, 5, 3, 3)).astype(np.int8),
        "s": (random.random(9) * 0.01 + 0.001).astype(np.float32),
        "c": np.array(0.02, np.float32),
        "z": np.array(zero, dtype),
    }
    body = f"""a = DequantizeLinear (q, c, z) b = DequantizeLinear <axis = 0> (w, s)
        y = Conv <pads = [{pads}], kernel_shape = [3, 3]> (a, b)"""
    made = example(body, feeds)
    for name in ("w", "s", "c", "z"):
        made = with_weight(made, name)
    return made


def test_windows_of_every_kind() -> None:
    cases = [
        convolution("pads = [1, 1, 1, 1]", (1, 3, 9, 11), (8, 3, 3, 3)),
        convolution("strides = [2, 2], pads = [3, 3, 3, 3]", (2, 3, 20, 21), (17, 3, 7, 7)),
        convolution("strides = [1, 2]", (1, 16, 8, 8), (70, 16, 1, 1)),
        convolution("dilations = [2, 1], pads = [2, 0, 0, 1]", (1, 5, 9, 8), (4, 5, 3, 2)),
        convolution("pads = [1, 1], strides = [2]", (2, 8, 31), (12, 8, 3)),
        convolution("pads = [1, 1, 1, 1]", (2, 4, 6, 5), (8, 4, 3, 3), {"x": ["n", 4, "h", "w"]}),
    ]
    wrong = wrong_answers(cases, tolerance=3e-6)
    assert not wrong, "\n".join(wrong)
    source = Emulated({"main": grouped(cases[0].model)}).generated.source
    assert "mmopt_rows_by_windows<MMOPT_F32" in source


def test_eight_bit_convolutions_are_exact() -> None:
    cases = [
        quantized(np.int8, 0, "1, 1, 1, 1"),
        quantized(np.int8, -9, "1, 0, 2, 1"),
        quantized(np.uint8, 131, "1, 1, 1, 1"),
    ]
    wrong = wrong_answers(cases, tolerance=1e-6)
    assert not wrong, "\n".join(wrong)
    source = Emulated({"main": grouped(cases[2].model)}).generated.source
    assert "mmopt_rows_by_windows<MMOPT_S8U8" in source


def test_narrow_floats_and_what_follows() -> None:
    x, w = (numbers(*s, low=-2, high=2).round().astype(np.float32) for s in ((1, 6, 7, 7), (10, 6, 3, 3)))
    body = """a = Cast <to = 10> (x) b = Cast <to = 1> (a) d = Cast <to = 1> (w)
        t = Conv <pads = [1, 1, 1, 1]> (b, d) y = Relu (t)"""
    case = with_weight(example(body, {"x": x, "w": w.astype(np.float16)}))
    assert not wrong_answers([case], tolerance=1e-6)
    source = Emulated({"main": grouped(case.model)}).generated.source
    assert "MMOPT_F16" in source


@toolkit
@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.rows}x{t.columns}")
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_machine_code_spills_next_to_nothing(dtype: str, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    if dtype == "float32" and tile.mt * tile.nt > 4:
        pytest.skip("convolutions of floats do not use this tile")
    monkeypatch.setattr(product, "TILES", (tile,))
    if dtype == "int8":
        case = quantized(np.int8, 0, "1, 1, 1, 1")
    else:
        feeds = {"x": numbers(1, 64, 14, 14, dtype=dtype), "w": numbers(64, 64, 3, 3, dtype=dtype)}
        case = with_weight(example("t = Conv <pads = [1, 1, 1, 1]> (x, w) y = Relu (t)", feeds))
    made = compiled_kernels(Emulated({"main": grouped(case.model)}).generated, 80)
    (name,) = [n for n in made.resources if "Conv" in n]
    # The addresses of windows and the parts of floats together take two registers more than the assembler gives.
    assert made.resources[name].spills <= (8 if dtype == "float32" else 0)
