"""Small constructors for TIR statements; loop bodies are written as Python functions of the loop variable."""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import ForKind, Stmt

KINDS = {
    "serial": ForKind.SERIAL,
    "parallel": ForKind.PARALLEL,
    "vectorized": ForKind.VECTORIZED,
    "unrolled": ForKind.UNROLLED,
}


@dataclasses.dataclass
class _VectorLoop:
    """The vectorized loop whose body is being written."""

    lane: Expr
    lanes: int
    buffers: list[tirx.Buffer]


_VECTOR: contextvars.ContextVar[_VectorLoop | None] = contextvars.ContextVar("vector_loop", default=None)


def i64(value: int) -> Expr:
    """A 64-bit integer constant."""
    return tirx.const(value, "int64")


def loop(extent: int | Expr, body: Callable[[Expr], Stmt], kind: str = "serial", name: str = "i") -> Stmt:
    """``for name in range(extent): body(name)``; a constant extent of one is no loop, of zero no statement."""
    count = i64(extent) if isinstance(extent, int) else extent
    known = static(count)
    if known == 1:
        return body(i64(0))
    if known is not None and known <= 0:
        return nothing()
    var = tirx.Var(name, "int64")
    if kind != "vectorized" or known is None:
        return tirx.For(var, i64(0), count, KINDS[kind], body(var))
    inside = _VectorLoop(var, known, [])
    token = _VECTOR.set(inside)
    try:
        statement = tirx.For(var, i64(0), count, KINDS[kind], body(var))
    finally:
        _VECTOR.reset(token)
    return seq(*(tirx.AllocBuffer(b) for b in inside.buffers), statement)


def team(body: Stmt) -> Stmt:
    """``body`` once on every thread of the pool, all at the same time: one fork for many parallel loops inside.

    Only the iterations of :func:`shared` loops are divided among the threads; everything else runs on each of them.
    """
    return tirx.AttrStmt(tirx.const(0, "int32"), "pragma_parallel_launch_point", tirx.const(1, "int32"), body)


def shared(extent: int | Expr, body: Callable[[Expr], Stmt], name: str = "i") -> Stmt:
    """A loop inside a :func:`team`: each thread takes its share, then waits for the others."""
    count = i64(extent) if isinstance(extent, int) else extent
    var = tirx.Var(name, "int64")
    divided = tirx.For(var, i64(0), count, ForKind.PARALLEL, body(var))
    one = tirx.const(1, "int32")
    return tirx.AttrStmt(tirx.const(0, "int32"), "pragma_parallel_barrier_when_finish", one, divided)


def keep(value: Expr, name: str) -> tuple[Stmt, Expr]:
    """Compute ``value`` once: the statement that does, and the expression to use in its place.

    The value passes through a small local buffer, which LLVM turns into a register. A bound variable would do the same,
    but TVM's code generator simplifies the values of bound variables with those of earlier ones substituted, which
    takes exponential time on chains of transcendental functions.
    """
    dtype = str(value.ty)
    if dtype == "bool":
        statement, byte = keep(value.astype("uint8"), name)
        return statement, tirx.NE(byte, tirx.const(0, "uint8"))
    inside = _VECTOR.get()
    if inside is None:
        buffer = tirx.decl_buffer((i64(1),), dtype, name)
        return seq(tirx.AllocBuffer(buffer), tirx.BufferStore(buffer, value, [i64(0)])), buffer[i64(0)]
    buffer = tirx.decl_buffer((i64(inside.lanes),), dtype, name)
    inside.buffers.append(buffer)
    return tirx.BufferStore(buffer, value, [inside.lane]), buffer[inside.lane]


def kept(value: Expr, name: str) -> tuple[Stmt | None, Expr]:
    """:func:`keep`, except for what costs nothing to compute again."""
    return (None, value) if isinstance(value, tirx.IntImm | tirx.Var) else keep(value, name)


def loops(extents: Sequence[Expr], body: Callable[..., Stmt], names: str = "i") -> Stmt:
    """Nested serial loops, outermost first."""

    def nest(position: int, chosen: tuple[Expr, ...]) -> Stmt:
        if position == len(extents):
            return body(*chosen)
        return loop(extents[position], lambda v: nest(position + 1, (*chosen, v)), name=f"{names}{position}")

    return nest(0, ())


def seq(*statements: Stmt | None) -> Stmt:
    """Statements in order; ``None`` is skipped, nested sequences are flattened."""
    flat: list[Stmt] = []
    for statement in statements:
        if statement is None:
            continue
        if isinstance(statement, tirx.SeqStmt):
            flat.extend(statement.seq)
        else:
            flat.append(statement)
    if not flat:
        return nothing()
    return flat[0] if len(flat) == 1 else tirx.SeqStmt(flat)


def nothing() -> Stmt:
    """The empty statement."""
    return tirx.Evaluate(tirx.const(0, "int32"))


def when(condition: Expr, then: Stmt, other: Stmt | None = None) -> Stmt:
    """``if condition: then else: other``."""
    return tirx.IfThenElse(condition, then, other)


def static(extent: Expr) -> int | None:
    """The value of a constant expression, else ``None``."""
    return int(extent.value) if isinstance(extent, tirx.IntImm) else None


def product(extents: Sequence[Expr]) -> Expr:
    """Product of extents, folded when constant."""
    total: Expr = i64(1)
    for extent in extents:
        total = total * extent
    return total


def split_index(flat: Expr, extents: Sequence[Expr]) -> tuple[Expr, ...]:
    """Row-major coordinates of ``flat`` in a space of ``extents``."""
    coordinates: list[Expr] = []
    for position in range(len(extents) - 1, 0, -1):
        coordinates.append(tirx.floormod(flat, extents[position]))
        flat = tirx.floordiv(flat, extents[position])
    return (flat, *reversed(coordinates)) if extents else ()


def at_index(flat: Expr, extents: Sequence[Expr], body: Callable[..., Stmt]) -> Stmt:
    """``body`` at the row-major coordinates of ``flat`` in a space of ``extents``.

    Where extents are symbolic, coordinates are computed once: in every index that uses them, divisions by sums and
    quotients keep TVM's simplifier busy for seconds.
    """
    coordinates = split_index(flat, extents)
    if all(static(e) is not None for e in extents):
        return body(*coordinates)
    found = [kept(c, "at") for c in coordinates]
    return seq(*(statement for statement, _ in found), body(*(value for _, value in found)))


def flat_index(indices: Sequence[Expr], shape: Sequence[Expr]) -> Expr:
    """Row-major offset of ``indices`` in ``shape``."""
    offset: Expr = i64(0)
    for position, extent in zip(indices, shape, strict=True):
        offset = offset * extent + position
    return offset
