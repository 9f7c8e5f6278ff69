"""Names for what torch's exporter numbers: dynamic dimensions and outputs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir


def name_dimensions(model: ir.Model, program: Any, dynamic_shapes: Any) -> None:
    """Rename the exporter's symbols (``s48``), also inside expressions, to the names given in ``dynamic_shapes``."""
    if not dynamic_shapes or program.example_inputs is None:
        return
    args, kwargs = program.example_inputs
    specs = list(_leaf_specs(args, kwargs, dynamic_shapes, _parameter_names(program, args, kwargs)))
    if len(specs) != len(model.graph.inputs):
        return
    names: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, specs, strict=True):
        for axis, name in _axis_names(spec):
            dim = value.shape[axis] if value.shape is not None and axis < len(value.shape) else None
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and dim.value.isidentifier():
                names.setdefault(dim.value, name)
    _rename_symbols(model, names)


def _parameter_names(program: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Parameter of ``forward`` for each positional argument, then the names of the named ones."""
    for entry in program.module_call_graph:
        if entry.fqn == "" and entry.signature is not None and entry.signature.forward_arg_names:
            return list(entry.signature.forward_arg_names)
    forward = inspect.signature(program.module().forward)
    return [*list(forward.parameters)[: len(args)], *kwargs]


def _leaf_specs(args: Sequence[Any], kwargs: Mapping[str, Any], shapes: Any, parameters: list[str]) -> Iterator[Any]:
    values = [*args, *kwargs.values()]
    for index, value in enumerate(values):
        name = parameters[index] if index < len(parameters) else ""
        spec = shapes.get(name) if isinstance(shapes, Mapping) else shapes[index] if index < len(shapes) else None
        yield from _walk(value, spec)


def _walk(value: Any, spec: Any) -> Iterator[Any]:
    """The specification of each tensor in ``value``, in the order torch flattens arguments."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, spec.get(key) if isinstance(spec, Mapping) else None)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _walk(item, spec[index] if isinstance(spec, (tuple, list)) else None)
    elif hasattr(value, "shape"):
        yield spec


def _axis_names(spec: Any) -> Iterator[tuple[int, str]]:
    pairs = spec.items() if isinstance(spec, Mapping) else enumerate(spec) if isinstance(spec, (tuple, list)) else ()
    for axis, dim in pairs:
        name = dim if isinstance(dim, str) else getattr(dim, "__name__", None)
        if isinstance(name, str) and name.isidentifier():
            yield axis, name


def _rename_symbols(model: ir.Model, names: Mapping[str, str]) -> None:
    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for graph in model.graphs():
        produced = [value for node in graph for value in node.outputs]
        for value in (*graph.inputs, *produced):
            if value.shape is not None and not value.shape.is_static():
                value.shape = ir.Shape([_renamed(dim, pattern, names) for dim in value.shape])


def _renamed(dim: int | ir.SymbolicDim, pattern: re.Pattern[str], names: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    return None if dim.value is None else pattern.sub(lambda found: names[found.group()], dim.value)


def name_outputs(model: ir.Model, program: Any, pytree: Any) -> None:
    """Name outputs after the keys or fields of what ``forward`` returns: ``logits``, ``hidden_0``, ``output``.

    ``pytree`` is ``torch.utils._pytree``. Nothing is renamed where an output is an input, a weight, or listed twice.
    """
    outputs = model.graph.outputs
    names = _output_names(program, pytree)
    taken = {value.name for value in model.graph.inputs} | set(model.graph.initializers)
    computed = {id(value) for value in outputs if value.producer() is not None}
    if not len(computed) == len(outputs) == len(names) == len(set(names) - taken):
        return
    _move_away(model, set(names), computed)
    for value, name in zip(outputs, names, strict=True):
        value.name = name


def _output_names(program: Any, pytree: Any) -> list[str]:
    spec = program.call_spec.out_spec
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    user = [s.arg for s in program.graph_signature.output_specs if s.kind.name == "USER_OUTPUT"]
    names = ["_".join(_key(key) for key in path) for path, _ in paths]
    kept = [name for name, arg in zip(names, user, strict=False) if type(arg).__name__ != "ConstantArgument"]
    if kept == [""]:
        return ["output"]
    return [f"output_{name}" if name[:1].isdigit() else name for name in kept]


def _key(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _move_away(model: ir.Model, names: set[str], outputs: set[int]) -> None:
    """Rename inner values that have a name an output is about to get."""
    for graph in model.graphs():
        for node in graph:
            for value in node.outputs:
                if value.name in names and id(value) not in outputs:
                    value.name = f"{value.name}_inner"
