"""Statements that run on a GPU: launches of blocks of threads, barriers, exchanges within a warp."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Call, Expr, Op, PrimType, Range, StringImm
from tvm.tirx import IterVar, Stmt

from mmopt.backends.cpu.loops import i64, loop, seq, static, when
from mmopt.backends.expressions import simplify

WARP = 32
"""Threads of a warp, on every GPU so far."""

ALL_LANES = 0xFFFFFFFF
"""Mask of a warp whose threads all take part."""

LAUNCH = "thread_extent"
"""Key of the attribute that makes the statement inside it a kernel of its own."""


def launch(blocks: Sequence[Expr], threads: int, body: Callable[..., Stmt]) -> Stmt:
    """A kernel: ``body(*block_indices, thread_index)`` on every thread.

    Args:
        blocks: Extents of the grid, up to three, along x first.
        threads: Threads of a block, all along x.
        body: Given 64-bit indices.
    """
    axes = [_axis(extent, f"blockIdx.{name}") for extent, name in zip(blocks, "xyz", strict=False)]
    axes.append(_axis(i64(threads), "threadIdx.x"))
    statement = body(*(axis.var for axis in axes))
    for axis in reversed(axes):
        statement = tirx.AttrStmt(axis, LAUNCH, axis.dom.extent, statement)
    return statement


def _axis(extent: Expr, tag: str) -> IterVar:
    var = tirx.Var(tag.replace(".", "_"), "int64")
    return IterVar(Range.from_min_extent(i64(0), extent), var, IterVar.ThreadIndex, tag)


def is_launch(statement: Stmt) -> bool:
    """Whether ``statement`` is a kernel."""
    return isinstance(statement, tirx.AttrStmt) and statement.attr_key == LAUNCH


def each(count: Expr, thread: Expr, threads: int, body: Callable[[Expr], Stmt]) -> Stmt:
    """``body`` at every index below ``count``, divided among the threads of a block, neighbours together."""
    known = static(count)
    if known is not None and known <= threads:
        return body(thread) if known == threads else when(thread < count, body(thread))
    rounds = simplify(tirx.floordiv(count + (threads - 1), i64(threads)))

    def step(number: Expr) -> Stmt:
        at = number * threads + thread
        return body(at) if known is not None and known % threads == 0 else when(at < count, body(at))

    return loop(rounds, step, name="round")


def barrier() -> Stmt:
    """All threads of the block wait for each other; what they stored is seen by all."""
    return tirx.Evaluate(Call(Op.get("tirx.tvm_storage_sync"), [StringImm("shared")], ret_ty=PrimType("int32")))


def from_lane(value: Expr, step: int) -> Expr:
    """``value`` of the thread of the warp whose number differs in the bit ``step``."""
    dtype = str(value.ty)
    if dtype in _SHUFFLED:
        mask, bit = tirx.const(ALL_LANES, "uint32"), tirx.const(step, "int32")
        return tirx.call_extern(dtype, "__shfl_xor_sync", mask, value, bit)
    wide = "float32" if "float" in dtype else "int32"
    return from_lane(value.astype(wide), step).astype(dtype)


_SHUFFLED = ("float32", "float64", "int32", "uint32", "int64", "uint64")


def shared(shape: Sequence[Expr], dtype: str, name: str) -> tirx.Buffer:
    """An array that the threads of a block share. Booleans are kept as bytes by whoever uses it."""
    return tirx.decl_buffer(tuple(shape), dtype, name, scope="shared")


def allocate(*buffers: tirx.Buffer) -> Stmt:
    """Statements that allocate ``buffers``."""
    return seq(*(tirx.AllocBuffer(buffer) for buffer in buffers))
