"""Small squares within vector registers: exchanging their rows and columns, combining each row's lanes."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.cpu.loops import i64, seq


class _Vectors:
    """Statements that keep vectors in variables."""

    def __init__(self, lanes: int, dtype: str) -> None:
        self.lanes, self.dtype = lanes, dtype
        self.statements: list[Stmt] = []

    def keep(self, value: Expr) -> Expr:
        """Compute ``value`` now; gives the expression that reads it."""
        buffer = tirx.decl_buffer((i64(self.lanes),), self.dtype, "turn")
        self.statements.extend((tirx.AllocBuffer(buffer), buffer.vstore([i64(0)], value)))
        return buffer.vload([i64(0)], f"{self.dtype}x{self.lanes}")

    def exchanged(self, first: Expr, second: Expr, step: int) -> tuple[Expr, Expr]:
        """Two vectors after the blocks of ``step`` lanes off the diagonal have changed places."""
        low = [v if not v & step else v - step + self.lanes for v in range(self.lanes)]
        high = [v + step if not v & step else v + self.lanes for v in range(self.lanes)]
        low_lanes, high_lanes = ([tirx.const(n, "int32") for n in order] for order in (low, high))
        return tirx.Shuffle([first, second], low_lanes), tirx.Shuffle([first, second], high_lanes)


def transpose_square(lanes: int, dtype: str, load: Callable[[int], Expr], store: Callable[[int, Expr], Stmt]) -> Stmt:
    """Turn ``lanes`` vectors of ``lanes`` elements: lane j of result i is lane i of operand j.

    Blocks of 1, 2, 4, … lanes off the diagonal change places, one power of two after another, by shuffles of two
    vectors each.

    Args:
        lanes: A power of two.
        dtype: Element type.
        load: Gives operand vector ``i``.
        store: Statement that consumes result vector ``i``.
    """
    vectors = _Vectors(lanes, dtype)
    rows = [vectors.keep(load(i)) for i in range(lanes)]
    step = 1
    while step < lanes:
        turned = list(rows)
        for i in (i for i in range(lanes) if not i & step):
            low, high = vectors.exchanged(rows[i], rows[i + step], step)
            turned[i], turned[i + step] = vectors.keep(low), vectors.keep(high)
        rows, step = turned, step * 2
    return seq(*vectors.statements, *(store(i, rows[i]) for i in range(lanes)))


def combine_lanes(
    lanes: int,
    dtype: str,
    load: Callable[[int], Expr],
    combine: Callable[[Expr, Expr], Expr],
    store: Callable[[Expr], Stmt],
) -> Stmt:
    """Reduce each of ``lanes`` vectors: lane j of the one result combines all lanes of operand j.

    As :func:`transpose_square`, but both halves of a pair are combined into one, which leaves half of the vectors.

    Args:
        lanes: A power of two.
        dtype: Element type.
        load: Gives operand vector ``i``.
        combine: An associative, commutative operation on vectors.
        store: Statement that consumes the result.
    """
    vectors = _Vectors(lanes, dtype)
    rows = {i: vectors.keep(load(i)) for i in range(lanes)}
    step = 1
    while step < lanes:
        pairs = {i: vectors.exchanged(rows[i], rows[i + step], step) for i in rows if not i & step}
        rows = {i: vectors.keep(combine(vectors.keep(low), vectors.keep(high))) for i, (low, high) in pairs.items()}
        step *= 2
    return seq(*vectors.statements, store(rows[0]))
