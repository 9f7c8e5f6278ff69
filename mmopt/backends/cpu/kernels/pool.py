"""Pooling over windows, one axis at a time.

For each row of the result, the rows of the input that its windows cover are combined into one line with contiguous
vector loads; then the line's elements are combined along the last axis. Only loop bounds and branches outside the
vector loops know about padding, which is the combiner's identity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import Combiner, LoopNest, Sink, Tensor
from mmopt.backends.cpu.loops import i64, loop, product, seq, static, when
from mmopt.backends.expressions import simplify


@dataclasses.dataclass(frozen=True)
class Windows:
    """Where windows lie over the spatial axes.

    Attributes:
        kernel: Extents of a window.
        strides: Steps between windows.
        dilations: Steps inside a window.
        before: Padding in front of each axis.
        after: Padding behind each axis.
        out: Number of windows along each axis.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[Expr, ...]
    after: tuple[Expr, ...]
    out: tuple[Expr, ...]

    def position(self, axis: int, window: Expr, step: int | Expr) -> Expr:
        """Input position of one element of a window; outside the input in padding."""
        return window * self.strides[axis] + i64_of(step) * self.dilations[axis] - self.before[axis]


def i64_of(value: int | Expr) -> Expr:
    """An index expression."""
    return i64(value) if isinstance(value, int) else value


class Pool(LoopNest):
    """``y[n, c, o…] = finish(combine over the window of before(x[n, c, …]), o…)``.

    Args:
        data: ``[N, C, spatial…]``.
        windows: Geometry.
        accumulator: Type of the state.
        combiner: How elements merge.
        before: Applied to each element.
        finish: Result from the state and the spatial position.
    """

    name = "pool"

    def __init__(
        self,
        data: Tensor,
        windows: Windows,
        accumulator: str,
        combiner: Combiner,
        before: Callable[[Expr], Expr],
        finish: Callable[[Expr, Sequence[Expr]], Expr],
    ) -> None:
        super().__init__()
        self.data, self.inputs, self.windows = data, (data,), windows
        self.accumulator, self.combiner, self.before, self.finish = accumulator, combiner, before, finish
        self.output = self.result((*data.shape[:2], *windows.out), data.dtype, "pool")

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        shape, w = self.output.shape, self.windows
        last = len(w.kernel) - 1
        width = simplify((w.out[last] - 1) * w.strides[last] + ((w.kernel[last] - 1) * w.dilations[last] + 1))
        work = static(simplify(product(shape)))

        def row(*at: Expr) -> Stmt:
            line = tirx.decl_buffer(
                (tirx.max(width, i64(1)) if static(width) is None else width,), self.accumulator, "line"
            )
            (identity,) = self.combiner.identity((self.accumulator,))
            lanes = kernel.lanes(self.accumulator)
            clear = kernel.vector(width, lanes, lambda v: tirx.BufferStore(line, identity, [v]))
            gather = self._rows(kernel, line, width, at, 0, ())
            return seq(tirx.AllocBuffer(line), clear, gather, self._along(kernel, sinks[0], line, at))

        return kernel.rows(shape[:-1], row, None if work is None else work * max(1, sum(w.kernel)))

    def _rows(
        self, kernel: Any, line: tirx.Buffer, width: Expr, at: tuple[Expr, ...], axis: int, chosen: tuple[Expr, ...]
    ) -> Stmt:
        """Combine into ``line`` every input row that the windows of result row ``at`` cover."""
        w = self.windows
        if axis == len(w.kernel) - 1:
            return self._merge(kernel, line, width, (*at[:2], *chosen))

        def step(k: Expr) -> Stmt:
            position = simplify(w.position(axis, at[2 + axis], k))
            inner = self._rows(kernel, line, width, at, axis + 1, (*chosen, position))
            inside = tirx.all(position >= i64(0), position < self.data.shape[2 + axis])
            return when(inside, inner)

        return loop(w.kernel[axis], step, name="k")

    def _merge(self, kernel: Any, line: tirx.Buffer, width: Expr, at: tuple[Expr, ...]) -> Stmt:
        shift = self.windows.before[-1]
        first = simplify(tirx.max(-shift, i64(0)))
        past = simplify(tirx.min(self.data.shape[-1], width - shift))
        lanes = kernel.lanes(self.accumulator, self.data.dtype)

        def element(v: Expr) -> Stmt:
            x = self.before(self.data[(*at, first + v)].astype(self.accumulator))
            old = tirx.BufferLoad(line, [first + v + shift])
            (new,) = self.combiner.combine((old,), (x,))
            return tirx.BufferStore(line, new, [first + v + shift])

        return kernel.vector(simplify(past - first), lanes, lambda v: kernel.point(lambda: element(v)))

    def _along(self, kernel: Any, sink: Sink, line: tirx.Buffer, at: tuple[Expr, ...]) -> Stmt:
        w = self.windows
        count, stride, dilation = w.kernel[-1], w.strides[-1], w.dilations[-1]

        def element(v: Expr) -> Stmt:
            state = tirx.BufferLoad(line, [v * stride])
            for k in range(1, count):
                (state,) = self.combiner.combine((state,), (tirx.BufferLoad(line, [v * stride + k * dilation]),))
            value = self.finish(state, (*at[2:], v)).astype(self.data.dtype)
            return sink((*at, v), value)

        return kernel.vector(w.out[-1], kernel.lanes(self.accumulator), lambda v: kernel.point(lambda: element(v)))
