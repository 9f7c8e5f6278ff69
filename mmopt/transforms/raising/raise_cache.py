"""Lifts the cache of keys and values into the attention that reads it.

    K = Concat(past_k, k), V = Concat(past_v, v); y = Attention(q, K, V, mask)
    →    y, K, V = Attention(q, k, v, mask, past_k, past_v)

Equation: ``softmax(s Q [past_k; k]ᵀ + mask) [past_v; v]``.

The operator hands out the longer keys and values, which are what a decoder keeps for its next step. With a cache it
counts queries from the end of the keys, without one from their start, so attention that is causal by attribute stays.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import integer, is_onnx, replace
from mmopt.transforms.canonicalize.rewriting import Rewriter
from mmopt.transforms.raising.rules import RaisingPass, RaisingRule

_AXIS = 2


def _raise(node: ir.Node, rewriter: Rewriter) -> bool:
    joins = [None if value is None else value.producer() for value in node.inputs[1:3]]
    if any(join is None or not is_onnx(join, "Concat") for join in joins) or "q_num_heads" in node.attributes:
        return False
    keys, values = (join for join in joins if join is not None)
    reason = _objection(node, keys, values, rewriter)
    if reason:
        return rewriter.miss(node, f"cache: {reason}.")
    _emit(node, keys, values, rewriter)
    return True


def _objection(node: ir.Node, keys: ir.Node, values: ir.Node, rewriter: Rewriter) -> str:
    if any(value is not None for value in node.inputs[4:]) or any(value.name for value in node.outputs[1:]):
        return "the attention has a cache already, or hands out its scores"
    if integer(node, "is_causal", 0) != 0:
        return "queries of causal attention are counted from the first key, with a cache from the last"
    if keys is values:
        return "keys and values are the same"
    for join in (keys, values):
        if len(join.inputs) != 2 or integer(join, "axis", 0) not in (_AXIS, _AXIS - 4):
            return f"{join.name!r} does not join two sequences of keys or values"
        if {user for user, _ in join.outputs[0].uses()} != {node}:
            return f"{join.outputs[0].name} is read elsewhere too"
        if not join.outputs[0].is_graph_output():
            # onnxruntime has no kernel for a cache that is read and not handed on.
            return f"{join.outputs[0].name} is not kept for a next step"
    # The operator joins both caches: they must be as long as each other.
    shapes = [rewriter.shape(join.inputs[0]) for join in (keys, values)]
    if any(shape is None or len(shape) != 4 or None in shape[:3] for shape in shapes):
        return "the shape of the cache is unknown"
    if shapes[0] is not None and shapes[1] is not None and shapes[0][:3] != shapes[1][:3]:
        return "the caches of keys and values differ in shape"
    return ""


def _emit(node: ir.Node, keys: ir.Node, values: ir.Node, rewriter: Rewriter) -> None:
    """Put an attention with three results in place of the one and the two concatenations."""
    old = [node.outputs[0], keys.outputs[0], values.outputs[0]]
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    inputs = [node.inputs[0], keys.inputs[1], values.inputs[1], mask, keys.inputs[0], values.inputs[0]]
    made = rewriter.emit("Attention", inputs, node, like=old[0], attributes=list(node.attributes.values()))
    made.resize_outputs(len(old))
    for before, after in zip(old, made.outputs, strict=True):
        after.name = after.name or rewriter.names.fresh(f"{before.name}_present")
        after.type, after.shape = before.type, before.shape
        rewriter.facts.set(after, rewriter.facts.fact(before))
    rewriter.changed(made)
    for before, after in zip(old, made.outputs, strict=True):
        replace(before, after)
    for gone in (node, keys, values):
        rewriter.drop(gone)


RULES = (
    RaisingRule(
        "cache",
        ("Attention",),
        _raise,
        "Attention of keys and values that continue those of earlier steps",
        "Attention with past_key, past_value",
    ),
)


@dataclasses.dataclass(frozen=True)
class RaiseCache(RaisingPass):
    """Lifts the cache of keys and values into the attention that reads it."""

    def raising_rules(self) -> tuple[RaisingRule, ...]:
        """The rules of this module."""
        return RULES
