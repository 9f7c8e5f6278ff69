"""Writes linear layers over sequences as products of matrices, with their bias inside.

    y[b, s, :] = Gelu(x[b, s, :] W + c)  →  y = Reshape(Gelu(Gemm(Reshape(x, [b * s, n]), W, c)), [b, s, m])

Runtimes multiply matrices. Given a batch of sequences they go to rows and back at every product, add the bias in a
pass of its own, and onnxruntime normalizes a sum of sequences with a kernel slower than the two operators it replaces.
So everything between the products that works on single rows becomes rows too: element-wise operators, normalization
over features, residual sums. Rows stay rows over the longest stretch; at its ends there is one Reshape each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from mmopt.analysis.dims import Size, product
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize.constant_targets import reshape_target
from mmopt.transforms.canonicalize.editing import erase, integer, is_onnx, replace, tensor_of
from mmopt.transforms.canonicalize.rewriting import Rewriter
from mmopt.transforms.portable.write_gemm import WriteGemm
from mmopt.transforms.raising.building import Builder
from mmopt.transforms.rewrite.drop_expands import SIMPLE

_UNARY = frozenset({*SIMPLE, "Gelu", "HardSwish", "Mish", "Swish"})
_BINARY = ("Add", "Sub", "Mul", "Div", "Min", "Max", "Pow")
_NORMS = ("LayerNormalization", "RMSNormalization")


@dataclasses.dataclass(frozen=True)
class FlattenRows(WriteGemm):
    """Writes linear layers over sequences as Gemm of rows."""

    def run(self, module: Module, context: PassContext) -> bool:
        """Flatten every island that pays, then put each bias into its product."""
        rewriter = Rewriter(module, ())
        count = 0
        for graph in module.model.graphs():
            islands = [island for island in _islands(graph, rewriter) if _pays(island)]
            for island in islands:
                _flatten(island, rewriter)
            count += len(islands)
        if not count:
            return False
        self.remark(context, "applied", "", f"flatten-rows: {count} {'island' if count == 1 else 'islands'}.")
        super().run(module, context)
        return True


@dataclasses.dataclass
class _Island:
    """Connected nodes that work on single rows, in the graph's order."""

    nodes: list[ir.Node]

    def __post_init__(self) -> None:
        self.members = set(self.nodes)

    def products(self) -> int:
        return sum(is_onnx(node, "MatMul") for node in self.nodes)

    def entries(self) -> set[ir.Value]:
        """Sequences that come from outside."""
        return {value for node in self.nodes for value in _sequences(node) if value.producer() not in self.members}

    def exits(self) -> list[ir.Value]:
        """Results that are needed outside."""
        return [node.outputs[0] for node in self.nodes if self.leaves(node.outputs[0])]

    def leaves(self, value: ir.Value) -> bool:
        return value.is_graph_output() or any(user not in self.members for user, _ in value.uses())


def _pays(island: _Island) -> bool:
    """A runtime that flattens for itself reshapes twice for each product."""
    return len(island.entries()) + len(island.exits()) < 2 * island.products()


def _islands(graph: ir.Graph, rewriter: Rewriter) -> Iterator[_Island]:
    """Largest connected sets of nodes that work on single rows, less those that only make the border longer."""
    left = {node for node in graph if _works_on_rows(node, rewriter)}
    for node in list(graph):
        if node not in left:
            continue
        found, todo = {node}, [node]
        left.discard(node)
        while todo:
            for neighbour in _neighbours(todo.pop()):
                if neighbour in left and neighbour.graph is graph:
                    left.discard(neighbour)
                    found.add(neighbour)
                    todo.append(neighbour)
        _peel(found)
        yield _Island([member for member in graph if member in found])


def _neighbours(node: ir.Node) -> Iterator[ir.Node]:
    for value in _sequences(node):
        producer = value.producer()
        if producer is not None:
            yield producer
    for user, index in node.outputs[0].uses():
        if user.inputs[index] in _sequences(user):
            yield user


def _peel(found: set[ir.Node]) -> None:
    """Leave out element-wise nodes at the border that read more sequences from outside than they hand on."""
    changed = True
    while changed:
        changed = False
        for node in list(found):
            read = _sequences(node)
            if is_onnx(node, "MatMul") or len(set(read)) < 2 or any(value.producer() in found for value in read):
                continue
            found.discard(node)
            changed = True


def _sequences(node: ir.Node) -> list[ir.Value]:
    """What ``node``, which works on rows, reads besides constants: the first input, of binary operators both."""
    read = node.inputs if is_onnx(node, *_BINARY) else node.inputs[:1]
    return [value for value in read if value is not None and tensor_of(value) is None]


def _works_on_rows(node: ir.Node, rewriter: Rewriter) -> bool:
    """Whether every row of the result depends on that row alone, and both shapes can be written down."""
    result = node.outputs[0]
    shape = _known(rewriter.shape(result))
    if shape is None or len(shape) < 3 or not _kept_by(node, shape, rewriter):
        return False
    shapes = [shape, *(_known(rewriter.shape(value)) for value in _sequences(node))]
    return all(found is not None and found[:-1] == shape[:-1] and _reversible(found) for found in shapes)


def _kept_by(node: ir.Node, shape: tuple[Size, ...], rewriter: Rewriter) -> bool:
    if is_onnx(node, "MatMul"):
        weight = tensor_of(node.inputs[1])
        return weight is not None and len(weight.shape) == 2 and tensor_of(node.inputs[0]) is None
    if is_onnx(node, *_NORMS):
        last = integer(node, "axis", -1) in (-1, len(shape) - 1)
        flat = all(len(rewriter.shape(value) or ()) <= 1 for value in node.inputs[1:] if value is not None)
        return last and flat and not any(output.name for output in node.outputs[1:])
    if is_onnx(node, *_UNARY):
        return all(tensor_of(value) is not None for value in node.inputs[1:] if value is not None)
    if not is_onnx(node, *_BINARY) or len(node.inputs) != 2 or len(_sequences(node)) == 0:
        return False
    return all(_by_feature(value, shape, rewriter) for value in node.inputs)


def _by_feature(value: ir.Value | None, shape: tuple[Size, ...], rewriter: Rewriter) -> bool:
    """Whether ``value`` is a whole sequence, or a constant that is the same for every row."""
    if value is None:
        return False
    found = rewriter.shape(value)
    return found is not None and (len(found) <= 1 if tensor_of(value) is not None else tuple(found) == shape)


def _known(shape: tuple[Size | None, ...] | None) -> tuple[Size, ...] | None:
    known = tuple(size for size in shape or () if size is not None)
    return known if shape is not None and len(known) == len(shape) else None


def _flat(shape: tuple[Size, ...]) -> tuple[Size, ...]:
    return (product(shape[:-1]), shape[-1])


def _reversible(shape: tuple[Size, ...]) -> bool:
    there, back = reshape_target(shape, _flat(shape)), reshape_target(_flat(shape), shape)
    return there is not None and back is not None


def _flatten(island: _Island, rewriter: Rewriter) -> None:
    rows: dict[ir.Value, ir.Value] = {}
    for node in island.nodes:
        with Builder(rewriter, node) as builder:
            for value in _sequences(node):
                if value not in rows:
                    rows[value] = builder.reshape(value, _flat(builder.shape(value)))
            rows[node.outputs[0]] = _on_rows(node, rows, builder)
    for value in island.exits():
        _hand_on(value, rows[value], island, rewriter)
    erase(reversed(island.nodes))


def _on_rows(node: ir.Node, rows: dict[ir.Value, ir.Value], builder: Builder) -> ir.Value:
    inputs = [None if value is None else rows.get(value, value) for value in node.inputs]
    attributes = {name: attribute for name, attribute in node.attributes.items() if name != "axis"}
    result, shape = node.outputs[0], _flat(builder.shape(node.outputs[0]))
    output = builder.node(node.op_type, inputs, shape, builder.rewriter.dtype(result))
    made = output.producer()
    if made is not None:
        made.attributes.update(attributes)
    return output


def _hand_on(value: ir.Value, flat: ir.Value, island: _Island, rewriter: Rewriter) -> None:
    """Everything outside the island reads ``flat`` in the shape that ``value`` had."""
    node = value.producer()
    if node is None:
        raise ValueError(f"{value.name} is no result of a node")
    with Builder(rewriter, node) as builder:
        shaped = builder.reshape(flat, builder.shape(value))
    replace(value, shaped)
