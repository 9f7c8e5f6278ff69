"""Random spellings, right and nearly right, through the raising passes: same answers, valid models, a fixpoint."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.canonicalize import Canonicalize
from mmopt.transforms.raising.raise_activations import RaiseActivations
from mmopt.transforms.raising.raise_attention import RaiseAttention
from mmopt.transforms.raising.raise_normalization import RaiseNormalization
from mmopt.transforms.raising.raise_recurrent import RaiseRecurrent
from mmopt.transforms.raising.raise_rotary import RaiseRotary
from mmopt.transforms.rewrite.merge_projections import MergeProjections
from tests import recurrent_spellings as recurrent
from tests.attention_spellings import LAYOUTS, MASKS, SCALES, Spelling, build, feeds_for
from tests.canonical import evaluate
from tests.raising import close, normal_inputs, raise_and_check
from tests.scale import GraphBuilder

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
PASSES: list[Pass] = [RaiseRotary(), RaiseAttention(), RaiseNormalization(), RaiseActivations(), MergeProjections()]


def _spellings() -> st.SearchStrategy[Spelling]:
    heads = st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 1), (3, 3)])
    made = st.builds(
        lambda heads, **rest: Spelling(heads=heads[0], kept=heads[1], **rest),
        heads=heads,
        size=st.sampled_from([1, 2, 4]),
        keys=st.sampled_from([0, 0, 1, 7]),
        dynamic=st.booleans(),
        layout=st.sampled_from(LAYOUTS),
        scale=st.sampled_from(SCALES),
        mask=st.sampled_from(MASKS),
        softcap=st.sampled_from([0.0, 0.0, 3.0]),
        guard=st.booleans(),
        merged=st.booleans(),
    )
    # A flattened batch with a literal number of keys is not the same model for another length.
    return made.filter(lambda s: not (s.dynamic and s.layout == "bmm" and s.mask != "none"))


def _attention(spelling: Spelling, seed: int) -> None:
    module = build(spelling, seed)
    module.model.opset_imports[""] = module.graph.opset_imports[""] = 23
    feeds = feeds_for(module, seed)
    raised, missed = raise_and_check(RaiseAttention(), module, feeds)
    assert any(node.op_type == "Attention" for node in raised.graph), (spelling, missed)
    want = evaluate(raised, feeds)
    MergeProjections().run(raised, PassContext())
    close(want, evaluate(raised, feeds))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(spelling=_spellings(), seed=st.integers(0, 99))
def test_attention(spelling: Spelling, seed: int) -> None:
    _attention(spelling, seed)


@pytest.mark.slow
@settings(max_examples=8000, deadline=None, suppress_health_check=QUIET)
@given(spelling=_spellings(), seed=st.integers(0, 99))
def test_attention_of_many_spellings(spelling: Spelling, seed: int) -> None:
    _attention(spelling, seed)


def _recurrent_spellings() -> st.SearchStrategy[recurrent.Spelling]:
    return st.builds(
        recurrent.Spelling,
        kind=st.sampled_from(recurrent.KINDS),
        products=st.sampled_from(recurrent.PRODUCTS),
        stepping=st.sampled_from(recurrent.STEPPING),
        form=st.sampled_from(recurrent.FORMS),
        batch_first=st.booleans(),
        reverse=st.booleans(),
        batch=st.sampled_from([0, 1, 3]),
        initial=st.booleans(),
        stacked=st.booleans(),
        blend=st.booleans(),
    ).filter(lambda s: s.form != "loop" or not s.reverse)


def _recurrence(spelling: recurrent.Spelling, seed: int) -> None:
    module, missed = raise_and_check(RaiseRecurrent(), recurrent.build(spelling, seed))
    assert any(node.op_type == spelling.kind.split()[0] for node in module.graph), (spelling, missed)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(spelling=_recurrent_spellings(), seed=st.integers(0, 99))
def test_recurrence(spelling: recurrent.Spelling, seed: int) -> None:
    _recurrence(spelling, seed)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=QUIET)
@given(spelling=_recurrent_spellings(), seed=st.integers(0, 99))
def test_recurrence_in_many_spellings(spelling: recurrent.Spelling, seed: int) -> None:
    _recurrence(spelling, seed)


class _Arithmetic:
    """Grows a graph of activations and normalizations whose numbers, orders and uses are nearly always right."""

    def __init__(self, data: st.DataObject) -> None:
        self.data, self.b = data, GraphBuilder(data.draw(st.integers(0, 9), label="seed"))
        self.x = ir.Value(name="x", shape=ir.Shape([2, 5, 8]), type=ir.TensorType(ir.DataType.FLOAT))
        self.inside: list[ir.Value] = []

    def number(self, right: float) -> ir.Value:
        wrong = self.data.draw(st.integers(0, 19)) == 0
        return self.b.constant(right * 1.25 if wrong else right, np.float32)

    def op(self, op_type: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        swap = op_type in ("Add", "Mul") and self.data.draw(st.booleans())
        value = self.b.op(op_type, *(inputs[::-1] if swap else inputs), **attributes)
        self.inside.append(value)
        return value

    def divided(self, x: ir.Value, number: float) -> ir.Value:
        if self.data.draw(st.booleans()):
            return self.op("Div", x, self.number(number))
        return self.op("Mul", x, self.number(1 / number))

    def square(self, x: ir.Value) -> ir.Value:
        return self.op("Mul", x, x) if self.data.draw(st.booleans()) else self.op("Pow", x, self.number(2.0))

    def gelu(self, x: ir.Value) -> ir.Value:
        if self.data.draw(st.booleans()):
            anchor = self.op("Erf", self.divided(x, math.sqrt(2)))
        else:
            cube = (
                self.op("Mul", self.square(x), x)
                if self.data.draw(st.booleans())
                else self.op("Pow", x, self.number(3.0))
            )
            inner = self.op("Add", x, self.op("Mul", cube, self.number(0.044715)))
            anchor = self.op("Tanh", self.op("Mul", inner, self.number(math.sqrt(2 / math.pi))))
        total = self.op("Add", anchor, self.number(1.0))
        place = self.data.draw(st.integers(0, 2))
        if place == 0:
            return self.op("Mul", self.op("Mul", x, self.number(0.5)), total)
        if place == 1:
            return self.op("Mul", x, self.divided(total, 2.0))
        return self.divided(self.op("Mul", x, total), 2.0)

    def hard_swish(self, x: ir.Value) -> ir.Value:
        zero, six = self.b.constant(0.0, np.float32), self.number(6.0)
        clipped = self.op("Clip", self.op("Add", x, self.number(3.0)), zero, six)
        return self.divided(self.op("Mul", x, clipped), 6.0)

    def mish(self, x: ir.Value) -> ir.Value:
        spelled = self.data.draw(st.booleans())
        inner = self.op("Softplus", x)
        if spelled:
            inner = self.op("Log", self.op("Add", self.op("Exp", self.op("Tanh", x)), self.number(1.0)))
        return self.op("Mul", x, self.op("Tanh", inner))

    def normalization(self, x: ir.Value) -> ir.Value:
        axes = self.b.constant([self.data.draw(st.sampled_from([-1, -1, -1, 1]))])
        base = self.op("Sub", x, self.op("ReduceMean", x, axes)) if self.data.draw(st.booleans()) else x
        mean = self.op("ReduceMean", self.square(base), axes)
        mean = self.op("Add", mean, self.number(1e-3))
        kind = self.data.draw(st.integers(0, 3))
        if kind == 0:
            y = self.op("Div", base, self.op("Sqrt", mean))
        elif kind == 1:
            y = self.op("Mul", base, self.op("Reciprocal", self.op("Sqrt", mean)))
        elif kind == 2:
            y = self.op("Mul", base, self.op("Pow", mean, self.number(-0.5)))
        else:
            y = self.op("Mul", base, self.op("Div", self.b.constant(1.0, np.float32), self.op("Sqrt", mean)))
        scale = self.b.weight(8)
        if self.data.draw(st.booleans()):
            y = self.op("Mul", y, scale)
        return self.op("Add", y, self.data.draw(st.sampled_from([scale, self.b.weight(8), self.b.weight(5, 8)])))

    def module(self) -> Module:
        value = self.x
        for _ in range(self.data.draw(st.integers(1, 2))):
            kind = self.data.draw(
                st.sampled_from(["gelu", "gelu", "normalization", "normalization", "hard_swish", "mish"])
            )
            value = getattr(self, kind)(value)
        outputs = [self.b.op("Identity", value)]
        if self.data.draw(st.integers(0, 3)) == 0:
            outputs.append(self.b.op("Neg", self.data.draw(st.sampled_from(self.inside))))
        for number, output in enumerate(outputs):
            output.name, output.type = f"y{number}", ir.TensorType(ir.DataType.FLOAT)
            output.shape = ir.Shape([f"y{number}_{axis}" for axis in range(3)])
        model = self.b.model([self.x], outputs)
        model.opset_imports[""] = model.graph.opset_imports[""] = 23
        return Module(model)


def _arithmetic(data: st.DataObject) -> None:
    module = _Arithmetic(data).module()
    feeds = normal_inputs(module)
    want = evaluate(module, feeds)
    Canonicalize().run(module, PassContext())
    for pass_ in PASSES:
        pass_.run(module, PassContext())
        assert pass_.run(module, PassContext()) is False, pass_.name
    close(want, evaluate(module, feeds))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(data=st.data())
def test_arithmetic(data: st.DataObject) -> None:
    _arithmetic(data)


@pytest.mark.slow
@settings(max_examples=12000, deadline=None, suppress_health_check=QUIET)
@given(data=st.data())
def test_arithmetic_of_many_graphs(data: st.DataObject) -> None:
    _arithmetic(data)
