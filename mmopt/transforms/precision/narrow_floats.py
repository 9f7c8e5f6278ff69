"""Rounds what the arithmetic operators read to bfloat16 or float16, as pairs of casts around operators on float32.

    y = MatMul(x, w)    →    x' = Cast<bf16>(x)
                             y = MatMul(Cast<float>(x'), Cast<float>(w'))        w' = w in bfloat16

Any runtime computes the same rounding; a target with arithmetic in the narrow format fuses the pairs into its kernels:
the cast down is the last step of whatever makes x, the casts up happen in the operator's registers. Sums are in
float32. So are normalizations, softmax, reductions, biases and graph outputs. A constant is stored narrow, once; a
value that is rounded is rounded for all who read it, so that it is stored once.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from mmopt.errors import BackendError
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.pipeline.validation import tolerance_for
from mmopt.transforms.canonicalize import editing
from mmopt.transforms.canonicalize.editing import Names, is_onnx, tensor_of
from mmopt.transforms.precision.narrow_values import (
    MOVEMENT,
    SIZES,
    Choice,
    all_nodes,
    choose,
    moved_inputs,
    moves_narrow,
)
from mmopt.transforms.precision.ranges import largest_magnitudes

OLDEST_OPSET = 13
"""The first operator set with bfloat16."""

HEADROOM = 4.0
"""How much larger than on the inputs at hand a value may become: what exceeds the range by less stays in float32."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A narrow float: its ONNX and numpy types, its name in tolerances, its largest number and least normal one."""

    onnx: ir.DataType
    numpy: np.dtype[Any]
    precision: str
    largest: float
    least: float


FORMATS = {
    "bf16": Format(ir.DataType.BFLOAT16, np.dtype(ml_dtypes.bfloat16), "bfloat16", 3.3895313892515355e38, 2.0**-126),
    "fp16": Format(ir.DataType.FLOAT16, np.dtype(np.float16), "float16", 65504.0, 2.0**-14),
}


@dataclasses.dataclass(frozen=True)
class NarrowFloats(Pass):
    """Have matrix products, convolutions, attention and recurrence read bfloat16 or float16, and store weights so.

    Attributes:
        format: The number format.
        kinds: Operators that read narrow numbers; all when empty.
    """

    fidelity = Fidelity.LOSSY

    format: Literal["bf16", "fp16"] = "bf16"
    kinds: tuple[str, ...] = ()

    def error_bound(self) -> float:
        """What rounding in the format costs a whole network."""
        return tolerance_for(Fidelity.ROUNDING, FORMATS[self.format].precision).relative

    def run(self, module: Module, context: PassContext) -> bool:
        """Round what fits; leave a remark for each operator that stays in float32."""
        if module.opset < OLDEST_OPSET:
            self.remark(context, "missed", "", f"opset {module.opset} is too old; it must be {OLDEST_OPSET} or later")
            return False
        choice = self._choice(module, context)
        for node, reason in choice.kept:
            self.remark(context, "missed", node.name or "", f"{node.op_type} stays in fp32: {reason}")
        writer = _Writer(module, choice.values, FORMATS[self.format])
        self._tell(module, choice, context)
        return writer.write()

    def _choice(self, module: Module, context: PassContext) -> Choice:
        """What to round: everything the format can hold."""
        kind = FORMATS[self.format]
        choice = choose(module.model, kinds=self.kinds)
        wide = {value for value in choice.values if not _holds(value, kind)}
        reason = f"a weight has numbers that {self.format} cannot hold"
        if self.format == "fp16":
            computed = {value for value in choice.values if tensor_of(value) is None}
            beyond = self._beyond(module, computed, context)
            wide |= beyond
            reason = f"a weight, or a value on the inputs tried, comes near what {self.format} can hold or exceeds it"
        return choose(module.model, wide=wide, why=reason, kinds=self.kinds) if wide else choice

    def _beyond(self, module: Module, values: set[ir.Value], context: PassContext) -> set[ir.Value]:
        """Computed values that are, or might get, too large for float16."""
        inside = {value for value in values if not _is_seen(module, value)}
        try:
            found = largest_magnitudes(module, values - inside, context)
        except BackendError as error:
            self.remark(context, "note", "", f"no value is rounded, because none could be measured: {error.what}")
            return values
        return inside | {value for value, size in found.items() if size * HEADROOM > FORMATS[self.format].largest}

    def _tell(self, module: Module, choice: Choice, context: PassContext) -> None:
        """Say what is rounded, and what is not."""
        narrow = collections.Counter(node.op_type for node in choice.operators)
        if narrow:
            message = f"in {self.format}: {_counted(narrow)}; {len(choice.values)} values and weights are rounded"
            self.remark(context, "applied", "", message)
        if self.kinds:
            return
        taken = set(choice.operators)
        rest = collections.Counter(
            node.op_type
            for node in all_nodes(module.graph)
            if node not in taken and node.outputs and node.outputs[0].dtype == ir.DataType.FLOAT
            if not is_onnx(node, "Constant", "Cast", *MOVEMENT)
        )
        if rest:
            self.remark(context, "note", "", f"in fp32: {_counted(rest)}, biases, and all outputs of the model")


def _counted(operators: collections.Counter[str]) -> str:
    return ", ".join(f"{name} ×{count}" for name, count in operators.most_common())


def _is_seen(module: Module, value: ir.Value) -> bool:
    """Whether a value belongs to the main graph, where it can be measured."""
    producer = value.producer()
    return producer.graph is module.graph if producer is not None else value in module.graph.inputs


def _holds(value: ir.Value, kind: Format) -> bool:
    """Whether the format holds a constant: no number overflows, and not all of them vanish or nearly do."""
    tensor = tensor_of(value)
    if tensor is None:
        return True
    data = np.asarray(tensor.numpy())
    finite = np.abs(data[np.isfinite(data)])
    largest = float(finite.max(initial=0.0))
    return largest <= kind.largest and (largest == 0.0 or largest >= kind.least)


class _Writer:
    """Puts casts and narrow constants into a model."""

    def __init__(self, module: Module, values: set[ir.Value], kind: Format) -> None:
        self._model, self._values, self._kind = module.model, values, kind
        self._names = Names(module.model)
        self._narrow: dict[ir.Value, ir.Value] = {}
        self._moved: set[ir.Node] = {
            node
            for node in all_nodes(module.graph)
            if is_onnx(node, *MOVEMENT)
            and moves_narrow(node, values)
            and all(value in values for value in moved_inputs(node))
        }

    def write(self) -> bool:
        """Rewrite the model; returns whether anything is rounded."""
        order = [value for value in self._ordered() if value in self._values]
        for value in order:
            self._narrow[value] = self._narrowed(value)
        fresh = [value for value in order if self._widened_from(value) is None]
        for value in fresh:
            self._redirect(value, self._narrow[value])
        editing.erase([node for node in reversed(list(all_nodes(self._model.graph))) if node in self._moved])
        self._drop_constants(fresh)
        return bool(fresh)

    def _widened_from(self, value: ir.Value) -> ir.Value | None:
        """The narrow value that ``value`` is a cast of, if it is one already."""
        producer = value.producer()
        if producer is None or not is_onnx(producer, "Cast"):
            return None
        source = producer.inputs[0]
        return source if source is not None and source.dtype == self._kind.onnx else None

    def _ordered(self) -> list[ir.Value]:
        """Every value of the model, each after those it is computed from."""
        found: dict[ir.Value, None] = {}
        for graph in self._model.graphs():
            found.update(dict.fromkeys((*graph.inputs, *graph.initializers.values())))
        for node in all_nodes(self._model.graph):
            found.update(dict.fromkeys(node.outputs))
        return list(found)

    def _narrowed(self, value: ir.Value) -> ir.Value:
        """The narrow form of ``value``."""
        if value in self._narrow:
            return self._narrow[value]
        tensor, producer = tensor_of(value), value.producer()
        if tensor is not None:
            return self._stored(value, tensor)
        if (source := self._widened_from(value)) is not None:
            return source
        return self._move(producer, value) if producer in self._moved and producer else self._cast_after(value)

    def _stored(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        with np.errstate(over="ignore"):
            data = np.asarray(tensor.numpy()).astype(self._kind.numpy)
        name = self._names.fresh(f"{value.name}.{self._kind.precision}")
        return editing.new_initializer(self._model.graph, ir.Tensor(data, dtype=self._kind.onnx, name=name), name)

    def _cast_after(self, value: ir.Value) -> ir.Value:
        """Round ``value`` as soon as it is there."""
        cast = self._cast(value, self._kind.onnx, f"{value.name}_narrow")
        producer = value.producer()
        if producer is not None:
            assert producer.graph is not None
            producer.graph.insert_after(producer, cast)
            cast.metadata_props.update(producer.metadata_props)
        else:
            assert value.graph is not None
            value.graph.insert_before(next(iter(value.graph)), cast)
        return cast.outputs[0]

    def _move(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """The result of moving narrow elements as ``node`` moves wide ones."""
        moved = set(moved_inputs(node))
        outputs = [ir.Value(name=self._names.fresh(f"{o.name}_narrow")) for o in node.outputs]
        inputs = [self._narrow[v] if v is not None and v in moved else v for v in node.inputs]
        name = self._names.fresh(f"{node.name or node.op_type}_narrow")
        copy = ir.Node("", node.op_type, inputs, list(node.attributes.values()), outputs=outputs, name=name)
        copy.metadata_props.update(node.metadata_props)
        for old, new in zip(node.outputs, outputs, strict=True):
            new.type, new.shape = ir.TensorType(self._kind.onnx), old.shape
            self._narrow[old] = new
        assert node.graph is not None
        node.graph.insert_before(node, copy)
        return self._narrow[value]

    def _redirect(self, value: ir.Value, narrow: ir.Value) -> None:
        """Have everything that reads ``value`` read its narrow form, widened where it computes."""
        for user in dict.fromkeys(user for user, _ in value.uses()):
            if user in self._moved or narrow in user.outputs:
                continue
            given = narrow
            if not is_onnx(user, *SIZES):
                cast = self._cast(narrow, ir.DataType.FLOAT, f"{value.name}_wide")
                cast.metadata_props.update(user.metadata_props)
                assert user.graph is not None
                user.graph.insert_before(user, cast)
                given = cast.outputs[0]
            for position, operand in enumerate(user.inputs):
                if operand is value:
                    user.replace_input_with(position, given)

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
        output = ir.Value(name=self._names.fresh(name), type=ir.TensorType(dtype), shape=value.shape)
        attributes = [ir.AttrInt64("to", dtype.value)]
        return ir.Node("", "Cast", [value], attributes, outputs=[output], name=self._names.fresh(f"{name}_cast"))

    def _drop_constants(self, values: list[ir.Value]) -> None:
        """Take out wide constants that nothing reads any more."""
        for value in values:
            if value.uses() or value.is_graph_output() or value.is_graph_input():
                continue
            producer = value.producer()
            if producer is not None and is_onnx(producer, "Constant"):
                editing.erase([producer])
            elif producer is None and value.is_initializer() and value.graph is not None:
                del value.graph.initializers[str(value.name)]
