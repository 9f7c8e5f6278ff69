"""Builds a Relax function out of calls of kernels: what lies in memory, and under which name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from tvm import relax, tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map, Source, Tensor, index
from mmopt.backends.cpu.joining import WEIGHTS
from mmopt.backends.expressions import same, simplify
from mmopt.lowering.program import ProgramBuilder
from mmopt.lowering.reshaping import reindexed
from mmopt.lowering.values import ConstantSource, NotLowered, Value, plain_view


@dataclasses.dataclass
class Params:
    """Weights one entry function takes, in the order of its last argument."""

    sources: list[ConstantSource] = dataclasses.field(default_factory=list)

    def position(self, source: ConstantSource) -> int:
        if source not in self.sources:
            self.sources.append(source)
        return self.sources.index(source)


class KernelCalls:
    """One Relax function.

    Values are lazy tensors until they are *realized*: then a kernel has been emitted that stores them.

    Args:
        program: State shared with other functions.
        name: Name of the function.
        outer: The function whose weights and sizes this one shares.
    """

    def __init__(self, program: ProgramBuilder, name: str, outer: KernelCalls | None = None) -> None:
        self.program = program
        self.name = name
        self.params: Params = outer.params if outer else Params()
        self.symbols: dict[str, Expr] = {}
        self.builder = relax.BlockBuilder()
        self._outer = outer
        self._vars: dict[Tensor, relax.Var] = {}
        self._realized: dict[Tensor, Source] = {}
        self._borrowed: set[Tensor] = set()
        self._params_var = relax.Var(WEIGHTS, relax.ObjectType())
        self._arguments: list[relax.Var] = []

    # -- arguments and results -----------------------------------------------------------------------------------

    def symbol(self, name: str) -> Expr:
        """The size variable called ``name``."""
        if name not in self.symbols:
            if self._outer is not None and name in self._outer.symbols:
                self.symbols[name] = self._outer.symbols[name]
            else:
                self.symbols[name] = tirx.Var(name, "int64")
        return self.symbols[name]

    def fresh_symbol(self, hint: str) -> Expr:
        """A size variable nobody uses yet, for an extent known only at run time."""
        return self.symbol(self.program.unique(f"{hint}_size"))

    def bind_argument(self, source: Source) -> Value:
        """Declare a parameter for ``source``."""
        var = relax.Var(source.name, relax.TensorType(source.shape, source.dtype))
        self._arguments.append(var)
        self._vars[source] = var
        self._borrowed.add(source)
        return Value(source, name=source.name)

    def receive(self, type_: relax.Type, name: str) -> relax.Var:
        """Declare a parameter that is only handed on."""
        self._arguments.append(relax.Var(name, type_))
        return self._arguments[-1]

    def hand_over(self, captured: Sequence[Value]) -> list[Expr]:
        """The last arguments of a call to a :meth:`child`: values it captured, sizes, weights."""
        sizes_ = [relax.ShapeExpr(list(self.symbols.values()))] if self.symbols else []
        return [*(self.var(self.dense(c)) for c in captured), *sizes_, self._params_var]

    def results(self, values: Sequence[Value]) -> list[relax.Var]:
        """Variables to return: every result has memory of its own."""
        given: set[Tensor] = set()
        variables_: list[relax.Var] = []
        for value in values:
            self.realize([value], "output")
            tensor = value.tensor
            if (
                value.constant is not None
                or not isinstance(tensor, Source)
                or tensor in self._borrowed
                or tensor in given
            ):
                value = Value(Map(tensor.shape, tensor.dtype, lambda *at, t=tensor: t[at] if at else t[()], "copy"))
                self.realize([value], "copy")
                tensor = value.tensor
            given.add(tensor)
            variables_.append(self.var(tensor))
        return variables_

    def body(self) -> Body:
        """Context in which kernels are called; ends with :meth:`Body.finish`."""
        return Body(self)

    # -- values ------------------------------------------------------------------------------------------------

    def constant(self, data: np.ndarray, name: str = "constant") -> Value:
        """A compile-time constant made by a lowering."""
        return Value(constant=np.asarray(data), name=name)

    def reshape(self, value: Value, shape: Sequence[int | Expr]) -> Value:
        """``value`` with other extents and the same elements in order; never copies what is in memory."""
        made = self._reshaped(value, shape)
        if made is not value:
            made.bits = value.bits
            if value.narrow is not None:
                made.narrow = self.reshape(value.narrow, shape)
            if value.quantized is not None and value.quantized.single:
                integers = self.reshape(value.quantized.value, shape)
                made.quantized = dataclasses.replace(value.quantized, value=integers)
        return made

    def _reshaped(self, value: Value, shape: Sequence[int | Expr]) -> Value:
        extents = [simplify(index(d)) for d in shape]
        if value.constant is not None and all(isinstance(e, tirx.IntImm) for e in extents):
            return Value(constant=value.constant.reshape([int(e.value) for e in extents]), name=value.name)
        if value.elements is not None and all(isinstance(e, tirx.IntImm) for e in extents):
            return Value(elements=value.elements.reshape([int(e.value) for e in extents]), dtype=value.dtype)
        self._refresh(value)
        tensor = value.tensor
        if len(extents) == tensor.ndim and all(map(same, extents, tensor.shape)):
            return value
        if not isinstance(tensor, Source):
            return Value(reindexed(tensor, extents), name=value.name)
        view = Source(extents, tensor.dtype, tensor.name)
        out = relax.TensorType(view.shape, view.dtype)
        call = relax.call_pure_packed(
            "vm.builtin.reshape", self.var(tensor), relax.ShapeExpr(view.shape), ty_args=[out]
        )
        self._vars[view] = self.builder.emit(call)
        if tensor in self._borrowed or isinstance(tensor, ConstantSource):
            self._borrowed.add(view)
        return Value(view, name=value.name)

    def realize(self, values: Sequence[Value], hint: str = "kernel") -> None:
        """Emit one kernel that stores all of ``values`` that are still computations."""
        for value in values:
            self._refresh(value)
        tensors = list(dict.fromkeys(v.blocked or v.tensor for v in values if v.pending))
        if not tensors:
            return
        handle, kernel = self.program.kernel(tensors, hint)
        arguments = [self.var(s) for s in kernel.sources] + list(kernel.symbols)
        types = [relax.TensorType(t.shape, t.dtype) for t in tensors]
        result = self.builder.emit(relax.call_tir(handle, arguments, types))
        for position, tensor in enumerate(tensors):
            source = Source(tensor.shape, tensor.dtype, tensor.name)
            single = result if len(tensors) == 1 else self.builder.emit(relax.TupleGetItem(result, position))
            self._vars[source] = single
            self._realized[tensor] = source
        for value in values:
            self._refresh(value)

    def dense(self, value: Value) -> Source:
        """``value`` in memory in its plain layout."""
        self.realize([value], "operand")
        if not isinstance(value.tensor, Source):
            plain = Value(value.tensor)
            self.realize([plain], "plain")
            value.tensor = plain.tensor
        assert isinstance(value.tensor, Source)
        return value.tensor

    def in_blocks(self, value: Value, lanes: int) -> Source:
        """``value`` in memory as ``[N, C/lanes, *space, lanes]``; its channels must be a multiple of ``lanes``."""
        self.realize([value], "operand")
        blocked = value.in_blocks_of(lanes)
        if blocked is None:
            plain, count = value.tensor, simplify(tirx.floordiv(value.shape[1], index(lanes)))

            def body(n: Expr, c: Expr, *rest: Expr) -> Expr:
                return plain[(n, c * lanes + rest[-1], *rest[:-1])]

            made = Value(Map((value.shape[0], count, *value.shape[2:], index(lanes)), value.dtype, body, "blocks"))
            self.realize([made], "blocks")
            blocked = made.tensor
            if value.blocked is None and value.constant is None:
                value.blocked = blocked
        assert isinstance(blocked, Source)
        return blocked

    def _refresh(self, value: Value) -> None:
        if value.blocked is not None:
            if value.blocked in self._realized:
                value.blocked = self._realized[value.blocked]
                if not isinstance(value.tensor, Source):
                    value.tensor = plain_view(value.blocked)
            return
        if value.pending and value.tensor in self._realized:
            value.tensor = self._realized[value.tensor]

    def tensor(self, value: Value) -> Tensor:
        """The tensor of ``value``, from memory when it has been realized."""
        self._refresh(value)
        return value.tensor

    def var(self, source: Tensor) -> relax.Var:
        """The Relax variable that holds ``source``."""
        if source not in self._vars:
            if not isinstance(source, ConstantSource):
                raise NotLowered(f"{source!r} is not available in {self.name}")
            out = relax.TensorType(source.shape, source.dtype)
            position = relax.prim_value(1 + self.params.position(source))  # behind the table of addresses
            call = relax.call_pure_packed("vm.builtin.tuple_getitem", self._params_var, position, ty_args=[out])
            self._vars[source] = self.builder.emit(call)
        return self._vars[source]

    def emit(self, call: Expr, shape: Sequence[Expr], dtype: str, name: str) -> Value:
        """Emit any Relax expression that gives a tensor."""
        source = Source(shape, dtype, name)
        self._vars[source] = self.builder.emit(call)
        return Value(source, name=name)

    def match(self, call: Expr, shape: Sequence[Expr], dtype: str, name: str) -> Value:
        """Emit a Relax expression whose extents are known at run time; the variables of ``shape`` are bound to them."""
        source = Source(shape, dtype, name)
        raw = self.builder.emit(call)
        self._vars[source] = self.builder.match_cast(raw, relax.TensorType(source.shape, dtype))
        return Value(source, name=name)

    def borrow(self, value: Value) -> None:
        """Declare that ``value`` may share memory with an argument: as a result of the function it is copied."""
        self._borrowed.add(value.tensor)

    def runtime_extents(self, value: Value, hint: str) -> list[Expr]:
        """Elements of a 1-D integer tensor as extents, read at run time where they are not followed at compile time.

        Raises:
            NotLowered: The number of elements is not known.
        """
        if value.elements is not None:
            return list(value.elements.reshape(-1))
        if value.ndim != 1 or not isinstance(value.shape[0], tirx.IntImm):
            raise NotLowered(f"{hint} has an unknown number of elements")
        if value.dtype != "int64":
            tensor = self.tensor(value)
            value = Value(Map(value.shape, "int64", lambda i: tensor[i].astype("int64"), "extents"))
        self.realize([value], "extents")
        count = int(value.shape[0].value)
        extents = [self.fresh_symbol(hint) for _ in range(count)]
        shape = self.builder.emit(relax.op.tensor_to_shape(self.var(value.tensor)))
        self.builder.match_cast(shape, relax.ShapeType(extents))
        return extents


class Body:
    """Keeps the builder's scopes open while nodes are lowered, and closes them into a function."""

    def __init__(self, lowering: KernelCalls) -> None:
        self.lowering = lowering
        self.function: relax.Function | None = None

    def __enter__(self) -> Body:
        self._function = self.lowering.builder.function(self.lowering.name)
        self._function.__enter__()
        self._dataflow = self.lowering.builder.dataflow()
        self._dataflow.__enter__()
        return self

    def finish(self, outputs: Sequence[Value], symbols: Sequence[Expr] = ()) -> None:
        """Return ``outputs``. Extra parameters: the sizes in ``symbols`` (if any), then the weights."""
        self.close(self.lowering.results(outputs), symbols)

    def close(self, results: Sequence[Expr], symbols: Sequence[Expr] = ()) -> None:
        """As :meth:`finish`, for Relax expressions that are returned as they are."""
        lowering, builder = self.lowering, self.lowering.builder
        result = builder.emit_output(relax.Tuple(list(results)))
        self._dataflow.__exit__(None, None, None)
        sizes = [relax.Var("sizes", relax.ShapeType(list(symbols)))] if symbols else []
        builder.emit_func_output(result, params=[*lowering._arguments, *sizes, lowering._params_var])
        self._function.__exit__(None, None, None)
        self.function = builder.get()[lowering.name]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            self._dataflow.__exit__(kind, error, trace)
            self.lowering.builder._end_block()
            self._function.__exit__(kind, error, trace)
