"""Reads the last state of a recurrent layer from the output that has just that.

    Gather(Squeeze(Y), -1)  with  Y, Y_h = LSTM(x, …)    →  Squeeze(Y_h)

The same for GRU and RNN, and for the first step of a layer that runs in reverse. A layer of both directions ends at
both ends and is left alone, as is one whose sequences differ in length.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from mmopt.analysis.dims import Size
from mmopt.analysis.shape_rules.types import to_ir_shape
from mmopt.analysis.shapes import Fact
from mmopt.transforms.canonicalize.constant_targets import reshape_target
from mmopt.transforms.canonicalize.editing import constant_ints, integer, is_onnx
from mmopt.transforms.canonicalize.merge_reshapes import SHAPE_ONLY
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass
from mmopt.transforms.raising.building import Builder, Unbuildable

LAYERS = ("LSTM", "GRU", "RNN")


def _last_state(node: ir.Node, rewriter: Rewriter) -> bool:
    """From the Gather."""
    index, data = constant_ints(node.inputs[1]), node.inputs[0]
    shape = rewriter.shape(data)
    if index is None or len(index) != 1 or data is None or shape is None:
        return False
    axis = (integer(node, "axis", 0) or 0) % len(shape)
    length = shape[axis]
    layer = _layer(data, axis, rewriter)
    if layer is None or length is None or layer.inputs[4:5] not in ((), (None,)):
        return False
    direction = layer.attributes["direction"].as_string() if "direction" in layer.attributes else "forward"
    last, first = index[0] == -1 or index[0] + 1 == length, index[0] == 0
    if direction not in ("forward", "reverse") or not (last if direction == "forward" else first):
        return False
    return _read_state(node, layer, rewriter)


def _layer(value: ir.Value, axis: int, rewriter: Rewriter) -> ir.Node | None:
    """The layer of whose ``Y`` the value is a view, when ``axis`` is that of its steps."""
    node = value.producer()
    while node is not None and not is_onnx(node, *LAYERS):
        inner = node.inputs[0] if node.inputs else None
        found = None if inner is None else _axis_before(node, inner, axis, rewriter)
        if inner is None or found is None:
            return None
        value, axis, node = inner, found, inner.producer()
    if node is None or value is not node.outputs[0] or axis != 0 or integer(node, "layout", 0):
        return None
    return node


def _axis_before(node: ir.Node, inner: ir.Value, axis: int, rewriter: Rewriter) -> int | None:
    """Where ``axis`` was before ``node`` moved axes without mixing what lies beside it."""
    before, after = rewriter.shape(inner), rewriter.shape(node.outputs[0])
    if before is None or after is None:
        return None
    if is_onnx(node, "Transpose"):
        perm = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else [*range(len(before))][::-1]
        rest = [a for n, a in enumerate(perm) if n != axis and before[a] != 1]
        return perm[axis] if rest == sorted(rest) else None
    if not is_onnx(node, *SHAPE_ONLY) or after[axis] == 1 or None in after[: axis + 1]:
        return None
    outer = [size for size in after[: axis + 1] if size != 1]
    large = [n for n, size in enumerate(before) if size != 1][: len(outer)]
    return large[-1] if [before[n] for n in large] == outer else None


def _read_state(node: ir.Node, layer: ir.Node, rewriter: Rewriter) -> bool:
    states, wanted = rewriter.shape(layer.outputs[0]), rewriter.shape(node.outputs[0])
    if states is None or wanted is None or len(states) != 4 or states[1] != 1:
        return False
    shape = states[1:]
    target = reshape_target(shape, wanted)
    if target is None:
        return False
    state = _state(layer, shape, rewriter)
    try:
        with Builder(rewriter, node) as builder:
            read = builder.reshape(state, tuple(size for size in wanted if size is not None))
    except Unbuildable:
        return False
    return rewriter.replace(node, read)


def _state(layer: ir.Node, shape: tuple[Size | None, ...], rewriter: Rewriter) -> ir.Value:
    """``Y_h``, which the layer may not have been asked for yet."""
    if len(layer.outputs) < 2:
        layer.resize_outputs(2)
    state, own = layer.outputs[1], layer.outputs[0]
    if not state.name:
        state.name = rewriter.names.fresh(f"{own.name}_last")
    state.type = own.type if state.type is None else state.type
    state.shape = to_ir_shape(shape)
    rewriter.facts.set(state, Fact(shape, None, state.type))
    return state


RULES = (Rule("last-state", ("Gather",), _last_state),)


@dataclasses.dataclass(frozen=True)
class LastStates(RulePass):
    """Reads the last state of a recurrent layer from the output that has just that."""

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
