"""LSTM, GRU and RNN against numpy in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import scipy.special
from onnx import helper

from mmopt.backends.cpu.choosing import Candidate, Chooser, Workload
from mmopt.backends.cpu.kernels.recurrent import candidates
from mmopt.backends.profile import load_profile
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize import InferShapes
from mmopt.transforms.fuse.fuse_groups import FuseGroups
from mmopt.transforms.precision import NarrowFloats
from tests.kernels import PROFILES, WIDEST, profiles
from tests.programs import Example, Programs, assert_close, check, model_of, wrong_answers

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A recurrent node and its sizes."""

    op: str
    steps: int = 5
    batch: int = 3
    depth: int = 6
    hidden: int = 16
    direction: str = "forward"
    bias: bool = True
    initial: bool = False
    lengths: tuple[int, ...] = ()
    peepholes: bool = False
    dtype: str = "float32"
    attributes: tuple[tuple[str, object], ...] = ()

    @property
    def directions(self) -> int:
        return 2 if self.direction == "bidirectional" else 1

    def attr(self, name: str, default: object = None) -> object:
        return dict(self.attributes).get(name, default)


def activation(name: str, alpha: float | None, beta: float | None) -> Callable[[np.ndarray], np.ndarray]:
    """Activation functions as the standard defines them."""

    def a(default: float) -> float:
        return default if alpha is None else alpha

    def b(default: float) -> float:
        return default if beta is None else beta

    return {
        "Sigmoid": scipy.special.expit,
        "Tanh": np.tanh,
        "Relu": lambda x: np.maximum(x, 0),
        "Affine": lambda x: a(1) * x + b(0),
        "LeakyRelu": lambda x: np.where(x < 0, a(0.01) * x, x),
        "ThresholdedRelu": lambda x: np.where(x > a(1), x, 0),
        "ScaledTanh": lambda x: a(1) * np.tanh(b(1) * x),
        "HardSigmoid": lambda x: np.clip(a(0.2) * x + b(0.5), 0, 1),
        "Elu": lambda x: np.where(x < 0, a(1) * np.expm1(x), x),
        "Softsign": lambda x: x / (1 + np.abs(x)),
        "Softplus": lambda x: np.logaddexp(0, x),
    }[name]


TAKES_ALPHA = {"Affine", "LeakyRelu", "ThresholdedRelu", "ScaledTanh", "HardSigmoid", "Elu"}
TAKES_BETA = {"Affine", "ScaledTanh", "HardSigmoid"}


def activations(layer: Layer) -> list[list[Callable[[np.ndarray], np.ndarray]]]:
    """For each direction, its functions; parameters are given to those that take them, in order."""
    names = list(layer.attr("activations", DEFAULTS[layer.op] * layer.directions))
    alphas, betas = list(layer.attr("activation_alpha", [])), list(layer.attr("activation_beta", []))
    made = [
        activation(
            name,
            alphas.pop(0) if name in TAKES_ALPHA and alphas else None,
            betas.pop(0) if name in TAKES_BETA and betas else None,
        )
        for name in names
    ]
    each = len(made) // layer.directions
    return [made[d * each : (d + 1) * each] for d in range(layer.directions)]


def reference(layer: Layer, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Y, Y_h and, for LSTM, Y_c, step by step in float64, as the standard has them (layout 0)."""
    data = {name: array.astype(np.float64) for name, array in given.items()}
    directions, batch, hidden = layer.directions, layer.batch, layer.hidden
    y = np.zeros((layer.steps, directions, batch, hidden))
    last_h, last_c = np.zeros((2, directions, batch, hidden))
    for d in range(directions):
        backward = layer.direction == "reverse" or d == 1
        for n in range(batch):
            length = layer.lengths[n] if layer.lengths else layer.steps
            h = data["h0"][d, n] if layer.initial else np.zeros(hidden)
            c = data["c0"][d, n] if layer.initial and layer.op == "LSTM" else np.zeros(hidden)
            for t in reversed(range(length)) if backward else range(length):
                h, c = STEPS[layer.op](layer, activations(layer)[d], data, d, data["x"][t, n], h, c)
                y[t, d, n] = h
            if length:  # otherwise zeros, as in onnxruntime
                last_h[d, n], last_c[d, n] = h, c
    return [y, last_h, last_c] if layer.op == "LSTM" else [y, last_h]


def _gates(layer: Layer, data: dict[str, np.ndarray], d: int, x: np.ndarray, h: np.ndarray) -> tuple[list, list, list]:
    """W·x, R·h and the recurrent bias of each gate; the input bias is added to the first."""
    count, hidden = GATES[layer.op], layer.hidden
    bias = data["b"][d] if layer.bias else np.zeros(2 * count * hidden)
    from_x = data["w"][d] @ x + bias[: count * hidden]
    return tuple(list(v.reshape(count, hidden)) for v in (from_x, data["r"][d] @ h, bias[count * hidden :]))  # type: ignore[return-value]


def _clipped(layer: Layer, x: np.ndarray) -> np.ndarray:
    clip = layer.attr("clip")
    return x if clip is None else np.clip(x, -clip, clip)


def _lstm(layer, acts, data, d, x, h, c):  # type: ignore[no-untyped-def]
    wx, rh, b = _gates(layer, data, d, x, h)
    p = data["p"][d].reshape(3, -1) if layer.peepholes else np.zeros((3, layer.hidden))
    i, o, f, g = (wx[k] + rh[k] + b[k] for k in range(4))
    i = acts[0](_clipped(layer, i + p[0] * c))
    f = 1 - i if layer.attr("input_forget") else acts[0](_clipped(layer, f + p[2] * c))
    new = f * c + i * acts[1](_clipped(layer, g))
    o = acts[0](_clipped(layer, o + p[1] * new))
    return o * acts[2](new), new


def _gru(layer, acts, data, d, x, h, c):  # type: ignore[no-untyped-def]
    wx, rh, b = _gates(layer, data, d, x, h)
    z = acts[0](_clipped(layer, wx[0] + rh[0] + b[0]))
    r = acts[0](_clipped(layer, wx[1] + rh[1] + b[1]))
    if layer.attr("linear_before_reset"):
        inner = r * (rh[2] + b[2])
    else:
        inner = data["r"][d].reshape(3, layer.hidden, -1)[2] @ (r * h) + b[2]
    n = acts[1](_clipped(layer, wx[2] + inner))
    return (1 - z) * n + z * h, c


def _rnn(layer, acts, data, d, x, h, c):  # type: ignore[no-untyped-def]
    wx, rh, b = _gates(layer, data, d, x, h)
    return acts[0](_clipped(layer, wx[0] + rh[0] + b[0])), c


STEPS = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}


def tensors(layer: Layer) -> dict[str, np.ndarray]:
    """Seeded inputs by their place: x, w, r, b, lengths, h0, c0, p."""
    random = np.random.default_rng(0)
    count, hidden, directions = GATES[layer.op], layer.hidden, layer.directions

    def data(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) / 2).astype(layer.dtype)

    made = {"w": data(directions, count * hidden, layer.depth), "r": data(directions, count * hidden, hidden)}
    if layer.bias:
        made["b"] = data(directions, 2 * count * hidden)
    if layer.peepholes:
        made["p"] = data(directions, 3 * hidden)
    made["x"] = data(layer.steps, layer.batch, layer.depth) * 2
    if layer.lengths:
        made["lengths"] = np.array(layer.lengths, np.int32)
    if layer.initial:
        made["h0"] = data(directions, layer.batch, hidden)
        if layer.op == "LSTM":
            made["c0"] = data(directions, layer.batch, hidden)
    return made


def example(layer: Layer, *, computed: bool = False, symbolic: Sequence[int | str] | None = None) -> Example:
    """A model with one layer; weights are inputs when ``computed``."""
    given = tensors(layer)
    places = ["x", "w", "r", "b", "lengths", "h0"] + (["c0", "p"] if layer.op == "LSTM" else [])
    inputs = [name if name in given else "" for name in places]
    while not inputs[-1]:
        inputs.pop()
    outputs = ["y", "y_h", "y_c"][: 3 if layer.op == "LSTM" else 2]
    node = helper.make_node(
        layer.op, inputs, outputs, hidden_size=layer.hidden, direction=layer.direction, **dict(layer.attributes)
    )
    want = reference(layer, given)
    first = bool(layer.attr("layout"))
    if first:
        given = {n: a.swapaxes(0, 1) if n in ("x", "h0", "c0") else a for n, a in given.items()}
        want = [want[0].transpose(2, 0, 1, 3), *(w.swapaxes(0, 1) for w in want[1:])]
    weights = {} if computed else {name: given[name] for name in "wrbp" if name in given}
    feeds = {name: array for name, array in given.items() if name not in weights}
    shapes = (
        {}
        if symbolic is None
        else {"x": symbolic, "lengths": [symbolic[1]], "h0": [layer.directions, symbolic[1], None]}
    )
    shapes = {name: shape for name, shape in shapes.items() if name in feeds}
    model = model_of([node], feeds, outputs, weights, symbolic=shapes)
    text = f"{layer}{' computed weights' if computed else ''}{f' {symbolic}' if symbolic else ''}"
    return Example(text, model, feeds, want)


def sizes() -> list[Example]:
    """Hidden units that do not fill vectors; one step, one sequence, several tiles of the batch; parallel panels."""
    made = []
    for op in GATES:
        made += [
            example(Layer(op, hidden=1)),
            example(Layer(op, hidden=5, steps=1, batch=1, depth=1)),
            example(Layer(op, hidden=19, batch=9, direction="bidirectional")),
            example(Layer(op, hidden=33, batch=1, bias=False)),
        ]
    return [
        *made,
        example(Layer("LSTM", hidden=130, batch=1, steps=3)),
        example(Layer("GRU", hidden=128, batch=2, steps=3)),
    ]


def directions() -> list[Example]:
    """Every direction, with initial states, and sequences that end early."""
    made = []
    for op in GATES:
        for direction in ("forward", "reverse", "bidirectional"):
            lengths = () if direction == "reverse" else (5, 1, 3)
            made.append(example(Layer(op, direction=direction, initial=True, hidden=10, lengths=lengths)))
        made.append(example(Layer(op, direction="reverse", hidden=10, lengths=(5, 1, 3))))
    return made


def variants() -> list[Example]:
    """Peepholes, clipping, other activations with their parameters, gates before and after the reset, layouts."""
    parametric = (("activations", ["HardSigmoid", "ScaledTanh", "Affine"]),)
    parametric += (("activation_alpha", [0.3, 1.2, 0.8]), ("activation_beta", [0.4, 0.9, 0.1]))
    both = (("activations", ["Sigmoid", "Tanh", "Softsign", "HardSigmoid", "Elu", "Relu"]),)
    made = [
        example(Layer("LSTM", peepholes=True, hidden=7)),
        example(Layer("LSTM", peepholes=True, initial=True, direction="bidirectional", lengths=(2, 5, 4))),
        example(Layer("LSTM", attributes=(("clip", 0.4),), peepholes=True)),
        example(Layer("LSTM", attributes=parametric)),
        example(Layer("LSTM", attributes=both, direction="bidirectional")),
        example(Layer("LSTM", attributes=(("input_forget", 1),), peepholes=True)),
        example(Layer("GRU", attributes=(("linear_before_reset", 1),), hidden=9, initial=True)),
        example(Layer("GRU", attributes=(("linear_before_reset", 1),), bias=False)),
        example(Layer("GRU", attributes=(("clip", 0.3), ("linear_before_reset", 1)), direction="bidirectional")),
        example(Layer("GRU", attributes=(("activations", ["HardSigmoid", "Softplus"]),), initial=True)),
        example(Layer("RNN", attributes=(("clip", 0.2),))),
        example(Layer("RNN", direction="bidirectional", attributes=(("activations", ["ThresholdedRelu", "LeakyRelu"]),
                                                                   ("activation_alpha", [0.4, 0.2])))),
    ]  # fmt: skip
    for op in GATES:
        made.append(example(Layer(op, attributes=(("layout", 1),), initial=True, direction="bidirectional")))
        made.append(example(Layer(op, dtype="float64", hidden=11)))
        made.append(example(Layer(op, lengths=(5, 0, 2), initial=True)))
    return made


def computed_weights() -> list[Example]:
    """Weights that are inputs of the model."""
    made = [example(Layer(op, hidden=13, direction="bidirectional"), computed=True) for op in GATES]
    made.append(example(Layer("LSTM", hidden=5, peepholes=True, initial=True), computed=True))
    made.append(example(Layer("GRU", hidden=5, attributes=(("linear_before_reset", 1),)), computed=True))
    return made


def symbolic() -> list[Example]:
    """Numbers of steps and sequences known at run time only."""
    made = []
    for steps, batch in [(1, 1), (4, 3), (7, 8), (2, 13)]:
        lengths = tuple(1 + n % steps for n in range(batch))
        both = Layer("GRU", steps=steps, batch=batch, hidden=9, direction="bidirectional", lengths=lengths)
        for layer in (both, Layer("LSTM", steps=steps, batch=batch), Layer("RNN", steps=steps, batch=batch)):
            made.append(example(layer, symbolic=["t", "n", 6]))
    return made


def threads() -> list[Example]:
    """Enough work for threads: they share directions, blocks of the batch (equal or not), or the panels of a step."""
    both = {"direction": "bidirectional"}
    made = [
        example(Layer("LSTM", steps=8, hidden=130, batch=1)),
        example(Layer("LSTM", steps=6, hidden=70, batch=5, direction="reverse", lengths=(6, 1, 3, 6, 2))),
        example(Layer("GRU", steps=9, hidden=100, batch=3, initial=True)),
        example(Layer("GRU", steps=40, hidden=20, batch=9)),
        example(Layer("RNN", steps=5, hidden=60, batch=16, initial=True)),
        example(Layer("LSTM", steps=3, hidden=24, batch=67)),
        example(Layer("LSTM", steps=9, hidden=65, batch=17, **both)),
        example(Layer("GRU", steps=9, hidden=64, batch=4, lengths=(9, 2, 5, 1), **both)),
    ]
    for op in GATES:
        for batch in (1, 5, 32, 33):
            layer = Layer(op, steps=4, hidden=140, batch=batch, initial=True)
            made.append(example(layer, symbolic=["t", "n", 6]))
    made.append(example(Layer("LSTM", steps=5, hidden=70, batch=41, **both), symbolic=["t", "n", 6]))
    return made


FAMILIES: list[Callable[[], list[Example]]] = [sizes, directions, variants, computed_weights, symbolic, threads]


def test_the_reference_agrees_with_onnxruntime() -> None:
    """Where onnxruntime has the operator: single precision, layout 0."""
    for one in [*directions(), *variants()]:
        if "float64" not in one.name and "layout" not in one.name:
            for got, want in zip(one.want or (), Example(one.name, one.model, one.feeds).expected(), strict=True):
                assert_close(want, got)


@pytest.mark.parametrize("profile", PROFILES)
def test_candidates_fit_the_registers_and_the_best_has_the_fewest_cycles(profile: str) -> None:
    given = profiles()[profile]
    for gates, batch in [(4, 16), (4, 1), (3, 7), (2, "?"), (1, 100)]:
        offered = candidates(given, "float32", gates, 64, batch)
        for one in offered:
            rows, vectors = one.number("rows"), one.number("vectors")
            assert gates % vectors == 0
            assert rows * vectors + vectors < given.registers
            assert one.cycles >= 64 * 64 // 16 * gates / 2
    taller, wider = (min(candidates(given, "float32", 4, 64, n), key=lambda c: c.cycles) for n in (16, 1))
    assert taller.number("rows") > wider.number("rows")


def test_many_sums_are_in_flight_where_the_batch_allows() -> None:
    """A step of 6 × 4 vectors hides what one of 8 × 2 waits for; of a single row R is all there is to wait for."""
    given = load_profile("sapphirerapids")
    best = [min(candidates(given, "float32", 4, 256, batch), key=lambda c: c.cycles) for batch in (16, 1)]
    assert [(c.number("rows"), c.number("vectors")) for c in best] == [(6, 4), (1, 2)]
    three = min(candidates(given, "float32", 3, 256, 16), key=lambda c: c.cycles)
    assert (three.number("rows"), three.number("vectors")) == (8, 3)


@pytest.mark.parametrize("vectors", [1, 2, 4])
def test_every_candidate_gives_the_same_answer(vectors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(self: Chooser, workload: Workload, offered: Sequence[Candidate]) -> Candidate:
        if workload.template != "recurrence":
            return usual(self, workload, offered)
        return next(c for c in offered if c.number("vectors") == vectors)

    usual = Chooser.choose
    monkeypatch.setattr(Chooser, "choose", choose)
    layers = [Layer("LSTM", hidden=20, batch=batch, steps=3) for batch in (1, 7, 16)]
    check([example(layer) for layer in layers], WIDEST)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_recurrent_layers(family: Callable[[], list[Example]], profile: str) -> None:
    check(family(), profile)


NARROW_TYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}


def narrowed_example(layer: Layer, kind: str) -> Example:
    """A float32 model with the answer that rounded X, W and R give."""
    made, given = example(layer), tensors(layer)
    for name in "xwr":
        given[name] = given[name].astype(NARROW_TYPES[kind]).astype(np.float32)
    return dataclasses.replace(made, want=reference(layer, given))


def narrow_module(model: onnx.ModelProto, kind: str) -> Module:
    """``model`` as ``--precision`` makes it."""
    module = Module(ir.from_proto(model))
    InferShapes().run(module, PassContext())
    assert NarrowFloats(format=kind).run(module, PassContext())  # type: ignore[arg-type]
    FuseGroups().run(module, PassContext())
    return module


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("profile", PROFILES)
def test_narrow_weights_are_widened_in_registers(kind: str, profile: str) -> None:
    layers = [
        Layer("LSTM", batch=1, hidden=64, depth=32),
        Layer("LSTM", hidden=19, direction="bidirectional", initial=True, lengths=(5, 2, 0)),
        Layer("GRU", hidden=32, attributes=(("linear_before_reset", 1),)),
        Layer("GRU", hidden=17, direction="reverse"),
        Layer("RNN", hidden=24, batch=9),
    ]
    examples = [narrowed_example(layer, kind) for layer in layers]
    wrong = wrong_answers(examples, profile, prepare=lambda model: narrow_module(model, kind))
    assert not wrong, "\n".join(wrong)
    weights = Programs([narrow_module(examples[0].model, kind)], profile).weights
    assert sum(a.nbytes for a in weights.values() if a.dtype == NARROW_TYPES[kind]) >= 4 * 64 * 64 * 2
    assert not any(a.dtype == np.float32 and a.size == 4 * 64 * 64 for a in weights.values()), "R is stored narrow only"
