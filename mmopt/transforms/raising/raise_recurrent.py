"""Lifts recurrent layers from their steps: unrolled by the exporter, or the body of a Scan or Loop.

    h₁ = cell(x[0], h₀), h₂ = cell(x[1], h₁), …; stack(h₁, h₂, …)            h₀: zeros, or any value
    Scan(h₀, x) { h = cell(xₜ, h'); return h, h }
    Loop(length, h₀) { h = cell(x[t], h'); return h, h }
    →  LSTM, GRU or RNN (x, W, R, B, -, h₀)

A cell is an LSTM, GRU or RNN as :mod:`mmopt.transforms.raising.cells` reads it; weights and biases must be the same
constants at every step, and each step must read its own part of one sequence, in order or in reverse. Steps whose
input was projected for the whole sequence beforehand are lifted with that projection.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import can_replace, integer, is_onnx, replace
from mmopt.transforms.canonicalize.rewriting import Rewriter
from mmopt.transforms.raising.building import Builder, Unbuildable
from mmopt.transforms.raising.cells import Cell, read_cell
from mmopt.transforms.raising.recurrent_body import read_body
from mmopt.transforms.raising.recurrent_layer import Layer, Results, Step, assemble, roles
from mmopt.transforms.raising.recurrent_steps import Moment, direction_of, moment
from mmopt.transforms.raising.rules import RaisingPass, RaisingRule

_REACH = {"LSTM": 4, "GRU": 3, "RNN": 5}
"""How many operators lie between the state and the next step's."""

_BETWEEN = ("Sub", "Mul", "Add", "Gemm", "MatMul", "Concat", "Tanh", "Relu")


# -- chains of cells -----------------------------------------------------------------------------------------------


def _predecessor(cell: Cell, rewriter: Rewriter) -> Cell | None:
    """The step before."""
    operands = dict.fromkeys(value for total in cell.sums for value in total.products)
    for value in [cell.h_before] if cell.kind == "GRU" else list(operands):
        before = read_cell(value, rewriter)
        if before is None or before.kind != cell.kind or before.activation != cell.activation:
            continue
        if _weights(before) <= _weights(cell) and (cell.kind != "LSTM" or before.c is cell.c_before):
            return before
    return None


def _weights(cell: Cell) -> set[object]:
    return {weight for total in cell.sums for weight in total.products.values()}


def _is_last(cell: Cell, rewriter: Rewriter) -> bool:
    layer = [cell.h if cell.c is None else cell.c]
    for _ in range(_REACH[cell.kind]):
        users = {user for value in layer for user, _ in value.uses() if is_onnx(user, *_BETWEEN)}
        for user in users:
            later = read_cell(user.outputs[0], rewriter) if user.outputs[0] is not cell.h else None
            before = _predecessor(later, rewriter) if later is not None and later.kind == cell.kind else None
            if before is not None and before.h is cell.h:
                return False
        layer = [user.outputs[0] for user in users]
    return True


def _chain(last: Cell, rewriter: Rewriter) -> list[Cell]:
    """All steps, first to last."""
    found = [last]
    while True:
        before = _predecessor(found[-1], rewriter)
        if before is None:
            return found[::-1]
        found.append(before)


def _read_steps(cells: Sequence[Cell], rewriter: Rewriter) -> tuple[list[Step], list[Moment]] | str:
    """The roles of all operands, and what each step reads; else why that is not clear."""
    steps: list[Step] = []
    moments: list[Moment] = []
    for before, cell in itertools.pairwise(cells):
        step = roles(cell, before.h)
        if isinstance(step, str):
            return step
        at = moment(step.source, rewriter)
        if at is None:
            return f"{step.source.name} is no step of a sequence"
        steps.append(step)
        moments.append(at)
    first = _first_step(cells[0], moments[0], rewriter)
    return first if isinstance(first, str) else ([first[0], *steps], [first[1], *moments])


def _first_step(cell: Cell, second: Moment, rewriter: Rewriter) -> tuple[Step, Moment] | str:
    """The first step, whose old state is what is not read from the sequence; nothing where zeros were folded away."""
    operands = dict.fromkeys(value for total in cell.sums for value in total.products)
    for candidate in [*([cell.h_before] if cell.kind == "GRU" else operands), None]:
        step = roles(cell, candidate)
        at = None if isinstance(step, str) else moment(step.source, rewriter)
        if not isinstance(step, str) and at is not None and (at.sequence, at.axis) == (second.sequence, second.axis):
            return step, at
    return "the first step does not read the sequence that the others read"


# -- unrolled ------------------------------------------------------------------------------------------------------


def _unrolled(node: ir.Node, rewriter: Rewriter) -> bool:
    """From the last step."""
    last = read_cell(node.outputs[0], rewriter)
    if last is None or _predecessor(last, rewriter) is None or not _is_last(last, rewriter):
        return False
    cells = _chain(last, rewriter)
    read = _read_steps(cells, rewriter)
    if isinstance(read, str):
        return rewriter.miss(node, f"{last.kind} in steps: {read}.")
    steps, moments = read
    direction = direction_of(moments)
    layer = _objection(cells, direction) or assemble(steps, moments[0].sequence, rewriter)
    if isinstance(layer, str):
        return rewriter.miss(node, f"{last.kind} in steps: {layer}.")
    place = cells[0].h.producer()
    if place is None:
        return False
    try:
        with Builder(rewriter, place, [layer.sequence]) as builder:
            sequence = _time_first(_whole(layer, moments, builder), moments[0].axis, builder)
            results = layer.emit(builder, sequence, steps[0].h_before, cells[0].c_before, direction)
    except Unbuildable as why:
        return rewriter.miss(node, f"{last.kind} in steps: {why}.")
    _put(cells if direction == "forward" else cells[::-1], last, results, Builder(rewriter, place))
    return True


def _objection(cells: Sequence[Cell], direction: str) -> str:
    if not direction:
        return "the steps do not follow each other in one sequence"
    for cell, after in itertools.pairwise(cells):
        if cell.c is None or after.c is None:
            continue
        update = after.c.producer()
        kept = {user for value in (update.inputs if update else ()) if value for user in [value.producer()]}
        foreign = [user for user, _ in cell.c.uses() if not is_onnx(user, "Tanh") and user not in kept]
        if foreign or cell.c.is_graph_output():
            return f"the cell state {cell.c.name} is needed elsewhere too"
    return ""


def _whole(layer: Layer, moments: Sequence[Moment], builder: Builder) -> ir.Value:
    """The steps of the sequence that are read."""
    sequence, axis = layer.sequence, moments[0].axis
    shape, first = builder.shape(sequence), min(at.index for at in moments)
    if (first, len(moments)) == (0, shape[axis]):
        return sequence
    bounds = [builder.ints([n], "bound") for n in (first, first + len(moments), axis)]
    cut = [len(moments) if n == axis else size for n, size in enumerate(shape)]
    return builder.node("Slice", [sequence, *bounds], cut, builder.rewriter.dtype(sequence))


def _time_first(sequence: ir.Value, axis: int, builder: Builder) -> ir.Value:
    return sequence if axis == 0 else builder.transpose(sequence, (1, 0, 2))


def _put(cells: Sequence[Cell], last: Cell, results: Results, builder: Builder) -> None:
    """Let the results stand for the states of all steps, which come in the order of the sequence."""
    rewriter = builder.rewriter
    _replace_stacks([cell.h for cell in cells], results, builder)
    order = [last, *(cell for cell in (cells[::-1] if last is cells[-1] else cells) if cell is not last)]
    if last.c is not None and results.last_c is not None:
        inside = {user for user, _ in last.c.uses() if is_onnx(user, "Tanh") and user.outputs[0] in _inputs_of(last.h)}
        if last.c.is_graph_output() or {user for user, _ in last.c.uses()} != inside:
            _replace(last.c, results.last_c, rewriter)
    for cell in order:
        if cell.h.uses() or cell.h.is_graph_output():
            position = list(cells).index(cell)
            _replace(cell.h, results.last_h if cell is last else _pick(position, results, builder), rewriter)
        _drop_dead(cell.h, rewriter)


def _inputs_of(value: ir.Value) -> Sequence[ir.Value | None]:
    node = value.producer()
    return () if node is None else node.inputs


def _pick(position: int, results: Results, builder: Builder) -> ir.Value:
    index = builder.constant(np.array(position, dtype=np.int64), "step")
    shape, dtype = builder.shape(results.states), builder.rewriter.dtype(results.states)
    return builder.node("Gather", [results.states, index], shape[1:], dtype, axis=0)


def _replace_stacks(states: Sequence[ir.Value], results: Results, builder: Builder) -> None:
    """Concatenations of all states along a new axis are the result itself."""
    for user in {user for user, _ in states[0].uses() if is_onnx(user, "Unsqueeze", "Reshape")}:
        for stack in {stack for stack, _ in user.outputs[0].uses() if is_onnx(stack, "Concat")}:
            axis = (integer(stack, "axis", 0) or 0) % 3
            if axis < 2 and _stacks(stack, states, axis, builder.rewriter):
                whole = results.states if axis == 0 else builder.transpose(results.states, (1, 0, 2))
                _replace(stack.outputs[0], whole, builder.rewriter)
                _drop_dead(stack.outputs[0], builder.rewriter)


def _stacks(stack: ir.Node, states: Sequence[ir.Value], axis: int, rewriter: Rewriter) -> bool:
    if len(stack.inputs) != len(states):
        return False
    for value, state in zip(stack.inputs, states, strict=True):
        node, shape = None if value is None else value.producer(), rewriter.shape(state)
        if node is None or not is_onnx(node, "Unsqueeze", "Reshape") or node.inputs[0] is not state or shape is None:
            return False
        if rewriter.shape(value) != (*shape[:axis], 1, *shape[axis:]):
            return False
    return True


def _replace(old: ir.Value, new: ir.Value, rewriter: Rewriter) -> None:
    """Let ``new`` stand for ``old``, whichever output of its node that is."""
    node = old.producer()
    if node is None:
        return
    if not can_replace(old, new):
        new = rewriter.emit("Identity", [new], node, like=old).outputs[0]
    rewriter.changed(node)
    replace(old, new)


def _drop_dead(value: ir.Value, rewriter: Rewriter) -> None:
    """Drop the node of ``value``, and what only it needed."""
    stack = [value.producer()]
    while stack:
        node = stack.pop()
        if node is None or node.graph is None or any(o.uses() or o.is_graph_output() for o in node.outputs):
            continue
        above = [operand.producer() for operand in node.inputs if operand is not None]
        rewriter.drop(node)
        stack.extend(above)


# -- bodies --------------------------------------------------------------------------------------------------------


def _looped(node: ir.Node, rewriter: Rewriter) -> bool:
    """From a Scan or Loop."""
    body = read_body(node, rewriter)
    if body is None:
        return False
    kind = node.op_type
    if isinstance(body, str):
        return rewriter.miss(node, f"recurrence in a {kind}: {body}.")
    layer = assemble([body.step], body.sequence, rewriter)
    if isinstance(layer, str):
        return rewriter.miss(node, f"recurrence in a {kind}: {layer}.")
    try:
        with Builder(rewriter, node, [layer.sequence]) as builder:
            sequence = _time_first(layer.sequence, body.axis, builder)
            results = layer.emit(builder, sequence, body.h_before, body.c_before, body.direction)
            stacked = {a: _time_first(results.states, a, builder) for a in set(body.stacks.values())}
    except Unbuildable as why:
        return rewriter.miss(node, f"recurrence in a {kind}: {why}.")
    news = {body.h_output: results.last_h} | {output: stacked[axis] for output, axis in body.stacks.items()}
    if body.c_output is not None and results.last_c is not None:
        news[body.c_output] = results.last_c
    for position, new in news.items():
        old = node.outputs[position]
        if old.uses() or old.is_graph_output():
            _replace(old, new, rewriter)
    _drop_dead(node.outputs[0], rewriter)
    return True


RULES = (
    RaisingRule(
        "unrolled-recurrence",
        ("Mul", "Add", "Tanh", "Relu"),
        _unrolled,
        "h₁ = cell(x[0], h₀), h₂ = cell(x[1], h₁), …, with the cell of an LSTM, GRU or RNN",
        "LSTM, GRU, RNN",
    ),
    RaisingRule(
        "looped-recurrence",
        ("Scan", "Loop"),
        _looped,
        "a Scan or Loop whose body is the cell of an LSTM, GRU or RNN",
        "LSTM, GRU, RNN",
    ),
)


@dataclasses.dataclass(frozen=True)
class RaiseRecurrent(RaisingPass):
    """Lifts recurrent layers from unrolled steps and from loops."""

    def raising_rules(self) -> tuple[RaisingRule, ...]:
        """The rules of this module."""
        return RULES
