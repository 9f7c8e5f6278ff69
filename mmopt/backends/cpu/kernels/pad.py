"""Padding by a constant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor
from mmopt.backends.cpu.loops import i64, product, seq, split_index, static
from mmopt.backends.expressions import simplify


class Pad(LoopNest):
    """A tensor inside a constant: the result is filled, then the part that ``data`` covers is copied.

    Args:
        data: What is padded; negative padding crops it.
        before: Elements added in front of each axis.
        shape: Extents of the result.
        value: The constant, or a 0-d tensor with it.
    """

    name = "pad"

    def __init__(self, data: Tensor, before: Sequence[Expr], shape: Sequence[Expr], value: Tensor | Expr) -> None:
        super().__init__()
        self.data, self.before, self.value = data, tuple(before), value
        self.inputs = (data, value) if isinstance(value, Tensor) else (data,)
        self.output = self.result(shape, data.dtype, "pad")

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        shape = self.output.shape

        def fill(flat: Expr) -> Stmt:
            value = self.value[()] if isinstance(self.value, Tensor) else self.value
            return kernel.point(lambda: sinks[0](split_index(flat, shape), value))

        if not shape:
            return kernel.point(lambda: sinks[0]((), self.data[()]))
        total = simplify(product(shape))
        if static(total) == 0:
            return seq()
        return seq(
            kernel.nest((total,), fill, kernel.lanes(self.data.dtype), static(total)), self._copy(kernel, sinks[0])
        )

    def _copy(self, kernel: Any, sink: Sink) -> Stmt:
        shape = self.output.shape
        first = [simplify(tirx.max(b, i64(0))) for b in self.before]
        past = [simplify(tirx.min(b + n, e)) for b, n, e in zip(self.before, self.data.shape, shape, strict=True)]
        counts = [simplify(tirx.max(e - s, i64(0))) for s, e in zip(first, past, strict=True)]
        if any(static(c) == 0 for c in counts):
            return seq()

        def store(*at: Expr) -> Stmt:
            out = [i + s for i, s in zip(at, first, strict=True)]
            indices = tuple(o - b for o, b in zip(out, self.before, strict=True))
            return kernel.point(lambda: sink(out, self.data[indices]))

        return kernel.nest(counts, store, kernel.lanes(self.data.dtype), static(simplify(product(counts))))
