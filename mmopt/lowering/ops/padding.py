"""Pad and CenterCropPad."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map, Tensor
from mmopt.backends.cpu.kernels.pad import Pad
from mmopt.backends.expressions import simplify
from mmopt.lowering.ops.extents import (
    choose,
    constant_axes,
    i64,
    integers,
    is_axis,
    known,
    named,
    optional_integers,
    scalar,
    settled,
)
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import NotLowered, Value


@lowers("Pad")
def pad(node: OpNode) -> Value:
    """Elements added (or cropped) around each axis: a constant, or copies by reflection, of the edge, or wrapped."""
    data = node.input(0)
    pads = optional_integers(node, 1, "pads")
    if pads is None:
        raise NotLowered("the pads are missing")
    before, after, computed = _all_pads(node, data.ndim, pads.items)
    computed = computed or pads.data
    shape = [simplify(e + b + a) for e, b, a in zip(data.shape, before, after, strict=True)]
    shape = named(node, shape, "pad") if computed else settled(node, shape)
    mode = node.attr("mode", "constant")
    if mode == "constant":
        return padded(node, data, before, shape, _fill(node, data.dtype))
    if mode not in _SOURCES:
        raise NotLowered(f"padding mode {mode}")
    node.context.tensor(data)

    def body(*at: Expr) -> Expr:
        moved = zip(at, before, after, data.shape, strict=True)
        return data.tensor[tuple(i if _none(b, a) else _SOURCES[mode](i - b, e) for i, b, a, e in moved)]

    return Value(Map(shape, data.dtype, body, "pad"), name=node.name)


def padded(node: OpNode, data: Value, before: Sequence[Expr], shape: Sequence[Expr], value: Tensor | Expr) -> Value:
    """``data`` inside a tensor of ``shape`` that is ``value`` elsewhere."""
    if all(known(b) == 0 and e.same_as(s) for b, e, s in zip(before, data.shape, shape, strict=True)):
        return data
    return Value(Pad(node.context.tensor(data), before, shape, value).output, name=node.name)


def _none(before: Expr, after: Expr) -> bool:
    return known(before) == 0 and known(after) == 0


def _all_pads(node: OpNode, rank: int, pads: Sequence[Expr]) -> tuple[list[Expr], list[Expr], bool]:
    """Padding in front of and behind every axis, and whether it depends on data."""
    count = len(pads) // 2
    given = node.optional(3)
    axes = integers(node, given, "axes") if given is not None else None
    if axes is None:
        return list(pads[:rank]), list(pads[rank:]), False
    before, after = [i64(0)] * rank, [i64(0)] * rank
    if axes.constants is not None:
        for n, axis in enumerate(constant_axes(axes.constants, rank)):
            before[axis], after[axis] = pads[n], pads[count + n]
        return before, after, False
    for d in range(rank):
        for n, axis in enumerate(axes.items):
            here = is_axis([axis], rank, d)
            before[d], after[d] = choose(here, pads[n], before[d]), choose(here, pads[count + n], after[d])
    return before, after, True


def _fill(node: OpNode, dtype: str) -> Tensor | Expr:
    value = node.optional(2)
    if value is None:
        return tirx.const(node.attr("value", 0), dtype)
    if value.constant is not None:
        return tirx.const(np.asarray(value.constant).reshape(-1)[0].item(), dtype)
    return node.context.tensor(scalar(node, value))


def _edge(position: Expr, extent: Expr) -> Expr:
    return tirx.max(tirx.min(position, extent - 1), i64(0))


def _reflect(position: Expr, extent: Expr) -> Expr:
    """Mirrored at the first and last element, as often as it takes."""
    period = tirx.max((extent - 1) * 2, i64(1))
    phase = tirx.floormod(position, simplify(period))
    return tirx.min(phase, tirx.max((extent - 1) * 2 - phase, i64(0)))


def _wrap(position: Expr, extent: Expr) -> Expr:
    return tirx.floormod(position, extent)


_SOURCES: dict[str, Callable[[Expr, Expr], Expr]] = {"edge": _edge, "reflect": _reflect, "wrap": _wrap}


@lowers("CenterCropPad")
def center_crop_pad(node: OpNode) -> Value:
    """Each axis cropped or zero-padded around its centre to a given extent."""
    data = node.input(0)
    wanted = integers(node, node.input(1), "crop")
    axes = constant_axes(node.attr("axes", list(range(data.ndim))), data.ndim)
    shape, before = list(data.shape), [i64(0)] * data.ndim
    for axis, extent in zip(axes, wanted.items, strict=True):
        shape[axis] = extent
    shape = named(node, shape, "crop") if wanted.data else settled(node, shape)
    for axis in axes:
        lack = shape[axis] - data.shape[axis]
        before[axis] = choose(lack >= 0, tirx.floordiv(lack, i64(2)), -tirx.floordiv(-lack, i64(2)))
    return padded(node, data, before, shape, tirx.const(0, data.dtype))
