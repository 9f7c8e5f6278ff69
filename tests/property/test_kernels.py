"""Random graphs and geometries: grouped and compiled, they give what onnxruntime and numpy give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mmopt.ir.fingerprint import fingerprint
from mmopt.ir.module import Module
from mmopt.ir.verify import verify
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize import InferShapes
from mmopt.transforms.fuse.fuse_groups import FuseGroups
from tests.canonical import evaluate, module_from
from tests.kernels import WIDEST
from tests.programs import Programs, assert_close, wrong_answers
from tests.unit.test_kernel_conv import Geometry
from tests.unit.test_kernel_conv import example as convolution
from tests.unit.test_kernel_recurrent import Layer
from tests.unit.test_kernel_recurrent import example as recurrent

QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much]

UNARY = ["Neg", "Tanh", "Sigmoid", "Relu", "Abs", "Erf", "Softmax", "LogSoftmax", "Cos"]
BINARY = ["Add", "Sub", "Mul", "Min", "Max"]
OTHER = ["MatMul", "ReduceMax", "ReduceMean", "LayerNormalization", "Where", "Transpose2"]


@st.composite
def graphs(draw: st.DrawFn, most: int = 14) -> str:
    """Operators over values of shapes [3, 5], [3, 1] and [5], each reading any values made before."""
    values = [["x", "y"], ["c"], ["r"]]
    lines: list[str] = []
    for number in range(draw(st.integers(2, most))):
        op = draw(st.sampled_from(UNARY + BINARY * 2 + OTHER))
        full, columns, rows = values
        a, b = draw(st.sampled_from(full)), draw(st.sampled_from(full + columns + rows))
        made = f"v{number}"
        if op in UNARY:
            lines.append(f"{made} = {op}({a})")
        elif op in BINARY:
            pair = (a, b) if draw(st.booleans()) else (b, a)
            lines.append(f"{made} = {op}({pair[0]}, {pair[1]})")
        elif op == "MatMul":
            lines.append(f"{made} = MatMul({a}, w)")
        elif op == "LayerNormalization":
            lines.append(f"{made} = LayerNormalization({a}, {draw(st.sampled_from(rows))})")
        elif op == "Where":
            lines += [f"{made}c = Less({a}, {b})", f"{made} = Where({made}c, {b}, {a})"]
        elif op == "Transpose2":
            lines += [f"{made}t = Transpose({a})", f"{made}e = Tanh({made}t)", f"{made} = Transpose({made}e)"]
        else:
            lines.append(f"{made} = {op}<keepdims = 1>({a}, {'last' if draw(st.booleans()) else 'first'})")
            (columns if lines[-1].endswith("last)") else rows).append(made)
            continue
        full.append(made)
    shapes = {name: shape for names, shape in zip(values, ("3,5", "3,1", "1,5"), strict=True) for name in names}
    last = [name for name in shapes if name.startswith("v")]
    assume(last)
    kept = sorted({last[-1], *draw(st.lists(st.sampled_from(last), max_size=2))})
    outputs = ", ".join(f"float[{shapes[name]}] {name}" for name in kept)
    text = "\n".join(lines)
    inputs = "float[3,5] x, float[3,5] y, float[3,1] c, float[5] r, float[5,5] w"
    return f"g ({inputs}) => ({outputs}) <int64[1] last = {{1}}, int64[1] first = {{0}}> {{\n{text}\n}}"


def shaped(text: str) -> Module:
    module = module_from(text, opset=20)
    InferShapes().run(module, PassContext())
    return module


def feeds() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"x": (3, 5), "y": (3, 5), "c": (3, 1), "r": (5,), "w": (5, 5)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def check_grouping(text: str, most: int) -> None:
    """Grouped, a graph is valid, gives the same bits, and has nothing left to group."""
    module, pass_ = shaped(text), FuseGroups(max_nodes=most)
    want, before = evaluate(module, feeds()), fingerprint(module.model)
    changed = pass_.run(module, PassContext())
    assert changed is (fingerprint(module.model) != before)
    assert [problem for problem in verify(module) if problem.severity == "error"] == []
    for name, array in evaluate(module, feeds()).items():
        np.testing.assert_array_equal(array, want[name])
    assert not pass_.run(module, PassContext())


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(graphs(), st.sampled_from([2, 3, 16]))
def test_grouping(text: str, most: int) -> None:
    check_grouping(text, most)


@pytest.mark.slow
@settings(max_examples=600, deadline=None, suppress_health_check=QUIET)
@given(graphs(most=30), st.sampled_from([2, 3, 16]))
def test_grouping_at_length(text: str, most: int) -> None:
    check_grouping(text, most)


def check_compiled(texts: list[str]) -> None:
    """Graphs compiled as they are and grouped give what onnxruntime gives."""
    plain = [shaped(text) for text in texts]
    modules = [module for text in texts for module in (shaped(text), shaped(text))]
    for module in modules[::2]:
        FuseGroups().run(module, PassContext())
    compiled = Programs(modules, WIDEST)
    for number, module in enumerate(plain):
        want = evaluate(module, feeds())
        for form in (2 * number, 2 * number + 1):
            for actual, expected in zip(compiled.run(form, feeds()), want.values(), strict=True):
                assert_close(actual, expected, 1e-4)


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(st.lists(graphs(most=10), min_size=6, max_size=6))
def test_compiled_graphs(texts: list[str]) -> None:
    check_compiled(texts)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=QUIET)
@given(st.lists(graphs(most=20), min_size=4, max_size=4))
def test_compiled_graphs_at_length(texts: list[str]) -> None:
    check_compiled(texts)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Small convolutions of any kind."""
    rank, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 16]))
    each_in, each_out = draw(st.sampled_from([1, 2, 3, 8, 16])), draw(st.sampled_from([1, 2, 5, 8, 16, 19]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    dilations = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    pads = tuple(draw(st.integers(0, 2)) for _ in range(2 * rank))
    space = tuple(d * (k - 1) + 1 + draw(st.integers(0, 6)) for k, d in zip(kernel, dilations, strict=True))
    automatic = draw(st.sampled_from(["", "", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    return Geometry(
        (draw(st.integers(1, 2)), groups * each_in, *space),
        (groups * each_out, each_in, *kernel),
        strides=tuple(draw(st.integers(1, 3)) for _ in range(rank)),
        dilations=dilations,
        pads=() if automatic else pads,
        groups=groups,
        auto_pad=automatic,
        bias=draw(st.booleans()),
    )


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Small recurrent layers of any kind."""
    op = draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
    steps, batch = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    attributes = [("clip", 0.5)] if draw(st.booleans()) else []
    if op == "GRU":
        attributes.append(("linear_before_reset", draw(st.integers(0, 1))))
    return Layer(
        op,
        steps=steps,
        batch=batch,
        depth=draw(st.integers(1, 9)),
        hidden=draw(st.integers(1, 40)),
        direction=draw(st.sampled_from(["forward", "reverse", "bidirectional"])),
        bias=draw(st.booleans()),
        initial=draw(st.booleans()),
        lengths=tuple(draw(st.integers(0, steps)) for _ in range(batch)) if draw(st.booleans()) else (),
        peepholes=op == "LSTM" and draw(st.booleans()),
        attributes=tuple(attributes),
    )


def check_models(geometry: list[Geometry], layer: list[Layer]) -> None:
    wrong = wrong_answers([*map(convolution, geometry), *map(recurrent, layer)], WIDEST)
    assert not wrong, "\n".join(wrong)


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(st.lists(geometries(), min_size=6, max_size=6), st.lists(layers(), min_size=3, max_size=3))
def test_geometries_and_layers(geometry: list[Geometry], layer: list[Layer]) -> None:
    check_models(geometry, layer)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=QUIET)
@given(st.lists(geometries(), min_size=6, max_size=6), st.lists(layers(), min_size=3, max_size=3))
def test_geometries_and_layers_at_length(geometry: list[Geometry], layer: list[Layer]) -> None:
    check_models(geometry, layer)
