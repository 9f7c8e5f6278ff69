"""Puts the bias of a linear layer into its product.

MatMul(x[n, k], W[k, m]) + b[m]  →  Gemm(x, W, b)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from mmopt.pipeline.base import Fidelity
from mmopt.transforms.canonicalize.editing import is_onnx, tensor_of
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass
from mmopt.transforms.raising.building import sole_user

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)


def _gemm(node: ir.Node, rewriter: Rewriter) -> bool:
    """From the Add."""
    for place in (0, 1):
        value, bias = node.inputs[place], node.inputs[1 - place]
        made = None if value is None else value.producer()
        if value is None or made is None or not is_onnx(made, "MatMul") or made.graph is not node.graph:
            continue
        shapes = [rewriter.shape(operand) for operand in made.inputs]
        width = (rewriter.shape(value) or (None,))[-1]
        if any(shape is None or len(shape) != 2 for shape in shapes) or sole_user(value) is not node:
            continue
        fits = tensor_of(bias) is not None and rewriter.shape(bias) == (width,)
        if not fits or rewriter.dtype(value) not in _FLOATS or tensor_of(made.inputs[1]) is None:
            continue
        new = rewriter.emit("Gemm", [*made.inputs, bias], node, like=node.outputs[0])
        return rewriter.replace(node, new.outputs[0]) and _dropped(made, rewriter)
    return False


def _dropped(node: ir.Node, rewriter: Rewriter) -> bool:
    rewriter.drop(node)
    return True


RULES = (Rule("write-gemm", ("Add",), _gemm),)


@dataclasses.dataclass(frozen=True)
class WriteGemm(RulePass):
    """Puts the bias of a linear layer into its product."""

    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
