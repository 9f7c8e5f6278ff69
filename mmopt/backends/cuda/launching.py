"""From loops to kernels: a statement with parallel loops becomes a sequence of launches.

What the loop templates of operators without a kernel of their own emit is target-independent except for one thing:
``parallel`` loops. Each of them becomes a kernel with one thread for an iteration; what stands between them becomes
a kernel of one thread; serial loops and conditions around them stay on the host, where they depend on sizes only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tvm import tirx
from tvm.ir import Call, Expr, TensorLoad
from tvm.tirx import ForKind, Stmt

from mmopt.backends.cpu.loops import i64, nothing, product, seq, static, when
from mmopt.backends.cuda.threads import WARP, allocate, is_launch, launch
from mmopt.backends.expressions import itemsize, nodes, simplify

THREADS = 256
"""Threads of a block where nothing asks for another number."""

PRIVATE = 1024
"""Bytes up to which an array of one thread is left to the compiler; larger ones get a place in global memory."""

APART = "mmopt.apart"
"""Key of the attribute around statements that neither need nor overwrite anything of each other."""


def apart(statements: Sequence[Stmt]) -> Stmt:
    """``statements`` in any order, or all at the same time."""
    return tirx.AttrStmt(tirx.const(0, "int32"), APART, tirx.const(0, "int32"), seq(*statements))


def launched(statement: Stmt) -> Stmt:
    """``statement`` for the host: everything that touches data happens in kernels."""
    return _Launching().host(statement)


def launches(statement: Stmt) -> int | None:
    """How many kernels host code launches; None where that depends on sizes known at run time."""
    if is_launch(statement):
        return 1
    if isinstance(statement, tirx.IfThenElse):
        return None if _spreads(statement) else 0
    each = [launches(inner) for inner in _inside(statement)]
    if any(count is None for count in each):
        return None
    total = sum(count or 0 for count in each)
    if not isinstance(statement, tirx.For) or not total:
        return total
    rounds = static(simplify(statement.extent))
    return None if rounds is None else rounds * total


def takes_memory(function: tirx.PrimFunc) -> bool:
    """Whether host code takes memory of the device for as long as it runs."""

    def takes(statement: Stmt) -> bool:
        if is_launch(statement):
            return False
        return isinstance(statement, tirx.AllocBuffer) or any(map(takes, _inside(statement)))

    return takes(function.body)


class _Launching:
    def host(self, statement: Stmt) -> Stmt:
        if is_launch(statement):
            return _own(statement)
        if isinstance(statement, tirx.SeqStmt):
            return self._sequence(list(statement.seq))
        if not _spreads(statement):
            return self._alone([statement])
        if isinstance(statement, tirx.AttrStmt):
            parts = _inside(statement.body) if isinstance(statement.body, tirx.SeqStmt) else []
            together = statement.attr_key == APART and len(parts) > 1 and all(map(_is_parallel, parts))
            return self._parallel(parts) if together else self.host(statement.body)
        if isinstance(statement, tirx.For):
            return self._loop(statement)
        if isinstance(statement, tirx.IfThenElse) and _of_sizes(statement.condition):
            other = None if statement.else_case is None else self.host(statement.else_case)
            return when(statement.condition, self.host(statement.then_case), other)
        return self._alone([statement])

    def _sequence(self, statements: list[Stmt]) -> Stmt:
        runs = list(_runs(statements))
        buffers = [s.buffer for s in statements if isinstance(s, tirx.AllocBuffer)]
        owners = {buffer: _users(buffer, runs) for buffer in buffers}
        outside = [b for b, users in owners.items() if len(users) > 1 or any(_spreads(runs[n][0]) for n in users)]
        done: list[Stmt] = [allocate(*outside)] if outside else []
        for number, run in enumerate(runs):
            inside = [b for b, users in owners.items() if users == [number] and b not in outside]
            done.append(self.host(run[0]) if _spreads(run[0]) else self._alone([*map(tirx.AllocBuffer, inside), *run]))
        return seq(*done)

    def _alone(self, statements: Sequence[Stmt]) -> Stmt:
        """A kernel of one thread."""
        memory: list[tirx.Buffer] = []
        body = _private(seq(*statements), i64(0), i64(1), memory)
        return seq(allocate(*memory), launch([i64(1)], 1, lambda block, thread: body))

    def _loop(self, statement: tirx.For) -> Stmt:
        if statement.kind != ForKind.PARALLEL:
            body = self.host(statement.body)
            if not _of_sizes(statement.extent):
                return self._alone([statement])
            return tirx.For(statement.loop_var, statement.min, statement.extent, statement.kind, body)
        return self._parallel([statement])

    def _parallel(self, loops: Sequence[tirx.For]) -> Stmt:
        """A kernel with a thread for each round of each of ``loops``."""
        memory: list[tirx.Buffer] = []
        bodies = [_private(each.body, each.loop_var, simplify(each.extent), memory) for each in loops]
        ends = [simplify(sum((each.extent for each in loops[: n + 1]), i64(0))) for n in range(len(loops))]
        count = ends[-1]
        known = static(count)
        threads = THREADS if known is None or known >= THREADS else -(-known // WARP) * WARP

        def element(block: Expr, thread: Expr) -> Stmt:
            at = block * threads + thread
            last = bodies[-1] if known is not None and known % threads == 0 else when(at < count, bodies[-1])
            starts = [i64(0), *ends[:-1]]
            done = seq(tirx.Bind(loops[-1].loop_var, simplify(at - starts[-1])), last)
            for each, body, start, end in reversed(list(zip(loops[:-1], bodies, starts, ends, strict=False))):
                done = when(at < end, seq(tirx.Bind(each.loop_var, simplify(at - start)), body), done)
            return done

        blocks = simplify(tirx.floordiv(count + (threads - 1), i64(threads)))
        return seq(allocate(*memory), unless_empty(count, launch([blocks], threads, element)))


def _is_parallel(statement: Stmt) -> bool:
    return isinstance(statement, tirx.For) and statement.kind == ForKind.PARALLEL


def unless_empty(count: Expr, kernel: Stmt) -> Stmt:
    """``kernel`` unless ``count`` turns out to be zero: a grid of no blocks is an error."""
    return kernel if static(count) is not None else when(count > i64(0), kernel)


def _runs(statements: Sequence[Stmt]) -> Iterator[list[Stmt]]:
    """Statements other than allocations: those that spread singly, the others together with their neighbours."""
    pending: list[Stmt] = []
    for statement in statements:
        if isinstance(statement, tirx.AllocBuffer):
            continue
        if not _spreads(statement):
            pending.append(statement)
            continue
        if pending:
            yield pending
        pending = []
        yield [statement]
    if pending:
        yield pending


def _users(buffer: tirx.Buffer, runs: Sequence[Sequence[Stmt]]) -> list[int]:
    return [n for n, run in enumerate(runs) if any(_uses(statement, buffer) for statement in run)]


def _uses(statement: Stmt, buffer: tirx.Buffer) -> bool:
    return any(var.same_as(buffer) for var in tirx.analysis.undefined_vars(statement))


def _inside(statement: Stmt) -> list[Stmt]:
    """Statements directly inside ``statement``."""
    if isinstance(statement, tirx.SeqStmt):
        return list(statement.seq)
    if isinstance(statement, tirx.IfThenElse):
        return [s for s in (statement.then_case, statement.else_case) if s is not None]
    if isinstance(statement, tirx.For | tirx.While | tirx.AttrStmt):
        return [statement.body]
    return []


def _spreads(statement: Stmt) -> bool:
    """Whether there is a parallel loop or a kernel in ``statement``."""
    if is_launch(statement) or (isinstance(statement, tirx.For) and statement.kind == ForKind.PARALLEL):
        return True
    return any(map(_spreads, _inside(statement)))


def _of_sizes(expression: Expr) -> bool:
    """Whether ``expression`` can be computed on the host: it reads no data."""
    return not any(isinstance(node, TensorLoad) for node in nodes(expression))


def _private(statement: Stmt, number: Expr, count: Expr, memory: list[tirx.Buffer]) -> Stmt:
    """``statement`` for one thread out of ``count``: loops are serial, large arrays lie in global ``memory``."""

    def again(inner: Stmt) -> Stmt:
        return _private(inner, number, count, memory)

    if isinstance(statement, tirx.SeqStmt):
        return seq(*map(again, statement.seq))
    if isinstance(statement, tirx.IfThenElse):
        other = None if statement.else_case is None else again(statement.else_case)
        return when(statement.condition, again(statement.then_case), other)
    if isinstance(statement, tirx.For):
        kind = statement.kind if statement.kind == ForKind.UNROLLED else ForKind.SERIAL
        return tirx.For(statement.loop_var, statement.min, statement.extent, kind, again(statement.body))
    if isinstance(statement, tirx.While):
        return tirx.While(statement.condition, again(statement.body))
    if isinstance(statement, tirx.AttrStmt):
        return again(statement.body)
    if isinstance(statement, tirx.AllocBuffer):
        return _placed(statement.buffer, number, count, memory)
    return nothing() if _is_hint(statement) else statement


def _is_hint(statement: Stmt) -> bool:
    """Whether ``statement`` only tells a CPU what will be read."""
    call = statement.value if isinstance(statement, tirx.Evaluate) else None
    return isinstance(call, Call) and str(call.op.name) == "tirx.call_llvm_intrin"


def _own(statement: Stmt) -> Stmt:
    """A kernel whose arrays without a place belong to each thread."""
    if isinstance(statement, tirx.SeqStmt):
        return seq(*map(_own, statement.seq))
    if isinstance(statement, tirx.IfThenElse):
        other = None if statement.else_case is None else _own(statement.else_case)
        return when(statement.condition, _own(statement.then_case), other)
    if isinstance(statement, tirx.For):
        body = _own(statement.body)
        return tirx.For(
            statement.loop_var, statement.min, statement.extent, statement.kind, body, None, statement.annotations
        )
    if isinstance(statement, tirx.AttrStmt):
        return tirx.AttrStmt(statement.node, statement.attr_key, statement.value, _own(statement.body))
    if isinstance(statement, tirx.AllocBuffer) and statement.buffer.scope() == "global":
        return _in_registers(statement.buffer)
    return statement


def _in_registers(buffer: tirx.Buffer) -> Stmt:
    """Memory for ``buffer`` that belongs to a thread. It keeps its type, which says otherwise."""
    own = tirx.decl_buffer(buffer.shape, buffer.dtype, buffer.name, scope="local")
    return seq(tirx.AllocBuffer(own), tirx.DeclBuffer(buffer, data=own.data))


def _placed(buffer: tirx.Buffer, number: Expr, count: Expr, memory: list[tirx.Buffer]) -> Stmt:
    size = simplify(product(buffer.shape) * itemsize(str(buffer.dtype)))
    known = static(size)
    if known is not None and known <= PRIVATE:
        return _in_registers(buffer)
    room = simplify(product(buffer.shape))
    whole = tirx.decl_buffer((simplify(room * count),), buffer.dtype, f"{buffer.name}_all")
    memory.append(whole)
    address = tirx.address_of(tirx.BufferLoad(whole, [number * room]))
    return tirx.DeclBuffer(buffer, data=address)
