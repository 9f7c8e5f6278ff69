"""Reads one step of a recurrence: which operators make the new state from the old one and from the step's input.

LSTM   c = f · c' + i · tanh(g),  h = o · tanh(c)                      f, i, o = sigmoid(x W + h' R + b), g likewise
GRU    h = (1 - z) · n + z · h'  =  n + z · (h' - n)
       n = tanh(x W + b + r · (h' R + b'))  or  tanh(x W + (r · h') R + b)
RNN    h = tanh(x W + h' R + b), or relu
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import is_onnx
from mmopt.transforms.canonicalize.rewriting import Rewriter
from mmopt.transforms.raising.algebra import scalar
from mmopt.transforms.raising.building import uniform
from mmopt.transforms.raising.parts import Part, region
from mmopt.transforms.raising.sums import Sum, read_sum

GATES = {"LSTM": "iofc", "GRU": "zrh", "RNN": "i"}
"""Gates of an operator, in the order in which the ONNX standard stores them."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One step.

    Attributes:
        kind: ``LSTM``, ``GRU`` or ``RNN``.
        h: The new state, ``[batch, hidden]``.
        gates: What each gate's activation is applied to, by the letters of :data:`GATES`.
        c: LSTM: the new cell state.
        c_before: LSTM: the old cell state; None for zeros.
        h_before: GRU: the old state; the others' is one of the operands of the sums.
        recurrent: GRU that resets after the product: what the reset gate multiplies; else None.
        resets: GRU that resets before the product: the reset state.
        activation: RNN: ``Tanh`` or ``Relu``.
    """

    kind: str
    h: ir.Value
    gates: dict[str, Sum]
    c: ir.Value | None = None
    c_before: ir.Value | None = None
    h_before: ir.Value | None = None
    recurrent: Sum | None = None
    resets: ir.Value | None = None
    activation: str = "Tanh"

    @property
    def sums(self) -> list[Sum]:
        """All sums."""
        return [*self.gates.values(), *([] if self.recurrent is None else [self.recurrent])]


def read_cell(h: ir.Value | None, rewriter: Rewriter) -> Cell | None:
    """The step whose new state is ``h``, if there is one."""
    node = None if h is None else h.producer()
    if h is None or node is None or len(rewriter.shape(h) or ()) != 2:
        return None
    if is_onnx(node, "Mul"):
        return _lstm(node, rewriter)
    if is_onnx(node, "Add"):
        return _gru(node, rewriter)
    if is_onnx(node, "Tanh", "Relu"):
        total = read_sum(region(node.inputs[0], rewriter), rewriter)
        return None if total is None or not total.products else Cell("RNN", h, {"i": total}, activation=node.op_type)
    return None


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and is_onnx(node, op_type) else None


def _activated(value: ir.Value | None, op_type: str, rewriter: Rewriter) -> Sum | None:
    """The sum that an activation makes ``value`` of."""
    node = _made_by(value, op_type)
    return None if node is None else read_sum(region(node.inputs[0], rewriter), rewriter)


def _pairs(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Both orders of the operands."""
    first, second = node.inputs[0], node.inputs[1]
    if first is not None and second is not None:
        yield from ((first, second), (second, first))


def _lstm(node: ir.Node, rewriter: Rewriter) -> Cell | None:
    for gate, squashed in _pairs(node):
        tanh = _made_by(squashed, "Tanh")
        output = _activated(gate, "Sigmoid", rewriter)
        if tanh is None or output is None or tanh.inputs[0] is None:
            continue
        state = tanh.inputs[0]
        for c_before, forget, product in _cell_states(state, rewriter):
            update = _update(product, rewriter)
            if update is None:
                continue
            gates = {"i": update[0], "o": output, "f": forget or Sum(), "c": update[1]}
            return Cell("LSTM", node.outputs[0], gates, c=state, c_before=c_before)
    return None


def _cell_states(state: ir.Value, rewriter: Rewriter) -> Iterator[tuple[ir.Value | None, Sum | None, ir.Node]]:
    """Old cell state, forget gate, and the product that updates the state; a first step may have lost the first two."""
    add = _made_by(state, "Add")
    if add is None:
        product = _made_by(state, "Mul")
        if product is not None:
            yield None, None, product
        return
    for kept, updated in _pairs(add):
        product, kept_product = _made_by(updated, "Mul"), _made_by(kept, "Mul")
        if product is None or kept_product is None:
            continue
        for gate, before in _pairs(kept_product):
            forget = _activated(gate, "Sigmoid", rewriter)
            if forget is not None:
                yield (None if uniform(before) == 0 else before), forget, product


def _update(product: ir.Node, rewriter: Rewriter) -> tuple[Sum, Sum] | None:
    for gate, candidate in _pairs(product):
        inside, new = _activated(gate, "Sigmoid", rewriter), _activated(candidate, "Tanh", rewriter)
        if inside is not None and new is not None and new.products:
            return inside, new
    return None


def _gru(node: ir.Node, rewriter: Rewriter) -> Cell | None:
    for first, second in _pairs(node):
        blend = _blend(first, second)
        if blend is None:
            continue
        gate, new, before = blend
        update = _activated(gate, "Sigmoid", rewriter)
        candidate = _activated(new, "Tanh", rewriter)
        if update is None or candidate is None:
            continue
        return _with_reset(node.outputs[0], update, candidate, before, rewriter)
    return None


def _blend(first: ir.Value, second: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """Update gate, candidate and old state of ``z · (h' - n) + n`` or ``(1 - z) · n + z · h'``."""
    product, other = _made_by(first, "Mul"), _made_by(second, "Mul")
    if product is None:
        return None
    for left, right in _pairs(product):
        difference = _made_by(left, "Sub")
        if difference is None or difference.inputs[0] is None or difference.inputs[1] is None:
            continue
        if difference.inputs[1] is second:
            return right, second, difference.inputs[0]
        if other is not None and scalar(difference.inputs[0]) == 1.0:
            for gate, before in _pairs(other):
                if gate is difference.inputs[1]:
                    return gate, right, before
    return None


def _with_reset(h: ir.Value, update: Sum, candidate: Sum, before: ir.Value, rewriter: Rewriter) -> Cell | None:
    """The cell, once the reset gate is found inside the candidate."""
    for part in candidate.rest:
        for gate, projected in _factors(part, rewriter):
            reset, recurrent = _activated(gate, "Sigmoid", rewriter), read_sum(region(projected, rewriter), rewriter)
            if reset is None or recurrent is None or recurrent.rest:
                continue
            rest = [other for other in candidate.rest if other is not part]
            own = dataclasses.replace(candidate, rest=rest)
            return Cell("GRU", h, {"z": update, "r": reset, "h": own}, h_before=before, recurrent=recurrent)
    for value in candidate.products:
        product = _made_by(value, "Mul")
        for gate, old in _pairs(product) if product is not None else ():
            reset = _activated(gate, "Sigmoid", rewriter)
            if reset is not None and old is before:
                return Cell("GRU", h, {"z": update, "r": reset, "h": candidate}, h_before=before, resets=value)
    return None


def _factors(part: Part, rewriter: Rewriter) -> Iterator[tuple[ir.Value, ir.Value]]:
    product, shape = _made_by(part.value, "Mul"), rewriter.shape(part.value) or (None,)
    whole = part.start == 0 and part.size == shape[-1]
    return _pairs(product) if product is not None and whole else itertools.chain()
