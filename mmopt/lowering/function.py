"""Lowers one ONNX graph into one Relax function that calls kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir
from tvm import relax, tirx
from tvm.ir import Expr, GlobalVar

from mmopt.backends.compute import Map, Source, Tensor, index
from mmopt.backends.cpu.joining import WEIGHTS
from mmopt.backends.cpu.loops import flat_index, split_index
from mmopt.backends.expressions import same, simplify, variables
from mmopt.ir.expand import contradiction, instantiate, standard_body
from mmopt.ir.module import FUSED_DOMAIN
from mmopt.lowering.program import ProgramBuilder
from mmopt.lowering.registry import OpNode, lowering_of
from mmopt.lowering.values import (
    ConstantSource,
    Illegal,
    NotLowered,
    Value,
    described,
    dtype_name,
    identifier,
    narrow_bits,
    plain_view,
)

REMEMBERING = frozenset(
    {"Attention", "Cast", "Concat", "Conv", "ConvTranspose", "GRU", "Gather", "Gemm", "LSTM", "MatMul"}
    | {"MaxPool", "QuantizeLinear", "RNN", "Reshape", "Transpose"}
)
"""Operators that use what a deferred value was made from, or hand it on. All others get it in memory."""

FAILED = "its lowering failed"
"""Start of the reason given for a node whose lowering raised: a bug, which onnxruntime covers up."""


@dataclasses.dataclass
class Params:
    """Weights one entry function takes, in the order of its last argument."""

    sources: list[ConstantSource] = dataclasses.field(default_factory=list)

    def position(self, source: ConstantSource) -> int:
        if source not in self.sources:
            self.sources.append(source)
        return self.sources.index(source)


class BranchesDiffer(NotLowered):
    """The branches of an If give values of different ranks, so that what follows it differs too.

    Attributes:
        resume: Lowers the given nodes, all that follow, separately behind each branch, and declares the given outputs;
            or takes the If away, where one branch leads to nodes the standard does not allow. Returns whether the nodes
            are lowered.
    """

    def __init__(self, reason: str, resume: Callable[[list[ir.Node], Sequence[ir.Value]], bool]) -> None:
        super().__init__(reason)
        self.resume = resume


def _tell(failed: Callable[[ir.Node, NotLowered], None] | None, node: ir.Node, reason: NotLowered) -> None:
    if failed is None:
        raise reason
    failed(node, reason)


class FunctionLowering:
    """Builds one Relax function.

    Operators are lowered to lazy tensors; a value is *realized* when a kernel has been emitted that stores it. After
    every node its results are realized, except inside a fusion group, which is realized as a whole.

    Args:
        program: State shared with other functions.
        name: Name of the function.
        opsets: Operator set versions by domain.
        functions: The model's local functions.
        parent: The function whose values a body of If, Loop or Scan may use.
    """

    def __init__(
        self,
        program: ProgramBuilder,
        name: str,
        opsets: dict[str, int],
        functions: dict[ir.OperatorIdentifier, ir.Function],
        parent: FunctionLowering | None = None,
    ) -> None:
        self.program = program
        self.name = name
        self.opsets = opsets
        self.functions = functions
        self.parent = parent
        self.params: Params = parent.params if parent else Params()
        self.symbols: dict[str, Expr] = {}
        self.builder = relax.BlockBuilder()
        self.captured: list[Value] = []
        self.values: dict[ir.Value, Value] = {}
        self.missing: dict[ir.Value, str] = {}
        self._vars: dict[Tensor, relax.Var] = {}
        self._realized: dict[Tensor, Source] = {}
        self._borrowed: set[Tensor] = set()
        self._params_var = relax.Var(WEIGHTS, relax.ObjectType())
        self._arguments: list[relax.Var] = []
        self._lazy = 0
        self._scopes: list[relax.BlockBuilder] = []

    # -- the function ------------------------------------------------------------------------------------------

    def symbol(self, name: str) -> Expr:
        """The size variable called ``name``."""
        if name not in self.symbols:
            if self.parent is not None and name in self.parent.symbols:
                self.symbols[name] = self.parent.symbols[name]
            else:
                self.symbols[name] = tirx.Var(name, "int64")
        return self.symbols[name]

    @property
    def lazy(self) -> bool:
        """Whether a fusion group is being lowered, whose values are not stored node by node."""
        return self._lazy > 0

    def fresh_symbol(self, hint: str) -> Expr:
        """A size variable nobody uses yet, for an extent known only at run time."""
        return self.symbol(self.program.unique(f"{hint}_size"))

    def argument(self, value: ir.Value) -> Value:
        """Declare a parameter of the function for a graph input.

        Raises:
            NotLowered: Its type or rank is not known.
        """
        if not isinstance(value.type, ir.TensorType):
            raise NotLowered(f"{value.name} is a {type(value.type).__name__}")
        if value.shape is None:
            raise NotLowered(f"the rank of {value.name} is not known")
        shape = [self._extent(d, f"{value.name}_{n}") for n, d in enumerate(value.shape)]
        made = self.bind_argument(Source(shape, dtype_name(value.dtype), identifier(value.name)))
        made.bits = narrow_bits(value.dtype)
        self.values[value] = made
        return made

    def bind_argument(self, source: Source) -> Value:
        """Declare a parameter for ``source``."""
        var = relax.Var(source.name, relax.TensorType(source.shape, source.dtype))
        self._arguments.append(var)
        self._vars[source] = var
        self._borrowed.add(source)
        return Value(source, name=source.name)

    def _extent(self, dim: int | ir.SymbolicDim, hint: str) -> Expr:
        if isinstance(dim, int):
            return index(dim)
        return self.symbol(identifier(str(dim.value)) if dim.value else self.program.unique(identifier(hint)))

    def run(
        self,
        nodes: Iterable[ir.Node],
        outputs: Sequence[ir.Value],
        failed: Callable[[ir.Node, NotLowered], None] | None = None,
    ) -> None:
        """Lower ``nodes``, which are in topological order.

        Args:
            nodes: What to lower.
            outputs: Values of them that are used later on.
            failed: Told a node that cannot be lowered, and why; lowering goes on behind it.

        Raises:
            NotLowered: A node cannot be lowered, and nobody is to be told.
        """
        pending = list(nodes)
        for position, node in enumerate(pending):
            try:
                self.lower_node(node)
            except BranchesDiffer as split:
                try:
                    if split.resume(pending[position + 1 :], outputs):
                        return
                except NotLowered as reason:
                    _tell(failed, node, reason)
            except NotLowered as reason:
                _tell(failed, node, reason)

    def body(self) -> _Body:
        """Context in which nodes are lowered; ends with :meth:`_Body.finish`."""
        return _Body(self)

    def lower_node(self, node: ir.Node) -> None:
        """Lower one node.

        Raises:
            NotLowered: Something about the node has no lowering.
        """
        inputs = [None if v is None else self.value(v) for v in node.inputs]
        if not self._lazy and node.domain != FUSED_DOMAIN and node.op_type not in REMEMBERING:
            self.realize([v for v in inputs if v is not None and v.deferred], "operand")
        if node.domain == FUSED_DOMAIN:
            outputs = self._fusion_group(node, inputs)
        else:
            outputs = self._legal_operator(node, inputs)
        if len(outputs) < len([o for o in node.outputs if o.uses() or o.is_graph_output()]):
            raise NotLowered("not all outputs are lowered")
        for made, value in zip(node.outputs, outputs, strict=False):
            self.values[made] = value
        if not self._lazy:
            used = [v for o, v in zip(node.outputs, outputs, strict=False) if o.uses() or o.is_graph_output()]
            self.realize([v for v in used if not v.deferred], node.op_type)

    def _legal_operator(self, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
        try:
            return self._operator(node, inputs)
        except BranchesDiffer:
            raise
        except Exception as error:  # any failure on a node that makes no sense is that node's fault
            opset = self.opsets.get(node.domain, self.opsets.get("", 1))
            why = contradiction(node, opset, [described(o, v) for o, v in zip(node.inputs, inputs, strict=True)])
            if why:
                raise Illegal(why) from error
            if isinstance(error, NotLowered):
                raise
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            raise NotLowered(f"{FAILED} ({text})") from error

    def _operator(self, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
        local = self.functions.get(node.op_identifier())
        if local is not None:
            return self.inline(instantiate(local, node), inputs)
        opset = self.opsets.get(node.domain, self.opsets.get("", 1))
        lowering = lowering_of(node.domain, node.op_type)
        missing = NotLowered(f"no lowering for {node.domain + '.' if node.domain else ''}{node.op_type}")
        if lowering is not None:
            symbols = dict(self.symbols)
            try:
                result = lowering(OpNode(self, node, inputs, opset))
                return [result] if isinstance(result, Value) else list(result)
            except NotLowered as reason:
                missing, self.symbols = reason, symbols
        body = standard_body(node, opset, [described(o, v) for o, v in zip(node.inputs, inputs, strict=True)])
        if body is None:
            raise missing
        try:
            return self.inline(body, inputs)
        except NotLowered as inner:
            raise NotLowered(f"{missing.reason}; its standard definition: {inner.reason}") from inner

    def inline(self, body: ir.Function, inputs: Sequence[Value | None]) -> list[Value]:
        """Lower a function body, whose nodes follow its own operator sets, in place of a call."""
        for formal, actual in zip(body.inputs, inputs, strict=False):
            if actual is not None:
                self.values[formal] = actual
        outer, self.opsets = self.opsets, {**self.opsets, **body.opset_imports}
        try:
            self.run(body, body.outputs)
        finally:
            self.opsets = outer
        return [self.value(o) for o in body.outputs]

    def _fusion_group(self, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
        function = self.functions.get(node.op_identifier())
        if function is None:
            raise NotLowered(f"function {node.op_type} is not defined")
        self._lazy += 1
        try:
            return self.inline(instantiate(function, node), inputs)
        finally:
            self._lazy -= 1

    # -- values ------------------------------------------------------------------------------------------------

    def value(self, value: ir.Value) -> Value:
        """The lowered form of ``value``: made here, an initializer, or captured from an outer graph."""
        if value in self.values:
            return self.values[value]
        if value.const_value is not None and value.producer() is None:
            made = self.program.constant(value.const_value, str(value.name))
        elif self.parent is not None:
            made = self.capture(self.parent.value(value))
        else:
            raise NotLowered(f"its input {value.name} has no kernels: {self.missing.get(value, 'nothing makes it')}")
        self.values[value] = made
        return made

    def set_value(self, value: ir.Value, lowered: Value) -> None:
        """Declare what ``value`` is."""
        self.values[value] = lowered

    def capture(self, outer: Value) -> Value:
        """A value of the outer function as it is seen in this one."""
        assert self.parent is not None
        if outer.constant is not None:
            return outer
        if outer.elements is not None:
            for element in outer.elements.flat:
                for var in variables(element):
                    self.symbols[str(var.name)] = var
            return outer
        self.parent.dense(outer)
        self.captured.append(outer)
        return self.bind_argument(Source(outer.shape, outer.dtype, outer.name))

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
            return Value(_reindexed(tensor, extents), name=value.name)
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

    # -- results -----------------------------------------------------------------------------------------------

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

    def child(self, hint: str) -> FunctionLowering:
        """A function whose body may use this one's values and sizes."""
        inner = FunctionLowering(
            self.program, self.program.unique(f"{self.name}_{hint}"), self.opsets, self.functions, self
        )
        inner.symbols = dict(self.symbols)
        return inner

    def inline_graph(self, graph: ir.Graph, inputs: Sequence[Value]) -> list[Value]:
        """Lower the body of a control-flow node in place; its formal inputs are ``inputs``."""
        for formal, actual in zip(graph.inputs, inputs, strict=True):
            self.values[formal] = actual
        self.run(graph, graph.outputs)
        return [self.value(o) for o in graph.outputs]

    def subfunction(self, graph: ir.Graph, hint: str) -> Subfunction:
        """Lower the body of a control-flow node that has no formal inputs into a function of its own."""
        inner = self.child(hint)
        with inner.body() as body:
            outputs = inner.inline_graph(graph, [])
            body.finish(outputs, symbols=list(self.symbols.values()))
        handle = self.program.add_function(body.function, inner.name)
        return Subfunction(handle, inner.captured, outputs)

    def receive(self, type_: relax.Type, name: str) -> relax.Var:
        """Declare a parameter that is only handed on."""
        self._arguments.append(relax.Var(name, type_))
        return self._arguments[-1]

    def hand_over(self, captured: Sequence[Value]) -> list[Expr]:
        """The last arguments of a call to a :meth:`child`: values it captured, sizes, weights."""
        sizes_ = [relax.ShapeExpr(list(self.symbols.values()))] if self.symbols else []
        return [*(self.var(self.dense(c)) for c in captured), *sizes_, self._params_var]


@dataclasses.dataclass
class Subfunction:
    """A lowered body: call ``handle`` with :meth:`FunctionLowering.hand_over`; results are like ``outputs``."""

    handle: GlobalVar
    captured: list[Value]
    outputs: list[Value]


class _Body:
    """Keeps the builder's scopes open while nodes are lowered, and closes them into a function."""

    def __init__(self, lowering: FunctionLowering) -> None:
        self.lowering = lowering
        self.function: relax.Function | None = None

    def __enter__(self) -> _Body:
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


def _reindexed(tensor: Tensor, extents: Sequence[Expr]) -> Map:
    """A lazy reshape. Axes are split and merged within the smallest groups of equal extent, with little division."""
    groups = _matching_axes(extents, tensor.shape)

    def body(*at: Expr) -> Expr:
        indices: list[Expr] = []
        for made, read in groups:
            flat = simplify(flat_index(at[made], extents[made]))
            indices.extend(split_index(flat, tensor.shape[read]))
        return tensor[tuple(indices)]

    return Map(extents, tensor.dtype, body, "reshape")


def _matching_axes(left: Sequence[Expr], right: Sequence[Expr]) -> list[tuple[slice, slice]]:
    """Runs of axes of two shapes of as many elements, outermost first, that have as many elements each."""
    groups: list[tuple[slice, slice]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        end_i, end_j = i + 1, j + 1
        a, b = left[i], right[j]
        while not same(a, b) and isinstance(a, tirx.IntImm) and isinstance(b, tirx.IntImm):
            if int(a.value) < int(b.value) and end_i < len(left):
                a, end_i = simplify(a * left[end_i]), end_i + 1
            elif int(a.value) > int(b.value) and end_j < len(right):
                b, end_j = simplify(b * right[end_j]), end_j + 1
            else:
                break
        if not same(a, b):
            break
        groups.append((slice(i, end_i), slice(j, end_j)))
        i, j = end_i, end_j
    if i < len(left) or j < len(right):
        groups.append((slice(i, len(left)), slice(j, len(right))))
    return groups
