"""From what a user names to a module: files, torch models, functions, sizes and modalities."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.errors import LoadError, UserError, did_you_mean
from mmopt.ir.modality import Modality
from mmopt.ir.module import Module

Shapes = Mapping[str, Sequence[int]]


def load_source(
    source: Any,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    fx_passes: Sequence[Any] = (),
    trust_code: bool,
) -> Module:
    """The module for a path, ``package.module:function``, torch module, exported program or ONNX model.

    Raises:
        LoadError: It cannot be read as a model.
        UserError: It would run code and ``trust_code`` is not set.
    """
    if isinstance(source, Module):
        return source
    if isinstance(source, ir.Model):
        return Module(source, provenance=["loaded from an onnx_ir model"])
    if isinstance(source, str | os.PathLike):
        return _load_named(str(source), fx_passes, trust_code)
    from mmopt.frontends.torch import load_torch

    return load_torch(source, example_inputs, dynamic_shapes=dynamic_shapes, fx_passes=fx_passes)


def _load_named(name: str, fx_passes: Sequence[Any], trust_code: bool) -> Module:
    path = pathlib.Path(name)
    if name.endswith(".pt2"):
        from mmopt.frontends.torch import load_torch

        return load_torch(name, fx_passes=fx_passes, trust_code=trust_code)
    if ":" in name and not path.exists():
        if not trust_code:
            raise UserError("this would run the code of that package", where=name, hint="say so with --trust-code")
        from mmopt.frontends.torch import load_callable

        return load_callable(name, fx_passes=fx_passes)
    if path.suffix == ".onnx" or path.exists():
        from mmopt.frontends.onnx import load_onnx

        return load_onnx(path)
    raise LoadError("no such file", where=name, hint="give a .onnx or .pt2 file, or package.module:function")


def parse_shapes(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """``NAME:1x3x224x224`` to sizes by input name; ``NAME:`` is a scalar.

    Raises:
        UserError: A text has another form, or names an input a second time.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, colon, sizes = text.rpartition(":")
        parts = sizes.split("x") if sizes else []
        if not colon or not name or not all(part.isdecimal() for part in parts):
            raise UserError(f"{text!r} is no shape", where="--shape", hint="write NAME:1x3x224x224")
        if name in shapes:
            raise UserError(f"the input {name!r} has two shapes", where="--shape")
        shapes[name] = tuple(int(part) for part in parts)
    return shapes


def symbol_sizes(module: Module, shapes: Shapes) -> dict[str, int]:
    """What the symbolic dimensions of ``module`` are when its inputs have these shapes.

    Raises:
        UserError: There is no such input, a shape does not fit it, or one symbol would have two sizes.
    """
    inputs = {str(value.name): value for value in module.graph.inputs if value.name not in module.graph.initializers}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if name not in inputs:
            raise UserError(f"there is no input {name!r}", where="--shape", hint=did_you_mean(name, inputs))
        declared = inputs[name].shape
        if declared is None:
            continue
        if len(declared) != len(shape):
            raise UserError(f"the input {name!r} has shape {declared}, not {list(shape)}", where="--shape")
        for dim, size in zip(declared, shape, strict=True):
            if isinstance(dim, int) and dim != size:
                raise UserError(f"the input {name!r} has shape {declared}, not {list(shape)}", where="--shape")
            if not isinstance(dim, int) and dim.value is not None and sizes.setdefault(dim.value, size) != size:
                raise UserError(f"{dim.value!r} would be {sizes[dim.value]} and {size}", where="--shape")
    return sizes


def fix_shapes(module: Module, shapes: Shapes) -> None:
    """Give inputs of ``module`` fixed shapes, in place; everything that depends on them is inferred again.

    Raises:
        UserError: As :func:`symbol_sizes`.
    """
    from mmopt.analysis.shape_rules.types import to_ir_shape
    from mmopt.analysis.shapes import infer_shapes

    sizes = symbol_sizes(module, shapes)
    if not shapes:
        return
    for value in module.graph.inputs:
        if value.name in shapes:
            value.shape = ir.Shape(shapes[str(value.name)])
        elif value.shape is not None:
            value.shape = ir.Shape([_fixed(dim, sizes) for dim in value.shape])
    for value in _computed(module):
        if value.shape is not None and any(not isinstance(dim, int) for dim in value.shape):
            value.shape = ir.Shape([dim if isinstance(dim, int) else None for dim in value.shape])
    facts = infer_shapes(module.model)
    for value in module.graph.outputs:
        shape = facts.shape(value)
        if shape is not None:
            value.shape = to_ir_shape(shape)
    given = ", ".join(f"{name}={list(shape)}" for name, shape in shapes.items())
    module.provenance.append(f"fixed shapes: {given}")


def _fixed(dim: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    return dim.value if dim.value is None else sizes.get(dim.value, dim.value)


def _computed(module: Module) -> Iterator[ir.Value]:
    for node in module.graph.all_nodes():
        yield from node.outputs


def parse_modalities(texts: Iterable[str]) -> dict[str, Modality]:
    """``NAME=image`` to modalities by input name.

    Raises:
        UserError: A text has another form or names no modality.
    """
    modalities: dict[str, Modality] = {}
    for text in texts:
        name, equals, kind = text.rpartition("=")
        if not equals or not name:
            raise UserError(f"{text!r} is no modality", where="--modality", hint="write NAME=image")
        known = [modality.value for modality in Modality]
        if kind not in known:
            raise UserError(f"there is no modality {kind!r}", where="--modality", hint=did_you_mean(kind, known))
        modalities[name] = Modality(kind)
    return modalities


def set_modalities(module: Module, modalities: Mapping[str, Modality]) -> None:
    """Note what the user said about inputs.

    Raises:
        UserError: There is no such input.
    """
    names = [str(value.name) for value in module.graph.inputs]
    for name in modalities:
        if name not in names:
            raise UserError(f"there is no input {name!r}", where="--modality", hint=did_you_mean(name, names))
    module.modalities.update(modalities)


def load_samples(path: pathlib.Path, module: Module, *, extra: Sequence[str] = ()) -> dict[str, np.ndarray[Any, Any]]:
    """Calibration samples: an ``.npz`` whose arrays have a leading axis of samples, or a folder of them.

    Args:
        path: The file or folder.
        module: The model that takes the samples.
        extra: Names of further arrays to read, which are no inputs: labels.

    Raises:
        UserError: Nothing there, an unreadable file, inputs that the model does not have, or arrays that are missing.
    """
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise UserError(
            "there is no .npz in it", where=str(path), hint="write samples with numpy.savez(FILE, name=array)"
        )
    parts = [_read_samples(file, module, extra) for file in files]
    names = set(parts[0])
    for file, part in zip(files, parts, strict=True):
        if set(part) != names:
            raise UserError(f"has the inputs {sorted(part)}, others have {sorted(names)}", where=str(file))
    return {name: np.concatenate([part[name] for part in parts]) for name in sorted(names)}


def _read_samples(path: pathlib.Path, module: Module, extra: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"cannot be read as samples: {error}", where=str(path), hint="write it with numpy.savez"
        ) from error
    expected = {str(value.name): value for value in module.graph.inputs if value.name not in module.graph.initializers}
    if missing := [name for name in extra if name not in arrays]:
        raise UserError(f"there is no array {missing[0]!r}", where=str(path), hint=did_you_mean(missing[0], arrays))
    for name, array in arrays.items():
        if name not in expected and name not in extra:
            raise UserError(f"there is no input {name!r}", where=str(path), hint=did_you_mean(name, expected))
        dtype = None if name in extra else expected[name].dtype
        if dtype is not None and array.dtype != dtype.numpy():
            raise UserError(f"{name!r} has dtype {array.dtype}, should be {dtype.numpy()}", where=str(path))
        if array.ndim == 0 or len(array) == 0:
            raise UserError(f"{name!r} holds no samples", where=str(path), hint="the leading axis counts samples")
    if missing := [name for name in expected if name not in arrays]:
        raise UserError(f"the inputs {', '.join(missing)} are missing", where=str(path))
    if len({len(array) for array in arrays.values()}) > 1:
        raise UserError("its arrays have different numbers of samples", where=str(path))
    return arrays
