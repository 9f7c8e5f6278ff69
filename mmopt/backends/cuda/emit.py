"""From lazy tensors to kernels of a GPU.

A stage of the plan becomes a kernel: one thread for an element of a map, a thread or a block for an element of a
reduction. Where all stages agree on leading axes, as those of a softmax or a norm do, one kernel does everything: a
block for a row, whose temporaries lie in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import Map, Reduction, Tensor
from mmopt.backends.cpu.collapse import collapse, expand
from mmopt.backends.cpu.emit import KernelEmitter, Place, spelled
from mmopt.backends.cpu.loops import i64, loop, product, seq, split_index, static, when
from mmopt.backends.cpu.plan import trace
from mmopt.backends.cuda.launching import apart, launched, unless_empty
from mmopt.backends.cuda.reduce import BlockReduction, by_thread, threads_for
from mmopt.backends.cuda.threads import allocate, barrier, each, launch, shared
from mmopt.backends.expressions import itemsize, simplify

SHARED_BYTES = 40 << 10
"""Shared memory that the temporaries of a row may take; the limit is 48 KiB on every GPU."""

MANY = 2048
"""Rows of a single element from which there are threads enough with one for each."""

FEW = 32
"""Elements of a row up to which its temporaries are not worth a block."""


class CudaEmitter(KernelEmitter):
    """Emits one kernel function: host code that launches kernels.

    Args:
        outputs: What it must write.
        profile: The target.
    """

    def finished(self, body: Stmt) -> Stmt:
        return launched(body)

    def apart(self, statements: Sequence[Stmt]) -> Stmt:
        """One kernel for all of them."""
        return apart(statements)

    def lanes(self, *dtypes: str) -> int:
        """Vector lanes: none, a warp takes their place."""
        return 1

    def rows(self, extents: Sequence[Expr], body: Callable[..., Stmt], work: int | None) -> Stmt:
        """One thread for each of ``extents``."""
        count = simplify(product(extents))
        return loop(count, lambda flat: body(*split_index(flat, extents)), "parallel", "row")

    def nest(self, extents: Sequence[Expr], store: Callable[..., Stmt], lanes: int, work: int | None) -> Stmt:
        """One thread for each of ``extents``."""
        return self.rows(extents, store, work)

    def _kind(self, count: Expr, work: int | None) -> str:
        return "serial" if static(count) == 1 else "parallel"

    def _stage(self, stage: object, prefix: tuple[Expr, ...], *, parallel: bool) -> Stmt:
        if isinstance(stage, Reduction):
            return self._reduction(stage) if parallel else self._reductions(stage, prefix)
        return super()._stage(stage, prefix, parallel=parallel)  # type: ignore[arg-type]

    def _reduction(self, stage: Reduction) -> Stmt:
        threads = threads_for(stage)
        if threads is None:
            return self.rows(stage.shape, lambda *at: by_thread(self, stage, at), None)
        count = simplify(product(stage.shape))

        def block(number: Expr, thread: Expr) -> Stmt:
            point = split_index(number, stage.shape)
            reduction = BlockReduction(self, stage, thread, threads)
            value = reduction.value(point)
            store = self.places[stage].store(point, value.result)
            return seq(reduction.allocate(), value.statement, when(thread.equal(i64(0)), store))

        return unless_empty(count, launch([count], threads, block))

    def _reductions(self, stage: Reduction, prefix: tuple[Expr, ...]) -> Stmt:
        """All elements of ``stage`` whose first indices are ``prefix``."""
        rest = stage.shape[len(prefix) :]
        return self.rows(rest, lambda *at: by_thread(self, stage, (*prefix, *at)), None)

    # -- rows --------------------------------------------------------------------------------------------------

    def _shared_rows(self) -> Stmt:
        """One block for each index of the axes all stages share."""
        depth = self.plan.shared
        stages = [s for s in self.plan.stages if isinstance(s, Map | Reduction)]
        rows = stages[0].shape[:depth]
        threads = _row_threads(stages, depth)
        if threads is None:
            return super()._shared_rows()
        before = self._place_temporaries(stages, depth)

        def block(number: Expr, thread: Expr) -> Stmt:
            prefix = split_index(number, rows)
            statements: list[Stmt] = []
            for stage in stages:
                statements += [self._row_stage(stage, prefix, thread, threads), barrier()]
            return seq(*(tirx.AllocBuffer(p.buffer) for p in self._in_shared(stages)), *statements[:-1])

        count = simplify(product(rows))
        return seq(*before, unless_empty(count, launch([count], threads, block)))

    def _place_temporaries(self, stages: Sequence[Tensor], depth: int) -> list[Stmt]:
        """Memory for what the stages hand each other: shared while there is room, global after that."""
        left, outside = SHARED_BYTES, []
        for stage in stages:
            if stage in self.places:
                continue
            inner = stage.shape[depth:] or (i64(1),)
            flags = stage.dtype == "bool"
            dtype = "int8" if flags else stage.dtype
            size = static(simplify(product(inner) * itemsize(dtype)))
            if size is not None and size <= left:
                left -= size
                self.places[stage] = Place(shared(inner, dtype, spelled(stage.name)), depth, flags=flags)
            else:
                buffer = tirx.decl_buffer(stage.shape or (i64(1),), dtype, spelled(stage.name))
                outside.append(buffer)
                self.places[stage] = Place(buffer, flags=flags)
        return [allocate(*outside)] if outside else []

    def _in_shared(self, stages: Sequence[Tensor]) -> list[Place]:
        return [self.places[s] for s in stages if self.places[s].buffer.scope() == "shared"]

    def _row_stage(self, stage: Map | Reduction, prefix: tuple[Expr, ...], thread: Expr, threads: int) -> Stmt:
        inner = stage.shape[len(prefix) :]
        count = simplify(product(inner))
        if not inner and isinstance(stage, Map):
            return when(thread.equal(i64(0)), self.point(lambda: self._store(stage, prefix)))
        if isinstance(stage, Reduction):
            if static(count) == 1:
                return self._row_reduction(stage, (*prefix, *(i64(0) for _ in inner)), thread, threads)
            return each(count, thread, threads, lambda n: by_thread(self, stage, (*prefix, *split_index(n, inner))))
        groups = collapse(trace(stage, self.plan.stored), list(range(len(prefix), len(stage.shape))), stage.shape)
        extents = [simplify(product([stage.shape[d] for d in group])) for group in groups]

        def element(number: Expr) -> Stmt:
            at = prefix + expand(split_index(number, extents), groups, stage.shape)
            return self.point(lambda: self._store(stage, at))

        return each(count, thread, threads, element)

    def _row_reduction(self, stage: Reduction, point: tuple[Expr, ...], thread: Expr, threads: int) -> Stmt:
        reduction = BlockReduction(self, stage, thread, threads)
        value = reduction.value(point)
        store = self.places[stage].store(point, value.result)
        return seq(reduction.allocate(), value.statement, when(thread.equal(i64(0)), store))


def _row_threads(stages: Sequence[Map | Reduction], depth: int) -> int | None:
    """Threads of a block that computes a row; ``None`` where one thread does: rows are short, or many and single."""
    longest = 0
    rows = static(simplify(product(stages[0].shape[:depth])))
    if rows is not None and rows >= MANY and all(len(stage.shape) == depth for stage in stages):
        return None
    for stage in stages:
        extents = (*stage.shape[depth:], *(stage.axes if isinstance(stage, Reduction) else ()))
        count = static(simplify(product(extents)))
        longest = max(longest, 1 << 20 if count is None else count)
    if longest <= FEW:
        return None
    return next((t for t in (32, 64, 128, 256) if longest <= 4 * t), 256)
