"""Rules per operator for :mod:`mmopt.analysis.shapes`. Importing this package registers them."""

from __future__ import annotations

from mmopt.analysis.shape_rules import compute, elementwise, layout, values
from mmopt.analysis.shape_rules.registry import (
    MAX_ELEMENTS,
    ONNX_DOMAINS,
    SHAPE_RULES,
    VALUE_RULES,
    Elements,
    NodeView,
    Shape,
    broadcast,
    constant_tensor,
    shape_rule,
    value_rule,
)

__all__ = [
    "MAX_ELEMENTS",
    "ONNX_DOMAINS",
    "SHAPE_RULES",
    "VALUE_RULES",
    "Elements",
    "NodeView",
    "Shape",
    "broadcast",
    "compute",
    "constant_tensor",
    "elementwise",
    "layout",
    "shape_rule",
    "value_rule",
    "values",
]
