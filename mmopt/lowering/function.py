"""Lowers one ONNX graph into one Relax function that calls kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import onnx_ir as ir
from tvm.ir import Expr, GlobalVar

from mmopt.backends.compute import Source, index
from mmopt.backends.expressions import variables
from mmopt.ir.expand import contradiction, instantiate, standard_body
from mmopt.ir.module import FUSED_DOMAIN
from mmopt.lowering.emission import KernelCalls
from mmopt.lowering.program import ProgramBuilder
from mmopt.lowering.registry import OpNode, lowering_of
from mmopt.lowering.values import (
    Illegal,
    NotLowered,
    Value,
    described,
    dtype_name,
    identifier,
    narrow_bits,
)

REMEMBERING = frozenset(
    {"Attention", "Cast", "Concat", "Conv", "ConvTranspose", "GRU", "Gather", "Gemm", "LSTM", "MatMul"}
    | {"MaxPool", "QuantizeLinear", "RNN", "Reshape", "Transpose"}
)
"""Operators that use what a deferred value was made from, or hand it on. All others get it in memory."""

FAILED = "its lowering failed"
"""Start of the reason given for a node whose lowering raised: a bug, which onnxruntime covers up."""


@dataclasses.dataclass
class Subfunction:
    """A lowered body: call ``handle`` with :meth:`FunctionLowering.hand_over`; results are like ``outputs``."""

    handle: GlobalVar
    captured: list[Value]
    outputs: list[Value]


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


class FunctionLowering(KernelCalls):
    """Lowers the nodes of a graph into one Relax function.

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
        super().__init__(program, name, parent)
        self.opsets = opsets
        self.functions = functions
        self.parent = parent
        self.captured: list[Value] = []
        self.values: dict[ir.Value, Value] = {}
        self.missing: dict[ir.Value, str] = {}
        self._lazy = 0

    # -- the function ------------------------------------------------------------------------------------------

    @property
    def lazy(self) -> bool:
        """Whether a fusion group is being lowered, whose values are not stored node by node."""
        return self._lazy > 0

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
