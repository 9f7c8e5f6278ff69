"""How a node joins streams: the kind of a fusion point, from the operator and what is around it."""

from __future__ import annotations

from mmopt.analysis import operators as ops
from mmopt.analysis.dataflow import FlatGraph, FlatNode
from mmopt.analysis.input_roles import SCORE_OPERATORS, forward_through
from mmopt.analysis.streams import Streams

NORMALIZERS = frozenset({"Softmax", "LogSoftmax", "Exp", "Sigmoid", "HardSigmoid"})
GATES = frozenset({"Softmax", "Sigmoid", "HardSigmoid"})
BESIDE_SCORES = SCORE_OPERATORS | ops.NORMS | ops.REDUCTIONS | NORMALIZERS | {"Split", "Sqrt", "Reciprocal"}

_AFTER_SOFTMAX = ops.LAYOUT | {"Mul", "Div", "Where", "Slice", "Split", "Gather"}
_REACH = 48

Kind = tuple[str, str]


def classify(graph: FlatGraph, streams: Streams, node: FlatNode, parts: list[int]) -> Kind:
    """Kind and reason of the join that ``node`` makes of the values ``parts``."""
    if node.op in ("Concat", "SequenceConstruct", "SequenceInsert"):
        return _concatenation(graph, streams, node, parts)
    if node.op in ops.ADDITIVE:
        return _sum(graph, streams, node, parts)
    if node.op in ops.MULTIPLICATIVE:
        return _elementwise_product(graph, node, parts)
    if node.op in ("Max", "Min"):
        return "max", "the larger element of the streams is taken"
    if node.op in ops.ATTENTIONS:
        return "attention", f"{node.op} over queries and keys of different streams"
    if node.op in ops.PRODUCTS:
        return _matrix_product(graph, streams, node, parts)
    if node.op in ops.SELECTORS:
        return "scatter", f"{node.op} puts elements of one stream at chosen places of another"
    if node.op in ops.RECURRENT:
        return "state", f"one stream is the initial state of {node.op} over the other"
    if node.op in ops.CONVOLUTIONS:
        return "product", "one stream is the filter that convolves the other"
    return "other", f"{node.op} takes both streams"


def weighted_sums(graph: FlatGraph, streams: Streams, scores: FlatNode) -> list[int]:
    """Products of the softmax of some scores with values: indices of nodes."""
    found: list[int] = []
    for value in forward_through(graph, scores, SCORE_OPERATORS, _REACH):
        for softmax in graph.users(value):
            if softmax.op not in NORMALIZERS:
                continue
            weights = forward_through(graph, softmax, _AFTER_SOFTMAX, _REACH)
            for product in (n for v in weights for n in graph.users(v) if n.op in ops.PRODUCTS):
                others = [v for v in product.inputs if v >= 0 and v not in weights and streams.content[v]]
                if others and product.index not in found:
                    found.append(product.index)
    return found


def _concatenation(graph: FlatGraph, streams: Streams, node: FlatNode, parts: list[int]) -> Kind:
    if _is_stack(graph, node, parts) and (kind := _stacked(graph, streams, node)) is not None:
        return kind
    gated = _gated(graph, streams, node)
    if bin(gated).count("1") >= 2:
        return "attention", "shares computed from all streams scale each of them"
    return "concat", "the streams are put side by side"


def _is_stack(graph: FlatGraph, node: FlatNode, parts: list[int]) -> bool:
    """Whether every stream has size 1 along the axis: they were given an axis of their own."""
    axis = node.node.attributes.get_int("axis", 0)
    shapes = [graph.dims(v) for v in parts]
    return all(s is not None and -len(s) <= axis < len(s) and s[axis] == 1 for s in shapes)


def _stacked(graph: FlatGraph, streams: Streams, node: FlatNode) -> Kind | None:
    """What happens to stacked streams: they are summed, scaled and summed, or attended to."""
    direct = [n for v in forward_through(graph, node, ops.LAYOUT, _REACH) for n in graph.users(v)]
    for user in direct:
        if user.op in ("ReduceMean", "ReduceSum"):
            return "add", f"the streams are stacked and added by {user.op}"
        if user.op in ("ReduceMax", "ReduceMin"):
            return "max", f"the streams are stacked and {user.op} takes one of each element"
    for user in direct:
        if user.op == "Mul" and _is_reduced(graph, user) and _has_constant(streams, user):
            return "weighted", "the streams are stacked, scaled by constant shares and added"
        if user.op in ops.PRODUCTS and not streams.reach(user.inputs[0]):
            return "weighted", "constant shares are multiplied with the stack of streams"
    if _attends(graph, streams, node):
        return "attention", "shares computed from the stack of streams weigh it"
    return None


def _is_reduced(graph: FlatGraph, node: FlatNode) -> bool:
    values = forward_through(graph, node, ops.LAYOUT, _REACH)
    return any(u.op in ops.REDUCTIONS for v in values for u in graph.users(v))


def _has_constant(streams: Streams, node: FlatNode) -> bool:
    return any(v >= 0 and not streams.reach(v) for v in node.inputs)


def _neighbourhood(graph: FlatGraph, streams: Streams, node: FlatNode) -> list[int]:
    """The nearest values made from a node's output, through any operator."""
    found = list(node.outputs)
    for value in found:
        for user in graph.users(value):
            if len(found) < _REACH:
                found.extend(v for v in user.outputs if v not in found and streams.content[v])
    return found


def _attends(graph: FlatGraph, streams: Streams, node: FlatNode) -> bool:
    """Whether a gate made from a node's output is multiplied with something else made from it."""
    near = set(_neighbourhood(graph, streams, node))
    for gate in (n for v in near for n in graph.users(v) if n.op in GATES):
        shares = set(forward_through(graph, gate, _AFTER_SOFTMAX - {"Mul"}, _REACH))
        for user in (n for v in shares for n in graph.users(v)):
            if user.op in ops.PRODUCTS or user.op in ops.MULTIPLICATIVE:
                others = [v for v in user.inputs if v >= 0 and v not in shares]
                if any(v in near for v in others):
                    return True
    return False


def _gated(graph: FlatGraph, streams: Streams, node: FlatNode) -> int:
    """The towers whose pure streams are multiplied with a gate made from a node's output."""
    near = set(_neighbourhood(graph, streams, node))
    towers = 0
    for gate in (n for v in near for n in graph.users(v) if n.op in GATES):
        shares = set(forward_through(graph, gate, _AFTER_SOFTMAX - {"Mul"} | {"Sub", "Neg"}, _REACH))
        for user in (n for v in shares for n in graph.users(v) if n.op in ("Mul", "MatMul")):
            for value in user.inputs:
                content = streams.content[value]
                if value not in shares and content != streams.content[node.outputs[0]]:
                    towers |= content
    return towers


def _sum(graph: FlatGraph, streams: Streams, node: FlatNode, parts: list[int]) -> Kind:
    if node.op == "Sub" and _is_distance(graph, node):
        return "similarity", "the streams are compared by the length of their difference"
    if any(_is_gated_by_itself(graph, streams, v) for v in parts):
        return "attention", "every stream is scaled by a share computed from it, then they are added"
    if any(_is_scaled(graph, streams, v) for v in parts):
        return "weighted", "the streams are scaled by constant shares and added"
    return "add", "the streams are added element by element" if node.op != "Sub" else "the streams are subtracted"


def _is_distance(graph: FlatGraph, node: FlatNode) -> bool:
    return _is_reduced(graph, node) or any(
        _is_reduced(graph, n) for n in graph.users(node.outputs[0]) if n.op in ("Abs", "Pow", "Mul")
    )


def _scaling(graph: FlatGraph, value: int) -> FlatNode | None:
    maker = graph.made_by(graph.back_through(value, ops.LAYOUT))
    return maker if maker is not None and maker.op in ops.MULTIPLICATIVE else None


def _is_scaled(graph: FlatGraph, streams: Streams, value: int) -> bool:
    """Whether a stream is multiplied with one constant number."""
    maker = _scaling(graph, value)
    if maker is None:
        return False
    constants = [v for v in maker.inputs if v >= 0 and not streams.reach(v)]
    return any(all(d == 1 for d in dims) for v in constants if (dims := graph.dims(v)) is not None)


def _is_gated_by_itself(graph: FlatGraph, streams: Streams, value: int) -> bool:
    maker = _scaling(graph, value)
    return maker is not None and any(
        _comes_from_gate(graph, v) and _dims_last(graph, v) == 1 for v in maker.inputs if streams.content[v]
    )


def _comes_from_gate(graph: FlatGraph, value: int) -> bool:
    maker = graph.made_by(graph.back_through(value, ops.LAYOUT | {"Slice", "Gather", "Split"}))
    return maker is not None and maker.op in GATES


def _dims_last(graph: FlatGraph, value: int) -> object:
    dims = graph.dims(value)
    return dims[-1] if dims else None


def _elementwise_product(graph: FlatGraph, node: FlatNode, parts: list[int]) -> Kind:
    values = forward_through(graph, node, ops.LAYOUT, _REACH)
    if any(n.op in ("ReduceSum", "ReduceMean") for v in values for n in graph.users(v)):
        return "similarity", "the streams are multiplied and summed up: an inner product"
    if any(_comes_from_gate(graph, v) for v in parts):
        return "attention", "one stream is the gate of the other"
    return "product", "the streams are multiplied element by element"


def _matrix_product(graph: FlatGraph, streams: Streams, node: FlatNode, parts: list[int]) -> Kind:
    if weighted_sums(graph, streams, node):
        return "attention", "queries of one stream weigh the values of another by a softmax of products with its keys"
    left = graph.dims(node.inputs[0])
    if node.op == "MatMul" and left is not None and left[-1] == 1:
        return "product", "all products of an element of one stream with an element of the other"
    return "similarity", "inner products of the streams"
