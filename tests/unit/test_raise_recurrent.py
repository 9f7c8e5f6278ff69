"""Recurrent layers written out in steps, or as the body of a loop, become the standard's operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mmopt.ir.module import Module
from mmopt.transforms.raising.raise_recurrent import RaiseRecurrent
from tests.canonical import count_ops
from tests.raising import raise_and_check
from tests.recurrent_spellings import KINDS, PRODUCTS, STEPPING, Spelling, Writer, build


def _layer(module: Module) -> ir.Node:
    found = [node for node in module.graph if node.op_type in ("LSTM", "GRU", "RNN")]
    assert len(found) == 1, count_ops(module)
    return found[0]


def _raised(spelling: Spelling) -> Module:
    module, missed = raise_and_check(RaiseRecurrent(), build(spelling))
    assert _layer(module).op_type == spelling.kind.split()[0], missed
    assert not {"Tanh", "Sigmoid", "Gemm", "MatMul", "Scan", "Loop", "Gather"} & set(count_ops(module))
    return module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("products", PRODUCTS)
def test_unrolled(kind: str, products: str) -> None:
    _raised(Spelling(kind, products, batch=0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stepping", STEPPING)
def test_zeros_that_fold_away(kind: str, stepping: str) -> None:
    """With a batch of known size the initial zeros are constants, and take the first step's products with them."""
    _raised(Spelling(kind, stepping=stepping, batch_first=False))


@pytest.mark.parametrize("kind", KINDS)
def test_reverse_and_given_states(kind: str) -> None:
    module = _raised(Spelling(kind, reverse=True, initial=True))
    layer = _layer(module)
    assert layer.attributes["direction"].as_string() == "reverse"
    assert layer.inputs[5] is not None
    _raised(Spelling(kind, reverse=True, stacked=False, batch=0))


def test_gru_blends() -> None:
    for kind in ("GRU", "GRU before"):
        module = _raised(Spelling(kind, blend=False))
        assert _layer(module).attributes["linear_before_reset"].as_int() == int(kind == "GRU")


@pytest.mark.parametrize("form", ["scan", "loop"])
@pytest.mark.parametrize("kind", KINDS)
def test_loops(kind: str, form: str) -> None:
    _raised(Spelling(kind, form=form, batch=0))
    _raised(Spelling(kind, "concat", form=form, batch_first=False, initial=True, stacked=False))


@pytest.mark.parametrize("form", ["scan", "loop"])
@pytest.mark.parametrize("kind", KINDS)
def test_operators_called_step_by_step(kind: str, form: str) -> None:
    _raised(Spelling(kind, "called", form=form, batch=0))
    _raised(Spelling(kind, "called", form=form, initial=True, stacked=False))


def test_scan_backwards_and_projected() -> None:
    module = _raised(Spelling("GRU", "projected", form="scan", reverse=True, batch=0))
    assert _layer(module).attributes["direction"].as_string() == "reverse"


def test_two_layers_and_a_part_of_the_sequence() -> None:
    writer = Writer(Spelling(kind="RNN"))
    steps = [writer.b.op("Gather", writer.x, writer.b.constant(n), axis=1) for n in (1, 2, 3)]
    state = writer.initial()[0]
    for x in steps:
        (state,) = writer.step(x, [state])
    module, _ = raise_and_check(RaiseRecurrent(), writer.module([state]))
    assert count_ops(module)["RNN"] == 1
    assert count_ops(module)["Slice"] == 1


# -- near misses ---------------------------------------------------------------------------------------------------


def _stays(module: Module, reason: str) -> None:
    module, missed = raise_and_check(RaiseRecurrent(), module)
    assert not {"LSTM", "GRU", "RNN"} & set(count_ops(module))
    assert any(reason in message for _, message in missed), missed


def test_steps_out_of_order_stay() -> None:
    writer = Writer(Spelling())
    steps, states = writer._steps(writer.x), writer.initial()
    for n in (0, 2, 1, 3):
        states = writer.step(steps[n], states)
    _stays(writer.module(states), "do not follow each other")


def test_another_bias_at_one_step_stays() -> None:
    writer = Writer(Spelling(kind="GRU", batch=0))
    steps, state = writer._steps(writer.x), writer.initial()
    for n, x in enumerate(steps):
        if n == 2:
            writer.others.clear()
            bias = writer.bw.const_value
            assert bias is not None
            writer.bw.const_value = ir.tensor(bias.numpy() + np.float32(0.5), name=writer.bw.name)
        state = writer.step(x, state)
    module, missed = raise_and_check(RaiseRecurrent(), writer.module(state))
    assert "GRU" not in count_ops(module), missed


def test_cell_state_in_use_stays() -> None:
    writer = Writer(Spelling())
    steps, states = writer._steps(writer.x), writer.initial()
    kept = []
    for x in steps:
        states = writer.step(x, states)
        kept.append(states[1])
    _stays(writer.module([states[0], kept[1]]), "is needed elsewhere too")


def test_states_in_use_are_picked() -> None:
    writer = Writer(Spelling(batch=0))
    steps, states, kept = writer._steps(writer.x), writer.initial(), []
    for x in steps:
        states = writer.step(x, states)
        kept.append(states[0])
    module, _ = raise_and_check(RaiseRecurrent(), writer.module([kept[1], states[0], states[1]]))
    assert count_ops(module)["LSTM"] == 1
    assert count_ops(module)["Gather"] == 1


def test_input_that_depends_on_the_state_stays() -> None:
    writer = Writer(Spelling(kind="RNN"))
    steps, state = writer._steps(writer.x), writer.initial()[0]
    lift = writer.b.weight(3, 5)
    for x in steps:
        (state,) = writer.step(writer.b.op("Add", x, writer.b.op("MatMul", state, lift)), [state])
    _stays(writer.module([state]), "is no step of a sequence")


def test_loop_that_ends_early_stays() -> None:
    writer = Writer(Spelling(form="loop", stacked=False))
    module = writer.module()
    loop = next(node for node in module.graph if node.op_type == "Loop")
    three = writer.b.weight(1)
    three.const_value = ir.tensor(np.array(3, dtype=np.int64), name=three.name)
    three.shape, three.type = ir.Shape([]), ir.TensorType(ir.DataType.INT64)
    module.graph.register_initializer(three)
    loop.replace_input_with(0, three)
    _stays(module, "before the end")


def test_an_mlp_of_tanh_is_no_recurrence() -> None:
    writer = Writer(Spelling(kind="RNN", batch=0))
    x = writer.b.op("Gather", writer.x, writer.b.constant(0), axis=1)
    for _ in range(3):
        x = writer.b.op("Tanh", writer.b.op("Gemm", x, writer.b.weight(5, 5), writer.b.weight(5)))
    module, missed = raise_and_check(RaiseRecurrent(), writer.module([x]))
    assert count_ops(module)["Gemm"] == 3
    assert missed == []
