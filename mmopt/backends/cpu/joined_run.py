"""The function that a run of kernels becomes: it calls them one after the other, with pointers; see
:mod:`mmopt.backends.cpu.joining`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax, tirx
from tvm.ir import Call, Expr, GlobalVar, PointerType, PrimType, StringImm
from tvm.tirx import Stmt
from tvm_ffi import structural_equal

from mmopt.backends.cpu.arena import ALIGNMENT, Block, arrange, share
from mmopt.backends.cpu.loops import i64, product, seq, static, when
from mmopt.backends.cpu.ordering import Access, Span, behind, waits
from mmopt.backends.expressions import itemsize, simplify, variables

if TYPE_CHECKING:
    from mmopt.backends.cpu.joining import Run

_STATUS = PrimType("int32")
_CPU = 1  # kDLCPU

BARE = "mmopt.bare"
"""Attribute of kernels that take pointers."""

_ATTRIBUTES = {"tirx.noalias": True, "s_tir": True, "tirx.is_scheduled": True}

TakesMemory = Callable[[tirx.PrimFunc], bool]
"""Whether a kernel with pointers takes memory of a device for itself, which another may have had before."""


@dataclasses.dataclass(frozen=True)
class Ordered:
    """A step of a run.

    Attributes:
        kernel: Name of the kernel with pointers.
        after: Earlier steps, by number, that it has to wait for.
    """

    kernel: str
    after: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a tensor of a run is: ``input`` or ``weight`` (by number), or ``made`` by a kernel of the run."""

    kind: str
    number: int


@dataclasses.dataclass
class Made:
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
class Step:
    """One call of a kernel."""

    handle: GlobalVar
    inputs: list[Memory | Expr]
    outputs: list[int]


class RunFunction:
    """The TIR function of one run.

    Args:
        run: What it does.
        leaving: Results it hands out, in order.
    """

    def __init__(self, run: Run, leaving: Sequence[Made]) -> None:
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

    def _together(self, inside: Sequence[Made]) -> Callable[[int, int], bool] | None:
        """Whether two results are needed at the same time when steps wait for nothing but what they need."""
        if any(static(made.bytes) is None for made in inside):
            return None
        numbers = {id(made): number for number, made in enumerate(self.run.made)}
        before = behind(waits([self._access(step, lambda number: Span(number)) for step in self.run.steps]))
        users = [{made.first} for made in self.run.made]
        for number, step in enumerate(self.run.steps):
            for memory in step.inputs:
                if isinstance(memory, Memory) and memory.kind == "made":
                    users[memory.number].add(number)

        def precedes(one: Made, other: Made) -> bool:
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

    def _access(self, step: Step, span: Callable[[int], Span]) -> Access:
        """What a step reads and writes, given where the results of the run are. Inputs and weights never change."""
        reads = [span(m.number) for m in step.inputs if isinstance(m, Memory) and m.kind == "made"]
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
        scalars = [e for step in self.run.steps for e in step.inputs if not isinstance(e, Memory)]
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

    def _call(self, step: Step) -> Stmt:
        inputs = [self._pointer(e) if isinstance(e, Memory) else e for e in step.inputs]
        outputs = [self._pointer(Memory("made", number)) for number in step.outputs]
        callee = self._joiner.bare(step.handle)
        tensors = [e for e, given in zip(inputs, step.inputs, strict=True) if isinstance(given, Memory)]
        sizes = [e for e, given in zip(inputs, step.inputs, strict=True) if not isinstance(given, Memory)]
        if self._joiner.on_device:
            return tirx.Evaluate(tirx.call_cpacked(str(callee.name_hint), *tensors, *sizes, *outputs))
        status = Call(callee, [*tensors, *sizes, *outputs], ret_ty=_STATUS)
        failed = tirx.bitwise_or(self._failed[i64(0)], status)
        return tirx.BufferStore(self._failed, failed, [i64(0)])

    def _pointer(self, memory: Memory) -> Expr:
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

    def __init__(self, results: Sequence[Made], together: Callable[[int, int], bool] | None) -> None:
        known = [made for made in results if static(made.bytes) is not None]
        offsets, end = arrange([Block(static(made.bytes) or 0, made.first, made.last) for made in known], together)
        self.buffers = [_buffer((i64(end),), "uint8", "workspace")]
        self._found = {id(made): (self.buffers[0], i64(at)) for made, at in zip(known, offsets, strict=True)}
        groups: list[list[Made]] = []
        for made in results:
            if static(made.bytes) is None:
                group = next((g for g in groups if structural_equal(g[0].bytes, made.bytes)), None)
                groups.append([made]) if group is None else group.append(made)
        for group in groups:
            self._add(group)

    def _add(self, group: Sequence[Made]) -> None:
        numbers = share([Block(0, made.first, made.last) for made in group])
        start = len(self.buffers)
        self.buffers += [_buffer(group[0].shape, group[0].dtype, "temporary") for _ in range(max(numbers) + 1)]
        for made, number in zip(group, numbers, strict=True):
            self._found[id(made)] = self.buffers[start + number], i64(0)

    def __getitem__(self, made: Made) -> tuple[tirx.Buffer, Expr]:
        """Buffer and offset in bytes."""
        return self._found[id(made)]


def with_pointers(function: tirx.PrimFunc) -> tirx.PrimFunc:
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
    return tirx.PrimFunc(params[::-1], body, ret_type=_STATUS).with_attr({**_ATTRIBUTES, BARE: True})


def settle(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Say of a kernel with pointers in whose memory its temporaries are, which tensors would tell, and have it return.

    This is for code that is nearly finished: earlier passes move temporaries out of the statement that says so, and put
    what frees them behind the return.
    """
    if not (function.attrs and BARE in function.attrs):
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
