"""From lazy tensors to one TIR function with parallel, vectorized loops.

Stages of the plan become loop nests. Leading axes that all stages agree on become one parallel loop with the
temporaries of one row inside; contiguous axes are collapsed; the innermost axis is vectorized; reductions run in
vector lanes, along the reduced axis when it is contiguous and along the output otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from tvm import tirx
from tvm.ir import Call, Expr, TensorLoad
from tvm.tirx import Stmt
from tvm_ffi import structural_hash

from mmopt.backends.compute import LoopNest, LoopResult, Map, Reduction, Sink, Source, Tensor, loading_with
from mmopt.backends.cpu import avx512
from mmopt.backends.cpu.collapse import collapse, expand
from mmopt.backends.cpu.dot import importing
from mmopt.backends.cpu.loops import i64, keep, loop, product, seq, split_index, static, when
from mmopt.backends.cpu.plan import Planner, trace
from mmopt.backends.cpu.reduce import emit_reduction
from mmopt.backends.expressions import itemsize, narrowed, rectified, same, simplify, untangled, variables
from mmopt.backends.profile import Profile

PARALLEL_WORK = 32768
"""Operations below which a kernel stays on one thread: a fork costs about a microsecond."""

CHUNK = 4096
"""Elements of one parallel piece of a single long axis."""


@dataclasses.dataclass
class Kernel:
    """A generated kernel.

    Attributes:
        function: The TIR function; parameters are ``sources``, then ``symbols`` as int64 scalars, then ``outputs``.
        sources: What to pass, in order.
        symbols: Symbolic extents to pass, in order.
        outputs: What it writes, in order.
    """

    function: tirx.PrimFunc
    sources: list[Source]
    symbols: list[Expr]
    outputs: list[Tensor]


class Place:
    """Where a stored tensor lives. Axes that enclosing loops fix (``drop`` of them) have no extent in memory.

    ``flags`` are booleans kept as bytes: TVM does not vectorize loads of a temporary array of booleans.
    """

    def __init__(self, buffer: tirx.Buffer, drop: int = 0, *, flags: bool = False) -> None:
        self.buffer, self.drop, self.flags = buffer, drop, flags

    def _within(self, indices: tuple[Expr, ...]) -> list[Expr]:
        inner = list(indices[self.drop :])
        return inner if inner or not self.buffer.shape else [i64(0)]

    def load(self, indices: tuple[Expr, ...]) -> Expr:
        value = tirx.BufferLoad(self.buffer, self._within(indices))
        if str(self.buffer.dtype) == "bool":  # LLVM gets a vector of bytes, which does not go with compared values
            return tirx.NE(value.astype("int8"), tirx.const(0, "int8"))
        return value.astype("bool") if self.flags else value

    def store(self, indices: tuple[Expr, ...], value: Expr) -> Stmt:
        if self.flags:
            value = value.astype("int8")
        elif self.buffer.dtype == "bfloat16" and _uniform(value, indices):
            nothing = tirx.bitwise_and(indices[-1], i64(0)).astype("float32")
            value = (value.astype("float32") - nothing).astype("bfloat16")
        return tirx.BufferStore(self.buffer, value, self._within(indices))


def _uniform(value: Expr, indices: Sequence[Expr]) -> bool:
    """Whether ``value`` may be the same for all lanes of a store, in bfloat16: TVM cannot store such a vector, so the
    lanes must seem to differ."""
    if not indices:
        return False
    if isinstance(value, TensorLoad):
        walked = variables(indices[-1])
        return not any(walked & variables(i) for i in value.indices)
    return isinstance(value, tirx.FloatImm | tirx.Var | Call)


class _Scope:
    """Values already computed at the current point, bound to variables so that they are computed once."""

    def __init__(self, bind: bool) -> None:
        self.bind = bind
        self.binds: list[Stmt] = []
        # Tensors and indices that a rule makes on the way stay alive here: what replaced them could look the same.
        self.known: dict[tuple[Tensor, tuple[int, ...]], tuple[tuple[Expr, ...], Expr]] = {}


class KernelEmitter:
    """Emits one kernel for the CPU.

    Args:
        outputs: What the kernel must write.
        profile: The target's vector width and caches.
    """

    def __init__(self, outputs: Sequence[Tensor], profile: Profile) -> None:
        self.outputs = list(outputs)
        self.profile = profile
        self.plan = Planner(outputs).plan()
        self.places: dict[Tensor, Place] = {}
        self._overrides: dict[Tensor, tuple[tuple[Expr, ...], Expr]] = {}
        self._scopes: list[_Scope] = []
        self._imported: avx512.Rounding | None = None

    # -- reading -----------------------------------------------------------------------------------------------

    def load(self, tensor: Tensor, indices: tuple[Expr, ...]) -> Expr:
        """The element of ``tensor`` at ``indices``: a value at hand, a load, or the inlined rule."""
        if tensor in self._overrides:
            at, value = self._overrides[tensor]
            if all(map(same, at, indices)):
                return value
        if tensor in self.places:
            return self.places[tensor].load(indices)
        if not isinstance(tensor, Map):
            raise TypeError(f"{tensor!r} is read before it is computed")
        return self._inline(tensor, indices)

    def _inline(self, tensor: Map, indices: tuple[Expr, ...]) -> Expr:
        scope = self._scopes[-1] if self._scopes else _Scope(bind=False)
        key = (tensor, tuple(structural_hash(i) for i in indices))
        if key in scope.known:
            return scope.known[key][1]
        value = self.untangled(tensor.body(*indices))
        if scope.bind and not isinstance(value, tirx.IntImm | tirx.FloatImm | tirx.Var):
            statement, value = keep(value, tensor.name)
            scope.binds.append(statement)
        scope.known[key] = (indices, value)
        return value

    def untangled(self, value: Expr) -> Expr:
        """``value`` in a form that code generation is quick with; parts of it may be computed beforehand."""
        scope = self._scopes[-1] if self._scopes else _Scope(bind=False)
        if self.profile.kind == "arm":
            value = rectified(value)
        if avx512.has_bfloat16(self.profile):
            value = narrowed(value, self._bfloat16_bits)
        if not scope.bind:
            return value

        def before(part: Expr) -> Expr:
            statement, kept = keep(part, "inner")
            scope.binds.append(statement)
            return kept

        return untangled(value, before)

    def _bfloat16_bits(self, value: Expr) -> Expr:
        self._imported = avx512.Rounding()
        return avx512.bfloat16_bits(value)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Reads inside must not be hoisted: they are legal only under the guard."""
        self._scopes.append(_Scope(bind=False))
        try:
            yield
        finally:
            self._scopes.pop()

    def point(self, make: Callable[[], Stmt]) -> Stmt:
        """The statements of one index: shared values first, then what ``make`` gives."""
        scope = _Scope(bind=True)
        self._scopes.append(scope)
        try:
            statement = make()
        finally:
            self._scopes.pop()
        return seq(*scope.binds, statement)

    # -- the function ------------------------------------------------------------------------------------------

    def build(self) -> Kernel:
        """Generate the kernel."""
        with loading_with(self):
            for tensor in (*self.plan.sources, *self.outputs):
                self.places[tensor] = Place(tirx.decl_buffer(tensor.shape, tensor.dtype, spelled(tensor.name)))
            body = self.finished(self._shared_rows() if self.plan.shared else self._stages(self.plan.stages))
            body = importing([self._imported], body) if self._imported else body
        symbols = self._symbols(body)
        params = [
            *(self.places[s].buffer for s in self.plan.sources),
            *symbols,
            *(self.places[o].buffer for o in self.outputs),
        ]
        function = tirx.PrimFunc(params, body).with_attr(
            {"tirx.noalias": True, "s_tir": True, "tirx.is_scheduled": True}
        )
        return Kernel(function, self.plan.sources, symbols, self.outputs)

    def finished(self, body: Stmt) -> Stmt:
        """The statements of the whole kernel, as the target runs them."""
        return body

    def apart(self, statements: Sequence[Stmt]) -> Stmt:
        """Statements that neither need nor overwrite anything of each other."""
        return seq(*statements)

    def _symbols(self, body: Stmt) -> list[Expr]:
        """Sizes the kernel needs: in extents, and as plain operands of rules."""
        free = tirx.analysis.undefined_vars(body)
        found: dict[str, Expr] = {str(v.name): v for v in free if str(v.ty) == "int64"}
        for tensor in self.plan.order:
            extents = (*tensor.shape, *(tensor.axes if isinstance(tensor, Reduction) else ()))
            for extent in extents:
                for var in variables(extent):
                    found[str(var.name)] = var
        return [found[name] for name in sorted(found)]

    def _allocate(self, tensor: Tensor, axes: int = 0) -> Stmt:
        """Temporary memory for ``tensor`` without its first ``axes`` axes, which the enclosing loops fix."""
        inner = tensor.shape[axes:] or (i64(1),)
        flags = tensor.dtype == "bool"
        buffer = tirx.decl_buffer(inner, "int8" if flags else tensor.dtype, spelled(tensor.name))
        self.places[tensor] = Place(buffer, axes, flags=flags)
        return tirx.AllocBuffer(buffer)

    def _stages(self, stages: Sequence[Map | Reduction | LoopNest]) -> Stmt:
        """Stages one after another, each with its own parallel loop; temporaries live for the whole kernel."""
        statements: list[Stmt] = []
        for stage in stages:
            for tensor in stage.results if isinstance(stage, LoopNest) else [stage]:
                if tensor in self.plan.stored and tensor not in self.places:
                    statements.append(self._allocate(tensor))
            statements.append(self._stage(stage, (), parallel=True))
        return seq(*statements)

    def _shared_rows(self) -> Stmt:
        """One parallel loop over the axes all stages share; everything else happens inside a row."""
        depth = self.plan.shared
        tensors = [s for s in self.plan.stages if not isinstance(s, LoopNest)]
        rows = tensors[0].shape[:depth]

        def row(flat: Expr) -> Stmt:
            prefix = split_index(flat, rows)
            statements: list[Stmt] = []
            for stage in tensors:
                if stage not in self.places:
                    statements.append(self._allocate(stage, depth))
                statements.append(self._stage(stage, prefix, parallel=False))
            for stage in tensors:
                if self.places[stage].drop:
                    del self.places[stage]
            return seq(*statements)

        work = sum(self.work(stage) or PARALLEL_WORK for stage in tensors)
        return loop(product(rows), row, self._kind(product(rows), work), "row")

    def _stage(self, stage: Map | Reduction | LoopNest, prefix: tuple[Expr, ...], *, parallel: bool) -> Stmt:
        if isinstance(stage, LoopNest):
            return stage.emit(self, [self._sink(result) for result in stage.results])
        if isinstance(stage, Map):
            return self._map(stage, prefix, parallel=parallel)
        return emit_reduction(self, stage, prefix, parallel=parallel)

    def _sink(self, result: LoopResult) -> Sink:
        """What happens to one element of a loop result: it is stored, and its epilogues are computed."""

        def consume(indices: Sequence[Expr], value: Expr) -> Stmt:
            at = tuple(indices)
            statements: list[Stmt] = []
            if result in self.plan.stored:
                statements.append(self.places[result].store(at, value))
            maps = self.plan.epilogues.get(result, [])
            if maps:
                self._overrides[result] = (at, value)
                statements.append(self.point(lambda: seq(*(self._store(m, at) for m in maps))))
                del self._overrides[result]
            return seq(*statements)

        return consume

    def _store(self, stage: Map, indices: tuple[Expr, ...]) -> Stmt:
        return self.places[stage].store(indices, self.untangled(stage.body(*indices)))

    def work(self, stage: Map | Reduction) -> int | None:
        """Operations of a stage when its size is constant."""
        inside = trace(stage, self.plan.stored)
        size = static(product((*stage.shape, *(stage.axes if isinstance(stage, Reduction) else ()))))
        return None if size is None else size * (inside.cost + 1)

    def _kind(self, count: Expr, work: int | None) -> str:
        known = static(count)
        few = known is not None and known < 2
        return "serial" if few or (work is not None and work < PARALLEL_WORK) else "parallel"

    # -- maps --------------------------------------------------------------------------------------------------

    def _map(self, stage: Map, prefix: tuple[Expr, ...], *, parallel: bool) -> Stmt:
        depth = len(prefix)
        dims = stage.shape[depth:]
        if not dims:
            return self.point(lambda: self._store(stage, prefix))
        inside = trace(stage, self.plan.stored)
        groups = collapse(inside, list(range(depth, len(stage.shape))), stage.shape)
        extents = [simplify(product([stage.shape[d] for d in group])) for group in groups]

        def store(*at: Expr) -> Stmt:
            return self.point(lambda: self._store(stage, prefix + expand(at, groups, stage.shape)))

        lanes = self.lanes(stage.dtype, *(r.tensor.dtype for r in inside.reads))
        work = self.work(stage) if parallel else 0
        return self.nest(extents, store, lanes, work)

    def rows(self, extents: Sequence[Expr], body: Callable[..., Stmt], work: int | None) -> Stmt:
        """One parallel loop over all of ``extents``."""
        count = simplify(product(extents))
        return loop(count, lambda flat: body(*split_index(flat, extents)), self._kind(count, work), "row")

    def lanes(self, *dtypes: str) -> int:
        """Vector lanes for the widest of ``dtypes``."""
        return max(1, self.profile.vector_bytes // max(itemsize(d) for d in dtypes))

    def nest(self, extents: Sequence[Expr], store: Callable[..., Stmt], lanes: int, work: int | None) -> Stmt:
        """Loops over ``extents`` with the last one vectorized; whether threads pay is decided here or at run time."""
        total = simplify(product(extents))
        if work is not None or static(total) is not None:
            return self._spread(extents, store, lanes, work)
        alone = self._spread(extents, store, lanes, 0)
        return when(total < PARALLEL_WORK // 4, alone, self._spread(extents, store, lanes, None))

    def _spread(self, extents: Sequence[Expr], store: Callable[..., Stmt], lanes: int, work: int | None) -> Stmt:
        """Parallel over all axes but the last, or over pieces of the last, when there is ``work`` enough."""
        *outer, inner = extents
        rows = simplify(product(outer))
        kind = self._kind(i64(2), work)
        known = static(rows)
        if kind == "serial" or (known is None or known >= 8):
            row = lambda flat: self.vector(inner, lanes, _at(store, split_index(flat, outer)))  # noqa: E731
            return loop(rows, row, self._kind(rows, work))
        size = static(inner)
        piece = CHUNK if size is None or size >= 4 * CHUNK else max(lanes, -(-size // (4 * lanes)) * lanes)
        pieces = simplify(tirx.floordiv(inner + (piece - 1), i64(piece)))

        def chunk(flat: Expr) -> Stmt:
            *at, number = split_index(flat, (*outer, pieces))
            start = number * piece
            return self._chunk(start, inner, piece, lanes, _at(store, tuple(at)))

        return loop(simplify(rows * pieces), chunk, "parallel", "chunk")

    def _chunk(self, start: Expr, extent: Expr, piece: int, lanes: int, store: Callable[[Expr], Stmt]) -> Stmt:
        full = self.vector(i64(piece), lanes, lambda v: store(start + v))
        size = static(extent)
        if size is not None and size % piece == 0:
            return full
        rest = self.vector(extent - start, lanes, lambda v: store(start + v))
        return when(start + piece <= extent, full, rest)

    def vector(self, extent: Expr, lanes: int, store: Callable[[Expr], Stmt]) -> Stmt:
        """``store`` at every index below ``extent``, ``lanes`` at a time."""
        size = static(extent)
        if size is not None and size <= lanes:
            return loop(size, store, "vectorized", "v")
        if lanes == 1:
            return loop(extent, store, name="v")
        blocks = simplify(tirx.floordiv(extent, i64(lanes)))
        main = loop(blocks, lambda b: loop(lanes, lambda v: store(b * lanes + v), "vectorized", "v"), name="block")
        rest = simplify(tirx.floormod(extent, i64(lanes)))
        return seq(main, self.tail(rest, lanes, lambda v: store(blocks * lanes + v)))

    def tail(self, count: Expr, lanes: int, store: Callable[[Expr], Stmt]) -> Stmt:
        """``store`` at fewer than ``lanes`` indices: one vector when their number is known, else ever smaller ones."""
        if static(count) is not None:
            return loop(count, store, "vectorized", "v")
        part = lanes // 4
        if part < 2:
            return loop(count, store, name="v")
        parts = simplify(tirx.floordiv(count, i64(part)))
        main = loop(parts, lambda b: loop(part, lambda v: store(b * part + v), "vectorized", "v"), name="part")
        return seq(main, self.tail(simplify(tirx.floormod(count, i64(part))), part, lambda v: store(parts * part + v)))


def _at(store: Callable[..., Stmt], outer: tuple[Expr, ...]) -> Callable[[Expr], Stmt]:
    """``store`` with its outer indices fixed."""
    return lambda inner: store(*outer, inner)


def spelled(name: str) -> str:
    """``name`` as one that generated C++ may have: models name tensors with slashes and numbers, too."""
    clean = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
    return clean if clean[:1].isalpha() else f"t{clean}"
