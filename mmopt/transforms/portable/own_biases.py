"""Gives every convolution a bias of its own.

    Conv(x, W, b), Conv(y, W, b)  →  Conv(x, W, b), Conv(y, W, c)      c = b

Two towers that share weights share their bias too. OpenVINO puts a bias into the convolution only where nothing else
reads it, and leaves the activation behind it outside as well. Large weights stay shared.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import MAX_READ, new_initializer, tensor_of
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass


def _own(node: ir.Node, rewriter: Rewriter) -> bool:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = tensor_of(bias)
    if bias is None or tensor is None or node.graph is None or tensor.size > MAX_READ:
        return False
    if len(bias.uses()) == 1 and not bias.is_graph_output():
        return False
    copy = ir.tensor(tensor.numpy().copy())
    rewriter.set_input(node, 2, new_initializer(node.graph, copy, rewriter.names.fresh(f"{bias.name}_own")))
    return True


RULES = (Rule("own-bias", ("Conv", "ConvTranspose"), _own),)


@dataclasses.dataclass(frozen=True)
class OwnBiases(RulePass):
    """Gives every convolution a bias of its own, so that OpenVINO fuses it."""

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
