"""Lifts attention from any exporter's spelling into the standard's ``Attention``.

    scores = Q Kᵀ · scale; weights = softmax(scores + mask); y = weights V
    →    y = Attention(Q, K, V, mask) {scale, is_causal, softcap, q_num_heads, kv_num_heads}

Equation: ``y = softmax(softcap · tanh(scale · Q Kᵀ / softcap) + mask) V`` for each head.

The head's Reshape and Transpose become part of the operator where all three operands are projections
``[batch, sequence, heads * size]``. Rows of which every key is masked by minus infinity are 0, where the softmax alone
would give NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from mmopt.analysis.dims import Size
from mmopt.analysis.shape_rules import Shape
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize import compose_transposes, merge_reshapes
from mmopt.transforms.canonicalize.editing import integer, is_onnx, replace
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule
from mmopt.transforms.raising.attention_heads import Heads, Operand, View, choose_heads, rearranged, refined, unscaled
from mmopt.transforms.raising.attention_masks import write_mask
from mmopt.transforms.raising.attention_match import Match, finite, forward, lead_of, match_attention
from mmopt.transforms.raising.building import Builder, Unbuildable, sole_user
from mmopt.transforms.raising.contraction import Contraction
from mmopt.transforms.raising.layout import Atom, Group, Layout, extent, quotient, regroup
from mmopt.transforms.raising.rules import OPSET, RaisingPass, RaisingRule, apply_rules

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclasses.dataclass(frozen=True)
class _Operands:
    """Queries, keys and values in one form."""

    rank: int
    heads: Heads
    views: tuple[View, View, View]

    @property
    def factor(self) -> float:
        """What queries and keys are multiplied by on the way from their sources."""
        return self.views[0].source.factor * self.views[1].source.factor


def _raise(node: ir.Node, rewriter: Rewriter) -> bool:
    match = match_attention(node, rewriter)
    if isinstance(match, str):
        return rewriter.miss(node, f"attention: {match}.") if match else False
    dtype = rewriter.dtype(match.scores.left)
    types = {rewriter.dtype(v) for v in (match.scores.left, match.scores.right, match.mixed.right)}
    if dtype not in _TYPES or types != {dtype} or rewriter.dtype(match.mixed.node.outputs[0]) != dtype:
        return rewriter.miss(node, "attention: queries, keys and values are not of one float type.")
    operands = _operands(match, rewriter)
    if isinstance(operands, str):
        return rewriter.miss(node, f"attention: {operands}.")
    try:
        return _emit(node, match, operands, rewriter)
    except Unbuildable as reason:
        return rewriter.miss(node, f"attention: {reason}.")


def _operands(match: Match, rewriter: Rewriter) -> _Operands | str:
    scores, mixed = match.scores, match.mixed
    lead = [extent(group) for group in scores.layout.groups[:-2]]
    operands = (
        Operand(scores.left, scores.left_layout, "row", "depth", rewriter),
        Operand(scores.right, scores.right_layout, "column", "depth", rewriter),
        unscaled(Operand(mixed.right, mixed.right_layout, "depth", "column", rewriter)),
    )
    chosen = _choose(operands, lead, lambda heads, rank: _output_cost(mixed, heads, rank, rewriter))
    if isinstance(chosen, str):
        return chosen
    scale = match.scale * chosen.factor
    return chosen if scale > 0 and finite(scale) else f"the scale {scale} of the scores is not positive"


def _choose(
    operands: tuple[Operand, Operand, Operand], lead: Sequence[Size], output_cost: Callable[[Heads, int], float]
) -> _Operands | str:
    """The form with the fewest transpositions; rank 4 where both have as many."""
    heads = choose_heads(operands, lead)
    if heads is None:
        return "batch and heads of queries, keys and values do not fit together"
    forms: list[tuple[float, _Operands]] = []
    for rank in (4, 3):
        best = [operand.best(heads, rank) for operand in operands]
        views = [view for _, view in best if view is not None]
        if len(views) == 3 and (rank == 4 or (isinstance(heads.count, int) and isinstance(heads.kept, int))):
            cost = sum(cost for cost, _ in best) + output_cost(heads, rank)
            forms.append((cost, _Operands(rank, heads, (views[0], views[1], views[2]))))
    if not forms:
        return "heads of keys and values do not fit together"
    return min(forms, key=lambda form: form[0])[1]


def _output_axes(whole: Layout, heads: Heads, rank: int) -> tuple[Layout, tuple[Group, ...]] | None:
    """The layout of the product with the values, in parts, and the axes of the operator's result."""
    cut = regroup(lead_of(whole), [heads.batch, heads.count])
    if cut is None:
        return None
    batch, head = cut
    layout = refined(whole, [*batch, *head])
    row, column = (tuple(a for a in layout.order if a.role == role) for role in ("row", "column"))
    return layout, (batch, row, (*head, *column)) if rank == 3 else (batch, head, row, column)


def _output_cost(mixed: Contraction, heads: Heads, rank: int, rewriter: Rewriter) -> float:
    return output_cost(mixed.node.outputs[0], mixed.layout, heads, rank, rewriter)


def output_cost(value: ir.Value, whole: Layout, heads: Heads, rank: int, rewriter: Rewriter) -> float:
    """Transpositions between the operator's result in the form of ``rank`` and what reads ``value``."""
    found = _output_axes(whole, heads, rank)
    if found is None:
        return 1.0
    layout, axes = found
    wanted = [atom for group in axes for atom in group]
    if rank == 4 and list(layout.order) != wanted:
        return 1.0
    moved: Layout | None = layout
    for _ in range(4):
        user = sole_user(value)
        if user is None or moved is None or not is_onnx(user, "Transpose", "Reshape", "Squeeze", "Unsqueeze"):
            break
        moved, value = forward(user, moved, rewriter), user.outputs[0]
    return 0.0 if moved is not None and list(refined(moved, wanted).order) == wanted else 1.0


def _emit(node: ir.Node, match: Match, operands: _Operands, rewriter: Rewriter) -> bool:
    last = match.mixed.node
    witnesses = [view.source.value for view in operands.views]
    builder = Builder(rewriter, last, [*witnesses, match.scores.left, match.scores.right, match.mixed.right])
    dtype = rewriter.dtype(match.scores.left)
    found = _output_axes(match.mixed.layout, operands.heads, operands.rank)
    if found is None or dtype is None:
        raise Unbuildable("batch and heads of the result cannot be told apart")
    layout, axes = found
    with builder:
        mask = write_mask(match, operands.heads, builder, dtype)
        inputs: list[ir.Value | None] = [view.write(builder, operands.rank) for view in operands.views]
        if mask.value is not None:
            inputs.append(mask.value)
        sizes: list[Size] = [extent(group) for group in axes]
        attributes = _attributes(match, operands, mask.causal, dtype)
        result = builder.node("Attention", inputs, sizes, dtype, **attributes)
        return rewriter.replace(last, rearranged(builder, result, Layout(axes), layout.groups))


def _attributes(match: Match, operands: _Operands, causal: bool, dtype: ir.DataType) -> dict[str, Any]:
    attributes: dict[str, Any] = {"scale": match.scale * operands.factor, **_head_attributes(operands)}
    if causal:
        attributes["is_causal"] = 1
    if match.softcap:
        attributes["softcap"] = match.softcap
    if match.softmax_dtype is not None and match.softmax_dtype != dtype:
        attributes["softmax_precision"] = int(match.softmax_dtype)
    return attributes


def _head_attributes(operands: _Operands) -> dict[str, Any]:
    if operands.rank == 4:
        return {}
    return {"q_num_heads": operands.heads.count, "kv_num_heads": operands.heads.kept}


# -- operators that are attention already --------------------------------------------------------------------------


def _absorb(node: ir.Node, rewriter: Rewriter) -> bool:
    """Reshapes, transpositions, repeated heads and scales around an operator of rank 4 become part of it."""
    cached = len(node.inputs) > 5 and node.inputs[4] is not None and node.inputs[5] is not None
    if any(value is not None for value in node.inputs[6:] if cached) or (not cached and any(node.inputs[4:])):
        return False
    if any(output.uses() or output.is_graph_output() for output in node.outputs[3 if cached else 1 :]):
        return False
    query, key, value = node.inputs[:3]
    shapes = [rewriter.shape(v) for v in (query, key, value)]
    layouts = _layouts(shapes)
    if layouts is None or query is None or key is None or value is None:
        return False
    keys = Operand(key, layouts[1], "column", "depth", rewriter)
    operands = (
        Operand(query, layouts[0], "row", "depth", rewriter),
        unscaled(keys) if cached else keys,
        unscaled(Operand(value, layouts[2], "depth", "column", rewriter)),
    )
    whole = Layout((*layouts[0].groups[:3], layouts[2].groups[3]))
    result = node.outputs[0]
    lead = [extent(group) for group in layouts[0].groups[:2]]
    chosen = _choose(operands, lead, lambda heads, rank: output_cost(result, whole, heads, rank, rewriter))
    if isinstance(chosen, str) or (chosen.rank == 4 and all(view.source.value in node.inputs for view in chosen.views)):
        return False
    if cached and chosen.heads.kept != shapes[1][1]:  # type: ignore[index]
        return False  # Repeated keys are what goes on in the cache.
    try:
        return _replace(node, chosen, whole, rewriter)
    except Unbuildable:
        return False


def _layouts(shapes: Sequence[Shape]) -> tuple[Layout, Layout, Layout] | None:
    """Axes of queries, keys and values ``[batch, heads, sequence, size]``."""
    if any(shape is None or len(shape) != 4 or None in shape for shape in shapes):
        return None
    q, k, v = ([size for size in shape or () if size is not None] for shape in shapes)
    share = quotient(q[1], k[1])
    if share is None or k[1] != v[1] or q[0] != k[0] or q[0] != v[0]:
        return None
    batch, head = (Atom("lead", (n,), q[n]) for n in range(2))
    kept, repeated = head.split(k[1], share) if 1 not in (k[1], share) else (head, head)

    def groups(atoms: Sequence[Atom]) -> tuple[Group, ...]:
        return tuple(() if atom.size == 1 else (atom,) for atom in atoms)

    row, depth = Atom("row", (0,), q[2]), Atom("depth", (0,), q[3])
    keys, column = Atom("depth", (0,), v[2]), Atom("column", (0,), v[3])
    heads: Group = () if q[1] == 1 else (head,) if share == 1 or k[1] == 1 else (kept, repeated)
    less: Group = () if k[1] == 1 else (kept,)
    gone: Group = () if share == 1 else (repeated,)
    (lead,), (rows, within), (along, columns) = groups([batch]), groups([row, depth]), groups([keys, column])
    sequence = groups([Atom("column", (0,), k[2])])[0]
    return (
        Layout((lead, heads, rows, within)),
        Layout((lead, less, sequence, within), gone),
        Layout((lead, less, along, columns), gone),
    )


def _replace(node: ir.Node, operands: _Operands, whole: Layout, rewriter: Rewriter) -> bool:
    found = _output_axes(whole, operands.heads, operands.rank)
    if found is None:
        return False
    layout, axes = found
    size = extent(operands.views[0].feature)
    given = node.attributes.get("scale")
    scale = given.as_float() if given is not None else float(size) ** -0.5 if isinstance(size, int) else None
    if scale is None or not finite(scale * operands.factor) or scale * operands.factor <= 0:
        return False
    attributes = {name: a.value for name, a in node.attributes.items() if name not in ("scale", *_HEADS)}
    attributes.update(scale=scale * operands.factor, **_head_attributes(operands))
    dtype = rewriter.dtype(node.outputs[0])
    with Builder(rewriter, node, [value for value in node.inputs[:3] if value is not None]) as builder:
        inputs = [*(view.write(builder, operands.rank) for view in operands.views), *node.inputs[3:6]]
        result = builder.node("Attention", inputs, [extent(group) for group in axes], dtype, **attributes)
        arranged = rearranged(builder, result, Layout(axes), layout.groups)
    _hand_over_cache(node, result.producer(), rewriter)
    return rewriter.replace(node, arranged)


def _hand_over_cache(old: ir.Node, new: ir.Node | None, rewriter: Rewriter) -> None:
    """The longer keys and values come from ``new``."""
    if new is None or len(old.outputs) < 3:
        return
    new.resize_outputs(3)
    for before, after in zip(old.outputs[1:3], new.outputs[1:3], strict=True):
        after.name = rewriter.names.fresh(f"{before.name}_present")
        after.type, after.shape = before.type, before.shape
        rewriter.facts.set(after, rewriter.facts.fact(before))
        replace(before, after)


_HEADS = ("q_num_heads", "kv_num_heads")


# -- softmax as it was before opset 13 -----------------------------------------------------------------------------


def _plain_softmax(node: ir.Node, rewriter: Rewriter) -> bool:
    """Softmax over rows of a matrix that is a tensor flattened before its last axis, and back: as opset 12 has it."""
    softmax = node.inputs[0].producer() if node.inputs[0] is not None else None
    if softmax is None or not is_onnx(softmax, "Softmax") or softmax.inputs[0] is None:
        return False
    flat = softmax.inputs[0].producer()
    if flat is None or not is_onnx(flat, "Flatten", "Reshape") or integer(softmax, "axis", -1) not in (-1, 1):
        return False
    value, target = flat.inputs[0], node.inputs[1].producer() if node.inputs[1] is not None else None
    shape = rewriter.shape(value)
    if value is None or shape is None or sole_user(softmax.outputs[0]) is not node:
        return False
    asked = (
        target is not None and is_onnx(target, "Shape") and target.inputs[0] is value and len(target.attributes) == 0
    )
    if not asked and not rewriter.same_shape(value, node.outputs[0]):
        return False
    flattened = rewriter.shape(flat.outputs[0])
    rows = is_onnx(flat, "Flatten") and integer(flat, "axis", 1) in (len(shape) - 1, -1)
    if not rows and (flattened is None or len(flattened) != 2 or shape[-1] is None or flattened[-1] != shape[-1]):
        return False
    plain = rewriter.emit("Softmax", [value], node, like=value, attributes=[ir.AttrInt64("axis", -1)])
    if not rewriter.replace(node, plain.outputs[0]):
        return False
    if asked and target is not None and not target.outputs[0].uses() and not target.outputs[0].is_graph_output():
        rewriter.drop(target)
    return True


PLAIN_SOFTMAX = Rule("plain-softmax", ("Reshape",), _plain_softmax)
RULES = (
    RaisingRule(
        "raise-attention", ("Softmax",), _raise, "softmax(c · tanh(s Q Kᵀ / c) + mask) V for each head", "Attention"
    ),
    RaisingRule(
        "absorb-heads",
        ("Attention",),
        _absorb,
        "Attention of transposed, reshaped, repeated or scaled projections",
        "Attention",
    ),
)


@dataclasses.dataclass(frozen=True)
class RaiseAttention(RaisingPass):
    """Lifts attention into the standard's operator."""

    def raising_rules(self) -> tuple[RaisingRule, ...]:
        """The rules of this module."""
        return RULES

    def rules(self) -> tuple[Rule, ...]:
        """The rules, and those that join what is left of shape changes around the operator."""
        return (*RULES, *compose_transposes.RULES, *merge_reshapes.RULES)

    def run(self, module: Module, context: PassContext) -> bool:
        """Apply the rules until none fires, and drop what nothing needs any more."""
        # First of all, so that what is dead afterwards does not count as a use of the scores.
        plain = module.opset >= OPSET and apply_rules(self, [PLAIN_SOFTMAX], module, context)
        return super().run(module, context) or plain
