"""Parameters and arithmetic of every node, from shapes alone.

A multiply-accumulate (MAC) is one product added to a sum; products of matrices, convolutions, recurrent layers and
attention are counted exactly. FLOPs are twice the MACs plus a nominal count for everything else: one an element of the
output for element-wise operators, one an element of the input for reductions, a few for norms and softmax, none for
moving data. Dimensions that are symbols stay symbols until a binding gives them numbers.

A body of Scan or Loop counts as often as it runs; of the branches of If only the costliest counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from mmopt.analysis import dims
from mmopt.analysis import operators as ops
from mmopt.analysis.dataflow import ABSENT, FLOW_OPERATORS, FlatGraph, FlatNode, Scope, flatten
from mmopt.analysis.dims import DimTooComplex, Size
from mmopt.errors import UserError, did_you_mean
from mmopt.ir.module import Module

_MASKED = -1e4
"""A constant with elements below this is an additive mask and no weight."""


@dataclasses.dataclass(frozen=True)
class NodeCost:
    """Cost of one node over a whole run of the model.

    Attributes:
        macs: Multiply-accumulates; ``None`` when a shape is unknown.
        flops: Floating-point (or integer) operations; ``None`` when a shape is unknown.
    """

    macs: Size | None = 0
    flops: Size | None = 0


@dataclasses.dataclass(frozen=True)
class CostReport:
    """Cost of a model and of its nodes.

    Attributes:
        nodes: Cost by name of the node; nodes inside bodies have the path of what they lie in.
        parameters: Number of weights by name of the initializer (or Constant output).
        macs: All multiply-accumulates, without the nodes of ``unknown``.
        flops: All operations, without the nodes of ``unknown``.
        unknown: Nodes whose cost cannot be told because a shape or the trips of a loop are unknown.
        symbols: Names of dimensions that the figures still depend on.
    """

    nodes: dict[str, NodeCost]
    parameters: dict[str, int]
    macs: Size
    flops: Size
    unknown: tuple[str, ...] = ()
    symbols: tuple[str, ...] = ()

    @property
    def total_parameters(self) -> int:
        """Number of weights of the model, each counted once."""
        return sum(self.parameters.values())


def analyze_cost(module: Module, binding: Mapping[str, int] | None = None) -> CostReport:
    """Count parameters and arithmetic.

    Args:
        module: The module.
        binding: Numbers for symbolic dimensions, by name. Figures that depend on others stay symbolic.

    Raises:
        UserError: ``binding`` names a dimension that no input has.
    """
    graph = flatten(module)
    costs = node_costs(graph, binding)
    nodes: dict[str, NodeCost] = {}
    for node, cost in zip(graph.nodes, costs, strict=True):
        before = nodes.get(node.name, NodeCost())
        nodes[node.name] = NodeCost(add((before.macs, cost.macs)), add((before.flops, cost.flops)))
    known = [c for c in nodes.values() if c.macs is not None and c.flops is not None]
    macs, flops = total(c.macs for c in known), total(c.flops for c in known)
    unknown = tuple(name for name, c in nodes.items() if c.macs is None or c.flops is None)
    symbols = tuple(sorted(dims.symbols(macs) | dims.symbols(flops)))
    parameters = {graph.name(v): count for v, count in weights(graph).items()}
    return CostReport(nodes, parameters, macs, flops, unknown, symbols)


def check_binding(graph: FlatGraph, binding: Mapping[str, int]) -> None:
    """Refuse names that are no dimension of an input.

    Raises:
        UserError: There is such a name.
    """
    known: set[str] = set()
    for value in graph.inputs:
        for size in graph.dims(value) or ():
            known |= dims.symbols(size) if size is not None else frozenset()
    for name in binding:
        if name not in known:
            raise UserError(f"no input has a dimension {name!r}", where="binding", hint=did_you_mean(name, known))


def node_costs(graph: FlatGraph, binding: Mapping[str, int] | None = None) -> list[NodeCost]:
    """The cost of each node of a flat graph, repetitions in loops included; see :func:`analyze_cost`."""
    if binding:
        check_binding(graph, binding)
    costs = [_times(_single_cost(graph, node), _repeats(graph, node)) for node in graph.nodes]
    if binding:
        costs = [NodeCost(bind(c.macs, binding), bind(c.flops, binding)) for c in costs]
    return _costliest_branches(graph, costs)


def bind(size: Size | None, binding: Mapping[str, int]) -> Size | None:
    """The number that a size is under ``binding``; the size itself when a symbol of it is not bound."""
    if size is None or not dims.symbols(size) <= set(binding):
        return size
    return dims.evaluate(size, binding)


def add(sizes: Iterable[Size | None]) -> Size | None:
    """Their sum; ``None`` when one of them is unknown or the sum outgrows what is tracked."""
    result: Size = 0
    for size in sizes:
        if size is None:
            return None
        try:
            result = result + size
        except DimTooComplex:
            return None
    return result


def total(sizes: Iterable[Size | None]) -> Size:
    """The sum of those that are known."""
    result: Size = 0
    for size in sizes:
        if size is not None:
            result = result + size
    return result


def weights(graph: FlatGraph) -> dict[int, int]:
    """Number of elements of every weight, by value number.

    Weights are constants of more than one element that hold floats, or quantized numbers that are dequantized. Scales,
    zero points, shapes, indices and additive masks are none.
    """
    found = {}
    for value in range(len(graph.values)):
        tensor = graph.constant(value)
        if tensor is not None and tensor.size > 1 and _is_weight(graph, value, tensor):
            found[value] = int(tensor.size)
    return found


def _is_weight(graph: FlatGraph, value: int, tensor: ir.TensorProtocol) -> bool:
    users = [(n, n.inputs.index(value)) for n in graph.users(value)]
    quantized = [(n, k) for n, k in users if n.op in ops.QUANTIZERS or "QLinear" in n.op or "NBits" in n.op]
    if not tensor.dtype.is_floating_point():
        narrow = tensor.dtype.bitwidth <= 8 and tensor.dtype != ir.DataType.BOOL
        return (narrow and len(tensor.shape) >= 2) or any(_is_quantized_data(n, k) for n, k in users)
    if users and len(quantized) == len(users):
        return any(_is_quantized_data(n, k) for n, k in quantized)
    return not _is_additive_mask(users, tensor)


def _is_quantized_data(node: FlatNode, position: int) -> bool:
    if node.op in ops.QUANTIZERS:
        return position == 0
    if node.op in ("MatMulInteger", "ConvInteger", "com.microsoft.MatMulNBits"):
        return position < 2
    return node.op in ("QLinearConv", "QLinearMatMul") and position in (0, 3, 8)


def _is_additive_mask(users: Sequence[tuple[FlatNode, int]], tensor: ir.TensorProtocol) -> bool:
    if not users or any(n.op not in ("Add", "Where", "Slice", "Unsqueeze") for n, _ in users):
        return False
    if len(tensor.shape) < 2:
        return False
    return bool(np.min(tensor.numpy().astype(np.float32)) <= _MASKED)


def _times(cost: NodeCost, repeats: Size | None) -> NodeCost:
    if repeats == 1:
        return cost
    return NodeCost(_product(cost.macs, repeats), _product(cost.flops, repeats))


def _product(*sizes: Size | None) -> Size | None:
    if 0 in sizes:
        return 0
    try:
        return None if None in sizes else dims.product([s for s in sizes if s is not None])
    except DimTooComplex:
        return None


def _repeats(graph: FlatGraph, node: FlatNode) -> Size | None:
    """How often a node runs: the product of the trips of the loops around it."""
    trips: Size | None = 1
    for owner, _ in node.scope:
        trips = _product(trips, _trips(graph, owner))
    return trips


def _trips(graph: FlatGraph, owner: ir.Node) -> Size | None:
    if owner.op_type == "Loop":
        trips = owner.inputs[0]
        elements = graph.facts.elements(trips) if trips is not None else None
        return elements[0] if elements else None
    if owner.op_type != "Scan":
        return 1
    count = owner.attributes["num_scan_inputs"].as_int()
    axes = owner.attributes.get("scan_input_axes")
    scanned = owner.inputs[len(owner.inputs) - count]
    shape = graph.facts.shape(scanned) if scanned is not None else None
    return shape[axes.as_ints()[0] if axes else 0] if shape else None


def _costliest_branches(graph: FlatGraph, costs: list[NodeCost]) -> list[NodeCost]:
    """Drop the cost of all branches of an If but the costliest, innermost first."""
    costs = list(costs)
    depth = max((len(node.scope) for node in graph.nodes), default=0)
    for level in range(depth, 0, -1):
        sums: dict[Scope, dict[int, float]] = {}
        for node, cost in zip(graph.nodes, costs, strict=True):
            if len(node.scope) >= level and node.scope[level - 1][0].op_type == "If":
                branches = sums.setdefault(_owner(node, level), {})
                which = node.scope[level - 1][1]
                branches[which] = branches.get(which, 0.0) + _magnitude(cost.flops)
        kept = {owner: max(branches, key=lambda k: branches[k]) for owner, branches in sums.items()}
        for node in graph.nodes:
            if len(node.scope) >= level and kept.get(_owner(node, level)) not in (None, node.scope[level - 1][1]):
                costs[node.index] = NodeCost()
    return costs


def _owner(node: FlatNode, level: int) -> Scope:
    return (*node.scope[: level - 1], (node.scope[level - 1][0], 0))


def _magnitude(size: Size | None) -> float:
    """A number to compare by: symbols count as 1."""
    if size is None:
        return 0.0
    return float(dims.evaluate(size, dict.fromkeys(dims.symbols(size), 1)))


def _single_cost(graph: FlatGraph, node: FlatNode) -> NodeCost:
    """The cost of running a node once."""
    if node.op in FLOW_OPERATORS or node.op in _FREE:
        return NodeCost()
    if (count := _MACS.get(node.op)) is not None:
        try:
            macs = count(graph, node)
        except (IndexError, KeyError):
            macs = None
        return NodeCost(macs, _product(macs, 2))
    factor, of_input = _FLOPS.get(node.op, (1, node.op in ops.REDUCTIONS))
    values = node.inputs if of_input else node.outputs
    return NodeCost(0, _product(_elements(graph, values[0]) if values else 0, factor))


def _elements(graph: FlatGraph, value: int) -> Size | None:
    shape = graph.dims(value) if value != ABSENT else None
    return None if shape is None else _product(1, *shape)


def _matmul(graph: FlatGraph, node: FlatNode) -> Size | None:
    left = graph.dims(node.inputs[0])
    return None if not left else _product(_elements(graph, node.outputs[0]), left[-1])


def _gemm(graph: FlatGraph, node: FlatNode) -> Size | None:
    left = graph.dims(node.inputs[0])
    inner = None if left is None else left[0 if node.node.attributes.get_int("transA", 0) else 1]
    return _product(_elements(graph, node.outputs[0]), inner)


def _convolution(graph: FlatGraph, node: FlatNode) -> Size | None:
    """Every element of the output sums over a filter's window and its group of channels."""
    weight = graph.dims(node.inputs[ops.CONVOLUTIONS[node.op][1]])
    return None if weight is None else _product(_elements(graph, node.outputs[0]), *weight[1:])


def _transposed(graph: FlatGraph, node: FlatNode) -> Size | None:
    """Every element of the input is spread over a filter's window and the channels of its group's output."""
    weight = graph.dims(node.inputs[1])
    return None if weight is None else _product(_elements(graph, node.inputs[0]), *weight[1:])


def _recurrent(graph: FlatGraph, node: FlatNode) -> Size | None:
    """Each step multiplies the input and the state by the weights of all gates, in each direction."""
    data = graph.dims(node.inputs[0])
    if data is None:
        return None
    matrices = [_elements(graph, v) for v in node.inputs[1:3]]
    return _product(_product(data[0], data[1]), add(matrices))


def _attention(graph: FlatGraph, node: FlatNode) -> Size | None:
    """Scores and their sum over values, each queries × keys × width; inputs ``[B, S, width]`` or ``[B, H, S, D]``."""
    shapes = [graph.dims(v) if v != ABSENT else None for v in node.inputs[:3]]
    query, key = shapes[0], shapes[1]
    if query is None or key is None:
        return None
    keys = key[-2]
    past = graph.dims(node.inputs[4]) if node.op == "Attention" and len(node.inputs) > 4 and node.inputs[4] >= 0 else ()
    if past is None:
        return None
    if past:
        keys = add((keys, past[-2]))
    return _product(2, keys, _elements(graph, node.inputs[0]))


def _einsum(graph: FlatGraph, node: FlatNode) -> Size | None:
    """The product of the sizes of all letters; an ellipsis stands for what is left."""
    equation = node.node.attributes.get_string("equation", "").replace(" ", "").split("->")[0]
    sizes: dict[str, Size | None] = {}
    for term, value in zip(equation.split(","), node.inputs, strict=False):
        shape = graph.dims(value)
        if shape is None:
            return None
        before, _, after = term.partition("...")
        middle = len(shape) - len(before) - len(after)
        letters = [*before, *(f"...{k - middle}" for k in range(middle)), *after]
        for letter, size in zip(letters, shape, strict=True):
            if sizes.get(letter, 1) == 1:
                sizes[letter] = size
    return _product(*sizes.values())


_MACS: dict[str, Callable[[FlatGraph, FlatNode], Size | None]] = {
    **dict.fromkeys(ops.PRODUCTS, _matmul),
    "Gemm": _gemm,
    "com.microsoft.QGemm": _gemm,
    "com.microsoft.FusedGemm": _gemm,
    "Einsum": _einsum,
    **dict.fromkeys(ops.CONVOLUTIONS, _convolution),
    "ConvTranspose": _transposed,
    **dict.fromkeys(ops.RECURRENT, _recurrent),
    **dict.fromkeys(ops.ATTENTIONS, _attention),
}

_FREE = frozenset(
    (ops.LAYOUT - ops.QUANTIZERS) | (ops.SELECTION - {"Resize", "Upsample"}) | ops.GATHERS | ops.DEAD
    | {"Constant", "ConstantOfShape", "Range", "ScatterND", "ScatterElements", "Scatter", "OneHot", "NonZero"}
)  # fmt: skip

_FLOPS: dict[str, tuple[int, bool]] = {
    "Softmax": (5, False),
    "LogSoftmax": (6, False),
    "LayerNormalization": (8, False),
    "GroupNormalization": (8, False),
    "InstanceNormalization": (8, False),
    "RMSNormalization": (5, False),
    "SimplifiedLayerNormalization": (5, False),
    "BatchNormalization": (2, False),
    "Gelu": (8, False),
    "Sigmoid": (4, False),
    "Tanh": (4, False),
    "Erf": (4, False),
    "MaxPool": (1, True),
    "AveragePool": (1, True),
    "GlobalAveragePool": (1, True),
    "GlobalMaxPool": (1, True),
    "QuantizeLinear": (3, False),
    "DequantizeLinear": (2, False),
}
"""Nominal operations per element, and whether elements of the input are meant."""
