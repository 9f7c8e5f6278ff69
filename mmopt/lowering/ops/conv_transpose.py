"""Transposed convolutions with steps as ordinary convolutions of the input as it is.

Result ``Y`` along an axis gets from input ``i`` through tap ``t`` where ``Y + begin = i · stride + t``. Results of
equal remainder ``p`` of ``Y + begin`` by the stride (a *phase*) use the taps ``p, p + stride, …`` only: a small
convolution of its own. All phases together are one convolution with as many times the output channels, whose results
are then put in their places. Nothing is multiplied by zeros between the inputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map, index
from mmopt.backends.cpu.loops import static
from mmopt.backends.expressions import simplify
from mmopt.lowering.registry import OpNode
from mmopt.lowering.values import Value

Convolve = Callable[[Value, Value, tuple[int, ...], list[Expr], list[Expr]], Value]
"""``convolve(x, filters, kernel, before, after)``: with steps of one, one group and no bias."""


def phase_filters(weight: np.ndarray, strides: Sequence[int]) -> np.ndarray:
    """``[C, O, *kernel]`` → ``[phases · O, C, *ceil(kernel / stride)]``, taps reversed, taps that do not exist zero."""
    depth, out, *kernel = weight.shape
    taps = [-(-k // s) for k, s in zip(kernel, strides, strict=True)]
    made = np.zeros((math.prod(strides), out, depth, *taps), weight.dtype)
    for number, phase in enumerate(itertools.product(*(range(s) for s in strides))):
        taken: tuple[Any, ...] = (..., *(slice(p, None, s) for p, s in zip(phase, strides, strict=True)))
        own = weight[taken]
        place: tuple[Any, ...] = (number, ..., *(slice(0, extent) for extent in own.shape[2:]))
        made[place] = own.swapaxes(0, 1)
    turned = np.flip(made, axis=tuple(range(3, made.ndim)))
    return np.ascontiguousarray(turned.reshape(-1, depth, *taps))


def in_phases(
    node: OpNode,
    x: Value,
    w: Value,
    bias: Value | None,
    strides: tuple[int, ...],
    begin: Sequence[Expr],
    out: Sequence[Expr],
    convolve: Convolve,
) -> Value | None:
    """A transposed convolution of one group without dilation.

    Args:
        node: The node being lowered.
        x: ``[N, C, *space]``.
        w: A constant ``[C, O, *kernel]``.
        bias: ``[O]``, if any.
        strides: Steps.
        begin: What is cut off in front of each axis of the full result.
        out: Spatial extents of the result.
        convolve: The ordinary convolution.

    Returns:
        The result, or none where it ends before the input does.
    """
    assert w.constant is not None
    channels = w.constant.shape[1]
    shifted = [simplify(tirx.floordiv(o + b - 1, index(s)) + 1) for o, b, s in zip(out, begin, strides, strict=True)]
    after = [simplify(r - e) for r, e in zip(shifted, x.shape[2:], strict=True)]
    if any(static(a) is None or (static(a) or 0) < 0 for a in after):
        return None
    filters = Value(constant=phase_filters(w.constant, strides), name=f"{w.name}.phases")
    kernel = tuple(-(-k // s) for k, s in zip(w.constant.shape[2:], strides, strict=True))
    phases = convolve(x, filters, kernel, [index(k - 1) for k in kernel], after)
    node.context.realize([phases], "phases")
    node.context.tensor(phases)
    return _placed(node, phases, bias, strides, begin, (x.shape[0], index(channels), *out))


def _placed(
    node: OpNode,
    phases: Value,
    bias: Value | None,
    strides: Sequence[int],
    begin: Sequence[Expr],
    shape: Sequence[Expr],
) -> Value:
    """The phases ``[N, phases · O, *space]`` interleaved to ``shape``, with the bias added, in the layout they have."""
    addend = None if bias is None else bias.tensor

    def origin(at: Sequence[Expr]) -> tuple[Expr, list[Expr]]:
        """Number of the phase of a position, and where it lies in the phase."""
        number: Expr = index(0)
        inside = []
        for position, start, stride in zip(at, begin, strides, strict=True):
            number = number * stride + tirx.floormod(position + start, index(stride))
            inside.append(tirx.floordiv(position + start, index(stride)))
        return number, inside

    def biased(value: Expr, channel: Expr) -> Expr:
        return value if addend is None else value + addend[channel]

    lanes = None if phases.blocked is None else static(phases.blocked.shape[-1])
    channels = static(shape[1]) or 1
    if phases.blocked is None or lanes is None or channels % lanes:
        plain = phases.tensor

        def body(n: Expr, o: Expr, *at: Expr) -> Expr:
            number, inside = origin(at)
            return biased(plain[(n, number * channels + o, *inside)], o)

        return Value(Map(shape, phases.dtype, body, "interleaved"), name=node.name)
    blocked, blocks = phases.blocked, channels // lanes

    def in_blocks(n: Expr, o: Expr, *rest: Expr) -> Expr:
        number, inside = origin(rest[:-1])
        return biased(blocked[(n, number * blocks + o, *inside, rest[-1])], o * lanes + rest[-1])

    extents = (shape[0], index(blocks), *shape[2:], index(lanes))
    return Value.in_blocks(Map(extents, phases.dtype, in_blocks, "interleaved"), node.name)
