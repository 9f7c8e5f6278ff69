"""Depthwise convolution: one filter a channel, over blocked channels."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor
from mmopt.backends.cpu.kernels.conv import Window, kind_for
from mmopt.backends.cpu.loops import i64, loop, loops, product, seq, split_index, static
from mmopt.backends.expressions import simplify


class DepthwiseConvolution(LoopNest):
    """One filter a channel, over blocked channels: ``[N, C/B, *space, B]`` with weights ``[C/B, *kernel, B]``."""

    name = "conv_depthwise"

    def __init__(self, x: Tensor, filters: Tensor, *, window: Window, rows: int) -> None:
        super().__init__()
        self.inputs = (x, filters)
        self.x, self.filters, self.window, self.rows = x, filters, window, rows
        self.lanes = static(x.shape[-1]) or 1
        self.space = window.output(x.shape[2:-1])
        self.output = self.result((x.shape[0], x.shape[1], *self.space, x.shape[-1]), x.dtype)

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return {"rows": self.rows, "kernel": self.window.kernel}

    def emit(self, kernel: object, sinks: Sequence[Sink]) -> Stmt:
        """One parallel loop over images × channel blocks × all spatial axes but the last."""
        *outer, width = self.space
        extents = (self.x.shape[0], self.x.shape[1], *outer)

        def task(flat: Expr) -> Stmt:
            image, block, *at = split_index(flat, extents)
            total = static(width)
            height = min(self.rows, total) if total else self.rows
            full = simplify(tirx.floordiv(width, i64(height)))
            rest = simplify(tirx.floormod(width, i64(height)))

            def tile(start: Expr, rows: int) -> Stmt:
                return self._tile(sinks[0], image, block, tuple(at), start, rows)

            return seq(
                loop(full, lambda t: tile(t * height, height), name="tile"),
                loop(rest, lambda r: tile(full * height + r, 1), name="r"),
            )

        return loop(simplify(product(extents)), task, kind_for(self.output.shape, self.filters.shape[1:-1]), "task")

    def _tile(self, sink: Sink, image: Expr, block: Expr, outer: tuple[Expr, ...], start: Expr, rows: int) -> Stmt:
        acc = tirx.decl_buffer((i64(rows * self.lanes),), self.output.dtype, "acc")

        def each(body: object) -> Stmt:
            return seq(*(loop(self.lanes, lambda v, i=i: body(i, v), "vectorized", "v") for i in range(rows)))  # type: ignore[misc, operator]

        def at(i: int, v: Expr) -> Expr:
            return i64(i * self.lanes) + v

        def step(*tap: Expr) -> Stmt:
            def update(i: int, v: Expr) -> Stmt:
                where = self.window.position((*outer, start + i), tap)
                value = self.x[(image, block, *where, v)] * self.filters[(block, *tap, v)]
                return tirx.BufferStore(acc, acc[at(i, v)] + value, [at(i, v)])

            return each(update)

        clear = each(lambda i, v: tirx.BufferStore(acc, tirx.const(0, self.output.dtype), [at(i, v)]))
        done = each(lambda i, v: sink((image, block, *outer, start + i, v), acc[at(i, v)]))
        return seq(tirx.AllocBuffer(acc), clear, loops([i64(k) for k in self.window.kernel], step, "t"), done)
