"""Kernels that follow each other joined into one function: one call of the virtual machine for all of them.

For every kernel the virtual machine spends up to two microseconds on arguments, their checks, and the memory of the
result; small models take longer for that than for their arithmetic. Between calls that only the virtual machine can
make (control flow, sizes that are data),

    a = call_tir(k1, (x, w));  b = reshape(a);  c = call_tir(k2, (b, v))

becomes ``c = call_tir(run, (x, table))``, and ``run`` calls ``k1`` and ``k2`` directly, with pointers. Results that
nobody else needs lie in one workspace, whose parts are used again as their lifetimes allow. Weights come from a table
of addresses, so that the virtual machine touches none of them. The table begins with the address of a clock, or zero:
there every kernel adds what it took to its own slot. Behind it is the address of the workspace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.ir import Call, Expr, GlobalVar, PointerType, PrimType, StringImm
from tvm.tirx import Stmt
from tvm_ffi import structural_equal

from mmopt.backends.cpu.arena import ALIGNMENT, Block, arrange, share
from mmopt.backends.cpu.loops import i64, product, seq, static, when
from mmopt.backends.cpu.ordering import Access, Span, behind, waits
from mmopt.backends.expressions import itemsize, simplify, variables

_RESHAPE, _GET_ITEM, _CALL_TIR = "vm.builtin.reshape", "vm.builtin.tuple_getitem", "relax.call_tir"
_STATUS = PrimType("int32")
_CPU = 1  # kDLCPU
_BARE = "mmopt.bare"
_ATTRIBUTES = {"tirx.noalias": True, "s_tir": True, "tirx.is_scheduled": True}

WEIGHTS = "params"
"""Name of the parameter that holds a function's weights."""


@dataclasses.dataclass(frozen=True)
class Joined:
    """What :func:`join_kernels` gives.

    Attributes:
        module: The new module.
        bare: Names of the kernels in it that are called with bare pointers.
        workspace: Bytes that the caller has to provide for every call at a time.
        repeatable: Functions that are one run and nothing else: they do the same whatever their inputs hold, and keep
            nothing but their results in memory of the virtual machine, so that what they do on a device can be recorded
            and repeated. With the steps in order where all sizes are known.
    """

    module: tvm.IRModule
    bare: set[str]
    workspace: int
    repeatable: dict[str, list[Ordered]]


@dataclasses.dataclass(frozen=True)
class Ordered:
    """A step of a run.

    Attributes:
        kernel: Name of the kernel with pointers.
        after: Earlier steps, by number, that it has to wait for.
    """

    kernel: str
    after: tuple[int, ...]


TakesMemory = Callable[[tirx.PrimFunc], bool]
"""Whether a kernel with pointers takes memory of a device for itself, which another may have had before."""


def join_kernels(module: tvm.IRModule, slots: Mapping[str, int], *, on_device: TakesMemory | None = None) -> Joined:
    """Join the kernels of every Relax function.

    Args:
        module: Relax functions without dataflow blocks, and the kernels they call. A function that has weights takes
            them as its last parameter, an array whose first element is the table of addresses.
        slots: Position of each kernel's slot in the clock, by name.
        on_device: Given when tensors lie in a device's memory, where the function that calls the kernels cannot keep
            anything: nothing is timed, kernels are functions that raise, and those that do not need each other's
            results never share memory, so that they may run at the same time.
    """
    joiner = _Joiner(module, slots, on_device)
    for handle, function in module.functions.items():
        if isinstance(function, relax.Function) and isinstance(function.body, relax.SeqExpr):
            joiner.rewrite(handle, function)
    return joiner.finish()


@dataclasses.dataclass(frozen=True)
class _Memory:
    """What a tensor of a run is: ``input`` or ``weight`` (by number), or ``made`` by a kernel of the run."""

    kind: str
    number: int


@dataclasses.dataclass
class _Made:
    """A result of a kernel of the run."""

    shape: tuple[Expr, ...]
    dtype: str
    first: int
    last: int
    var: relax.Var | None = None
    leaves: bool = False

    @property
    def bytes(self) -> Expr:
        return simplify(product(self.shape) * itemsize(self.dtype))

    def variable(self) -> relax.Var:
        """The variable it is bound to outside the run."""
        if self.var is None:
            self.var = relax.Var("made", relax.TensorType(self.shape, self.dtype))
        return self.var


@dataclasses.dataclass
class _Step:
    """One call of a kernel."""

    handle: GlobalVar
    inputs: list[_Memory | Expr]
    outputs: list[int]


class _Joiner:
    """Rewrites functions one after another; kernels they share get one form with pointers."""

    def __init__(self, module: tvm.IRModule, slots: Mapping[str, int], on_device: TakesMemory | None) -> None:
        self.module, self.slots, self.on_device = module, slots, on_device
        self.functions: dict[GlobalVar, Any] = {
            handle: function for handle, function in module.functions.items() if not isinstance(function, tirx.PrimFunc)
        }
        self._names = {str(handle.name_hint) for handle in module.functions}
        self._bare: dict[GlobalVar, GlobalVar] = {}
        self._registry = relax.BlockBuilder()
        self.workspace = 0
        self.repeatable: dict[str, list[Ordered]] = {}

    def rewrite(self, handle: GlobalVar, function: relax.Function) -> None:
        """Replace ``function`` by one that calls runs."""
        bindings = [binding for block in function.body.blocks for binding in block.bindings]
        weights = function.params[-1] if function.params and _is_weights(function.params[-1]) else None
        rewriting = _Rewriting(self, str(handle.name_hint), weights, bindings, function.body.body)
        made = rewriting.run()
        if len(rewriting.orders) == 1 and all(map(_repeats, made)):
            self.repeatable[str(handle.name_hint)] = rewriting.orders[0]
        body = relax.SeqExpr([relax.BindingBlock(made)], function.body.body)
        self.functions[handle] = relax.Function(
            function.params, body, function.ret_ty, function.is_pure, function.attrs, function.span
        )

    def is_kernel(self, handle: Any) -> bool:
        return isinstance(handle, GlobalVar) and isinstance(self.module[handle], tirx.PrimFunc)

    def bare(self, handle: GlobalVar) -> GlobalVar:
        """The form of a kernel that takes pointers, checks nothing, and gives a status."""
        if handle not in self._bare:
            self._bare[handle] = GlobalVar(self._unique(f"{handle.name_hint}_bare"))
            self.functions[self._bare[handle]] = _with_pointers(self.module[handle])
        return self._bare[handle]

    def add_run(self, function: tirx.PrimFunc, name: str) -> GlobalVar:
        handle = self._registry.add_func(function, self._unique(f"{name}_run"))  # which gives the handle its type
        self.functions[handle] = function
        return handle

    def finish(self) -> Joined:
        """The module with what is still called."""
        for handle in _called(self.functions.values()):
            if handle not in self.functions:
                self.functions[handle] = self.module[handle]
        bare = {str(handle.name_hint) for handle in self._bare.values()}
        return Joined(tvm.IRModule(self.functions), bare, self.workspace, self.repeatable)

    def _unique(self, name: str) -> str:
        found, number = name, 0
        while found in self._names:
            number += 1
            found = f"{name}{number}"
        self._names.add(found)
        return found


class _Rewriting:
    """One function: bindings are collected into runs, and each run becomes one call."""

    def __init__(
        self, joiner: _Joiner, name: str, weights: relax.Var | None, bindings: Sequence[Any], result: Expr
    ) -> None:
        self.joiner, self.name, self.weights, self.bindings = joiner, name, weights, bindings
        self._users = [set(relax.analysis.free_vars(binding.value)) for binding in bindings]
        self._result = set(relax.analysis.free_vars(result))
        self._table: relax.Var | None = None
        self._start: list[Any] = []
        self.orders: list[list[Ordered]] = []

    def run(self) -> list[Any]:
        """The new bindings."""
        done: list[Any] = []
        pending: list[int] = []
        made: set[Any] = set()
        for number, binding in enumerate(self.bindings):
            if self._joins(binding, made):
                pending.append(number)
                made.add(binding.var)
                continue
            if self._users[number] & made:
                done += self._flush(pending)
                pending, made = [], set()
            done.append(binding)
        done += self._flush(pending)
        return self._start + done

    def table(self) -> relax.Var:
        """The table of addresses, whose length is found at run time."""
        if self._table is None:
            any_length = relax.TensorType(dtype="int64", ndim=1)
            raw = relax.Var("addresses", any_length)
            call = relax.Call(relax.ExternFunc(_GET_ITEM), [self.weights, relax.prim_value(0)], ty_args=[any_length])
            known = relax.TensorType((tirx.Var("weights", "int64"),), "int64")
            self._table = relax.Var("table", known)
            self._start = [relax.VarBinding(raw, call), relax.MatchCast(self._table, raw, known)]
        return self._table

    def _joins(self, binding: Any, made: set[Any]) -> bool:
        """Whether ``binding`` is a kernel, a view, a weight, or a part of the result of a kernel in the run."""
        if not isinstance(binding, relax.VarBinding):
            return False
        value = binding.value
        if isinstance(value, relax.TupleGetItem):
            return value.tuple_value in made
        name = _callee(value)
        if name == _GET_ITEM:
            return self.weights is not None and value.args[0].same_as(self.weights)
        if name == _RESHAPE:
            return isinstance(value.args[0].ty, relax.TensorType)
        return name == _CALL_TIR and self.joiner.is_kernel(value.args[0])

    def _flush(self, pending: Sequence[int]) -> list[Any]:
        inside = set(pending)
        later = set(self._result).union(*(u for n, u in enumerate(self._users) if n not in inside), set())
        run = _Run(self, [self.bindings[number] for number in pending], later)
        return run.emit()


class _Run:
    """Bindings that become one call.

    Args:
        owner: The function they are in.
        bindings: Kernels, views, weights and parts of results, in order.
        later: Variables that are used outside the run.
    """

    def __init__(self, owner: _Rewriting, bindings: Sequence[Any], later: set[Any]) -> None:
        self.owner, self.bindings, self.later = owner, bindings, later
        self.inputs: list[relax.Var] = []
        self.made: list[_Made] = []
        self.steps: list[_Step] = []
        self._memory: dict[Any, _Memory] = {}
        self._roots: dict[Any, Any] = {}
        self._parts: dict[Any, list[int]] = {}
        self._weights: dict[Any, Any] = {}
        self._before: dict[Any, Any] = {}
        self._after: list[Any] = []

    def emit(self) -> list[Any]:
        """The bindings to put in their place."""
        for binding in self.bindings:
            self._take(binding)
        if not self.steps:
            return [*self._before.values(), *self._after]
        leaving = [made for made in self.made if made.leaves] or self.made[-1:]
        for made in leaving:
            made.leaves = True
        function, arguments = _RunFunction(self, leaving).build()
        handle = self.owner.joiner.add_run(function, self.owner.name)
        types = [relax.TensorType(made.shape, made.dtype) for made in leaving]
        call = relax.call_tir(handle, arguments, types)
        if len(types) == 1:
            return [*self._before.values(), relax.VarBinding(leaving[0].variable(), call), *self._after]
        whole = relax.Var("results", relax.TupleType(types))
        parts = [relax.VarBinding(made.variable(), relax.TupleGetItem(whole, n)) for n, made in enumerate(leaving)]
        return [*self._before.values(), relax.VarBinding(whole, call), *parts, *self._after]

    def _take(self, binding: Any) -> None:
        value, var = binding.value, binding.var
        if isinstance(value, relax.TupleGetItem):
            self._name(self._parts[value.tuple_value][int(value.index)], var)
            return
        name = _callee(value)
        if name == _GET_ITEM:
            self._memory[var] = _Memory("weight", int(value.args[1].value))
            self._weights[var] = binding
            if var in self.later:
                self._before[var] = binding
        elif name == _RESHAPE:
            self._view(binding)
        else:
            self._kernel(var, value)

    def _view(self, binding: Any) -> None:
        """Another shape of the same memory; where it is used outside the run, it is made from what is there."""
        base, var = binding.value.args[0], binding.var
        memory = self._memory[var] = self._place(base)
        root = self._roots[var] = self._roots.get(base, base)
        if var not in self.later:
            return
        if memory.kind == "made":
            self.made[memory.number].leaves = True
            root = self.made[memory.number].variable()
        elif memory.kind == "weight":
            self._before[root] = self._weights[root]
        shape, types = binding.value.args[1], list(binding.value.ty_args)
        self._after.append(relax.VarBinding(var, relax.Call(relax.ExternFunc(_RESHAPE), [root, shape], ty_args=types)))

    def _kernel(self, var: relax.Var, call: Any) -> None:
        number = len(self.steps)
        inputs: list[_Memory | Expr] = []
        for argument in call.args[1].fields:
            inputs.append(self._place(argument) if isinstance(argument.ty, relax.TensorType) else argument)
            found = inputs[-1]
            if isinstance(found, _Memory) and found.kind == "made":
                self.made[found.number].last = number
        (kind,) = call.ty_args
        several = isinstance(kind, relax.TupleType)
        outputs = [self._make(t, number) for t in (kind.fields if several else [kind])]
        self.steps.append(_Step(call.args[0], inputs, outputs))
        if not several:
            self._name(outputs[0], var)
            return
        self._parts[var] = outputs
        if var in self.later:
            for n in outputs:
                self.made[n].leaves = True
            self._after.append(relax.VarBinding(var, relax.Tuple([self.made[n].variable() for n in outputs])))

    def _make(self, kind: Any, step: int) -> int:
        self.made.append(_Made(tuple(kind.shape.values), str(kind.dtype), step, step))
        return len(self.made) - 1

    def _name(self, number: int, var: relax.Var) -> None:
        """``var`` is the result ``number``."""
        self._memory[var] = _Memory("made", number)
        if var in self.later:
            made = self.made[number]
            if made.var is not None:
                self._after.append(relax.VarBinding(var, made.var))
                return
            made.var, made.leaves = var, True

    def _place(self, var: Any) -> _Memory:
        if var not in self._memory:
            self._memory[var] = _Memory("input", len(self.inputs))
            self.inputs.append(var)
        return self._memory[var]


class _RunFunction:
    """The TIR function of one run.

    Args:
        run: What it does.
        leaving: Results it hands out, in order.
    """

    def __init__(self, run: _Run, leaving: Sequence[_Made]) -> None:
        self.run, self.leaving = run, leaving
        self._joiner = run.owner.joiner
        inside = [made for made in run.made if not made.leaves]
        self._places = _Places(inside, self._together(inside) if self._joiner.on_device else None)
        self._inputs = [_buffer(var.ty.shape.values, var.ty.dtype, f"in{n}") for n, var in enumerate(run.inputs)]
        self._outputs = {id(made): _buffer(made.shape, made.dtype, f"out{n}") for n, made in enumerate(leaving)}
        self._failed = _buffer((i64(1),), "int32", "failed")
        self._table: tirx.Buffer | None = None
        if run.owner.weights is not None:
            self._table = _buffer((tirx.Var("weights", "int64"),), "int64", "table")

    def build(self) -> tuple[tirx.PrimFunc, list[Any]]:
        """The function and the arguments of its call."""
        symbols = self._symbols()
        timed = self._table is not None and not self._joiner.on_device
        calls = self._timed_calls(self._table) if self._table is not None and timed else self._calls()
        table = [] if self._table is None else [self._table]
        outputs = [self._outputs[id(made)] for made in self.leaving]
        body = seq(*self._declared(), *calls, None if self._joiner.on_device else self._checked())
        function = tirx.PrimFunc([*self._inputs, *table, *symbols, *outputs], body)
        self.run.owner.orders.append(self._order())
        tables = [] if self._table is None else [self.run.owner.table()]
        return function.with_attr(_ATTRIBUTES), [*self.run.inputs, *tables, *symbols]

    def _together(self, inside: Sequence[_Made]) -> Callable[[int, int], bool] | None:
        """Whether two results are needed at the same time when steps wait for nothing but what they need."""
        if any(static(made.bytes) is None for made in inside):
            return None
        numbers = {id(made): number for number, made in enumerate(self.run.made)}
        before = behind(waits([self._access(step, lambda number: Span(number)) for step in self.run.steps]))
        users = [{made.first} for made in self.run.made]
        for number, step in enumerate(self.run.steps):
            for memory in step.inputs:
                if isinstance(memory, _Memory) and memory.kind == "made":
                    users[memory.number].add(number)

        def precedes(one: _Made, other: _Made) -> bool:
            return all(before[other.first] >> user & 1 for user in users[numbers[id(one)]])

        return lambda one, other: not (precedes(inside[one], inside[other]) or precedes(inside[other], inside[one]))

    def _order(self) -> list[Ordered]:
        """The steps and what they wait for; nothing where that is not known."""
        takes_memory = self._joiner.on_device
        if takes_memory is None or any(static(made.bytes) is None for made in self.run.made):
            return []
        steps = self.run.steps
        order = waits([self._access(step, self._span) for step in steps])
        names = [str(self._joiner.bare(step.handle).name_hint) for step in steps]
        return [Ordered(name, after) for name, after in zip(names, order, strict=True)]

    def _access(self, step: _Step, span: Callable[[int], Span]) -> Access:
        """What a step reads and writes, given where the results of the run are. Inputs and weights never change."""
        reads = [span(m.number) for m in step.inputs if isinstance(m, _Memory) and m.kind == "made"]
        writes = [span(number) for number in step.outputs]
        takes_memory = self._joiner.on_device
        if takes_memory is not None and takes_memory(self._joiner.functions[self._joiner.bare(step.handle)]):
            writes.append(Span("taken"))
        return Access(tuple(reads), tuple(writes))

    def _span(self, number: int) -> Span:
        made = self.run.made[number]
        if made.leaves:
            return Span(number)
        _, offset = self._places[made]
        start = static(offset) or 0
        return Span("workspace", start, start + (static(made.bytes) or 0))

    def _declared(self) -> list[Stmt]:
        """Memory: the caller's workspace where there is one, and what has a size known at run time."""
        clear = tirx.BufferStore(self._failed, tirx.const(0, "int32"), [i64(0)])
        made: list[Stmt] = [] if self._joiner.on_device else [tirx.AllocBuffer(self._failed), clear]
        fixed, *others = self._places.buffers
        if self._table is None:
            made.append(tirx.AllocBuffer(fixed))
        else:
            self._joiner.workspace = max(self._joiner.workspace, static(fixed.shape[0]) or 0)
            made.append(tirx.DeclBuffer(fixed, data=tirx.reinterpret(_pointer_to("uint8"), self._table[i64(1)])))
        return [*made, *map(tirx.AllocBuffer, others)]

    def _checked(self) -> Stmt:
        """Raise when a kernel gave another status than zero: a thread could not be started, or memory not be had."""
        fine = self._failed[i64(0)].equal(tirx.const(0, "int32"))
        return tirx.AssertStmt(
            fine, StringImm("RuntimeError"), [StringImm("a kernel failed: out of memory or threads")]
        )

    def _symbols(self) -> list[Expr]:
        """Sizes the function needs, as scalars."""
        scalars = [e for step in self.run.steps for e in step.inputs if not isinstance(e, _Memory)]
        shapes = [e for buffer in (*self._inputs, *self._outputs.values()) for e in buffer.shape]
        found: dict[str, Expr] = {}
        for expression in (*scalars, *shapes, *(e for b in self._places.buffers for e in b.shape)):
            found.update((str(var.name), var) for var in variables(expression))
        return [found[name] for name in sorted(found)]

    def _calls(self) -> Iterator[Stmt]:
        return map(self._call, self.run.steps)

    def _timed_calls(self, table: tirx.Buffer) -> Iterator[Stmt]:
        """The calls, with what each takes added to its slot of the clock when there is one."""
        address = table[i64(0)]
        end = i64(2 * len(self._joiner.slots))
        clock = _buffer((end + 1,), "int64", "clock")
        begun = _buffer((i64(1),), "int64", "begun")
        yield tirx.DeclBuffer(clock, data=tirx.reinterpret(_pointer_to("int64"), address))
        yield tirx.AllocBuffer(begun)
        for step in self.run.steps:
            at = i64(2 * self._joiner.slots[str(step.handle.name_hint)])
            spent = clock[at] + (_cycles() - begun[i64(0)])
            yield when(address != i64(0), tirx.BufferStore(begun, _cycles(), [i64(0)]))
            yield self._call(step)
            counted = tirx.BufferStore(clock, clock[at + 1] + 1, [at + 1])
            yield when(address != i64(0), seq(tirx.BufferStore(clock, spent, [at]), counted))
        yield when(address != i64(0), tirx.BufferStore(clock, _cycles(), [end]))

    def _call(self, step: _Step) -> Stmt:
        inputs = [self._pointer(e) if isinstance(e, _Memory) else e for e in step.inputs]
        outputs = [self._pointer(_Memory("made", number)) for number in step.outputs]
        callee = self._joiner.bare(step.handle)
        tensors = [e for e, given in zip(inputs, step.inputs, strict=True) if isinstance(given, _Memory)]
        sizes = [e for e, given in zip(inputs, step.inputs, strict=True) if not isinstance(given, _Memory)]
        if self._joiner.on_device:
            return tirx.Evaluate(tirx.call_cpacked(str(callee.name_hint), *tensors, *sizes, *outputs))
        status = Call(callee, [*tensors, *sizes, *outputs], ret_ty=_STATUS)
        failed = tirx.bitwise_or(self._failed[i64(0)], status)
        return tirx.BufferStore(self._failed, failed, [i64(0)])

    def _pointer(self, memory: _Memory) -> Expr:
        if memory.kind == "input":
            return self._inputs[memory.number].data
        if memory.kind == "weight":
            assert self._table is not None
            return tirx.reinterpret(PointerType(PrimType("uint8")), self._table[i64(memory.number + 1)])
        made = self.run.made[memory.number]
        if made.leaves:
            return self._outputs[id(made)].data
        buffer, offset = self._places[made]
        return tirx.handle_add_byte_offset(buffer.data, offset) if static(offset) else buffer.data


class _Places:
    """Where results lie that stay inside the run.

    Those of constant size share the first of :attr:`buffers`. Others share a buffer with those of the same size.
    """

    def __init__(self, results: Sequence[_Made], together: Callable[[int, int], bool] | None) -> None:
        known = [made for made in results if static(made.bytes) is not None]
        offsets, end = arrange([Block(static(made.bytes) or 0, made.first, made.last) for made in known], together)
        self.buffers = [_buffer((i64(end),), "uint8", "workspace")]
        self._found = {id(made): (self.buffers[0], i64(at)) for made, at in zip(known, offsets, strict=True)}
        groups: list[list[_Made]] = []
        for made in results:
            if static(made.bytes) is None:
                group = next((g for g in groups if structural_equal(g[0].bytes, made.bytes)), None)
                groups.append([made]) if group is None else group.append(made)
        for group in groups:
            self._add(group)

    def _add(self, group: Sequence[_Made]) -> None:
        numbers = share([Block(0, made.first, made.last) for made in group])
        start = len(self.buffers)
        self.buffers += [_buffer(group[0].shape, group[0].dtype, "temporary") for _ in range(max(numbers) + 1)]
        for made, number in zip(group, numbers, strict=True):
            self._found[id(made)] = self.buffers[start + number], i64(0)

    def __getitem__(self, made: _Made) -> tuple[tirx.Buffer, Expr]:
        """Buffer and offset in bytes."""
        return self._found[id(made)]


def _with_pointers(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """A kernel with pointers for buffers, which trusts its caller and gives zero when it comes through."""
    params: list[Any] = []
    body = function.body
    for param in reversed(function.params):
        if isinstance(param.ty, tirx.BufferType):
            pointer = tirx.Var(str(param.name), _pointer_to(str(param.dtype)))
            body = seq(tirx.DeclBuffer(param, data=pointer), body)
            body = tirx.AttrStmt(pointer, "storage_alignment", tirx.const(ALIGNMENT, "int32"), body)
            params.append(pointer)
        else:
            params.append(param)
    return tirx.PrimFunc(params[::-1], body, ret_type=_STATUS).with_attr({**_ATTRIBUTES, _BARE: True})


def settle(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Say of a kernel with pointers in whose memory its temporaries are, which tensors would tell, and have it return.

    This is for code that is nearly finished: earlier passes move temporaries out of the statement that says so, and put
    what frees them behind the return.
    """
    if not (function.attrs and _BARE in function.attrs):
        return function
    return function.with_body(seq(in_memory_of(_CPU, function.body), tirx.Return(tirx.const(0, "int32"))))


def in_memory_of(device: int, body: Stmt) -> Stmt:
    """``body`` with its temporaries in the memory of a kind of device, by DLPack's number of it."""
    for key, number in (("device_type", device), ("device_id", 0)):
        body = tirx.AttrStmt(tirx.const(0, "int32"), key, tirx.const(number, "int32"), body)
    return body


def _buffer(shape: Iterable[Expr], dtype: str, name: str) -> tirx.Buffer:
    return tirx.decl_buffer(tuple(shape), str(dtype), name)


def _pointer_to(dtype: str) -> PointerType:
    return PointerType(PrimType(dtype))


def _cycles() -> Expr:
    """The counter that programs may read: on AArch64 that of the timer, for the cycles' traps."""
    target = tvm.target.Target.current()
    arm = target is not None and str(target.attrs.get("mtriple", "")).startswith(("aarch64", "arm64"))
    return tirx.call_llvm_intrin("int64", "llvm.readsteadycounter" if arm else "llvm.readcyclecounter")


def _repeats(binding: Any) -> bool:
    """Whether a binding only calls kernels, or names what is there."""
    value = binding.value
    if isinstance(value, relax.Call):
        return _callee(value) in (_RESHAPE, _GET_ITEM, _CALL_TIR)
    return isinstance(value, relax.Var | relax.Tuple | relax.TupleGetItem | relax.ShapeExpr)


def _callee(value: Any) -> str:
    """Name of the operator or packed function that a Relax call calls; empty for anything else."""
    if not isinstance(value, relax.Call):
        return ""
    if isinstance(value.op, relax.ExternFunc):
        return str(value.op.global_symbol)
    return str(value.op.name) if isinstance(value.op, tvm.ir.Op) else ""


def _is_weights(param: Any) -> bool:
    """Whether a function's parameter is its array of weights."""
    return str(param.name) == WEIGHTS and not isinstance(param.ty, relax.TensorType)


def _called(functions: Iterable[Any]) -> Iterator[GlobalVar]:
    for function in list(functions):
        if isinstance(function, relax.Function):
            yield from relax.analysis.all_global_vars(function)
