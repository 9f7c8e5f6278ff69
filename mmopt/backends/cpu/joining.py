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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.ir import Expr, GlobalVar

from mmopt.backends.cpu.joined_run import Made, Memory, Ordered, RunFunction, Step, TakesMemory, with_pointers

_RESHAPE, _GET_ITEM, _CALL_TIR = "vm.builtin.reshape", "vm.builtin.tuple_getitem", "relax.call_tir"

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
            self.functions[self._bare[handle]] = with_pointers(self.module[handle])
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
        run = Run(self, [self.bindings[number] for number in pending], later)
        return run.emit()


class Run:
    """Bindings that become one call.

    Args:
        owner: The function they are in.
        bindings: Kernels, views, weights and parts of results, in order.
        later: Variables that are used outside the run.
    """

    def __init__(self, owner: _Rewriting, bindings: Sequence[Any], later: set[Any]) -> None:
        self.owner, self.bindings, self.later = owner, bindings, later
        self.inputs: list[relax.Var] = []
        self.made: list[Made] = []
        self.steps: list[Step] = []
        self._memory: dict[Any, Memory] = {}
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
        function, arguments = RunFunction(self, leaving).build()
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
            self._memory[var] = Memory("weight", int(value.args[1].value))
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
        inputs: list[Memory | Expr] = []
        for argument in call.args[1].fields:
            inputs.append(self._place(argument) if isinstance(argument.ty, relax.TensorType) else argument)
            found = inputs[-1]
            if isinstance(found, Memory) and found.kind == "made":
                self.made[found.number].last = number
        (kind,) = call.ty_args
        several = isinstance(kind, relax.TupleType)
        outputs = [self._make(t, number) for t in (kind.fields if several else [kind])]
        self.steps.append(Step(call.args[0], inputs, outputs))
        if not several:
            self._name(outputs[0], var)
            return
        self._parts[var] = outputs
        if var in self.later:
            for n in outputs:
                self.made[n].leaves = True
            self._after.append(relax.VarBinding(var, relax.Tuple([self.made[n].variable() for n in outputs])))

    def _make(self, kind: Any, step: int) -> int:
        self.made.append(Made(tuple(kind.shape.values), str(kind.dtype), step, step))
        return len(self.made) - 1

    def _name(self, number: int, var: relax.Var) -> None:
        """``var`` is the result ``number``."""
        self._memory[var] = Memory("made", number)
        if var in self.later:
            made = self.made[number]
            if made.var is not None:
                self._after.append(relax.VarBinding(var, made.var))
                return
            made.var, made.leaves = var, True

    def _place(self, var: Any) -> Memory:
        if var not in self._memory:
            self._memory[var] = Memory("input", len(self.inputs))
            self.inputs.append(var)
        return self._memory[var]


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
