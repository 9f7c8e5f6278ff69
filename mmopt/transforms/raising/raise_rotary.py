"""Lifts rotary position embedding (Su et al. 2021).

    x · cos + concat(-x₂, x₁) · sin                                  x₁, x₂: the halves of the features
    concat(x₁ · cos - x₂ · sin, x₂ · cos + x₁ · sin)
    x · cos + stack(-x[1::2], x[0::2]) · sin                         neighbours, {interleaved=1}
    concat(rotated(x[:r]), x[r:])                                    {rotary_embedding_dim=r}
    →  RotaryEmbedding(x, cos, sin)

The tables must hold every angle twice, as halves or as neighbours; it is checked on their contents, or on how they are
computed. Where the heads come from a projection ``[batch, sequence, heads * size]``, that is what is rotated.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from mmopt.analysis.dims import Size
from mmopt.transforms.canonicalize import compose_transposes, merge_reshapes
from mmopt.transforms.canonicalize.editing import Array, integer, is_onnx, tensor_of
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule
from mmopt.transforms.raising.building import Builder, Unbuildable, sole_user
from mmopt.transforms.raising.parts import Part, region
from mmopt.transforms.raising.rules import RaisingPass, RaisingRule

_LARGEST_READ = 1 << 24
_ELEMENTWISE = ("Cos", "Sin", "Cast", "Identity", "Unsqueeze", "Reshape", "Expand", "Mul", "Squeeze")


@dataclasses.dataclass(frozen=True)
class _Rotation:
    """What is rotated by which tables: ``data``, or a ``part`` of it."""

    data: ir.Value
    cosine: ir.Value
    sine: ir.Value
    interleaved: bool
    part: Part | None = None


# -- reading -------------------------------------------------------------------------------------------------------


def _negated(value: ir.Value | None) -> ir.Value | None:
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and is_onnx(node, "Neg") else None


def _rotated_half(value: ir.Value | None, rewriter: Rewriter) -> tuple[Part, bool] | None:
    """``(x, interleaved)`` where ``value`` is ``x`` with pairs exchanged and the first of each negated."""
    node = None if value is None else value.producer()
    interleaved = False
    if node is not None and is_onnx(node, "Reshape", "Flatten"):
        value, interleaved = node.inputs[0], True
        node = None if value is None else value.producer()
    if node is None or not is_onnx(node, "Concat") or len(node.inputs) != 2:
        return None
    rank = len(rewriter.shape(value) or ())
    if not rank or integer(node, "axis", 0) not in (-1, rank - 1):
        return None
    first, second = node.inputs[0], node.inputs[1]
    if interleaved:
        first, second = _unsqueezed(first), _unsqueezed(second)
    turned = _negated(first)
    if turned is None and interleaved:
        turned = _unsqueezed(_negated(node.inputs[0]))
    parts = region(turned, rewriter), region(second, rewriter)
    if parts[0] is None or parts[1] is None:
        return None
    whole = _joined(parts[1], parts[0], interleaved)
    return None if whole is None else (whole, interleaved)


def _unsqueezed(value: ir.Value | None) -> ir.Value | None:
    """What a new last axis was added to."""
    node = None if value is None else value.producer()
    if node is None or not is_onnx(node, "Unsqueeze", "Reshape"):
        return None
    return node.inputs[0]


def _joined(first: Part, second: Part, interleaved: bool) -> Part | None:
    """The part that two halves, or all even and all odd features, make up."""
    step, apart = (2, 1) if interleaved else (1, first.size)
    fits = first.step == second.step == step and first.size == second.size
    if first.value is not second.value or not fits or second.start != first.start + apart:
        return None
    return Part(first.value, first.start, 2 * first.size)


def _sum_of_products(node: ir.Node, rewriter: Rewriter) -> _Rotation | None:
    """``x · cos + rotated half of x · sin``."""
    products = [value.producer() for value in node.inputs if value is not None]
    if len(products) != 2 or any(p is None or not is_onnx(p, "Mul") for p in products):
        return None
    for plain, turned in (products, products[::-1]):
        if plain is None or turned is None:
            continue
        for position in (0, 1):
            found = _rotated_half(turned.inputs[position], rewriter)
            sine = turned.inputs[1 - position]
            if found is None or sine is None:
                continue
            for data, cosine in (plain.inputs, plain.inputs[::-1]):
                if data is not None and cosine is not None and region(data, rewriter) == found[0]:
                    return _Rotation(data, cosine, sine, found[1])
    return None


# -- tables --------------------------------------------------------------------------------------------------------


def _twice(value: ir.Value | None, interleaved: bool, rewriter: Rewriter, depth: int = 0) -> bool:
    """Whether the last axis of a table holds every number twice: as halves, or as neighbours."""
    tensor = tensor_of(value)
    if tensor is not None:
        return 0 < tensor.size <= _LARGEST_READ and _repeats(np.asarray(tensor.numpy()), interleaved)
    node = None if value is None else value.producer()
    if value is None or node is None or depth > 12:
        return False
    if is_onnx(node, "Concat") and not interleaved and len(node.inputs) == 2:
        rank = len(rewriter.shape(value) or ())
        return node.inputs[0] is node.inputs[1] and integer(node, "axis", 0) in (-1, rank - 1)
    if interleaved and is_onnx(node, "Reshape", "Flatten") and _is_stacked(node, rewriter):
        return True
    if is_onnx(node, "Gather") and integer(node, "axis", 0) == 0 and len(rewriter.shape(node.inputs[0]) or ()) == 2:
        return _twice(node.inputs[0], interleaved, rewriter, depth + 1)
    if not is_onnx(node, *_ELEMENTWISE) or not _keeps_width(node, rewriter):
        return False
    inputs = node.inputs if node.op_type == "Mul" else node.inputs[:1]
    return all(_twice(source, interleaved, rewriter, depth + 1) for source in inputs)


def _repeats(array: Array, interleaved: bool) -> bool:
    if array.ndim == 0 or array.shape[-1] == 1:
        return True
    width = array.shape[-1]
    if width % 2:
        return False
    pairs = (array[..., ::2], array[..., 1::2]) if interleaved else (array[..., : width // 2], array[..., width // 2 :])
    return bool((pairs[0] == pairs[1]).all())


def _is_stacked(node: ir.Node, rewriter: Rewriter) -> bool:
    """Whether a Reshape merges a last axis of two equal entries: ``repeat_interleave(x, 2)``."""
    source = node.inputs[0]
    maker = None if source is None else source.producer()
    shape = rewriter.shape(source)
    if maker is None or not shape or shape[-1] != 2:
        return False
    if is_onnx(maker, "Concat"):
        return len(maker.inputs) == 2 and maker.inputs[0] is maker.inputs[1]
    before = rewriter.shape(maker.inputs[0]) if is_onnx(maker, "Expand") else None
    return bool(before) and before is not None and before[-1] == 1


def _keeps_width(node: ir.Node, rewriter: Rewriter) -> bool:
    """Whether a node leaves the last axis as it is."""
    before, after = rewriter.shape(node.inputs[0]), rewriter.shape(node.outputs[0])
    if not before or not after:
        return False
    if node.op_type == "Mul":
        widths = [(rewriter.shape(v) or (1,))[-1] for v in node.inputs]
        return all(width in (1, after[-1]) for width in widths)
    return before[-1] == after[-1]


def _table(value: ir.Value, rotation: _Rotation, sizes: tuple[Size, Size], builder: Builder) -> ir.Value:
    """A table ``[batch, sequence, width]`` as the operator wants it: every angle once.

    Raises:
        Unbuildable: It does not have one row for each position.
    """
    shape = builder.shape(value)
    batch, length = sizes
    width = shape[-1]
    padded = (*[1] * (4 - len(shape)), *shape)
    if not isinstance(width, int) or len(padded) != 4 or padded[1] != 1 or padded[2] != length:
        raise Unbuildable(f"the table {value.name} does not have one row for each position")
    if padded[0] not in (1, batch):
        raise Unbuildable(f"the table {value.name} has another batch")
    dtype = builder.rewriter.dtype(value)
    start, end, step = (0, width, 2) if rotation.interleaved else (0, width // 2, 1)
    bounds = [builder.ints([n], "bound") for n in (start, end, -1, step)]
    half = builder.node("Slice", [value, *bounds], (*shape[:-1], width // 2), dtype)
    rows = builder.reshape(half, [padded[0], length, width // 2])
    return builder.expand(rows, [batch, length, width // 2])


# -- writing -------------------------------------------------------------------------------------------------------


def _rotate(node: ir.Node, rewriter: Rewriter) -> bool:
    """From the sum, or from the Concat of two halves."""
    found = _sum_of_products(node, rewriter) if node.op_type == "Add" else _two_halves(node, rewriter)
    if found is None:
        return False
    shape = rewriter.shape(found.data)
    if shape is not None and found.part is not None:
        shape = (*shape[:-1], found.part.size)
    if shape is None or len(shape) != 4 or None in shape or shape != rewriter.shape(node.outputs[0]):
        return rewriter.miss(node, "rotary embedding: its operand is not [batch, heads, sequence, size].")
    whole = node.op_type == "Add"
    for table in (found.cosine, found.sine):
        if whole and not _twice(table, found.interleaved, rewriter):
            return rewriter.miss(node, f"rotary embedding: {table.name} does not hold every angle twice.")
    try:
        return _emit(node, found, whole, rewriter)
    except Unbuildable as reason:
        return rewriter.miss(node, f"rotary embedding: {reason}.")


def _two_halves(node: ir.Node, rewriter: Rewriter) -> _Rotation | None:
    """``concat(x₁ · cos - x₂ · sin, x₂ · cos + x₁ · sin)``."""
    if len(node.inputs) != 2 or integer(node, "axis", 0) not in (-1, len(rewriter.shape(node.outputs[0]) or ()) - 1):
        return None
    difference, total = (None if value is None else value.producer() for value in node.inputs)
    if difference is None or total is None or not is_onnx(difference, "Sub") or not is_onnx(total, "Add"):
        return None
    kept, taken = (_product(value, rewriter) for value in difference.inputs)
    others = [_product(value, rewriter) for value in total.inputs]
    if kept is None or taken is None or None in others:
        return None
    (first, cosine), (second, sine) = kept, taken
    whole = _joined(first, second, False)
    if whole is None:
        return None
    wanted = {(second.start, cosine), (first.start, sine)}
    if {(part.start, table) for part, table in (o for o in others if o is not None)} != wanted:
        return None
    part = None if whole.size == (rewriter.shape(whole.value) or (None,))[-1] else whole
    return _Rotation(whole.value, cosine, sine, False, part)


def _product(value: ir.Value | None, rewriter: Rewriter) -> tuple[Part, ir.Value] | None:
    """A part of the last axis times a table."""
    node = None if value is None else value.producer()
    if node is None or not is_onnx(node, "Mul"):
        return None
    for position in (0, 1):
        part, table = region(node.inputs[position], rewriter), node.inputs[1 - position]
        if part is not None and table is not None and part.value is not node.inputs[position]:
            return part, table
    return None


def _emit(node: ir.Node, found: _Rotation, whole: bool, rewriter: Rewriter) -> bool:
    projection = _projection(found.data, rewriter)
    witness = found.data if projection is None else projection
    with Builder(rewriter, node, [witness, found.cosine, found.sine]) as builder:
        batch, heads, length, size = builder.shape(node.outputs[0])
        tables = []
        for value in (found.cosine, found.sine):
            if whole:
                tables.append(_table(value, found, (batch, length), builder))
            else:
                tables.append(_rows(value, (batch, length), builder))
        attributes = {"interleaved": 1} if found.interleaved else {}
        data, dtype, shape = found.data, rewriter.dtype(found.data), (batch, heads, length, size)
        if found.part is not None:
            ends = (found.part.start, found.part.start + found.part.size, -1, 1)
            data = builder.node("Slice", [data, *(builder.ints([n], "bound") for n in ends)], shape, dtype)
        result = builder.node("RotaryEmbedding", [data, *tables], shape, dtype, **attributes)
        return rewriter.replace(node, result)


def _rows(value: ir.Value, sizes: tuple[Size, Size], builder: Builder) -> ir.Value:
    """A table that holds every angle once."""
    shape = builder.shape(value)
    batch, length = sizes
    padded = (*[1] * (4 - len(shape)), *shape)
    if len(padded) != 4 or padded[1] != 1 or padded[2] != length or padded[0] not in (1, batch):
        raise Unbuildable(f"the table {value.name} does not have one row for each position")
    return builder.expand(builder.reshape(value, [padded[0], length, shape[-1]]), [batch, length, shape[-1]])


def _projection(value: ir.Value, rewriter: Rewriter) -> ir.Value | None:
    """``[batch, sequence, heads, size]`` where ``value`` is that with heads moved to the front."""
    node = value.producer()
    if node is None or not is_onnx(node, "Transpose") or node.inputs[0] is None:
        return None
    perm = node.attributes.get("perm")
    return node.inputs[0] if perm is not None and list(perm.as_ints()) == [0, 2, 1, 3] else None


def _partial(node: ir.Node, rewriter: Rewriter) -> bool:
    """From the Concat of what is rotated and what is not."""
    if len(node.inputs) != 2 or integer(node, "axis", 0) not in (-1, len(rewriter.shape(node.outputs[0]) or ()) - 1):
        return False
    turned, kept = node.inputs
    rotation = None if turned is None else turned.producer()
    rest = region(kept, rewriter)
    if rotation is None or not is_onnx(rotation, "RotaryEmbedding") or rest is None or turned is None:
        return False
    part = region(rotation.inputs[0], rewriter)
    shape = rewriter.shape(rest.value)
    if part is None or part.value is not rest.value or shape is None or len(shape) != 4 or None in shape:
        return False
    if part.start != 0 or rest.start != part.size or part.step != 1 or part.size + rest.size != shape[-1]:
        return False
    if sole_user(turned) is not node or "rotary_embedding_dim" in rotation.attributes:
        return rewriter.miss(node, "rotary embedding: the rotated part is needed elsewhere too.")
    attributes = {name: attribute.value for name, attribute in rotation.attributes.items()}
    attributes["rotary_embedding_dim"] = part.size
    builder = Builder(rewriter, node, [rest.value])
    dtype = rewriter.dtype(rest.value)
    result = builder.node("RotaryEmbedding", [rest.value, *rotation.inputs[1:]], shape, dtype, **attributes)
    return rewriter.replace(node, result)


def _flat(node: ir.Node, rewriter: Rewriter) -> bool:
    """An embedding of rank 4 on transposed heads rotates the projection itself."""
    data = node.inputs[0]
    projection = None if data is None else _projection(data, rewriter)
    shape = rewriter.shape(data)
    if projection is None or shape is None or None in shape or not isinstance(shape[1], int):
        return False
    batch, heads, length, size = (s for s in shape if s is not None)
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes["num_heads"] = heads
    dtype, whole = rewriter.dtype(data), (batch, length, heads * size)
    try:
        with Builder(rewriter, node, [projection]) as builder:
            flat = builder.reshape(projection, whole)
            turned = builder.node("RotaryEmbedding", [flat, *node.inputs[1:]], whole, dtype, **attributes)
            apart = builder.reshape(turned, [batch, length, heads, size])
            return rewriter.replace(node, builder.transpose(apart, [0, 2, 1, 3]))
    except Unbuildable:
        return False


RULES = (
    RaisingRule(
        "rotary",
        ("Add", "Concat"),
        _rotate,
        "x · cos + (-x₂, x₁) · sin;  (x₁ cos - x₂ sin, x₂ cos + x₁ sin)",
        "RotaryEmbedding",
    ),
    RaisingRule("rotary-part", ("Concat",), _partial, "(rotated(x[:r]), x[r:])", "RotaryEmbedding"),
    RaisingRule("rotary-heads", ("RotaryEmbedding",), _flat, "RotaryEmbedding of transposed heads", "RotaryEmbedding"),
)


@dataclasses.dataclass(frozen=True)
class RaiseRotary(RaisingPass):
    """Lifts rotary position embedding into the standard's operator."""

    def raising_rules(self) -> tuple[RaisingRule, ...]:
        """The rules of this module."""
        return RULES

    def rules(self) -> tuple[Rule, ...]:
        """The rules, and those that join shape changes around the operator."""
        return (*RULES, *compose_transposes.RULES, *merge_reshapes.RULES)
