"""Makes one recurrent operator of steps whose weights agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mmopt.analysis.dims import Size
from mmopt.analysis.shape_rules.types import to_ir_shape
from mmopt.analysis.shapes import Fact
from mmopt.transforms.canonicalize.editing import Array
from mmopt.transforms.canonicalize.rewriting import Rewriter
from mmopt.transforms.raising.building import Builder, Unbuildable, uniform
from mmopt.transforms.raising.cells import GATES, Cell
from mmopt.transforms.raising.parts import Part
from mmopt.transforms.raising.sums import Sum, Weight, columns, read_sum

_CLOSE = 1e-6
"""Biases of two steps are the same up to this: an exporter may have added some at one step and not at another."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A cell whose operands have roles.

    Attributes:
        cell: The cell.
        h_before: The old state; None for zeros that were folded away.
        source: What the step reads: its input, or the projection of that.
        inputs: Weights of the input by gate; empty where ``source`` is a projection.
        parts: Columns of ``source`` by gate, where it is a projection.
        recurrent: Weights of the old state by gate.
        whole: Weights, recurrent weights and biases as an operator holds them, where one makes the step.
    """

    cell: Cell
    h_before: ir.Value | None
    source: ir.Value
    inputs: dict[str, Weight]
    parts: dict[str, Part]
    recurrent: dict[str, Weight]
    whole: tuple[Array, Array, Array] | None = None


def roles(cell: Cell, h_before: ir.Value | None) -> Step | str:
    """Tell the old state's weights from the input's; else why that fails."""
    inputs: dict[str, Weight] = {}
    parts: dict[str, Part] = {}
    recurrent: dict[str, Weight] = {}
    sources: dict[ir.Value, None] = {}
    for gate, total in cell.gates.items():
        own = cell.resets if gate == "h" and cell.resets is not None else h_before
        for value, weight in total.products.items():
            (recurrent if value is own else inputs)[gate] = weight
            if value is not own:
                sources[value] = None
        for part in total.rest:
            parts[gate], sources[part.value] = part, None
    if cell.recurrent is not None and h_before in cell.recurrent.products:
        recurrent["h"] = cell.recurrent.products[h_before]
    if len(sources) != 1 or (inputs and parts):
        return f"the gates of a step read {len(sources)} tensors besides the state"
    present = {gate for gate, total in cell.gates.items() if total != Sum()}
    zeros = h_before is None or uniform(h_before) == 0
    if {*inputs, *parts} != present or not (set(recurrent) <= present if zeros else set(recurrent) == present):
        return "not all gates read both input and state"
    return Step(cell, h_before, next(iter(sources)), inputs, parts, recurrent)


@dataclasses.dataclass(frozen=True)
class Results:
    """What a layer gives.

    Attributes:
        states: All states, ``[steps, batch, hidden]``.
        last_h: The last state, ``[batch, hidden]``.
        last_c: LSTM: the last cell state.
    """

    states: ir.Value
    last_h: ir.Value
    last_c: ir.Value | None


@dataclasses.dataclass(frozen=True)
class Layer:
    """A recurrent operator to be.

    Attributes:
        cell: A step of it.
        sequence: What it reads.
        weights: ``[gates * hidden, inputs]``.
        recurrent: ``[gates * hidden, hidden]``.
        biases: ``[2 * gates * hidden]``: beside the weights, then beside the recurrent ones.
    """

    cell: Cell
    sequence: ir.Value
    weights: Array
    recurrent: Array
    biases: Array

    def emit(
        self,
        builder: Builder,
        sequence: ir.Value,
        h_before: ir.Value | None,
        c_before: ir.Value | None,
        direction: str,
    ) -> Results:
        """Make the operator.

        Args:
            builder: Where.
            sequence: Its input, ``[steps, batch, inputs]``.
            h_before: Initial state ``[batch, hidden]``; None for zeros.
            c_before: Initial cell state; None for zeros.
            direction: ``forward`` or ``reverse``.

        Raises:
            Unbuildable: A shape that is needed is unknown.
        """
        dtype = builder.rewriter.dtype(sequence)
        if dtype is None:
            raise Unbuildable(f"the type of {sequence.name} is unknown")
        steps, batch, _ = builder.shape(sequence)
        hidden = self.recurrent.shape[1]
        kinds = {"W": self.weights, "R": self.recurrent, "B": self.biases}
        constants = [builder.constant(array[None].astype(dtype.numpy()), name) for name, array in kinds.items()]
        initial = [_initial(value, (batch, hidden), builder) for value in (h_before, c_before)]
        outputs = _operator(self.cell, hidden, direction, [sequence, *constants, None, *initial], builder)
        shapes: list[tuple[Size, ...]] = [(steps, 1, batch, hidden), (1, batch, hidden), (1, batch, hidden)]
        for output, shape in zip(outputs, shapes, strict=False):
            output.type, output.shape = ir.TensorType(dtype), to_ir_shape(shape)
            builder.rewriter.facts.set(output, Fact(shape, None, output.type))
        squeezed = [
            builder.node("Squeeze", [output, builder.ints([axis], "axis")], _without(shape, axis), dtype)
            for output, shape, axis in zip(outputs, shapes, (1, 0, 0), strict=False)
        ]
        return Results(squeezed[0], squeezed[1], squeezed[2] if len(squeezed) > 2 else None)


def _without(shape: Sequence[Size], axis: int) -> tuple[Size, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _initial(value: ir.Value | None, shape: tuple[Size, Size], builder: Builder) -> ir.Value | None:
    if value is None or uniform(value) == 0:
        return None
    whole = builder.expand(value, shape)
    return builder.node("Unsqueeze", [whole, builder.ints([0], "axis")], (1, *shape), builder.rewriter.dtype(value))


def _operator(
    cell: Cell, hidden: int, direction: str, inputs: list[ir.Value | None], builder: Builder
) -> Sequence[ir.Value]:
    attributes = [ir.AttrInt64("hidden_size", hidden), ir.AttrString("direction", direction)]
    if cell.kind == "GRU":
        attributes.append(ir.AttrInt64("linear_before_reset", int(cell.resets is None)))
    if cell.kind == "RNN":
        attributes.append(ir.AttrStrings("activations", [cell.activation]))
    while inputs[-1] is None:
        inputs.pop()
    before, names = builder.before, builder.rewriter.names
    base = before.name or cell.kind
    outputs = [ir.Value(name=names.fresh(f"{base}_{end}")) for end in ("Y", "Y_h", "Y_c")[: 3 if cell.c else 2]]
    node = ir.Node("", cell.kind, inputs, attributes, outputs=outputs, name=names.fresh(f"{base}_{cell.kind}"))
    node.metadata_props.update(before.metadata_props)
    if before.graph is not None:
        before.graph.insert_before(before, node)
    builder.adopt(node)
    return node.outputs


# -- agreement -----------------------------------------------------------------------------------------------------


def assemble(steps: Sequence[Step], sequence: ir.Value, rewriter: Rewriter) -> Layer | str:
    """The layer that ``steps``, in their order, are; else why they are none.

    Args:
        steps: The steps; only the first may lack what zeros in its old state folded away.
        sequence: What their sources are the steps of.
        rewriter: Knows shapes.
    """
    last = steps[-1]
    if last.whole is not None:
        return Layer(last.cell, sequence, *last.whole)
    for number, step in enumerate(steps):
        if not _agree(step, last, first=number == 0):
            return "weights or biases differ between steps"
    hidden = (rewriter.shape(last.cell.h) or (None,))[-1]
    if not isinstance(hidden, int):
        return "the number of hidden units is unknown"
    source = _projection(last, sequence, hidden, rewriter)
    if isinstance(source, str):
        return source
    order = GATES[last.cell.kind]
    own, recurrent = _biases(last.cell, hidden), np.zeros(len(order) * hidden)
    if own is None or {weight.array().shape for weight in last.recurrent.values()} != {(hidden, hidden)}:
        return "biases or recurrent weights are not those of a recurrent layer"
    if last.cell.recurrent is not None:
        after_product = last.cell.recurrent.bias(hidden)
        if after_product is None:
            return "biases differ between rows"
        recurrent[order.index("h") * hidden :][:hidden] = after_product
    value, weights, offset = source
    return Layer(
        last.cell,
        value,
        np.concatenate([weights[gate] for gate in order]),
        np.concatenate([last.recurrent[gate].array() for gate in order]),
        np.concatenate([own + offset, recurrent]),
    )


def _agree(step: Step, last: Step, first: bool) -> bool:
    """Whether a step has the weights and biases of the last one."""
    cuts = [{gate: (part.start, part.size) for gate, part in of.parts.items()} for of in (step, last)]
    for own, wanted in ((step.inputs, last.inputs), (cuts[0], cuts[1]), (step.recurrent, last.recurrent)):
        missing = set(wanted) - set(own)
        if (missing and not first) or any(own[gate] != wanted.get(gate) for gate in own):
            return False
    pairs = [(total, last.cell.gates[gate]) for gate, total in step.cell.gates.items() if total != Sum() or not first]
    if step.cell.recurrent is not None and last.cell.recurrent is not None:
        pairs.append((step.cell.recurrent, last.cell.recurrent))
    return all(_same_bias(total, wanted) for total, wanted in pairs)


def _same_bias(total: Sum, wanted: Sum) -> bool:
    if total.biases == wanted.biases:
        return True
    sizes = {part.size for part in [*total.biases, *wanted.biases]}
    if len(sizes) != 1:
        return False
    width = sizes.pop()
    own, other = total.bias(width), wanted.bias(width)
    return own is not None and other is not None and bool(np.allclose(own, other, rtol=_CLOSE, atol=_CLOSE))


def _biases(cell: Cell, hidden: int) -> Array | None:
    found = [cell.gates[gate].bias(hidden) for gate in GATES[cell.kind]]
    return None if any(bias is None for bias in found) else np.concatenate([b for b in found if b is not None])


def _projection(
    last: Step, sequence: ir.Value, hidden: int, rewriter: Rewriter
) -> tuple[ir.Value, dict[str, Array], Array] | str:
    """The layer's input, its weights by gate, and what projecting it beforehand adds to the biases."""
    order = GATES[last.cell.kind]
    if last.inputs:
        return sequence, {gate: weight.array() for gate, weight in last.inputs.items()}, np.zeros(len(order) * hidden)
    values: dict[ir.Value, None] = {}
    weights, offsets = {}, []
    for gate in order:
        part = last.parts[gate]
        total = read_sum(columns(sequence, part.start, part.size, rewriter), rewriter)
        offset = None if total is None or len(total.products) != 1 or total.rest else total.bias(hidden)
        if total is None or offset is None:
            return f"{sequence.name} is no projection of a sequence"
        ((value, weight),) = total.products.items()
        values[value], weights[gate] = None, weight.array()
        offsets.append(offset)
    if len(values) != 1:
        return "the gates read different sequences"
    return next(iter(values)), weights, np.concatenate(offsets)
