"""Reductions in vector lanes: along the reduced axis when memory is contiguous there, else along the output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import Reduction
from mmopt.backends.cpu.collapse import collapse, expand
from mmopt.backends.cpu.loops import i64, loop, loops, product, seq, static
from mmopt.backends.cpu.plan import Traced, trace
from mmopt.backends.expressions import simplify, strides

if TYPE_CHECKING:
    from mmopt.backends.cpu.emit import KernelEmitter

UNROLL = 4
"""Vectors of partial results kept in registers, to hide the latency of the combining operation."""


def emit_reduction(kernel: KernelEmitter, stage: Reduction, prefix: tuple[Expr, ...], *, parallel: bool) -> Stmt:
    """Loops for the elements of ``stage`` whose leading indices are ``prefix``."""
    inside = trace(stage, kernel.plan.stored)
    ndim = len(stage.shape)
    extents = (*stage.shape, *stage.axes)
    groups = collapse(inside, list(range(ndim, len(extents))), extents) if stage.axes else []
    shape = _Shape(stage, inside, groups, [simplify(product([extents[a] for a in g])) for g in groups], extents)
    lanes = kernel.lanes(*stage.dtypes, *(r.tensor.dtype for r in inside.reads))
    rest = stage.shape[len(prefix) :]
    along_output, along_reduced = _directions(shape, len(prefix), lanes) if stage.combiner.simple else (False, False)
    work = kernel.work(stage) if parallel else 0
    if along_output:
        *outer, inner = rest
        block = UNROLL * lanes

        def blocks(*at: Expr) -> Stmt:
            return _output_lanes(kernel, shape, (*prefix, *at), inner, block)

        return kernel.rows((*outer, simplify(tirx.floordiv(inner + (block - 1), i64(block)))), blocks, work)

    def element(*at: Expr) -> Stmt:
        point = (*prefix, *at)
        return _reduced_lanes(kernel, shape, point, lanes) if along_reduced else _scalar(kernel, shape, point)

    return kernel.rows(rest, element, work)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """A reduction with its reduced axes collapsed: ``groups`` of axis positions and the extent of each."""

    stage: Reduction
    inside: Traced
    groups: list[list[int]]
    counts: list[Expr]
    extents: tuple[Expr, ...]

    def body(self, kernel: KernelEmitter, point: tuple[Expr, ...], at: Sequence[Expr]) -> tuple[Expr, ...]:
        state = self.stage.body(*point, *expand(at, self.groups, self.extents))
        return tuple(map(kernel.untangled, state))


def _directions(shape: _Shape, depth: int, lanes: int) -> tuple[bool, bool]:
    """Whether vector lanes can lie along the innermost output axis, and along the innermost reduced axis."""
    ndim = len(shape.stage.shape)

    def unit(axis: int) -> tuple[bool, bool]:
        found = (strides(r.offset, [shape.inside.axes[axis]])[0] for r in shape.inside.reads)
        steps = [None if step is None else static(step) for step in found]
        return all(s in (0, 1) for s in steps), any(s == 1 for s in steps)

    def long(extent: Expr) -> bool:
        size = static(extent)
        return size is None or size >= lanes

    output = ndim > depth and all(unit(ndim - 1)) and long(shape.stage.shape[-1])
    reduced = bool(shape.counts) and all(unit(len(shape.extents) - 1)) and long(shape.counts[-1])
    return output and not reduced, reduced


class _State:
    """The running state of a reduction: ``width`` lanes of each component, in registers."""

    def __init__(self, stage: Reduction, width: int) -> None:
        self.stage, self.width = stage, width
        self.buffers = [tirx.decl_buffer((i64(width),), d, f"state{n}") for n, d in enumerate(stage.dtypes)]

    def allocate(self) -> Stmt:
        return seq(*(tirx.AllocBuffer(b) for b in self.buffers))

    def get(self, lane: Expr) -> tuple[Expr, ...]:
        return tuple(tirx.BufferLoad(b, [lane]) for b in self.buffers)

    def put(self, lane: Expr, values: Sequence[Expr]) -> Stmt:
        if len(self.buffers) == 1:
            return tirx.BufferStore(self.buffers[0], values[0], [lane])
        fresh = [tirx.Var(f"next{n}", d) for n, d in enumerate(self.stage.dtypes)]
        binds = [tirx.Bind(v, value) for v, value in zip(fresh, values, strict=True)]
        return seq(*binds, *(tirx.BufferStore(b, v, [lane]) for b, v in zip(self.buffers, fresh, strict=True)))

    def merge(self, lane: Expr, values: Sequence[Expr]) -> Stmt:
        return self.put(lane, self.stage.combiner.combine(self.get(lane), tuple(values)))

    def clear(self) -> Stmt:
        identity = self.stage.combiner.identity(self.stage.dtypes)
        return loop(self.width, lambda v: self.put(v, identity), "vectorized" if self.width > 1 else "serial", "v")


def _finish(kernel: KernelEmitter, stage: Reduction, point: tuple[Expr, ...], state: tuple[Expr, ...]) -> Stmt:
    return kernel.places[stage].store(point, stage.finish(state))


def _scalar(kernel: KernelEmitter, shape: _Shape, point: tuple[Expr, ...]) -> Stmt:
    state = _State(shape.stage, 1)

    def step(*at: Expr) -> Stmt:
        return kernel.point(lambda: state.merge(i64(0), shape.body(kernel, point, at)))

    done = _finish(kernel, shape.stage, point, state.get(i64(0)))
    return seq(state.allocate(), state.clear(), loops(shape.counts, step, "k"), done)


def _reduced_lanes(kernel: KernelEmitter, shape: _Shape, point: tuple[Expr, ...], lanes: int) -> Stmt:
    *outer, inner = shape.counts
    size = static(inner)
    width = lanes * UNROLL if size is None or size >= lanes * UNROLL else lanes
    state = _State(shape.stage, width)
    blocks = simplify(tirx.floordiv(inner, i64(width)))
    rest = simplify(tirx.floormod(inner, i64(width)))

    def step(lane: Expr, *at: Expr) -> Stmt:
        return kernel.point(lambda: state.merge(lane, shape.body(kernel, point, at)))

    def row(*at: Expr) -> Stmt:
        main = loop(blocks, lambda b: loop(width, lambda v: step(v, *at, b * width + v), "vectorized", "v"), name="k")
        return seq(main, kernel.tail(rest, width, lambda v: step(v, *at, blocks * width + v)))

    return seq(
        state.allocate(),
        state.clear(),
        loops(outer, row, "k"),
        *_fold(state, lanes),
        _finish(kernel, shape.stage, point, state.get(i64(0))),
    )


def _fold(state: _State, lanes: int) -> list[Stmt]:
    """Combine all lanes into the first, halving the vector each time."""
    steps: list[Stmt] = []
    width = state.width
    while width > 1:
        half = width // 2
        steps.append(loop(half, lambda v, half=half: state.merge(v, state.get(v + half)), "vectorized", "v"))  # type: ignore[misc]
        width = half
    return steps


def _output_lanes(kernel: KernelEmitter, shape: _Shape, at: tuple[Expr, ...], extent: Expr, block: int) -> Stmt:
    """A block of neighbouring outputs, one in each lane."""
    *outer, number = at
    start = number * block

    def lanes(count: Expr, kind: str) -> Stmt:
        state = _State(shape.stage, block)

        def each(body: Callable[[Expr, tuple[Expr, ...]], Stmt]) -> Stmt:
            return loop(count, lambda v: body(v, (*outer, start + v)), kind, "v")

        def step(*reduced: Expr) -> Stmt:
            return each(lambda v, point: kernel.point(lambda: state.merge(v, shape.body(kernel, point, reduced))))

        done = each(lambda v, point: _finish(kernel, shape.stage, point, state.get(v)))
        return seq(state.allocate(), state.clear(), loops(shape.counts, step, "k"), done)

    size = static(extent)
    if size is not None and size % block == 0:
        return lanes(i64(block), "vectorized")
    full, rest = lanes(i64(block), "vectorized"), lanes(extent - start, "serial")
    if size is not None and size < block:
        return lanes(extent, "vectorized")
    return tirx.IfThenElse(start + block <= extent, full, rest)
