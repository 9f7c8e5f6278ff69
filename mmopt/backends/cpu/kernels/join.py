"""Concatenation: every operand is copied to its place by a vector loop of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor
from mmopt.backends.cpu.loops import i64, product, seq, split_index, static
from mmopt.backends.expressions import simplify


class Join(LoopNest):
    """Tensors one after another along ``axis``: one vector copy for each."""

    name = "join"

    def __init__(self, parts: Sequence[Tensor], axis: int) -> None:
        super().__init__()
        self.inputs = tuple(parts)
        self.axis = axis
        first = parts[0]
        total = simplify(sum((p.shape[axis] for p in parts[1:]), first.shape[axis]))
        self.output = self.result((*first.shape[:axis], total, *first.shape[axis + 1 :]), first.dtype, "concat")

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        start: Expr = i64(0)
        copies: list[Stmt] = []
        for part in self.inputs:
            copies.append(self._copy(kernel, sinks[0], part, start))
            start = simplify(start + part.shape[self.axis])
        return kernel.apart(copies)

    def _copy(self, kernel: Any, sink: Sink, part: Tensor, start: Expr) -> Stmt:
        axis = self.axis
        rows, run = simplify(product(part.shape[:axis])), simplify(product(part.shape[axis:]))
        if static(rows) == 0 or static(run) == 0:
            return seq()

        def store(row: Expr, column: Expr) -> Stmt:
            outer, (first, *rest) = split_index(row, part.shape[:axis]), split_index(column, part.shape[axis:])
            return kernel.point(lambda: sink((*outer, start + first, *rest), part[(*outer, first, *rest)]))

        return kernel.nest((rows, run), store, kernel.lanes(part.dtype), static(simplify(rows * run)))
