"""Weights of 8 and 4 bits on a GPU, and products with few rows: against numpy, and in the machine code."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from mmopt.backends.cuda.pipeline import compiled_kernels
from mmopt.backends.profile import load_profile
from mmopt.lowering.compiler import CompileOptions
from mmopt.lowering.partition import partition
from mmopt.lowering.program import ProgramBuilder
from tests.cuda_emulator import Emulated, available
from tests.operators import example, numbers
from tests.programs import Example, grouped
from tests.unit.test_cuda_emulated import wrong_answers
from tests.unit.test_cuda_products import toolkit, with_weight

emulated = pytest.mark.skipif(not available, reason="needs g++, to compile what a GPU would run")
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
ROUNDED = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def weight_only(
    rows: int, columns: int, depth: int, *, bits: int = 4, group: int = 0, signed: bool = True, dtype: str = "float32"
) -> Example:
    """A product by a dequantized constant; with ``dtype``, of both operands rounded to that type.

    Args:
        rows: M.
        columns: N.
        depth: K.
        bits: 4 or 8.
        group: Numbers along K that share a scale; 0 for a scale of each column.
        signed: Signed numbers around zero; otherwise each scale has a zero point.
        dtype: What is multiplied.
    """
    random = np.random.default_rng(rows + columns + depth + bits)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    q = random.integers(low, high + 1, (depth, columns))
    shape = (-(-depth // group), columns) if group else (columns,)
    scale = (random.random(shape) * 0.02 + 0.001).astype(np.float32)
    zero = random.integers(low, high + 1, shape) if not signed else np.zeros(shape, np.int64)
    x = random.standard_normal((rows, depth)).astype(np.float32)

    def spread(values: np.ndarray) -> np.ndarray:
        return values.repeat(group, 0)[:depth] if group else values

    w = ((q - spread(zero)).astype(np.float32) * spread(scale)).astype(np.float32)
    if dtype in ROUNDED:
        x, w = (v.astype(ROUNDED[dtype]).astype(np.float32) for v in (x, w))
    kind = getattr(TensorProto, f"{'' if signed else 'U'}INT{bits}")
    attributes = f"axis = 0, block_size = {group}" if group else "axis = 1"
    zeros = "" if signed else ", z"
    body = f"b = DequantizeLinear <{attributes}> (q, s{zeros}) "
    if dtype in ROUNDED:
        down, up = TYPES[dtype], TYPES["float32"]
        body += f"x1 = Cast <to = {down}> (x) x2 = Cast <to = {up}> (x1) b1 = Cast <to = {down}> (b) "
        body += f"b2 = Cast <to = {up}> (b1) y = MatMul (x2, b2)"
    else:
        body += "y = MatMul (x, b)"
    made = example(body, {"x": x, "s": scale}, want=[x.astype(np.float64) @ w])
    given = [("q", q)] + ([] if signed else [("z", zero)])
    made = with_weight(made, "s")
    for name, data in given:
        flat = data.flatten().tolist()
        made.model.graph.initializer.append(helper.make_tensor(name, kind, data.shape, flat))
    return made


def compiled_program(case: Example) -> ProgramBuilder:
    """What is lowered for a GPU, with keys of all weights."""
    builder = ProgramBuilder(load_profile("cuda-sm80"))
    for part in partition(grouped(case.model), "main", builder, CompileOptions()):
        for source in part.params:
            builder.weight_key(source)
    return builder


FEW_ROWS = [
    weight_only(1, 40, 256, group=32),
    weight_only(3, 33, 256, group=128, signed=False),
    weight_only(8, 20, 96, bits=8),
    weight_only(2, 20, 64, bits=8, group=16, signed=False),
    weight_only(1, 9, 72, bits=4, signed=False),
    weight_only(4, 12, 64, dtype="float16", group=32),
    weight_only(1, 12, 64, dtype="bfloat16", bits=8),
]
MANY_ROWS = [
    weight_only(40, 70, 96, group=32),
    weight_only(17, 24, 104, group=8, signed=False),
    weight_only(33, 20, 77, bits=8),
    weight_only(20, 20, 64, bits=8, group=16, signed=False),
    weight_only(40, 24, 128, dtype="float16", group=64, signed=False),
    weight_only(24, 70, 64, dtype="bfloat16", bits=8),
]


@emulated
def test_weights_of_few_bits_are_dequantized_in_kernels() -> None:
    wrong = wrong_answers([*FEW_ROWS, *MANY_ROWS], tolerance=5e-6)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("case", "template"), [*((c, "few_rows") for c in FEW_ROWS), *((c, "dequantized_product") for c in MANY_ROWS)]
)
def test_weights_stay_in_few_bits(case: Example, template: str) -> None:
    program = compiled_program(case)
    assert [record["template"] for record in program.kernels.values()].count(template) == 1
    count = next(np.prod(tensor.dims) for tensor in case.model.graph.initializer if tensor.name == "q")
    assert all(array.size < count for array in program.weights.values() if array.dtype == np.float32)


@emulated
def test_few_rows_of_floats() -> None:
    x, w = numbers(5, 72), numbers(72, 50, seed=1)
    cases = [
        with_weight(example("y = MatMul (x, w)", {"x": x, "w": w})),
        with_weight(example("t = MatMul (x, w) u = Add (t, b) y = Gelu (u)", {"x": x, "w": w, "b": numbers(50)})),
        with_weight(example("y = MatMul (x, w)", {"x": numbers(2, 1, 3, 72), "w": w})),
        with_weight(example("t = Transpose (x) u = Relu (t) y = MatMul (u, w)", {"x": numbers(72, 4), "w": w})),
    ]
    wrong = wrong_answers(cases, tolerance=2e-6)
    assert not wrong, "\n".join(wrong)
    assert [record["template"] for record in compiled_program(cases[0]).kernels.values()] == ["few_rows"]


@toolkit
@emulated
@pytest.mark.parametrize(
    ("case", "sm"),
    [
        (weight_only(1, 768, 768, group=128), 90),
        *(
            pytest.param(weight_only(m, 768, 768, group=128, bits=bits, dtype=dtype), sm, marks=pytest.mark.slow)
            for m in (8, 256)
            for bits in (4, 8)
            for dtype in TYPES
            for sm in (80, 90)
        ),
    ],
)
def test_machine_code_spills_nothing(case: Example, sm: int) -> None:
    made = Emulated(grouped(case.model), f"cuda-sm{sm}")
    taken = compiled_kernels(made.generated, sm).resources
    assert taken
    assert all(one.spills == 0 and one.stack == 0 for one in taken.values())
