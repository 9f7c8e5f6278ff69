"""Brings a model to the one working opset, node by node.

Only nodes whose operator changed its meaning or its signature between the two versions are touched, so weights,
metadata, subgraphs and functions stay as they are. ``onnx.version_converter`` does the same through a representation
that drops functions and metadata, and gives wrong results for Resize, Upsample and Hardmax.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import onnx
import onnx_ir as ir

from mmopt.frontends.opset_changes import CannotConvertError, Editor, changes_after

WORKING_OPSET = 23
"""Default-domain opset every module is brought to: the newest one whose kernels all supported onnxruntimes have."""

OLDEST_OPSET = 7
"""Oldest opset the conversion knows."""

WORKING_IR_VERSION = 11
"""IR version that belongs to :data:`WORKING_OPSET`."""

_BEFORE_NEW_KERNELS = 21
_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
_WITHOUT_NEW_KERNEL = frozenset((*_RANDOM, "GlobalLpPool", "LpNormalization", "MaxRoiPool", "RoiAlign"))
"""Operators that got a new version in opset 22 (more dtypes, nothing else) for which onnxruntime has no kernel."""

_NEWEST_DTYPE = ((28, ir.DataType.FLOAT6E3M2), (25, ir.DataType.INT2), (24, ir.DataType.FLOAT8E8M0))
"""From which opset on which dtype is the newest; before, it is FLOAT4E2M1."""


def to_working_opset(model: ir.Model) -> tuple[ir.Model, str]:
    """Bring ``model`` to :data:`WORKING_OPSET`, or as near as it can be expressed exactly.

    An older model is converted up. A newer one is relabelled down to the lowest opset, not below the working one, at
    which each of its nodes means the same. A model with a node that cannot be converted stays at its own opset. One
    with an operator that onnxruntime cannot run at the working opset goes to 21 where possible.

    Returns:
        The model (a new one where nodes had to change; the argument is not usable then), and the reason why it is
        not at the working opset ("" when it is).
    """
    _name_default_domain(model)
    reason = ""
    if _newest(model):
        model, reason = _lower(model) if _newest(model) > _target(model) else _raise(model)
    _set_ir_version(model)
    return model, reason


def _name_default_domain(model: ir.Model) -> None:
    """``ai.onnx`` is an alias of the empty domain, and a model needs an import for what its functions use."""
    for scope in _scopes(model):
        alias = scope.opset_imports.pop("ai.onnx", None)
        if alias is not None:
            scope.opset_imports.setdefault("", alias)
    for function in model.functions.values():
        if "" in function.opset_imports:
            model.opset_imports.setdefault("", function.opset_imports[""])


def _raise(model: ir.Model) -> tuple[ir.Model, str]:
    oldest = min(scope.opset_imports.get("", WORKING_OPSET) for scope in _scopes(model))
    if oldest < OLDEST_OPSET:
        return model, f"opset {oldest} is older than {OLDEST_OPSET}; the model stays there"
    try:
        unknown = next(_unknown_nodes(model), None)
        if unknown is not None:
            raise CannotConvertError(unknown, "no operator of this name in the standard")
        if next(_old_nodes(model), None) is not None:
            model = _converted(model)
    except CannotConvertError as error:
        return model, f"{error}; the model stays at opset {model.opset_imports['']}"
    target = _target(model)
    _set_opset(model, target)
    return model, _explain(target)


def _target(model: ir.Model) -> int:
    without = any(node.op_type in _WITHOUT_NEW_KERNEL for node, _ in _standard_nodes(model))
    return _BEFORE_NEW_KERNELS if without else WORKING_OPSET


def _newest(model: ir.Model) -> int:
    return max((scope.opset_imports.get("", 0) for scope in _scopes(model)), default=0)


def _explain(opset: int) -> str:
    if opset < WORKING_OPSET:
        return f"an operator has no onnxruntime kernel above opset {opset}; the model is kept there"
    return "" if opset == WORKING_OPSET else f"some operators need opset {opset}; the model is kept there"


def _converted(model: ir.Model) -> ir.Model:
    copy = model.clone()
    taken = {str(v.name) for graph in copy.graphs() for node in graph for v in node.outputs}
    taken |= {str(v.name) for graph in copy.graphs() for v in (*graph.inputs, *graph.initializers.values())}
    for node, version in list(_old_nodes(copy)):
        container = node.graph
        assert container is not None
        edit = Editor(container, version, taken)
        for since, adapter in changes_after(node.op_type, version):
            if since > edit.version:
                edit.version = since
                adapter(node, edit)
    return copy


def _old_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, int]]:
    """Nodes of the default domain whose meaning or signature changed since the opset they were written for."""
    for node, version in _standard_nodes(model):
        if changes_after(node.op_type, version):
            yield node, version


def _unknown_nodes(model: ir.Model) -> Iterator[ir.Node]:
    for node, version in _standard_nodes(model):
        if schema(node.op_type, version) is None:
            yield node


def _scopes(model: ir.Model) -> list[ir.Graph | ir.Function]:
    """What has opset imports of its own: the main graph (whose imports are the model's) and the functions."""
    return [model.graph, *model.functions.values()]


def _standard_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, int]]:
    """Nodes of the default domain in all graphs, subgraphs and functions, with their opset."""
    local = {identifier for identifier in model.functions if identifier[0] == ""}
    for scope in _scopes(model):
        version = scope.opset_imports.get("", 0)
        for node in scope.all_nodes():
            if node.domain == "" and node.op_identifier() not in local:
                yield node, version


def _set_opset(model: ir.Model, version: int) -> None:
    for scope in _scopes(model):
        if "" in scope.opset_imports:
            scope.opset_imports[""] = version
    for node, _ in _standard_nodes(model):
        node.version = None


def _lower(model: ir.Model) -> tuple[ir.Model, str]:
    """Relabel a model of a newer opset; nodes whose operator did not change mean the same at the older one."""
    newest, known, floor = _newest(model), onnx.defs.onnx_opset_version(), _target(model)
    lowest = max((_lowest_opset(node, floor, version) for node, version in _standard_nodes(model)), default=floor)
    if lowest < WORKING_OPSET and lowest != floor:
        lowest = WORKING_OPSET
    _set_opset(model, lowest)
    if newest > known:
        return model, f"opset {newest} is newer than the installed onnx ({known}); operators are taken as of {known}"
    return model, _explain(lowest)


def _lowest_opset(node: ir.Node, floor: int, newest: int) -> int:
    """Lowest opset from ``floor`` on at which ``node`` means what it means at ``newest``."""
    return next((version for version in range(floor, newest) if _fits(node, version, newest)), newest)


def _fits(node: ir.Node, version: int, newest: int) -> bool:
    new, old = schema(node.op_type, newest), schema(node.op_type, version)
    if new is None or old is None:
        return False
    if new.since_version == old.since_version:
        return True
    return (
        set(node.attributes) <= set(old.attributes)
        and len(node.inputs) <= old.max_input
        and not _uses_new_dtype(node, version)
        and _types_allowed(node.inputs, old.inputs)
        and _types_allowed(node.outputs, old.outputs)
    )


def _types_allowed(values: Sequence[ir.Value | None], parameters: Sequence[onnx.defs.OpSchema.FormalParameter]) -> bool:
    for index, value in enumerate(values):
        parameter = parameters[min(index, len(parameters) - 1)]
        kind = None if value is None else value.type
        if isinstance(kind, ir.TensorType) and f"tensor({kind.dtype.name.lower()})" not in parameter.types:
            return False
    return True


def _newest_dtype(version: int) -> ir.DataType:
    return next((dtype for since, dtype in _NEWEST_DTYPE if version >= since), ir.DataType.FLOAT4E2M1)


def _uses_new_dtype(node: ir.Node, version: int) -> bool:
    """Whether an attribute names, or holds, a dtype younger than opset ``version``."""
    newest = _newest_dtype(version)
    for name in ("to", "dtype", "output_dtype"):
        attr = node.attributes.get(name)
        if attr is not None and not attr.is_ref() and attr.as_int() > newest:
            return True
    value = node.attributes.get("value")
    return (
        value is not None
        and value.type == ir.AttributeType.TENSOR
        and not value.is_ref()
        and value.as_tensor().dtype > newest
    )


@functools.cache
def schema(op_type: str, version: int) -> onnx.defs.OpSchema | None:
    """Schema of a default-domain operator at an opset; newer opsets than onnx knows are read as its newest."""
    try:
        return onnx.defs.get_schema(op_type, min(version, onnx.defs.onnx_opset_version()), "")
    except onnx.defs.SchemaError:
        return None


def _set_ir_version(model: ir.Model) -> None:
    """The lowest IR version, from the working one on, that holds the model's opset and dtypes."""
    opset = model.opset_imports.get("", WORKING_OPSET)
    needed: dict[tuple[str, int], int] = onnx.helper.OP_SET_ID_VERSION_MAP
    by_opset = needed.get(("ai.onnx", opset), max(needed.values()))
    dtypes = {int(v.dtype) for g in model.graphs() for v in g.initializers.values() if v.dtype is not None}
    dtypes |= {int(v.dtype) for v in (*model.graph.inputs, *model.graph.outputs) if v.dtype is not None}
    if max(dtypes, default=0) > _newest_dtype(opset):
        by_opset = max(by_opset, model.ir_version)
    model.ir_version = max(by_opset, WORKING_IR_VERSION)
