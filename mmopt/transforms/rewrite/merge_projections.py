"""Merges the projections of queries, keys and values into one matrix product, where they read the same input.

    q = x Wq + bq,  k = x Wk,  v = x Wv + bv; Attention(q, k, v)
    →    [q k v] = x [Wq Wk Wv] + [bq 0 bv], split along the last axis; Attention(q, k, v)

One product over wide weights keeps the cores busier than three over narrow ones, and reads its input once. The parts
cost nothing where attention reads them in place, so only projections of one attention are merged. Weights that
something else needs too are left alone: merged they would be stored twice.

With the option ``gated``, so do the two projections of a gated layer (SwiGLU, GEGLU):

    act(x Wg + bg) · (x Wu + bu)
    →    [g u] = x [Wg Wu] + [bg bu], split along the last axis; act(g) · u

It is off: apart, the second product takes activation and product in as it is written; merged, both parts are read anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mmopt.analysis.dims import Size
from mmopt.analysis.shape_rules.types import to_ir_shape
from mmopt.analysis.shapes import Fact
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, PassContext
from mmopt.transforms.canonicalize.editing import Array, is_onnx, new_initializer, tensor_of
from mmopt.transforms.canonicalize.eliminate_dead_code import EliminateDeadCode
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass

_ACTIVATIONS = (
    "Elu",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Mish",
    "Relu",
    "Selu",
    "Sigmoid",
    "Softplus",
    "Swish",
    "Tanh",
)

_MOST = 1 << 26
"""Weights with more elements in sum than this are not copied."""


@dataclasses.dataclass(frozen=True)
class _Projection:
    """``x W + b``.

    Attributes:
        result: What the attention reads.
        x: What is projected.
        weight: ``W [inputs, outputs]``.
        bias: ``b [outputs]``, or None for zeros.
    """

    result: ir.Value
    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None


def _merge(node: ir.Node, rewriter: Rewriter) -> bool:
    """From the attention."""
    if len(node.inputs) < 3 or "q_num_heads" not in node.attributes or rewriter.opset(node) < 18:
        return False
    found = [_projection(value, rewriter) for value in node.inputs[:3]]
    members = _with_common_input([projection for projection in found if projection is not None])
    if len(members) < 2:
        return False
    reason = _objection(members, rewriter) or _needed_elsewhere(members, node)
    if reason:
        return rewriter.miss(node, f"merging projections: {reason}.")
    return _emit(members, rewriter)


def _merge_gated(node: ir.Node, rewriter: Rewriter) -> bool:
    """From the product of the two halves."""
    if rewriter.opset(node) < 18 or node.inputs[0] is node.inputs[1]:
        return False
    sides = [_behind_activation(value, rewriter) for value in node.inputs]
    members = [side for side in sides if side is not None]
    if len(members) < 2 or members[0].x is not members[1].x or rewriter.shape(members[0].result) is None:
        return False
    if not rewriter.same_shape(members[0].result, members[1].result):
        return False
    reason = _objection(members, rewriter)
    if reason or any(member.result.is_graph_output() for member in members):
        return rewriter.miss(node, f"merging gate and value: {reason or 'one of them is an output'}.")
    return _emit(members, rewriter)


def _behind_activation(value: ir.Value | None, rewriter: Rewriter) -> _Projection | None:
    """The one projection of which ``value`` is a function, element by element."""
    found = _projection(value, rewriter)
    node = None if value is None else value.producer()
    if found is not None or node is None:
        return found
    if is_onnx(node, *_ACTIVATIONS):
        return _behind_activation(node.inputs[0], rewriter)
    if not is_onnx(node, "Mul"):
        return None
    # x · sigmoid(a x): the numbers among the operands are part of the activation, the rest must be one projection.
    inner = [_behind_activation(operand, rewriter) for operand in node.inputs if tensor_of(operand) is None]
    same = inner and all(one is not None and inner[0] is not None and one.result is inner[0].result for one in inner)
    return inner[0] if same else None


def _projection(value: ir.Value | None, rewriter: Rewriter) -> _Projection | None:
    node = None if value is None else value.producer()
    if value is None or node is None:
        return None
    bias = None
    product: ir.Node | None = node
    if is_onnx(node, "Add"):
        for position in (0, 1):
            other = node.inputs[1 - position]
            if tensor_of(other) is not None and len(rewriter.shape(other) or ()) == 1:
                bias, inner = other, node.inputs[position]
                product = None if inner is None or len(inner.uses()) > 1 else inner.producer()
    if product is None or not is_onnx(product, "MatMul") or product.graph is not node.graph:
        return None
    x, weight = product.inputs
    shape = rewriter.shape(weight)
    if x is None or weight is None or tensor_of(weight) is None or shape is None or len(shape) != 2:
        return None
    if bias is not None and (rewriter.shape(bias) or (None,))[0] != shape[1]:
        return None
    return _Projection(value, x, weight, bias)


def _with_common_input(found: Sequence[_Projection]) -> list[_Projection]:
    """Those that read what the last of them reads: keys and values always do, queries in self-attention."""
    return [projection for projection in found if projection.x is found[-1].x] if found else []


def _needed_elsewhere(members: Sequence[_Projection], node: ir.Node) -> str:
    for projection in members:
        if {user for user, _ in projection.result.uses()} != {node} or projection.result.is_graph_output():
            return f"{projection.result.name} is needed elsewhere too"
    return ""


def _objection(members: Sequence[_Projection], rewriter: Rewriter) -> str:
    weights = [projection.weight for projection in members]
    for projection in members:
        if len(projection.weight.uses()) > 1 or weights.count(projection.weight) > 1:
            return f"the weights {projection.weight.name} are needed elsewhere too"
    tensors = [tensor_of(weight) for weight in weights]
    kinds = {(t.dtype, tuple(t.shape.numpy())[:1]) for t in tensors if t is not None}
    if len(kinds) > 1 or rewriter.dtype(members[0].x) not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return "the weights differ in type"
    if sum(t.size for t in tensors if t is not None) > _MOST:
        return "the weights are too large to copy"
    return "" if len({projection.result for projection in members}) == len(members) else "two operands are the same"


def _array(value: ir.Value | None) -> Array:
    tensor = tensor_of(value)
    if tensor is None:
        raise ValueError("not a constant")
    return np.asarray(tensor.numpy())


def _emit(members: Sequence[_Projection], rewriter: Rewriter) -> bool:
    first = _first(members)
    graph = first.graph
    shape, dtype = rewriter.shape(members[0].x), rewriter.dtype(members[0].x)
    if graph is None or shape is None or dtype is None:
        return False
    weights = [_array(projection.weight) for projection in members]
    widths = [weight.shape[1] for weight in weights]
    whole = np.concatenate(weights, axis=1)
    names = rewriter.names
    merged = new_initializer(graph, ir.tensor(whole), names.fresh(f"{members[0].weight.name}_merged"))
    value = _typed(rewriter.emit("MatMul", [members[0].x, merged], first), (*shape[:-1], sum(widths)), dtype, rewriter)
    if any(projection.bias is not None for projection in members):
        zeros = [np.zeros(width, dtype=whole.dtype) for width in widths]
        parts = [z if p.bias is None else _array(p.bias) for p, z in zip(members, zeros, strict=True)]
        name = names.fresh(f"{members[0].weight.name}_merged_bias")
        bias = new_initializer(graph, ir.tensor(np.concatenate(parts)), name)
        value = _typed(rewriter.emit("Add", [value, bias], first), (*shape[:-1], sum(widths)), dtype, rewriter)
    sizes = new_initializer(graph, ir.tensor(np.array(widths, dtype=np.int64)), names.fresh("projection_sizes"))
    split = _split(first, value, sizes, len(widths), rewriter)
    for projection, width, part in zip(members, widths, split.outputs, strict=True):
        _typed(split, (*shape[:-1], width), dtype, rewriter, part)
        owner = projection.result.producer()
        if owner is not None:
            rewriter.replace(owner, part)
    return True


def _first(members: Sequence[_Projection]) -> ir.Node:
    """The projection that stands first: what all read stands before it."""
    nodes = [_product_of(projection) for projection in members]
    graph = nodes[0].graph
    order = {node: n for n, node in enumerate(graph or ())}
    return min(nodes, key=lambda node: order.get(node, 0))


def _product_of(projection: _Projection) -> ir.Node:
    return next(user for user, _ in projection.weight.uses() if is_onnx(user, "MatMul"))


def _split(before: ir.Node, value: ir.Value, sizes: ir.Value, count: int, rewriter: Rewriter) -> ir.Node:
    names, base = rewriter.names, before.name or before.op_type
    outputs = [ir.Value(name=names.fresh(f"{base}_part")) for _ in range(count)]
    axis = [ir.AttrInt64("axis", -1)]
    node = ir.Node("", "Split", [value, sizes], axis, outputs=outputs, name=names.fresh(f"{base}_Split_node"))
    node.metadata_props.update(before.metadata_props)
    if before.graph is not None:
        before.graph.insert_before(before, node)
    return node


def _typed(
    node: ir.Node, shape: Sequence[Size | None], dtype: ir.DataType, rewriter: Rewriter, value: ir.Value | None = None
) -> ir.Value:
    output = node.outputs[0] if value is None else value
    sizes = tuple(shape)
    output.type, output.shape = ir.TensorType(dtype), to_ir_shape(sizes)
    rewriter.facts.set(output, Fact(sizes, None, ir.TensorType(dtype)))
    return output


RULES = (Rule("merge-projections", ("Attention",), _merge),)
GATED = (Rule("merge-gated", ("Mul",), _merge_gated),)


@dataclasses.dataclass(frozen=True)
class MergeProjections(RulePass):
    """Merges projections of one attention that read the same input.

    Attributes:
        gated: Also merge the two projections of a gated layer.
    """

    fidelity = Fidelity.ROUNDING

    gated: bool = False

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return (*RULES, *GATED) if self.gated else RULES

    def run(self, module: Module, context: PassContext) -> bool:
        """Merge, and drop the products that were merged."""
        if not super().run(module, context):
            return False
        EliminateDeadCode().run(module, context)
        return True
