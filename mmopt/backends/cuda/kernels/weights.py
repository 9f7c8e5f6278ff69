"""Products with weights of 8 or 4 bits, and products with few rows; see ``weights.cuh``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Source
from mmopt.backends.cpu.choosing import Candidate, typical
from mmopt.backends.cpu.loops import i64, keep, product, seq, split_index, static, when
from mmopt.backends.cuda.kernels.operand import CHUNK, Operand
from mmopt.backends.cuda.kernels.product import KINDS, UNPREDICTED, TensorProduct, Tile, as_int, call, pointer
from mmopt.backends.cuda.threads import WARP, each, launch, shared
from mmopt.backends.expressions import itemsize, simplify
from mmopt.backends.profile import Profile

FEW = 8
"""Rows up to which a product takes as long as reading its weights."""

WARPS = 4
"""Warps of a block of few rows."""

MOST_SUMS = 16
"""Rows times columns that a warp sums at most."""

READ = 10
"""Bytes of memory that a multiprocessor reads in a cycle, when all do."""


@dataclasses.dataclass(frozen=True)
class WeightRows:
    """Weights with the summed axis last, in rows of whole chunks.

    Attributes:
        data: Floats ``[N, padded]``; int8 ``[N, padded]``; or uint8 ``[N, padded / 2]`` with two numbers in a byte.
        bits: 8 or 4; 0 for floats.
        scales: float32 ``[N, groups]``.
        zeros: As ``scales``, where zero points differ.
        zero: The zero point, where they do not.
        group: Numbers of a row that share a scale; 0 for all.
    """

    data: Source
    bits: int = 0
    scales: Source | None = None
    zeros: Source | None = None
    zero: float = 0.0
    group: int = 0

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(source for source in (self.data, self.scales, self.zeros) if source is not None)

    @property
    def stride(self) -> Expr:
        """Bytes from one row to the next."""
        return simplify(self.data.shape[1] * itemsize(self.data.dtype))

    def step(self, kind: str) -> int:
        """Numbers that a thread of a product of few rows reads at a time, which have to share a scale."""
        return CHUNK * 8 // (self.bits or itemsize(kind) * 8)

    def pointers(self, kernel: Any, column: Expr) -> list[Expr]:
        """Addresses of the numbers, scales and zero points of a column; that of the numbers where there are none."""
        data = tirx.handle_add_byte_offset(kernel.places[self.data].buffer.data, simplify(column * self.stride))

        def of(source: Source | None) -> Expr | None:
            if source is None:
                return None
            return tirx.handle_add_byte_offset(kernel.places[source].buffer.data, column * source.shape[1] * 4)

        nothing = tirx.reinterpret(data.ty, i64(0))
        return [data, *(given if (given := of(s)) is not None else nothing for s in (self.scales, self.zeros))]

    def numbers(self) -> list[Expr]:
        """The zero point, and how many scales a row has."""
        groups = i64(1) if self.scales is None else self.scales.shape[1]
        return [tirx.const(self.zero, "float32"), as_int(groups)]


class DequantizedProduct(TensorProduct):
    """``y[i, j] = Σ a[i, k] · w[j, k]`` with weights that become floats as they are loaded.

    Args:
        a: Left operand, ``[M, K]``.
        weights: ``[N, K]``.
        sizes: M, N and K.
        tile: What a block computes.
        shape: Axes of the result that its rows are split into.
    """

    name = "dequantized_product"

    def __init__(
        self, a: Operand, weights: WeightRows, *, sizes: tuple[Expr, Expr, Expr], tile: Tile, shape: Sequence[Expr]
    ) -> None:
        rows = Operand(weights.data, i64(0), (weights.data.shape[1], i64(1)))
        super().__init__(a, rows, batch=(), sizes=sizes, tile=tile, shape=shape)
        self.weights = weights
        self.inputs = tuple(dict.fromkeys((a.source, *weights.sources)))

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return {**super().parameters(), "bits": self.weights.bits, "group": self.weights.group}

    def _multiply(self, kernel: Any, total: Expr, memory: Expr, at: Sequence[Expr], row: Expr, column: Expr) -> Stmt:
        direct = self.a.aligned(1, self.k)
        left = pointer(kernel, self.a, (row,))
        given = [self.a.strides[0]] if direct else list(self.a.strides)
        ends = [as_int(self.m - row), as_int(self.n - column), as_int(self.k)]
        parameters = self.tile.parameters(self.kind, self.kind)
        name = "mmopt_rows_by_numbers" if direct else "mmopt_any_by_numbers"
        function = f"{name}<{parameters}, {self.weights.bits}, {self.weights.group}>"
        weights = self.weights.pointers(kernel, column)
        return call(
            function, total, memory, left, *weights, *given, self.weights.stride, *self.weights.numbers(), *ends
        )


class FewRows(LoopNest):
    """``y[i, j] = Σ a[i, k] · w[j, k]`` for up to :data:`FEW` rows: a warp sums a column or some.

    Args:
        a: Left operand, ``[M, K]``, in whole chunks; see :meth:`Operand.aligned`.
        weights: ``[N, K]``.
        rows: M.
        sizes: N and K.
        shape: Axes of the result that its rows are split into.
        columns: Columns that a warp sums; see :func:`columns_candidates`.
    """

    name = "few_rows"

    def __init__(
        self,
        a: Operand,
        weights: WeightRows,
        *,
        rows: int,
        sizes: tuple[int, Expr],
        shape: Sequence[Expr],
        columns: int,
    ) -> None:
        super().__init__()
        self.a, self.weights, self.rows, self.shape = a, weights, rows, tuple(shape)
        self.n, self.k = sizes
        self.inputs = tuple(dict.fromkeys((a.source, *weights.sources)))
        self.columns = columns
        self.output = self.result((*self.shape, i64(self.n)), "float32", "product")

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        kind = self.a.source.dtype
        return {
            "rows": self.rows,
            "columns": self.columns,
            "type": kind,
            "bits": self.weights.bits or itemsize(kind) * 8,
        }

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        width = WARPS * self.columns

        def block(number: Expr, thread: Expr) -> Stmt:
            column = number * width
            memory = shared((i64(self.rows * width * 4),), "uint8", "memory")

            def element(flat: Expr) -> Stmt:
                value = tirx.call_extern("float32", "mmopt_delivered<float>", memory.data, as_int(flat))
                statement, kept = keep(value, "sum")
                row, c = tirx.floordiv(flat, i64(width)), column + tirx.floormod(flat, i64(width))
                return seq(statement, when(c < self.n, sinks[0]((*split_index(row, self.shape), c), kept)))

            return seq(
                tirx.AllocBuffer(memory),
                self._multiply(kernel, memory.data, column),
                each(i64(self.rows * width), thread, WARPS * WARP, element),
            )

        return launch([i64(-(-self.n // width))], WARPS * WARP, block)

    def _multiply(self, kernel: Any, memory: Expr, column: Expr) -> Stmt:
        kind = KINDS[self.a.source.dtype, self.a.source.dtype]
        weights = self.weights
        function = f"mmopt_few_rows<{kind}, {self.rows}, {self.columns}, {weights.bits}, {weights.group}>"
        pointers = [pointer(kernel, self.a, ()), *weights.pointers(kernel, column)]
        steps = [self.a.strides[0], weights.stride]
        sizes = [as_int(self.n - column), as_int(self.k)]
        return call(function, memory, *pointers, *steps, *weights.numbers(), *sizes)


def columns_candidates(rows: int, sizes: tuple[int, int | str], bits: int, profile: Profile) -> list[Candidate]:
    """How many columns a warp may sum: as many as leave two blocks for every multiprocessor are predicted to be best.

    Args:
        rows: M.
        sizes: N and K, or its name.
        bits: Of a weight.
        profile: A ``cuda`` profile.
    """
    n, depth = sizes
    cycles = n * typical(depth) * bits / 8 / (READ * profile.cores)
    offered = [c for c in (4, 2, 1) if rows * c <= MOST_SUMS]
    best = next((c for c in offered if n >= WARPS * c * 2 * profile.cores), 1)
    return [Candidate({"columns": c}, cycles * (1.0 if c == best else UNPREDICTED)) for c in offered]


def few(rows: Sequence[Expr]) -> int | None:
    """How many rows there are, when that is known and few."""
    count = static(simplify(product(rows)))
    return count if count is not None and 0 < count <= FEW else None
