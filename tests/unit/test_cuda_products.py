"""Products on tensor cores: right in the emulator, and in the resources and instructions of the machine code."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import onnx
import pytest

from mmopt.backends.cuda import compiler
from mmopt.backends.cuda.kernels import product
from mmopt.backends.cuda.kernels.product import TILES, Tile, choose_tile
from mmopt.backends.cuda.pipeline import compiled_kernels
from tests.cuda_emulator import Emulated, available
from tests.operators import example, numbers
from tests.programs import Example, grouped
from tests.unit.test_cuda_emulated import wrong_answers

emulated = pytest.mark.skipif(not available, reason="needs g++, to compile what a GPU would run")
toolkit = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("cuda") is None,
    reason="needs NVIDIA's compiler: pip install 'mmopt[cuda]'",
)

INSTRUCTION = {"float16": "HMMA", "bfloat16": "HMMA", "float32": "HMMA", "int8": "IMMA"}


def with_weight(case: Example, name: str = "w") -> Example:
    """``case`` with the input ``name`` as an initializer."""
    inputs = case.model.graph.input
    inputs.remove(next(i for i in inputs if i.name == name))
    array = case.feeds[name]
    if str(array.dtype) == "bfloat16":
        made = onnx.helper.make_tensor(name, onnx.TensorProto.BFLOAT16, array.shape, array.tobytes(), raw=True)
    else:
        made = onnx.numpy_helper.from_array(array, name)
    case.model.graph.initializer.append(made)
    return Example(case.name, case.model, {n: a for n, a in case.feeds.items() if n != name}, case.want)


def exact(m: int, n: int, k: int, dtype: str) -> Example:
    """A product of small integers, which is exact in every type as long as its sums are."""
    random = np.random.default_rng(m + n + k)
    x, w = (random.integers(-4, 5, shape).astype(np.float32) for shape in ((m, k), (k, n)))
    feeds = {"x": x.astype(numbers(1, dtype=dtype).dtype), "w": w.astype(numbers(1, dtype=dtype).dtype)}
    body = "y = MatMul (x, w)" if dtype != "bfloat16" else "t = MatMul (x, w) y = Cast <to = 1> (t)"
    want = (x @ w).astype(feeds["x"].dtype if dtype != "bfloat16" else np.float32)
    if dtype == "bfloat16":
        want = want.astype(feeds["x"].dtype).astype(np.float32)
    return with_weight(example(body, feeds, want=[want]))


def quantized(m: int, n: int, k: int, *, dtype: type, zero: int, columns: bool) -> Example:
    """An 8-bit product between dequantized operands."""
    random = np.random.default_rng(k)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    feeds = {
        "q": random.integers(low, high + 1, (m, k)).astype(dtype),
        "w": random.integers(-127, 128, (k, n)).astype(np.int8),
        "s": (random.random(n if columns else ()) * 0.01 + 0.001).astype(np.float32),
    }
    axis = "<axis = 1>" if columns else ""
    body = f"a = DequantizeLinear (q, c, z) b = DequantizeLinear {axis} (w, s) y = MatMul (a, b)"
    feeds |= {"c": np.array(0.02, np.float32), "z": np.array(zero, dtype)}
    made = example(body, feeds)
    for name in ("w", "s", "c", "z"):
        made = with_weight(made, name)
    return made


def label(value: object) -> str:
    return f"{value.rows}x{value.columns}" if isinstance(value, Tile) else str(value)


@emulated
@pytest.mark.parametrize(
    "tile", [TILES[2], *(pytest.param(tile, marks=pytest.mark.slow) for tile in TILES if tile != TILES[2])], ids=label
)
def test_every_tile_gives_exact_products(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "TILES", (tile,))
    kinds = ["float16", "bfloat16"] + (["float32"] if tile.mt * tile.nt <= 8 else [])
    sizes = [(1, 1, 8), (tile.rows, tile.columns, 64), (tile.rows + 3, tile.columns + 9, 40), (5, 7, 9), (3, 70, 200)]
    wrong = wrong_answers([exact(*size, dtype) for dtype in kinds for size in sizes], tolerance=1e-7)
    assert not wrong, "\n".join(wrong)


@emulated
def test_floats_are_as_good_as_floats() -> None:
    feeds = {"x": numbers(33, 300), "w": numbers(300, 20, seed=1)}
    cases = [example("y = MatMul (x, w)", feeds), with_weight(example("y = MatMul (x, w)", feeds))]
    assert not wrong_answers(cases, tolerance=2e-6)


@emulated
def test_eight_bit_products_are_exact() -> None:
    cases = [
        quantized(20, 30, 100, dtype=np.int8, zero=0, columns=True),
        quantized(20, 30, 100, dtype=np.int8, zero=-11, columns=False),
        quantized(3, 9, 64, dtype=np.uint8, zero=128, columns=True),
    ]
    assert not wrong_answers(cases, tolerance=1e-6)
    made = Emulated({"main": grouped(cases[0].model)})
    assert "mmopt_rows_by_any<MMOPT_S8" in made.generated.source or "mmopt_any_by_any<MMOPT_S8" in made.generated.source


@emulated
def test_views_stacks_and_epilogues() -> None:
    x, w, b = numbers(2, 3, 17, 24), numbers(2, 3, 24, 16, seed=1), numbers(16, seed=2)
    cases = [
        example("y = MatMul (x, w)", {"x": x, "w": w}),
        example("y = MatMul (x, w)", {"x": x, "w": numbers(24, 16)}),
        example("y = MatMul (x, w)", {"x": x, "w": numbers(3, 24, 16)}),
        example("y = MatMul (x, w)", {"x": x[:1], "w": w}),
        example("t = Transpose <perm = [0, 1, 3, 2]> (x) y = MatMul (x, t)", {"x": x}),
        example(
            "t = Transpose <perm = [0, 2, 1, 3]> (x) u = Transpose <perm = [0, 2, 3, 1]> (x) y = MatMul (t, u)",
            {"x": x},
        ),
        example(
            "t = MatMul (x, w) u = Add (t, b) v = Gelu (u) y = Add (v, r)",
            {"x": x, "w": w, "b": b, "r": numbers(2, 3, 17, 16)},
        ),
        with_weight(example("t = Add (x, x) y = MatMul (t, w)", {"x": x, "w": numbers(24, 16)})),
        example("y = MatMul (x, w)", {"x": x, "w": numbers(24, 16)}, symbolic={"x": ["n", 3, "s", 24]}),
        example(
            "t = Transpose <perm = [0, 1, 3, 2]> (x) y = MatMul (x, t)", {"x": x}, symbolic={"x": ["n", 3, "s", "k"]}
        ),
    ]
    wrong = wrong_answers(cases, tolerance=3e-6)
    assert not wrong, "\n".join(wrong)


def test_tiles_follow_the_size_of_the_product() -> None:
    assert choose_tile(4096, 4096, 1, 108, "float16") == TILES[0]
    assert choose_tile(1, 768, 1, 108, "float16").rows == 16
    small = choose_tile(128, 768, 1, 108, "float16")
    assert small.rows * small.columns < TILES[0].rows * TILES[0].columns


def compiled(dtype: str, tile: Tile, sm: int, monkeypatch: pytest.MonkeyPatch) -> compiler.Compiled:
    """Machine code of a product with a bias and an activation."""
    monkeypatch.setattr(product, "TILES", (tile,))
    if dtype == "int8":
        case = quantized(256, 256, 256, dtype=np.int8, zero=0, columns=True)
    else:
        case = exact(256, 256, 256, dtype)
    made = Emulated({"main": grouped(case.model)}, f"cuda-sm{sm}")
    return compiled_kernels(made.generated, sm)


FAST = [("float16", TILES[0], 90)]
SLOW = [
    ("int8", TILES[0], 80),
    ("float32", TILES[2], 80),
    ("float32", TILES[2], 90),
    *(("float16", tile, 80) for tile in TILES),
    ("float16", TILES[0], 75),
    ("int8", TILES[0], 75),
    ("bfloat16", TILES[0], 80),
    ("int8", TILES[0], 90),
]


@emulated
@toolkit
@pytest.mark.parametrize(
    ("dtype", "tile", "sm"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)], ids=label
)
def test_machine_code_uses_tensor_cores_and_spills_nothing(
    dtype: str, tile: Tile, sm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compiled(dtype, tile, sm, monkeypatch)
    (name,) = [n for n in made.resources if "MatMul" in n]
    assert made.resources[name].spills == 0
    assert made.resources[name].stack == 0
    assert made.resources[name].shared <= product.STATIC_SHARED
    assert re.search(r"mma\.sync\.aligned\.m\d+n8k\d+", compiler.texts(made)[name])
    assert compiler.tensor_instructions(made)[name] > 0
    code = compiler.disassembled(made)
    if code is None:
        pytest.skip("nvdisasm is not installed; the PTX has the instructions")
    assert INSTRUCTION[dtype] in code[name]
