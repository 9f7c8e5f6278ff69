"""LSTM, GRU and RNN in integers against numpy's integer arithmetic, and where quantization puts their pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from mmopt.backends.cpu.choosing import Candidate, Chooser, Workload
from mmopt.backends.cpu.kernels.recurrent_dot import candidates, instructions
from mmopt.ir.module import Module
from mmopt.ir.verify import verify
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize import InferShapes
from mmopt.transforms.canonicalize.editing import tensor_of
from mmopt.transforms.fuse.fuse_groups import FuseGroups
from mmopt.transforms.quantize import Quantize, QuantizeDynamic, QuantizeStatic, recurrent_layers
from tests.canonical import count_ops, evaluate
from tests.kernels import PROFILES, WIDEST, profiles
from tests.programs import Programs
from tests.unit.test_kernel_recurrent import GATES, Layer, _clipped, activations, example, reference, tensors

STEP = 1 / 127


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of the tests have fewer hidden units than what pays."""
    monkeypatch.setattr(recurrent_layers, "SMALLEST_HIDDEN", 16)


def quantized(
    layer: Layer, *, symbolic: Sequence[int | str] | None = None, seed: int = 1, dynamic: bool = False
) -> Module:
    """A model with one layer as ``quantize-static`` leaves it, or ``quantize-dynamic``."""
    made = example(layer, symbolic=symbolic)
    made.model.opset_import[0].version = 21
    module = Module(ir.from_proto(made.model))
    for node in module.graph:
        node.name = f"{node.op_type}_0"
    InferShapes().run(module, PassContext())
    samples = {name: np.stack([array] * 2) for name, array in made.feeds.items()}
    noise = np.random.default_rng(seed).standard_normal(samples["x"].shape).astype(np.float32)
    samples["x"] = samples["x"] + noise / 100
    if dynamic:
        assert QuantizeDynamic(recurrent_work=0).run(module, PassContext())
    else:
        assert QuantizeStatic(recurrent_work=0).run(module, PassContext(inputs=samples))
    assert [problem for problem in verify(module) if problem.severity == "error"] == []
    return module


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Integers, step and zero point behind a DequantizeLinear."""

    step: np.ndarray
    zero: int
    integers: np.ndarray | None

    @classmethod
    def of(cls, value: ir.Value | None) -> Encoded:
        wide = None if value is None else value.producer()
        assert wide is not None
        assert wide.op_type == "DequantizeLinear"
        step, zero = (tensor_of(v).numpy() for v in wide.inputs[1:3])  # type: ignore[union-attr]
        stored = tensor_of(wide.inputs[0])
        assert not np.any(zero) or zero.size == 1
        return cls(step, int(zero.reshape(-1)[0]), None if stored is None else stored.numpy())

    @classmethod
    def by_range(cls, x: np.ndarray) -> Encoded:
        """What DynamicQuantizeLinear finds."""
        low, high = min(np.float32(0), x.min()), max(np.float32(0), x.max())
        step = np.float32((high - low) / np.float32(255))
        return cls(np.asarray(step), int(np.rint(-low / step)), None)

    def rounded(self, x: np.ndarray, low: int = -128, high: int = 127) -> np.ndarray:
        scaled = np.rint(x.astype(np.float32) / self.step.astype(np.float32)).astype(np.int64) + self.zero
        return np.clip(scaled, low, high) - self.zero


def step_by_step(module: Module, layer: Layer, y: np.ndarray) -> list[np.ndarray]:
    """Y, Y_h and Y_c by integer products of X and of the states that ``y`` has: the errors of a step stay its own.

    A state that lies between two integers may be rounded either way by arithmetic that differs in the last place, and
    what follows would differ by a whole step; so each step starts from the state that was really reached.
    """
    given = {name: array.astype(np.float64) for name, array in tensors(layer).items()}
    (node,) = (node for node in module.graph if node.op_type == layer.op)
    w, r, state = (Encoded.of(node.inputs[n]) for n in (1, 2, 5))
    assert w.integers is not None
    assert r.integers is not None
    wide = node.inputs[0].producer()  # type: ignore[union-attr]
    dynamic = wide.inputs[1].producer() is not None  # type: ignore[union-attr]
    x = Encoded.by_range(tensors(layer)["x"]) if dynamic else Encoded.of(node.inputs[0])
    xs = x.rounded(given["x"], 0, 255)
    count, hidden = GATES[layer.op], layer.hidden
    found, last_h, last_c = np.zeros_like(y), *np.zeros((2, layer.directions, layer.batch, hidden))
    for d in range(layer.directions):
        backward = layer.direction == "reverse" or d == 1
        bias = given["b"][d].reshape(2, count, hidden) if layer.bias else np.zeros((2, count, hidden))
        for n in range(layer.batch):
            length = layer.lengths[n] if layer.lengths else layer.steps
            h = given["h0"][d, n] if layer.initial else np.zeros(hidden)
            h = state.rounded(h) * float(state.step)
            c = given["c0"][d, n] if layer.initial and layer.op == "LSTM" else np.zeros(hidden)

            def product(h: np.ndarray, d: int = d) -> np.ndarray:
                sums = r.integers[d].astype(np.int64) @ state.rounded(h)  # type: ignore[index]
                return (sums * (r.step[d, :, 0].astype(np.float64) * float(state.step))).reshape(count, hidden)

            for t in reversed(range(length)) if backward else range(length):
                sums = w.integers[d].astype(np.int64) @ xs[t, n]
                wx = (sums * (w.step[d, :, 0].astype(np.float64) * float(x.step))).reshape(count, hidden)
                new, c = UPDATES[layer.op](layer, given, d, wx + bias[0], bias[1], product, h, c)
                found[t, d, n] = new
                h = y[t, d, n].astype(np.float64)
            if length:
                last_h[d, n], last_c[d, n] = h, c
    return [found, last_h, last_c][: 3 if layer.op == "LSTM" else 2]


def _lstm(layer, given, d, wx, b, product, h, c):  # type: ignore[no-untyped-def]
    acts, p = activations(layer)[d], given["p"][d].reshape(3, -1) if layer.peepholes else np.zeros((3, layer.hidden))
    i, o, f, g = wx + product(h) + b
    i, f = (acts[0](_clipped(layer, v + p[n] * c)) for v, n in ((i, 0), (f, 2)))
    new = f * c + i * acts[1](_clipped(layer, g))
    return acts[0](_clipped(layer, o + p[1] * new)) * acts[2](new), new


def _gru(layer, given, d, wx, b, product, h, c):  # type: ignore[no-untyped-def]
    acts, rh = activations(layer)[d], product(h)
    z, r = (acts[0](_clipped(layer, wx[n] + rh[n] + b[n])) for n in range(2))
    inner = r * (rh[2] + b[2]) if layer.attr("linear_before_reset") else product((r * h).astype(np.float32))[2] + b[2]
    n = acts[1](_clipped(layer, wx[2] + inner))
    return (1 - z) * n + z * h, c


def _rnn(layer, given, d, wx, b, product, h, c):  # type: ignore[no-untyped-def]
    return activations(layer)[d][0](_clipped(layer, (wx + product(h) + b)[0])), c


UPDATES = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}


def wrong(
    layers: Sequence[Layer], profile: str, *, symbolic: Sequence[int | str] | None = None, dynamic: bool = False
) -> list[str]:
    """Layers whose native answers are not those of integer arithmetic, or are no different from those of floats."""
    modules = [quantized(layer, symbolic=symbolic, dynamic=dynamic) for layer in layers]
    compiled = []
    for module in modules:
        copy = module.clone()
        FuseGroups().run(copy, PassContext())
        compiled.append(copy)
    programs, found = Programs(compiled, profile), []
    for number, (layer, module) in enumerate(zip(layers, modules, strict=True)):
        feeds = {n: a for n, a in tensors(layer).items() if n in {v.name for v in module.graph.inputs}}
        got = programs.run(number, feeds)
        want = step_by_step(module, layer, got[0].astype(np.float64))
        errors = [np.abs(a - b).max() for a, b in zip(got, want, strict=True)]
        error, floats = max(errors), np.abs(got[0] - reference(layer, tensors(layer))[0]).max()
        if error > 2e-5:
            found.append(f"{layer}: off by {errors}, from floats by {floats}")
        if layer.steps > 2 and layer.hidden > 15:
            plain = evaluate(module, feeds)["y"]
            if np.abs(plain - got[0]).max() < 20 * error:
                found.append(f"{layer}: the state was not rounded")
    return found


def layers() -> list[Layer]:
    """Sizes that fill vectors and steps of depth or not; one row, tiles of rows, blocks; threads that share panels."""
    both, early = {"direction": "bidirectional"}, {"lengths": (5, 1, 3)}
    reset = (("linear_before_reset", 1),)
    return [
        Layer("LSTM", hidden=16),
        Layer("LSTM", hidden=19, batch=9, depth=20, **both),  # type: ignore[arg-type]
        Layer("LSTM", hidden=33, batch=1, bias=False),
        Layer("LSTM", hidden=130, batch=1, steps=8),
        Layer("LSTM", hidden=64, batch=16, steps=9, initial=True, **both),  # type: ignore[arg-type]
        Layer("LSTM", hidden=24, batch=67, steps=3),
        Layer("LSTM", hidden=40, initial=True, peepholes=True, **both, **early),  # type: ignore[arg-type]
        Layer("LSTM", hidden=70, batch=5, direction="reverse", lengths=(5, 1, 3, 5, 0)),
        Layer("LSTM", hidden=20, attributes=(("clip", 0.4),)),
        Layer("GRU", hidden=16),
        Layer("GRU", hidden=100, batch=3, steps=9, initial=True),
        Layer("GRU", hidden=64, batch=20, attributes=reset, **both),  # type: ignore[arg-type]
        Layer("GRU", hidden=140, batch=4, attributes=reset, steps=6, initial=True),
        Layer("GRU", hidden=48, batch=33, direction="reverse", **early | {"lengths": ()}),  # type: ignore[arg-type]
        Layer("GRU", hidden=21, **both, **early),  # type: ignore[arg-type]
        Layer("RNN", hidden=50, batch=4, initial=True, **both),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_step_is_that_of_integer_arithmetic(profile: str) -> None:
    found = wrong(layers(), profile)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("profile", PROFILES)
def test_numbers_of_steps_and_sequences_that_are_known_at_run_time(profile: str) -> None:
    some = [
        Layer("LSTM", steps=4, batch=3, hidden=40),
        Layer("GRU", steps=7, batch=40, hidden=32, direction="bidirectional"),
        Layer("GRU", steps=4, batch=2, hidden=140, initial=True),
    ]
    found = wrong(some, profile, symbolic=["t", "n", 6])
    assert not found, "\n".join(found)


def test_ranges_of_inputs_that_are_found_at_run_time() -> None:
    some = [Layer("LSTM", hidden=40, direction="bidirectional"), Layer("GRU", hidden=32, batch=1, initial=True)]
    found = wrong(some, WIDEST, dynamic=True)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("instruction", [dot.name for dot in instructions(profiles()[WIDEST])])
def test_every_instruction_gives_the_same_answer(instruction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def choose(self: Chooser, workload: Workload, offered: Sequence[Candidate]) -> Candidate:
        if workload.template != "recurrence_int8":
            return usual(self, workload, offered)
        chosen.append(next(c for c in reversed(offered) if c["instruction"] == instruction))
        return chosen[-1]

    usual = Chooser.choose
    monkeypatch.setattr(Chooser, "choose", choose)
    some = [Layer("LSTM", hidden=70, batch=batch, steps=3) for batch in (1, 7, 17, 40)]
    found = wrong([*some, Layer("GRU", hidden=70, batch=18)], WIDEST)
    assert not found, "\n".join(found)
    assert len(chosen) == 5


def test_tiles_are_for_many_rows() -> None:
    given = profiles()[WIDEST]
    for gates, hidden in ((4, 256), (3, 96), (2, 20)):
        offered = candidates(given, gates, hidden, 1, 32)
        assert offered
        assert all(gates % c.number("vectors") == 0 for c in offered)
        best = {rows: min(candidates(given, gates, hidden, rows, 32), key=lambda c: c.cycles) for rows in (1, 16)}
        assert best[1].cycles <= best[16].cycles
        if any(dot.tiled for dot in instructions(given)) and hidden > 64:
            assert str(best[16]["instruction"]).startswith("tdp")


class TestPlacement:
    def test_pairs_go_on_everything_a_step_reads(self) -> None:
        module = quantized(Layer("LSTM", hidden=20, direction="bidirectional"))
        (node,) = (node for node in module.graph if node.op_type == "LSTM")
        x, w, r, state = (Encoded.of(node.inputs[n]) for n in (0, 1, 2, 5))
        assert w.step.shape == r.step.shape == (2, 80, 1)
        assert state.integers is not None
        assert state.integers.shape == (2, 3, 20)
        assert not state.integers.any()
        assert float(state.step) == pytest.approx(STEP)
        assert x.integers is None
        assert {v.name for v in node.inputs if v is not None and tensor_of(v) is not None} == {"b"}

    def test_larger_initial_states_have_larger_steps(self) -> None:
        layer = Layer("GRU", hidden=20, initial=True)
        module = quantized(layer)
        (node,) = (node for node in module.graph if node.op_type == "GRU")
        assert float(Encoded.of(node.inputs[5]).step) == pytest.approx(np.abs(tensors(layer)["h0"]).max() / 127)

    @pytest.mark.parametrize(
        ("layer", "why"),
        [
            (Layer("LSTM", hidden=8), "8 hidden units only"),
            (Layer("LSTM", hidden=20, attributes=(("layout", 1),)), "its batch comes first"),
            (Layer("GRU", hidden=20, attributes=(("activations", ["Sigmoid", "Relu"]),)), "not bound to ±1"),
        ],
        ids=["small", "layout", "relu"],
    )
    def test_what_stays_in_float(self, layer: Layer, why: str) -> None:
        made = example(layer)
        made.model.opset_import[0].version = 21
        module, context = Module(ir.from_proto(made.model)), PassContext(inputs=dict(made.feeds))
        assert QuantizeStatic(recurrent_work=0).run(module, context) is False
        assert any(why in remark.message for remark in context.remarks)

    @pytest.mark.parametrize(
        ("layer", "symbolic", "why"),
        [
            (Layer("GRU", hidden=24, steps=200), None, "24 hidden units only"),
            (Layer("LSTM", hidden=64, steps=3, batch=2), None, "multiplies 98304 numbers"),
            (Layer("LSTM", hidden=64, steps=8, batch=2), None, ""),
            (Layer("LSTM", hidden=64, steps=3, batch=2), ["t", "n", 6], ""),
        ],
        ids=["gates", "steps", "enough", "unknown"],
    )
    def test_what_pays(
        self, layer: Layer, symbolic: list[int | str] | None, why: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.undo()
        made = example(layer, symbolic=symbolic)
        module = Module(ir.from_proto(made.model))
        (node,) = recurrent_layers.recurrent_layers(module)
        refusal = recurrent_layers.recurrent_refusal(node)
        assert (why in refusal) if why else not refusal

    def test_other_runtimes_keep_theirs(self) -> None:
        made = example(Layer("LSTM", hidden=20))
        made.model.opset_import[0].version = 21
        module = Module(ir.from_proto(made.model))
        assert (
            QuantizeStatic(portable=True, recurrent_work=0).run(module, PassContext(inputs=dict(made.feeds))) is False
        )

    def test_the_preset_takes_them_along(self) -> None:
        made = example(Layer("LSTM", hidden=64, steps=16))
        made.model.opset_import[0].version = 21
        module = Module(ir.from_proto(made.model))
        for node in module.graph:
            node.name = f"{node.op_type}_0"
        samples = {name: np.stack([array] * 2) for name, array in made.feeds.items()}
        samples["x"][1] += 1
        assert Quantize().run(module, PassContext(inputs=samples))
        assert count_ops(module)["DequantizeLinear"] == 4

    @pytest.mark.parametrize("op", ["LSTM", "GRU"])
    def test_any_runtime_reads_it(self, op: str) -> None:
        layer = Layer(op, hidden=24, steps=12, direction="bidirectional", initial=True)
        module, feeds = quantized(layer), {n: a for n, a in tensors(layer).items() if n in ("x", "h0", "c0")}
        got, want = evaluate(module, feeds)["y"], reference(layer, tensors(layer))[0]
        assert np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) < 0.02
