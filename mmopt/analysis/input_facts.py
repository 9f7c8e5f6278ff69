"""What legal values of a model's inputs look like, by following each input to the operators that constrain it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import onnx_ir as ir

from mmopt.analysis.dims import Size
from mmopt.analysis.shape_facts import ShapeFacts
from mmopt.analysis.shapes import infer_shapes
from mmopt.ir.module import Module

_SAME_ELEMENTS = {
    "Cast": (0,), "CastLike": (0,), "Identity": (0,), "Reshape": (0,), "Unsqueeze": (0,), "Squeeze": (0,),
    "Flatten": (0,), "Transpose": (0,), "Slice": (0,), "Expand": (0,), "Tile": (0,), "Gather": (0,), "GatherND": (0,),
    "GatherElements": (0,), "Split": (0,), "Where": (1, 2), "Clip": (0,), "Dropout": (0,), "ScatterND": (0, 2),
    "ScatterElements": (0, 2), "Pad": (0,), "Trilu": (0,), "Min": (0, 1, 2), "Max": (0, 1, 2), "Concat": None,
    "SequenceConstruct": None, "SequenceInsert": (0, 1), "SequenceAt": (0,), "ConcatFromSequence": (0,),
    "Compress": (0,), "ReverseSequence": (0,), "SplitToSequence": (0,), "DequantizeLinear": (0,),
}  # fmt: skip
"""Operators whose output holds elements of these inputs (None: of all), with values that stay as they are."""

_STEERING = {
    ("Reshape", 1): "reshape", ("Expand", 1): "expand", ("Tile", 1): "repeats", ("ConstantOfShape", 0): "sizes",
    ("Range", 0): "start", ("Range", 1): "limit", ("Range", 2): "one", ("TopK", 1): "one", ("Slice", 1): "starts",
    ("Slice", 2): "ends", ("Slice", 3): "axes", ("Slice", 4): "one", ("Pad", 1): "pads", ("Pad", 3): "axes",
    ("Squeeze", 1): "squeeze", ("Unsqueeze", 1): "axes", ("Split", 1): "split",
    ("SplitToSequence", 1): "split", ("CumSum", 1): "zero", ("CumProd", 1): "zero", ("Mod", 1): "positive",
    ("TensorScatter", 2): "zero",
    ("Trilu", 1): "zero", ("OneHot", 1): "depth", ("Loop", 0): "trips", ("SequenceAt", 1): "zero",
    ("SequenceInsert", 2): "zero", ("SequenceErase", 1): "zero", ("Resize", 2): "scales", ("Resize", 3): "resize",
    ("Upsample", 1): "scales", ("Dropout", 1): "probability", ("Dropout", 2): "mask", ("HannWindow", 0): "depth",
    ("HammingWindow", 0): "depth", ("BlackmanWindow", 0): "depth", ("DFT", 1): "depth", ("STFT", 1): "depth",
    ("NonMaxSuppression", 2): "depth", ("NonMaxSuppression", 3): "probability",
    ("NonMaxSuppression", 4): "probability", ("Where", 0): "mask", ("If", 0): "mask", ("Loop", 1): "mask",
    ("Not", 0): "mask", ("And", 0): "mask", ("And", 1): "mask", ("Or", 0): "mask", ("Or", 1): "mask",
    ("Compress", 1): "mask", ("ArgMax", 0): "argmax", ("Log", 0): "positive", ("Sqrt", 0): "positive",
    ("Pow", 0): "positive", ("Div", 1): "positive", ("Reciprocal", 0): "positive", ("Acos", 0): "unit",
    ("Asin", 0): "unit", ("Atanh", 0): "unit", ("Acosh", 0): "above-one", ("QuantizeLinear", 1): "scale",
    ("DequantizeLinear", 1): "scale", ("BatchNormalization", 4): "positive", ("Bernoulli", 0): "probability",
    ("Attention", 3): "mask", ("Conv", 0): "convolved", ("ConvInteger", 0): "convolved", ("STFT", 0): "signal",
}  # fmt: skip
"""What an input is used for when it arrives at this operator and position."""


@dataclasses.dataclass
class InputFacts:
    """What the operators that an input reaches demand of its values.

    Attributes:
        roles: What it is used for: ``index``, ``mask``, ``lengths``, ``argmax``, ``reshape``, ``positive``, …
        low: Smallest legal value, where it is an index.
        bounds: Sizes that its values must stay below (symbolic ones too), where it is an index.
        blind: Whether it indexes something of unknown size, so that only index 0 is surely legal.
        compared: Constants it is compared with for equality.
        steered: Nodes that it steers by shape, axes or sizes, with the shapes of what they work on.
        channels: Channels of the convolution it goes into, 0 when there is none.
    """

    roles: set[str] = dataclasses.field(default_factory=set)
    low: int = 0
    bounds: list[Size] = dataclasses.field(default_factory=list)
    blind: bool = False
    compared: list[float] = dataclasses.field(default_factory=list)
    steered: list[tuple[ir.Node, tuple[Size | None, ...] | None]] = dataclasses.field(default_factory=list)
    channels: int = 0


def input_facts(module: Module) -> dict[str, InputFacts]:
    """Facts of every input of ``module``, by name."""
    shapes = infer_shapes(module.model)
    return {str(value.name): _Walk(module.model, shapes).follow(value) for value in module.graph.inputs}


class _Walk:
    """Follows one input forward; a step is a value and what was added to the input on the way there."""

    def __init__(self, model: ir.Model, shapes: ShapeFacts) -> None:
        self._model = model
        self._shapes = shapes
        self._facts = InputFacts()
        self._seen: set[tuple[ir.Value, int]] = set()
        self._todo: list[tuple[ir.Value, int]] = []

    def follow(self, value: ir.Value) -> InputFacts:
        self._go(value, 0)
        while self._todo:
            current, shift = self._todo.pop()
            for usage in current.uses():
                self._use(usage.node, usage.idx, shift)
        return self._facts

    def _go(self, value: ir.Value | None, shift: int) -> None:
        if value is not None and (value, shift) not in self._seen and abs(shift) < 1 << 20:
            self._seen.add((value, shift))
            self._todo.append((value, shift))

    def _use(self, node: ir.Node, position: int, shift: int) -> None:
        function = self._model.functions.get(node.op_identifier())
        if function is not None:
            if position < len(function.inputs):
                self._go(function.inputs[position], shift)
            return
        role = _STEERING.get((node.op_type, position)) or _reduction_axes(node, position)
        if role is not None:
            self._steer(node, position, role)
        rule = _RULES.get(node.op_type)
        if rule is not None:
            rule(self, node, position, shift)
        self._pass_on(node, position, shift)

    def _steer(self, node: ir.Node, position: int, role: str) -> None:
        self._facts.roles.add(role)
        first = node.inputs[0]
        if position > 0 and first is not None:
            self._facts.steered.append((node, self._shapes.shape(first)))
        kernel = node.inputs[1] if role == "convolved" else None
        if kernel is not None:
            weight = self._shapes.shape(kernel)
            self._facts.channels = weight[1] if weight and isinstance(weight[1], int) else 0

    def _pass_on(self, node: ir.Node, position: int, shift: int) -> None:
        positions = _SAME_ELEMENTS.get(node.op_type, ())
        if positions is None or position in positions:
            for output in node.outputs:
                self._go(output, shift)
        for graph, inner in _body_inputs(node, position):
            self._go(graph.inputs[inner] if inner < len(graph.inputs) else None, shift)

    def index(self, size: Size | None, shift: int) -> None:
        """The input plus ``shift`` indexes something of ``size``."""
        self._facts.roles.add("index")
        self._facts.low = max(self._facts.low, -shift)
        if size is None:
            self._facts.blind = True
        else:
            self._facts.bounds.append(size - shift)

    def gather(self, node: ir.Node, position: int, shift: int) -> None:
        if position == 1:
            self.index(self._size(node, node.attributes.get_int("axis", 0)), shift)

    def scatter_nd(self, node: ir.Node, position: int, shift: int) -> None:
        """GatherND and ScatterND: the last axis of the indices addresses several axes; stay within the smallest."""
        if position != 1 or node.inputs[0] is None:
            return
        batch = node.attributes.get_int("batch_dims", 0)
        data = self._shapes.shape(node.inputs[0])
        indices = self._shapes.shape(node.inputs[1]) if node.inputs[1] is not None else None
        count = indices[-1] if indices else None
        if data is None or not isinstance(count, int):
            self.index(None, shift)
            return
        for size in data[batch : batch + count]:
            self.index(size, shift)

    def one_hot(self, node: ir.Node, position: int, shift: int) -> None:
        if position == 0 and node.inputs[1] is not None:
            depth = self._shapes.elements(node.inputs[1])
            self.index(depth[0] if depth else None, shift)

    def add(self, node: ir.Node, position: int, shift: int) -> None:
        other = node.inputs[1 - position]
        amount = _whole_constant(other)
        if amount is None:
            return
        if node.op_type == "Add":
            self._go(node.outputs[0], shift + amount)
        elif position == 0:
            self._go(node.outputs[0], shift - amount)
        elif amount == 1:
            self._facts.roles.add("mask")  # 1 - x

    def equal(self, node: ir.Node, position: int, shift: int) -> None:
        constant = _constant(node.inputs[1 - position])
        if constant is not None:
            self._facts.compared.append(constant - shift)

    def recurrent(self, node: ir.Node, position: int, shift: int) -> None:
        if position == 4:
            self._lengths(node, 1 if node.attributes.get_int("layout", 0) else 0, shift)

    def reverse(self, node: ir.Node, position: int, shift: int) -> None:
        if position == 1:
            self._lengths(node, node.attributes.get_int("time_axis", 0), shift)

    def _lengths(self, node: ir.Node, axis: int, shift: int) -> None:
        self._facts.roles.add("lengths")
        size = self._size(node, axis)
        self.index(None if size is None else size + 1, shift)
        self._facts.low = max(self._facts.low, 1 - shift)

    def regions(self, node: ir.Node, position: int, shift: int) -> None:
        """RoiAlign: each region names the image of the batch that it lies in."""
        if position == 2:
            self.index(self._size(node, 0), shift)

    def rotary(self, node: ir.Node, position: int, shift: int) -> None:
        tables, positions = ((2, 3), 1) if node.domain else ((1, 2), 3)
        cosines = node.inputs[tables[0]]
        if position == positions and cosines is not None:
            table = self._shapes.shape(cosines)
            self.index(table[0] if table else None, shift)

    def cast(self, node: ir.Node, position: int, shift: int) -> None:
        target = ir.DataType(node.attributes.get_int("to", 0))
        if target == ir.DataType.BOOL:
            self._facts.roles.add("mask")
        elif target.is_floating_point():
            self._facts.roles.add("to-float")

    def _size(self, node: ir.Node, axis: int) -> Size | None:
        data = node.inputs[0]
        shape = None if data is None else self._shapes.shape(data)
        return shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None


_RULES: dict[str, Callable[[_Walk, ir.Node, int, int], None]] = {
    "Gather": _Walk.gather,
    "GatherElements": _Walk.gather,
    "ScatterElements": _Walk.gather,
    "Scatter": _Walk.gather,
    "GatherND": _Walk.scatter_nd,
    "ScatterND": _Walk.scatter_nd,
    "OneHot": _Walk.one_hot,
    "Add": _Walk.add,
    "Sub": _Walk.add,
    "Equal": _Walk.equal,
    "LSTM": _Walk.recurrent,
    "GRU": _Walk.recurrent,
    "RNN": _Walk.recurrent,
    "ReverseSequence": _Walk.reverse,
    "RotaryEmbedding": _Walk.rotary,
    "RoiAlign": _Walk.regions,
    "Cast": _Walk.cast,
}


def _reduction_axes(node: ir.Node, position: int) -> str | None:
    return "axes" if position == 1 and node.op_type.startswith("Reduce") else None


def _body_inputs(node: ir.Node, position: int) -> Iterator[tuple[ir.Graph, int]]:
    """Body inputs of a Loop or Scan that take the node's input at ``position``."""
    if node.op_type not in ("Loop", "Scan") or "body" not in node.attributes:
        return
    body = node.attributes["body"].as_graph()
    if node.op_type == "Scan" or position >= 2:
        yield body, position


def _constant(value: ir.Value | None) -> float | None:
    """The element of a constant scalar."""
    if value is None:
        return None
    tensor = value.const_value
    producer = value.producer()
    if tensor is None and producer is not None and producer.op_type == "Constant":
        attribute = producer.attributes.get("value")
        tensor = attribute.as_tensor() if attribute is not None else None
        if "value_int" in producer.attributes:
            return producer.attributes["value_int"].as_int()
        if "value_float" in producer.attributes:
            return producer.attributes["value_float"].as_float()
    if tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
        return None
    return float(tensor.numpy().reshape(-1)[0])


def _whole_constant(value: ir.Value | None) -> int | None:
    constant = _constant(value)
    return int(constant) if constant is not None and constant == int(constant) else None
