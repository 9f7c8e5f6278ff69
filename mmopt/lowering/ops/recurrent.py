"""LSTM, GRU and RNN: one product for the inputs of all steps, then the recurrence template."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import Map, Tensor, index
from mmopt.backends.cpu.choosing import Candidate, Workload, dim, typical
from mmopt.backends.cpu.intrinsics import sigmoid_quotient, tanh_quotient
from mmopt.backends.cpu.kernels import recurrent_dot
from mmopt.backends.cpu.kernels.recurrent import BLOCK, Cell, Point, Recurrence, candidates
from mmopt.backends.cpu.kernels.tile import lanes_of
from mmopt.backends.cpu.loops import i64, keep, seq, static
from mmopt.lowering.ops.casting import converted
from mmopt.lowering.ops.matmul import product_of
from mmopt.lowering.ops.recurrent_narrow import (
    byte_rows,
    integer_product,
    is_zero,
    packed_rows,
    projected_integers,
    state_step,
)
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import NotLowered, Value

Activation = Callable[[Expr], Expr]

Keep = Callable[[Expr], Expr]
"""Stores a value for repeated use and gives the expression that reads it."""


@dataclasses.dataclass(frozen=True)
class Quotient:
    """A value that is still to be divided, so that a product of several is divided once.

    Attributes:
        top: Numerator.
        bottom: Denominator, or None for 1.
    """

    top: Expr
    bottom: Expr | None = None

    @property
    def value(self) -> Expr:
        return self.top if self.bottom is None else self.top / self.bottom

    def times(self, other: Quotient) -> Quotient:
        """The product."""
        if self.bottom is None or other.bottom is None:
            return Quotient(self.top * other.top, self.bottom if other.bottom is None else other.bottom)
        return Quotient(self.top * other.top, self.bottom * other.bottom)


def _const(x: Expr, value: float) -> Expr:
    return tirx.const(value, str(x.ty))


def activation(name: str, alpha: float | None, beta: float | None) -> Activation:
    """The activation function ``name`` of the recurrent operators.

    Raises:
        NotLowered: Not one of the standard's.
    """

    def pick(value: float | None, default: float) -> float:
        return default if value is None else value

    table: dict[str, Activation] = {
        "sigmoid": tirx.sigmoid,
        "tanh": tirx.tanh,
        "relu": lambda x: tirx.max(x, _const(x, 0)),
        "affine": lambda x: x * _const(x, pick(alpha, 1.0)) + _const(x, pick(beta, 0.0)),
        "leakyrelu": lambda x: tirx.Select(x < _const(x, 0), x * _const(x, pick(alpha, 0.01)), x),
        "thresholdedrelu": lambda x: tirx.Select(x > _const(x, pick(alpha, 1.0)), x, _const(x, 0)),
        "scaledtanh": lambda x: tirx.tanh(x * _const(x, pick(beta, 1.0))) * _const(x, pick(alpha, 1.0)),
        "hardsigmoid": lambda x: tirx.max(
            _const(x, 0), tirx.min(_const(x, 1), x * _const(x, pick(alpha, 0.2)) + _const(x, pick(beta, 0.5)))
        ),
        "elu": lambda x: tirx.Select(x < _const(x, 0), (tirx.exp(x) - _const(x, 1)) * _const(x, pick(alpha, 1.0)), x),
        "softsign": lambda x: x / (_const(x, 1) + tirx.abs(x)),
        "softplus": lambda x: tirx.log(tirx.exp(x) + _const(x, 1)),
    }
    if name.lower() not in table:
        raise NotLowered(f"recurrent activation {name}")
    return table[name.lower()]


def stored(node: OpNode, weight: Value) -> Value:
    """A weight as it is stored: narrow, when it is a constant that was widened; floats, when it was dequantized."""
    if weight.quantized is not None:
        return node.context.program.widened(weight.quantized, weight.quantized.value.name) or weight
    return weight.narrow if weight.narrow is not None and weight.narrow.constant is not None else weight


class _Layer:
    """Inputs and attributes of a recurrent node in a common form."""

    def __init__(self, node: OpNode, gates: int, defaults: Sequence[str]) -> None:
        self.node, self.gates = node, gates
        x, self.w, self.r = node.input(0), stored(node, node.input(1)), stored(node, node.input(2))
        self.w_bytes, self.r_bytes = byte_rows(node.input(1)), byte_rows(node.input(2))
        if x.dtype not in ("float32", "float64"):
            raise NotLowered(f"recurrent operator in {x.dtype}")
        self.batch_first = bool(node.attr("layout", 0))
        self.x = _swap(node, x) if self.batch_first else x
        self.bias, self.lengths = node.optional(3), node.optional(4)
        directions = static(self.r.shape[0])
        hidden = static(self.r.shape[2])
        if directions is None or not hidden:
            raise NotLowered("number of directions or hidden units is not known")
        self.directions, self.hidden = directions, hidden
        templates = node.context.program.templates
        self.nest = Recurrence if templates is None else templates.recurrence
        self.lanes = lanes_of(node.context.program.profile, x.dtype) if templates is None else templates.lanes
        self.panels = -(-hidden // self.lanes)
        direction = node.attr("direction", "forward")
        self.backward = {"forward": [False], "reverse": [True]}.get(direction, [False, True])
        self.activations = self._activations(defaults)
        self.clip = node.attr("clip")
        self.step = self._state_step()

    def _state_step(self) -> float | None:
        """The step of the state, where products with it are of integers."""
        profile = self.node.context.program.profile
        here = self.nest is Recurrence and profile.kind in ("cpu", "arm")
        if not here or self.r_bytes is None or self.batch_first:
            return None
        covered = self.x.dtype == "float32" and recurrent_dot.instructions(profile)
        return state_step(self.node.optional(5)) if covered else None

    def _activations(self, defaults: Sequence[str]) -> list[list[Activation]]:
        count = len(defaults)
        names = self.node.attr("activations") or list(defaults) * self.directions
        alphas = list(self.node.attr("activation_alpha") or [])
        betas = list(self.node.attr("activation_beta") or [])
        made: list[Activation] = []
        for name in names:
            alpha = alphas.pop(0) if alphas and name.lower() in _WITH_ALPHA else None
            beta = betas.pop(0) if betas and name.lower() in _WITH_BETA else None
            made.append(activation(name, alpha, beta))
        return [made[d * count : (d + 1) * count] for d in range(self.directions)]

    def act(self, which: int, direction: int, x: Expr, bind: _Bindings) -> Quotient:
        """Activation ``which`` of a direction, after clipping."""
        if self.clip is not None:
            x = tirx.max(tirx.min(x, _const(x, self.clip)), _const(x, -self.clip))
        return self.squash(which, direction, x, bind)

    def squash(self, which: int, direction: int, x: Expr, bind: _Bindings) -> Quotient:
        """Activation ``which`` of a direction."""
        function = self.activations[direction][which]
        as_quotient = _QUOTIENTS.get(function) if str(x.ty) == "float32" else None
        return Quotient(function(x)) if as_quotient is None else Quotient(*as_quotient(bind(x), bind))

    def state(self, position: int) -> Tensor | None:
        """An initial state as ``[directions, batch, H]`` in memory."""
        value = self.node.optional(position)
        if value is None or is_zero(value):
            return None
        return self.node.context.dense(_swap(self.node, value) if self.batch_first else value)

    def projected(self, biases: Sequence[tuple[int, int]]) -> Tensor:
        """X·W for all steps, with the biases of ``biases`` (gate, first row of B in units of H) added.

        Returns:
            ``[steps, batch, directions, panels, gates, lanes]`` in memory.
        """
        context = self.node.context
        width = self.directions * self.panels * self.gates * self.lanes
        made = None
        if self.w_bytes is not None and context.program.templates is None:
            made = projected_integers(self.node, self.x, self.w_bytes, self.arrange, self.gates)
        flat = made or product_of(self.node, self.x, self._arranged_input_weight(width))
        shape = (*self.x.shape[:2], index(self.directions), index(self.panels), index(self.gates), index(self.lanes))
        if self.bias is not None:
            flat = self._with_bias(flat, biases)
        context.realize([flat], "projection")
        return context.dense(context.reshape(flat, shape))

    def _arranged_input_weight(self, width: int) -> Value:
        depth = self.x.shape[2]
        if self.w.constant is not None:
            key = ("input", self.gates, self.lanes)
            pack = lambda w: np.moveaxis(self.arrange(w, range(self.gates)), -1, 0).reshape(-1, width)  # noqa: E731
            packed = self.node.context.program.packed(self.w, key, pack)
            made = Value(constant=packed.data, name=f"{self.w.name}.arranged")
            made.widened = packed.widened
            if made.dtype == self.x.dtype:
                return made
            narrow = self.x.narrow is not None and self.x.narrow.dtype == made.dtype
            wide = converted(self.node, made, self.x.dtype)
            return wide if narrow else Value(constant=packed.data.astype(self.x.dtype), name=made.name)
        w = self.node.context.tensor(self.w)

        def body(k: Expr, column: Expr) -> Expr:
            d, gate, unit = self._split(column)
            row = gate * self.hidden + tirx.min(unit, i64(self.hidden - 1))
            return tirx.Select(unit < self.hidden, w[(d, row, k)], tirx.const(0, self.w.dtype))

        return Value(Map((depth, index(width)), self.w.dtype, body, "arrange"))

    def _split(self, column: Expr) -> tuple[Expr, Expr, Expr]:
        """(direction, gate, hidden unit) of a column of the arranged projection."""
        lane = tirx.floormod(column, i64(self.lanes))
        rest = tirx.floordiv(column, i64(self.lanes))
        gate = tirx.floormod(rest, i64(self.gates))
        rest = tirx.floordiv(rest, i64(self.gates))
        return tirx.floordiv(rest, i64(self.panels)), gate, tirx.floormod(rest, i64(self.panels)) * self.lanes + lane

    def _with_bias(self, flat: Value, biases: Sequence[tuple[int, int]]) -> Value:
        assert self.bias is not None
        if self.bias.constant is not None:
            data = np.zeros((self.directions, self.panels * self.lanes, self.gates), self.bias.constant.dtype)
            for gate, start in biases:
                data[:, : self.hidden, gate] += self.bias.constant[:, start * self.hidden : (start + 1) * self.hidden]
            split = data.reshape(self.directions, self.panels, self.lanes, self.gates).swapaxes(2, 3)
            addend = Value(constant=np.ascontiguousarray(split.reshape(-1)), name=f"{self.bias.name}.arranged").tensor
            return Value(Map(flat.shape, flat.dtype, lambda t, n, j, y=flat.tensor: y[t, n, j] + addend[j], "bias"))
        source = self.node.context.dense(self.bias)

        def body(t: Expr, n: Expr, column: Expr) -> Expr:
            d, gate, unit = self._split(column)
            total = flat.tensor[t, n, column]
            for number, start in biases:
                value = source[(d, i64(start * self.hidden) + tirx.min(unit, i64(self.hidden - 1)))]
                total = total + tirx.Select(gate.equal(i64(number)), value, tirx.const(0, flat.dtype))
            return total

        return Value(Map(flat.shape, flat.dtype, body, "bias"))

    def arrange(self, weight: np.ndarray, gates: Sequence[int]) -> np.ndarray:
        """``[D, G·H, K]`` → ``[D, panels, gates, lanes, K]`` for the chosen gates, hidden units zero-padded."""
        depth = weight.shape[2]
        split = weight.reshape(self.directions, -1, self.hidden, depth)[:, list(gates)]
        padded = np.zeros((self.directions, len(gates), self.panels * self.lanes, depth), weight.dtype)
        padded[:, :, : self.hidden] = split
        return padded.reshape(self.directions, len(gates), self.panels, self.lanes, depth).transpose(0, 2, 1, 3, 4)

    def recurrent(self, gates: Sequence[int], vectors: int) -> Tensor:
        """R for the chosen gates, in groups of ``vectors``, as ``[D, panels, groups, H, vectors·lanes]`` in memory."""
        context = self.node.context
        groups, width = len(gates) // vectors, vectors * self.lanes
        if self.r.constant is not None:

            def pack(weight: np.ndarray) -> np.ndarray:
                data = self.arrange(weight, gates)
                split = data.reshape(self.directions, self.panels, groups, width, self.hidden)
                return np.moveaxis(split, -1, -2)

            return context.program.packed(self.r, ("recurrent", tuple(gates), self.lanes, vectors), pack)
        r = context.tensor(self.r)
        first = gates[0]

        def body(d: Expr, panel: Expr, group: Expr, k: Expr, column: Expr) -> Expr:
            gate = group * vectors + tirx.floordiv(column, i64(self.lanes)) + first
            unit = panel * self.lanes + tirx.floormod(column, i64(self.lanes))
            row = gate * self.hidden + tirx.min(unit, i64(self.hidden - 1))
            return tirx.Select(unit < self.hidden, r[(d, row, k)], tirx.const(0, self.r.dtype))

        shape = [index(n) for n in (self.directions, self.panels, groups, self.hidden, width)]
        return context.dense(Value(Map(shape, self.r.dtype, body, "arrange")))

    def _choose(self, cell: Cell) -> tuple[Workload | None, Candidate]:
        """The register tile of a step's product; other targets than a CPU take all gates together."""
        if self.nest is not Recurrence:
            return None, Candidate({"rows": 1, "vectors": cell.gates}, 0.0)
        steps, batch = dim(self.x.shape[0]), dim(self.x.shape[1])
        workload = self._workload("recurrence", cell, (self.x.dtype,))
        program = self.node.context.program
        offered = candidates(program.profile, self.x.dtype, cell.gates, self.hidden, batch)
        steps_each = typical(steps) * self.directions * -(-typical(batch, BLOCK) // BLOCK)
        whole = [Candidate(c.parameters, c.cycles * steps_each) for c in offered]
        return workload, program.chooser.choose(workload, whole)

    def _integers(self, cell: Cell, step: float) -> tuple[dict[str, Any], Workload]:
        """Arguments of the template for a state in integers."""
        assert self.r_bytes is not None
        profile, chooser = self.node.context.program.profile, self.node.context.program.chooser
        steps, batch = dim(self.x.shape[0]), dim(self.x.shape[1])
        workload = self._workload("recurrence_int8", cell, ("int8", "int8", "int32"))
        offered = recurrent_dot.candidates(profile, cell.gates, self.hidden, batch, BLOCK)
        often = typical(steps) * self.directions * -(-typical(batch, BLOCK) // BLOCK)
        best = chooser.choose(workload, [Candidate(c.parameters, c.cycles * often) for c in offered])
        dot = next(d for d in recurrent_dot.instructions(profile) if d.name == best["instruction"])
        first, late = list(range(cell.gates)), list(range(cell.gates, cell.gates + cell.late))
        given: dict[str, Any] = {
            "r": packed_rows(self.node, self.r_bytes, self.arrange, first, best.number("vectors"), dot),
            "late_r": packed_rows(self.node, self.r_bytes, self.arrange, late, 1, dot) if late else None,
            "rows": best.number("rows"),
            "integers": integer_product(self.r_bytes, self.arrange, self.hidden, cell.gates, cell.late, step, dot),
        }
        return given, workload

    def _workload(self, name: str, cell: Cell, dtypes: tuple[str, ...]) -> Workload:
        steps, batch, gates = dim(self.x.shape[0]), dim(self.x.shape[1]), cell.gates + cell.late
        dims = (("steps", steps), ("batch", batch), ("directions", self.directions), ("hidden", self.hidden))
        adds = typical(steps) * typical(batch, BLOCK) * self.directions * gates * self.hidden**2
        return Workload(name, (*dims, ("gates", gates), ("late", cell.late)), dtypes, 2.0 * adds)

    def _floats(self, cell: Cell) -> tuple[dict[str, Any], Workload | None]:
        """Arguments of the template for a state in floats."""
        workload, best = self._choose(cell)
        late = list(range(cell.gates, cell.gates + cell.late))
        given: dict[str, Any] = {
            "r": self.recurrent(range(cell.gates), best.number("vectors")),
            "late_r": self.recurrent(late, len(late)) if late else None,
            "rows": best.number("rows"),
        }
        return given, workload

    def run(self, cell: Cell, x: Tensor, c0: Tensor | None, extra: Sequence[Tensor]) -> list[Value]:
        """Emit the recurrence and give Y, Y_h and, for LSTM, Y_c."""
        lengths = None if self.lengths is None else self.node.context.dense(self.lengths)
        given, workload = self._floats(cell) if self.step is None else self._integers(cell, self.step)
        nest = self.nest(
            x,
            h0=self.state(5),
            c0=c0,
            lengths=lengths,
            cell=cell,
            hidden=self.hidden,
            backward=self.backward,
            extra=extra,
            **given,
        )
        nest.workload = workload
        values = [Value(result, name=self.node.name) for result in nest.results]
        self.node.context.realize(values, self.node.op_type)
        if not self.batch_first:
            return values
        y = values[0].tensor
        shape = (y.shape[2], y.shape[0], y.shape[1], y.shape[3])
        moved = Value(Map(shape, y.dtype, lambda n, t, d, u: y[t, d, n, u], "layout"))
        return [moved, *(_swap(self.node, v) for v in values[1:])]


class _Bindings:
    """Names intermediate results, so that generated code stays as small as the formula."""

    def __init__(self) -> None:
        self.statements: list[Stmt] = []

    def __call__(self, value: Expr) -> Expr:
        statement, kept = keep(value, f"gate{len(self.statements)}")
        self.statements.append(statement)
        return kept


_QUOTIENTS: dict[Activation, Callable[[Expr, Keep], tuple[Expr, Expr]]] = {
    tirx.sigmoid: sigmoid_quotient,
    tirx.tanh: tanh_quotient,
}

_WITH_ALPHA = {"affine", "leakyrelu", "thresholdedrelu", "scaledtanh", "hardsigmoid", "elu"}
_WITH_BETA = {"affine", "scaledtanh", "hardsigmoid"}


def _swap(node: OpNode, value: Value) -> Value:
    """Exchange the first two of three axes."""
    tensor = node.context.tensor(value)
    shape = (value.shape[1], value.shape[0], value.shape[2])
    return Value(Map(shape, value.dtype, lambda a, b, c: tensor[b, a, c], "layout"))


@lowers("LSTM")
def lstm(node: OpNode) -> list[Value]:
    """Gates in ONNX's order: input, output, forget, cell."""
    layer = _Layer(node, 4, ("Sigmoid", "Tanh", "Tanh"))
    coupled = bool(node.attr("input_forget", 0))
    peepholes = None if node.optional(7) is None else node.context.dense(node.input(7))

    def peep(point: Point, which: int, c: Expr) -> Expr | None:
        if peepholes is None:
            return None
        return peepholes[(i64(point.direction), i64(which * layer.hidden) + point.unit)] * c

    def total(point: Point, gate: int, product: Expr, extra: Expr | None) -> Expr:
        base = point.x(gate) + product
        return base if extra is None else base + extra

    def update(point: Point, products: Sequence[Expr]) -> Stmt:
        c, d, bind = point.c, point.direction, _Bindings()
        assert c is not None
        i = layer.act(0, d, total(point, 0, products[0], peep(point, 0, c)), bind)
        if coupled:
            i = Quotient(bind(i.value))
            f = bind(_const(c, 1) - i.top)
        else:
            f = bind(layer.act(0, d, total(point, 2, products[2], peep(point, 2, c)), bind).value)
        g = layer.act(1, d, total(point, 3, products[3], None), bind)
        new_c = bind(f * c + i.times(g).value)
        o = layer.act(0, d, total(point, 1, products[1], peep(point, 1, new_c)), bind)
        new_h = o.times(layer.squash(2, d, new_c, bind)).value
        return seq(*bind.statements, point.set_c(new_c), point.set_h(new_h))

    cell = Cell(gates=4, late=0, cell_state=True, update=update)
    x = layer.projected([(g, g) for g in range(4)] + [(g, 4 + g) for g in range(4)])
    extra = () if peepholes is None else (peepholes,)
    return layer.run(cell, x, layer.state(6), extra)


@lowers("GRU")
def gru(node: OpNode) -> list[Value]:
    """Gates in ONNX's order: update, reset, hidden."""
    layer = _Layer(node, 3, ("Sigmoid", "Tanh"))
    after = bool(node.attr("linear_before_reset", 0))
    bias = None if layer.bias is None or not after else node.context.dense(layer.bias)

    def hidden_bias(point: Point) -> Expr:
        if bias is None:
            return tirx.const(0, layer.x.dtype)
        return bias[(i64(point.direction), i64(5 * layer.hidden) + point.unit)]

    def blend(point: Point, bind: _Bindings, z: Expr, n: Expr) -> Stmt:
        return seq(*bind.statements, point.set_h((_const(n, 1) - z) * n + z * point.h))

    def together(point: Point, products: Sequence[Expr]) -> Stmt:
        d, bind = point.direction, _Bindings()
        z = bind(layer.act(0, d, point.x(0) + products[0], bind).value)
        r = bind(layer.act(0, d, point.x(1) + products[1], bind).value)
        candidate = bind(point.x(2) + r * (products[2] + hidden_bias(point)))
        return blend(point, bind, z, bind(layer.act(1, d, candidate, bind).value))

    def first(point: Point, products: Sequence[Expr]) -> Stmt:
        d, bind = point.direction, _Bindings()
        z = bind(layer.act(0, d, point.x(0) + products[0], bind).value)
        r = bind(layer.act(0, d, point.x(1) + products[1], bind).value)
        return seq(*bind.statements, point.set_first(z, r * point.h))

    def second(point: Point, products: Sequence[Expr]) -> Stmt:
        assert point.z is not None
        bind = _Bindings()
        n = layer.act(1, point.direction, point.x(2) + products[0], bind)
        return blend(point, bind, point.z, bind(n.value))

    recurrent_biases = [(0, 3), (1, 4)] + ([] if after else [(2, 5)])
    x = layer.projected([(g, g) for g in range(3)] + recurrent_biases)
    if after:
        cell = Cell(gates=3, late=0, cell_state=False, update=together)
        return layer.run(cell, x, None, () if bias is None else (bias,))
    cell = Cell(gates=2, late=1, cell_state=False, update=second, before_late=first)
    return layer.run(cell, x, None, ())


@lowers("RNN")
def rnn(node: OpNode) -> list[Value]:
    """One gate."""
    layer = _Layer(node, 1, ("Tanh",))

    def update(point: Point, products: Sequence[Expr]) -> Stmt:
        bind = _Bindings()
        new_h = layer.act(0, point.direction, point.x(0) + products[0], bind).value
        return seq(*bind.statements, point.set_h(new_h))

    cell = Cell(gates=1, late=0, cell_state=False, update=update)
    return layer.run(cell, layer.projected([(0, 0), (0, 1)]), None, ())
