"""Reductions: by one thread, or by a block whose threads take neighbouring elements and merge within warps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import Reduction
from mmopt.backends.cpu.collapse import collapse, expand
from mmopt.backends.cpu.loops import i64, loops, product, seq, split_index, static, when
from mmopt.backends.cpu.plan import trace
from mmopt.backends.cuda.threads import WARP, barrier, each, from_lane, shared
from mmopt.backends.expressions import simplify

if TYPE_CHECKING:
    from mmopt.backends.cuda.emit import CudaEmitter

MANY = 16384
"""Results from which one thread for each keeps a GPU busy."""

SHORT = 64
"""Elements up to which one thread reduces them."""


def threads_for(stage: Reduction) -> int | None:
    """Threads of the block that makes one element of ``stage``; ``None`` where one thread does."""
    length, count = static(simplify(product(stage.axes))), static(simplify(product(stage.shape)))
    if not stage.combiner.simple or (length is not None and length <= SHORT):
        return None
    if count is not None and count >= MANY:
        return None
    return 256 if length is None or length >= 1024 else 64


class _State:
    """The running state in registers."""

    def __init__(self, stage: Reduction) -> None:
        self.stage = stage
        self.buffers = [tirx.decl_buffer((i64(1),), d, f"state{n}") for n, d in enumerate(_kept(stage))]

    def allocate(self) -> Stmt:
        return seq(*(tirx.AllocBuffer(b) for b in self.buffers))

    def get(self) -> tuple[Expr, ...]:
        values = (tirx.BufferLoad(b, [i64(0)]) for b in self.buffers)
        return tuple(v.astype(d) for v, d in zip(values, self.stage.dtypes, strict=True))

    def put(self, values: Sequence[Expr]) -> Stmt:
        kept = _kept(self.stage)
        if len(kept) == 1:
            return tirx.BufferStore(self.buffers[0], values[0].astype(kept[0]), [i64(0)])
        fresh = [tirx.decl_buffer((i64(1),), d, f"next{n}") for n, d in enumerate(kept)]
        first = [tirx.BufferStore(b, v.astype(d), [i64(0)]) for b, v, d in zip(fresh, values, kept, strict=True)]
        copies = [
            tirx.BufferStore(b, tirx.BufferLoad(f, [i64(0)]), [i64(0)])
            for b, f in zip(self.buffers, fresh, strict=True)
        ]
        return seq(*map(tirx.AllocBuffer, fresh), *first, *copies)

    def merge(self, values: Sequence[Expr]) -> Stmt:
        return self.put(self.stage.combiner.combine(self.get(), tuple(values)))

    def clear(self) -> Stmt:
        return self.put(self.stage.combiner.identity(self.stage.dtypes))


def _kept(stage: Reduction) -> list[str]:
    """Types the components have in memory."""
    return ["int8" if d == "bool" else d for d in stage.dtypes]


def _groups(kernel: CudaEmitter, stage: Reduction) -> tuple[list[list[int]], list[Expr], tuple[Expr, ...]]:
    """The reduced axes, collapsed: groups of positions, the extent of each group, and all extents."""
    extents = (*stage.shape, *stage.axes)
    positions = list(range(len(stage.shape), len(extents)))
    groups = collapse(trace(stage, kernel.plan.stored), positions, extents) if positions else []
    return groups, [simplify(product([extents[a] for a in group])) for group in groups], extents


def by_thread(kernel: CudaEmitter, stage: Reduction, point: tuple[Expr, ...]) -> Stmt:
    """One element of ``stage``, by the thread at hand."""
    groups, counts, extents = _groups(kernel, stage)
    state = _State(stage)

    def step(*at: Expr) -> Stmt:
        return kernel.point(lambda: state.merge(_body(kernel, stage, point, expand(at, groups, extents))))

    done = kernel.places[stage].store(point, stage.finish(state.get()))
    return seq(state.allocate(), state.clear(), loops(counts, step, "k"), done)


def _body(kernel: CudaEmitter, stage: Reduction, point: Sequence[Expr], at: Sequence[Expr]) -> tuple[Expr, ...]:
    return tuple(map(kernel.untangled, stage.body(*point, *at)))


@dataclasses.dataclass
class Reduced:
    """A statement for all threads of the block, and the value that each of the first warp has behind it."""

    statement: Stmt
    result: Expr


class BlockReduction:
    """Reduces with all threads of a block.

    Args:
        kernel: The emitter at work.
        stage: What is reduced.
        thread: Index of the thread.
        threads: How many there are, a multiple of a warp.
    """

    def __init__(self, kernel: CudaEmitter, stage: Reduction, thread: Expr, threads: int) -> None:
        self.kernel, self.stage, self.thread, self.threads = kernel, stage, thread, threads
        self.state = _State(stage)
        self.warps = threads // WARP
        self.parts = [shared((i64(self.warps),), d, f"part{n}") for n, d in enumerate(_kept(stage))]

    def allocate(self) -> Stmt:
        """Memory of the reduction."""
        parts = self.parts if self.warps > 1 else []
        return seq(*map(tirx.AllocBuffer, parts), self.state.allocate())

    def value(self, point: tuple[Expr, ...]) -> Reduced:
        """The element at ``point``."""
        groups, counts, extents = _groups(self.kernel, self.stage)
        total = simplify(product(counts))

        def step(number: Expr) -> Stmt:
            at = expand(split_index(number, counts), groups, extents)
            return self.kernel.point(lambda: self.state.merge(_body(self.kernel, self.stage, point, at)))

        own = each(total, self.thread, self.threads, step)
        merged = [self._across(WARP)] if self.warps == 1 else [self._across(WARP), *self._between_warps()]
        return Reduced(seq(self.state.clear(), own, *merged), self.stage.finish(self.state.get()))

    def _across(self, lanes: int) -> Stmt:
        """Merge the states of every ``lanes`` neighbours, so that each of them has the result."""
        steps: list[Stmt] = []
        step = lanes // 2
        while step:
            steps.append(self._exchange(step))
            step //= 2
        return seq(*steps)

    def _exchange(self, step: int) -> Stmt:
        kept = [tirx.decl_buffer((i64(1),), d, f"other{n}") for n, d in enumerate(_kept(self.stage))]
        own = [tirx.BufferLoad(b, [i64(0)]) for b in self.state.buffers]
        fetch = [tirx.BufferStore(b, from_lane(v, step), [i64(0)]) for b, v in zip(kept, own, strict=True)]
        others = [tirx.BufferLoad(b, [i64(0)]).astype(d) for b, d in zip(kept, self.stage.dtypes, strict=True)]
        return seq(*map(tirx.AllocBuffer, kept), *fetch, self.state.merge(others))

    def _between_warps(self) -> list[Stmt]:
        """Each warp leaves its state in shared memory, from where the first one takes them."""
        lane, warp = tirx.floormod(self.thread, i64(WARP)), tirx.floordiv(self.thread, i64(WARP))
        leave = [
            tirx.BufferStore(p, tirx.BufferLoad(b, [i64(0)]), [warp])
            for p, b in zip(self.parts, self.state.buffers, strict=True)
        ]
        take = self.state.put(
            tuple(tirx.BufferLoad(p, [lane]).astype(d) for p, d in zip(self.parts, self.stage.dtypes, strict=True))
        )
        first = when(lane < self.warps, take, self.state.clear())
        return [
            when(lane.equal(i64(0)), seq(*leave)),
            barrier(),
            first,
            self._across(1 << (self.warps - 1).bit_length()),
        ]
