"""Inputs to measure with: the user's, or made up from what the artifact says about its inputs."""

from __future__ import annotations

import pathlib
import zipfile
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mmopt.errors import UserError, did_you_mean
from mmopt.runtime.artifact import TensorSpec
from mmopt.runtime.tensors import numpy_dtype


def read_inputs(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Inputs by name from an ``.npz``.

    Raises:
        UserError: It cannot be read, or holds Python objects.
    """
    hint = "write it with numpy.savez(FILE, name=array, …)"
    try:
        if not zipfile.is_zipfile(path):
            path.stat()  # a missing file should say so
            raise UserError("not an .npz file", where=str(path), hint=hint)
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except OSError as error:
        raise UserError(error.strerror or str(error), where=str(path), hint="check the path") from error
    except (ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"not an .npz of plain arrays: {error}", where=str(path), hint=hint) from error


def made_up_inputs(
    specs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]], seed: int = 0
) -> dict[str, np.ndarray]:
    """Inputs of the right names, dtypes and shapes.

    Floats are normal, integers 0 or 1: small enough for any table of embeddings and right for a mask, though a
    recorded input says more where an operator's time depends on values. Symbolic sizes are 1 unless ``shapes`` says
    otherwise.

    Args:
        specs: Inputs of the entry point.
        shapes: Shapes by input name, for inputs with symbolic sizes; a size named twice keeps its value.
        seed: Seed of the values.

    Raises:
        UserError: ``shapes`` names no input or does not fit, or an input is of a kind that cannot be made up.
    """
    sizes = _symbolic_sizes(specs, shapes)
    rng = np.random.default_rng(seed)
    return {spec.name: _array(spec, shapes.get(spec.name) or _shape(spec, sizes), rng) for spec in specs}


def parse_shapes(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """``name:1x3x224x224`` to sizes by name.

    Raises:
        UserError: A text has another form, or names an input a second time.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, _, sizes = text.rpartition(":")
        if not name or not all(size.isdecimal() for size in sizes.split("x")):
            raise UserError(f"{text!r} is no shape", where="--shape", hint="write NAME:1x3x224x224")
        if name in shapes:
            raise UserError(f"{name!r} has two shapes", where="--shape")
        shapes[name] = tuple(int(size) for size in sizes.split("x"))
    return shapes


def _symbolic_sizes(specs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    by_name = {spec.name: spec for spec in specs}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in by_name:
            raise UserError(f"no input {name!r}", where="--shape", hint=did_you_mean(name, by_name))
        expected = by_name[name].shape
        if expected is not None and len(expected) != len(shape):
            raise UserError(f"{name!r} has {len(expected)} dimensions", where="--shape", hint=str(by_name[name]))
        sizes.update((dim, size) for dim, size in zip(expected or (), shape, strict=False) if isinstance(dim, str))
    return sizes


def _shape(spec: TensorSpec, sizes: Mapping[str, int]) -> list[int]:
    if spec.shape is None:
        raise _unknown(spec, "its rank is not known")
    return [dim if isinstance(dim, int) else sizes.get(dim, 1) for dim in spec.shape]


def _array(spec: TensorSpec, shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    if spec.kind != "tensor" or spec.dtype == "string":
        raise _unknown(spec, f"a {spec.kind if spec.kind != 'tensor' else spec.dtype} cannot be made up")
    dtype = numpy_dtype(spec.dtype)
    if dtype.kind in "iub":
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def _unknown(spec: TensorSpec, why: str) -> UserError:
    return UserError(f"no value for the input {spec.name!r}: {why}", where="bench", hint="give --inputs FILE.npz")
