"""Shapes of operators that move elements: reshape, transpose, slice, gather, concatenate, pad."""

from __future__ import annotations

from collections.abc import Sequence

from mmopt.analysis.dims import Size, at_least, floor_divide, maximum, minimum, product
from mmopt.analysis.shape_rules.registry import Elements, NodeView, Shape, broadcast, normalize_axis, shape_rule

_INT_END = 1 << 31
"""Exporters write an end of 2**31-1 or 2**63-1 for "to the end"."""


@shape_rule("Transpose")
def transpose(view: NodeView) -> Sequence[Shape] | None:
    """Dimensions in the order of ``perm``, reversed by default."""
    shape = view.shape()
    if shape is None:
        return None
    perm = view.ints("perm") or range(len(shape) - 1, -1, -1)
    return [tuple(shape[axis] for axis in perm)]


def complete(sizes: Sequence[Size | None]) -> list[Size] | None:
    """``sizes`` when every one is known."""
    known = [size for size in sizes if size is not None]
    return known if len(known) == len(sizes) else None


@shape_rule("Reshape")
def reshape(view: NodeView) -> Sequence[Shape] | None:
    """The target, where 0 copies a dimension (unless ``allowzero``) and -1 takes what is left."""
    shape = view.shape()
    target: Elements = tuple(view.ints("shape") or ()) if view.version < 5 else view.elements(1)
    if target is None:
        length = view.shape(1)
        return [(None,) * length[0]] if length is not None and length and isinstance(length[0], int) else None
    dims: list[Size | None] = list(target)
    if not view.integer("allowzero", 0):
        old: Sequence[Size | None] = (*(shape or ()), *[None] * len(dims))
        dims = [old[i] if dim == 0 else dim for i, dim in enumerate(dims)]
    if -1 in dims:
        dims[dims.index(-1)] = _remaining(shape, dims)
    elif dims.count(None) == 1:
        # Element counts agree, so one unknown dimension follows from the others.
        dims[dims.index(None)] = _remaining(shape, [-1 if d is None else d for d in dims])
    return [tuple(dims)]


def _remaining(shape: Shape, target: Sequence[Size | None]) -> Size | None:
    """What ``-1`` stands for. Equal dimensions on both sides cancel before anything is multiplied out."""
    if shape is None:
        return None
    left = list(shape)
    others: list[Size | None] = []
    for dim in target:
        if dim is not None and dim in left:
            left.remove(dim)
        elif dim != -1:
            others.append(dim)
    total, known = complete(left), complete(others)
    return None if total is None or known is None else floor_divide(product(total), product(known))


@shape_rule("Flatten")
def flatten(view: NodeView) -> Sequence[Shape] | None:
    """Two dimensions, split at ``axis`` (which may equal the rank)."""
    shape = view.shape()
    if shape is None:
        return [(None, None)]
    axis = view.integer("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    parts = (complete(shape[:axis]), complete(shape[axis:]))
    return [tuple(None if part is None else product(part) for part in parts)]


@shape_rule("Squeeze")
def squeeze(view: NodeView) -> Sequence[Shape] | None:
    """Without the given axes, or without every axis of size 1 when none are given."""
    shape = view.shape()
    if shape is None:
        return None
    if view.attribute("axes") is None and not view.has(1):
        if not all(isinstance(dim, int) for dim in shape):
            return None
        return [tuple(dim for dim in shape if dim != 1)]
    axes = view.axes(1)
    if axes is None:
        return None
    dropped = {normalize_axis(axis, len(shape)) for axis in axes}
    return [tuple(dim for i, dim in enumerate(shape) if i not in dropped)]


@shape_rule("Unsqueeze")
def unsqueeze(view: NodeView) -> Sequence[Shape] | None:
    """With axes of size 1 inserted; ``axes`` count in the output."""
    shape, axes = view.shape(), view.axes(1)
    if shape is None or axes is None:
        return None
    rank = len(shape) + len(axes)
    added = {normalize_axis(axis, rank) for axis in axes}
    rest = iter(shape)
    return [tuple(1 if i in added else next(rest) for i in range(rank))]


@shape_rule("Concat")
def concat(view: NodeView) -> Sequence[Shape] | None:
    """Sizes add up along ``axis`` and agree elsewhere."""
    shapes = [view.shape(i) for i in range(len(view.node.inputs))]
    known = [shape for shape in shapes if shape is not None]
    if not known:
        return None
    rank = len(known[0])
    axis = normalize_axis(view.integer("axis", 1), rank)
    dims: list[Size | None] = [_agreed([shape[i] for shape in known]) for i in range(rank)]
    parts = complete([shape[axis] for shape in known]) if len(known) == len(shapes) else None
    total: Size = 0
    for part in parts or ():
        total = total + part
    dims[axis] = None if parts is None else total
    return [tuple(dims)]


def _agreed(dims: Sequence[Size | None]) -> Size | None:
    """The most telling of dimensions that must be equal: a number before a name before nothing."""
    numbers = [dim for dim in dims if isinstance(dim, int)]
    named = [dim for dim in dims if dim is not None]
    return numbers[0] if numbers else (named[0] if named else None)


@shape_rule("Split")
def split(view: NodeView) -> Sequence[Shape] | None:
    """Given sizes, or equal parts with a smaller last one."""
    shape, count = view.shape(), len(view.node.outputs)
    if shape is None:
        return None
    axis = normalize_axis(view.integer("axis", 0), len(shape))
    sizes = _split_sizes(view, shape[axis], count)
    return [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]


def _split_sizes(view: NodeView, total: Size | None, count: int) -> Sequence[Size | None]:
    given: Elements = tuple(view.ints("split") or ()) or None
    if view.has(1):
        given = view.elements(1)
        return given if given is not None and len(given) == count else [None] * count
    if given is not None or total is None:
        return given if given is not None else [None] * count
    part = floor_divide(total + (count - 1), count)
    return [part] * (count - 1) + [total - part * (count - 1)]


def slice_size(dim: Size | None, start: Size | None, end: Size | None, step: Size | None) -> Size | None:
    """How many elements ``start:end:step`` takes of ``dim``, clamped as ONNX clamps.

    Unlike numpy, ONNX has no way to say "before the first" for a negative step except a very negative end.
    """
    if dim is None or start is None or end is None or not isinstance(step, int) or step == 0:
        return None
    if isinstance(dim, int) and isinstance(start, int) and isinstance(end, int):
        return len(range(*slice(start, None if step < 0 and end < -dim else end, step).indices(dim)))
    if step < 0:
        full = start == -1 or (isinstance(start, int) and start >= _INT_END - 1)
        low = isinstance(end, int) and end <= -_INT_END + 1
        return floor_divide(dim + (-step - 1), -step) if full and low else None
    first, last = _clamped(start, dim), _clamped(end, dim)
    if first is None or last is None:
        return None
    length = last if first == 0 else maximum(last - first, 0)
    return length if step == 1 else floor_divide(length + (step - 1), step)


def _clamped(position: Size, dim: Size) -> Size | None:
    if isinstance(position, int):
        if position >= _INT_END - 1:
            return dim
        return minimum(position, dim) if position >= 0 else maximum(dim + position, 0)
    if at_least(position, 0):
        return minimum(position, dim)
    if at_least(0, position + 1):
        return maximum(dim + position, 0)
    return None


@shape_rule("Slice")
def slice_shape(view: NodeView) -> Sequence[Shape] | None:
    """Only the sliced axes change. Opsets before 10 give starts, ends and axes as attributes."""
    shape = view.shape()
    if shape is None:
        return None
    if view.version < 10:
        starts, ends = tuple(view.ints("starts") or ()), tuple(view.ints("ends") or ())
        axes, steps = view.ints("axes"), None
    else:
        starts, ends = view.elements(1), view.elements(2)  # type: ignore[assignment]
        axes, steps = (view.integers(3), view.elements(4))
        if view.has(3) and axes is None:
            return [(None,) * len(shape)]
    length = view.shape(1)
    count = len(starts) if starts is not None else (length[0] if length else None)
    if not isinstance(count, int):
        return [(None,) * len(shape)]
    dims = list(shape)
    for i, axis in enumerate(axes if axes is not None else range(count)):
        step: Size | None = 1 if not view.has(4) else (steps[i] if steps is not None else None)
        at = normalize_axis(axis, len(dims))
        known = starts is not None and ends is not None
        dims[at] = slice_size(dims[at], starts[i], ends[i], step) if known else None
    return [tuple(dims)]


@shape_rule("Gather")
def gather(view: NodeView) -> Sequence[Shape] | None:
    """The gathered axis is replaced by the shape of the indices."""
    data, indices = view.shape(0), view.shape(1)
    if data is None or indices is None:
        return None
    axis = normalize_axis(view.integer("axis", 0), len(data))
    return [(*data[:axis], *indices, *data[axis + 1 :])]


@shape_rule("GatherElements")
def gather_elements(view: NodeView) -> Sequence[Shape] | None:
    """The shape of the indices."""
    return [view.shape(1)]


@shape_rule("GatherND")
def gather_nd(view: NodeView) -> Sequence[Shape] | None:
    """Index tuples address the axes after ``batch_dims``; the rest is copied."""
    data, indices = view.shape(0), view.shape(1)
    if data is None or not indices or not isinstance(indices[-1], int):
        return None
    return [(*indices[:-1], *data[view.integer("batch_dims", 0) + indices[-1] :])]


@shape_rule("Expand")
def expand(view: NodeView) -> Sequence[Shape] | None:
    """The broadcast of the input and the target, both ways."""
    target = view.elements(1)
    if target is None:
        shape, length = view.shape(0), view.shape(1)
        if shape is None or not length or not isinstance(length[0], int):
            return None
        return [(None,) * max(len(shape), length[0])]
    return [broadcast(view.shape(0), target)]


@shape_rule("Tile")
def tile(view: NodeView) -> Sequence[Shape] | None:
    """Each dimension times its repeat."""
    shape, repeats = view.shape(), view.elements(1)
    if shape is None or view.version < 6:
        return None
    if repeats is None or len(repeats) != len(shape):
        return [(None,) * len(shape)]
    return [tuple(None if d is None or r is None else d * r for d, r in zip(shape, repeats, strict=False))]


@shape_rule("Pad")
def pad(view: NodeView) -> Sequence[Shape] | None:
    """Pads before and after each of ``axes`` are added; negative ones crop."""
    shape = view.shape()
    if shape is None:
        return None
    attribute = view.ints("pads") or view.ints("paddings")
    pads: Elements = tuple(attribute) if attribute is not None else view.elements(1)
    axes = view.integers(3) if view.has(3) else list(range(len(shape)))
    if pads is None or axes is None or len(pads) != 2 * len(axes):
        return [(None,) * len(shape)]
    dims = list(shape)
    for i, axis in enumerate(axes):
        at = normalize_axis(axis, len(shape))
        dim, before, after = dims[at], pads[i], pads[i + len(axes)]
        dims[at] = None if dim is None or before is None or after is None else dim + before + after
    return [tuple(dims)]


@shape_rule("DepthToSpace", "SpaceToDepth")
def depth_space(view: NodeView) -> Sequence[Shape] | None:
    """Blocks of ``blocksize``² channels become pixels, or the other way round."""
    shape, block = view.shape(), view.integer("blocksize", 1)
    if shape is None or len(shape) != 4:
        return None
    n, c, h, w = shape
    if c is None or h is None or w is None:
        return [(n, None, None, None)]
    if view.node.op_type == "DepthToSpace":
        return [(n, floor_divide(c, block * block), h * block, w * block)]
    return [(n, c * (block * block), floor_divide(h, block), floor_divide(w, block))]
