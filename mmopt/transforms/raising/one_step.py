"""Reads a recurrent operator that an exporter calls on one step at a time."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import integer, is_onnx, tensor_of
from mmopt.transforms.canonicalize.rewriting import Rewriter
from mmopt.transforms.raising.cells import GATES, Cell
from mmopt.transforms.raising.recurrent_layer import Step

_DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


def read_one_step(h: ir.Value | None, rewriter: Rewriter) -> Step | None:
    """The step whose new state ``h [batch, hidden]`` an operator makes of ``x [1, batch, inputs]``."""
    node = _source(h, rewriter)
    operator = None if node is None else node.producer()
    if h is None or node is None or operator is None or not is_onnx(operator, *GATES):
        return None
    if node is not operator.outputs[1] or not _plain(operator):
        return None
    given: list[ir.Value | None] = [*operator.inputs, *(None for _ in range(8 - len(operator.inputs)))]
    x, before = _source(given[0], rewriter), _source(given[5], rewriter)
    weights, hidden = [tensor_of(value) for value in given[1:4]], integer(operator, "hidden_size", 0)
    missing = any(t is None for t in weights[:2]) or (given[3] is not None and weights[2] is None)
    if x is None or before is None or missing or given[4] is not None or given[7] is not None or not hidden:
        return None
    c = c_before = None
    if operator.op_type == "LSTM":
        c_before, c = _source(given[6], rewriter), _squeezed(operator.outputs[2], rewriter)
        if c_before is None or c is None:
            return None
    count = 2 * len(GATES[operator.op_type]) * hidden
    w, r, b = (np.zeros((1, count)) if tensor is None else np.asarray(tensor.numpy()) for tensor in weights)
    after_product = operator.op_type != "GRU" or bool(integer(operator, "linear_before_reset", 0))
    cell = Cell(operator.op_type, h, {}, c=c, c_before=c_before, h_before=before, resets=None if after_product else h)
    return Step(cell, before, x, {}, {}, {}, (w[0], r[0], b[0]))


def _plain(operator: ir.Node) -> bool:
    """Whether the operator runs forward with the standard's own activations."""
    attributes = operator.attributes
    direction = attributes["direction"].as_string() if "direction" in attributes else "forward"
    names = list(attributes["activations"].as_strings()) if "activations" in attributes else _DEFAULTS[operator.op_type]
    odd = {"clip", "activation_alpha", "activation_beta"} & set(attributes)
    flags = integer(operator, "input_forget", 0) or integer(operator, "layout", 0)
    return direction == "forward" and names == _DEFAULTS[operator.op_type] and not odd and not flags


def _source(value: ir.Value | None, rewriter: Rewriter) -> ir.Value | None:
    """``value`` before a first axis of one was added or taken away."""
    node = None if value is None else value.producer()
    if node is None or not is_onnx(node, "Unsqueeze", "Squeeze", "Reshape") or node.inputs[0] is None:
        return None
    own, inner = rewriter.shape(value), rewriter.shape(node.inputs[0])
    if own is None or inner is None or None in own or None in inner:
        return None
    return node.inputs[0] if own == (1, *inner) or inner == (1, *own) else None


def _squeezed(value: ir.Value, rewriter: Rewriter) -> ir.Value | None:
    """The one reader of ``value`` that takes its first axis away."""
    outputs = [user.outputs[0] for user, _ in value.uses()]
    return outputs[0] if len(outputs) == 1 and _source(outputs[0], rewriter) is value else None
