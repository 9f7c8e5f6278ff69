"""Products of matrices on tensor cores; see ``products.cuh``.

A block computes a tile of results and hands it through shared memory to the epilogues, so that these are ordinary code
with neighbouring threads at neighbouring elements.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink
from mmopt.backends.cpu.choosing import Candidate, Parameter, typical
from mmopt.backends.cpu.loops import i64, keep, loop, product, seq, split_index, when
from mmopt.backends.cuda.kernels.operand import Operand
from mmopt.backends.cuda.launching import unless_empty
from mmopt.backends.cuda.threads import WARP, each, launch, shared
from mmopt.backends.expressions import itemsize, simplify
from mmopt.backends.profile import Profile

ROW_BYTES = 64
"""Bytes of the summed axis that a tile holds."""

STATIC_SHARED = 48 << 10
"""Bytes of shared memory that a kernel may have without asking for more."""

KINDS = {
    ("float16", "float16"): "MMOPT_F16",
    ("bfloat16", "bfloat16"): "MMOPT_BF16",
    ("float32", "float32"): "MMOPT_F32",
    ("int8", "int8"): "MMOPT_S8",
    ("uint8", "int8"): "MMOPT_U8",
    ("int8", "uint8"): "MMOPT_S8U8",
}
"""Names of the kinds of products in ``products.cuh``, by the types of both operands."""

OLDEST = {"float16": 75, "int8": 75, "uint8": 75, "bfloat16": 80, "float32": 80}
"""First architecture whose tensor cores multiply a type; floats as three products of their parts in tf32."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a block computes: ``wm`` × ``wn`` warps with ``mt`` × ``nt`` products of 16 × 8 results each.

    Attributes:
        stages: Tiles of the operands in shared memory, one of which is multiplied while the others arrive.
        efficiency: Part of the tensor cores' rate it comes to when there are blocks enough.
    """

    wm: int
    wn: int
    mt: int
    nt: int
    stages: int
    efficiency: float

    @property
    def rows(self) -> int:
        return self.wm * self.mt * 16

    @property
    def columns(self) -> int:
        return self.wn * self.nt * 8

    @property
    def threads(self) -> int:
        return self.wm * self.wn * WARP

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return (self.rows + self.columns) * ROW_BYTES * self.stages

    @property
    def pass_rows(self) -> int:
        """Rows of results that shared memory holds at a time."""
        rows = self.rows
        while rows * self.columns * 4 > self.shared:
            rows //= 2
        return rows

    @property
    def choice(self) -> Mapping[str, Parameter]:
        """What tells it from others, for tuning."""
        return {
            "rows": self.rows,
            "columns": self.columns,
            "warps": f"{self.wm}x{self.wn}",
            "stages": self.stages,
        }

    def parameters(self, left: str, right: str) -> str:
        """Arguments of the template in C++, for operands of two types."""
        return f"{KINDS[left, right]}, {self.wm}, {self.wn}, {self.mt}, {self.nt}, {self.stages}"


TILES = (
    Tile(2, 4, 4, 4, 3, 1.0),
    Tile(2, 2, 4, 4, 3, 0.9),
    Tile(2, 2, 2, 4, 4, 0.7),
    Tile(2, 2, 1, 4, 4, 0.5),
    Tile(1, 4, 1, 2, 4, 0.35),
)
"""128 × 128, 128 × 64, 64 × 64, 32 × 64 and 16 × 64 results."""


OTHERS = (
    Tile(2, 4, 4, 4, 2, 1.0),
    Tile(4, 4, 2, 4, 3, 1.0),
    Tile(4, 4, 2, 4, 2, 1.0),
    Tile(2, 2, 4, 4, 2, 0.9),
    Tile(2, 2, 4, 4, 4, 0.9),
    Tile(4, 2, 2, 4, 3, 0.85),
    Tile(1, 4, 4, 4, 3, 0.9),
    Tile(2, 4, 2, 4, 3, 0.85),
    Tile(2, 4, 2, 4, 4, 0.85),
    Tile(2, 2, 2, 4, 3, 0.7),
    Tile(2, 2, 2, 4, 6, 0.7),
    Tile(4, 2, 1, 4, 4, 0.65),
    Tile(1, 4, 2, 4, 4, 0.6),
    Tile(2, 2, 1, 4, 3, 0.5),
    Tile(2, 2, 1, 4, 6, 0.5),
    Tile(1, 4, 1, 4, 4, 0.45),
    Tile(1, 4, 1, 2, 3, 0.35),
    Tile(1, 4, 1, 2, 6, 0.35),
    Tile(1, 2, 1, 2, 6, 0.25),
)
"""Further tiles, for those who measure: up to 128 × 128 results, down to 16 × 32, with fewer stages or more of them, or
with other shares of the warps. Their efficiencies are guesses, so that none is taken unmeasured."""

RATES = {75: 512, 80: 1024, 86: 512, 87: 512, 89: 512, 90: 1024}
"""Products of halves and sums that the tensor cores of a multiprocessor do in a cycle, by ``mma.sync``."""

_SHARES = {"float32": 1 / 6, "int8": 2.0, "uint8": 2.0}
"""The same of other types, as a multiple: floats take three products at half the rate."""

UNPREDICTED = 1.01
"""Cycles that are said of what is not to be taken unmeasured, by those of what is predicted to be best, at least."""

_ASIDE = 56
"""Registers of a thread besides its sums, at least: addresses, and what it multiplies next."""


def choose_tile(rows: int | str, columns: int | str, batch: int | str, multiprocessors: int, kind: str) -> Tile:
    """The tile with the least predicted time: rounds of blocks over all multiprocessors, by what a block takes.

    Args:
        rows: M, or its name.
        columns: N, or its name.
        batch: Number of products, or its name.
        multiprocessors: Of the GPU.
        kind: Type of the operands. The parts of floats take registers, which larger tiles would not leave.
    """
    fitting = [tile for tile in TILES if _leaves_registers(tile, kind)] or list(TILES)
    return min(fitting, key=lambda tile: _time(tile, (rows, columns), batch, multiprocessors))


def _time(tile: Tile, extents: tuple[int | str, int | str], batch: int | str, multiprocessors: int) -> float:
    sizes = zip(extents, (tile.rows, tile.columns), strict=True)
    blocks = typical(batch, 1) * math.prod(-(-typical(n, 256) // size) for n, size in sizes)
    return -(-blocks // multiprocessors) * tile.rows * tile.columns / tile.efficiency


def _leaves_registers(tile: Tile, kind: str) -> bool:
    return tile.mt * tile.nt <= (16 if kind != "float32" else 8)


def fits(tile: Tile, kind: str, profile: Profile) -> bool:
    """Whether a block finds shared memory and registers; whether the compiler spills is known when it has compiled."""
    registers = tile.threads * (tile.mt * tile.nt * 4 + _ASIDE)
    return (
        _leaves_registers(tile, kind)
        and tile.shared <= min(STATIC_SHARED, profile.shared_bytes)
        and registers <= profile.multiprocessor_registers
    )


def multiplied(kind: str, profile: Profile) -> float:
    """Products and sums that the tensor cores of a multiprocessor do in a cycle."""
    return next(r for sm, r in sorted(RATES.items(), reverse=True) if sm <= profile.sm) * _SHARES.get(kind, 1.0)


def tile_candidates(
    sizes: tuple[int | str, int | str, int | str], batch: int | str, kind: str, profile: Profile
) -> list[tuple[Candidate, Tile]]:
    """The tiles there are for a product, with the cycles they are predicted to take; :func:`choose_tile`'s is first.

    Args:
        sizes: M, N and K, or their names.
        batch: Number of products, or its name.
        kind: Type of the operands.
        profile: A ``cuda`` profile.
    """
    rows, columns, depth = sizes
    rate = multiplied(kind, profile)

    def cycles(tile: Tile) -> float:
        return _time(tile, (rows, columns), batch, profile.cores) * typical(depth, 256) / rate

    first = choose_tile(rows, columns, batch, profile.cores, kind)
    least = cycles(first)
    known = [first, *(tile for tile in TILES if tile != first and fits(tile, kind, profile))]
    others = [tile for tile in OTHERS if fits(tile, kind, profile)]
    made = [(Candidate(tile.choice, cycles(tile)), tile) for tile in known]
    return made + [(Candidate(tile.choice, max(cycles(tile), UNPREDICTED * least)), tile) for tile in others]


class TensorProduct(LoopNest):
    """``y[batch, i, j] = Σ a[batch, i, k] · b[batch, j, k]``.

    Args:
        a: Left operand, ``[batch…, M, K]``.
        b: Right operand with the summed axis last, ``[batch…, N, K]``.
        batch: Extents of the batch; an operand's missing leading axes are repeated.
        sizes: M, N and K.
        shape: Axes of the result that its rows are split into; M alone when None.
        tile: What a block computes.
    """

    name = "tensor_product"

    def __init__(
        self,
        a: Operand,
        b: Operand,
        *,
        batch: Sequence[Expr],
        sizes: tuple[Expr, Expr, Expr],
        tile: Tile,
        shape: Sequence[Expr] | None = None,
    ) -> None:
        super().__init__()
        self.a, self.b, self.batch, self.tile = a, b, tuple(batch), tile
        self.m, self.n, self.k = sizes
        self.inputs = tuple(dict.fromkeys((a.source, b.source)))
        self.kind = a.source.dtype
        self.rows = tuple(shape) if shape is not None else (self.m,)
        self.total = "int32" if itemsize(self.kind) == 1 else "float32"
        self.output = self.result((*self.batch, *self.rows, self.n), self.total, "product")

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return {"rows": self.tile.rows, "columns": self.tile.columns, "stages": self.tile.stages, "type": self.kind}

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        tile = self.tile
        across = simplify(tirx.floordiv(self.n + (tile.columns - 1), i64(tile.columns)))
        down = simplify(tirx.floordiv(self.m + (tile.rows - 1), i64(tile.rows)))
        layers = simplify(product(self.batch))

        def block(number: Expr, layer: Expr, thread: Expr) -> Stmt:
            row = tirx.floordiv(number, across) * tile.rows
            column = tirx.floormod(number, across) * tile.columns
            at = split_index(layer, self.batch)
            multiply = lambda total, memory: self._multiply(kernel, total, memory, at, row, column)  # noqa: E731

            def store(r: Expr, c: Expr, value: Expr) -> Stmt:
                write = sinks[0]((*at, *split_index(row + r, self.rows), column + c), value)
                return when(tirx.all(row + r < self.m, column + c < self.n), write)

            return tile_statement(tile, self.total, thread, multiply, store)

        blocks = simplify(across * down)
        return unless_empty(simplify(blocks * layers), launch([blocks, layers], tile.threads, block))

    def _multiply(self, kernel: Any, total: Expr, memory: Expr, at: Sequence[Expr], row: Expr, column: Expr) -> Stmt:
        axes = len(self.batch)
        a, b = _repeated(self.a, axes), _repeated(self.b, axes)
        left, right = (pointer(kernel, o, (*at, first)) for o, first in ((a, row), (b, column)))
        ends = [as_int(self.m - row), as_int(self.n - column), as_int(self.k)]
        steps = {"a": a.strides[axes:], "b": b.strides[axes:]}
        name = reading(a, b, axes, self.k)
        if name == "rows_by_rows":
            given = [steps["a"][0], steps["b"][0]]
        elif name == "rows_by_any":
            given = [steps["a"][0], *steps["b"]]
        else:
            given = [*steps["a"], *steps["b"]]
        function = f"mmopt_{name}<{self.tile.parameters(self.kind, self.b.source.dtype)}>"
        return call(function, total, memory, left, right, *given, *ends)


def tile_statement(
    tile: Tile,
    dtype: str,
    thread: Expr,
    multiply: Callable[[Expr, Expr], Stmt],
    store: Callable[[Expr, Expr, Expr], Stmt],
) -> Stmt:
    """One block: ``multiply(sums, shared memory)``, then ``store(row, column, value)`` for all results of the tile."""
    total = tirx.decl_buffer((i64(tile.mt * tile.nt * 4),), dtype, "total", scope="local")
    memory = shared((i64(tile.shared),), "uint8", "memory")
    rows, columns = tile.pass_rows, tile.columns
    c_type = "int" if dtype == "int32" else "float"

    def deliver(number: Expr) -> Stmt:
        function = f"mmopt_deliver<{tile.wm}, {tile.wn}, {tile.mt}, {tile.nt}, {rows}, {c_type}>"

        def element(flat: Expr) -> Stmt:
            value = tirx.call_extern(dtype, f"mmopt_delivered<{c_type}>", memory.data, as_int(flat))
            statement, kept = keep(value, "sum")
            r, c = tirx.floordiv(flat, i64(columns)), tirx.floormod(flat, i64(columns))
            return seq(statement, store(number * rows + r, c, kept))

        return seq(
            call(function, total.data, memory.data, as_int(number)),
            each(i64(rows * columns), thread, tile.threads, element),
        )

    return seq(
        tirx.AllocBuffer(total),
        tirx.AllocBuffer(memory),
        multiply(total.data, memory.data),
        loop(tile.rows // rows, deliver, name="part"),
    )


def reading(a: Operand, b: Operand, axes: int, depth: Expr) -> str:
    """Which operands of a product are copied in chunks: ``rows_by_rows``, ``rows_by_any``, ``any_by_any``.

    Args:
        a: Left operand, with all axes of the batch or without missing ones.
        b: Right operand, as ``a``.
        axes: Axes of the batch.
        depth: K.
    """
    a, b = _repeated(a, axes), _repeated(b, axes)
    if not a.aligned(axes + 1, depth):
        return "any_by_any"
    return "rows_by_rows" if b.aligned(axes + 1, depth) else "rows_by_any"


def _repeated(operand: Operand, axes: int) -> Operand:
    """``operand`` with axes in front that it does not have, or that it has one index of."""
    missing = axes + 2 - len(operand.strides)
    return dataclasses.replace(operand, strides=(*[i64(0)] * missing, *operand.strides))


def pointer(kernel: Any, operand: Operand, at: Sequence[Expr]) -> Expr:
    """Address of an element of ``operand``."""
    data = kernel.places[operand.source].buffer.data
    return tirx.handle_add_byte_offset(data, operand.offset(at) * itemsize(operand.source.dtype))


def as_int(value: Expr) -> Expr:
    """``value``, which is small, in 32 bits."""
    return value.astype("int32")


def call(function: str, *arguments: Expr) -> Stmt:
    """A call of a function of ``products.cuh``."""
    return tirx.Evaluate(tirx.call_extern("int32", function, *arguments))
