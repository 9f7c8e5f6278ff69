"""The one place that says what to do where torch is missing."""

from __future__ import annotations

import importlib
from typing import Any

from mmopt.errors import UserError


def require_torch(what: str) -> Any:
    """The torch package.

    Args:
        what: What needs it, for the message: "distillation".

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise UserError(f"{what} needs torch", hint="pip install 'mmopt[torch]'") from None
