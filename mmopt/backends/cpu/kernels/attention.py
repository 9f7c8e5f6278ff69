"""Scaled dot-product attention without the matrix of scores in memory.

    Y[i] = Σ_j p_ij · V[j] / Σ_j p_ij,   p_ij = exp(s_ij − max_j s_ij),   s_ij = cap(scale · Q[i]·K[j]) + mask[i, j]

Keys and values are taken in blocks that fit the second-level cache, a block's keys transposed into panels so that the
lanes of a vector are neighbouring keys. A tile of query rows makes its scores for the whole block in the first-level
cache, turns them into weights, and adds their product with the values to its results. Maximum and sum of a row are
carried from block to block, and what has been summed is rescaled when the maximum grows (Milakov & Gimelshein 2018;
Dao et al. 2022). Where all keys fit one block, nothing is carried. With a handful of query rows (decoding), nothing is
transposed: scores are dot products in the order of memory.

Query heads that share keys and values are rows of one task: row ``r`` is query ``r mod queries`` of the group's head
``r div queries``. A row that no key is open to gives zeros, as the standard has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor
from mmopt.backends.cpu.kernels.attention_blocking import FEW, Blocking
from mmopt.backends.cpu.kernels.attention_task import Task
from mmopt.backends.cpu.loops import i64, loop, split_index, static, when
from mmopt.backends.expressions import simplify


@dataclasses.dataclass(frozen=True)
class Rules:
    """What happens to a score before the softmax.

    Attributes:
        scale: Factor of the product.
        softcap: ``c · tanh(s / c)`` is applied when positive.
        causal: Query i sees keys up to i + offset.
        offset: Keys before the first query; with lengths, each batch's length − queries instead.
    """

    scale: float
    softcap: float = 0.0
    causal: bool = False
    offset: Expr | None = None


class Attention(LoopNest):
    """Attention of all heads of a batch.

    Args:
        q: ``[B, G·H, queries, size]``.
        k: ``[B, H, keys, size]``; ``size`` and ``H`` are constants.
        v: ``[B, H, keys, value size]``.
        mask: ``[B|1, G·H|1, queries|1, ≤ keys]``: flags, or numbers to add. Keys beyond its end are closed.
        lengths: ``[B]``: keys beyond are closed.
        rules: What happens to the scores.
        blocking: Parameters.
        few: Parameters for at most :data:`FEW` query rows, where their number is not known.
        lanes: Elements of a vector of ``accumulator``.
        accumulator: Type of the arithmetic.
        order: Axes of the result: ``bhsd``, ``bshd``, or ``bsm`` with the heads side by side.
    """

    name = "attention"

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        lengths: Tensor | None,
        rules: Rules,
        blocking: Blocking,
        few: Blocking | None,
        lanes: int,
        accumulator: str,
        order: str,
    ) -> None:
        super().__init__()
        self.inputs = tuple(dict.fromkeys(t for t in (q, k, v, mask, lengths) if t is not None))
        self.q, self.k, self.v, self.mask, self.lengths = q, k, v, mask, lengths
        self.rules, self.blocking, self.few, self.lanes, self.accumulator = rules, blocking, few, lanes, accumulator
        self.batch, heads, self.queries, _ = q.shape
        self.heads = static(k.shape[1]) or 1
        self.sharing = (static(heads) or 1) // self.heads
        self.keys = k.shape[2]
        self.size, self.value_size = static(q.shape[3]) or 1, static(v.shape[3]) or 1
        self.rows = simplify(self.queries * self.sharing)
        self.order = order
        shapes = {
            "bhsd": (self.batch, heads, self.queries, v.shape[3]),
            "bshd": (self.batch, self.queries, heads, v.shape[3]),
            "bsm": (self.batch, self.queries, simplify(heads * v.shape[3])),
        }
        self.output = self.result(shapes[order], q.dtype, "attention")

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return dataclasses.asdict(self.blocking)

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        """One parallel loop over batch × heads × chunks of query rows."""
        work = self._tasks(kernel, sinks[0], self.blocking)
        if self.few is not None:
            work = when(self.rows <= FEW, self._tasks(kernel, sinks[0], self.few), work)
        return work

    def _tasks(self, kernel: Any, sink: Sink, blocking: Blocking) -> Stmt:
        chunks = simplify(tirx.floordiv(self.rows + (blocking.chunk - 1), i64(blocking.chunk)))

        def task(flat: Expr) -> Stmt:
            batch, head, chunk = split_index(flat, (self.batch, i64(self.heads), chunks))
            return Task(self, kernel, sink, blocking, batch, head).emit(chunk * blocking.chunk)

        count = simplify(self.batch * self.heads * chunks)
        work = static(simplify(self.batch * self.rows * self.keys * (self.heads * (self.size + self.value_size))))
        return loop(count, task, "serial" if work is not None and work < 1 << 16 else "parallel", "task")

    def at(self, batch: Expr, head: Expr, row: Expr, d: Expr) -> tuple[Expr, ...]:
        """Indices of an element of the result."""
        head, query = self.place(head, row)
        if self.order == "bhsd":
            return batch, head, query, d
        return (batch, query, head, d) if self.order == "bshd" else (batch, query, head * self.value_size + d)

    def place(self, head: Expr, row: Expr) -> tuple[Expr, Expr]:
        """Query head and query of a row of a group."""
        if self.sharing == 1:
            return head, row
        group, query = split_index(row, (i64(self.sharing), self.queries))
        return head * self.sharing + group, query
