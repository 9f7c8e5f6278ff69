"""Lifts patch embeddings that are spelled as unfolding and a product into the convolution they are.

    p = Transpose(Reshape(x, [B, C, H/p, p, W/p, p])), y = Reshape(p, [B, H/p · W/p, C · p · p]) W + b
    →    y = Transpose(Reshape(Conv(x, W', b) {strides = kernel_shape = [p, p]}, [B, F, H/p · W/p]))

Equation: ``y[patch] = W · x[patch]``, for patches that do not overlap, in any order of channels, rows, columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mmopt.analysis.dims import Size
from mmopt.transforms.canonicalize.editing import Array, is_onnx, tensor_of
from mmopt.transforms.canonicalize.rewriting import Rewriter
from mmopt.transforms.raising.building import Builder, Unbuildable, sole_user
from mmopt.transforms.raising.layout import Atom, Group, Layout, Source, extent, sources
from mmopt.transforms.raising.rules import RaisingPass, RaisingRule

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)
_IMAGE = 4


@dataclasses.dataclass(frozen=True)
class _Patches:
    """An image and how it was cut up.

    Attributes:
        image: ``[batch, channels, height, width]``.
        inner: For channels, rows and columns of a patch their parts, in the image's order.
        grid: Patches along height and width.
    """

    image: ir.Value
    inner: tuple[Group, Group, Group]
    grid: tuple[Size, Size]


def _raise(node: ir.Node, rewriter: Rewriter) -> bool:
    value, weight = node.inputs[0], tensor_of(node.inputs[1])
    shape = rewriter.shape(value)
    if value is None or weight is None or shape is None or len(weight.shape) != 2 or None in shape or len(shape) < 2:
        return False
    found = _patches(value, shape, rewriter)
    if found is None:
        return False
    if isinstance(found, str):
        return rewriter.miss(node, f"patches: {found}.")
    if rewriter.dtype(value) not in _FLOATS:
        return rewriter.miss(node, "patches: they are not of a float type.")
    last, bias = _with_bias(node, rewriter)
    try:
        _emit(last, found, _kernel(np.asarray(weight.numpy()), found), bias, rewriter)
    except Unbuildable as reason:
        return rewriter.miss(node, f"patches: {reason}.")
    return True


def _patches(value: ir.Value, shape: Sequence[Size | None], rewriter: Rewriter) -> _Patches | str | None:
    """The image whose patches ``value`` holds, one a row; ``None`` where it holds something else."""
    sizes = [size for size in shape if size is not None]
    lead: list[Group] = [() if size == 1 else (Atom("lead", (n,), size),) for n, size in enumerate(sizes[:-1])]
    layout = Layout((*lead, (Atom("depth", (0,), sizes[-1]),)))
    reason: str | None = None
    for source in sources(value, layout, rewriter):
        if source.value is value or len(source.layout.groups) != _IMAGE or source.moves == 0:
            continue
        found = _cut(source)
        if isinstance(found, _Patches):
            return found
        reason = reason or found
    return reason


def _cut(source: Source) -> _Patches | str | None:
    """``source`` as an image cut into patches: every axis is grid outside and patch inside."""
    groups, layout = source.layout.groups, source.layout
    if layout.repeated or layout.picked or source.factor != 1:
        return None
    parts = [_grid_and_inner(group) for group in groups]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not (known[2][1] or known[3][1]):
        return None
    (batch, nothing), (channel_grid, channels), (high, rows), (wide, columns) = known
    # Heads of attention before their projection are rows of whole width: one column of patches is no grid.
    if nothing or channel_grid or not (high and wide):
        return None
    outer = (*batch, *high, *wide)
    if list(outer) != sorted(outer, key=lambda atom: atom.path):
        return "the patches are not in the order of rows and columns"
    if not all(isinstance(atom.size, int) for group in (channels, rows, columns) for atom in group):
        return "the size of a patch is not known"
    return _Patches(source.value, (channels, rows, columns), (extent(high), extent(wide)))


def _grid_and_inner(group: Group) -> tuple[Group, Group] | None:
    outer = tuple(atom for atom in group if atom.role == "lead")
    inner = tuple(atom for atom in group if atom.role == "depth")
    return (outer, inner) if group == (*outer, *inner) else None


def _kernel(weight: Array, patches: _Patches) -> Array:
    """``weight [features of a patch, outputs]`` as ``[outputs, channels, rows, columns]``."""
    atoms = [atom for group in patches.inner for atom in group]
    written = sorted(atoms, key=lambda atom: atom.path)
    cut = weight.reshape([*(int(atom.size) for atom in written if isinstance(atom.size, int)), weight.shape[1]])
    turned = cut.transpose([len(atoms), *(written.index(atom) for atom in atoms)])
    sizes = [extent(group) for group in patches.inner]
    return np.ascontiguousarray(turned.reshape([weight.shape[1], *(s for s in sizes if isinstance(s, int))]))


def _with_bias(node: ir.Node, rewriter: Rewriter) -> tuple[ir.Node, ir.Value | None]:
    """The last node of the layer, and its bias."""
    width = (rewriter.shape(node.outputs[0]) or (None,))[-1]
    user = sole_user(node.outputs[0])
    if user is not None and is_onnx(user, "Add"):
        for value in user.inputs:
            if tensor_of(value) is not None and rewriter.shape(value) == (width,):
                return user, value
    return node, None


def _emit(node: ir.Node, patches: _Patches, kernel: Array, bias: ir.Value | None, rewriter: Rewriter) -> None:
    with Builder(rewriter, node, [patches.image]) as builder:
        result, image = builder.shape(node.outputs[0]), builder.shape(patches.image)
        dtype = rewriter.dtype(patches.image)
        inputs = [patches.image, builder.constant(kernel, "kernel"), *([] if bias is None else [bias])]
        sizes = [int(size) for size in kernel.shape[2:]]
        shape = (image[0], kernel.shape[0], *patches.grid)
        value = builder.node("Conv", inputs, shape, dtype, kernel_shape=sizes, strides=sizes)
        count = patches.grid[0] * patches.grid[1]
        value = builder.transpose(builder.reshape(value, (image[0], kernel.shape[0], count)), (0, 2, 1))
        value = builder.reshape(value, result)
    rewriter.replace(node, value)


RULES = (
    RaisingRule("patches", ("MatMul",), _raise, "W · x[patch] for patches of an image, cut out by reshaping", "Conv"),
)


@dataclasses.dataclass(frozen=True)
class RaisePatches(RaisingPass):
    """Lifts patch embeddings into convolutions."""

    def raising_rules(self) -> tuple[RaisingRule, ...]:
        """The rules of this module."""
        return RULES
