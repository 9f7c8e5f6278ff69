"""Removes nodes that hand on their input unchanged.

    y = Identity(x)                       →  x
    y = Cast<to: type of x>(x)            →  x
    y = Transpose<perm: 0, 1, 2>(x)       →  x
    y = Reshape(x, its own shape)         →  x      likewise Expand, Tile by 1, Slice of everything, Pad by 0,
    y = Concat(x), Split into one, Sum(x) →  x      Unsqueeze by no axes, Concat with an empty part

Sizes are compared as inference knows them; an annotation in the file proves nothing.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from mmopt.analysis.shape_rules.layout import slice_size
from mmopt.transforms.canonicalize.editing import axes_of, constant_ints, integer, is_onnx
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass


def _forward(node: ir.Node, rewriter: Rewriter, index: int = 0) -> bool:
    value = node.inputs[index] if len(node.inputs) > index else None
    return value is not None and rewriter.replace(node, value)


def _identity(node: ir.Node, rewriter: Rewriter) -> bool:
    return _forward(node, rewriter)


def _cast(node: ir.Node, rewriter: Rewriter) -> bool:
    to = integer(node, "to", 0) if is_onnx(node, "Cast") else rewriter.dtype(node.inputs[1])
    return to is not None and rewriter.dtype(node.inputs[0]) == to and _forward(node, rewriter)


def _transpose(node: ir.Node, rewriter: Rewriter) -> bool:
    perm = node.attributes.get("perm")
    if perm is not None and not perm.is_ref():
        return list(perm.as_ints()) == list(range(len(perm.as_ints()))) and _forward(node, rewriter)
    shape = rewriter.shape(node.inputs[0]) if perm is None else None
    return shape is not None and len(shape) < 2 and _forward(node, rewriter)


def _same_shape(node: ir.Node, rewriter: Rewriter) -> bool:
    return rewriter.same_shape(node.inputs[0], node.outputs[0]) and _forward(node, rewriter)


def _no_axes(node: ir.Node, rewriter: Rewriter) -> bool:
    return axes_of(node) == [] and _forward(node, rewriter)


def _tile(node: ir.Node, rewriter: Rewriter) -> bool:
    repeats = constant_ints(node.inputs[1]) if len(node.inputs) == 2 else None
    return repeats is not None and set(repeats) <= {1} and _forward(node, rewriter)


def _pad(node: ir.Node, rewriter: Rewriter) -> bool:
    attribute = node.attributes.get("pads")
    if attribute is not None:
        pads = None if attribute.is_ref() else list(attribute.as_ints())
    else:
        pads = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None
    return pads is not None and not any(pads) and _forward(node, rewriter)


def _slice(node: ir.Node, rewriter: Rewriter) -> bool:
    """A slice that starts at 0, ends at or after the end, and does not skip."""
    shape = rewriter.shape(node.inputs[0])
    if shape is None or len(node.inputs) < 3:
        return False
    starts, ends, axes, steps = (
        rewriter.facts.elements(v) if v is not None else None for v in (*node.inputs[1:], None, None)[:4]
    )
    if starts is None or ends is None or (steps is None and len(node.inputs) > 4 and node.inputs[4] is not None):
        return False
    if axes is None and len(node.inputs) > 3 and node.inputs[3] is not None:
        return False
    for i, axis in enumerate(axes if axes is not None else range(len(starts))):
        dim = shape[axis] if isinstance(axis, int) and -len(shape) <= axis < len(shape) else None
        if dim is None or (steps is not None and steps[i] != 1) or slice_size(dim, starts[i], ends[i], 1) != dim:
            return False
    return _forward(node, rewriter)


def _single(node: ir.Node, rewriter: Rewriter) -> bool:
    return len(node.inputs) == 1 and _forward(node, rewriter)


def _split(node: ir.Node, rewriter: Rewriter) -> bool:
    return len(node.outputs) == 1 and _same_shape(node, rewriter)


def _concat_empty(node: ir.Node, rewriter: Rewriter) -> bool:
    """Parts of length 0 along the axis contribute nothing; one part must stay."""
    axis = integer(node, "axis", 1)
    if axis is None or len(node.inputs) < 2:
        return False
    kept = []
    for value in node.inputs:
        shape = rewriter.shape(value)
        empty = shape is not None and -len(shape) <= axis < len(shape) and shape[axis] == 0
        if not empty:
            kept.append(value)
    if not kept or len(kept) == len(node.inputs):
        return False
    shorter = rewriter.emit("Concat", kept, node, like=node.outputs[0], attributes=list(node.attributes.values()))
    return rewriter.replace(node, shorter.outputs[0])


RULES = (
    Rule("identity", ("Identity",), _identity),
    Rule("cast-to-own-type", ("Cast", "CastLike"), _cast),
    Rule("transpose-in-place", ("Transpose",), _transpose),
    Rule("reshape-to-own-shape", ("Reshape", "Flatten", "Squeeze"), _same_shape),
    Rule("expand-to-own-shape", ("Expand",), _same_shape),
    Rule("no-axes", ("Squeeze", "Unsqueeze"), _no_axes),
    Rule("tile-once", ("Tile",), _tile),
    Rule("pad-nothing", ("Pad",), _pad),
    Rule("slice-everything", ("Slice",), _slice),
    Rule("one-operand", ("Concat", "Sum", "Max", "Min", "Mean"), _single),
    Rule("split-in-one", ("Split",), _split),
    Rule("concat-empty-part", ("Concat",), _concat_empty),
)


@dataclasses.dataclass(frozen=True)
class RemoveNoOps(RulePass):
    """Removes nodes that hand on their input unchanged. A graph output keeps an ``Identity`` where it needs one."""

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
