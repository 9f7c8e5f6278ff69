"""Takes padding into the operator that reads it.

    Conv<pads = p>(Pad_q(x, 0))             →  Conv<pads = p + q>(x)
    MaxPool<pads = p>(Pad_q(x, -∞))         →  MaxPool<pads = p + q>(x)
    MaxPool<pads = p>(Pad_q(Relu(x), 0))    →  MaxPool<pads = p + q>(Relu(x))
    AveragePool<p>(Pad_q(x, 0))             →  AveragePool<p + q>(x)      when what is padded counts

Only the spatial axes may be padded, by nothing negative. What reads the padded tensor besides keeps it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mmopt.pipeline.base import Fidelity
from mmopt.transforms.canonicalize.editing import constant, constant_ints, integer, is_onnx
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass


def _pad(node: ir.Node, rewriter: Rewriter) -> bool:
    pad = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if pad is None or not is_onnx(pad, "Pad") or pad.inputs[0] is None or len(pad.outputs[0].uses()) > 1:
        return False
    if pad.outputs[0].is_graph_output() or rewriter.opset(pad) < 11:
        return False
    reason = _refusal(node, pad)
    if reason:
        return rewriter.miss(node, f"the padding by {pad.name!r} stays a node of its own: {reason}")
    added = _amounts(pad, rewriter)
    own = _own_pads(node, rewriter)
    if added is None or own is None or any(amount < 0 for amount in added):
        return rewriter.miss(node, f"the padding by {pad.name!r} stays a node of its own: its amounts do not fit")
    if added[:2] != [0, 0] or added[len(added) // 2 :][:2] != [0, 0]:
        return rewriter.miss(node, f"the padding by {pad.name!r} stays a node of its own: it pads batch or channels")
    rank = len(added) // 2
    spatial = added[2:rank] + added[rank + 2 :]
    if len(own) != len(spatial):
        return False
    both = [a + b for a, b in zip(own, spatial, strict=True)]
    if not is_onnx(node, "Conv") and _leaves_empty_windows(node, both):
        return rewriter.miss(node, f"the padding by {pad.name!r} stays a node of its own: whole windows lie in it")
    node.attributes["pads"] = ir.AttrInt64s("pads", both)
    node.attributes.pop("auto_pad", None)
    if is_onnx(node, "AveragePool"):
        node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
    rewriter.set_input(node, 0, pad.inputs[0])
    return True


def _refusal(node: ir.Node, pad: ir.Node) -> str:
    """Why the values that ``pad`` puts in are not those that ``node`` would."""
    mode = pad.attributes.get("mode")
    if mode is not None and (mode.is_ref() or mode.as_string() != "constant"):
        return "it does not pad with a constant"
    fill = pad.inputs[2] if len(pad.inputs) > 2 else None
    number = np.zeros(1) if fill is None else constant(fill)
    if number is None or number.size != 1:
        return "it pads with a computed value"
    value = float(number.reshape(-1)[0])
    if is_onnx(node, "MaxPool"):
        return _refusal_of_maximum(node, pad, value)
    if value != 0:
        return f"it pads with {value:g}, the operator with 0"
    if not is_onnx(node, "AveragePool"):
        return ""
    own = node.attributes.get("pads")
    counts = integer(node, "count_include_pad", 0)
    if integer(node, "ceil_mode", 0):
        return "windows that stick out are averaged over what is there"
    if counts is None or (own is not None and (own.is_ref() or any(own.as_ints())) and not counts):
        return "the operator leaves its own padding out of the average"
    return ""


def _refusal_of_maximum(node: ir.Node, pad: ir.Node, value: float) -> str:
    source = pad.inputs[0].producer() if pad.inputs[0] is not None else None
    never_less = value == 0 and source is not None and is_onnx(source, "Relu", "Sigmoid")
    if value != -np.inf and not never_less:
        return f"{value:g} can be the largest of a window, where the operator's own padding never is"
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return "the indices it gives count the padding"
    return ""


def _amounts(pad: ir.Node, rewriter: Rewriter) -> list[int] | None:
    """Constant amounts at the starts, then the ends, of all axes."""
    pads = constant_ints(pad.inputs[1]) if len(pad.inputs) > 1 else None
    if pads is None or len(pad.inputs) <= 3 or pad.inputs[3] is None:
        return pads
    axes, shape = constant_ints(pad.inputs[3]), rewriter.shape(pad.inputs[0])
    if axes is None or shape is None or len(pads) != 2 * len(axes):
        return None
    full = [0] * (2 * len(shape))
    for place, axis in enumerate(axes):
        full[axis % len(shape)] = pads[place]
        full[axis % len(shape) + len(shape)] = pads[place + len(axes)]
    return full


def _leaves_empty_windows(node: ir.Node, pads: list[int]) -> bool:
    """Whether a window may see nothing but padding, which pooling does not allow."""
    kernel = node.attributes.get("kernel_shape")
    return kernel is None or kernel.is_ref() or any(p >= k for p, k in zip(pads, [*kernel.as_ints()] * 2, strict=False))


def _own_pads(node: ir.Node, rewriter: Rewriter) -> list[int] | None:
    """Explicit pads of ``node``; ``None`` where they follow from the size of its input."""
    auto = node.attributes.get("auto_pad")
    if auto is not None and (auto.is_ref() or auto.as_string() not in ("NOTSET", "VALID")):
        return None
    explicit = node.attributes.get("pads")
    if explicit is not None and (auto is None or auto.as_string() == "NOTSET"):
        return None if explicit.is_ref() else list(explicit.as_ints())
    shape = rewriter.shape(node.inputs[0])
    return None if shape is None else [0] * (2 * (len(shape) - 2))


RULES = (Rule("absorb-pad", ("Conv", "MaxPool", "AveragePool"), _pad),)


@dataclasses.dataclass(frozen=True)
class AbsorbPads(RulePass):
    """Takes padding into the convolution or pooling that reads it."""

    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
