"""Function bodies that the ONNX standard itself gives for an operator."""

from __future__ import annotations

import onnx_ir as ir


def standard_body(node: ir.Node, opset: int) -> ir.Graph | None:
    """The standard's own definition of ``node`` as a graph, or ``None`` when it has none."""
    return None
