"""Control flow: If, Loop and Scan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from tvm import relax, tirx
from tvm.ir import Expr, GlobalVar

from mmopt.backends.compute import Map
from mmopt.backends.expressions import same, simplify, variables
from mmopt.lowering.function import BranchesDiffer, FunctionLowering, Subfunction
from mmopt.lowering.looping import Repetition, opaque, result_types
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import Illegal, NotLowered, Value, from_elements

UNROLLED_TRIPS = 8
UNROLLED_NODES = 64
"""A loop of at most this many trips, and this many nodes over all trips, is unrolled."""


def body_graph(node: OpNode, attribute: str) -> ir.Graph:
    """A graph attribute."""
    return node.node.attributes[attribute].as_graph()


# -- If --------------------------------------------------------------------------------------------------------------


@lowers("If")
def if_(node: OpNode) -> list[Value]:
    """One of two branches; a condition known at compile time leaves only its branch."""
    condition = node.input(0)
    if condition.constant is not None:
        graph = body_graph(node, "then_branch" if condition.constant.reshape(-1)[0] else "else_branch")
        return node.context.inline_graph(graph, [])
    then, other = _branch(node, "then_branch"), _branch(node, "else_branch")
    if any(a.ndim != b.ndim for a, b in zip(then.outputs, other.outputs, strict=True)):
        raise BranchesDiffer("the branches differ in rank", lambda rest, outputs: _continue(node, rest, outputs))
    return _select(node, condition, then, other)


def _branch(node: OpNode, attribute: str) -> Subfunction:
    try:
        return node.context.subfunction(body_graph(node, attribute), attribute)
    except NotLowered as inner:
        raise NotLowered(f"in {attribute}: {inner.reason}") from inner


def _continue(node: OpNode, rest: list[ir.Node], outputs: Sequence[ir.Value]) -> bool:
    """Lower the nodes behind an If whose branches differ in rank; see :class:`BranchesDiffer`."""
    made = {value for following in [node.node, *rest] for value in following.outputs}
    wanted = [value for value in dict.fromkeys(outputs) if value in made]
    found: dict[str, Subfunction] = {}
    for attribute, other in (("else_branch", "then_branch"), ("then_branch", "else_branch")):
        try:
            found[attribute] = _continuation(node, attribute, rest, wanted)
        except Illegal:
            _insist(node, other == "then_branch")
            results = node.context.inline_graph(body_graph(node, other), [])
            for formal, value in zip(node.node.outputs, results, strict=True):
                node.context.set_value(formal, value)
            return False
    for formal, value in zip(
        wanted, _select(node, node.input(0), found["then_branch"], found["else_branch"]), strict=True
    ):
        node.context.set_value(formal, value)
    return True


def _continuation(node: OpNode, attribute: str, rest: list[ir.Node], wanted: Sequence[ir.Value]) -> Subfunction:
    """A branch and all that follows, as a function."""
    context = node.context
    inner = context.child(attribute)
    symbols = list(context.symbols.values())
    with inner.body() as body:
        for formal, value in zip(node.node.outputs, inner.inline_graph(body_graph(node, attribute), []), strict=True):
            inner.set_value(formal, value)
        inner.run(rest, wanted)
        outputs = [inner.value(o) for o in wanted]
        body.finish(outputs, symbols=symbols)
    return Subfunction(context.program.add_function(body.function, inner.name), inner.captured, outputs)


def _insist(node: OpNode, holds: bool) -> None:
    """Check at run time that the condition is what it has to be."""
    context = node.context
    flag = context.reshape(node.input(0), [1])
    if flag.elements is None:
        tensor = context.tensor(flag)
        flag = Value(Map((1,), "int64", lambda i: tensor[i].astype("int64"), "condition"))
    shape = context.builder.emit(
        relax.ShapeExpr([d.astype("int64") for d in context.runtime_extents(flag, "condition")])
    )
    context.builder.match_cast(shape, relax.ShapeType([tirx.const(int(holds), "int64")]))


def _common_shape(node: OpNode, then: Value, other: Value) -> list[Expr]:
    """Extents of a result: what both branches agree on; new sizes elsewhere."""
    if then.dtype != other.dtype:
        raise NotLowered(f"the branches give {then.dtype} and {other.dtype}")
    if then.ndim != other.ndim:
        raise NotLowered(f"what follows the branches has {then.ndim} and {other.ndim} axes")
    ours = set(node.context.symbols.values())
    return [
        a if same(a, b) and variables(a) <= ours else node.context.fresh_symbol("branch")
        for a, b in zip(then.shape, other.shape, strict=True)
    ]


def _select(node: OpNode, condition: Value, then: Subfunction, other: Subfunction) -> list[Value]:
    context = node.context
    first, second = context.hand_over(then.captured), context.hand_over(other.captured)
    arguments = [context.var(context.dense(context.reshape(condition, []))), *first, *second]
    pairs = list(zip(then.outputs, other.outputs, strict=True))
    shapes = [_common_shape(node, a, b) for a, b in pairs]  # new sizes come after those handed over
    handle = _choice(context, then, other, [len(first), len(second)], arguments)
    result = context.builder.emit(relax.Call(handle, arguments))
    return [
        context.match(relax.TupleGetItem(result, n), shape, value.dtype, f"{node.name}_{n}")
        for n, ((value, _), shape) in enumerate(zip(pairs, shapes, strict=True))
    ]


def _choice(
    context: FunctionLowering, then: Subfunction, other: Subfunction, counts: Sequence[int], arguments: Sequence[Expr]
) -> GlobalVar:
    """A function that takes the flag and the arguments of both branches, and calls one of them."""
    params = [relax.Var(f"a{n}", opaque(a.ty)) for n, a in enumerate(arguments)]
    first, second = params[1 : 1 + counts[0]], params[1 + counts[0] :]
    types = result_types(then.outputs)
    chosen = relax.Var("chosen", types)
    branches = relax.If(params[0], relax.Call(then.handle, first), relax.Call(other.handle, second))
    block = relax.BindingBlock([relax.VarBinding(chosen, branches)])
    function = relax.Function(params, relax.SeqExpr([block], chosen), types, is_pure=True)
    return context.program.add_function(function, context.program.unique(f"{context.name}_if"))


# -- Loop ------------------------------------------------------------------------------------------------------------


@lowers("Loop")
def loop(node: OpNode) -> list[Value]:
    """A body repeated up to a number of trips, as long as a condition holds."""
    graph = body_graph(node, "body")
    trips, condition = node.optional(0), node.optional(1)
    carried = [node.input(n) for n in range(2, len(node.inputs))]
    endless = _endless(graph, condition)
    count = _known_trips(trips) if endless else None
    if count is not None and 0 < count <= UNROLLED_TRIPS and count * len(graph) <= UNROLLED_NODES:
        return _unrolled(node, graph, count, carried)
    if trips is None and endless:
        raise NotLowered("the loop never ends")

    def trip(inner: FunctionLowering, number: Value, state: Sequence[Value]) -> tuple[Value | None, list[Value]]:
        number = _as_declared(inner, number, graph.inputs[0])
        going, *rest = inner.inline_graph(graph, [number, Value(constant=np.array(True)), *state])
        return None if endless else going, rest

    repetition = Repetition(node.context, node.name, trips, None if endless else condition, carried)
    return repetition.emit(trip)


def _endless(graph: ir.Graph, condition: Value | None) -> bool:
    """Whether the condition holds before and after every trip, so that only the number of trips ends the loop."""
    if condition is not None and (condition.constant is None or not condition.constant.reshape(-1)[0]):
        return False
    value = graph.outputs[0]
    while True:
        producer = value.producer()
        if producer is None:
            return value is graph.inputs[1] or (value.const_value is not None and bool(value.const_value.numpy().all()))
        if producer.op_type == "Constant" and "value" in producer.attributes:
            return bool(producer.attributes["value"].as_tensor().numpy().all())
        if producer.op_type not in ("Identity", "Cast") or producer.inputs[0] is None:
            return False
        value = producer.inputs[0]


def _as_declared(inner: FunctionLowering, scalar: Value, formal: ir.Value) -> Value:
    """A scalar as the body declares it: some declare one element."""
    return inner.reshape(scalar, [1]) if formal.shape is not None and len(formal.shape) == 1 else scalar


def _known_trips(trips: Value | None) -> int | None:
    return None if trips is None or trips.constant is None else int(trips.constant.reshape(-1)[0])


def _unrolled(node: OpNode, graph: ir.Graph, count: int, carried: list[Value]) -> list[Value]:
    state, stacked = carried, []
    for number in range(count):
        trip = _as_declared(node.context, Value(constant=np.array(number, "int64")), graph.inputs[0])
        _, *results = node.context.inline_graph(graph, [trip, Value(constant=np.array(True)), *state])
        state = results[: len(carried)]
        stacked.append(results[len(carried) :])
    return [*state, *(_stack(node, pieces) for pieces in zip(*stacked, strict=True))]


def _stack(node: OpNode, pieces: Sequence[Value]) -> Value:
    """``pieces`` of equal shape along a new first axis."""
    first = pieces[0]
    if any(p.ndim != first.ndim or not all(map(same, p.shape, first.shape)) for p in pieces):
        raise NotLowered("what the trips give differs in shape")
    tensors = [node.context.tensor(p) for p in pieces]

    def body(which: Expr, *at: Expr) -> Expr:
        chosen = tensors[-1][at]
        for number in range(len(tensors) - 2, -1, -1):
            chosen = tirx.Select(tirx.EQ(which, tirx.const(number, "int64")), tensors[number][at], chosen)
        return chosen

    return Value(Map((len(pieces), *first.shape), first.dtype, body, "stack"), name=node.name)


# -- Scan ------------------------------------------------------------------------------------------------------------


@lowers("Scan")
def scan(node: OpNode) -> list[Value]:
    """A body repeated over the slices of its scanned inputs."""
    if node.opset < 9:
        raise NotLowered("Scan of opset 8 has a batch axis of its own")
    graph = body_graph(node, "body")
    scanned = int(node.attr("num_scan_inputs"))
    values = [node.input(n) for n in range(len(node.inputs))]
    carried, inputs = values[: len(values) - scanned], values[len(values) - scanned :]
    axes = [a % v.ndim for a, v in zip(node.attr("scan_input_axes", [0] * scanned), inputs, strict=True)]
    backwards = node.attr("scan_input_directions", [0] * scanned)
    length = inputs[0].shape[axes[0]]
    trips = from_elements(length)

    def trip(inner: FunctionLowering, number: Value, state: Sequence[Value]) -> tuple[Value | None, list[Value]]:
        slices = [
            _slice(inner.capture(v), axis, number, length, bool(back))
            for v, axis, back in zip(inputs, axes, backwards, strict=True)
        ]
        return None, inner.inline_graph(graph, [*state, *slices])

    results = Repetition(node.context, node.name, trips, None, carried).emit(trip)
    stacked = results[len(carried) :]
    out_axes = node.attr("scan_output_axes", [0] * len(stacked))
    flipped = node.attr("scan_output_directions", [0] * len(stacked))
    arranged = [_arranged(node, v, a, bool(b)) for v, a, b in zip(stacked, out_axes, flipped, strict=True)]
    return [*results[: len(carried)], *arranged]


def _slice(value: Value, axis: int, number: Value, length: Expr, backwards: bool) -> Value:
    """The slice of ``value`` that a trip sees."""
    tensor, trip = value.tensor, number.tensor
    shape = [d for n, d in enumerate(value.shape) if n != axis]

    def body(*at: Expr) -> Expr:
        here = trip[()] if trip.ndim == 0 else trip[(0,)]
        position = length - 1 - here if backwards else here
        return tensor[(*at[:axis], position, *at[axis:])]

    return Value(Map(shape, value.dtype, body, "slice"))


def _arranged(node: OpNode, stacked: Value, axis: int, backwards: bool) -> Value:
    """A stack with its first axis moved to ``axis`` and perhaps reversed."""
    axis %= stacked.ndim
    if axis == 0 and not backwards:
        return stacked
    tensor, length = node.context.tensor(stacked), stacked.shape[0]
    rest = list(stacked.shape[1:])

    def body(*at: Expr) -> Expr:
        position = length - 1 - at[axis] if backwards else at[axis]
        return tensor[(position, *at[:axis], *at[axis + 1 :])]

    shape = [simplify(d) for d in [*rest[:axis], length, *rest[axis:]]]
    return Value(Map(shape, stacked.dtype, body, "scanned"), name=node.name)
