"""Which values of a model are rounded to a narrow float, and which operators that leaves alone.

An *arithmetic operator* (matrix product, convolution, attention, recurrence) reads its large operands narrow. Two more
kinds of values follow from that, because nothing is lost by it that is not lost already, and memory is saved:

* what such an operand is moved from (Reshape, Transpose, Gather, MaxPool, …): rounding before or after is the same;
* the second operand of a sum of two such results, which no kernel can keep in registers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import bodies, is_onnx, tensor_of

OPERANDS: dict[str, tuple[int, ...]] = {
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "Conv": (0, 1),
    "ConvTranspose": (0, 1),
    "Attention": (0, 1, 2),
    "LSTM": (0, 1, 2),
    "GRU": (0, 1, 2),
    "RNN": (0, 1, 2),
}
"""Arithmetic operators, with the inputs that are read narrow; biases, masks and states stay as they are."""

MOVEMENT = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Concat", "Split", "Identity"}
)
"""Operators that only move elements, of any type."""

COMMUTING = MOVEMENT | {"MaxPool"}
"""Operators that give the same whether their operand is rounded before or their result after."""

POINTWISE = frozenset(
    {"Add", "Sub", "Mul", "Div", "Min", "Max", "Relu", "LeakyRelu", "PRelu", "Clip", "Gelu", "Tanh", "Sigmoid"}
    | {"HardSwish", "HardSigmoid", "Swish", "Mish", "Elu", "Softplus", "Neg", "Abs"}
)
"""Operators that a rounded operand goes into as well as another."""

SIZES = frozenset({"Shape", "Size"})
ANGLES = frozenset({"Sin", "Cos"})

SMALLEST_TABLE = 1024
"""Elements from which a table that is only looked up is worth storing narrow."""

_REACH = 8
"""Operators followed from a product to the sine of its result."""


@dataclasses.dataclass
class Choice:
    """What is to be narrow.

    Attributes:
        operators: Arithmetic operators that read their operands narrow.
        values: Values that are rounded.
        kept: Arithmetic operators that stay as they are, with the reason.
    """

    operators: list[ir.Node] = dataclasses.field(default_factory=list)
    values: set[ir.Value] = dataclasses.field(default_factory=set)
    kept: list[tuple[ir.Node, str]] = dataclasses.field(default_factory=list)


def choose(model: ir.Model, *, wide: Collection[ir.Value] = (), why: str = "", kinds: Collection[str] = ()) -> Choice:
    """Choose the values of ``model`` to round.

    Args:
        model: The model; its shapes should be known.
        wide: Values that must not be rounded.
        why: The reason for those.
        kinds: Arithmetic operators to choose from, and nothing but what they read; all when empty.
    """
    choice = Choice()
    nodes = list(all_nodes(model.graph))
    for node in nodes:
        operands = operands_of(node) if not kinds or node.op_type in kinds else []
        if not operands:
            continue
        reason = why if any(value in wide for value in operands) else _reason_against(node)
        if reason:
            choice.kept.append((node, reason))
            continue
        choice.operators.append(node)
        choice.values.update(operands)
    if not kinds:
        choice.values.update(value for value in _looked_up(nodes) if value not in wide)
        choice.values.update(value for value in _second_addends(nodes, choice) if value not in wide)
    _follow_movement(nodes, choice.values, wide)
    return choice


def all_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """Nodes of ``graph``, each followed by those of its bodies."""
    for node in graph:
        yield node
        for body in bodies(node):
            yield from all_nodes(body)


def operands_of(node: ir.Node) -> list[ir.Value]:
    """Operands of an arithmetic operator on float32 that are to be narrow; none for any other node."""
    if not is_onnx(node, *OPERANDS):
        return []
    operands = [node.inputs[n] for n in OPERANDS[node.op_type] if n < len(node.inputs)]
    found = [value for value in operands if value is not None]
    return found if all(value.dtype == ir.DataType.FLOAT for value in found) else []


def is_storable(value: ir.Value) -> bool:
    """Whether a narrow form can take the place of ``value`` for all who read it."""
    return value.dtype == ir.DataType.FLOAT and not value.is_graph_output()


def _reason_against(node: ir.Node) -> str:
    """Why an arithmetic operator should stay as it is, or ""."""
    if is_onnx(node, "MatMul", "Gemm") and _depth(node) == 1:
        return "an outer product has nothing to sum, and rounding would cost digits for no speed"
    if is_onnx(node, "MatMul", "Gemm") and _feeds_angles(node.outputs[0], _REACH):
        return "the sine and cosine of its result need all digits"
    return ""


def _depth(node: ir.Node) -> int | None:
    """Length of the sums of a product, when known."""
    left = node.inputs[0]
    if left is None or left.shape is None or not len(left.shape):
        return None
    across = is_onnx(node, "Gemm") and node.attributes.get_int("transA", 0) == 1
    extent = left.shape[0 if across else -1]
    return extent if isinstance(extent, int) else None


def _feeds_angles(value: ir.Value, reach: int) -> bool:
    for user in value.consumers():
        if is_onnx(user, *ANGLES):
            return True
        if reach and is_onnx(user, "Add", "Mul", *MOVEMENT) and _feeds_angles(user.outputs[0], reach - 1):
            return True
    return False


def _looked_up(nodes: list[ir.Node]) -> Iterator[ir.Value]:
    """Results of looking rows up in a large constant table."""
    for node in nodes:
        table = node.inputs[0] if is_onnx(node, "Gather") else None
        tensor = tensor_of(table)
        if tensor is not None and tensor.size >= SMALLEST_TABLE and is_storable(node.outputs[0]):
            yield node.outputs[0]


def _second_addends(nodes: list[ir.Node], choice: Choice) -> Iterator[ir.Value]:
    """Results of arithmetic operators that are needed only to be combined with a later such result."""
    made: dict[ir.Value, int] = {}
    arithmetic = set(choice.operators)
    for position, node in enumerate(nodes):
        if node in arithmetic:
            made[node.outputs[0]] = position
            continue
        if not is_onnx(node, *POINTWISE):
            continue
        sources = [value for value in node.inputs if value is not None and value in made]
        if not sources:
            continue
        last = max(sources, key=lambda value: made[value])
        made[node.outputs[0]] = made[last]
        for value in sources:
            if value is not last and is_storable(value) and value.consumers() == (node,):
                yield value


def _follow_movement(nodes: list[ir.Node], values: set[ir.Value], wide: Collection[ir.Value]) -> None:
    """Add what narrow values are moved from, last first."""
    for node in reversed(nodes):
        if not moves_narrow(node, values):
            continue
        sources = moved_inputs(node)
        if any(value in wide for value in sources):
            continue
        if all(value in values or _may_be_rounded(value, values) for value in sources):
            values.update(sources)


def moves_narrow(node: ir.Node, values: Collection[ir.Value]) -> bool:
    """Whether all results of a node that rounding commutes with are to be narrow."""
    if not is_onnx(node, *COMMUTING):
        return False
    results = [value for value in node.outputs if value.uses() or value.is_graph_output()]
    if is_onnx(node, "MaxPool") and len(results) > 1:
        return False
    return bool(results) and all(value in values and not value.is_graph_output() for value in results)


def moved_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs whose elements a node of :data:`COMMUTING` moves."""
    inputs = node.inputs if is_onnx(node, "Concat") else node.inputs[:1]
    return [value for value in inputs if value is not None]


def _may_be_rounded(value: ir.Value, values: Collection[ir.Value]) -> bool:
    if not is_storable(value):
        return False
    if tensor_of(value) is not None:
        return True
    return all(_takes_rounded(user, value, values) for user in value.consumers())


def _takes_rounded(user: ir.Node, value: ir.Value, values: Collection[ir.Value]) -> bool:
    if is_onnx(user, *POINTWISE, *SIZES) or moves_narrow(user, values):
        return True
    return value in operands_of(user) and value in values
