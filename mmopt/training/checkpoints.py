"""The state of a training run in a file that is always whole."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmopt.errors import UserError
from mmopt.ir.module import Module
from mmopt.runtime import atomic
from mmopt.training.weights import weights

FORMAT = 1


def save(path: pathlib.Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` in one step: a killed run leaves the old file or the new one."""
    import torch

    path = path.resolve()
    with atomic.staging(path) as folder:
        staged = folder / "checkpoint.pt"
        torch.save({"format": FORMAT, **state}, staged)
        atomic.publish(staged, path)


def load(path: pathlib.Path, identity: str) -> dict[str, Any]:
    """Read the state of the run with this identity.

    Raises:
        UserError: There is no such file, it is no checkpoint, or it is of another run.
    """
    import torch

    if not path.is_file():
        raise UserError("there is no checkpoint to resume from", where=str(path), hint="run without --resume")
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises whatever the bytes lead it into
        hint = "delete it and run without --resume"
        raise UserError(f"is no checkpoint: {str(error).splitlines()[0]}", where=str(path), hint=hint) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError("is no checkpoint of this version", where=str(path), hint="run without --resume")
    if state["identity"] != identity:
        what = "belongs to a run with other models, samples or settings"
        raise UserError(what, where=str(path), hint="repeat the command it was made by, or run without --resume")
    return dict(state)


def identity_of(modules: Mapping[str, Module], arrays: Mapping[str, np.ndarray[Any, Any]], settings: str) -> str:
    """A digest of all that a run follows from."""
    digest = hashlib.sha256(settings.encode())
    for name, module in modules.items():
        digest.update(f"{name} {module.signature()}".encode())
        digest.update(" ".join(f"{node.op_type}:{node.name}" for node in module.graph).encode())
        for weight in weights(module):
            digest.update(f"{weight.name} {weight.tensor.dtype.name} {tuple(weight.tensor.shape)}".encode())
            digest.update(weight.tensor.tobytes())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
