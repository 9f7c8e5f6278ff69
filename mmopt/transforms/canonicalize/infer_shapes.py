"""Writes inferred shapes and types onto the values inside the graph.

    x[batch, seq, 768] → Reshape(Concat(Shape(x)[:2], 12, 64))[?, ?, ?, ?]   →   … [batch, seq, 12, 64]

The inputs and outputs of the main graph are the model's contract and keep what they say.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from mmopt.analysis.shapes import annotate, infer_shapes
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext


@dataclasses.dataclass(frozen=True)
class InferShapes(Pass):
    """Infers shapes with symbolic dimensions; an annotation that contradicts inference is corrected."""

    def run(self, module: Module, context: PassContext) -> bool:
        """Annotate every value that inference knows more, or something else, about."""

        def corrected(value: ir.Value, shape: ir.Shape) -> None:
            message = (
                f"The file says shape {value.shape} of value {value.name!r}, which comes out as {shape}: corrected."
            )
            producer = value.producer()
            self.remark(context, "note", str(producer.name) if producer is not None else "", message)

        return annotate(module.model, infer_shapes(module.model), corrected)
