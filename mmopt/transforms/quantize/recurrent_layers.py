"""LSTM, GRU and RNN in integers, as pairs of QuantizeLinear and DequantizeLinear.

    y = LSTM(x, w, r, b, h)    →    y = LSTM(Q(x), Dequantize(w'), Dequantize(r'), b, Q(h))        Q: to 8 bits and back

Weights are int8 with one scale for each row: each gate of each hidden unit. The state that a step hands to the next has
no name in the graph. The pair before the initial state, zeros where none is given, says how it is rounded: a kernel for
bytes keeps every state in that encoding, and other runtimes, which compute the operator in float, round the first only.
The state of default activations lies within ±1, so that its step is 1/127 whatever the data, unless a larger initial
state was seen.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from mmopt.analysis.calibration import Calibration, choose_range
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.canonicalize.editing import Names, integer, is_onnx, new_initializer, new_node, tensor_of
from mmopt.transforms.quantize.compress_weights import CompressWeights
from mmopt.transforms.quantize.encoding import Encoding, encode
from mmopt.transforms.quantize.layers import Selection
from mmopt.transforms.quantize.qdq import BLOCKED_OPSET, Quantizer

RECURRENT = ("LSTM", "GRU", "RNN")
"""Recurrent operators that have integer kernels."""

SMALLEST_HIDDEN = 32
"""Hidden units below which a step gains nothing from integers: its gates take the time."""

LEAST_WORK = 1 << 17
"""Multiply-adds of states with R, over all steps and sequences, below which rounding what is read costs as much as
integers save."""

_BOUNDED = {"sigmoid", "tanh"}
_STATE = 5
"""Place of the initial state among the inputs."""


def recurrent_layers(module: Module) -> Iterator[ir.Node]:
    """Recurrent operators of the main graph with constant weights in float."""
    for node in module.graph:
        if not is_onnx(node, *RECURRENT) or node.inputs[0] is None:
            continue
        weights = [tensor_of(value) for value in node.inputs[1:3]]
        if all(tensor is not None and tensor.dtype == ir.DataType.FLOAT for tensor in weights):
            yield node


def recurrent_refusal(node: ir.Node, least_work: int = LEAST_WORK) -> str:
    """Why a recurrent operator stays in float, or "" when it is quantized.

    Args:
        node: The operator.
        least_work: Multiply-adds with R from which it is quantized, where their number is known.
    """
    activations = node.attributes.get("activations")
    if activations is not None and not {str(name).lower() for name in activations.as_strings()} <= _BOUNDED:
        return "its state is not bound to ±1 by its activations"
    if integer(node, "layout", 0):
        return "its batch comes first"
    _, rows, hidden = _sizes(node)
    if hidden < SMALLEST_HIDDEN:
        return f"it has {hidden} hidden units only"
    work = _times(node, rows * hidden)
    return f"it multiplies {work} numbers by its state only" if work is not None and work < least_work else ""


def _times(node: ir.Node, each: int) -> int | None:
    """``each`` for every step of every sequence in every direction, where their numbers are known."""
    data = node.inputs[0]
    counts = [] if data is None or data.shape is None else list(data.shape)[:2]
    known = [count for count in counts if isinstance(count, int)]
    return each * known[0] * known[1] * _sizes(node)[0] if len(known) == 2 else None


def wanted_recurrent(
    pass_: Pass, module: Module, context: PassContext, selection: Selection, least_work: int
) -> dict[ir.Value, list[ir.Node]]:
    """The recurrent operators to quantize, by what they read, with remarks on those that are not.

    Args:
        pass_: Whose remarks these are.
        module: The module.
        context: Gets the remarks.
        selection: What was asked for.
        least_work: As for :func:`recurrent_refusal`.
    """
    chosen: dict[ir.Value, list[ir.Node]] = {}
    if module.opset < BLOCKED_OPSET:
        return chosen
    for node in recurrent_layers(module):
        if reason := selection.unwanted(node) or recurrent_refusal(node, least_work):
            pass_.remark(context, "missed", str(node.name), f"{node.op_type} stays in float: {reason}")
        else:
            assert node.inputs[0] is not None
            chosen.setdefault(node.inputs[0], []).append(node)
    return chosen


def quantize_recurrent(quantizer: Quantizer, node: ir.Node, calibration: Calibration, names: Names) -> None:
    """Put the weights of a recurrent operator, and its initial state, into 8 bits."""
    state = _initial_state(node, names)
    for value in dict.fromkeys(node.inputs[1:3]):
        tensor = tensor_of(value)
        assert value is not None
        assert tensor is not None
        data = np.asarray(tensor.numpy())
        encoding = CompressWeights().encoding(data)
        quantizer.constant(value, encoding.quantize(data), encoding, [node])
    encoding = _state_encoding(state, calibration)
    tensor = tensor_of(state)
    if tensor is None:
        quantizer.activation(state, encoding, [node])
    else:
        quantizer.constant(state, encoding.quantize(np.asarray(tensor.numpy())), encoding, [node])


def _sizes(node: ir.Node) -> tuple[int, int, int]:
    """Directions, rows of R and hidden units."""
    tensor = tensor_of(node.inputs[2])
    assert tensor is not None
    directions, rows, hidden = (int(size) for size in tensor.shape.numpy())
    return directions, rows, hidden


def _state_encoding(state: ir.Value, calibration: Calibration) -> Encoding:
    """int8 without a zero point, up to 1 or to the largest initial state."""
    tensor, statistics = tensor_of(state), calibration.tensors.get(str(state.name))
    largest = 1.0
    if tensor is not None:
        largest = max(largest, float(np.abs(np.asarray(tensor.numpy())).max(initial=0)))
    elif statistics is not None and statistics.count:
        largest = max(largest, *(abs(float(end)) for end in choose_range(statistics, symmetric=True)))
    return encode(np.array(-largest), np.array(largest), ir.DataType.INT8, symmetric=True)


def _initial_state(node: ir.Node, names: Names) -> ir.Value:
    """The initial state of a node, zeros where it had none."""
    state = node.inputs[_STATE] if len(node.inputs) > _STATE else None
    if state is not None:
        return state
    state = _zeros(node, names)
    if len(node.inputs) <= _STATE:
        node.resize_inputs(_STATE + 1)
    node.replace_input_with(_STATE, state)
    return state


def _zeros(node: ir.Node, names: Names) -> ir.Value:
    """Zeros ``[directions, batch, hidden]``, for as many sequences as there are."""
    data, graph = node.inputs[0], node.graph
    assert data is not None
    assert graph is not None
    directions, _, hidden = _sizes(node)
    batch = None if data.shape is None else data.shape[1]
    name = names.fresh(f"{node.name}_state")
    if isinstance(batch, int):
        return new_initializer(graph, ir.tensor(np.zeros((directions, batch, hidden), np.float32)), name)
    ends = [
        new_initializer(graph, ir.tensor(np.array([size], np.int64)), names.fresh(f"{name}_{what}"))
        for what, size in (("directions", directions), ("hidden", hidden))
    ]
    counted = new_node("Shape", [data], node, names, [ir.AttrInt64("start", 1), ir.AttrInt64("end", 2)]).outputs[0]
    shape = new_node("Concat", [ends[0], counted, ends[1]], node, names, [ir.AttrInt64("axis", 0)]).outputs[0]
    zero = ir.AttrTensor("value", ir.tensor(np.zeros(1, np.float32)))
    made = new_node("ConstantOfShape", [shape], node, names, [zero]).outputs[0]
    counted.type, counted.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    shape.type, shape.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([3])
    made.type, made.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([directions, batch, hidden])
    return made
