"""Shapes of products, convolutions, pooling, reductions and generators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmopt.analysis.dims import Size, floor_divide, maximum
from mmopt.analysis.shape_rules.registry import NodeView, Shape, broadcast, normalize_axis, shape_rule

_FIRST_WITH_AXES_INPUT = {"ReduceSum": 13}
"""Opset from which a reduction takes its axes as an input; 18 for all others."""


@shape_rule("MatMul", "MatMulInteger")
def matmul(view: NodeView) -> Sequence[Shape] | None:
    """numpy's rule: batch dimensions broadcast, a vector loses its own axis."""
    return [matmul_shape(view.shape(0), view.shape(1))]


@shape_rule("QLinearMatMul")
def qlinear_matmul(view: NodeView) -> Sequence[Shape] | None:
    """As MatMul; the operands stand at inputs 0 and 3."""
    return [matmul_shape(view.shape(0), view.shape(3))]


def matmul_shape(a: Shape, b: Shape) -> Shape:
    """Shape of ``a @ b``."""
    if not a or not b:
        return None
    batch = broadcast(a[:-2], b[:-2])
    if batch is None:
        return None
    rows = (a[-2],) if len(a) > 1 else ()
    columns = (b[-1],) if len(b) > 1 else ()
    return (*batch, *rows, *columns)


@shape_rule("Gemm")
def gemm(view: NodeView) -> Sequence[Shape] | None:
    """``[M, N]`` after the optional transpositions."""
    a, b = view.shape(0), view.shape(1)
    rows = None if a is None else a[1 if view.integer("transA", 0) else 0]
    columns = None if b is None else b[0 if view.integer("transB", 0) else 1]
    return [(rows, columns)]


@shape_rule("Conv", "ConvInteger")
def convolution(view: NodeView) -> Sequence[Shape] | None:
    """``[N, M, floor((x + pads - dilated kernel) / stride) + 1 …]``."""
    x, w = view.shape(0), view.shape(1)
    return [_convolved(view, x, w)]


@shape_rule("QLinearConv")
def qlinear_convolution(view: NodeView) -> Sequence[Shape] | None:
    """As Conv; data and weights stand at inputs 0 and 3."""
    return [_convolved(view, view.shape(0), view.shape(3))]


def _convolved(view: NodeView, x: Shape, w: Shape) -> Shape:
    if x is None or w is None:
        return None
    kernel = view.ints("kernel_shape") or w[2:]
    return (x[0], w[0], *_windows(view, x[2:], kernel))


@shape_rule("MaxPool", "AveragePool", "LpPool")
def pool(view: NodeView) -> Sequence[Shape] | None:
    """Spatial axes as a convolution's. ``ceil_mode`` differs by opset and is left to the onnx library."""
    x, kernel = view.shape(), view.ints("kernel_shape")
    if x is None or kernel is None or view.integer("ceil_mode", 0):
        return None
    return [(*x[:2], *_windows(view, x[2:], kernel))] * len(view.node.outputs)


def _windows(view: NodeView, spatial: Sequence[Size | None], kernel: Sequence[Size | None]) -> list[Size | None]:
    rank = len(spatial)
    strides = view.ints("strides") or [1] * rank
    dilations = view.ints("dilations") or [1] * rank
    pads = view.ints("pads") or [0] * (2 * rank)
    auto = view.text("auto_pad", "NOTSET")
    if auto == "VALID":
        pads = [0] * (2 * rank)
    out: list[Size | None] = []
    for i, (size, window) in enumerate(zip(spatial, kernel, strict=False)):
        if size is None or window is None:
            out.append(None)
        elif auto.startswith("SAME"):
            out.append(floor_divide(size + (strides[i] - 1), strides[i]))
        else:
            reach = (window - 1) * dilations[i] + 1
            out.append(floor_divide(size + (pads[i] + pads[i + rank]) - reach, strides[i]) + 1)
    return out


@shape_rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(view: NodeView) -> Sequence[Shape] | None:
    """Spatial axes shrink to 1."""
    x = view.shape()
    return None if x is None else [(*x[:2], *[1] * (len(x) - 2))]


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")


@shape_rule(*(f"Reduce{kind}" for kind in _REDUCTIONS))
def reduce(view: NodeView) -> Sequence[Shape] | None:
    """The reduced axes vanish, or stay with size 1 under ``keepdims``."""
    shape, keep = view.shape(), view.integer("keepdims", 1)
    if shape is None:
        return None
    as_input = view.version >= _FIRST_WITH_AXES_INPUT.get(view.node.op_type, 18)
    axes = (view.integers(1) if view.has(1) else []) if as_input else (view.ints("axes") or [])
    if axes is None:
        return [(None,) * len(shape)] if keep else None
    if not axes and as_input and view.integer("noop_with_empty_axes", 0):
        return [shape]
    reduced = {normalize_axis(axis, len(shape)) for axis in axes} or set(range(len(shape)))
    return [_without(shape, reduced, bool(keep))]


@shape_rule("ArgMax", "ArgMin")
def arg_extreme(view: NodeView) -> Sequence[Shape] | None:
    """One axis is reduced."""
    shape = view.shape()
    if shape is None:
        return None
    return [_without(shape, {normalize_axis(view.integer("axis", 0), len(shape))}, bool(view.integer("keepdims", 1)))]


def _without(shape: Sequence[Size | None], reduced: set[int], keep: bool) -> Shape:
    if keep:
        return tuple(1 if i in reduced else dim for i, dim in enumerate(shape))
    return tuple(dim for i, dim in enumerate(shape) if i not in reduced)


@shape_rule("TopK")
def top_k(view: NodeView) -> Sequence[Shape] | None:
    """Values and indices: ``k`` along ``axis``."""
    shape = view.shape()
    if shape is None:
        return None
    axis = normalize_axis(view.integer("axis", -1), len(shape))
    elements = view.elements(1)
    k: Size | None = view.integer("k", 0) if view.version < 10 else (elements[0] if elements else None)
    return [(*shape[:axis], k, *shape[axis + 1 :])] * 2


@shape_rule("OneHot")
def one_hot(view: NodeView) -> Sequence[Shape] | None:
    """An axis of size ``depth`` is inserted."""
    shape, depth = view.shape(0), view.elements(1)
    if shape is None:
        return None
    axis = normalize_axis(view.integer("axis", -1), len(shape) + 1)
    return [(*shape[:axis], depth[0] if depth else None, *shape[axis:])]


@shape_rule("Shape")
def shape_of(view: NodeView) -> Sequence[Shape] | None:
    """A vector with one number per axis in ``start:end``."""
    shape = view.shape()
    return [(None,)] if shape is None else [(len(shape_slice(view, shape)),)]


def shape_slice(view: NodeView, shape: Sequence[Size | None]) -> Sequence[Size | None]:
    """The dimensions that ``Shape`` with ``start`` and ``end`` gives."""
    end = view.attribute("end")
    return shape[view.integer("start", 0) : None if end is None else end.as_int()]


@shape_rule("Size")
def size_of(view: NodeView) -> Sequence[Shape]:
    """A scalar."""
    return [()]


@shape_rule("ConstantOfShape")
def constant_of_shape(view: NodeView) -> Sequence[Shape] | None:
    """The shape is the input's elements."""
    elements = view.elements()
    if elements is not None:
        return [elements]
    length = view.shape()
    return [(None,) * length[0]] if length and isinstance(length[0], int) else None


@shape_rule("Range")
def range_shape(view: NodeView) -> Sequence[Shape]:
    """``max(ceil((limit - start) / delta), 0)`` numbers."""
    start, limit, delta = (view.elements(i) for i in range(3))
    if start is None or limit is None or delta is None:
        return [(None,)]
    first, last, step = start[0], limit[0], delta[0]
    if first is None or last is None or not isinstance(step, int) or step == 0:
        return [(None,)]
    span = last - first if step > 0 else first - last
    return [(maximum(floor_divide(span + (abs(step) - 1), abs(step)), 0),)]


@shape_rule("NonZero")
def non_zero(view: NodeView) -> Sequence[Shape]:
    """One row per axis; how many columns depends on the data."""
    shape = view.shape()
    return [(None if shape is None else max(len(shape), 1), None)]


@shape_rule("LSTM", "GRU", "RNN")
def recurrent(view: NodeView) -> Sequence[Shape] | None:
    """``Y [T, D, B, H]`` (or ``[B, T, D, H]``), then the last states ``[D, B, H]``."""
    x, r = view.shape(0), view.shape(2)
    if x is None or len(x) != 3 or r is None or len(r) != 3:
        return None
    directions: Size = 2 if view.text("direction", "forward") == "bidirectional" else 1
    hidden: Size | None = view.integer("hidden_size", 0) or r[2]
    if view.integer("layout", 0):
        states: Shape = (x[0], directions, hidden)
        return [(x[0], x[1], directions, hidden), states, states][: len(view.node.outputs)]
    states = (directions, x[1], hidden)
    return [(x[0], directions, x[1], hidden), states, states][: len(view.node.outputs)]


@shape_rule("Resize")
def resize(view: NodeView) -> Sequence[Shape] | None:
    """Given sizes, or ``floor(size * scale)``; the aspect-ratio policies are left to the onnx library."""
    shape = view.shape()
    if shape is None or view.version < 11 or view.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        return None
    axes = view.ints("axes")
    at = range(len(shape)) if axes is None else [normalize_axis(axis, len(shape)) for axis in axes]
    dims = list(shape)
    sizes = view.elements(3)
    if view.has(3) and sizes:
        for axis, size in zip(at, sizes, strict=False):
            dims[axis] = size
        return [tuple(dims)]
    scales = view.array(2)
    if scales is None or scales.size != len(at):
        return None if view.has(2) and not view.has(3) and scales is not None else [(None,) * len(shape)]
    for axis, scale in zip(at, scales.astype(np.float32), strict=False):
        dims[axis] = _scaled(dims[axis], scale)
    return [tuple(dims)]


def _scaled(dim: Size | None, scale: np.float32) -> Size | None:
    if dim is None:
        return None
    if isinstance(dim, int):
        return int(np.floor(np.float32(dim) * scale))
    if scale == int(scale):
        return dim * int(scale)
    inverse = float(1 / scale)
    return floor_divide(dim, int(inverse)) if inverse.is_integer() else None


@shape_rule("Attention")
def attention(view: NodeView) -> Sequence[Shape] | None:
    """``Y``, the present keys and values, and the scores; heads are an axis (rank 4) or part of the last one (rank 3).

    The onnx library takes a symbolic size for 0 here (as of 1.23), so it is not asked.
    """
    count = len(view.node.outputs)
    q, k, v = (_split_heads(view, i) for i in range(3))
    if q is None or k is None or v is None:
        return [None] * count
    past = view.shape(4)
    length = k[2] if past is None and not view.has(4) else _sum_or_none(k[2], past[2] if past is not None else None)
    y: Shape = (q[0], q[1], q[2], v[3])
    if len(view.shape(0) or ()) == 3:
        y = (q[0], q[2], None if q[1] is None or v[3] is None else q[1] * v[3])
    return [y, (k[0], k[1], length, k[3]), (v[0], v[1], length, v[3]), (q[0], q[1], q[2], length)][:count]


def _split_heads(view: NodeView, index: int) -> Shape:
    """``[batch, heads, sequence, head size]`` of an attention input."""
    shape = view.shape(index)
    if shape is None or len(shape) == 4:
        return shape
    heads = view.integer("q_num_heads" if index == 0 else "kv_num_heads", 0)
    size = shape[2]
    return (shape[0], heads or None, shape[1], None if size is None or not heads else floor_divide(size, heads))


def _sum_or_none(a: Size | None, b: Size | None) -> Size | None:
    return None if a is None or b is None else a + b
