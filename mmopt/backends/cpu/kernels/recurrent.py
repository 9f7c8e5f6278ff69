"""The recurrent step of LSTM, GRU and RNN: a register-tile product, then all gates of a vector of hidden units at once.

The products of the inputs with W for all steps come in as one matrix, computed beforehand. What is left for a step is
h·R and the cell's update. R is stored as ``[directions, panels, groups, H, gates·B]`` with B the lanes of a vector: a
panel yields every gate of B hidden units, and a group of gates is one contiguous stream, read once for all rows of the
batch while it is in the first-level cache.

    LSTM  c' = f∘c + i∘g,  h' = o∘tanh(c')          GRU  h' = (1 − z)∘n + z∘h          RNN  h' = f(x + h·R)

Directions and blocks of the batch are independent: each thread takes some through all steps. When there are fewer of
them than cores, the threads share the panels of every step and meet at its end; that is one fork for the sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, LoopResult, Sink, Tensor, index
from mmopt.backends.cpu.choosing import Candidate, typical
from mmopt.backends.cpu.dot import MicroKernel, configure_tiles, importing, release_tiles
from mmopt.backends.cpu.kernels.recurrent_dot import STREAM, IntegerProduct, Rescaling
from mmopt.backends.cpu.kernels.tile import LINE, LOADS, RegisterTile, fetch, most_rows
from mmopt.backends.cpu.loops import i64, keep, loop, loops, seq, shared, static, team, when
from mmopt.backends.expressions import itemsize, simplify
from mmopt.backends.profile import Profile

FORK_WORK = 1 << 18
"""Multiply-adds of the whole sequence below which one thread is quicker than a fork."""

MEET_WORK = 1 << 16
"""Multiply-adds of a step below which one thread is quicker than meeting at the end of every step."""

BLOCK = 32
"""Most rows of the batch that go through all steps together; their states stay in the caches."""

STEPS = 4
"""Hidden units in one round of a product's loop."""

STALL = 2.0
"""Cycles of a step of the product besides its multiply-adds: R is in the second-level cache, and sums wait for it."""

LEAST_ROWS = 4
"""Rows of the batch worth a thread of their own."""


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


def candidates(profile: Profile, dtype: str, gates: int, hidden: int, batch: int | str) -> list[Candidate]:
    """Register tiles for the product of a step: ``rows`` of the batch by ``vectors`` of gates, a divisor of ``gates``.

    Args:
        profile: Vector width, registers and caches.
        dtype: Element type.
        gates: Gates of the first product.
        hidden: Hidden units.
        batch: Rows, when known.
    """
    known = typical(batch, BLOCK)
    lanes = profile.vector_bytes // itemsize(dtype)
    made = []
    for vectors in sorted((v for v in range(1, gates + 1) if gates % v == 0), key=lambda v: abs(v - 2)):
        most = min(most_rows(profile, vectors), 16)
        if most < 1:
            continue
        rows = most if isinstance(batch, str) else -(-known // -(-known // most))
        cycles = _cycles(profile, rows, vectors, hidden, min(known, BLOCK)) * (gates // vectors) * -(-hidden // lanes)
        made.append(Candidate({"rows": rows, "vectors": vectors}, cycles))
    return made


def _cycles(profile: Profile, rows: int, vectors: int, hidden: int, batch: int) -> float:
    """Cycles of one group of gates of one panel: two multiply-adds a cycle, :data:`LOADS`, one stream of R from L2.

    Later tiles of rows find the group in L1 when it fits there.
    """
    stream = vectors * profile.vector_bytes / STREAM
    again = 0.0 if hidden * vectors * profile.vector_bytes < profile.l1_bytes else stream
    heights = [rows] * (batch // rows) + ([batch % rows] if batch % rows else [])
    each = [max(h * vectors / 2 + STALL, (h + vectors) / LOADS, again if n else stream) for n, h in enumerate(heights)]
    return hidden * sum(each)


class Recurrence(LoopNest):
    """All steps of all directions.

    Args:
        x: ``[steps, batch, directions, panels, gates, B]``, biases added.
        r: ``[directions, panels, groups, H, gates of a group · B]`` for the first product; a narrower type will do.
            With ``integers``, panels as :func:`mmopt.backends.cpu.dot.pack` makes them, one for each group.
        late_r: The same for the second product, or None.
        h0: Initial hidden state ``[directions, batch, H]``, or None for zeros.
        c0: Initial cell state, or None.
        lengths: Steps of each sequence ``[batch]``, or None when all take every step.
        cell: The operator.
        hidden: H.
        backward: For each direction, whether it runs from the end.
        rows: Most rows of a register tile.
        extra: Further tensors the update reads (peepholes, biases of the recurrent product).
        integers: How to multiply the state as integers, if it is to be.
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
        rows: int,
        extra: Sequence[Tensor] = (),
        integers: IntegerProduct | None = None,
    ) -> None:
        super().__init__()
        given = (x, r, late_r, h0, c0, lengths, *extra, *(integers.tensors if integers else ()))
        self.inputs = tuple(dict.fromkeys(t for t in given if t is not None))
        self.x, self.r, self.late_r, self.h0, self.c0, self.lengths = x, r, late_r, h0, c0, lengths
        self.cell, self.hidden, self.backward, self.rows = cell, hidden, tuple(backward), rows
        self.integers, self.kernels = integers, dict[MicroKernel, None]()
        self.steps, self.batch = x.shape[0], x.shape[1]
        self.lanes = static(x.shape[-1]) or 1
        self.panels = static(x.shape[3]) or 1
        directions = len(self.backward)
        self.y = self.result((self.steps, directions, self.batch, index(hidden)), x.dtype, "Y")
        self.last_h = self.result((directions, self.batch, index(hidden)), x.dtype, "Y_h")
        self.last_c: LoopResult | None = None
        if cell.cell_state:
            self.last_c = self.result((directions, self.batch, index(hidden)), x.dtype, "Y_c")

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        gates = self.cell.gates + self.cell.late
        said: dict[str, object] = {"rows": self.rows, "lanes": self.lanes, "panels": self.panels, "gates": gates}
        return said if self.integers is None else {"instruction": self.integers.dot.name, **said}

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        """Parallel over directions and blocks of the batch, or over the panels of every step."""
        made = self._divided(kernel, sinks)
        return importing(self.kernels, made) if self.kernels else made

    def _divided(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        cores, directions = kernel.profile.cores, len(self.backward)
        each = (self.cell.gates + self.cell.late) * self.hidden * self.hidden
        each = each // 2 if self.integers else each  # a quarter of the bytes, and as many gates
        total = static(simplify(self.steps * self.batch * (directions * each)))
        if total is not None and total < FORK_WORK:
            return self._by_piece(sinks, 1, "serial")
        batch = static(self.batch)
        if directions >= cores or each * (batch or 1) < MEET_WORK or (batch or 0) > BLOCK:
            return self._by_piece(sinks, cores, "parallel")
        if batch is not None:
            return self._by_panel(sinks)
        return when(self.batch <= BLOCK, self._by_panel(sinks), self._by_piece(sinks, cores, "parallel"))

    def _by_piece(self, sinks: Sequence[Sink], cores: int, kind: str) -> Stmt:
        """Every piece, a direction and a block of the batch, goes through all steps on one thread."""
        directions = len(self.backward)
        wanted = -(-cores // directions)
        least = simplify(tirx.floordiv(self.batch + (BLOCK - 1), i64(BLOCK)))
        spread = simplify(tirx.min(tirx.floordiv(self.batch + (LEAST_ROWS - 1), i64(LEAST_ROWS)), i64(wanted)))
        blocks = simplify(tirx.max(least, spread)) if wanted > 1 else least
        size = simplify(tirx.floordiv(self.batch + (tirx.max(blocks, i64(1)) - 1), tirx.max(blocks, i64(1))))
        even = static(simplify(tirx.floormod(self.batch, tirx.max(size, i64(1))))) == 0
        room = static(size) or BLOCK

        def piece(flat: Expr) -> Stmt:
            first = simplify(tirx.floormod(flat, blocks) * size)
            count = size if even else tirx.min(size, self.batch - first)
            runs = [Run(self, sinks, d, first, count, room) for d in range(directions)]
            made = [run.whole() for run in runs]
            return made[0] if len(made) == 1 else when(tirx.floordiv(flat, blocks).equal(i64(0)), made[0], made[1])

        return loop(simplify(blocks * directions), piece, kind, "piece")

    def _by_panel(self, sinks: Sequence[Sink]) -> Stmt:
        """All threads go through the steps together, each with its share of the panels."""
        room = static(self.batch) or BLOCK
        runs = [Run(self, sinks, d, i64(0), self.batch, room) for d in range(len(self.backward))]

        def divided(product: Callable[[Run, Expr], Stmt]) -> Stmt:
            def share(flat: Expr) -> Stmt:
                made = [product(run, tirx.floormod(flat, i64(self.panels))) for run in runs]
                return made[0] if len(made) == 1 else when(flat < self.panels, made[0], made[1])

            return shared(self.panels * len(runs), share, "panel")

        def step(t: Expr) -> Stmt:
            first = divided(lambda run, panel: run.first_product(t, panel))
            return seq(first, divided(lambda run, panel: run.late_product(t, panel)) if self.cell.late else None)

        before = [part for run in runs for part in (*run.allocations(), run.start())]
        steps = self.with_tiles(self.batch, loop(self.steps, step, name="t"))
        return seq(*before, team(steps), *(run.end() for run in runs))

    def with_tiles(self, rows: Expr, body: Stmt) -> Stmt:
        """``body`` with AMX tiles of ``rows`` rows on the thread that runs it, where it needs some."""
        if self.integers is None or not self.integers.dot.tiled:
            return body
        return seq(configure_tiles(rows), body, release_tiles())


@dataclasses.dataclass(frozen=True)
class _Factors:
    """A product of a step.

    Attributes:
        weights: R, as :class:`Recurrence` has it.
        gates: Gates it gives.
        state: ``state(row, unit)``: an element of what R is multiplied by.
        rescaling: How its sums become floats; None where they are some.
    """

    weights: Tensor
    gates: int
    state: Callable[[Expr, Expr], Expr]
    rescaling: Rescaling | None

    def vectors(self, lanes: int) -> int:
        """Gates in a group."""
        return (static(self.weights.shape[4]) or lanes) // lanes


class Run:
    """One direction for one block of the batch.

    Args:
        nest: What it is part of.
        sinks: Take the results.
        direction: The direction.
        first: First row of the batch.
        count: Number of rows.
        room: Rows there is memory for.
    """

    def __init__(
        self, nest: Recurrence, sinks: Sequence[Sink], direction: int, first: Expr, count: Expr, room: int
    ) -> None:
        self.nest, self.sinks, self.direction = nest, sinks, direction
        self.first, self.count, self.room = first, count, room
        width = nest.panels * nest.lanes
        dtype = nest.y.dtype
        self.h = tirx.decl_buffer((i64(2), i64(room), i64(width)), dtype, "h")
        self.c = tirx.decl_buffer((i64(room), i64(width)), dtype, "c") if nest.cell.cell_state else None
        self.z = tirx.decl_buffer((i64(room), i64(width)), dtype, "z") if nest.cell.late else None
        self.rh = tirx.decl_buffer((i64(room), i64(width)), dtype, "rh") if nest.cell.late else None
        # Their integers, where products read those.
        self.h8, self.rh8 = None, None
        if nest.integers is not None:
            self.h8 = nest.integers.states((2, room), width)
            self.rh8 = nest.integers.states((room,), width) if nest.cell.late else None

    def allocations(self) -> list[Stmt]:
        """Memory for the states."""
        rh = self.rh if self.rh8 is None else self.rh8
        return [tirx.AllocBuffer(b) for b in (self.h, self.h8, self.c, self.z, rh) if b is not None]

    def whole(self) -> Stmt:
        """All steps, by one thread."""
        panels = i64(self.nest.panels)

        def step(t: Expr) -> Stmt:
            first = loop(panels, lambda p: self.first_product(t, p), name="panel")
            late = loop(panels, lambda p: self.late_product(t, p), name="panel") if self.nest.cell.late else None
            return seq(first, late)

        steps = self.nest.with_tiles(self.count, loop(self.nest.steps, step, name="t"))
        return seq(*self.allocations(), self.start(), steps, self.end())

    def start(self) -> Stmt:
        """The states before the first step."""
        nest = self.nest

        def initial(source: Tensor | None, i: Expr, u: Expr) -> Expr:
            zero = tirx.const(0, nest.y.dtype)
            if source is None:
                return zero
            value = source[(i64(self.direction), self.first + i, tirx.min(u, i64(nest.hidden - 1)))]
            return tirx.Select(u < nest.hidden, value, zero)

        def unit(i: Expr, u: Expr) -> Stmt:
            before = initial(nest.h0, i, u)
            hidden = seq(tirx.BufferStore(self.h, before, [i64(0), i, u]), self._rounded(before, i64(0), i, u))
            return seq(hidden, None if self.c is None else tirx.BufferStore(self.c, initial(nest.c0, i, u), [i, u]))

        def panel(i: Expr, p: Expr) -> Stmt:
            return loop(nest.lanes, lambda v: unit(i, p * nest.lanes + v), "vectorized", "v")

        return loops([self.count, i64(nest.panels)], panel, "s")

    def _rounded(self, value: Expr, *at: Expr) -> Stmt | None:
        """Keep the integer of a state for the product of the next step."""
        integers = self.nest.integers
        if self.h8 is None or integers is None:
            return None
        return tirx.BufferStore(self.h8, integers.quantize(value), list(at))

    def end(self) -> Stmt:
        """Last states of all rows."""
        return loops([self.count], lambda i: self._lanes(lambda u: self.last(i, u)), "e")

    def last(self, i: Expr, u: Expr) -> Stmt:
        """Last states of a unit.

        Zeros for a sequence without steps, as onnxruntime has it (the standard leaves it open).
        """
        nest = self.nest
        parity = tirx.floormod(nest.steps, i64(2))

        def given(value: Expr) -> Expr:
            if nest.lengths is None:
                return value
            length = nest.lengths[(self.first + i,)]
            return tirx.Select(length > tirx.const(0, nest.lengths.dtype), value, tirx.const(0, nest.y.dtype))

        at = (i64(self.direction), self.first + i, u)
        done = self.sinks[1](at, given(self.h[parity, i, u]))
        return seq(done, None if self.c is None else self.sinks[2](at, given(self.c[i, u])))

    def _lanes(self, body: Callable[[Expr], Stmt]) -> Stmt:
        """``body`` for every hidden unit, in vectors."""
        lanes = self.nest.lanes
        full, rest = divmod(self.nest.hidden, lanes)
        main = loop(full, lambda p: loop(lanes, lambda v: body(p * lanes + v), "vectorized", "v"), name="p")
        return seq(main, loop(rest, lambda v: body(full * lanes + v), "vectorized", "v") if rest else None)

    def first_product(self, t: Expr, panel: Expr) -> Stmt:
        """All of a step for one panel, or what comes before the second product."""
        nest, old = self.nest, tirx.floormod(t, i64(2))
        update = nest.cell.before_late if nest.cell.late else nest.cell.update
        assert update is not None
        state = self.h if self.h8 is None else self.h8
        factors = _Factors(nest.r, nest.cell.gates, lambda i, k: state[old, i, k], self._rescaling(late=False))
        return self._panel(t, panel, factors, update)

    def late_product(self, t: Expr, panel: Expr) -> Stmt:
        """The second product of a step for one panel."""
        nest, rh = self.nest, self.rh if self.rh8 is None else self.rh8
        assert nest.late_r is not None
        assert rh is not None
        factors = _Factors(nest.late_r, nest.cell.late, lambda i, k: rh[i, k], self._rescaling(late=True))
        return self._panel(t, panel, factors, nest.cell.update)

    def _rescaling(self, *, late: bool) -> Rescaling | None:
        integers = self.nest.integers
        return None if integers is None else integers.late if late else integers.first

    def _panel(self, t: Expr, panel: Expr, factors: _Factors, update: Callable[[Point, Sequence[Expr]], Stmt]) -> Stmt:
        """The product for all rows, group of gates by group, and then the update of every row."""
        nest, lanes, gates = self.nest, self.nest.lanes, factors.gates
        dtype = nest.y.dtype if nest.integers is None else nest.integers.dot.total
        products = tirx.decl_buffer((i64(self.room), i64(gates * lanes)), dtype, "products")
        multiply = self._multiply_floats if nest.integers is None else self._multiply_integers

        def product(i: Expr, gate: int, v: Expr) -> Expr:
            value, rescaling = products[i, gate * lanes + v], factors.rescaling
            at = (i64(self.direction), panel, i64(gate), v)
            return value if rescaling is None else rescaling.value(value, at)

        def finish(i: Expr, used: int) -> Stmt:
            def lane(v: Expr) -> Stmt:
                return self.unit(t, panel, i, v, [product(i, g, v) for g in range(gates)], update)

            return seq(self._fetch_inputs(t, panel, i), loop(used, lane, "vectorized", "v"))

        full, rest = divmod(nest.hidden, lanes)
        done = loop(self.count, lambda i: finish(i, lanes), name="i") if full else None
        if rest:
            last = loop(self.count, lambda i: finish(i, rest), name="i")
            done = last if done is None else when(panel < full, done, last)
        groups = gates // factors.vectors(lanes)
        multiplied = loop(groups, lambda number: multiply(products, panel, number, factors), name="group")
        return seq(tirx.AllocBuffer(products), multiplied, done)

    def _multiply_floats(self, products: tirx.Buffer, panel: Expr, number: Expr, factors: _Factors) -> Stmt:
        """A group of gates of a panel for all rows."""
        nest, lanes = self.nest, self.nest.lanes
        vectors = factors.vectors(lanes)

        def b(n: Expr, v: Expr, k: Expr) -> Expr:
            return factors.weights[(i64(self.direction), panel, number, k, n * lanes + v)].astype(nest.y.dtype)

        def tile(first: Expr, height: int) -> Stmt:
            def deliver(i: Expr, n: Expr, v: Expr, value: Expr) -> Stmt:
                return tirx.BufferStore(products, value, [first + i, (number * vectors + n) * lanes + v])

            made = RegisterTile(nest.y.dtype, height, [lanes] * vectors, lanes, steps=STEPS)
            return made.emit([i64(nest.hidden)], lambda i, k: factors.state(first + i, k), b, deliver)

        return self._tiles(tile)

    def _multiply_integers(self, products: tirx.Buffer, panel: Expr, number: Expr, factors: _Factors) -> Stmt:
        """As :meth:`_multiply_floats`, bytes by bytes."""
        integers, zero = self.nest.integers, i64(0)
        assert integers is not None
        assert self.h8 is not None
        vectors, width = factors.vectors(self.nest.lanes), static(products.shape[1]) or 0
        depth = static(self.h8.shape[2]) or 0
        weights = factors.weights[(i64(self.direction), panel, number, zero, zero, zero)]

        def tile(first: Expr, height: int) -> Stmt:
            kernel = MicroKernel(integers.dot, height, vectors)
            self.nest.kernels[kernel] = None
            sums = products[first, number * (vectors * self.nest.lanes)]
            return integers.call(kernel, sums, width, factors.state(first, zero), depth, weights)

        return tile(zero, self.room) if integers.dot.tiled else self._tiles(tile)

    def _fetch_inputs(self, t: Expr, panel: Expr, i: Expr) -> Stmt:
        """Start to load what the next panel, or the first of the next step, needs of a row's inputs."""
        nest = self.nest
        last = panel.equal(i64(nest.panels - 1))
        step, _ = self._place(t + tirx.Select(last, i64(1), i64(0)), self.first + i)
        at = (step, self.first + i, i64(self.direction), tirx.Select(last, i64(0), panel + 1))
        size = nest.lanes * itemsize(nest.x.dtype)
        used = range(0, (static(nest.x.shape[4]) or 1) * size, LINE)
        return seq(*(fetch(nest.x[(*at, i64(o // size), i64(o % size // itemsize(nest.x.dtype)))]) for o in used))

    def _place(self, t: Expr, row: Expr) -> tuple[Expr, Expr | None]:
        """Which of its inputs a sequence has at a step, and whether it goes on that long, if it may not."""
        lengths = self.nest.lengths
        length = self.nest.steps if lengths is None else lengths[(row,)].astype("int64")
        live = None if lengths is None else t < length
        return (length - 1 - t) if self.nest.backward[self.direction] else t, live

    def _tiles(self, tile: Callable[[Expr, int], Stmt]) -> Stmt:
        """``tile(first row, height)`` over the rows: balanced when their number is known, else by powers of two."""
        count, most = static(self.count), self.nest.rows
        if count is not None:
            pieces = max(1, -(-count // most))
            height, taller = divmod(count, pieces)
            tall = loop(taller, lambda n: tile(n * (height + 1), height + 1), name="tile")
            start = taller * (height + 1)
            return seq(tall, loop(pieces - taller, lambda n: tile(start + n * height, height), name="tile"))
        height = 1 << (most.bit_length() - 1)
        full = loop(tirx.floordiv(self.count, i64(height)), lambda n, h=height: tile(n * h, h), name="tile")  # type: ignore[misc]
        parts = [full]
        while height > 1:
            first = tirx.floordiv(self.count, i64(height)) * height
            height //= 2
            parts.append(when(tirx.floormod(self.count, i64(2 * height)) >= height, tile(first, height)))
        return seq(*parts)

    def unit(
        self,
        t: Expr,
        panel: Expr,
        i: Expr,
        v: Expr,
        products: Sequence[Expr],
        update: Callable[[Point, Sequence[Expr]], Stmt],
    ) -> Stmt:
        """Finish one lane: read the inputs of its step, update, and keep the old state once the sequence has ended."""
        nest = self.nest
        old = tirx.floormod(t, i64(2))
        unit = panel * nest.lanes + v
        row = self.first + i
        where, live = self._place(t, row)
        read_at = where if live is None else tirx.max(where, i64(0))
        new = i64(1) - old
        before = self.h[old, i, unit]

        def lasting(value: Expr, otherwise: Expr) -> Expr:
            return value if live is None else tirx.Select(live, value, otherwise)

        def set_h(value: Expr) -> Stmt:
            computed, hidden = keep(value, "hidden")
            state = lasting(hidden, before)
            kept = seq(tirx.BufferStore(self.h, state, [new, i, unit]), self._rounded(state, new, i, unit))
            return seq(computed, kept, self._output(t, where, live, row, unit, hidden))

        def set_c(value: Expr) -> Stmt:
            assert self.c is not None
            return tirx.BufferStore(self.c, lasting(value, self.c[i, unit]), [i, unit])

        def set_first(z: Expr, rh: Expr) -> Stmt:
            assert self.z is not None
            kept = tirx.BufferStore(self.z, z, [i, unit])
            if self.rh8 is not None and nest.integers is not None:
                return seq(kept, tirx.BufferStore(self.rh8, nest.integers.quantize(rh), [i, unit]))
            assert self.rh is not None
            return seq(kept, tirx.BufferStore(self.rh, rh, [i, unit]))

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
