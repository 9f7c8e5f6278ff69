"""Convolutions on tensor cores: which, in which numbers."""

from __future__ import annotations

import numpy as np
from tvm.ir import Expr

from mmopt.backends.compute import Map, Tensor
from mmopt.backends.cpu.choosing import Workload, dim
from mmopt.backends.cpu.loops import i64, product, static
from mmopt.backends.cuda.kernels.convolution import TensorConvolution
from mmopt.backends.cuda.kernels.operand import CHUNK
from mmopt.backends.cuda.kernels.product import KINDS, OLDEST
from mmopt.backends.expressions import itemsize, simplify
from mmopt.lowering.cuda.products import no_zero, single
from mmopt.lowering.cuda.tiles import chosen_tile, workload_of
from mmopt.lowering.ops.conv import Geometry
from mmopt.lowering.ops.conv_narrow import known_widened
from mmopt.lowering.registry import OpNode
from mmopt.lowering.values import Quantized, Value


def tensor_convolution(
    node: OpNode, x: Value, w: Value, bias: Value | None, groups: int, shape: Geometry
) -> Value | None:
    """A convolution by constant filters on tensor cores.

    Args:
        node: The node being lowered.
        x: ``[N, C, space…]`` with one or two axes of space.
        w: ``[O, C, kernel…]``.
        bias: ``[O]``.
        groups: Groups of channels; only one is covered.
        shape: Strides, dilations, padding.

    Returns:
        ``[N, O, space…]`` of x's type; ``None`` where another way has to be found.
    """
    if groups != 1 or x.ndim not in (3, 4) or any(static(d) == 0 for d in (*x.shape, *w.shape)):
        return None
    if x.quantized is not None and w.quantized is not None:
        made = _quantized(node, x.quantized, w.quantized, shape)
        if made is not None:
            return _finished(node, made, bias, x.dtype)
    pair = (x.narrow, w.narrow) if x.narrow is not None and w.narrow is not None else (x, w)
    for data, filters in (pair, (x, known_widened(w))):
        if filters.constant is not None and _usable(node, data, filters) and itemsize(data.dtype) > 1:
            return _finished(node, _total(node, data, filters, shape, None), bias, x.dtype)
    return None


def _usable(node: OpNode, x: Value, w: Value) -> bool:
    return (w.dtype, x.dtype) in KINDS and node.context.program.profile.sm >= OLDEST[x.dtype]


def _total(node: OpNode, x: Value, w: Value, shape: Geometry, fill: Expr | None) -> Tensor:
    """Sums of products, in float32 or int32."""
    assert w.constant is not None
    context, channels = node.context, w.constant.shape[0]
    depth, each = int(np.prod(w.constant.shape[1:])), CHUNK // itemsize(w.dtype)

    def pack(weight: np.ndarray) -> np.ndarray:
        rows = np.zeros((channels, -(-depth // each) * each), weight.dtype)
        rows[:, :depth] = weight.reshape(channels, depth)
        return rows

    space = shape.window.output(shape.padded_extents(x.shape[2:]))
    pixels = simplify(product((x.shape[0], *space)))
    sizes = channels, dim(pixels), depth
    workload = _workload(x, w, shape, sizes)
    nest = TensorConvolution(
        context.dense(x),
        context.program.packed(w, ("filter rows", each), pack),
        depth=depth,
        window=shape.window,
        before=shape.begin,
        space=space,
        tile=chosen_tile(context.program, workload, sizes, 1, x.dtype),
        fill=fill,
    )
    nest.workload = workload
    return nest.output


def _workload(x: Value, w: Value, shape: Geometry, sizes: tuple[int, int | str, int]) -> Workload:
    channels, pixels, depth = sizes
    space = "x".join(str(dim(extent)) for extent in x.shape[2:])
    dims = {
        "n": dim(x.shape[0]),
        "c": dim(x.shape[1]),
        "o": channels,
        "space": "?" if "?" in space else space,
        "kernel": "x".join(map(str, shape.window.kernel)),
        "strides": "x".join(map(str, shape.window.strides)),
        "dilations": "x".join(map(str, shape.window.dilations)),
        "pixels": pixels,
    }
    return workload_of("tensor_convolution", dims, (x.dtype, w.dtype), (channels, pixels, depth))


def _finished(node: OpNode, total: Tensor, bias: Value | None, dtype: str) -> Value:
    """``total`` with the bias, in the type of the result."""
    if bias is None and total.dtype == dtype:
        return Value(total, name=node.name)
    addend = None if bias is None else node.context.tensor(bias)

    def body(*at: Expr) -> Expr:
        value = total[at] if addend is None else total[at] + addend[at[1]].astype("float32")
        return value.astype(dtype)

    return Value(Map(total.shape, dtype, body, "bias"), name=node.name)


def _quantized(node: OpNode, x: Quantized, w: Quantized, shape: Geometry) -> Tensor | None:
    """``(x - zx) sx * (w - zw) sw``, the sum in integers: padding is the integer that stands for zero."""
    weight, scale = w.value.constant, w.scale.constant
    if weight is None or scale is None or x.value.bits or w.value.bits or not no_zero(w.zero):
        return None
    if not x.single or w.block or not (w.single or w.axis == 0) or not _usable(node, x.value, w.value):
        return None
    zero = None if no_zero(x.zero) else x.zero
    if zero is not None and zero.constant is None:
        return None
    offset = 0 if zero is None or zero.constant is None else int(zero.constant.reshape(-1)[0])
    total = _total(node, x.value, w.value, shape, i64(offset & 0xFF))
    channels = weight.shape[0]
    sums = weight.astype(np.int32).reshape(channels, -1).sum(axis=1, dtype=np.int32) * np.int32(offset)
    shifts = Value(constant=sums, name=f"{w.value.name}.sums")
    factors = Value(constant=np.broadcast_to(scale.reshape(-1), (channels,)).copy(), name=f"{w.value.name}.scales")

    def body(*at: Expr) -> Expr:
        value = total[at] - shifts.tensor[at[1]] if offset else total[at]
        return value.astype("float32") * (single(x.scale) * factors.tensor[at[1]])

    return Map(total.shape, "float32", body, "scaled")
