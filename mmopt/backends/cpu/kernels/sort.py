"""Stable merge sort of rows, giving the order of the items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor
from mmopt.backends.cpu.loops import i64, loop, seq, static, when

_MAX_PASSES = 40
"""Merge passes for a number of items known only at run time."""


class Sort(LoopNest):
    """``order[r, t]`` is the item of row ``r`` that comes at place ``t``; equal items keep their order.

    Args:
        keys: ``[rows, items, length]``; items are compared by their keys element by element.
        descending: Largest first.
    """

    name = "sort"

    def __init__(self, keys: Tensor, *, descending: bool) -> None:
        super().__init__()
        self.keys, self.inputs, self.descending = keys, (keys,), descending
        self.output = self.result(keys.shape[:2], "int64", "order")

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        rows, items, _ = self.keys.shape
        room = (tirx.max(items, i64(1)),)

        def row(r: Expr) -> Stmt:
            order, merged = (tirx.decl_buffer(room, "int64", n) for n in ("order", "merged"))
            state = tirx.decl_buffer((i64(3),), "int64", "state")
            fill = loop(items, lambda i: tirx.BufferStore(order, i, [i]))
            hand_over = loop(items, lambda i: kernel.point(lambda: sinks[0]((r, i), tirx.BufferLoad(order, [i]))))
            buffers = [tirx.AllocBuffer(b) for b in (order, merged, state)]
            return seq(*buffers, fill, self._passes(kernel, r, order, merged, state), hand_over)

        return kernel.rows((rows,), row, None)

    def _passes(self, kernel: Any, r: Expr, order: tirx.Buffer, merged: tirx.Buffer, state: tirx.Buffer) -> Stmt:
        items = self.keys.shape[1]
        size = static(items)
        count = max(0, (size - 1).bit_length()) if size is not None else _MAX_PASSES

        def one(number: Expr) -> Stmt:
            width = tirx.shift_left(i64(1), number)
            blocks = tirx.floordiv(items + width * 2 - 1, width * 2)
            merge = loop(
                blocks, lambda b: self._merge(kernel, r, (order, merged, state), b * width * 2, width), name="b"
            )
            back = loop(items, lambda i: tirx.BufferStore(order, tirx.BufferLoad(merged, [i]), [i]))
            return when(width < items, seq(merge, back))

        return loop(count, one, name="p")

    def _merge(self, kernel: Any, r: Expr, buffers: tuple[tirx.Buffer, ...], start: Expr, width: Expr) -> Stmt:
        """Merge two sorted runs; ``state`` holds a cursor into each and the last comparison."""
        order, merged, state = buffers
        items = self.keys.shape[1]
        middle, end = tirx.min(start + width, items), tirx.min(start + width * 2, items)
        left, right, verdict = (tirx.BufferLoad(state, [i64(n)]) for n in range(3))

        def item(cursor: Expr) -> Expr:
            return tirx.BufferLoad(order, [tirx.min(cursor, items - 1)])

        def step(t: Expr) -> Stmt:
            take_right = tirx.all(right < end, tirx.any(left >= middle, verdict > i64(0)))
            from_right = seq(
                tirx.BufferStore(merged, item(right), [start + t]), tirx.BufferStore(state, right + 1, [i64(1)])
            )
            from_left = seq(
                tirx.BufferStore(merged, item(left), [start + t]), tirx.BufferStore(state, left + 1, [i64(0)])
            )
            return seq(
                self._compare(kernel, state, r, item(right), item(left)), when(take_right, from_right, from_left)
            )

        cursors = (tirx.BufferStore(state, start, [i64(0)]), tirx.BufferStore(state, middle, [i64(1)]))
        return seq(*cursors, loop(tirx.max(end - start, i64(0)), step, name="t"))

    def _compare(self, kernel: Any, state: tirx.Buffer, r: Expr, new: Expr, old: Expr) -> Stmt:
        """``state[2]``: 1 where item ``new`` comes before item ``old``, -1 where behind, 0 for equals."""
        verdict = tirx.BufferLoad(state, [i64(2)])

        def element(e: Expr) -> Stmt:
            a, b = self.keys[r, new, e], self.keys[r, old, e]
            first, last = (a > b, a < b) if self.descending else (a < b, a > b)
            sign = tirx.Select(first, i64(1), tirx.Select(last, i64(-1), i64(0)))
            return when(tirx.EQ(verdict, i64(0)), tirx.BufferStore(state, sign, [i64(2)]))

        body = loop(self.keys.shape[2], lambda e: kernel.point(lambda: element(e)), name="e")
        return seq(tirx.BufferStore(state, i64(0), [i64(2)]), body)
