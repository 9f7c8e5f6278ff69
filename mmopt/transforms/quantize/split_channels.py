"""Computes channels that are far larger than the others several times, so that no copy is: one scale then fits all.

    y = gelu(x V + c) W    =    (gelu(x V' + c') / n + d) W'        V', c', W': with n copies of a channel

A copy holds 1/n of its channel (Zhao et al., 2019). With d, which differs from copy to copy by 1/n of a step and adds
up to 0, the integers of all copies add up to the channel rounded once (Hermite's identity), so that large channels keep
their precision and small ones get finer steps. Weights stay as they are, where handing ranges over to them would cost
precision of their own. Nothing changes but rounding; both layers get wider by a share.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mmopt.analysis.calibration import Calibration
from mmopt.analysis.calibration.statistics import ChannelStatistics
from mmopt.errors import UserError
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.editing import Array, is_onnx, tensor_of
from mmopt.transforms.quantize.calibrating import calibration_of
from mmopt.transforms.quantize.layers import Layer, layers
from mmopt.transforms.quantize.scales import Writer, weight_of

MULTIPLE = 32
"""Copies are made in multiples of this, which kernels like."""

WORTH = 2.0
"""Times that the predicted error must fall by all copies."""

FURTHER = 1.1
"""Times that it must fall by :data:`MULTIPLE` copies more."""

_ELEMENTWISE = (
    "Add", "Sub", "Mul", "Div", "Relu", "Gelu", "Sigmoid", "Tanh", "Erf", "Elu", "LeakyRelu", "Softplus", "HardSwish",
    "HardSigmoid", "Clip", "Mish", "Swish", "Pow", "Sqrt", "Identity",
)  # fmt: skip
"""What works on each channel by itself."""


@dataclasses.dataclass(frozen=True)
class SplitChannels(Pass):
    """Compute channels far larger than the others several times, each copy a part, before static quantization.

    Attributes:
        share: Most that a layer may get wider by.
        stats: File of statistics (``mmopt calibrate``); the calibration samples of the run when empty.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    share: float = 0.125
    stats: str = ""

    def run(self, module: Module, context: PassContext) -> bool:
        """Split every tensor between two layers where it helps.

        Raises:
            UserError: ``share`` is no share, or there is nothing to calibrate on.
        """
        if not 0 < self.share <= 1:
            raise UserError(f"share is {self.share:g}", where=self.name, hint="give a share above 0 and up to 1")
        pairs = list(between_layers(module))
        if not pairs:
            return False
        return self.apply(module, context, calibration_of(self, self.stats, module, context), pairs)

    def apply(
        self, module: Module, context: PassContext, calibration: Calibration, pairs: Sequence[Between] | None = None
    ) -> bool:
        """As :meth:`run`, with statistics that are there already; they become those of the changed module."""
        writer, done = Writer(module), 0
        for pair in between_layers(module) if pairs is None else pairs:
            name = str(pair.value.name)
            found = calibration.tensors.get(name)
            channels = None if found is None else found.channels
            if found is None or channels is None or len(channels.low) != len(pair.weights[0]):
                continue
            copies = choose(channels, pair.weights, self.share)
            if copies is None:
                self.remark(context, "missed", name, "no copies of channels would lessen the error enough")
                continue
            split = _apply(writer, pair, channels, copies)
            calibration.tensors[split.name] = found.rescaled(split.index, split.factors, split.offsets)
            message = f"{int((copies > 1).sum())} of {len(copies)} channels are computed up to {copies.max()} times"
            self.remark(context, "note", name, message)
            done += 1
        if done:
            self.remark(context, "applied", "", f"channels of {done} tensors that outgrow the others are split.")
        return bool(done)


@dataclasses.dataclass(frozen=True)
class Between:
    """What stands between a layer and those that read its result, channel by channel.

    Attributes:
        first: The layer.
        nodes: Elementwise operators, in order of execution.
        value: What they give.
        readers: The layers that read it.
    """

    first: Layer
    nodes: tuple[ir.Node, ...]
    value: ir.Value
    readers: tuple[Layer, ...]

    @property
    def weights(self) -> list[Array]:
        """Weights of the readers, ``[depth, columns]`` each, float64."""
        return [weight_of(layer) if layer.depth_axis == 0 else weight_of(layer).T for layer in self.readers]


def between_layers(module: Module) -> Iterator[Between]:
    """Every tensor that layers read and nothing else, made from one layer by elementwise operators."""
    found = {layer.node: layer for layer in layers(module) if _is_plain(layer)}
    order = {node: number for number, node in enumerate(module.graph)}
    taken: set[ir.Node] = set()
    for layer in found.values():
        value = layer.data
        users = list(dict.fromkeys(use.node for use in value.uses()))
        readers = [found[user] for user in users if user in found and found[user].data is value]
        if readers[:1] != [layer] or len(readers) != len(users) or value.is_graph_output():
            continue
        region = _region(value, found)
        if region is None or region[0].node in taken:
            continue
        first, nodes = region
        taken.add(first.node)
        yield Between(first, tuple(sorted(nodes, key=order.__getitem__)), value, tuple(readers))


def _is_plain(layer: Layer) -> bool:
    """Whether a layer is a product along the last axis of what it reads."""
    return is_onnx(layer.node, "MatMul") or (
        is_onnx(layer.node, "Gemm") and not layer.node.attributes.get_int("transA", 0)
    )


def _region(value: ir.Value, found: dict[ir.Node, Layer]) -> tuple[Layer, set[ir.Node]] | None:
    """The layer that ``value`` comes from and the elementwise operators between; ``None`` where it comes otherwise."""
    nodes: set[ir.Node] = set()
    first: Layer | None = None
    left = [value]
    while left:
        producer = left.pop().producer()
        if producer is None or producer in nodes or (first is not None and producer is first.node):
            if producer is None:
                return None
            continue
        if producer in found:
            if first is not None:
                return None
            first = found[producer]
        elif not is_onnx(producer, *_ELEMENTWISE) or not all(_fits(v) for v in producer.inputs):
            return None
        else:
            nodes.add(producer)
            left += [v for v in producer.inputs if v is not None and tensor_of(v) is None]
    if first is None or not nodes:
        return None
    inner = [output for node in (*nodes, first.node) for output in node.outputs if output is not value]
    closed = all(use.node in nodes for output in inner for use in output.uses())
    return (first, nodes) if closed and not any(output.is_graph_output() for output in inner) else None


def _fits(value: ir.Value | None) -> bool:
    """Whether an operand varies, or is a constant by channel or for all."""
    tensor = tensor_of(value)
    return tensor is None or tensor.size == 1 or len(tensor.shape) == 1


def choose(channels: ChannelStatistics, weights: Sequence[Array], share: float) -> Array | None:
    """How many copies of each channel to compute; ``None`` where copies would lessen the error by too little.

    The channel whose copies are largest gets one more, until the layers are wider by ``share``.

    Args:
        channels: Statistics of the tensor.
        weights: Weights of the layers that read it, ``[depth, columns]`` each.
        share: Most that the layers may get wider by.
    """
    power = sum((weight**2).sum(axis=1) for weight in weights)
    tops = np.maximum(np.abs(channels.low), np.abs(channels.high))
    copies = np.ones(len(tops), np.int64)
    heap = [(-top, place) for place, top in enumerate(tops)]
    heapq.heapify(heap)
    before = last = predicted(channels, power, copies)
    best: Array | None = None
    for made in range(1, int(share * len(tops)) + 1):
        _, place = heapq.heappop(heap)
        copies[place] += 1
        heapq.heappush(heap, (-tops[place] / copies[place], place))
        if made % MULTIPLE:
            continue
        error = predicted(channels, power, copies)
        if error * FURTHER**2 > last:
            break
        best, last = copies.copy(), error
    return best if best is not None and before > WORTH**2 * last else None


def predicted(channels: ChannelStatistics, power: Array, copies: Array) -> float:
    """Mean squared error of what the layers give for rounding what they read, of channels in ``copies``."""
    low, high = channels.low / copies, channels.high / copies
    step = (max(float(high.max()), 0.0) - min(float(low.min()), 0.0)) / 255
    return float((np.minimum(step**2 / 12, channels.mean_square) * power).sum())


@dataclasses.dataclass(frozen=True)
class _Split:
    """A tensor in copies: channel ``index`` times ``factors`` and plus ``offsets``, by the name ``name``."""

    name: str
    index: Array
    factors: Array
    offsets: Array


def _apply(writer: Writer, pair: Between, channels: ChannelStatistics, copies: Array) -> _Split:
    """Widen the layers and what stands between them."""
    index = np.concatenate([np.arange(len(copies)), np.repeat(np.arange(len(copies)), copies - 1)])
    factors = 1 / copies[index]
    low, high = channels.low / copies, channels.high / copies
    step = (max(float(high.max()), 0.0) - min(float(low.min()), 0.0)) / 255
    offsets = step * _ladder(index, copies)
    writer.take(pair.first, index, pair.first.out_axis)
    for node in pair.nodes:
        writer.take_operands(node, index)
    for layer in pair.readers:
        writer.take(layer, index, layer.depth_axis)
    users = [layer.node for layer in pair.readers]
    for node in (pair.first.node, *pair.nodes):
        _widen(node.outputs[0], len(index))
    # Copies are parts of their channel: 1 / factors is what scales them, and offsets of a step add up to 0.
    writer.insert(pair.value, users, 1 / factors, -offsets / factors)
    return _Split(str(users[0].inputs[0].name), index, factors, offsets)  # type: ignore[union-attr]


def _ladder(index: Array, copies: Array) -> Array:
    """Offsets of the copies of a channel, in steps: i/n apart, around 0."""
    seen = collections.Counter[int]()
    result = np.zeros(len(index))
    for place, channel in enumerate(index):
        count = int(copies[channel])
        result[place] = (seen[int(channel)] - (count - 1) / 2) / count
        seen[int(channel)] += 1
    return result


def _widen(value: ir.Value, channels: int) -> None:
    if value.shape is not None:
        value.shape = ir.Shape([*value.shape[:-1], channels])
