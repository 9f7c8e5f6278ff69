"""Inputs and outputs on their way between processes: arrays by name, or lists of arrays, of any dtype."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from mmopt.bench.peers import Values


def save_values(path: pathlib.Path, values: Values) -> None:
    """Write ``values`` in order; an absent optional (None) is left out."""
    leaves = list(_leaves(values))
    head = json.dumps([[name, in_list, _dtype_name(array)] for name, in_list, array in leaves])
    stored: dict[str, Any] = {f"a{i}": _plain(array) for i, (_, _, array) in enumerate(leaves)}
    np.savez(path, head=np.array(head), **stored)


def load_values(path: pathlib.Path) -> dict[str, Any]:
    """Inverse of :func:`save_values`."""
    values: dict[str, Any] = {}
    with np.load(path, allow_pickle=False) as stored:
        for i, (name, in_list, dtype) in enumerate(json.loads(str(stored["head"]))):
            array = stored[f"a{i}"]
            array = array.astype(object) if dtype == "object" else array.view(_named_dtype(dtype))
            if in_list:
                values.setdefault(name, []).append(array)
            else:
                values[name] = array
    return values


def digest(values: Values) -> str:
    """Hex SHA-256 of names, dtypes, shapes and elements, shortened to 16 digits; the order of names does not count."""
    total = hashlib.sha256()
    for name, _, array in _leaves(dict(sorted(values.items()))):
        total.update(f"{name} {array.dtype} {array.shape}".encode())
        total.update(_plain(array).tobytes())
    return total.hexdigest()[:16]


def describe(values: Values) -> dict[str, str]:
    """Dtype and shape of each value, as text."""
    described: dict[str, str] = {}
    for name, _, array in _leaves(values):
        text = f"{array.dtype}{list(array.shape)}"
        described[name] = f"{described[name]}, {text}" if name in described else text
    return described


def _leaves(values: Values) -> Iterator[tuple[str, bool, np.ndarray]]:
    """Name, whether it is an element of a list, and the array."""
    for name, value in values.items():
        if isinstance(value, list | tuple):
            yield from ((name, True, np.asarray(item)) for item in value)
        elif value is not None:
            yield name, False, np.asarray(value)


def _plain(array: np.ndarray) -> np.ndarray:
    """The array in a dtype that ``.npz`` holds."""
    array = np.asarray(array, order="C")  # ascontiguousarray would turn a scalar into a vector
    if array.dtype.hasobject:
        return array.astype(str)
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array


def _dtype_name(array: np.ndarray) -> str:
    if array.dtype.hasobject:
        return "object"
    return str(array.dtype.name if array.dtype.kind == "V" else array.dtype.str)


def _named_dtype(name: str) -> np.dtype[Any]:
    if name[0] in "<>|=":
        return np.dtype(name)
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return dtype
