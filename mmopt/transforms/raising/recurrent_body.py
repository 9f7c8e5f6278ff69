"""Reads the recurrent step in the body of a Scan or Loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from mmopt.transforms.canonicalize.bodies import goes_on, unnamed
from mmopt.transforms.canonicalize.editing import integer, is_onnx
from mmopt.transforms.canonicalize.rewriting import Rewriter
from mmopt.transforms.raising.cells import Cell, read_cell
from mmopt.transforms.raising.one_step import read_one_step
from mmopt.transforms.raising.recurrent_layer import Step, roles


@dataclasses.dataclass(frozen=True)
class Body:
    """A loop whose body is one recurrent step.

    Attributes:
        step: The step.
        sequence: What it reads a step of each time.
        axis: Axis of time in that.
        direction: ``forward`` or ``reverse``.
        h_before: Initial state.
        c_before: LSTM: initial cell state.
        h_output: Which output of the loop is the last state.
        c_output: LSTM: which one is the last cell state.
        stacks: Axis of time of the outputs that are all states, by position.
    """

    step: Step
    sequence: ir.Value
    axis: int
    direction: str
    h_before: ir.Value | None
    c_before: ir.Value | None
    h_output: int
    c_output: int | None
    stacks: dict[int, int]


@dataclasses.dataclass(frozen=True)
class _Frame:
    """What Scan and Loop have in common.

    Attributes:
        initial: Initial states, outside.
        before: The states in the body.
        after: What they become.
        stacked: Outputs of the body that are stacked.
        axes: Along which axes.
        directions: 0 for appending, 1 for prepending.
    """

    initial: Sequence[ir.Value | None]
    before: Sequence[ir.Value]
    after: Sequence[ir.Value]
    stacked: Sequence[ir.Value]
    axes: Sequence[int]
    directions: Sequence[int]


def read_body(node: ir.Node, rewriter: Rewriter) -> Body | str | None:
    """What a loop computes; why it is nearly a recurrence but not quite; None where it is nothing like one."""
    if is_onnx(node, "Scan"):
        return _scan(node, rewriter)
    return _loop(node, rewriter)


def _scan(node: ir.Node, rewriter: Rewriter) -> Body | str | None:
    graph = node.attributes["body"].as_graph()
    count = integer(node, "num_scan_inputs", 1) or 0
    states = len(node.inputs) - count
    stacks = len(node.outputs) - states
    frame = _Frame(
        node.inputs[:states],
        graph.inputs[:states],
        [unnamed(value) for value in graph.outputs[:states]],
        [unnamed(value) for value in graph.outputs[states:]],
        _numbers(node, "scan_output_axes", stacks),
        _numbers(node, "scan_output_directions", stacks),
    )
    step = _step(frame, rewriter)
    if step is None or isinstance(step, str):
        return step
    scanned = list(graph.inputs[states:])
    if step.source not in scanned:
        return f"{step.source.name} is no step of a sequence"
    position = scanned.index(step.source)
    sequence = node.inputs[states + position]
    axis = _numbers(node, "scan_input_axes", count)[position] % 3
    backwards = _numbers(node, "scan_input_directions", count)[position]
    if sequence is None or axis > 1 or any(direction != backwards for direction in frame.directions):
        return "it reads in one direction and writes in the other"
    return _body(frame, step, sequence, axis, "reverse" if backwards else "forward")


def _loop(node: ir.Node, rewriter: Rewriter) -> Body | str | None:
    graph = node.attributes["body"].as_graph()
    states = len(node.inputs) - 2
    stacked = [unnamed(value) for value in graph.outputs[1 + states :]]
    frame = _Frame(
        node.inputs[2:],
        graph.inputs[2:],
        [unnamed(value) for value in graph.outputs[1 : 1 + states]],
        stacked,
        [0] * len(stacked),
        [0] * len(stacked),
    )
    step = _step(frame, rewriter)
    if step is None or isinstance(step, str):
        return step
    gather = step.source.producer()
    if gather is None or not is_onnx(gather, "Gather") or gather.inputs[1] is not graph.inputs[0]:
        return f"{step.source.name} is no step of a sequence"
    sequence, axis = gather.inputs[0], (integer(gather, "axis", 0) or 0) % 3
    shape = rewriter.shape(sequence)
    if sequence is None or sequence.graph is graph or shape is None or len(shape) != 3 or axis > 1:
        return f"{step.source.name} is no step of a sequence"
    if not goes_on(node.inputs[1]) or not goes_on(graph.outputs[0], graph.inputs[1]):
        return "it may stop early"
    trips = None if node.inputs[0] is None else rewriter.facts.fact(node.inputs[0]).elements
    if trips is None or list(trips) != [shape[axis]]:
        return "it may stop before the end of the sequence"
    return _body(frame, step, sequence, axis, "forward")


def _body(frame: _Frame, step: Step, sequence: ir.Value, axis: int, direction: str) -> Body | str:
    h_output = list(frame.after).index(step.cell.h)
    c_output = None if step.cell.c is None else list(frame.after).index(step.cell.c)
    if len(frame.after) != (1 if c_output is None else 2):
        return "it carries more than the states of one layer"
    if any(value is not step.cell.h for value in frame.stacked):
        return "it stacks something else than the states"
    axes = {len(frame.after) + n: axis % 3 for n, axis in enumerate(frame.axes)}
    if any(axis > 1 for axis in axes.values()):
        return "it stacks the states along their features"
    c_before = None if c_output is None else frame.initial[c_output]
    return Body(step, sequence, axis, direction, frame.initial[h_output], c_before, h_output, c_output, axes)


def _step(frame: _Frame, rewriter: Rewriter) -> Step | str | None:
    for before, after in zip(frame.before, frame.after, strict=True):
        called = read_one_step(after, rewriter)
        if called is not None and called.h_before is before and _carries_cell_state(called.cell, frame):
            return called
        cell = read_cell(after, rewriter)
        if cell is not None and _carries(cell, before, frame):
            return roles(cell, before)
    return None


def _carries(cell: Cell, before: ir.Value, frame: _Frame) -> bool:
    """Whether the states of ``cell`` are those that the loop hands on."""
    if cell.kind == "GRU" and cell.h_before is not before:
        return False
    if cell.c is None:
        return any(before in total.products for total in cell.sums)
    return _carries_cell_state(cell, frame)


def _carries_cell_state(cell: Cell, frame: _Frame) -> bool:
    if cell.c is None:
        return True
    pairs = zip(frame.before, frame.after, strict=True)
    return any(old is cell.c_before and new is cell.c for old, new in pairs)


def _numbers(node: ir.Node, name: str, count: int) -> list[int]:
    attribute = node.attributes.get(name)
    return [0] * count if attribute is None else list(attribute.as_ints())
