"""Writes what masks attention scores as the standard's operator takes it: one tensor, or the attribute for causal.

Additive parts are summed, boolean ones joined by And. A constant that lets query ``i`` see the keys ``j <= i`` and no
other becomes ``is_causal``; one that masks nothing is dropped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mmopt.analysis.dims import Size
from mmopt.analysis.shape_rules import broadcast
from mmopt.transforms.canonicalize.editing import Array, is_onnx, tensor_of
from mmopt.transforms.raising.attention_heads import Heads, rearranged, refined
from mmopt.transforms.raising.attention_match import Match, Term, lead_of
from mmopt.transforms.raising.building import Builder, Unbuildable, uniform
from mmopt.transforms.raising.layout import Group, Layout, extent, regroup

_LARGEST_READ = 1 << 24
_NO_WEIGHT = -1e4
"""Scores lowered by this much get no weight in any float type: ``exp`` of it is 0."""
_FOR_GOOD = -1e30
"""From here on a second mask on top changes nothing."""


@dataclasses.dataclass(frozen=True)
class Mask:
    """The mask of one attention.

    Attributes:
        value: Float tensor to add or boolean tensor of what is kept; None for none.
        causal: Whether queries see no later keys.
    """

    value: ir.Value | None
    causal: bool


def write_mask(match: Match, heads: Heads, builder: Builder, dtype: ir.DataType) -> Mask:
    """The mask of ``match``.

    Raises:
        Unbuildable: A part of it cannot be written with axes for batch, heads, queries and keys.
    """
    cut = regroup(lead_of(match.layout), [heads.batch, heads.count])
    if cut is None:
        raise Unbuildable("batch and heads of the scores cannot be told apart")
    rows, keys = (tuple(a for a in match.layout.order if a.role == role) for role in ("row", "column"))
    axes = (*cut, rows, keys)
    causal, kept = False, []
    for term in match.terms:
        said = _constant_pattern(term, alone=len(match.terms) == 1)
        if said is None:
            kept.append(term)
        causal |= said == "causal"
    floats: list[_Placed] = []
    bools: list[_Placed] = []
    for term in kept:
        (floats if _as_float(term) else bools).append((term, _placed(term, axes, builder)))
    value = _joined(floats, bools, builder, dtype)
    if value is not None:
        value = _covering(value, (extent(rows), extent(keys)), builder)
    return Mask(value, causal)


# -- what a constant says ------------------------------------------------------------------------------------------


def _constant_pattern(term: Term, *, alone: bool) -> str | None:
    """``causal``, ``nothing`` where it masks nothing, else None."""
    tensor = tensor_of(term.value)
    if tensor is None or tensor.size > _LARGEST_READ or tensor.size == 0:
        return None
    array = np.asarray(tensor.numpy())
    if term.fill is None:
        array = array.astype(np.float64) * term.factor
        if not array.any():
            return "nothing"
        keep, gone = array == 0, array <= (_NO_WEIGHT if alone else _FOR_GOOD)
        return "causal" if bool((keep | gone).all()) and _is_causal(keep) else None
    keep = array if term.keep else ~array
    if keep.all():
        return "nothing"
    return "causal" if (alone or term.fill <= _FOR_GOOD) and _is_causal(keep) else None


def _is_causal(keep: Array) -> bool:
    if keep.ndim < 2 or keep.shape[-1] < 2 or keep.shape[-2] < 2:
        return False
    triangle = np.tril(np.ones(keep.shape[-2:], dtype=bool))
    return bool((keep == triangle).all())


def _as_float(term: Term) -> bool:
    """Whether a part has to be added: a boolean mask makes rows without any key 0, a finite fill their mean."""
    if term.fill is None:
        return True
    if math.isinf(term.fill):
        return False
    tensor = tensor_of(term.value)
    if tensor is None or tensor.size > _LARGEST_READ:
        return True
    keep = np.asarray(tensor.numpy()) if term.keep else ~np.asarray(tensor.numpy())
    return not (keep.ndim > 0 and bool(keep.any(axis=-1).all()))


# -- axes ----------------------------------------------------------------------------------------------------------


def _placed(term: Term, axes: Sequence[Group], builder: Builder) -> ir.Value:
    """The tensor of ``term`` so that it broadcasts to batch, heads, queries and keys."""
    layout = refined(term.layout, [atom for axis in axes for atom in axis])
    value = _shrunk(term.value, builder)
    shape = builder.rewriter.shape(value)
    if shape is None:
        raise Unbuildable(f"the shape of the mask {value.name} is unknown")
    if layout.groups == tuple(axes) or (_for_every_head(shape) and layout.groups[-2:] == tuple(axes[-2:])):
        return value
    have = []
    for size, group in zip(shape, layout.groups[len(layout.groups) - len(shape) :], strict=True):
        if size not in (1, extent(group)):
            raise Unbuildable(f"an axis of the mask {value.name} is neither 1 nor that of the scores")
        have.append(() if size == 1 else group)
    return _spread(value, Layout(tuple(have)), axes, builder)


def _for_every_head(shape: Sequence[Size | None]) -> bool:
    return len(shape) <= 4 and all(size == 1 for size in shape[:-2])


def _shrunk(value: ir.Value, builder: Builder) -> ir.Value:
    """What ``value`` is an expansion of, where that has as many axes."""
    node = value.producer()
    while node is not None and is_onnx(node, "Expand") and node.inputs[0] is not None:
        before, after = builder.rewriter.shape(node.inputs[0]), builder.rewriter.shape(value)
        if before is None or after is None or len(before) > len(after):
            break
        value = node.inputs[0]
        node = value.producer()
    return value


def _spread(value: ir.Value, layout: Layout, axes: Sequence[Group], builder: Builder) -> ir.Value:
    """``value`` on ``axes``: whole axes it lacks become 1, parts of an axis are repeated."""
    present = set(layout.order)
    full: list[Group] = []
    for axis in axes:
        full.append(axis if any(atom in present for atom in axis) else ())
    fine = [atom for axis in full for atom in axis]
    value = rearranged(builder, value, layout, [(atom,) if atom in present else () for atom in fine])
    value = builder.expand(value, [atom.size for atom in fine])
    return builder.reshape(value, [extent(axis) for axis in full])


def _covering(value: ir.Value, last: tuple[Size, Size], builder: Builder) -> ir.Value:
    """``value`` with its last two axes in full, as onnxruntime wants them."""
    shape = builder.rewriter.shape(value) or ()
    if len(shape) >= 2 and tuple(shape[-2:]) == last:
        return value
    lead = shape[:-2]
    target = [*[1] * len(lead), *last]
    numbers = [size for size in target if isinstance(size, int)]
    wanted = builder.ints(numbers) if len(numbers) == len(target) else builder.sizes(target)
    return builder.node("Expand", [value, wanted], (*lead, *last), builder.rewriter.dtype(value))


# -- joining -------------------------------------------------------------------------------------------------------

_Placed = tuple[Term, ir.Value]


def _joined(floats: list[_Placed], bools: list[_Placed], builder: Builder, dtype: ir.DataType) -> ir.Value | None:
    if not floats:
        kept = [_kept(term, value, builder) for term, value in bools]
        return _folded("And", kept, builder)
    parts = [_added(term, value, builder, dtype) for term, value in floats]
    parts += [_chosen(term, value, builder, dtype) for term, value in bools]
    return _folded("Add", parts, builder)


def _folded(op_type: str, values: list[ir.Value], builder: Builder) -> ir.Value | None:
    if not values:
        return None
    total = values[0]
    for value in values[1:]:
        shape = broadcast(builder.rewriter.shape(total), builder.rewriter.shape(value)) or ()
        total = builder.node(op_type, [total, value], shape, builder.rewriter.dtype(total))
    return total


def _kept(term: Term, value: ir.Value, builder: Builder) -> ir.Value:
    if term.keep:
        return value
    node = value.producer()
    if node is not None and is_onnx(node, "Not") and node.inputs[0] is not None:
        return node.inputs[0]
    return builder.node("Not", [value], builder.rewriter.shape(value) or (), ir.DataType.BOOL)


def _added(term: Term, value: ir.Value, builder: Builder, dtype: ir.DataType) -> ir.Value:
    if term.fill is not None:
        return _chosen(term, value, builder, dtype)
    if builder.rewriter.dtype(value) != dtype:
        raise Unbuildable(f"the mask {value.name} has another type than the queries")
    value = _filled(value, builder, dtype)
    if term.factor == 1:
        return value
    factor = builder.constant(np.array(term.factor, dtype=dtype.numpy()), "mask_factor")
    return builder.node("Mul", [value, factor], builder.rewriter.shape(value) or (), dtype)


def _softened(fill: float, dtype: ir.DataType) -> float:
    """A finite fill that is still far from the type's lowest: onnxruntime takes that one for minus infinity."""
    return fill if math.isinf(fill) else max(fill, -3e4 if dtype == ir.DataType.FLOAT16 else _FOR_GOOD)


def _filled(value: ir.Value, builder: Builder, dtype: ir.DataType) -> ir.Value:
    """An added mask that an exporter made of the type's lowest number, made of a softer one."""
    node = value.producer()
    if node is None or not is_onnx(node, "Where"):
        return value
    fills = [uniform(choice) for choice in node.inputs[1:]]
    for position, fill in enumerate(fills):
        if fill is not None and fills[1 - position] == 0 and fill != _softened(fill, dtype):
            number = np.array(_softened(fill, dtype), dtype=dtype.numpy())
            inputs = [*node.inputs]
            inputs[1 + position] = builder.constant(number, "masked")
            return builder.node("Where", inputs, builder.rewriter.shape(value) or (), dtype)
    return value


def _chosen(term: Term, value: ir.Value, builder: Builder, dtype: ir.DataType) -> ir.Value:
    fill = _softened(term.fill or 0, dtype)
    zero = builder.constant(np.array(0, dtype=dtype.numpy()), "kept")
    masked = builder.constant(np.array(fill, dtype=dtype.numpy()), "masked")
    choices = [zero, masked] if term.keep else [masked, zero]
    return builder.node("Where", [value, *choices], builder.rewriter.shape(value) or (), dtype)
