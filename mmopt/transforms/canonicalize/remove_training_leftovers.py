"""Removes what only training needs.

    y, mask = Dropout(x, ratio)           →  y = x, mask = all true      unless it trains
    y, mask = Dropout(x, 0.0, True)       →  y = x, mask = all true
    y = BatchNormalization<training_mode=0>  →  without the attribute

A Dropout or BatchNormalization that does train computes something else than one that does not: it stays, with a remark.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import constant, integer
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass


def _dropout(node: ir.Node, rewriter: Rewriter) -> bool:
    value = node.inputs[0]
    if value is None or rewriter.opset(node) < 7:
        return False
    if not _drops_nothing(node):
        return rewriter.miss(
            node, "Dropout is in training mode, so its output is random; export the model in eval mode"
        )
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return _mask_all_true(node, rewriter)
    return rewriter.replace(node, value)


def _drops_nothing(node: ir.Node) -> bool:
    ratio = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if ratio is not None and not ratio.any():
        return True
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    training = constant(node.inputs[2])
    return training is not None and not training.any()


def _mask_all_true(node: ir.Node, rewriter: Rewriter) -> bool:
    """Give the mask a node of its own; the output is dealt with on the next visit."""
    mask = node.outputs[1]
    if rewriter.opset(node) < 10 or mask.is_graph_output():
        return rewriter.miss(node, "Dropout stays, because its mask is a graph output or no bool (before opset 10)")
    shape = rewriter.emit("Shape", [node.inputs[0]], node)
    shape.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    true = ir.AttrTensor("value", ir.tensor(np.array([True])))
    filled = rewriter.emit("ConstantOfShape", shape.outputs, node, like=mask, attributes=[true])
    mask.replace_all_uses_with(filled.outputs[0])
    rewriter.changed(filled)
    return True


def _batch_normalization(node: ir.Node, rewriter: Rewriter) -> bool:
    mode = integer(node, "training_mode", 0)
    if mode or (rewriter.opset(node) < 14 and len(node.outputs) > 1):
        return rewriter.miss(
            node, "BatchNormalization normalizes by the batch's own statistics; export the model in eval mode"
        )
    if mode is None or "training_mode" not in node.attributes:
        return False
    del node.attributes["training_mode"]
    rewriter.changed(node)
    return True


RULES = (
    Rule("dropout", ("Dropout",), _dropout),
    Rule("batch-normalization-mode", ("BatchNormalization",), _batch_normalization),
)


@dataclasses.dataclass(frozen=True)
class RemoveTrainingLeftovers(RulePass):
    """Removes Dropout that drops nothing, and marks of training mode that are off."""

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
