"""Greedy selection of boxes that overlap no better one (non-maximum suppression)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor
from mmopt.backends.cpu.loops import i64, loop, seq, when


@dataclasses.dataclass(frozen=True)
class Limits:
    """Scalars of a suppression as 0-d tensors; ``None`` where the operator leaves them out."""

    most: Tensor | None
    overlap: Tensor | None
    score: Tensor | None
    centres: bool


class Suppress(LoopNest):
    """Rows (batch, class, box) of the boxes kept, in order, and how many there are.

    Args:
        boxes: ``[batches, n, 4]``: two corners, or centre and extents.
        scores: ``[batches, classes, n]``.
        order: ``[batches · classes, n]``: boxes by falling score.
        limits: Thresholds.
    """

    name = "suppress"

    def __init__(self, boxes: Tensor, scores: Tensor, order: Tensor, limits: Limits) -> None:
        super().__init__()
        self.boxes, self.scores, self.order, self.limits = boxes, scores, order, limits
        given = (limits.most, limits.overlap, limits.score)
        self.inputs = (boxes, scores, order, *(t for t in given if t is not None))
        batches, classes, count = scores.shape
        self.rows = self.result([batches * classes * count, 3], "int64", "rows")
        self.count = self.result([1], "int64", "count")

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        batches, classes, count = self.scores.shape
        chosen = tirx.decl_buffer((tirx.max(count, i64(1)),), "int64", "chosen")
        state = tirx.decl_buffer((i64(3),), "int64", "state")
        total = tirx.BufferLoad(state, [i64(0)])

        def one(batch: Expr, class_: Expr) -> Stmt:
            step = lambda t: self._consider(kernel, sinks[0], (chosen, state), (batch, class_), t)  # noqa: E731
            return seq(tirx.BufferStore(state, i64(0), [i64(1)]), loop(count, step, name="t"))

        return seq(
            tirx.AllocBuffer(chosen),
            tirx.AllocBuffer(state),
            tirx.BufferStore(state, i64(0), [i64(0)]),
            loop(batches, lambda b: loop(classes, lambda c: one(b, c), name="c"), name="b"),
            kernel.point(lambda: sinks[1]((i64(0),), total)),
        )

    def _consider(
        self, kernel: Any, sink: Sink, buffers: tuple[tirx.Buffer, tirx.Buffer], place: tuple[Expr, Expr], t: Expr
    ) -> Stmt:
        """Keep box ``t`` of the order unless a kept one overlaps it; ``state`` is (rows, kept here, suppressed)."""
        chosen, state = buffers
        batch, class_ = place
        total, kept, hidden = (tirx.BufferLoad(state, [i64(n)]) for n in range(3))
        box = tirx.Var("box", "int64")

        def check(r: Expr) -> Stmt:
            other = tirx.BufferLoad(chosen, [r])
            mark = tirx.BufferStore(state, i64(1), [i64(2)])
            return kernel.point(lambda: when(self._overlaps(batch, box, other), mark))

        keep = seq(
            *(kernel.point(lambda n=n, v=v: sink((total, i64(n)), v)) for n, v in enumerate((batch, class_, box))),
            tirx.BufferStore(chosen, box, [kept]),
            tirx.BufferStore(state, kept + 1, [i64(1)]),
            tirx.BufferStore(state, total + 1, [i64(0)]),
        )

        def decide() -> Stmt:
            most = self.limits.most[()].astype("int64") if self.limits.most is not None else i64(0)
            able = kept < most
            if self.limits.score is not None:
                able = tirx.all(able, self.scores[batch, class_, box] > self.limits.score[()])
            inner = seq(
                tirx.BufferStore(state, i64(0), [i64(2)]),
                loop(kept, check, name="r"),
                when(tirx.EQ(hidden, i64(0)), keep),
            )
            return when(able, inner)

        return seq(
            kernel.point(lambda: tirx.Bind(box, self.order[batch * self.scores.shape[1] + class_, t])),
            kernel.point(decide),
        )

    def _overlaps(self, batch: Expr, first: Expr, second: Expr) -> Expr:
        zero = tirx.const(0, self.boxes.dtype)
        a, b = self._corners(batch, first), self._corners(batch, second)
        height = tirx.max(tirx.min(a[2], b[2]) - tirx.max(a[0], b[0]), zero)
        width = tirx.max(tirx.min(a[3], b[3]) - tirx.max(a[1], b[1]), zero)
        shared = height * width
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
        limit = self.limits.overlap[()] if self.limits.overlap is not None else zero
        return tirx.all(union > zero, shared > limit * union)

    def _corners(self, batch: Expr, box: Expr) -> tuple[Expr, Expr, Expr, Expr]:
        p = [self.boxes[batch, box, i64(n)] for n in range(4)]
        if self.limits.centres:
            half = tirx.const(0.5, self.boxes.dtype)
            return p[1] - p[3] * half, p[0] - p[2] * half, p[1] + p[3] * half, p[0] + p[2] * half
        return tirx.min(p[0], p[2]), tirx.min(p[1], p[3]), tirx.max(p[0], p[2]), tirx.max(p[1], p[3])
