"""Takes models from PyTorch: ``torch.export``, passes on the FX graph, torch's ONNX exporter; weights are not copied.

Torch is imported when a function here is called, never before.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmopt.errors import LoadError, UserError, did_you_mean
from mmopt.frontends import opset, torch_recurrent
from mmopt.frontends.functions import find_function, one_line, user_line
from mmopt.frontends.module_paths import record_module_paths
from mmopt.frontends.torch_names import name_dimensions, name_outputs
from mmopt.frontends.torch_passes import FxRewrite, quiet_torch, run_fx_passes
from mmopt.ir.module import Module

if TYPE_CHECKING:
    import torch

SOURCE = "load-torch"
"""Source of the remarks this frontend leaves."""

_Inputs = Any
"""Example inputs: a tensor, a sequence of positional arguments, or a mapping of arguments by name."""


def load_torch(
    source: torch.nn.Module | torch.export.ExportedProgram | str | os.PathLike[str],
    example_inputs: _Inputs = None,
    *,
    dynamic_shapes: Any = None,
    fx_passes: Sequence[FxRewrite] = (),
    strict: bool = False,
    trust_code: bool = False,
) -> Module:
    """Turn a PyTorch model into a module.

    A module in training mode is exported in evaluation mode and put back afterwards. Weights are shared with the
    PyTorch model, not copied: changing them there in place changes them here. Inputs are named as the parameters of
    ``forward``; outputs as the keys or fields of what it returns (``output``, ``output_0``… where it has none). Each
    node's place in the module tree is in its metadata under :data:`~mmopt.ir.module.MODULE_PATH_KEY`.

    Args:
        source: A module, an exported program, or the path of a ``.pt2`` file.
        example_inputs: What ``forward`` takes: one tensor, a tuple of positional arguments, or a dict by parameter
            name. Needed for a module. A dimension to stay dynamic should not be 1 here.
        dynamic_shapes: As for ``torch.export.export``, and simpler: names of dimensions may be given as strings
            (``{"pixel_values": {0: "batch"}}``) and parameters may be left out.
        fx_passes: Objects with ``run_fx(graph_module) -> graph_module``, run on the FX graph before it becomes ONNX.
            Each is checked on the example inputs; one that fails or changes the outputs is undone, with a remark.
        strict: Raise when an FX pass fails, instead of undoing it.
        trust_code: Reading a ``.pt2`` file can run code that is in it, so it must be allowed.

    Raises:
        LoadError: When the model cannot be exported; says which line of it is in the way.
        UserError: For missing torch, wrong example inputs, or a ``.pt2`` file that is not trusted.
        PassError: When ``strict``, and an FX pass fails or changes the outputs.
    """
    torch = _import_torch()
    remarks: list[tuple[str, str, str]] = []
    if isinstance(source, (str, os.PathLike)):
        origin = str(source)
        program = _read_pt2(torch, pathlib.Path(source), trust_code)
    elif isinstance(source, torch.export.ExportedProgram):
        program, origin = source, "torch.export.ExportedProgram"
    elif isinstance(source, torch.nn.Module):
        origin = f"torch module {type(source).__qualname__}"
        if any(part.training for part in source.modules()):
            remarks.append((SOURCE, "note", "was in training mode; exported in evaluation mode"))
        program = _export(torch, source, example_inputs, dynamic_shapes)
    else:
        raise UserError(
            f"cannot load a {type(source).__name__}", hint="give a torch.nn.Module, an ExportedProgram or a .pt2 file"
        )
    program, fx_remarks = run_fx_passes(torch, program, fx_passes, strict=strict)
    model = _to_onnx(torch, program)
    name_dimensions(model, program, dynamic_shapes)
    name_outputs(model, program, torch.utils._pytree)
    model, reason = opset.to_working_opset(model)
    record_module_paths(model)
    module = Module(model, provenance=[f"loaded from {origin}"])
    for name, kind, message in [*remarks, *fx_remarks, (SOURCE, "note", reason)]:
        if message:
            module.remark(name, kind, "", message)
    return module


def load_callable(spec: str, *, fx_passes: Sequence[FxRewrite] = (), strict: bool = False) -> Module:
    """Load what the function ``package.module:function`` returns. This runs the code of that package.

    The function takes no arguments and returns ``(module, example_inputs)`` or ``(module, example_inputs,
    dynamic_shapes)``, as :func:`load_torch` takes them. The current folder is searched first.

    Raises:
        UserError: When there is no such function, or it returns something else.
        LoadError: When the code fails.
    """
    _import_torch()
    function = find_function(spec)
    try:
        result = function()
    except Exception as error:
        raise LoadError(f"{spec} failed: {one_line(error)}", where=user_line(error), hint="run it alone") from error
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise UserError(
            f"{spec} returned a {type(result).__name__}", hint="return (module, example_inputs[, dynamic_shapes])"
        )
    shapes = result[2] if len(result) == 3 else None
    module = load_torch(result[0], result[1], dynamic_shapes=shapes, fx_passes=fx_passes, strict=strict)
    module.provenance[0] = f"loaded from {spec}"
    return module


def _import_torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise UserError("models from PyTorch need torch", hint="pip install 'mmopt[torch]'") from None


def _read_pt2(torch: Any, path: pathlib.Path, trust_code: bool) -> Any:
    if not path.is_file():
        raise LoadError("no such file", where=str(path), hint="check the path")
    if not trust_code:
        raise UserError(
            "reading a .pt2 file can run code that is in it",
            where=str(path),
            hint="allow it with --trust-code (trust_code=True in Python) if you know where the file is from",
        )
    try:
        with quiet_torch():
            return torch.export.load(path)
    except Exception as error:
        hint = "write it with torch.export.save, by the installed version of torch"
        raise LoadError(f"is not an exported program: {one_line(error)}", where=str(path), hint=hint) from error


def _export(torch: Any, module: Any, example_inputs: _Inputs, dynamic_shapes: Any) -> Any:
    args, kwargs = _bind(torch, module, example_inputs)
    modes = {part: part.training for part in module.modules()}
    shapes = _complete_shapes(torch, module, args, kwargs, dynamic_shapes)
    recurrent = torch_recurrent.has_recurrent_layers(torch, module)
    try:
        module.eval()
        with quiet_torch(), torch.no_grad(), torch_recurrent.symbolic_length(torch, required=recurrent):
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"torch.export cannot capture {type(module).__qualname__}: {one_line(error)}",
            where=user_line(error),
            hint=_export_hint(str(error)),
        ) from error
    finally:
        for part, training in modes.items():
            part.training = training


def _bind(torch: Any, module: Any, example_inputs: _Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split example inputs into positional and named arguments and hold them against ``forward``."""
    if example_inputs is None:
        raise UserError("a torch module needs example inputs", hint=f"its forward takes {_parameters(module)}")
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = {name: _as_tensor(torch, value) for name, value in example_inputs.items()}
    else:
        several = isinstance(example_inputs, (tuple, list))
        args = tuple(_as_tensor(torch, value) for value in (example_inputs if several else [example_inputs]))
    try:
        inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        what = f"example inputs do not fit {type(module).__qualname__}.forward: {error}"
        raise UserError(what, hint=f"it takes {_parameters(module)}") from None
    return args, kwargs


def _as_tensor(torch: Any, value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _parameters(module: Any) -> str:
    return str(inspect.signature(module.forward))


def _complete_shapes(torch: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> Any:
    """Replace names by ``Dim.DYNAMIC`` and fill in the parameters that were left out."""
    if not isinstance(shapes, Mapping):
        return _named_to_dynamic(torch, shapes)
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    unknown = [name for name in shapes if name not in given]
    if unknown:
        raise UserError(f"dynamic_shapes names {unknown[0]!r}", hint=did_you_mean(unknown[0], given))
    return {name: _named_to_dynamic(torch, shapes.get(name)) for name in given}


def _named_to_dynamic(torch: Any, spec: Any) -> Any:
    if isinstance(spec, str):
        return torch.export.Dim.DYNAMIC
    if isinstance(spec, Mapping):
        return {key: _named_to_dynamic(torch, value) for key, value in spec.items()}
    if isinstance(spec, (tuple, list)):
        return type(spec)(_named_to_dynamic(torch, value) for value in spec)
    return spec


def _to_onnx(torch: Any, program: Any) -> Any:
    try:
        with quiet_torch():
            return torch_recurrent.to_onnx(torch, program).model
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"torch's ONNX exporter failed: {one_line(error)}",
            where=user_line(error),
            hint="an operator may have no ONNX form; the error above with -v names it",
        ) from error


def _export_hint(message: str) -> str:
    if "specializ" in message or "Constraints violated" in message:
        return (
            "a dimension declared dynamic turned out fixed: give example inputs where it is not 1, or declare it static"
        )
    if "data-dependent" in message or "GuardOnDataDependentSymNode" in message:
        return "control flow depends on a tensor's value: use torch.where or torch.cond there"
    return "check that the example inputs run through the module, and see the torch.export documentation"
