"""Attention of bfloat16 operands by dot-product instructions, with online softmax in float32.

    Y = softmax(scale · Q·Kᵀ + mask) · V      tiles of query rows against blocks of keys; no matrix of scores in memory

A task takes the rows of one head. It packs that head's keys and values once, as the micro-kernels want them, and then
walks the tiles of rows: products with a block of keys, their exponentials as bfloat16, products of those with the
values, added to what earlier blocks gave after that is brought to the new maximum. A row that no key is open to gives
zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Tensor
from mmopt.backends.cpu.avx512 import Rounding, has_bfloat16
from mmopt.backends.cpu.choosing import Workload
from mmopt.backends.cpu.dot import Code, Dot, importing
from mmopt.backends.cpu.kernels.attention_dot_task import Task
from mmopt.backends.cpu.loops import i64, loop, split_index, static
from mmopt.backends.expressions import simplify


class DotAttention(LoopNest):
    """Attention of whole sequences, with or without a mask.

    Args:
        q: ``[batch, heads, queries, size]``, bfloat16; extents but the batch are constants.
        k: ``[batch, kv heads, keys, size]``.
        v: ``[batch, kv heads, keys, value size]``.
        scale: Factor of the scores, above zero.
        dot: The instruction.
        keys: Keys of a block, a multiple of 32.
        order: Axes of the result: ``bhsd``, ``bshd``, or ``bsm`` with the heads side by side.
        workload: What was chosen for.
        mask: ``[batch|1, heads|1, queries|1, keys]``: flags of the keys that are open, or float32 to add to the scores.
    """

    name = "attention_bf16"

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        dot: Dot,
        keys: int,
        order: str,
        workload: Workload | None = None,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.inputs = tuple(dict.fromkeys(t for t in (q, k, v, mask) if t is not None))
        self.q, self.k, self.v, self.dot, self.order, self.block = q, k, v, dot, order, keys
        self.mask, self.scale = mask, scale
        self.factor = scale * math.log2(math.e)
        self.workload = workload
        self.batch = q.shape[0]
        self.heads, self.queries, self.size = (static(d) or 1 for d in q.shape[1:])
        self.sharing = self.heads // (static(k.shape[1]) or 1)
        self.keys, self.value_size = static(k.shape[2]) or 1, static(v.shape[3]) or 1
        self.rows = min(dot.most_rows[1], self.queries)
        shapes: dict[str, tuple[Expr | int, ...]] = {
            "bhsd": (self.batch, self.heads, self.queries, self.value_size),
            "bshd": (self.batch, self.queries, self.heads, self.value_size),
            "bsm": (self.batch, self.queries, self.heads * self.value_size),
        }
        self.output = self.result(shapes[order], "float32", "attention")

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return {"instruction": self.dot.name, "rows": self.rows, "keys": self.block}

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        """One parallel loop over images and heads."""
        kernels: list[Code] = []
        if native := has_bfloat16(kernel.profile):
            kernels.append(Rounding())

        def task(number: Expr) -> Stmt:
            batch, head = split_index(number, (self.batch, i64(self.heads)))
            return Task(self, sinks[0], batch, head, kernels, native).emit()

        body = loop(simplify(self.batch * self.heads), task, "parallel", "task")
        return importing(kernels, body)

    def at(self, batch: Expr, head: Expr, query: Expr, d: Expr) -> tuple[Expr, ...]:
        """Indices of an element of the result."""
        if self.order == "bhsd":
            return batch, head, query, d
        return (batch, query, head, d) if self.order == "bshd" else (batch, query, head * self.value_size + d)
