"""Runs branches that share their weights as one branch over a larger batch.

    Norm(Conv(a, W)), Norm(Conv(b, W))  →  x = Norm(Conv(Concat(a, b), W)), Split(x)

The towers of a siamese model do the same to two inputs; together they read their weights once, and half as many
operators run. The branches must be alike operator by operator, treat samples independently, and not read one another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Iterator, Sequence

import onnx_ir as ir

from mmopt.analysis.dims import Size
from mmopt.analysis.operators import REDUCTIONS
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.editing import axes_of, constant_ints, erase, integer, is_onnx, replace, tensor_of
from mmopt.transforms.canonicalize.rewriting import Rewriter
from mmopt.transforms.raising.building import Builder
from mmopt.transforms.rewrite.drop_expands import SIMPLE

_ANY = frozenset({*SIMPLE, "Clip", "Gelu", "HardSwish", "Mish", "Swish", "Cast"})
_SAMPLES = frozenset(
    {
        *("AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "GlobalAveragePool", "GlobalMaxPool"),
        *("InstanceNormalization", "MaxPool"),
    }
)
_BINARY = ("Add", "Sub", "Mul", "Div", "Min", "Max", "Pow")
_OVER_AXIS = ("LayerNormalization", "RMSNormalization", "Softmax", "LogSoftmax", "Concat", "Flatten")
_LAYERS = {"Conv": 0, "ConvTranspose": 0, "Gemm": 0, "MatMul": 0, "Gather": 1}
"""Operators with weights that a branch can start from, and which of their inputs varies."""

Lanes = tuple[ir.Value, ...]


@dataclasses.dataclass
class _Region:
    """Nodes that do the same in each of several lanes.

    Attributes:
        rows: For each operator its node in every lane.
        paired: For each value of the first lane what stands for it in every lane.
        entries: Values of the first lane that come from outside.
    """

    rows: list[tuple[ir.Node, ...]]
    paired: dict[ir.Value, Lanes]
    entries: list[ir.Value]

    def __post_init__(self) -> None:
        self.members = {node for row in self.rows for node in row}

    def add(self, row: tuple[ir.Node, ...]) -> None:
        self.rows.append(row)
        self.members.update(row)
        self.paired[row[0].outputs[0]] = tuple(node.outputs[0] for node in row)

    def exits(self) -> list[Lanes]:
        """Results that are needed outside in some lane."""
        lanes = [tuple(node.outputs[0] for node in row) for row in self.rows]
        return [values for values in lanes if any(self._leaves(value) for value in values)]

    def _leaves(self, value: ir.Value) -> bool:
        return value.is_graph_output() or any(user not in self.members for user, _ in value.uses())

    def pays(self) -> bool:
        saved = (len(self.rows[0]) - 1) * len(self.rows)
        return saved > len(self.entries) + len(self.exits())


@dataclasses.dataclass(frozen=True)
class BatchBranches(Pass):
    """Runs branches that share their weights as one branch over a larger batch."""

    fidelity = Fidelity.ROUNDING

    def run(self, module: Module, context: PassContext) -> bool:
        """Batch what can be, the earliest branches first."""
        rewriter, count = Rewriter(module, ()), 0
        if module.model.opset_imports.get("", 0) < 18:
            return False
        while (region := next(_regions(module.graph, rewriter), None)) is not None:
            _batch(region, module.graph, rewriter)
            module.graph.sort()
            count += 1
        if count:
            self.remark(context, "applied", "", f"batch-branches: {count} {'place' if count == 1 else 'places'}.")
        return count > 0


def _regions(graph: ir.Graph, rewriter: Rewriter) -> Iterator[_Region]:
    """Regions worth batching."""
    depth: dict[ir.Node, int] = {}
    groups: dict[Hashable, list[ir.Node]] = {}
    for node in graph:
        makers = [value.producer() for value in node.inputs if value is not None]
        depth[node] = 1 + max((depth.get(maker, 0) for maker in makers if maker is not None), default=0)
        place = _LAYERS.get(node.op_type)
        if place is None or not is_onnx(node, node.op_type) or not _per_sample(node, {node.inputs[place]}, rewriter):
            continue
        groups.setdefault((depth[node], _likeness(node, (place,)), _shape(node.inputs[place], rewriter)), []).append(
            node
        )
    for members in groups.values():
        place = _LAYERS[members[0].op_type]
        lanes = tuple(value for node in members if (value := node.inputs[place]) is not None)
        if len(set(lanes)) < 2 or len(set(lanes)) < len(members) or _shape(lanes[0], rewriter) is None:
            continue
        region = _Region([], {lanes[0]: lanes}, [lanes[0]])
        region.add(tuple(members))
        _grow(region, graph, rewriter)
        if region.pays() and not _reads_itself(region):
            yield region


def _shape(value: ir.Value | None, rewriter: Rewriter) -> tuple[Size, ...] | None:
    shape = rewriter.shape(value)
    known = tuple(size for size in shape or () if size is not None)
    return known if shape is not None and len(known) == len(shape) and known else None


def _likeness(node: ir.Node, varying: Collection[int]) -> Hashable:
    """What nodes of one row have in common: everything but the inputs at ``varying``."""
    attributes = tuple(sorted((name, str(attribute.value)) for name, attribute in node.attributes.items()))
    constants = tuple(None if place in varying else value for place, value in enumerate(node.inputs))
    return (node.op_type, node.domain, attributes, constants)


def _grow(region: _Region, graph: ir.Graph, rewriter: Rewriter) -> None:
    """Take in what reads nothing but the region and constants, and has its like in every lane."""
    todo = [user for user, _ in region.rows[0][0].outputs[0].uses()]
    while todo:
        node = todo.pop(0)
        if node in region.members or node.graph is not graph:
            continue
        row = _row(node, region, rewriter)
        if row is not None:
            region.add(row)
            todo += [user for user, _ in node.outputs[0].uses()]


def _row(node: ir.Node, region: _Region, rewriter: Rewriter) -> tuple[ir.Node, ...] | None:
    varying = {place: region.paired[v] for place, v in enumerate(node.inputs) if v in region.paired and v is not None}
    rest = [value for place, value in enumerate(node.inputs) if place not in varying and value is not None]
    if not varying or any(tensor_of(value) is None for value in rest):
        return None
    if not _per_sample(node, {lanes[0] for lanes in varying.values()}, rewriter):
        return None
    row, wanted = [node], _likeness(node, varying)
    place, lanes = next(iter(varying.items()))
    for lane, value in enumerate(lanes[1:], 1):
        alike = (
            user
            for user, index in value.uses()
            if index == place and user not in region.members and user not in row and user.graph is node.graph
            if all(user.inputs[n : n + 1] == (values[lane],) for n, values in varying.items())
            if _likeness(user, varying) == wanted
        )
        found = next(alike, None)
        if found is None:
            return None
        row.append(found)
    return tuple(row)


def _reads_itself(region: _Region) -> bool:
    """Whether what goes into one lane depends on another."""
    todo = [value.producer() for value in region.entries for value in region.paired[value]]
    seen: set[ir.Node] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node in region.members:
            return True
        seen.add(node)
        todo += [value.producer() for value in node.inputs if value is not None]
    return False


def _per_sample(node: ir.Node, varying: Collection[ir.Value | None], rewriter: Rewriter) -> bool:
    """Whether each sample (axis 0) of the result depends on that sample of the varying inputs alone."""
    result = _shape(node.outputs[0], rewriter)
    shapes = [_shape(value, rewriter) for value in varying]
    if result is None or any(shape is None or shape[0] != result[0] for shape in shapes):
        return False
    if any(output.name for output in node.outputs[1:]) or any(a.is_ref() for a in node.attributes.values()):
        return False
    if is_onnx(node, *_LAYERS, "Attention"):
        return _layer_per_sample(node, varying, rewriter)
    if is_onnx(node, *_BINARY):
        return all(_aligned(value, value in varying, len(result), rewriter) for value in node.inputs)
    return is_onnx(node, *_ANY, *_SAMPLES) or _shapes_per_sample(node, rewriter)


def _layer_per_sample(node: ir.Node, varying: Collection[ir.Value | None], rewriter: Rewriter) -> bool:
    place = _LAYERS.get(node.op_type, 0)
    if node.inputs[place] not in varying:
        return False
    if is_onnx(node, "Attention"):
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        shape = rewriter.shape(mask) or ()
        fits = mask is None or (len(shape) == 4 if mask in varying else len(shape) < 4 or shape[0] == 1)
        return fits and len(node.inputs) <= 4 and all(value in varying for value in node.inputs[:3])
    others = [value for n, value in enumerate(node.inputs) if n != place and value is not None]
    if any(tensor_of(value) is None for value in others):
        return False
    if is_onnx(node, "Gemm"):
        added = (rewriter.shape(node.inputs[2]) or ()) if len(node.inputs) > 2 else ()
        return not integer(node, "transA", 0) and (len(added) < 2 or added[0] == 1)
    if is_onnx(node, "Gather"):
        return integer(node, "axis", 0) == 0
    return not is_onnx(node, "MatMul") or len(rewriter.shape(node.inputs[1]) or ()) == 2


def _aligned(value: ir.Value | None, varies: bool, rank: int, rewriter: Rewriter) -> bool:
    """Whether the sample axis of an operand, if it has one, is that of the result."""
    shape = rewriter.shape(value)
    if shape is None:
        return False
    return len(shape) == rank if varies else len(shape) < rank or shape[0] == 1


def _shapes_per_sample(node: ir.Node, rewriter: Rewriter) -> bool:
    """The same for operators that move axes or reduce some."""
    before, after = rewriter.shape(node.inputs[0]) or (), rewriter.shape(node.outputs[0]) or ()
    if is_onnx(node, *_OVER_AXIS):
        axis = integer(node, "axis", 1 if node.op_type in ("Concat", "Flatten") else -1)
        return axis is not None and axis % len(before) > 0
    if is_onnx(node, "Transpose"):
        return "perm" in node.attributes and node.attributes["perm"].as_ints()[0] == 0
    if is_onnx(node, "Reshape"):
        target = constant_ints(node.inputs[1])
        return not integer(node, "allowzero", 0) and target is not None and 0 not in target[1:]
    axes, rank = axes_of(node), len(after if is_onnx(node, "Unsqueeze") else before)
    if is_onnx(node, *REDUCTIONS, "Squeeze", "Unsqueeze"):
        return axes is not None and bool(axes) and all(axis % rank > 0 for axis in axes)
    return False


def _batch(region: _Region, graph: ir.Graph, rewriter: Rewriter) -> None:
    """Put one lane over all samples in place of the lanes."""
    count, batched = len(region.rows[0]), dict[ir.Value, ir.Value]()
    with Builder(rewriter, region.rows[0][0]) as builder:
        for value in region.entries:
            shape = _larger(builder.shape(value), count)
            lanes = region.paired[value]
            batched[value] = builder.node("Concat", lanes, shape, rewriter.dtype(value), axis=0)
        for row in region.rows:
            node, result = row[0], row[0].outputs[0]
            inputs = [batched.get(value, value) if value is not None else None for value in node.inputs]
            if is_onnx(node, "Reshape"):
                inputs[1] = builder.ints([0, *(constant_ints(node.inputs[1]) or ())[1:]])
            shape = _larger(builder.shape(result), count)
            batched[result] = builder.node(node.op_type, inputs, shape, rewriter.dtype(result))
            made = batched[result].producer()
            if made is not None:
                made.attributes.update(node.attributes)
    for lanes in region.exits():
        _split(batched[lanes[0]], lanes, graph, rewriter)
    erase(node for row in reversed(region.rows) for node in row)


def _larger(shape: Sequence[Size], count: int) -> tuple[Size, ...]:
    return (shape[0] * count, *shape[1:])


def _split(value: ir.Value, lanes: Lanes, graph: ir.Graph, rewriter: Rewriter) -> None:
    """Hand each lane its samples."""
    names, made = rewriter.names, value.producer()
    outputs = [ir.Value(name=names.fresh(f"{lane.name}_part")) for lane in lanes]
    attributes = [ir.AttrInt64("axis", 0), ir.AttrInt64("num_outputs", len(lanes))]
    node = ir.Node("", "Split", [value], attributes, outputs=outputs, name=names.fresh(f"{value.name}_Split"))
    if made is not None:
        node.metadata_props.update(made.metadata_props)
        graph.insert_after(made, node)
    for old, new in zip(lanes, outputs, strict=True):
        new.type, new.shape = old.type, old.shape
        rewriter.facts.set(new, rewriter.facts.fact(old))
        replace(old, new)
