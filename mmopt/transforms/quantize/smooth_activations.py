"""Moves ranges of channels from activations to weights: both get easier to quantize.

    y = W · norm(x; g, b)    =    (W S) · norm(x; g/S, (b − c)/S)  +  W c        S = diag(s)

Nothing changes but rounding. s = max|x|^α / max|w|^(1-α) balances activations against weights (SmoothQuant: Xiao et
al., 2023); with c, the middle of each channel's range, and α = 1 all channels of a norm's result get the same range
(RepQ-ViT: Li et al., 2023). What attention gives is a mean of its values, channel by channel, so that the projection of
the values takes the scales. Where neither can take them, or others read the result too (as residual sums do), one
multiplication and addition stand before the layers instead, if they are worth it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mmopt.analysis.calibration import Calibration
from mmopt.errors import UserError
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.editing import is_onnx
from mmopt.transforms.quantize.bias import add_to_bias
from mmopt.transforms.quantize.calibrating import calibration_of
from mmopt.transforms.quantize.layers import Layer, layers
from mmopt.transforms.quantize.migration import Migration, choose
from mmopt.transforms.quantize.scales import Writer, after_attention, after_norms, weight_of

WORTH = 1.2
"""Times that the predicted error must fall for operators to be put in."""


@dataclasses.dataclass(frozen=True)
class SmoothActivations(Pass):
    """Hand ranges of channels over from activations to weights, before static quantization.

    Attributes:
        alpha: How much of the range goes to the weights: 0 none of it, 1 all; by default what leaves the least error,
            tensor by tensor.
        shift: Whether the middle of each channel's range moves into the bias.
        insert: Whether a multiplication and addition are put in where no norm can take the scales.
        stats: File of statistics (``mmopt calibrate``); the calibration samples of the run when empty.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    alpha: float | None = None
    shift: bool = False
    insert: bool = True
    stats: str = ""

    def run(self, module: Module, context: PassContext) -> bool:
        """Rescale every tensor that layers read, where it helps.

        Raises:
            UserError: ``alpha`` is no share, or there is nothing to calibrate on.
        """
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UserError(f"alpha is {self.alpha:g}", where=self.name, hint="give a share from 0 to 1")
        if not any(group.source is not None or self.insert for group in _groups(module)):
            return False
        return self.apply(module, context, calibration_of(self, self.stats, module, context))

    def apply(self, module: Module, context: PassContext, calibration: Calibration) -> bool:
        """As :meth:`run`, with statistics that are there already; they become those of the changed module."""
        writer = Writer(module)
        done = collections.Counter[str]()
        for group in list(_groups(module)):
            name = str(group.value.name)
            found = calibration.tensors.get(name)
            if group.source is None and not self.insert:
                continue
            if found is None or found.channels is None or len(found.channels.low) != group.depth:
                self.remark(context, "missed", name, f"no statistics of {name!r} by channel")
                continue
            shift = self.shift and group.can_shift
            chosen = choose(found.channels, group.weights, alpha=self.alpha, shift=shift)
            if self._refused(group, chosen, context):
                continue
            result = _apply(writer, group, chosen)
            every = np.arange(group.depth)
            calibration.tensors[result] = found.rescaled(every, 1 / chosen.scales, -chosen.shifts / chosen.scales)
            done[group.kind] += 1
        counted = " and ".join(f"{count} {kind}" for kind, count in done.items())
        if done:
            self.remark(context, "applied", "", f"{counted} hand ranges of channels over to the layers that read them.")
        return bool(done)

    def _refused(self, group: Group, chosen: Migration, context: PassContext) -> bool:
        if self.alpha is None and chosen.gain <= (1.0 if group.source is not None else WORTH):
            message = f"its channels are alike: rescaling would lessen the error {chosen.gain:.2f} times only"
            self.remark(context, "missed", str(group.value.name), message)
            return True
        return False


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers that read one tensor.

    Attributes:
        value: The tensor.
        readers: The layers.
        source: The norm that makes it, or the layer that makes the values of the attention that does, when it can take
            the scales.
    """

    value: ir.Value
    readers: list[Layer]
    source: ir.Node | Layer | None

    @property
    def kind(self) -> str:
        """What takes the scales, in words."""
        if self.source is None:
            return "tensors, by operators of their own,"
        return "norms" if isinstance(self.source, ir.Node) else "projections of values"

    @property
    def weights(self) -> list[np.ndarray]:
        """Weights of the layers, ``[depth, columns]`` each, float64."""
        return [weight_of(layer) if layer.depth_axis == 0 else weight_of(layer).T for layer in self.readers]

    @property
    def can_shift(self) -> bool:
        """Whether a shift can be taken out of the tensor and put into the results."""
        outputs = any(
            is_onnx(layer.node, "MatMul") and layer.node.outputs[0].is_graph_output() for layer in self.readers
        )
        if isinstance(self.source, Layer):
            return False
        return not outputs and (self.source is None or is_onnx(self.source, "LayerNormalization"))

    @property
    def depth(self) -> int:
        """Channels of the tensor."""
        return len(self.weights[0])


def _groups(module: Module) -> Iterator[Group]:
    sources: dict[ir.Value, ir.Node | Layer] = {norm.outputs[0]: norm for norm, _ in after_norms(module)}
    sources.update(after_attention(module))
    readers: dict[ir.Value, list[Layer]] = collections.defaultdict(list)
    for layer in layers(module):
        if not is_onnx(layer.node, "Conv"):
            readers[layer.data].append(layer)
    for value, group in readers.items():
        turned = any(is_onnx(layer.node, "Gemm") and layer.node.attributes.get_int("transA", 0) for layer in group)
        if not turned:
            yield Group(value, group, sources.get(value))


def _apply(writer: Writer, group: Group, chosen: Migration) -> str:
    """Rescale what the layers of a group read, and their weights, so that nothing changes; name of what they read."""
    shifted = bool(np.any(chosen.shifts))
    offsets = [chosen.shifts @ weight for weight in group.weights] if shifted else []
    if isinstance(group.source, Layer):
        writer.scale_values(group.source, chosen.scales)
    elif group.source is not None:
        writer.scale_norm(group.source, chosen.scales, chosen.shifts)
    else:
        writer.insert(group.value, [layer.node for layer in group.readers], chosen.scales, chosen.shifts)
    for layer in group.readers:
        writer.scale_depth(layer, chosen.scales)
    for layer, offset in zip(group.readers, offsets, strict=bool(offsets)):
        add_to_bias(layer, offset, writer.names)
    return str(group.readers[0].node.inputs[0].name)  # type: ignore[union-attr]
