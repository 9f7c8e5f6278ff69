"""Last states are read from the output that has just them; transposes that move nothing are reshapes."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from mmopt.ir.module import Module
from mmopt.transforms.rewrite import LastStates, UnitTransposes
from tests.canonical import check
from tests.unit.test_rewrite import check_rounding, graph, live, weights

CONSTANTS = (
    "int64[1] one = {1}, int64[1] zeros = {0}, int64 last = {-1}, int64 first = {0}, int64 fifth = {4}, "
    "int64 middle = {2}, int64[3] flat = {5, 1, 3}, int64[3] both = {5, 1, 6}, int64[2] both2 = {5, -1}"
)


def layer(body: str, *, kind: str = "LSTM", batch: str = "2", direction: str = "forward", out: str = "a, b") -> Module:
    """A layer of three hidden units over five steps, and what reads it."""
    gates, ways = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], 2 if direction == "bidirectional" else 1
    shapes = {"w": (ways, gates * 3, 4), "r": (ways, gates * 3, 3)}
    inputs = "".join(f", float[{','.join(map(str, shape))}] {name}" for name, shape in shapes.items())
    made = f'Y = {kind} <hidden_size = 3, direction = "{direction}"> (x, w, r)'
    module = graph(f"{made} {body}", f"float[5,{batch},4] x{inputs}", f"float[{out}] y", CONSTANTS)
    return weights(module, **shapes)


PICKED = {
    "squeezed": "s = Squeeze(Y, one) y = Gather<axis=0>(s, last)",
    "batch first": "s = Squeeze(Y, one) t = Transpose<perm=[1, 0, 2]>(s) y = Gather<axis=1>(t, last)",
    "all at once": "t = Transpose<perm=[2, 0, 1, 3]>(Y) s = Squeeze(t, two) y = Gather<axis=1>(s, last)",
    "by number": "s = Squeeze(Y, one) y = Gather<axis=0>(s, fifth)",
    "batch and features in one": "s = Reshape(Y, both2) y = Gather<axis=0>(s, last)",
    "axis kept": "s = Squeeze(Y, one) g = Gather<axis=0>(s, minus) y = Squeeze(g, zeros)",
}


@pytest.mark.parametrize("batch", ["2", "batch"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("body", PICKED.values(), ids=PICKED)
def test_last_state_is_read(body: str, kind: str, batch: str) -> None:
    out = "a" if "both2" in body else "a, b"
    body = body.replace("two)", "axis2)").replace("minus)", "last1)")
    module = layer(
        f"axis2 = Constant<value_ints=[2]>() last1 = Constant<value_ints=[-1]>() {body}",
        kind=kind,
        batch=batch,
        out=out,
    )
    check_rounding(LastStates(), module)
    assert "Gather" not in live(module)


def test_reverse_ends_at_the_first_step() -> None:
    module = layer("s = Squeeze(Y, one) y = Gather<axis=0>(s, first)", direction="reverse")
    check_rounding(LastStates(), module)
    assert "Gather" not in live(module)


@pytest.mark.parametrize(
    ("body", "direction", "batch"),
    [
        ("s = Squeeze(Y, one) y = Gather<axis=0>(s, middle)", "forward", "2"),
        ("s = Squeeze(Y, one) y = Gather<axis=0>(s, last)", "reverse", "2"),
        ("s = Squeeze(Y, one) y = Gather<axis=0>(s, first)", "forward", "2"),
        ("s = Squeeze(Y, one) y = Gather<axis=1>(s, last)", "forward", "2"),
        ("s = Reshape(Y, both) y = Gather<axis=0>(s, last)", "bidirectional", "1"),
    ],
    ids=["middle", "reverse", "first", "other axis", "both directions"],
)
def test_other_steps_stay(body: str, direction: str, batch: str) -> None:
    module = layer(body, direction=direction, batch=batch)
    check_rounding(LastStates(), module, fires=False)


def test_sequences_of_different_lengths_stay() -> None:
    body = "y = Gather<axis=0>(s, last)"
    module = layer(f"s = Squeeze(Y, one) {body}")
    lengths = ir.Value(name="n", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT32))
    recurrent = next(node for node in module.graph if node.op_type == "LSTM")
    recurrent.resize_inputs(5)
    module.graph.inputs.append(lengths)
    recurrent.replace_input_with(4, lengths)
    check(LastStates(), module, fires=False, run=False)


TRANSPOSES = {
    "unit first": ("y = Transpose<perm=[1, 0, 2]>(x)", "float[1,4,5] x", ["Reshape"]),
    "unit inside": ("y = Transpose<perm=[0, 2, 1]>(x)", "float[4,1,5] x", ["Reshape"]),
    "joined": ("t = Transpose<perm=[1, 0, 2]>(x) y = Reshape(t, flat)", "float[1,5,3] x", ["Reshape"]),
    "one named size": ("y = Transpose<perm=[1, 0, 2]>(x)", "float[1,batch,5] x", ["Reshape"]),
}


@pytest.mark.parametrize(("body", "inputs", "left"), TRANSPOSES.values(), ids=TRANSPOSES)
def test_units_are_reshaped(body: str, inputs: str, left: list[str]) -> None:
    module = graph(body, inputs, "float[a, b, c] y", "int64[3] flat = {5, 1, 3}")
    check(UnitTransposes(), module)
    assert live(module) == left


@pytest.mark.parametrize(
    ("perm", "inputs"),
    [("1, 0, 2", "float[2,4,5] x"), ("0, 2, 1", "float[1,4,5] x"), ("1, 0, 2", "float[batch,seq,5] x")],
)
def test_data_is_still_moved(perm: str, inputs: str) -> None:
    module = graph(f"y = Transpose<perm=[{perm}]>(x)", inputs, "float[d, e, f] y")
    check(UnitTransposes(), module, fires=False)
