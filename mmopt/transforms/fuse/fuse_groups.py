"""Puts operators that one kernel can compute together into model-local functions of the domain ``mmopt.fused``.

    c = Conv(x, w); a = Add(c, r); y = Relu(a)    →    y = mmopt.fused.Conv_Add_Relu(x, w, r)

The function's body is the subgraph it replaces, so the model stays standard ONNX and means the same in any runtime; a
target maps the function to one kernel. Groups grow in topological order. An *anchor* (matrix product, convolution,
attention) takes the elementwise operators that only its result needs; a *row* operator (softmax, normalization) takes
elementwise operators before and after it; elementwise operators alone form an *island*. A group never computes anything
twice. It takes the place of its last node, so no node that stands before may need what the group makes: this rules out
cycles.

Attention reads its operands through reshapes, transpositions and slices, and writes heads behind the sequence, so it
takes such operators along when nothing else needs their results, and the transposition that puts its heads in place.

Narrow values stay narrow between kernels: a cast from bfloat16 or float16 and a DequantizeLinear go where they are read
(into several groups, when several read them; this costs an instruction), the cast or QuantizeLinear behind a result
goes with what makes it.

    d = DequantizeLinear(q, s); c = Conv(d, w); y = QuantizeLinear(c, t)    →    y = mmopt.fused.…(q, s, w, t)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Sequence

import onnx_ir as ir

from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.editing import Names
from mmopt.transforms.fuse.outlining import Outliner

ARITHMETIC = frozenset(
    {
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Pow",
        "Min",
        "Max",
        "Neg",
        "Abs",
        "Sign",
        "Reciprocal",
        "Sqrt",
        "Exp",
        "Log",
        "Erf",
        "Sin",
        "Cos",
        "Floor",
        "Ceil",
        "Round",
    }
)
ACTIVATIONS = frozenset(
    {
        "Tanh",
        "Sigmoid",
        "Relu",
        "LeakyRelu",
        "PRelu",
        "Clip",
        "Gelu",
        "HardSwish",
        "HardSigmoid",
        "Softplus",
        "Softsign",
        "Mish",
        "Swish",
        "Elu",
        "Selu",
        "Celu",
        "ThresholdedRelu",
    }
)
CHOICES = frozenset(
    {
        "Cast",
        "QuantizeLinear",
        "Where",
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Not",
        "And",
        "Or",
        "Xor",
        "IsNaN",
        "IsInf",
    }
)
ELEMENTWISE = ARITHMETIC | ACTIVATIONS | CHOICES
ANCHORS = frozenset({"MatMul", "Gemm", "Conv", "Attention"})
VIEWS = frozenset({"Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that only move elements; attention reads its operands through them."""
HEADS_LAST = (0, 2, 1, 3)
"""The transposition of attention's result that gives every step its heads."""
READERS = frozenset({"ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "LSTM", "GRU", "RNN"})
"""Operators that only take along what widens their operands and narrows their result."""
NARROW = frozenset({ir.DataType.BFLOAT16, ir.DataType.FLOAT16})
ROWS = frozenset({"Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization"})


@dataclasses.dataclass(eq=False)
class Group:
    """Nodes of one kernel, in topological order, and what kind of operator leads them."""

    nodes: list[ir.Node]
    kind: str


@dataclasses.dataclass(frozen=True)
class FuseGroups(Pass):
    """Form fusion groups.

    Attributes:
        max_nodes: Largest number of operators in a group.
    """

    fidelity = Fidelity.EXACT

    max_nodes: int = 16

    def run(self, module: Module, context: PassContext) -> bool:
        """Outline every group of at least two operators, in the main graph and in the bodies of its nodes."""
        outliner = Outliner(module)
        names = Names(module.model)
        changed = [self._fuse(graph, outliner, names, context) for graph in list(module.model.graphs())]
        return any(changed)

    def _fuse(self, graph: ir.Graph, outliner: Outliner, names: Names, context: PassContext) -> bool:
        """Group the nodes of one graph. What one round makes may allow more in the next."""
        missed: dict[tuple[str, str], None] = {}
        changed = False
        while True:
            split = _share_out(graph, names)
            changed = changed or split
            grouping = _Grouping(graph, self.max_nodes)
            groups = [g for g in grouping.groups() if len(g.nodes) > 1]
            missed |= dict.fromkeys((str(node.name), reason) for node, reason in grouping.missed)
            if not groups:
                break
            changed = True
            for group in groups:
                call = outliner.outline(graph, group.nodes, _title(group.nodes))
                self.remark(context, "applied", str(call.name), f"{len(group.nodes)} operators in one kernel")
        for name, reason in missed:
            self.remark(context, "missed", name, reason)
        return changed


class _Grouping:
    """Assigns nodes to groups."""

    def __init__(self, graph: ir.Graph, max_nodes: int) -> None:
        self.graph, self.max_nodes = graph, max_nodes
        self.position = {inner: n for n, node in enumerate(graph) for inner in (node, *_inside(node))}
        self.group_of: dict[ir.Node, Group] = {}
        self.missed: list[tuple[ir.Node, str]] = []

    def groups(self) -> list[Group]:
        for node in self.graph:
            kind = _kind(node)
            if kind is None or is_widening(node):
                continue
            group = self._join(node, kind) if kind in ("row", "elementwise", "heads") else None
            if group is None and kind == "heads":
                continue
            if group is None:
                group = Group([], kind)
            for source in self._sources(node):
                group.nodes.append(source)
                self.group_of[source] = group
            group.nodes.append(node)
            if kind == "row":
                group.kind = "row"
            self.group_of[node] = group
        return list(dict.fromkeys(self.group_of.values()))

    def _sources(self, node: ir.Node) -> list[ir.Node]:
        """What ``node`` takes along of the operators before it."""
        if node.op_type != "Attention":
            return _widened(node)
        return _views_before(node, self.group_of)

    def _join(self, node: ir.Node, kind: str) -> Group | None:
        """The group of one of the node's producers that ``node`` may enter, the youngest first."""
        producers = [v.producer() for v in node.inputs if v is not None]
        candidates = [self.group_of[p] for p in producers if p is not None and p in self.group_of]
        for group in sorted(set(candidates), key=lambda g: -self.position[g.nodes[-1]]):
            reason = self._refusal(group, node, kind)
            if reason is None:
                return group
            self.missed.append((node, reason))
        return None

    def _refusal(self, group: Group, node: ir.Node, kind: str) -> str | None:
        """Why ``node`` cannot enter ``group``."""
        if sum(not is_widening(member) for member in group.nodes) >= self.max_nodes:
            return f"the group of {group.nodes[0].name} is full"
        if kind == "row" and group.kind != "elementwise":
            return f"{node.op_type} cannot follow {group.kind} operators in one kernel"
        if group.kind == "reader" and not is_narrowing(node):
            return f"{node.op_type} cannot follow {group.nodes[-1].op_type} in one kernel"
        wanted = node.outputs[0].shape
        last = group.nodes[-1].outputs[0]
        if kind == "heads":
            if not _sole_use(last, node):
                return f"the result of {group.nodes[-1].name} is needed elsewhere too"
        elif not _same_extents(wanted, last.shape) and not (_is_unary(node) and node.inputs[0] is last):
            return f"its shape {wanted} differs from that of {group.nodes[-1].name}"
        fixed = group.kind in ("anchor", "reader") and not is_narrowing(node)
        if fixed and not all(self._stays(group, value, node) for value in _made(group, node)):
            return f"the result of {group.nodes[-1].name} is needed elsewhere too"
        before = self._needed_before(group, node)
        return None if before is None else f"{before.name}, which stands before it, needs a result of the group"

    def _stays(self, group: Group, value: ir.Value, node: ir.Node) -> bool:
        """Whether nothing but the group needs ``value`` once ``node`` is in it and, after it, the elementwise operators
        up to the one where all paths from ``value`` meet again, as in x · sigmoid(x)."""
        before = set(group.nodes)
        inside = before | {node}
        while waiting := _users(value) - inside:
            reached = {user for made in inside - before for user in _users(made.outputs[0])} - inside
            first = min(waiting | reached, key=lambda user: self.position[user])
            known = first.graph is self.graph and _kind(first) == "elementwise" and not is_narrowing(first)
            # A call made before of what nobody needs has no outputs; it is not elementwise.
            if not known or not _same_extents(first.outputs[0].shape, value.shape) or len(inside) >= self.max_nodes:
                return False
            inside.add(first)
        passed = sorted(inside - before, key=lambda member: self.position[member])[:-1]
        made = [value, *(member.outputs[0] for member in passed)]
        return all(_users(v) <= inside and not v.is_graph_output() for v in made)

    def _needed_before(self, group: Group, node: ir.Node) -> ir.Node | None:
        """A node outside the group that needs one of its results and stands before ``node``."""
        members = set(group.nodes)
        for value in (o for n in group.nodes for o in n.outputs):
            for user, _ in value.uses():
                if user not in members and self.position[user] < self.position[node]:
                    return user
        return None


def _inside(node: ir.Node) -> Iterator[ir.Node]:
    """Nodes of the graphs a node holds, at any depth."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from (inner for graph in attribute.as_graphs() for inner in graph.all_nodes())


def is_widening(node: ir.Node) -> bool:
    """Whether a node makes ordinary floats of narrow ones or of quantized integers, element by element."""
    if node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
        return False
    if node.op_type == "DequantizeLinear":
        return True
    wide = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
    return node.op_type == "Cast" and node.inputs[0].dtype in NARROW and node.outputs[0].dtype in wide


def is_narrowing(node: ir.Node) -> bool:
    """Whether a node makes narrow floats or quantized integers of ordinary floats."""
    if node.domain not in ("", "ai.onnx"):
        return False
    return node.op_type == "QuantizeLinear" or (node.op_type == "Cast" and node.outputs[0].dtype in NARROW)


def _widened(node: ir.Node) -> list[ir.Node]:
    """Widening nodes that only ``node`` needs."""
    sources = (value.producer() for value in node.inputs if value is not None and _sole_use(value, node))
    return list(dict.fromkeys(p for p in sources if p is not None and p.graph is node.graph and is_widening(p)))


def _views_before(node: ir.Node, taken: Container[ir.Node]) -> list[ir.Node]:
    """Operators that move or widen the elements of the operands and that only ``node`` needs, in topological order.

    Those in ``taken`` belong to other groups.
    """
    members = {node}
    pending = [value for value in node.inputs if value is not None]
    while pending:
        source = pending.pop().producer()
        if source is None or source in members or source in taken or source.graph is not node.graph:
            continue
        moves = source.domain in ("", "ai.onnx") and source.op_type in VIEWS
        private = all(not o.is_graph_output() and members >= {u for u, _ in o.uses()} for o in source.outputs)
        if (moves or is_widening(source)) and private:
            members.add(source)
            pending.extend(v for v in source.inputs[:1] if v is not None)
    return [n for n in node.graph or () if n in members and n is not node]


def _places_heads(node: ir.Node) -> bool:
    """Whether a node is a transposition that attention can write its result in."""
    source = node.inputs[0].producer() if node.op_type == "Transpose" and node.inputs[0] is not None else None
    order = node.attributes.get("perm")
    known = source is not None and source.op_type == "Attention" and source.graph is node.graph
    return known and order is not None and tuple(order.as_ints()) == HEADS_LAST


def _share_out(graph: ir.Graph, names: Names) -> bool:
    """Give every reader that forms groups a widening node of its own; returns whether any was shared before."""
    shared = [node for node in graph if is_widening(node) and not node.outputs[0].is_graph_output()]
    changed = False
    for node in shared:
        users = list(dict.fromkeys(user for user, _ in node.outputs[0].uses()))
        takers = [user for user in users if user.graph is graph and not is_widening(user) and _kind(user) is not None]
        for user in takers[1:] if len(takers) == len(users) else takers:
            _read_copy(user, node, names)
            changed = True
    return changed


def _read_copy(user: ir.Node, node: ir.Node, names: Names) -> None:
    """Have ``user`` read the result of a copy of ``node``."""
    old = node.outputs[0]
    made = ir.Value(name=names.fresh(str(old.name)), type=old.type, shape=old.shape)
    inputs, attributes = list(node.inputs), list(node.attributes.values())
    name = names.fresh(node.name or node.op_type)
    copy = ir.Node(node.domain, node.op_type, inputs, attributes, outputs=[made], name=name)
    copy.metadata_props.update(node.metadata_props)
    assert node.graph is not None
    node.graph.insert_after(node, copy)
    for position, operand in enumerate(user.inputs):
        if operand is old:
            user.replace_input_with(position, made)


def _kind(node: ir.Node) -> str | None:
    if node.domain not in ("", "ai.onnx") or not node.outputs:
        return None
    if node.op_type in READERS:
        return "reader"
    if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return None
    shape = node.outputs[0].shape
    if shape is None:
        return "anchor" if node.op_type in ANCHORS else "elementwise" if _is_unary(node) else None
    if len(shape) == 0:
        return None
    if node.op_type in ROWS:
        return "row" if _last_axis(node) else None
    if node.op_type in ANCHORS:
        return "anchor"
    if _places_heads(node):
        return "heads"
    if node.op_type in ELEMENTWISE and _is_data(node):
        return "elementwise"
    return None


def _is_unary(node: ir.Node) -> bool:
    """Whether a node has one operand, whose shape its result has, known or not."""
    return node.op_type in ELEMENTWISE and node.op_type != "Cast" and len(node.inputs) == 1


def _last_axis(node: ir.Node) -> bool:
    axis = node.attributes.get("axis")
    rank = len(node.outputs[0].shape or ())
    return axis is None or axis.as_int() in (-1, rank - 1)


def _is_data(node: ir.Node) -> bool:
    """Whether a node computes on activations rather than on sizes."""
    dtype = node.outputs[0].dtype
    shape = node.outputs[0].shape
    small = shape is not None and len(shape) <= 1
    return dtype is not None and not (small and dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL))


def _same_extents(left: ir.Shape | None, right: ir.Shape | None) -> bool:
    if left is None or right is None or len(left) != len(right):
        return False
    return all(_extent(a) is not None and _extent(a) == _extent(b) for a, b in zip(left, right, strict=True))


def _extent(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


def _title(nodes: Sequence[ir.Node]) -> str:
    """What a group's function is called: by its first operators that compute."""
    named = [n.op_type for n in nodes if not is_widening(n) and n.op_type not in VIEWS]
    return "_".join((named or [n.op_type for n in nodes])[:6])


def _made(group: Group, node: ir.Node) -> list[ir.Value]:
    members = set(group.nodes)
    return [v for v in node.inputs if v is not None and v.producer() in members]


def _users(value: ir.Value) -> set[ir.Node]:
    return {user for user, _ in value.uses()}


def _sole_use(value: ir.Value, node: ir.Node) -> bool:
    return not value.is_graph_output() and {user for user, _ in value.uses()} == {node}
