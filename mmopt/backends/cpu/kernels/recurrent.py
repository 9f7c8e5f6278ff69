"""The recurrent step of LSTM, GRU and RNN: all gates of a vector of hidden units in one register tile.

The products of the inputs with W for all steps come in as one matrix, computed beforehand. What is left for a step is
h·R, and the cell's update while the gates are still in registers. R is stored as ``[directions, panels, H, gates, B]``
with B the lanes of a vector, so that a panel yields every gate of B hidden units.

    LSTM  c' = f∘c + i∘g,  h' = o∘tanh(c')          GRU  h' = (1 − z)∘n + z∘h          RNN  h' = f(x + h·R)

Directions and tiles of the batch are independent and run in parallel; when there is only one of them, the panels of
each step do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor, index
from mmopt.backends.cpu.kernels.tile import RegisterTile
from mmopt.backends.cpu.loops import i64, keep, loop, loops, product, seq, static, when
from mmopt.backends.expressions import simplify

PARALLEL_UNITS = 128
"""Hidden units from which forking threads at every step pays."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """What distinguishes the recurrent operators.

    Attributes:
        gates: Gates computed from h·R together.
        late: Gates of a second product that needs the first one's results (GRU with the reset before the product).
        cell_state: Whether there is a second state.
        update: ``update(point, products)``: the statements that finish one lane; ``products`` are the gates' h·R.
        before_late: Like ``update``, for the first product when ``late``.
    """

    gates: int
    late: int
    cell_state: bool
    update: Callable[[Point, Sequence[Expr]], Stmt]
    before_late: Callable[[Point, Sequence[Expr]], Stmt] | None = None


@dataclasses.dataclass
class Point:
    """One lane of one hidden unit at one step, with access to everything the update may need.

    Attributes:
        direction: Direction (a constant, so that activations may differ).
        x: ``x(gate)``: the input's product for a gate, bias included.
        h: Hidden state before the step.
        c: Cell state before the step (LSTM).
        z: Update gate kept from the first product (GRU with ``late``).
        unit: Index of the hidden unit, for peepholes and biases.
        set_h: Store the new hidden state (also as the step's output).
        set_c: Store the new cell state.
        set_first: Store (z, r∘h) for the second product.
    """

    direction: int
    x: Callable[[int], Expr]
    h: Expr
    c: Expr | None
    z: Expr | None
    unit: Expr
    set_h: Callable[[Expr], Stmt]
    set_c: Callable[[Expr], Stmt]
    set_first: Callable[[Expr, Expr], Stmt]


class Recurrence(LoopNest):
    """All steps of all directions.

    Args:
        x: ``[steps, batch, directions, panels, gates, B]``, biases added.
        r: ``[directions, panels, H, gates·B]`` for the first product.
        late_r: The same for the second product, or None.
        h0: Initial hidden state ``[directions, batch, H]``, or None for zeros.
        c0: Initial cell state, or None.
        lengths: Steps of each sequence ``[batch]``, or None when all take every step.
        cell: The operator.
        hidden: H.
        backward: For each direction, whether it runs from the end.
        extra: Further tensors the update reads (peepholes, biases of the recurrent product).
    """

    name = "recurrence"

    def __init__(
        self,
        x: Tensor,
        r: Tensor,
        late_r: Tensor | None,
        *,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        cell: Cell,
        hidden: int,
        backward: Sequence[bool],
        extra: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        given = (x, r, late_r, h0, c0, lengths, *extra)
        self.inputs = tuple(dict.fromkeys(t for t in given if t is not None))
        self.x, self.r, self.late_r, self.h0, self.c0, self.lengths = x, r, late_r, h0, c0, lengths
        self.cell, self.hidden, self.backward = cell, hidden, tuple(backward)
        self.steps, self.batch = x.shape[0], x.shape[1]
        self.lanes = static(x.shape[-1]) or 1
        self.panels = static(x.shape[3]) or 1
        directions = len(self.backward)
        self.y = self.result((self.steps, directions, self.batch, index(hidden)), x.dtype, "Y")
        self.last_h = self.result((directions, self.batch, index(hidden)), x.dtype, "Y_h")
        self.last_c = self.result((directions, self.batch, index(hidden)), x.dtype, "Y_c") if cell.cell_state else None

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return {"lanes": self.lanes, "panels": self.panels, "gates": self.cell.gates + self.cell.late}

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        """Parallel over directions and tiles of the batch, or over the panels of every step."""
        rows = self._rows()
        tiles = simplify(tirx.floordiv(self.batch + (rows - 1), i64(rows)))
        pieces = static(simplify(tiles * len(self.backward)))
        by_panel = pieces is not None and pieces < 2 and self.hidden >= PARALLEL_UNITS
        kind = "serial" if by_panel else "parallel"

        def piece(flat: Expr) -> Stmt:
            tile = tirx.floormod(flat, tiles)
            direction = tirx.floordiv(flat, tiles)
            runs = [_Run(self, sinks, d, tile * rows, rows, by_panel).emit() for d in range(len(self.backward))]
            return runs[0] if len(runs) == 1 else when(direction.equal(i64(0)), runs[0], runs[1])

        return loop(simplify(product([tiles, i64(len(self.backward))])), piece, kind, "piece")

    def _rows(self) -> int:
        most = max(1, 28 // max(self.cell.gates, self.cell.late, 1))
        count = static(self.batch)
        return -(-count // -(-count // min(most, 8))) if count else min(most, 4)


class _Run:
    """Every step of one direction for one tile of the batch."""

    def __init__(
        self, nest: Recurrence, sinks: Sequence[Sink], direction: int, first: Expr, rows: int, by_panel: bool
    ) -> None:
        self.nest, self.sinks, self.direction = nest, sinks, direction
        self.first, self.rows, self.by_panel = first, rows, by_panel
        whole = static(nest.batch)
        self.limit = None if whole is not None and whole % rows == 0 else nest.batch - first
        width = nest.panels * nest.lanes
        dtype = nest.y.dtype
        self.h = tirx.decl_buffer((i64(2), i64(rows), i64(width)), dtype, "h")
        self.c = tirx.decl_buffer((i64(rows), i64(width)), dtype, "c") if nest.cell.cell_state else None
        self.z = tirx.decl_buffer((i64(rows), i64(width)), dtype, "z") if nest.cell.late else None
        self.rh = tirx.decl_buffer((i64(rows), i64(width)), dtype, "rh") if nest.cell.late else None

    def emit(self) -> Stmt:
        buffers = [b for b in (self.h, self.c, self.z, self.rh) if b is not None]
        steps = loop(self.nest.steps, self._step, name="t")
        return seq(*(tirx.AllocBuffer(b) for b in buffers), self._start(), steps, self._end())

    def _row(self, i: Expr) -> Expr:
        """Position in the batch of row ``i``; a legal one for rows beyond the batch."""
        return self.first + i if self.limit is None else tirx.min(self.first + i, self.nest.batch - 1)

    def _start(self) -> Stmt:
        nest = self.nest

        def initial(source: Tensor | None, i: Expr, u: Expr) -> Expr:
            zero = tirx.const(0, nest.y.dtype)
            if source is None:
                return zero
            value = source[(i64(self.direction), self._row(i), tirx.min(u, i64(nest.hidden - 1)))]
            return tirx.Select(u < nest.hidden, value, zero)

        def unit(i: Expr, u: Expr) -> Stmt:
            hidden = tirx.BufferStore(self.h, initial(nest.h0, i, u), [i64(0), i, u])
            return seq(hidden, None if self.c is None else tirx.BufferStore(self.c, initial(nest.c0, i, u), [i, u]))

        return loops([i64(self.rows), i64(nest.panels * nest.lanes)], unit, "s")

    def _end(self) -> Stmt:
        """Last states; zeros for a sequence without steps, as onnxruntime has it (the standard leaves it open)."""
        nest = self.nest
        parity = tirx.floormod(nest.steps, i64(2))

        def given(i: Expr, value: Expr) -> Expr:
            if nest.lengths is None:
                return value
            length = nest.lengths[(self.first + i,)]
            return tirx.Select(length > tirx.const(0, nest.lengths.dtype), value, tirx.const(0, nest.y.dtype))

        def unit(i: Expr, u: Expr) -> Stmt:
            at = (i64(self.direction), self.first + i, u)
            done = self.sinks[1](at, given(i, self.h[parity, i, u]))
            return seq(done, None if self.c is None else self.sinks[2](at, given(i, self.c[i, u])))

        count = i64(self.rows) if self.limit is None else tirx.min(i64(self.rows), self.limit)
        return loops([count, i64(nest.hidden)], unit, "e")

    def _step(self, t: Expr) -> Stmt:
        nest = self.nest
        kind = "parallel" if self.by_panel else "serial"
        old = tirx.floormod(t, i64(2))
        cell = nest.cell
        first = cell.before_late if cell.late else cell.update
        assert first is not None
        gates = loop(
            i64(nest.panels),
            lambda p: self._panel(t, old, p, nest.r, cell.gates, lambda i, k: self.h[old, i, k], first),
            kind,
            "panel",
        )
        if not cell.late:
            return gates
        late_r, rh = nest.late_r, self.rh
        assert late_r is not None
        assert rh is not None

        def late(panel: Expr) -> Stmt:
            return self._panel(t, old, panel, late_r, cell.late, lambda i, k: rh[i, k], cell.update)

        return seq(gates, loop(i64(nest.panels), late, kind, "panel"))

    def _panel(
        self,
        t: Expr,
        old: Expr,
        panel: Expr,
        weights: Tensor,
        gates: int,
        state: Callable[[Expr, Expr], Expr],
        update: Callable[[Point, Sequence[Expr]], Stmt],
    ) -> Stmt:
        nest = self.nest

        def b(n: Expr, v: Expr, k: Expr) -> Expr:
            return weights[(i64(self.direction), panel, k, n * nest.lanes + v)]

        def deliver(i: Expr, v: Expr, products: Sequence[Expr]) -> Stmt:
            return self._unit(t, old, panel, i, v, products, update)

        def emit(used: int) -> Stmt:
            tile = RegisterTile(nest.y.dtype, self.rows, [nest.lanes] * gates, nest.lanes, self.limit)
            return tile.emit_rows([i64(nest.hidden)], state, b, deliver, used)

        full, rest = divmod(nest.hidden, nest.lanes)
        if not rest:
            return emit(nest.lanes)
        return when(panel < full, emit(nest.lanes), emit(rest)) if full else emit(rest)

    def _unit(
        self,
        t: Expr,
        old: Expr,
        panel: Expr,
        i: Expr,
        v: Expr,
        products: Sequence[Expr],
        update: Callable[[Point, Sequence[Expr]], Stmt],
    ) -> Stmt:
        """Finish one lane: read the inputs of its step, update, and keep the old state once the sequence has ended."""
        nest = self.nest
        unit = panel * nest.lanes + v
        backward = nest.backward[self.direction]
        row = self._row(i)
        length = nest.steps if nest.lengths is None else nest.lengths[(row,)].astype("int64")
        live = None if nest.lengths is None else t < length
        where = (length - 1 - t) if backward else t
        read_at = where if live is None else tirx.max(where, i64(0))
        new = i64(1) - old
        before = self.h[old, i, unit]

        def put(buffer: tirx.Buffer, at: list[Expr], value: Expr, keep: Expr) -> Stmt:
            return tirx.BufferStore(buffer, value if live is None else tirx.Select(live, value, keep), at)

        def set_h(value: Expr) -> Stmt:
            computed, hidden = keep(value, "hidden")
            kept = put(self.h, [new, i, unit], hidden, before)
            return seq(computed, kept, self._output(t, where, live, row, unit, hidden))

        def set_c(value: Expr) -> Stmt:
            assert self.c is not None
            return put(self.c, [i, unit], value, self.c[i, unit])

        def set_first(z: Expr, rh: Expr) -> Stmt:
            assert self.z is not None
            assert self.rh is not None
            return seq(tirx.BufferStore(self.z, z, [i, unit]), tirx.BufferStore(self.rh, rh, [i, unit]))

        def x(gate: int) -> Expr:
            return nest.x[(read_at, row, i64(self.direction), panel, i64(gate), v)]

        point = Point(
            self.direction,
            x,
            before,
            None if self.c is None else self.c[i, unit],
            None if self.z is None else self.z[i, unit],
            unit,
            set_h,
            set_c,
            set_first,
        )
        return update(point, products)

    def _output(self, t: Expr, where: Expr, live: Expr | None, row: Expr, unit: Expr, value: Expr) -> Stmt:
        """Y at this step; zero beyond the end of a sequence."""
        nest = self.nest
        if live is None:
            return self.sinks[0]((where, i64(self.direction), row, unit), value)
        at = tirx.Select(live, where, t)
        masked = tirx.Select(live, value, tirx.const(0, nest.y.dtype))
        return self.sinks[0]((at, i64(self.direction), row, unit), masked)
