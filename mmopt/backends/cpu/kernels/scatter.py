"""Writes at positions given as data, one after another, so that the last of equal positions wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor
from mmopt.backends.cpu.loops import i64, loop, loops, product, seq, split_index, static, when
from mmopt.backends.expressions import simplify

Target = Callable[[Sequence[Expr]], Sequence[Expr]]
Merge = Callable[[Expr, Expr], Expr]


class Scatter(LoopNest):
    """A copy of ``data`` with ``out[target(i)] = merge(out[target(i)], updates[i])`` for every index of ``updates``.

    Args:
        data: What the result starts as.
        updates: The values.
        reads: Further tensors that ``target`` reads.
        target: Position in the result of the update at an index.
        merge: Combines the old element and the update; the update alone when absent.
        slices: Trailing axes that ``target`` passes on unchanged: their elements are written by vector loops.
    """

    name = "scatter"

    def __init__(
        self,
        data: Tensor,
        updates: Tensor,
        reads: Sequence[Tensor],
        target: Target,
        merge: Merge | None,
        slices: int = 0,
    ) -> None:
        super().__init__()
        self.data, self.updates, self.target, self.merge, self.slices = data, updates, target, merge, slices
        self.inputs = tuple(dict.fromkeys((data, updates, *reads)))
        self.output = self.result(data.shape, data.dtype, "scatter")

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        shape = self.data.shape
        room = shape or (i64(1),)
        total = simplify(product(shape))
        result = tirx.decl_buffer(room, self.data.dtype, "result")
        lanes, work = kernel.lanes(self.data.dtype), static(total)

        def place(at: Sequence[Expr]) -> list[Expr]:
            return list(at) or [i64(0)]

        def copy(flat: Expr) -> Stmt:
            at = split_index(flat, shape)
            return kernel.point(lambda: tirx.BufferStore(result, self.data[at], place(at)))

        def hand_over(flat: Expr) -> Stmt:
            at = split_index(flat, shape)
            return kernel.point(lambda: sinks[0](at, tirx.BufferLoad(result, place(at))))

        return seq(
            tirx.AllocBuffer(result),
            kernel.nest((total,), copy, lanes, work),
            self._write(kernel, result, place),
            kernel.nest((total,), hand_over, lanes, work),
        )

    def _write(self, kernel: Any, result: tirx.Buffer, place: Callable[[Sequence[Expr]], list[Expr]]) -> Stmt:
        extents = self.updates.shape
        split = len(extents) - self.slices
        run = simplify(product(extents[split:]))

        def store(at: Sequence[Expr]) -> Stmt:
            where = place(list(self.target(at)))
            new = self.updates[tuple(at)]
            if self.merge is not None:
                new = self.merge(tirx.BufferLoad(result, where), new)
            return tirx.BufferStore(result, new, where)

        def element(*outer: Expr) -> Stmt:
            if not self.slices:
                return kernel.point(lambda: store(outer))
            inner = lambda flat: kernel.point(lambda: store((*outer, *split_index(flat, extents[split:]))))  # noqa: E731
            return kernel.vector(run, kernel.lanes(self.data.dtype), inner)

        return loops(extents[:split], element, "u")


class Positions(LoopNest):
    """Indices of the true elements of a mask, in order.

    Args:
        mask: ``[n]``, boolean.
        count: How many there are.
    """

    name = "positions"

    def __init__(self, mask: Tensor, count: Expr) -> None:
        super().__init__()
        self.mask, self.inputs = mask, (mask,)
        self.output = self.result([count], "int64", "positions")

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        found = tirx.decl_buffer((i64(1),), "int64", "found")
        here = tirx.BufferLoad(found, [i64(0)])

        def step(i: Expr) -> Stmt:
            write = seq(sinks[0]((here,), i), tirx.BufferStore(found, here + 1, [i64(0)]))
            return kernel.point(lambda: when(self.mask[i], write))

        start = tirx.BufferStore(found, i64(0), [i64(0)])
        return seq(tirx.AllocBuffer(found), start, loop(self.mask.shape[0], step))
