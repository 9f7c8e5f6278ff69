"""LSTM, GRU and RNN on a GPU: all steps by one kernel where a block can read the weights often enough, else one a step.

A warp sums 32 hidden units, all gates of them, over a slice of the previous state; the slices of a block meet in shared
memory, where the cell is updated at once. Small layers take one launch: a block for each direction and some rows of the
batch goes through all steps, with the states in shared memory. In larger layers each block takes the 32 units of one
panel, and the end of a launch is where blocks meet: once a step, twice for a GRU whose reset comes before the product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import Sink, Tensor
from mmopt.backends.cpu.kernels.recurrent import Point, Recurrence, Run
from mmopt.backends.cpu.loops import i64, keep, loop, seq, static, when
from mmopt.backends.cuda.launching import unless_empty
from mmopt.backends.cuda.threads import WARP, allocate, barrier, each, launch, shared
from mmopt.backends.expressions import itemsize, simplify

RESIDENT = 256 << 10
"""Bytes of recurrent weights up to which one block reads all of them at every step."""

ROWS = 4
"""Rows of the batch that a block takes at most."""

PARTS = 32 << 10
"""Bytes of shared memory for the sums of slices."""

WARPS = 8
"""Warps of a block that takes one panel."""

Update = Callable[[Point, Sequence[Expr]], Stmt]


@dataclasses.dataclass(frozen=True)
class _Product:
    """One of the products of a step: for all gates of some panels.

    Attributes:
        weights: ``[directions, panels, 1, H, gates · 32]``.
        gates: Gates.
        state: ``state(row, k)``: what is multiplied.
        update: Finishes a unit.
    """

    weights: Tensor
    gates: int
    state: Callable[[Expr, Expr], Expr]
    update: Update


@dataclasses.dataclass(frozen=True)
class _Block:
    """What a block of threads does at a step.

    Attributes:
        rows: Rows of the batch.
        panels: Panels, a warp each.
        slices: Parts of the previous state, each of which is multiplied by a warp for every panel.
        parts: ``[slices · panels, gates · rows, 32]`` in shared memory.
    """

    rows: int
    panels: int
    slices: int
    parts: tirx.Buffer

    @property
    def threads(self) -> int:
        return self.panels * self.slices * WARP


class CudaRecurrence(Recurrence):
    """All steps of all directions; arguments as those of :class:`Recurrence`, with 32 lanes and one group of gates."""

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        gates = self.cell.gates + self.cell.late
        return {"rows": self._rows(), "panels": self.panels, "gates": gates, "resident": self._resident()}

    def _rows(self) -> int:
        batch = static(self.batch)
        return ROWS if batch is None else max(1, min(ROWS, batch))

    def _resident(self) -> bool:
        gates = self.cell.gates + self.cell.late
        small = gates * self.hidden * self.panels * WARP * itemsize(self.r.dtype) <= RESIDENT
        return small and self._room(self._rows()) >= self.panels

    def _room(self, rows: int) -> int:
        """Warps whose sums there is room for."""
        gates = max(self.cell.gates, self.cell.late)
        return min(32, PARTS // (gates * rows * WARP * itemsize(self.y.dtype)))

    def _cut(self, panels: int, most: int) -> _Block:
        rows = self._rows()
        slices = max(1, min(self._room(rows), most) // panels)
        gates = max(self.cell.gates, self.cell.late)
        shape = (i64(slices * panels), i64(gates * rows), i64(WARP))
        return _Block(rows, panels, slices, shared(shape, self.y.dtype, "parts"))

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        """One kernel, or one for each step."""
        pieces = simplify(tirx.floordiv(self.batch + (self._rows() - 1), i64(self._rows())))
        made = self._whole(sinks, pieces) if self._resident() else self._stepwise(sinks, pieces)
        return unless_empty(self.batch, made)

    def _each_direction(self, direction: Expr, body: Callable[[int], Stmt]) -> Stmt:
        made = [body(d) for d in range(len(self.backward))]
        return made[0] if len(made) == 1 else when(direction.equal(i64(0)), made[0], made[1])

    # -- one kernel --------------------------------------------------------------------------------------------

    def _whole(self, sinks: Sequence[Sink], pieces: Expr) -> Stmt:
        cut = self._cut(self.panels, 32)

        def block(piece: Expr, direction: Expr, thread: Expr) -> Stmt:
            first = piece * cut.rows
            count = simplify(tirx.min(i64(cut.rows), self.batch - first))
            runs = [_UnitRun(self, sinks, d, first, count, cut.rows, "shared") for d in range(len(self.backward))]
            for run in runs[1:]:
                run.share(runs[0])

            def steps(d: int) -> Stmt:
                def step(t: Expr) -> Stmt:
                    phases = [
                        self._phase(runs[d], p, t, i64(0), i64(0), cut, thread) for p in self._products(runs[d], t)
                    ]
                    return seq(*(part for phase in phases for part in (phase, barrier())))

                run = runs[d]
                before = each(i64(cut.rows * self.panels * WARP), thread, cut.threads, run.begin)
                after = each(i64(cut.rows * self.hidden), thread, cut.threads, run.finish)
                return seq(before, barrier(), loop(self.steps, step, name="t"), after)

            own = [tirx.AllocBuffer(b) for b in (cut.parts, *runs[0].buffers)]
            return seq(*own, self._each_direction(direction, steps))

        return launch([pieces, i64(len(self.backward))], cut.threads, block)

    # -- one kernel for each step ------------------------------------------------------------------------------

    def _stepwise(self, sinks: Sequence[Sink], pieces: Expr) -> Stmt:
        cut, directions = self._cut(1, WARPS), len(self.backward)
        room = simplify(pieces * cut.rows)
        runs = [_UnitRun(self, sinks, d, i64(0), self.batch, room, "global") for d in range(directions)]

        def phase(number: int, t: Expr) -> Stmt:
            def block(panel: Expr, piece: Expr, direction: Expr, thread: Expr) -> Stmt:
                def work(d: int) -> Stmt:
                    product = self._products(runs[d], t)[number]
                    return self._phase(runs[d], product, t, panel, piece * cut.rows, cut, thread)

                return seq(tirx.AllocBuffer(cut.parts), self._each_direction(direction, work))

            return launch([i64(self.panels), pieces, i64(directions)], cut.threads, block)

        def step(t: Expr) -> Stmt:
            return seq(*(phase(n, t) for n in range(2 if self.cell.late else 1)))

        width = self.panels * WARP
        before = [loop(simplify(room * width), run.begin, "parallel", "unit") for run in runs]
        after = [loop(simplify(self.batch * self.hidden), run.finish, "parallel", "unit") for run in runs]
        return seq(
            allocate(*(b for run in runs for b in run.buffers)), *before, loop(self.steps, step, name="t"), *after
        )

    # -- both --------------------------------------------------------------------------------------------------

    def _products(self, run: _UnitRun, t: Expr) -> list[_Product]:
        cell, old = self.cell, tirx.floormod(t, i64(2))
        update = cell.before_late if cell.late else cell.update
        assert update is not None
        first = _Product(self.r, cell.gates, lambda i, k: run.h[old, i, k], update)
        if not cell.late:
            return [first]
        late_r, rh = self.late_r, run.rh
        assert late_r is not None
        assert rh is not None
        return [first, _Product(late_r, cell.late, lambda i, k: rh[i, k], cell.update)]

    def _phase(
        self, run: _UnitRun, product: _Product, t: Expr, panel: Expr, row: Expr, cut: _Block, thread: Expr
    ) -> Stmt:
        """A product for the panels from ``panel`` and the rows from ``row`` on, and the update of their units."""
        lane, warp = tirx.floormod(thread, i64(WARP)), tirx.floordiv(thread, i64(WARP))
        sums = self._sums(run.direction, product, panel, row, cut, lane, warp)
        units = i64(cut.panels * cut.rows * WARP)

        def unit(number: Expr) -> Stmt:
            v = tirx.floormod(number, i64(WARP))
            r = tirx.floormod(tirx.floordiv(number, i64(WARP)), i64(cut.rows))
            p = tirx.floordiv(number, i64(WARP * cut.rows))

            def total(gate: int) -> Expr:
                parts = [cut.parts[s * cut.panels + p, gate * cut.rows + r, v] for s in range(cut.slices)]
                return _tree(parts)

            kept = [keep(total(gate), f"product{gate}") for gate in range(product.gates)]
            update = run.unit(t, panel + p, row + r, v, [value for _, value in kept], product.update)
            inside = tirx.all((panel + p) * WARP + v < self.hidden, row + r < run.count)
            return when(inside, seq(*(statement for statement, _ in kept), update))

        return seq(sums, barrier(), each(units, thread, cut.threads, unit))

    def _sums(
        self, direction: int, product: _Product, panel: Expr, row: Expr, cut: _Block, lane: Expr, warp: Expr
    ) -> Stmt:
        """What each warp sums: all gates of its panel over its slice, into the memory where slices meet."""
        dtype, rows, gates = self.y.dtype, cut.rows, product.gates
        sums = tirx.decl_buffer((i64(gates * rows),), dtype, "sums")
        own = panel + tirx.floormod(warp, i64(cut.panels))
        length = -(-self.hidden // cut.slices)
        start = tirx.floordiv(warp, i64(cut.panels)) * length

        def add(k: Expr) -> Stmt:
            states = [keep(product.state(row + r, k), f"state{r}") for r in range(rows)]
            done = [statement for statement, _ in states]
            for gate in range(gates):
                at = (i64(direction), own, i64(0), k, lane + gate * WARP)
                statement, weight = keep(product.weights[at].astype(dtype), f"weight{gate}")
                done.append(statement)
                for r in range(rows):
                    here = [i64(gate * rows + r)]
                    done.append(tirx.BufferStore(sums, sums[here[0]] + weight * states[r][1], here))
            return seq(*done)

        def step(n: Expr) -> Stmt:
            even = length * cut.slices == self.hidden
            return add(start + n) if even else when(start + n < self.hidden, add(start + n))

        every = range(gates * rows)
        clear = [tirx.BufferStore(sums, tirx.const(0, dtype), [i64(n)]) for n in every]
        leave = [tirx.BufferStore(cut.parts, sums[i64(n)], [warp, i64(n), lane]) for n in every]
        return seq(tirx.AllocBuffer(sums), *clear, loop(length, step, name="k"), *leave)


def _tree(parts: Sequence[Expr]) -> Expr:
    """The sum of ``parts``, halves first."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return _tree(parts[:half]) + _tree(parts[half:])


class _UnitRun(Run):
    """As :class:`Run`, unit by unit, with the states in ``scope``."""

    def __init__(
        self,
        nest: Recurrence,
        sinks: Sequence[Sink],
        direction: int,
        first: Expr,
        count: Expr,
        room: int | Expr,
        scope: str,
    ) -> None:
        super().__init__(nest, sinks, direction, first, count, 1)
        extent = i64(room) if isinstance(room, int) else room
        width, dtype = i64(nest.panels * nest.lanes), nest.y.dtype

        def state(name: str, *outer: Expr) -> tirx.Buffer:
            return tirx.decl_buffer((*outer, extent, width), dtype, name, scope=scope)

        self.h = state("h", i64(2))
        self.c = state("c") if nest.cell.cell_state else None
        self.z = state("z") if nest.cell.late else None
        self.rh = state("rh") if nest.cell.late else None

    @property
    def buffers(self) -> list[tirx.Buffer]:
        """Memory of the states."""
        return [b for b in (self.h, self.c, self.z, self.rh) if b is not None]

    def share(self, other: _UnitRun) -> None:
        """Use the memory of ``other``, which never runs beside this one."""
        self.h, self.c, self.z, self.rh = other.h, other.c, other.z, other.rh

    def begin(self, number: Expr) -> Stmt:
        """The state of a unit before the first step; zero beyond the last unit and row."""
        width = i64(self.nest.panels * self.nest.lanes)
        i, u = tirx.floordiv(number, width), tirx.floormod(number, width)
        inside = tirx.all(i < self.count, u < self.nest.hidden)

        def initial(source: Tensor | None) -> Expr:
            zero = tirx.const(0, self.nest.y.dtype)
            if source is None:
                return zero
            return tirx.if_then_else(inside, source[(i64(self.direction), self.first + i, u)], zero)

        stores = [tirx.BufferStore(self.h, initial(self.nest.h0), [i64(0), i, u])]
        stores.append(tirx.BufferStore(self.h, tirx.const(0, self.nest.y.dtype), [i64(1), i, u]))
        if self.c is not None:
            stores.append(tirx.BufferStore(self.c, initial(self.nest.c0), [i, u]))
        if self.rh is not None:
            stores.append(tirx.BufferStore(self.rh, tirx.const(0, self.nest.y.dtype), [i, u]))
        return seq(*stores)

    def finish(self, number: Expr) -> Stmt:
        """The last state of a unit."""
        i, u = tirx.floordiv(number, i64(self.nest.hidden)), tirx.floormod(number, i64(self.nest.hidden))
        return when(i < self.count, self.last(i, u))
