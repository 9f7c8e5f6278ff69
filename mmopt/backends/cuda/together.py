"""Small kernels that need nothing of each other, in one launch.

    a = call_tir(k1, (x,));  b = call_tir(k2, (y,))    becomes    a, b = call_tir(both, (x, y))

where ``both`` has the blocks of ``k1`` and then those of ``k2``. A kernel of a few blocks leaves most of a GPU idle and
takes hardly longer than its launch; two at once take no longer than one, as long as all blocks run at the same time.
Whoever waits for one then waits for all of them: so kernels meet that do the same kind of work, and are as many steps
away from the inputs, or from the results, as each other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.ir import Call, Expr, GlobalVar, StringImm
from tvm.tirx import Stmt

from mmopt.backends.cpu.loops import i64, product, seq, static, when
from mmopt.backends.cuda.threads import is_launch, launch
from mmopt.backends.expressions import itemsize, nodes, simplify
from mmopt.backends.profile import Profile

SHARED_BYTES = 48 << 10
"""Shared memory that a kernel may have on every GPU."""

STEPS = 1 << 14
"""Rounds of loops that a thread does, as far as they are known, from which a kernel is not small."""

FEW_STEPS = 64
"""Rounds of loops that take less time than a launch, so that nobody minds to wait for them."""

_PRODUCTS = ("mmopt_few_rows", "mmopt_rows_by_rows", "mmopt_rows_by_numbers")
_HELPERS = ("mmopt_deliver", "__shfl")
_VIEWS = ("vm.builtin.reshape", "vm.builtin.tuple_getitem")


@dataclasses.dataclass(frozen=True)
class Small:
    """A kernel that is one launch of a few blocks.

    Attributes:
        grid: Variables of its blocks, and how many there are along each.
        thread: Variable of its threads.
        threads: How many there are.
        body: What a thread does.
        shared: Bytes of shared memory.
        steps: Rounds of loops that a thread does.
        multiplies: Whether it is a product.
        cooperates: Whether threads of a block need each other, so that all have to be there and no more.
    """

    grid: tuple[tuple[Expr, int], ...]
    thread: Expr
    threads: int
    body: Stmt
    shared: int
    steps: float
    multiplies: bool
    cooperates: bool

    @property
    def blocks(self) -> int:
        return math.prod(count for _, count in self.grid)

    @classmethod
    def of(cls, function: tirx.PrimFunc, most: int) -> Small | None:
        """``function`` if it is small: up to ``most`` blocks of threads that are soon done."""
        statements = [s for s in _flat(function.body) if not isinstance(s, tirx.Evaluate) or isinstance(s.value, Call)]
        if len(statements) != 1 or not is_launch(statements[0]):
            return None
        if not all(isinstance(param.ty, tirx.BufferType) for param in function.params):
            return None
        axes: list[tuple[Expr, int]] = []
        body = statements[0]
        while is_launch(body):
            axes.append((body.node.var, static(body.value) or 0))
            body = body.body
        inside = list(_statements(body))
        calls = {_called(node) for statement in inside for e in _expressions(statement) for node in nodes(e)} - {""}
        known = all(name.startswith((*_PRODUCTS, *_HELPERS)) for name in calls)
        shared = sum(map(_shared_bytes, inside))
        made = cls(
            tuple(axes[:-1]),
            *axes[-1],
            body,
            shared,
            _steps(body),
            any(name.startswith(_PRODUCTS) for name in calls),
            bool(shared) or bool(calls),
        )
        small = 0 < made.blocks <= most and made.threads > 0 and made.steps <= STEPS
        return made if small and known else None

    def part(self, block: Expr, thread: Expr, threads: int) -> Stmt:
        """What block number ``block`` of it does, on ``threads`` threads or more."""
        bound: list[Stmt] = []
        for variable, count in self.grid:
            bound.append(tirx.Bind(variable, simplify(tirx.floormod(block, i64(count)))))
            block = tirx.floordiv(block, i64(count))
        done = seq(*bound, tirx.Bind(self.thread, thread), self.body)
        return done if self.threads == threads else when(thread < self.threads, done)

    def meets(self, others: Sequence[Small], most: int) -> bool:
        """Whether it can be in a launch with ``others``."""
        every = (self, *others)
        if len({small.multiplies for small in every}) > 1 or sum(small.blocks for small in every) > most:
            return False
        steps = [max(FEW_STEPS, small.steps) for small in every]
        if max(steps) > 2 * min(steps):
            return False
        threads = max(small.threads for small in every)
        fits = all(small.threads == threads or not small.cooperates for small in every)
        return fits and sum(small.shared for small in every) <= SHARED_BYTES


def side_by_side(module: tvm.IRModule, profile: Profile) -> tuple[tvm.IRModule, dict[str, str]]:
    """Bring small kernels into common launches.

    Args:
        module: Relax functions without dataflow blocks, and the kernels they call.
        profile: A ``cuda`` profile; as many blocks as it has multiprocessors run at the same time.

    Returns:
        The new module, and the names of kernels that got into a launch with others, with the names of these launches.
    """
    batching = _Batching(module, profile.cores)
    for handle, function in module.functions.items():
        if isinstance(function, relax.Function) and isinstance(function.body, relax.SeqExpr):
            batching.rewrite(handle, function)
    return tvm.IRModule(batching.functions), batching.members


class _Batching:
    def __init__(self, module: tvm.IRModule, most: int) -> None:
        self.module, self.most = module, most
        self.functions: dict[GlobalVar, Any] = dict(module.functions.items())
        self.members: dict[str, str] = {}
        self._registry = relax.BlockBuilder()
        self._names = {str(handle.name_hint) for handle in self.functions}
        self._small: dict[GlobalVar, Small | None] = {}
        self._made: dict[tuple[GlobalVar, ...], GlobalVar] = {}

    def rewrite(self, handle: GlobalVar, function: relax.Function) -> None:
        """Replace ``function`` by one with fewer calls."""
        bindings = [binding for block in function.body.blocks for binding in block.bindings]
        done: list[Any] = []
        for run in self._runs(bindings):
            done += self._batched(run)
        body = relax.SeqExpr([relax.BindingBlock(done)], function.body.body)
        self.functions[handle] = relax.Function(
            function.params, body, function.ret_ty, function.is_pure, function.attrs, function.span
        )

    def _runs(self, bindings: Sequence[Any]) -> Iterator[list[Any]]:
        """Bindings that may change places as long as each comes behind what it needs; others singly."""
        pending: list[Any] = []
        for binding in bindings:
            if self._moves(binding):
                pending.append(binding)
                continue
            yield pending
            yield [binding]
            pending = []
        yield pending

    def _moves(self, binding: Any) -> bool:
        """Whether ``binding`` is a kernel with known sizes, a view, a weight, or a part of a result."""
        if not isinstance(binding, relax.VarBinding):
            return False
        value = binding.value
        if isinstance(value, relax.TupleGetItem):
            return True
        if not isinstance(value, relax.Call):
            return False
        if isinstance(value.op, relax.ExternFunc):
            return str(value.op.global_symbol) in _VIEWS
        return self._kernel(binding) is not None and all(map(_sized, value.ty_args))

    def _kernel(self, binding: Any) -> GlobalVar | None:
        value = binding.value
        if not isinstance(value, relax.Call) or not isinstance(value.op, tvm.ir.Op):
            return None
        if str(value.op.name) != "relax.call_tir" or not isinstance(self.module[value.args[0]], tirx.PrimFunc):
            return None
        return value.args[0]

    def _batched(self, run: Sequence[Any]) -> list[Any]:
        """``run`` in steps: kernels of a step, then what is made of their results."""
        kernels = [binding for binding in run if self._kernel(binding) is not None]
        done, calls = list(run), len(kernels)
        for levels in self._orders(run):
            groups = {level: self._groups([b for b in kernels if levels[b.var] == level]) for level in levels.values()}
            if sum(map(len, groups.values())) >= calls:
                continue
            done, calls = [], sum(map(len, groups.values()))
            for level in sorted(groups):
                done += [call for group in groups[level] for call in self._call(group)]
                done += [b for b in run if levels[b.var] == level and self._kernel(b) is None]
        return done

    def _orders(self, run: Sequence[Any]) -> Iterator[dict[Any, int]]:
        """The step of each binding, by variable: as early as can be, and as late as can be."""
        ticks = {binding.var: int(self._kernel(binding) is not None) for binding in run}
        needs = {binding.var: [v for v in relax.analysis.free_vars(binding.value) if v in ticks] for binding in run}
        early: dict[Any, int] = {}
        for binding in run:
            early[binding.var] = max((early[v] for v in needs[binding.var]), default=0) + ticks[binding.var]
        yield early
        late = dict.fromkeys(ticks, max(early.values(), default=0))
        for binding in reversed(run):
            for needed in needs[binding.var]:
                late[needed] = min(late[needed], late[binding.var] - ticks[binding.var])
        yield late

    def _groups(self, kernels: Sequence[Any]) -> list[list[Any]]:
        """Kernels that become one launch each; first come, first served."""
        groups: list[tuple[list[Any], list[Small]]] = []
        for binding in kernels:
            small = self._small_one(binding)
            found = next((g for g in groups if small and g[1] and small.meets(g[1], self.most)), None)
            if found is None:
                groups.append(([binding], [small] if small else []))
            elif small is not None:
                found[0].append(binding)
                found[1].append(small)
        return [bindings for bindings, _ in groups]

    def _small_one(self, binding: Any) -> Small | None:
        handle = binding.value.args[0]
        if not isinstance(binding.value.ty_args[0], relax.TensorType):  # several results
            return None
        if handle not in self._small:
            self._small[handle] = Small.of(self.module[handle], self.most)
        return self._small[handle]

    def _call(self, group: Sequence[Any]) -> list[Any]:
        """The bindings in place of ``group``."""
        if len(group) == 1:
            return list(group)
        kernels = tuple(binding.value.args[0] for binding in group)
        arguments = [argument for binding in group for argument in binding.value.args[1].fields]
        types = [binding.value.ty_args[0] for binding in group]
        whole = relax.Var("together", relax.TupleType(types))
        call = relax.call_tir(self._together(kernels), arguments, types)
        parts = [relax.VarBinding(binding.var, relax.TupleGetItem(whole, n)) for n, binding in enumerate(group)]
        return [relax.VarBinding(whole, call), *parts]

    def _together(self, kernels: tuple[GlobalVar, ...]) -> GlobalVar:
        """The kernel that does what ``kernels`` do."""
        if kernels not in self._made:
            name = self._unique(f"{kernels[0].name_hint}_and_{len(kernels) - 1}_more")
            function = _merged([self.module[kernel] for kernel in kernels], self.most)
            self._made[kernels] = self._registry.add_func(function, name)  # which gives the handle its type
            self.functions[self._made[kernels]] = function
            self.members.update((str(kernel.name_hint), name) for kernel in kernels)
        return self._made[kernels]

    def _unique(self, name: str) -> str:
        found, number = name, 0
        while found in self._names:
            number += 1
            found = f"{name}{number}"
        self._names.add(found)
        return found


def _merged(functions: Sequence[tirx.PrimFunc], most: int) -> tirx.PrimFunc:
    """A function of all inputs, then all results: one launch with the blocks of all."""
    copies = [tvm.ir.load_json(tvm.ir.save_json(function)) for function in functions]  # with variables of their own
    parts = [small for copy in copies if (small := Small.of(copy, most)) is not None]
    threads = max(part.threads for part in parts)

    def block(number: Expr, thread: Expr) -> Stmt:
        start = sum(part.blocks for part in parts) - parts[-1].blocks
        done = parts[-1].part(number - start, thread, threads)
        for part in reversed(parts[:-1]):
            end, start = start, start - part.blocks
            done = when(number < end, part.part(number - start, thread, threads), done)
        return done

    body = launch([i64(sum(part.blocks for part in parts))], threads, block)
    inputs = [param for copy in copies for param in copy.params[:-1]]
    function = tirx.PrimFunc([*inputs, *(copy.params[-1] for copy in copies)], body)
    kept = {key: value for key, value in functions[0].attrs.items() if key != "global_symbol"}
    return function.with_attr(kept)


def _sized(kind: Any) -> bool:
    """Whether all sizes of a type are known."""
    if isinstance(kind, relax.TupleType):
        return all(map(_sized, kind.fields))
    return isinstance(kind, relax.TensorType) and all(isinstance(e, tirx.IntImm) for e in kind.shape)


def _flat(statement: Stmt) -> list[Stmt]:
    return list(statement.seq) if isinstance(statement, tirx.SeqStmt) else [statement]


def _inside(statement: Stmt) -> list[Stmt]:
    """Statements directly inside ``statement``."""
    if isinstance(statement, tirx.SeqStmt):
        return list(statement.seq)
    if isinstance(statement, tirx.IfThenElse):
        return [s for s in (statement.then_case, statement.else_case) if s is not None]
    return [statement.body] if isinstance(statement, tirx.For | tirx.While | tirx.AttrStmt) else []


def _statements(statement: Stmt) -> Iterator[Stmt]:
    yield statement
    for inner in _inside(statement):
        yield from _statements(inner)


def _expressions(statement: Stmt) -> list[Expr]:
    """Expressions directly in ``statement``."""
    if isinstance(statement, tirx.BufferStore):
        return [statement.value, *statement.indices]
    if isinstance(statement, tirx.IfThenElse | tirx.While):
        return [statement.condition]
    return [statement.value] if isinstance(statement, tirx.Evaluate | tirx.Bind) else []


def _called(node: Expr) -> str:
    """Name of the function that a node calls; a barrier counts as one; "" for what is no such call."""
    if not isinstance(node, Call):
        return ""
    name = str(node.op.name)
    if name == "tirx.tvm_storage_sync":
        return "__shfl"  # as one that threads do together
    if name in ("tirx.call_extern", "tirx.call_pure_extern"):
        return str(node.args[0].value) if isinstance(node.args[0], StringImm) else "?"
    return ""


def _shared_bytes(statement: Stmt) -> int:
    if not isinstance(statement, tirx.AllocBuffer) or statement.buffer.scope() != "shared":
        return 0
    return (static(product(statement.buffer.shape)) or SHARED_BYTES + 1) * itemsize(str(statement.buffer.dtype))


def _steps(statement: Stmt) -> float:
    """Rounds of loops inside ``statement``."""
    each = sum(map(_steps, _inside(statement))) or 1
    if isinstance(statement, tirx.While):
        return math.inf
    if not isinstance(statement, tirx.For):
        return each
    rounds = static(simplify(statement.extent))
    return math.inf if rounds is None else rounds * each
