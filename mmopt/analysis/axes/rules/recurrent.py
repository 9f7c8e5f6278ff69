"""LSTM, GRU and RNN: a hidden unit is a row of every gate, a column of the recurrent weights and its own state."""

from __future__ import annotations

import onnx_ir as ir

from mmopt.analysis.axes.group import Mixing, Role
from mmopt.analysis.axes.rules.registry import axis_rule, is_constant, present
from mmopt.analysis.axes.space import Space

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_X, _W, _R, _B, _LENGTHS, _H0, _C0, _P = range(8)


@axis_rule(*_GATES)
def recurrent(node: ir.Node, space: Space) -> None:
    """Both directions have the same hidden size, so that their units go together.

    Shapes: x ``[steps, batch, in]``, W ``[directions, gates · hidden, in]``, R ``[directions, gates · hidden,
    hidden]``, B ``[directions, 2 · gates · hidden]``, states ``[directions, batch, hidden]``, peepholes
    ``[directions, 3 · hidden]``.
    """
    gates = _GATES[node.op_type]
    x, w, r = (space.operand(node, index) for index in (_X, _W, _R))
    hidden = r[2]
    space.same(x[2], w[2])
    _rows(node, space, hidden, {_W: gates, _R: gates, _B: 2 * gates, _P: 3})
    for index in (_W, _R):
        if is_constant(node.inputs[index]):
            space.reads(node, index, 1, Role.PRODUCER)
            space.reads(node, index, 2, Role.CONSUMER)
        space.reads(node, index, 2, Mixing.ZERO)
    space.count(hidden, node, "hidden_size")
    space.kind(hidden, "hidden units")
    _states(node, space, x, w[0], hidden)


def _rows(node: ir.Node, space: Space, hidden: int, blocks: dict[int, int]) -> None:
    """Rows of W and R, biases and peepholes are one block of hidden units after another."""
    directions = space.operand(node, _R)[0]
    space.freeze(directions, "it counts the directions of a recurrence")
    for index, count in blocks.items():
        if present(node, index):
            axes = space.operand(node, index)
            block = space.new(count)
            space.freeze(block, "it counts the gates of a recurrence")
            space.same(axes[0], directions)
            space.product(axes[1], (block, hidden))
            if index in (_B, _P):
                space.reads(node, index, 1, Role.PARAMETER)


def _states(node: ir.Node, space: Space, x: list[int], directions: int, hidden: int) -> None:
    batch_first = bool(node.attributes.get_int("layout", 0))
    steps, batch = (x[1], x[0]) if batch_first else (x[0], x[1])
    space.freeze(steps, "it is a step of a recurrence")
    state = (batch, directions, hidden) if batch_first else (directions, batch, hidden)
    for index in (_H0, _C0):
        if present(node, index):
            space.same_all(space.operand(node, index), state)
            space.reads(node, index, 2, Role.PARAMETER)
    if present(node, _LENGTHS):
        space.freeze_all(space.operand(node, _LENGTHS), "it is a batch")
    if node.outputs[0].name:
        y = (batch, steps, directions, hidden) if batch_first else (steps, directions, batch, hidden)
        space.same_all(space.of(node.outputs[0]), y)
    for output in node.outputs[1:]:
        if output.name:
            space.same_all(space.of(output), state)
