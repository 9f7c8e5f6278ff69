"""LSTM, GRU and RNN on a GPU, in the emulator: what is computed, and in how many launches."""

from __future__ import annotations

import numpy as np
import pytest

from mmopt.backends.cuda.kernels import recurrence
from mmopt.backends.cuda.pipeline import compiled_kernels, generate
from mmopt.backends.profile import load_profile
from mmopt.lowering.compiler import CompileOptions
from mmopt.lowering.partition import partition
from mmopt.lowering.program import ProgramBuilder
from tests.cuda_emulator import Emulated, available
from tests.operators import example, numbers
from tests.programs import Example, grouped
from tests.unit.test_cuda_emulated import wrong_answers
from tests.unit.test_cuda_products import toolkit, with_weight

pytestmark = pytest.mark.skipif(not available, reason="needs g++, to compile what a GPU would run")
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def layer(
    kind: str,
    hidden: int,
    *,
    steps: int = 4,
    batch: int = 1,
    directions: int = 1,
    attributes: str = "",
    states: bool = False,
    lengths: bool = False,
    known: bool = True,
    symbolic: bool = False,
) -> Example:
    """A layer with seeded weights, all of whose results are outputs."""
    gates, depth = GATES[kind], 6

    def some(*shape: int, seed: int) -> np.ndarray:
        return numbers(*shape, seed=seed, low=-0.4, high=0.4)

    feeds = {
        "x": numbers(steps, batch, depth),
        "w": some(directions, gates * hidden, depth, seed=1),
        "r": some(directions, gates * hidden, hidden, seed=2),
        "b": some(directions, 2 * gates * hidden, seed=3),
    }
    names = ["x", "w", "r", "b", "", ""]
    if lengths:
        feeds["n"] = np.array([steps - (i % steps) for i in range(batch)], np.int32)
        names[4] = "n"
    if states:
        feeds["h0"] = some(directions, batch, hidden, seed=4)
        names[5] = "h0"
    if kind == "LSTM":
        names.append("c0" if states else "")
        if states:
            feeds["c0"] = some(directions, batch, hidden, seed=5)
    if "peephole" in attributes:
        feeds["p"] = some(directions, 3 * hidden, seed=6)
        names, attributes = [*names, "p"], attributes.replace("peephole", "")
    direction = ', direction = "bidirectional"' if directions == 2 else ""
    outputs = ("y", "h", "c") if kind == "LSTM" else ("y", "h")
    while not names[-1]:
        names.pop()
    body = f"{', '.join(outputs)} = {kind} <hidden_size = {hidden}{direction}{attributes}> ({', '.join(names)})"
    made = example(body, feeds, outputs=outputs, symbolic={"x": ["s", "n", depth]} if symbolic else None)
    for name in ("w", "r", "b", "p") if known else ():
        made = with_weight(made, name) if name in feeds else made
    return made


def launches(case: Example) -> int:
    """How many kernels the model takes, by what the artifact says."""
    profile = load_profile("cuda-sm80")
    builder = ProgramBuilder(profile)
    partition(grouped(case.model), "main", builder, CompileOptions())
    (order,) = generate(builder.module(), profile, list(builder.kernels)).repeatable.values()
    return sum(count for count, _ in order)


def test_small_layers_agree_with_onnxruntime() -> None:
    cases = [
        layer("LSTM", 20),
        layer("LSTM", 40, batch=6, directions=2, states=True),
        layer("LSTM", 33, batch=3, lengths=True, attributes="peephole", states=True),
        layer("LSTM", 20, attributes=', direction = "reverse", input_forget = 1, clip = 0.5'),
        layer("LSTM", 12, attributes=', activations = ["HardSigmoid", "Softsign", "Relu"]'),
        layer("GRU", 40, batch=2, attributes=", linear_before_reset = 1"),
        layer("GRU", 34, batch=5, directions=2, states=True),
        layer("GRU", 20, batch=3, lengths=True, attributes=', direction = "reverse"'),
        layer("RNN", 70, batch=2, directions=2),
        layer("LSTM", 20, batch=3, known=False),
        layer("LSTM", 20, batch=5, symbolic=True, directions=2),
    ]
    wrong = wrong_answers(cases, tolerance=5e-6)
    assert not wrong, "\n".join(wrong)


def test_large_layers_agree_with_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "RESIDENT", 0)
    cases = [
        layer("LSTM", 70, batch=6, directions=2, states=True),
        layer("LSTM", 40, batch=5, symbolic=True, lengths=True),
        layer("GRU", 40, batch=3, attributes=", linear_before_reset = 1"),
        layer("GRU", 34, batch=5, directions=2, states=True),
        layer("RNN", 70),
    ]
    wrong = wrong_answers(cases, tolerance=5e-6)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("kind", "hidden", "steps", "attributes", "expected"),
    [
        ("LSTM", 64, 7, "", 2),  # the product with the inputs, and all steps
        ("GRU", 64, 7, "", 2),
        ("LSTM", 160, 7, "", 1 + 1 + 7 + 1),
        ("GRU", 256, 7, "", 1 + 1 + 14 + 1),
        ("GRU", 256, 7, ", linear_before_reset = 1", 1 + 1 + 7 + 1),
    ],
)
def test_launches(kind: str, hidden: int, steps: int, attributes: str, expected: int) -> None:
    assert launches(layer(kind, hidden, steps=steps, attributes=attributes)) == expected


@toolkit
@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize(("kind", "hidden", "batch"), [("LSTM", 128, 1), ("LSTM", 128, 8), ("GRU", 256, 4)])
def test_machine_code_keeps_sums_in_registers(kind: str, hidden: int, batch: int, sm: int) -> None:
    made = Emulated(grouped(layer(kind, hidden, batch=batch).model), f"cuda-sm{sm}")
    taken = compiled_kernels(made.generated, sm).resources
    assert all(one.spills == 0 and one.stack == 0 for one in taken.values())
