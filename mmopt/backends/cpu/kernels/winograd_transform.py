"""The linear maps of Winograd's convolution: matrices, filters transformed at compile time, code for the others.

For a tile of ``m × m`` results of a 3×3 convolution (S. Winograd, "Arithmetic Complexity of Computations", 1980;
A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", 2016)

    Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A

with ``d`` the ``(m+2) × (m+2)`` inputs that the tile sees. The matrices come from Toom and Cook's interpolation at the
points below and at infinity.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.cpu.loops import i64, loop, seq

TAPS = 3
"""Extent of the kernel along each axis."""

POINTS = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2)),
}
"""Points of interpolation for each tile. Those for 4 are not the usual 0, ±1, ±2: matrices with less spread numbers
lose less, a factor of 4 here."""

Row = tuple[Fraction, ...]


@dataclasses.dataclass(frozen=True)
class Matrices:
    """``Aᵀ [m, m+2]``, ``G [m+2, 3]`` and ``Bᵀ [m+2, m+2]``, exactly."""

    out: tuple[Row, ...]
    filters: tuple[Row, ...]
    inputs: tuple[Row, ...]


@functools.cache
def matrices(tile: int) -> Matrices:
    """The matrices for tiles of ``tile × tile`` results."""
    points = POINTS[tile]
    last = len(points)
    top = [Fraction(int(k == TAPS - 1)) for k in range(TAPS)]
    scales = [math.prod((p - q for q in points if q != p), start=Fraction(1)) for p in points]
    filters = [[p**k / s for k in range(TAPS)] for p, s in zip(points, scales, strict=True)]
    out = [[p**i for p in points] + [Fraction(int(i == tile - 1))] for i in range(tile)]
    others = [[q for q in points if q != p] for p in points]
    inputs = [[*_polynomial(roots), Fraction(0)] for roots in others] + [_polynomial(points)]
    assert len(inputs) == last + 1
    return Matrices(*(tuple(map(tuple, m)) for m in (out, [*filters, top], inputs)))


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of ``Π (x - root)``, lowest first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [s - root * c for s, c in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


def transform_filters(weight: np.ndarray, tile: int, block: int, columns: int) -> np.ndarray:
    """Transform ``[O, C, 3, 3]`` in float64 and pack it as ``[panels, (m+2)², C/block, block, columns]``.

    Columns beyond O are zero. The result has the dtype of ``weight``.
    """
    g = np.array(matrices(tile).filters, np.float64)
    out, depth = weight.shape[:2]
    panels = -(-out // columns)
    padded = np.zeros((panels * columns, depth, len(g), len(g)))
    padded[:out] = np.einsum("ij,ocjk,lk->ocil", g, weight.astype(np.float64), g, optimize=True)
    split = padded.reshape(panels, columns, depth // block, block, len(g) ** 2)
    return split.transpose(0, 4, 2, 3, 1).astype(weight.dtype)


class Vectors:
    """Writes code on vectors that live in registers.

    Args:
        lanes: Elements of a vector.
        dtype: Their type.
    """

    def __init__(self, lanes: int, dtype: str) -> None:
        self.lanes, self.dtype = lanes, dtype
        self.statements: list[Stmt] = []

    def keep(self, value: Callable[[Expr], Expr]) -> Callable[[Expr], Expr]:
        """Compute a vector; gives how to read a lane of it."""
        buffer = tirx.decl_buffer((i64(self.lanes),), self.dtype, "w")
        made = loop(self.lanes, lambda v: tirx.BufferStore(buffer, value(v), [v]), "vectorized", "v")
        self.statements += [tirx.AllocBuffer(buffer), made]
        return lambda v: buffer[v]

    def done(self, *more: Stmt) -> Stmt:
        """All statements so far."""
        return seq(*self.statements, *more)

    def apply(self, rows: Sequence[Row], values: Sequence[Callable[[Expr], Expr]]) -> list[Callable[[Expr], Expr]]:
        """The product of a matrix and a column of vectors.

        Rows that differ in the signs of their odd coefficients only, as those of two opposite points do, share sums.
        """
        known: dict[Row, Callable[[Expr], Expr]] = {}

        def part(row: Row) -> Callable[[Expr], Expr]:
            if row not in known:
                known[row] = self.keep(self._weighted(row, values))
            return known[row]

        made = []
        for row in rows:
            even = tuple(c if n % 2 == 0 else Fraction(0) for n, c in enumerate(row))
            odd = tuple(c if n % 2 else Fraction(0) for n, c in enumerate(row))
            if not any(even) or not any(odd):
                made.append(part(row))
                continue
            leading = next(c for c in odd if c)
            if leading > 0:
                e, o = part(even), part(odd)
                made.append(self.keep(lambda v, e=e, o=o: e(v) + o(v)))  # type: ignore[misc]
            else:
                e, o = part(even), part(tuple(-c for c in odd))
                made.append(self.keep(lambda v, e=e, o=o: e(v) - o(v)))  # type: ignore[misc]
        return made

    def apply_transposed(
        self, rows: Sequence[Row], values: Sequence[Callable[[Expr], Expr]]
    ) -> list[Callable[[Expr], Expr]]:
        """The product of a matrix and a column of vectors; columns 1 and 2, 3 and 4, … belong to opposite points."""
        first, *middle, last = values
        pairs = list(zip(middle[::2], middle[1::2], strict=True))
        sums = [self.keep(lambda v, p=p: p[0](v) + p[1](v)) for p in pairs]  # type: ignore[misc]
        differences = [self.keep(lambda v, p=p: p[0](v) - p[1](v)) for p in pairs]  # type: ignore[misc]
        made = []
        for number, row in enumerate(rows):
            combined = [first, *(differences if number % 2 else sums), last]
            made.append(self.keep(self._weighted((row[0], *row[1:-1:2], row[-1]), combined)))
        return made

    def _weighted(self, row: Row, values: Sequence[Callable[[Expr], Expr]]) -> Callable[[Expr], Expr]:
        """``Σ coefficient · value``, terms with the coefficient one first."""
        terms = sorted(((c, x) for c, x in zip(row, values, strict=True) if c), key=lambda t: abs(t[0]) != 1)

        def total(v: Expr) -> Expr:
            result: Expr | None = None
            for coefficient, value in terms:
                x = value(v)
                if result is None:
                    result = x if coefficient == 1 else x * tirx.const(float(coefficient), self.dtype)
                elif abs(coefficient) == 1:
                    result = result + x if coefficient > 0 else result - x
                else:
                    result = result + x * tirx.const(float(coefficient), self.dtype)
            return tirx.const(0, self.dtype) if result is None else result

        return total
