"""Kernels for GPUs, run by the emulator, compared with onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import pytest

from tests.cuda_emulator import Emulated, available
from tests.operators import example, numbers
from tests.programs import Example, assert_close, grouped

pytestmark = pytest.mark.skipif(not available, reason="needs g++, to compile what a GPU would run")


def wrong_answers(examples: Sequence[Example], target: str = "cuda-sm80", tolerance: float | None = None) -> list[str]:
    """Compile all ``examples`` at once, emulate them, and describe each whose answer is not what is expected."""
    names = ["main", *(f"entry{n}" for n in range(1, len(examples)))]
    modules = {name: grouped(e.model) for name, e in zip(names, examples, strict=True)}
    emulated = Emulated(modules, target)
    found: list[str] = []
    for name, case in zip(names, examples, strict=True):
        try:
            for actual, expected in zip(emulated.run(case.feeds, name).values(), case.expected(), strict=True):
                assert_close(actual, expected, tolerance)
        except AssertionError as error:
            found.append(f"{case.name}: {error}")
    return found


OPERATORS = {
    "map": ("y = Tanh (x)", {"x": numbers(3, 70)}),
    "broadcast": ("y = Mul (x, z)", {"x": numbers(4, 1, 5), "z": numbers(3, 1, seed=1)}),
    "scalar": ("y = Exp (x)", {"x": numbers()}),
    "double": ("y = Exp (x)", {"x": numbers(5, dtype="float64")}),
    "half": ("y = Exp (x)", {"x": numbers(40, dtype="float16")}),
    "integers": ("y = Add (x, x)", {"x": np.arange(300, dtype=np.int64) - 7}),
    "booleans": ("y = And (x, x)", {"x": numbers(65, dtype="bool")}),
    "cast": ("y = Cast <to = 6> (x)", {"x": numbers(33, low=-90, high=90)}),
    "softmax": ("y = Softmax <axis = -1> (x)", {"x": numbers(3, 300)}),
    "softmax of short rows": ("y = Softmax <axis = -1> (x)", {"x": numbers(200, 7)}),
    "softmax along the first axis": ("y = Softmax <axis = 0> (x)", {"x": numbers(70, 5)}),
    "norm": ("y = LayerNormalization (x, s, b)", {"x": numbers(5, 260), "s": numbers(260, seed=1), "b": numbers(260)}),
    "sum of everything": ("y = ReduceSum <keepdims = 0> (x)", {"x": numbers(9, 500)}),
    "long rows": ("y = ReduceMax <keepdims = 0> (x, a)", {"x": numbers(3, 5000), "a": np.array([1])}),
    "index of the largest": ("y = ArgMax <axis = 1, keepdims = 0> (x)", {"x": numbers(4, 333)}),
    "logarithm of sums": ("y = ReduceLogSumExp (x, a)", {"x": numbers(6, 90), "a": np.array([1])}),
    "concatenation": ("y = Concat <axis = 1> (x, z, x)", {"x": numbers(2, 3, 4), "z": numbers(2, 5, 4)}),
    "gather": ("y = Gather (x, i)", {"x": numbers(10, 6), "i": np.array([[3, -1], [0, 9]])}),
    "transposition": ("y = Transpose <perm = [2, 0, 1]> (x)", {"x": numbers(3, 4, 5)}),
    "running sums": ("y = CumSum (x, a)", {"x": numbers(3, 40), "a": np.array(1)}),
    "running sums of rows too long for registers": ("y = CumSum (x, a)", {"x": numbers(3, 4, 300), "a": np.array(1)}),
    "largest": ("y, i = TopK (x, k)", {"x": numbers(4, 50), "k": np.array([5])}),
    "scattering": (
        "y = ScatterElements <axis = 0> (x, i, u)",
        {"x": numbers(6, 3), "i": np.array([[1, 0, 2], [5, 4, 1]]), "u": numbers(2, 3, seed=3)},
    ),
    "windows": (
        "y = MaxPool <kernel_shape = [3, 2], strides = [2, 1], pads = [1, 0, 1, 1]> (x)",
        {"x": numbers(1, 3, 9, 8)},
    ),
    "averages": ("y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x)", {"x": numbers(2, 2, 7, 7)}),
    "padding": ("y = Pad (x, p)", {"x": numbers(2, 3), "p": np.array([0, 1, 2, 3])}),
    "enlarging": ("y = Resize (x, , s)", {"x": numbers(1, 2, 4, 4), "s": np.array([1, 1, 2, 2], np.float32)}),
    "product": ("y = MatMul (x, z)", {"x": numbers(2, 5, 33), "z": numbers(33, 9, seed=1)}),
    "product with a vector": ("y = MatMul (x, z)", {"x": numbers(33), "z": numbers(33, 9, seed=1)}),
    "product and sum": (
        "y = Gemm <transA = 1, transB = 1> (x, z, c)",
        {"x": numbers(8, 5), "z": numbers(7, 8), "c": numbers(7)},
    ),
    "convolution": (
        "y = Conv <strides = [2, 1], pads = [1, 1, 1, 1]> (x, w)",
        {"x": numbers(1, 4, 9, 9), "w": numbers(6, 4, 3, 3)},
    ),
    "convolution by groups": ("y = Conv <group = 4> (x, w)", {"x": numbers(2, 4, 6, 6), "w": numbers(8, 1, 3, 3)}),
    "convolution of sound": ("y = Conv <dilations = [2]> (x, w)", {"x": numbers(1, 3, 30), "w": numbers(5, 3, 3)}),
    "adjoint convolution": (
        "y = ConvTranspose <strides = [2, 2]> (x, w)",
        {"x": numbers(1, 3, 4, 4), "w": numbers(3, 2, 3, 3)},
    ),
    "quantized": (
        "q = QuantizeLinear (x, s, o) y = DequantizeLinear (q, s, o)",
        {"x": numbers(50), "s": np.array(0.03, np.float32), "o": np.array(3, np.int8)},
    ),
}

FIXED = ("a", "k", "p")
"""Inputs that have to be known at compile time."""


def fixed(case: Example) -> Example:
    """``case`` with what has to be known at compile time as initializers."""
    known = {n: a for n, a in case.feeds.items() if n in FIXED or (n == "s" and "Resize" in case.name)}
    inputs = case.model.graph.input
    for name, array in known.items():
        inputs.remove(next(i for i in inputs if i.name == name))
        case.model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Example(case.name, case.model, {n: a for n, a in case.feeds.items() if n not in known}, case.want)


def of_table(operators: Mapping[str, tuple[str, Mapping[str, np.ndarray]]]) -> list[Example]:
    """Examples of a table of nodes and inputs."""
    return [
        fixed(example(body, feeds, outputs=("y", "i") if body.startswith("y, i") else ("y",)))
        for body, feeds in operators.values()
    ]


def test_operators_agree_with_onnxruntime() -> None:
    wrong = wrong_answers(of_table(OPERATORS))
    assert not wrong, "\n".join(wrong)


def test_names_that_are_no_identifiers() -> None:
    case = example("y = MatMul (x, w)", {"x": numbers(3, 8), "w": numbers(8, 6)})
    weight = onnx.numpy_helper.from_array(case.feeds["w"], "1/rnn:w-é")
    case.model.graph.initializer.append(weight)
    case.model.graph.node[0].input[1] = weight.name
    del case.model.graph.input[1]
    wrong = wrong_answers([Example("names", case.model, {"x": case.feeds["x"]})])
    assert not wrong, "\n".join(wrong)


def test_sizes_known_at_run_time() -> None:
    symbolic = {"x": ["n", "m"]}
    bodies = {
        "map": "y = Tanh (x)",
        "norm": "y = Softmax <axis = -1> (x)",
        "sum": "y = ReduceSum <keepdims = 0> (x)",
        "scan": "y = CumSum (x, a)",
        "product": "t = Transpose (x) y = MatMul (x, t)",
    }
    feeds = {"x": numbers(3, 45)}
    cases = []
    for body in bodies.values():
        given = feeds | ({"a": np.array(1)} if "CumSum" in body else {})
        cases.append(fixed(example(body, given, symbolic=symbolic)))
        cases.append(Example(body, cases[-1].model, {"x": numbers(1, 1)}))
    wrong = wrong_answers(cases)
    assert not wrong, "\n".join(wrong)
