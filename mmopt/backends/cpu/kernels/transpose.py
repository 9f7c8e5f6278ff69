"""Exchanging rows and columns of small squares within vector registers."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.cpu.loops import i64, seq


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
    statements: list[Stmt] = []

    def kept(value: Expr) -> Expr:
        buffer = tirx.decl_buffer((i64(lanes),), dtype, "turn")
        statements.extend((tirx.AllocBuffer(buffer), buffer.vstore([i64(0)], value)))
        return buffer.vload([i64(0)], f"{dtype}x{lanes}")

    rows = [kept(load(i)) for i in range(lanes)]
    step = 1
    while step < lanes:
        low = [v if not v & step else v - step + lanes for v in range(lanes)]
        high = [v + step if not v & step else v + lanes for v in range(lanes)]
        turned = list(rows)
        for i in range(lanes):
            if not i & step:
                pair = [rows[i], rows[i + step]]
                turned[i] = kept(tirx.Shuffle(pair, [tirx.const(n, "int32") for n in low]))
                turned[i + step] = kept(tirx.Shuffle(pair, [tirx.const(n, "int32") for n in high]))
        rows, step = turned, step * 2
    return seq(*statements, *(store(i, rows[i]) for i in range(lanes)))
