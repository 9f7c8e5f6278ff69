"""Training on ONNX graphs: their differentiable form, gradients for criteria, reconstruction and distillation.

Importing this package does not import torch; its functions do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmopt.training.accumulation import Gradients, gradients
    from mmopt.training.distillation import Distillation, DistillResult, distill
    from mmopt.training.fx import to_fx
    from mmopt.training.reconstruction import Block, BlockResult, layer_blocks, reconstruct
    from mmopt.training.weights import parameter_names, update_weights

__all__ = [
    "Block",
    "BlockResult",
    "DistillResult",
    "Distillation",
    "Gradients",
    "distill",
    "gradients",
    "layer_blocks",
    "parameter_names",
    "reconstruct",
    "to_fx",
    "update_weights",
]

_HOMES = {
    "Block": "mmopt.training.reconstruction",
    "BlockResult": "mmopt.training.reconstruction",
    "layer_blocks": "mmopt.training.reconstruction",
    "reconstruct": "mmopt.training.reconstruction",
    "DistillResult": "mmopt.training.distillation",
    "Distillation": "mmopt.training.distillation",
    "distill": "mmopt.training.distillation",
    "Gradients": "mmopt.training.accumulation",
    "gradients": "mmopt.training.accumulation",
    "parameter_names": "mmopt.training.weights",
    "to_fx": "mmopt.training.fx",
    "update_weights": "mmopt.training.weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mmopt.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
