"""Running sums and products along the middle one of three axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor
from mmopt.backends.cpu.loops import i64, loop, product, seq, static
from mmopt.backends.expressions import simplify


class Scan(LoopNest):
    """``y[o, k, i] = Σ x[o, :k+1, i]`` (or the product), one parallel row for each ``o``, lanes along ``i``.

    Args:
        data: ``[outer, n, inner]``.
        product: Multiply instead of adding.
        exclusive: Leave the element itself out.
        reverse: From the end.
        accumulator: Type of the running value.
    """

    name = "scan"

    def __init__(self, data: Tensor, *, product: bool, exclusive: bool, reverse: bool, accumulator: str) -> None:
        super().__init__()
        self.data, self.inputs = data, (data,)
        self.product, self.exclusive, self.reverse, self.accumulator = product, exclusive, reverse, accumulator
        self.output = self.result(data.shape, data.dtype, "scan")

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        outer, count, inner = self.data.shape
        lanes = kernel.lanes(self.accumulator)

        def row(o: Expr) -> Stmt:
            running = tirx.decl_buffer((tirx.max(inner, i64(1)),), self.accumulator, "running")
            first = tirx.const(1 if self.product else 0, self.accumulator)
            clear = kernel.vector(inner, lanes, lambda i: tirx.BufferStore(running, first, [i]))
            return seq(
                tirx.AllocBuffer(running),
                clear,
                loop(count, lambda k: self._step(kernel, sinks[0], running, o, k), name="k"),
            )

        return kernel.rows((outer,), row, static(simplify(product(self.data.shape))))

    def _step(self, kernel: Any, sink: Sink, running: tirx.Buffer, o: Expr, k: Expr) -> Stmt:
        count, inner = self.data.shape[1:]
        position = count - 1 - k if self.reverse else k

        def element(i: Expr) -> Stmt:
            old = tirx.BufferLoad(running, [i])
            new = self.data[o, position, i].astype(self.accumulator)
            update = tirx.BufferStore(running, old * new if self.product else old + new, [i])
            write = sink((o, position, i), old.astype(self.data.dtype))
            return seq(write, update) if self.exclusive else seq(update, write)

        return kernel.vector(inner, kernel.lanes(self.accumulator), lambda i: kernel.point(lambda: element(i)))
