"""Recurrent layers written out step by step, as exporters and people do: for tests of the pass that recognises them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.ir.module import Module
from tests.scale import GraphBuilder

INPUTS, HIDDEN, STEPS = 5, 3, 4
KINDS = ("LSTM", "GRU", "GRU before", "RNN")
PRODUCTS = ("gemm", "concat", "gates", "projected", "summed")
STEPPING = ("gather", "slice", "split")
FORMS = ("unrolled", "scan", "loop")
_GATES = {"LSTM": 4, "GRU": 3, "GRU before": 3, "RNN": 1}
_FLOAT = ir.DataType.FLOAT


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How one layer is written.

    Attributes:
        kind: The cell; ``GRU before`` resets before the product.
        products: ``gemm`` (two, summed), ``concat`` (one of input and state side by side), ``gates`` (two for each
            gate), ``projected`` (the input's for all steps at once), ``summed`` (MatMul and biases added apart),
            ``called`` (the operator itself on one step; in loops only).
        stepping: How an unrolled layer cuts the sequence.
        form: ``unrolled``, ``scan`` or ``loop``.
        batch_first: Whether the sequence is ``[batch, steps, inputs]``.
        reverse: Whether it is read backwards.
        batch: Number of sequences; a named size when 0.
        initial: Whether the initial states are inputs; zeros otherwise.
        stacked: Whether all states are a result, besides the last.
        blend: GRU: whether ``n + z (h - n)`` is written.
    """

    kind: str = "LSTM"
    products: str = "gemm"
    stepping: str = "gather"
    form: str = "unrolled"
    batch_first: bool = True
    reverse: bool = False
    batch: int = 2
    initial: bool = False
    stacked: bool = True
    blend: bool = True


class Writer:
    """Writes one layer.

    Args:
        spelling: How.
        seed: Of the weights.
    """

    def __init__(self, spelling: Spelling, seed: int = 0) -> None:
        self.spelling, self.b = spelling, GraphBuilder(seed)
        self.gates = _GATES[spelling.kind]
        batch = spelling.batch or "batch"
        shape = [batch, STEPS, INPUTS] if spelling.batch_first else [STEPS, batch, INPUTS]
        self.x = _value("x", shape)
        self.states = [_value(f"s{n}", [batch, HIDDEN]) for n in range(2 if spelling.kind == "LSTM" else 1)]
        self.w, self.r = self.b.weight(INPUTS, self.gates * HIDDEN), self.b.weight(HIDDEN, self.gates * HIDDEN)
        self.bw, self.br = self.b.weight(self.gates * HIDDEN), self.b.weight(self.gates * HIDDEN)
        self.others: dict[str, ir.Value] = {}

    @property
    def axis(self) -> int:
        """Axis of time."""
        return 1 if self.spelling.batch_first else 0

    # -- a step ----------------------------------------------------------------------------------------------------

    def _cut(self, matrix: ir.Value, start: int, count: int = 1, axis: int = -1) -> ir.Value:
        """Columns of some gates of a constant."""
        array = np.asarray(matrix.const_value.numpy()) if matrix.const_value is not None else np.zeros(0)
        key = f"{matrix.name}_{start}_{count}"
        if key not in self.others:
            piece = np.take(array, range(start * HIDDEN, (start + count) * HIDDEN), axis=axis)
            value = self.b.weight(*piece.shape)
            value.const_value = ir.tensor(piece, name=value.name)
            self.others[key] = value
        return self.others[key]

    def _projected(self, value: ir.Value, weight: ir.Value, bias: ir.Value, first: int, count: int) -> ir.Value:
        weight, bias = self._cut(weight, first, count), self._cut(bias, first, count)
        if self.spelling.products == "summed":
            return self.b.op("Add", bias, self.b.op("MatMul", value, weight))
        return self.b.op("Gemm", value, weight, bias)

    def _sum(self, x: ir.Value, h: ir.Value, first: int, count: int) -> ir.Value:
        """The sums of some gates; ``x`` is projected already where the spelling says so."""
        spelling = self.spelling.products
        if spelling == "concat":
            weights = self.others.setdefault(f"both{first}_{count}", self._both(first, count))
            bias = self._cut(self.bw, first, count)
            product = self.b.op("MatMul", self.b.op("Concat", x, h, axis=1), weights)
            return self.b.op("Add", self.b.op("Add", product, bias), self._cut(self.br, first, count))
        own = (
            self._slice(x, first, count)
            if spelling == "projected"
            else self._projected(x, self.w, self.bw, first, count)
        )
        return self.b.op("Add", self._projected(h, self.r, self.br, first, count), own)

    def _both(self, first: int, count: int) -> ir.Value:
        pieces = [self._cut(matrix, first, count).const_value for matrix in (self.w, self.r)]
        value = self.b.weight(INPUTS + HIDDEN, count * HIDDEN)
        value.const_value = ir.tensor(np.concatenate([p.numpy() for p in pieces if p is not None]), name=value.name)
        return value

    def _slice(self, value: ir.Value, first: int, count: int) -> ir.Value:
        if count == self.gates:
            return value
        bounds = [self.b.constant([n]) for n in (first * HIDDEN, (first + count) * HIDDEN, -1)]
        return self.b.op("Slice", value, *bounds)

    def _all_gates(self, x: ir.Value, h: ir.Value, count: int) -> list[ir.Value]:
        if self.spelling.products == "gates":
            return [self._sum(x, h, gate, 1) for gate in range(count)]
        whole = self._sum(x, h, 0, count)
        return [self._slice_of(whole, gate) for gate in range(count)]

    def _slice_of(self, whole: ir.Value, gate: int) -> ir.Value:
        bounds = [self.b.constant([n]) for n in (gate * HIDDEN, (gate + 1) * HIDDEN, 1)]
        return self.b.op("Slice", whole, *bounds)

    def step(self, x: ir.Value, states: list[ir.Value]) -> list[ir.Value]:
        """The new states."""
        if self.spelling.products == "called":
            return self._called(x, states)
        if self.spelling.kind == "LSTM":
            return self._lstm(x, *states)
        if self.spelling.kind == "RNN":
            return [self.b.op("Tanh", self._sum(x, states[0], 0, 1))]
        return [self._gru(x, states[0])]

    def _called(self, x: ir.Value, states: list[ir.Value]) -> list[ir.Value]:
        """One call of the operator on one step."""
        b, kind, gates = self.b, self.spelling.kind.split()[0], self.gates
        if not self.others:
            self.others = {"w": b.weight(1, gates * HIDDEN, INPUTS), "r": b.weight(1, gates * HIDDEN, HIDDEN)}
            self.others["b"] = b.weight(1, 2 * gates * HIDDEN)
        axes = b.constant([0])
        lifted = [b.op("Unsqueeze", value, axes) for value in (x, *states)]
        weights = [self.others[name] for name in "wrb"]
        attributes = {"hidden_size": HIDDEN}
        if kind == "GRU":
            attributes["linear_before_reset"] = int(self.spelling.kind == "GRU")
        node = ir.node(kind, [lifted[0], *weights, None, *lifted[1:]], attributes, num_outputs=1 + len(states))
        node.name = f"step{len(b.nodes)}"
        for n, output in enumerate(node.outputs):
            output.name = f"{node.name}_{n}"
        b.nodes.append(node)
        return [b.op("Squeeze", output, axes) for output in node.outputs[1:]]

    def _lstm(self, x: ir.Value, h: ir.Value, c: ir.Value) -> list[ir.Value]:
        b = self.b
        i, f, g, o = self._all_gates(x, h, 4)
        kept = b.op("Mul", b.op("Sigmoid", f), c)
        state = b.op("Add", kept, b.op("Mul", b.op("Sigmoid", i), b.op("Tanh", g)))
        return [b.op("Mul", b.op("Sigmoid", o), b.op("Tanh", state)), state]

    def _gru(self, x: ir.Value, h: ir.Value) -> ir.Value:
        b = self.b
        r, z = (b.op("Sigmoid", gate) for gate in self._all_gates(x, h, 2))
        if self.spelling.kind == "GRU before":
            new = b.op("Tanh", self._sum(x, b.op("Mul", r, h), 2, 1))
        else:
            own = self._slice(x, 2, 1) if self.spelling.products == "projected" else None
            own = own or self._projected(x, self.w, self.bw, 2, 1)
            new = b.op("Tanh", b.op("Add", own, b.op("Mul", r, self._projected(h, self.r, self.br, 2, 1))))
        if self.spelling.blend:
            return b.op("Add", b.op("Mul", b.op("Sub", h, new), z), new)
        one = b.constant(1.0, np.float32)
        return b.op("Add", b.op("Mul", b.op("Sub", one, z), new), b.op("Mul", z, h))

    # -- the layer -------------------------------------------------------------------------------------------------

    def initial(self) -> list[ir.Value]:
        """The initial states."""
        if self.spelling.initial:
            return list(self.states)
        axis = 0 if self.spelling.batch_first else 1
        size = self.b.op("Shape", self.x, start=axis, end=axis + 1)
        shape = self.b.op("Concat", size, self.b.constant([HIDDEN]), axis=0)
        return [self.b.op("ConstantOfShape", shape) for _ in self.states]

    def sequence(self) -> ir.Value:
        """What is cut into steps."""
        if self.spelling.products != "projected":
            return self.x
        return self.b.op("Add", self.b.op("MatMul", self.x, self.w), self.bw)

    def _steps(self, sequence: ir.Value) -> list[ir.Value]:
        b, axis = self.b, self.axis
        if self.spelling.stepping == "gather":
            return [b.op("Gather", sequence, b.constant(n), axis=axis) for n in range(STEPS)]
        if self.spelling.stepping == "split":
            node = ir.node("Split", [sequence], {"axis": axis, "num_outputs": STEPS}, num_outputs=STEPS)
            node.name = "split"
            for n, output in enumerate(node.outputs):
                output.name = f"piece{n}"
            b.nodes.append(node)
            return [b.op("Squeeze", piece, b.constant([axis])) for piece in node.outputs]
        pieces = [b.op("Slice", sequence, *(b.constant([m]) for m in (n, n + 1, axis))) for n in range(STEPS)]
        return [b.op("Squeeze", piece, b.constant([axis])) for piece in pieces]

    def unrolled(self) -> list[ir.Value]:
        """All states stacked, where asked, and the last ones."""
        states, sequence, found = self.initial(), self.sequence(), []
        steps = self._steps(sequence)
        for x in steps[::-1] if self.spelling.reverse else steps:
            states = self.step(x, states)
            found.append(states[0])
        if not self.spelling.stacked:
            return states
        ordered = found[::-1] if self.spelling.reverse else found
        axes = self.b.constant([self.axis])
        return [self.b.op("Concat", *(self.b.op("Unsqueeze", h, axes) for h in ordered), axis=self.axis), *states]

    def _body(self, x: ir.Value, before: list[ir.Value], given: list[ir.Value], first: list[ir.Value]) -> ir.Graph:
        """The graph of a loop whose step reads ``x``; what was written since is in it."""
        after = self.step(x, before)
        outputs = [*first, *after]
        if self.spelling.stacked:
            outputs.append(self.b.op("Identity", after[0]))
        return ir.Graph(given, outputs, nodes=[], opset_imports={"": 18}, name="body")

    def scan(self) -> list[ir.Value]:
        """The results of a Scan."""
        states, sequence = self.initial(), self.sequence()
        batch = self.spelling.batch or "batch"
        width = self.gates * HIDDEN if self.spelling.products == "projected" else INPUTS
        x, outer = _value("xt", [batch, width]), self.b.nodes
        before = [_value(f"b{n}", [batch, HIDDEN]) for n in range(len(states))]
        self.b.nodes = _Numbered(len(outer))
        graph = self._body(x, before, [*before, x], [])
        graph.extend(self.b.nodes)
        self.b.nodes = outer
        backwards = int(self.spelling.reverse)
        stacks = int(self.spelling.stacked)
        node = ir.node(
            "Scan",
            [*states, sequence],
            {
                "body": graph,
                "num_scan_inputs": 1,
                "scan_input_axes": [self.axis],
                "scan_input_directions": [backwards],
                **({"scan_output_axes": [self.axis], "scan_output_directions": [backwards]} if stacks else {}),
            },
            num_outputs=len(states) + stacks,
        )
        return self._looped(node, len(states))

    def loop(self) -> list[ir.Value]:
        """The results of a Loop."""
        states, sequence, batch = self.initial(), self.sequence(), self.spelling.batch or "batch"
        trips = self.b.op("Squeeze", self.b.op("Shape", sequence, start=self.axis, end=self.axis + 1))
        go, outer = self.b.constant(True, np.bool_), self.b.nodes
        counter, given = _value("t", [], ir.DataType.INT64), _value("go", [], ir.DataType.BOOL)
        before = [_value(f"b{n}", [batch, HIDDEN]) for n in range(len(states))]
        self.b.nodes = _Numbered(len(outer))
        x = self.b.op("Gather", sequence, counter, axis=self.axis)
        graph = self._body(x, before, [counter, given, *before], [self.b.op("Identity", given)])
        graph.extend(self.b.nodes)
        self.b.nodes = outer
        node = ir.node(
            "Loop", [trips, go, *states], {"body": graph}, num_outputs=len(states) + int(self.spelling.stacked)
        )
        return self._looped(node, len(states))

    def _looped(self, node: ir.Node, states: int) -> list[ir.Value]:
        node.name = "loop"
        for n, output in enumerate(node.outputs):
            output.name = f"looped{n}"
        self.b.nodes.append(node)
        return [*node.outputs[states:], *node.outputs[:states]]

    def module(self, results: list[ir.Value] | None = None) -> Module:
        """The model, of what ``results`` or the spelling's form give."""
        found = results if results is not None else getattr(self, self.spelling.form)()
        outputs = [self.b.op("Identity", value) for value in found]
        for n, output in enumerate(outputs):
            stacked = results is None and self.spelling.stacked and n == 0
            output.name, output.type = f"y{n}", ir.TensorType(_FLOAT)
            output.shape = ir.Shape([None] * (3 if stacked else 2))
        inputs = [self.x, *(self.states if self.spelling.initial else [])]
        model = self.b.model(inputs, outputs)
        model.graph.opset_imports[""] = 23
        return Module(model)


class _Numbered(list[Any]):
    """Nodes of a body: numbered on from those outside, so that names stay apart."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self._start = start + 1000

    def __len__(self) -> int:
        return self._start + super().__len__()


def _value(name: str, shape: list[Any], dtype: ir.DataType = _FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def build(spelling: Spelling, seed: int = 0) -> Module:
    """A layer as a module."""
    return Writer(spelling, seed).module()
