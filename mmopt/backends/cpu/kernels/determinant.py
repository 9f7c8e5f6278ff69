"""Determinants by elimination with partial pivoting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor
from mmopt.backends.cpu.loops import i64, loop, loops, seq, when


class Determinant(LoopNest):
    """``y[m] = det(x[m])``.

    Args:
        data: ``[matrices, n, n]``.
        dtype: Type the elimination is done in.
    """

    name = "determinant"

    def __init__(self, data: Tensor, dtype: str) -> None:
        super().__init__()
        self.data, self.inputs, self.dtype = data, (data,), dtype
        self.output = self.result(data.shape[:1], data.dtype, "det")

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        count, size, _ = self.data.shape

        def matrix(m: Expr) -> Stmt:
            work = tirx.decl_buffer((size, size), self.dtype, "work")
            total = tirx.decl_buffer((i64(1),), self.dtype, "total")
            pivot = tirx.decl_buffer((i64(1),), "int64", "pivot")

            def copy(i: Expr, j: Expr) -> Stmt:
                return kernel.point(lambda: tirx.BufferStore(work, self.data[m, i, j].astype(self.dtype), [i, j]))

            result = tirx.BufferLoad(total, [i64(0)]).astype(self.data.dtype)
            return seq(
                *(tirx.AllocBuffer(b) for b in (work, total, pivot)),
                tirx.BufferStore(total, tirx.const(1, self.dtype), [i64(0)]),
                loops((size, size), copy),
                loop(size, lambda k: self._eliminate(work, total, pivot, k), name="k"),
                kernel.point(lambda: sinks[0]((m,), result)),
            )

        return kernel.rows((count,), matrix, None)

    def _eliminate(self, work: tirx.Buffer, total: tirx.Buffer, pivot: tirx.Buffer, k: Expr) -> Stmt:
        """Bring the largest element of column ``k`` to its diagonal and clear the column below."""
        size = self.data.shape[1]
        zero = tirx.const(0, self.dtype)
        best, product = tirx.BufferLoad(pivot, [i64(0)]), tirx.BufferLoad(total, [i64(0)])

        def at(i: Expr, j: Expr) -> Expr:
            return tirx.BufferLoad(work, [i, j])

        def search(i: Expr) -> Stmt:
            return when(
                tirx.abs(at(k + 1 + i, k)) > tirx.abs(at(best, k)), tirx.BufferStore(pivot, k + 1 + i, [i64(0)])
            )

        def swap(j: Expr) -> Stmt:
            held = tirx.Var("held", self.dtype)
            upper = tirx.BufferStore(work, at(best, j), [k, j])
            return seq(tirx.Bind(held, at(k, j)), upper, tirx.BufferStore(work, held, [best, j]))

        def row(i: Expr) -> Stmt:
            factor = tirx.Var("factor", self.dtype)
            below = k + 1 + i
            clear = loop(
                size - k - 1,
                lambda j: tirx.BufferStore(work, at(below, k + 1 + j) - factor * at(k, k + 1 + j), [below, k + 1 + j]),
            )
            return seq(tirx.Bind(factor, at(below, k) / at(k, k)), clear)

        exchange = seq(loop(size, swap), tirx.BufferStore(total, zero - product, [i64(0)]))
        return seq(
            tirx.BufferStore(pivot, k, [i64(0)]),
            loop(size - k - 1, search),
            when(tirx.NE(best, k), exchange),
            tirx.BufferStore(total, product * at(k, k), [i64(0)]),
            when(tirx.NE(at(k, k), zero), loop(size - k - 1, row)),
        )
