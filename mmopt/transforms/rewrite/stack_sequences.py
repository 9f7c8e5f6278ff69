"""Lets a loop stack its results itself, where an exporter collects them in a sequence.

    s = SequenceEmpty(), l = Loop(n, c, x, s) { x' = f(x), s' = SequenceInsert(s, x') }, y = ConcatFromSequence(l)
    →  t = Loop(n, c, x) { x' = f(x) }, y = t, with the axis of trips where it was asked for

Sequences keep a model out of most compilers; a stacked result does not. All trips must collect tensors of one shape.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from mmopt.analysis.dims import Size, symbols
from mmopt.analysis.shape_facts import own_type
from mmopt.analysis.shape_rules import Shape
from mmopt.analysis.shape_rules.types import to_ir_shape
from mmopt.pipeline.base import Fidelity
from mmopt.transforms.canonicalize.editing import drop_unused, integer, is_onnx, replace
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass


@dataclasses.dataclass(frozen=True)
class _Collection:
    """A sequence that a loop fills.

    Attributes:
        loop: The loop.
        position: Which of its outputs the sequence is.
        insert: The node of the body that appends to it.
        shape: Shape of what is appended.
    """

    loop: ir.Node
    position: int
    insert: ir.Node
    shape: tuple[Size, ...]


def _stack(node: ir.Node, rewriter: Rewriter) -> bool:
    """From the concatenation of the sequence."""
    found = _collection(node.inputs[0], rewriter)
    if found is None:
        return False
    if isinstance(found, str):
        return rewriter.miss(node, f"stacking a sequence: {found}.")
    axis, fresh = integer(node, "axis", 0), integer(node, "new_axis", 0)
    if not fresh or axis is None:
        return rewriter.miss(node, "stacking a sequence: it is joined along an axis that its tensors have already.")
    stacked = _with_scan_output(found, node, rewriter)
    rank = len(found.shape) + 1
    perm = [*range(1, rank)]
    perm.insert(axis % rank, 0)
    if perm == list(range(rank)):
        return rewriter.replace(node, stacked)
    turn = rewriter.emit("Transpose", [stacked], node, like=node.outputs[0], attributes=[ir.AttrInt64s("perm", perm)])
    return rewriter.replace(node, turn.outputs[0])


def _collection(sequence: ir.Value | None, rewriter: Rewriter) -> _Collection | str | None:
    loop = None if sequence is None else sequence.producer()
    if sequence is None or loop is None or not is_onnx(loop, "Loop"):
        return None
    position, body = list(loop.outputs).index(sequence), loop.attributes["body"].as_graph()
    if position + 2 >= len(loop.inputs):
        return None
    start = loop.inputs[position + 2]
    empty = None if start is None else start.producer()
    if empty is None or not is_onnx(empty, "SequenceEmpty"):
        return "it does not start empty"
    formal, result = body.inputs[position + 2], body.outputs[position + 1]
    insert = result.producer()
    appends = insert is not None and is_onnx(insert, "SequenceInsert") and insert.inputs[0] is formal
    if insert is None or not appends or (len(insert.inputs) > 2 and insert.inputs[2] is not None):
        return "a trip does something else than append to it"
    if len(formal.uses()) > 1 or result.uses() or len(sequence.uses()) > 1 or sequence.is_graph_output():
        return "it is needed elsewhere too"
    shape = _same_on_every_trip(rewriter.shape(insert.inputs[1]), loop, rewriter)
    return "its tensors may differ in shape" if shape is None else _Collection(loop, position, insert, shape)


def _same_on_every_trip(shape: Shape, loop: ir.Node, rewriter: Rewriter) -> tuple[Size, ...] | None:
    """``shape`` where all sizes are numbers, or made of names that the graph's inputs have."""
    if shape is None or loop.graph is None:
        return None
    sizes = [size for value in loop.graph.inputs for size in rewriter.shape(value) or () if size is not None]
    given = {name for size in sizes for name in symbols(size)}
    known = tuple(size for size in shape if size is not None and symbols(size) <= given)
    return known if len(known) == len(shape) else None


def _with_scan_output(found: _Collection, reader: ir.Node, rewriter: Rewriter) -> ir.Value:
    """Put a loop in place that stacks what was appended, and let ``reader`` read the stack."""
    old, position, insert = found.loop, found.position, found.insert
    body, value, empty = old.attributes["body"].as_graph(), insert.inputs[1], old.inputs[position + 2]
    if value is None or old.graph is None:
        raise ValueError(f"{insert.name} appends nothing")
    copy = rewriter.emit("Identity", [value], insert, like=value)
    body.outputs.pop(position + 1)
    body.outputs.append(copy.outputs[0])
    rewriter.drop(insert)
    body.inputs.pop(position + 2)
    inputs = [operand for n, operand in enumerate(old.inputs) if n != position + 2]
    kept = [output for n, output in enumerate(old.outputs) if n != position]
    names = [rewriter.names.fresh(f"{old.name or 'loop'}_{end}") for end in (*range(len(kept)), "stacked")]
    outputs = [ir.Value(name=name) for name in names]
    attribute = old.attributes.pop("body")
    name = rewriter.names.fresh(old.name or "loop")
    loop = ir.Node("", "Loop", inputs, [attribute], outputs=outputs, name=name)
    loop.metadata_props.update(old.metadata_props)
    old.graph.insert_before(old, loop)
    for before, after in zip(kept, outputs, strict=False):
        replace(before, after)
        rewriter.facts.set(after, rewriter.facts.fact(before))
    stacked = outputs[-1]
    stacked.type = None if value.type is None else own_type(value.type)
    stacked.shape = to_ir_shape((None, *found.shape))
    rewriter.set_input(reader, 0, stacked)
    rewriter.drop(old)
    drop_unused(empty)
    return stacked


RULES = (Rule("stack-sequences", ("ConcatFromSequence",), _stack),)


@dataclasses.dataclass(frozen=True)
class StackSequences(RulePass):
    """Stacks the results of a loop without a sequence."""

    fidelity = Fidelity.EXACT

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
