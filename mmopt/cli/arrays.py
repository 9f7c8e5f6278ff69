"""Inputs and outputs as ``.npz`` files."""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmopt.errors import UserError
from mmopt.runtime import TensorSpec, atomic
from mmopt.runtime.tensors import numpy_dtype


def read_arrays(path: pathlib.Path, specs: Sequence[TensorSpec]) -> dict[str, Any]:
    """Arrays by name.

    numpy stores ``bfloat16`` and ``float8`` as raw bytes; such arrays get the type that ``specs`` says. A sequence
    input ``s`` is stored as ``s.0``, ``s.1``, …

    Raises:
        UserError: The file cannot be read, or holds Python objects.
    """
    hint = "write it with numpy.savez(FILE, name=array, …)"
    try:
        if path.is_file() and not zipfile.is_zipfile(path):
            raise UserError("is not an .npz file", where=str(path), hint=hint)
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except OSError as error:
        raise UserError(error.strerror or str(error), where=str(path), hint="check the path") from error
    except (ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"is not an .npz of plain arrays: {error}", where=str(path), hint=hint) from error
    result: dict[str, Any] = dict(arrays)
    for spec in specs:
        if spec.kind == "sequence" and spec.name not in result:
            names = [name for name in (f"{spec.name}.{i}" for i in range(len(arrays))) if name in arrays]
            result[spec.name] = [_typed(result.pop(name), spec) for name in names]
        elif spec.name in result:
            result[spec.name] = _typed(result[spec.name], spec)
    return result


def _typed(array: Any, spec: TensorSpec) -> Any:
    if array.dtype.kind == "V" and array.dtype.itemsize == numpy_dtype(spec.dtype).itemsize:
        return array.view(numpy_dtype(spec.dtype))
    return array


def write_arrays(path: pathlib.Path, values: Mapping[str, Any]) -> list[str]:
    """Write outputs, replacing the file in one step.

    Returns:
        Names of outputs stored as ``float32`` because ``.npz`` has no such type.

    Raises:
        UserError: The folder is missing or cannot be written to.
    """
    plain: dict[str, Any] = {}
    widened: list[str] = []
    for name, value in values.items():
        items = {f"{name}.{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
        for key, item in items.items():
            if item is None:
                continue
            plain[key], changed = _storable(item)
            widened += [key] if changed else []
    path = path.resolve()
    if path.is_dir():
        raise UserError("is a folder", where=str(path), hint="give the name of the file to write")
    with atomic.staging(path) as folder:
        staged = folder / "outputs.npz"
        np.savez(staged, **plain)
        atomic.publish(staged, path)
    return widened


def _storable(array: Any) -> tuple[Any, bool]:
    if array.dtype == object:
        return array.astype(str), False
    if array.dtype.isbuiltin == 2:  # a type that ml_dtypes added
        return array.astype(np.float32), True
    return array, False
