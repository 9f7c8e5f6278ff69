"""What operators say about axes, one file a family. Importing the package registers all of them."""

from mmopt.analysis.axes.rules import (
    attention,
    convolution,
    elementwise,
    movement,
    normalization,
    products,
    quantization,
    recurrent,
    reduction,
    selection,
)
from mmopt.analysis.axes.rules.registry import apply_rule

__all__ = [
    "apply_rule",
    "attention",
    "convolution",
    "elementwise",
    "movement",
    "normalization",
    "products",
    "quantization",
    "recurrent",
    "reduction",
    "selection",
]
