"""torch by name, imported when something of it is first used: files that compute with it load without it."""

from __future__ import annotations

import importlib
import types
from typing import TYPE_CHECKING, Any

__all__ = ["functional", "torch"]


class _Module(types.ModuleType):
    """Stands for a module until an attribute is asked for, and keeps what was found."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what tools ask of any module must not import torch
            raise AttributeError(name)
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)
        return value


if TYPE_CHECKING:
    import torch
    from torch.nn import functional
else:
    torch = _Module("torch")
    functional = _Module("torch.nn.functional")
