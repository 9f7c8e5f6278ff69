"""Convolutions of values that remember what they were: integers before dequantizing, narrow floats before widening."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map, Source, Tensor, guarded, index
from mmopt.backends.cpu.choosing import Workload, dim, typical
from mmopt.backends.cpu.dot import Dot, dot_for
from mmopt.backends.cpu.kernels.conv_dot import Cut, DotConvolution, Shape, Walk, block_of, candidates, pack_filters
from mmopt.backends.cpu.kernels.tile import spans
from mmopt.backends.cpu.loops import split_index, static
from mmopt.lowering.ops.products import NARROW_FLOATS
from mmopt.lowering.registry import OpNode
from mmopt.lowering.values import Quantized, Value, plain_view

if TYPE_CHECKING:
    from mmopt.lowering.ops.conv import Geometry

BYTES = ("int8", "uint8")

Rule = Callable[[Expr, Expr], Expr]
"""An element of the final result from a sum and the number of its channel."""


def narrow_convolution(
    node: OpNode, x: Value, w: Value, bias: Value | None, groups: int, shape: Geometry
) -> Value | None:
    """A convolution computed in the narrow numbers that its operands were made from.

    Args:
        node: The node being lowered.
        x: ``[N, C, *space]``, float32.
        w: ``[O, C/groups, *kernel]``, float32.
        bias: ``[O]``, if any.
        groups: Number of groups.
        shape: Geometry.

    Returns:
        float32 ``[N, O, *space]``; ``None`` when the operands remember nothing narrower, or there is no kernel.
    """
    if x.dtype != "float32" or w.dtype != "float32":
        return None
    bias = None if bias is None else known_widened(bias)
    if x.narrow is not None and w.narrow is not None and x.narrow.dtype == w.narrow.dtype:
        return _floats(node, x.narrow, w.narrow, bias, groups, shape)
    if x.quantized is not None and w.quantized is not None:
        return _dequantized(node, x.quantized, w.quantized, bias, groups, shape)
    return None


def known_widened(value: Value) -> Value:
    """``value`` as a constant, where it is one in another form: widened from a constant, or dequantized from one."""
    if value.constant is not None:
        return value
    if value.narrow is not None and value.narrow.constant is not None:
        return Value(constant=value.narrow.constant.astype(np.float32), name=value.name)
    known = value.quantized
    if known is None or known.block or known.value.constant is None or known.scale.constant is None:
        return value
    zero = np.zeros(1, np.int32) if known.zero is None else known.zero.constant
    if zero is None:
        return value
    data = known.value.constant
    around = [1] * data.ndim
    if not known.single:
        around[known.axis] = -1
    centred = data.astype(np.int64) - zero.astype(np.int64).reshape(around if zero.size > 1 else [1] * data.ndim)
    wide = centred.astype(np.float32) * known.scale.constant.astype(np.float32).reshape(around)
    return Value(constant=wide.astype(np.float32).reshape(data.shape), name=value.name)


# -- floats ----------------------------------------------------------------------------------------------------


def _floats(node: OpNode, x: Value, w: Value, bias: Value | None, groups: int, shape: Geometry) -> Value | None:
    dot = dot_for(node.context.program.profile, x.dtype, w.dtype)
    if dot is None or w.constant is None:
        return None
    plan = _Plan.of(node, x, w.constant, groups, shape, dot)
    if plan is None:
        return None
    total = plan.sums(node, x, w.constant, w.name, 0, f"conv_{NARROW_FLOATS[x.dtype]}")
    if bias is None:
        return plan.finished(node, total, "float32", None)
    addend = node.context.tensor(bias)
    return plan.finished(node, total, "float32", lambda value, channel: value + addend[channel])


# -- integers --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class IntegerSums:
    """Sums of products of centred 8-bit integers, before anything is stored.

    Attributes:
        plan: How they are computed.
        total: The uncentred sums.
        excess: What each channel's sums are too large by.
    """

    plan: _Plan
    total: Tensor
    excess: Value

    def finished(self, node: OpNode, dtype: str, rule: Rule | None) -> Value:
        """The convolution's result: ``rule`` of each centred sum."""
        excess = self.excess.tensor

        def centred(value: Expr, channel: Expr) -> Expr:
            exact = value - excess[channel]
            return exact if rule is None else rule(exact, channel)

        return self.plan.finished(node, self.total, dtype, centred)

    def scaled(self, node: OpNode, factors: np.ndarray, bias: np.ndarray | None) -> Value:
        """float32 ``(sum − excess) · factor + bias`` of each channel, in two instructions."""
        assert self.excess.constant is not None
        offsets = -self.excess.constant.astype(np.float64) * factors + (0.0 if bias is None else bias.reshape(-1))
        factor = Value(constant=np.ascontiguousarray(factors), name=f"{node.name}_scales").tensor
        offset = Value(constant=offsets.astype(np.float32), name=f"{node.name}_offsets").tensor
        rule = lambda value, channel: value.astype("float32") * factor[channel] + offset[channel]  # noqa: E731
        return self.plan.finished(node, self.total, "float32", rule)


def integer_sums(
    node: OpNode, x: Value, w: Value, x_zero: Value | None, w_zero: Value | None, groups: int, shape: Geometry
) -> IntegerSums | None:
    """Σ (x − x_zero)(w − w_zero) in 32 bits, exactly; padding counts as x_zero.

    Returns:
        ``None`` when there is no kernel: the filter or a zero point is not constant, or a centred filter does not fit
        into 8 bits.
    """
    if x.dtype not in BYTES or w.constant is None or w.dtype not in BYTES:
        return None
    zero = _number(x_zero)
    centred = _centred(w.constant, w_zero)
    dot = dot_for(node.context.program.profile, x.dtype, "int8")
    if zero is None or centred is None or dot is None:
        return None
    plan = _Plan.of(node, x, centred, groups, shape, dot)
    if plan is None:
        return None
    total = plan.sums(node, x, centred, w.name, zero, "conv_int8")
    weights = centred.astype(np.int64).reshape(centred.shape[0], -1).sum(axis=1)
    excess = Value(constant=((zero + dot.shift) * weights).astype(np.int32), name=f"{w.name}_excess")
    return IntegerSums(plan, total, excess)


def _number(zero: Value | None) -> int | None:
    """A zero point that is one number for all."""
    if zero is None:
        return 0
    if zero.constant is None or zero.constant.size != 1:
        return None
    return int(zero.constant.reshape(-1)[0])


def _centred(weight: np.ndarray, zero: Value | None) -> np.ndarray | None:
    """``weight`` less its zero point, in int8; ``None`` when that does not fit or is not known."""
    if zero is not None and (zero.constant is None or zero.constant.size not in (1, weight.shape[0])):
        return None
    offset = np.zeros(1, np.int32) if zero is None or zero.constant is None else zero.constant.astype(np.int32)
    wide = weight.astype(np.int32) - offset.reshape(-1, *[1] * (weight.ndim - 1))
    return wide.astype(np.int8) if wide.min(initial=0) >= -128 and wide.max(initial=0) <= 127 else None


def _dequantized(
    node: OpNode, x: Quantized, w: Quantized, bias: Value | None, groups: int, shape: Geometry
) -> Value | None:
    """Integer sums, times one scale for each channel, plus the bias."""
    if not x.single or x.block or w.block or x.scale.dtype != "float32" or (not w.single and w.axis != 0):
        return None
    if w.scale.constant is None:
        return None
    sums = integer_sums(node, x.value, w.value, x.zero, w.zero, groups, shape)
    if sums is None:
        return None
    channels = w.value.constant.shape[0] if w.value.constant is not None else 0
    each = np.broadcast_to(w.scale.constant.reshape(-1), (channels,)).astype(np.float32)
    known = x.scale.constant
    if known is not None:
        each = each * np.float32(known.reshape(-1)[0])
    if known is not None and (bias is None or bias.constant is not None):
        return sums.scaled(node, each, None if bias is None else bias.constant)
    factors = Value(constant=np.ascontiguousarray(each), name=f"{node.name}_scales").tensor
    step = None if known is not None else node.context.tensor(x.scale)
    addend = None if bias is None else node.context.tensor(bias)

    def rule(total: Expr, channel: Expr) -> Expr:
        value = total.astype("float32") * factors[channel]
        if step is not None:
            value = value * step[tuple(index(0) for _ in step.shape)]
        return value if addend is None else value + addend[channel]

    return sums.finished(node, "float32", rule)


# -- the kernel ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Plan:
    """A convolution that the template can do.

    Attributes:
        shape: Its sizes.
        walk: How its depth is walked.
        geometry: Its padding.
        block: Channels side by side in the result.
    """

    shape: Shape
    walk: Walk
    geometry: Geometry
    block: int

    @classmethod
    def of(cls, node: OpNode, x: Value, weight: np.ndarray, groups: int, geometry: Geometry, dot: Dot) -> _Plan | None:
        """The plan, or ``None`` for symbolic extents and for groups that no block fits."""
        out, depth = weight.shape[:2]
        padded = [static(extent) for extent in geometry.padded_extents(x.shape[2:])]
        if static(x.shape[1]) is None or None in padded or 0 in (static(x.shape[0]), out, depth):
            return None
        extents = tuple(extent or 0 for extent in padded)
        walk = Walk.of(dot, block_of(depth, dot), geometry.window, depth if groups == 1 else 0)
        block, each = walk.block, out // groups
        split = not walk.joined and any(s > 1 for s in geometry.window.strides)
        slack = int(walk.overlong(geometry.window))
        shape = Shape(extents, split, -(-depth // block) * block, each, groups, geometry.window, slack)
        if min(extents) < 1 or min(shape.space) < 1:
            return None
        results = (block_of(out, dot), block_of(each, dot)) if out % dot.group == 0 else (out,)
        result = next((b for b in results if groups == 1 or _holds_vectors(b, each, groups, dot.lanes)), None)
        if result is None or (groups > 1 and depth % block):
            return None
        return cls(shape, walk, geometry, result)

    def sums(self, node: OpNode, x: Value, weight: np.ndarray, name: str, zero: int, template: str) -> Tensor:
        """The template's result, in blocks."""
        program, dot = node.context.program, self.walk.dot
        shape, window = self.shape, self.shape.window
        images = dim(x.shape[0])
        dims = {"n": images, "c": weight.shape[1], "o": shape.outputs, "groups": shape.groups}
        dims |= {f"{n}{i}": v for n, of in _sizes(shape).items() for i, v in enumerate(of)}
        work = 2.0 * shape.outputs * shape.groups * weight[0].size * math.prod(shape.space) * typical(images, 1)
        workload = Workload(template, tuple(dims.items()), (x.dtype, str(weight.dtype), dot.total), work)
        offered = candidates(program.profile, dot, shape)
        scaled = [dataclasses.replace(c, cycles=c.cycles * typical(images, 1)) for c in offered]
        best = program.chooser.choose(workload, scaled)
        cut = Cut(**{f.name: best.number(f.name) for f in dataclasses.fields(Cut)})
        columns, walk = cut.vectors * dot.lanes, self.walk
        key = ("dot filters", shape.groups, walk.block, dot.name, dot.step, columns, walk.joined, window.kernel)
        filters = program.packed(
            Value(constant=weight, name=name), key, lambda data: pack_filters(data, shape.groups, walk, columns)
        )
        source = self._operand(node, x, zero)
        nest = DotConvolution(
            source, filters, shape=shape, walk=walk, cut=cut, block=self.block, name=template, workload=workload
        )
        return nest.output

    def _operand(self, node: OpNode, x: Value, zero: int) -> Source:
        """``x`` in memory in blocks, with padding around, in the type the instruction takes."""
        context, dot, block = node.context, self.walk.dot, self.walk.block
        channels = static(x.shape[1]) or 0
        whole = channels % block == 0
        as_is = not self.geometry.padded and not self.shape.split and not self.shape.slack
        if as_is and whole and x.dtype == dot.a:
            return context.in_blocks(x, block)
        context.realize([x], "operand")
        inside = x.in_blocks_of(block)
        origin = context.tensor(x) if inside is None else inside
        shift = dot.shift
        stored = "uint16" if dot.a == "bfloat16" else dot.a
        fill = tirx.const(zero + shift, stored)

        def element(at: tuple[Expr, ...]) -> Expr:
            value = origin[at]
            if stored == "uint16":
                return tirx.reinterpret("uint16", value)
            return (value.astype("int32") + shift).astype(stored) if shift else value.astype(stored)

        phases = math.prod(self.shape.phases)

        def body(n: Expr, c: Expr, *rest: Expr) -> Expr:
            *at, lane = rest
            number = tirx.floordiv(c, index(phases))
            place = self._place(at, tirx.floormod(c, index(phases)))
            doubts = self._doubts(x, place)
            channel = number * block + lane
            if not whole:
                doubts.append(channel < channels)
            where = (n, channel, *place) if inside is None else (n, number, *place, lane)
            return guarded(tirx.all(*doubts), lambda: element(where), fill) if doubts else element(where)

        extents = (x.shape[0], index(-(-channels // block) * phases), *map(index, self.shape.extents), index(block))
        value = Value(Map(extents, stored, body, "blocks"))
        context.realize([value], "blocks")
        assert isinstance(value.tensor, Source)
        return value.tensor

    def _place(self, at: Sequence[Expr], phase: Expr) -> list[Expr]:
        """Coordinates in the input of a place in a phase; they may lie in the padding."""
        begin = self.geometry.begin
        if not self.shape.split:
            return [p - b for p, b in zip(at, begin, strict=True)]
        phases = split_index(phase, [index(p) for p in self.shape.phases])
        strides = self.shape.window.strides
        return [p * s + f - b for p, s, f, b in zip(at, strides, phases, begin, strict=True)]

    def _doubts(self, x: Value, place: Sequence[Expr]) -> list[Expr]:
        """Conditions on a place to lie in the input, as far as they are not sure to hold."""
        found = []
        for axis, (p, extent) in enumerate(zip(place, x.shape[2:], strict=True)):
            stride = self.shape.window.strides[axis] if self.shape.split else 1
            begin = static(self.geometry.begin[axis]) or 0
            last = (self.shape.extents[axis] - 1) * stride + self.shape.phases[axis] - 1 - begin
            if begin > 0:
                found.append(p >= 0)
            if last >= (static(extent) or 0):
                found.append(p < extent)
        return found

    def finished(self, node: OpNode, total: Tensor, dtype: str, rule: Rule | None) -> Value:
        """``rule`` of each sum, as a value."""
        final, lanes = total, self.block
        channels = self.shape.outputs * self.shape.groups
        if rule is not None:
            made = rule

            def body(*at: Expr) -> Expr:
                channel = at[-1] if lanes == channels else at[1] * lanes + at[-1]
                exact = channels % lanes == 0
                return made(total[at], channel if exact else tirx.min(channel, index(channels - 1)))

            final = Map(total.shape, dtype, body, "finish")
        if channels % lanes == 0:
            return Value.in_blocks(final, node.name)
        view = plain_view(final)
        return Value(Map((final.shape[0], index(channels), *final.shape[2:-1]), dtype, view.body), name=node.name)


def _holds_vectors(block: int, each: int, groups: int, lanes: int) -> bool:
    """Whether blocks of the result are whole, and no vector of a group's ``each`` channels lies in two of them."""
    if each * groups % block:
        return False
    starts = [(g * each + n * lanes, used) for g in range(groups) for n, used in enumerate(spans(each, lanes))]
    return all(start % block + used <= block for start, used in starts)


def _sizes(shape: Shape) -> dict[str, Sequence[int]]:
    window = shape.window
    return {"s": shape.padded, "k": window.kernel, "stride": window.strides, "dilation": window.dilations}
