"""Random models of branches, layers over sequences and small convolutions through the portable spellings."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mmopt.transforms.portable as portable
from mmopt.analysis.shape_rules.types import to_ir_shape
from mmopt.analysis.shapes import infer_shapes
from mmopt.ir.module import Module
from mmopt.ir.verify import verify
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.rewrite import ReassociateConstants
from tests.canonical import evaluate
from tests.raising import normal_inputs
from tests.scale import GraphBuilder

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]
PASSES: list[Pass] = [ReassociateConstants(), *(getattr(portable, name)() for name in portable.__all__)]
WIDTH = 8


class _Grower:
    """Grows a model: values that stand beside each other, and operators that nearly always are what passes look for."""

    def __init__(self, data: st.DataObject, shape: list[int | str], inputs: int) -> None:
        self.data, self.b, self.sizes = data, GraphBuilder(data.draw(st.integers(0, 9), label="seed")), shape
        self.inputs = [self._input(f"x{n}", shape) for n in range(inputs)]
        self.values = list(self.inputs)
        self.shared: dict[tuple[int, ...], ir.Value] = {}

    @staticmethod
    def _input(name: str, shape: list[int | str]) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))

    def weight(self, *shape: int) -> ir.Value:
        """A new weight, or the one of that shape that others have."""
        if self.data.draw(st.booleans(), label="shared") and shape in self.shared:
            return self.shared[shape]
        return self.shared.setdefault(shape, self.b.weight(*shape))

    def pick(self) -> ir.Value:
        return self.values[self.data.draw(st.integers(0, len(self.values) - 1), label="value")]

    def finish(self, joined: ir.Value) -> Module:
        """The model, some of whose inner values are outputs too."""
        extra = [v for v in self.values if v not in self.inputs and self.data.draw(st.integers(0, 9)) == 0][:2]
        outputs = [joined, *(value for value in extra if value is not joined)]
        model = self.b.model(self.inputs, outputs)
        model.opset_imports[""] = model.graph.opset_imports[""] = 23
        facts = infer_shapes(model)
        for number, value in enumerate(outputs):
            shape = facts.shape(value)
            assert shape is not None
            value.name, value.dtype, value.shape = f"y{number}", ir.DataType.FLOAT, to_ir_shape(shape)
        return Module(model)


def _rows(data: st.DataObject) -> Module:
    """Layers over sequences or rows."""
    sequences = data.draw(st.booleans(), label="sequences")
    shape: list[int | str] = [
        data.draw(st.sampled_from([1, 2, "batch"])),
        *([data.draw(st.sampled_from([5, "seq"]))] if sequences else []),
        WIDTH,
    ]
    g = _Grower(data, shape, data.draw(st.integers(1, 3), label="inputs"))
    for _ in range(data.draw(st.integers(2, 10), label="operators")):
        kind = data.draw(
            st.sampled_from(["linear", "linear", "unary", "sum", "norm", "scale", "shift", "softmax", "gemm"])
        )
        g.values.append(_row_operator(g, kind, sequences))
    return g.finish(g.b.op("Concat", *g.values[-3:], axis=-1))


def _row_operator(g: _Grower, kind: str, sequences: bool) -> ir.Value:
    x = g.pick()
    if kind == "gemm" and not sequences:
        return g.b.op("Gemm", x, g.weight(WIDTH, WIDTH), g.weight(WIDTH), transB=g.data.draw(st.integers(0, 1)))
    if kind in ("linear", "gemm"):
        product = g.b.op("MatMul", x, g.weight(WIDTH, WIDTH))
        return g.b.op("Add", product, g.weight(WIDTH)) if g.data.draw(st.booleans()) else product
    if kind == "unary":
        return g.b.op(g.data.draw(st.sampled_from(["Relu", "Tanh", "Gelu", "Sigmoid"])), x)
    if kind == "norm":
        return g.b.op("LayerNormalization", x, g.weight(WIDTH), g.weight(WIDTH), axis=-1)
    if kind == "softmax":
        return g.b.op("Softmax", x, axis=g.data.draw(st.sampled_from([-1, -1, 0, 1])))
    operand = g.pick() if kind == "sum" else g.weight(*g.data.draw(st.sampled_from([(WIDTH,), (1,), (1, WIDTH)])))
    return g.b.op("Mul" if kind == "scale" else "Add", x, operand)


def _images(data: st.DataObject) -> Module:
    """Small convolutions in branches that are joined at the end."""
    g = _Grower(data, [data.draw(st.sampled_from([1, 2])), 3, 6, 6], data.draw(st.integers(1, 3), label="inputs"))
    ends = [_branch(g, value) for value in g.inputs for _ in range(data.draw(st.integers(1, 2)))]
    if data.draw(st.booleans(), label="stack"):
        axis = data.draw(st.integers(0, 2), label="axis")
        stack = g.b.op("Concat", *(g.b.op("Unsqueeze", end, g.b.constant([axis])) for end in ends), axis=axis)
        kind = data.draw(st.sampled_from(["ReduceMean", "ReduceMax", "Relu"]))
        return g.finish(
            g.b.op(kind, stack) if kind == "Relu" else g.b.op(kind, stack, g.b.constant([axis]), keepdims=0)
        )
    joined = ends[0]
    for end in ends[1:]:
        joined = g.b.op(data.draw(st.sampled_from(["Add", "Mul"])), joined, end)
    return g.finish(joined)


def _branch(g: _Grower, x: ir.Value) -> ir.Value:
    channels = 3
    for _ in range(g.data.draw(st.integers(1, 3), label="layers")):
        wanted = g.data.draw(st.sampled_from([8, 8, 12, 16]))
        x = g.b.op("Conv", x, g.weight(wanted, channels, 3, 3), g.weight(wanted), pads=[1, 1, 1, 1])
        channels = wanted
        x = g.b.op(g.data.draw(st.sampled_from(["Relu", "Sigmoid", "Identity", "Softplus"])), x)
        g.values.append(x)
    features = g.b.op("ReduceMean", x, g.b.constant([2, 3]), keepdims=0)
    first = g.b.op("Gemm", features, g.weight(channels, 6), g.weight(6))
    return (
        g.b.op("Gemm", first, g.weight(6, 4))
        if g.data.draw(st.booleans())
        else g.b.op("Gemm", features, g.weight(channels, 4))
    )


def _keep(data: st.DataObject) -> None:
    module = (_rows if data.draw(st.booleans(), label="rows") else _images)(data)
    assert [problem for problem in verify(module) if problem.severity == "error"] == []
    feeds = normal_inputs(module)
    for pass_ in PASSES:
        want, signature = evaluate(module, feeds), module.signature()
        pass_.run(module, PassContext())
        assert module.signature() == signature, pass_.name
        assert [problem for problem in verify(module) if problem.severity == "error"] == [], pass_.name
        for name, got in evaluate(module, feeds).items():
            scale = float(np.abs(want[name]).max(initial=1.0))
            np.testing.assert_allclose(got, want[name], rtol=1e-4, atol=1e-5 * scale, err_msg=f"{pass_.name}: {name}")
        assert pass_.run(module, PassContext()) is False, pass_.name


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(data=st.data())
def test_portable_spellings_keep_the_answers(data: st.DataObject) -> None:
    _keep(data)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=QUIET)
@given(data=st.data())
def test_portable_spellings_keep_the_answers_of_many(data: st.DataObject) -> None:
    _keep(data)
