"""mmopt: a graph optimizer and compiler for multimodal models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmopt.api import Tuning, compile, load, optimize, tune, verify
    from mmopt.errors import MmoptError
    from mmopt.ir.modality import Modality
    from mmopt.ir.module import Module
    from mmopt.pipeline.base import Fidelity, FxPass, Pass, PassContext
    from mmopt.pipeline.decorators import fx_pass, graphsurgeon_pass, module_pass
    from mmopt.runtime import Session, load_artifact

__all__ = [
    "Fidelity",
    "FxPass",
    "MmoptError",
    "Modality",
    "Module",
    "Pass",
    "PassContext",
    "Session",
    "Tuning",
    "compile",
    "fx_pass",
    "graphsurgeon_pass",
    "load",
    "load_artifact",
    "module_pass",
    "optimize",
    "tune",
    "verify",
]

# Imported when first used: a process that only runs an artifact must not load onnx, torch or a compiler.
_HOMES = {
    "Fidelity": "mmopt.pipeline.base",
    "FxPass": "mmopt.pipeline.base",
    "MmoptError": "mmopt.errors",
    "Modality": "mmopt.ir.modality",
    "Module": "mmopt.ir.module",
    "Pass": "mmopt.pipeline.base",
    "PassContext": "mmopt.pipeline.base",
    "Session": "mmopt.runtime",
    "Tuning": "mmopt.api",
    "compile": "mmopt.api",
    "fx_pass": "mmopt.pipeline.decorators",
    "graphsurgeon_pass": "mmopt.pipeline.decorators",
    "load": "mmopt.api",
    "load_artifact": "mmopt.runtime",
    "module_pass": "mmopt.pipeline.decorators",
    "optimize": "mmopt.api",
    "tune": "mmopt.api",
    "verify": "mmopt.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mmopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
