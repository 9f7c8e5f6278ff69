"""Brings a model to the one working opset, node by node.

Only nodes whose operator changed its meaning or its signature between the two versions are touched, so weights,
metadata, subgraphs and functions stay as they are. The list of such changes up to :data:`WORKING_OPSET` is closed:
every other new version of an operator only added types or attributes whose default is the old behaviour (a test
compares it with the schemas of the ``onnx`` package). ``onnx.version_converter`` does the same through a
representation that drops functions and metadata, and gives wrong results for Resize, Upsample and Hardmax.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
import onnx_ir as ir

WORKING_OPSET = 23
"""Default-domain opset every module is brought to: the newest one whose kernels all supported onnxruntimes have."""

WORKING_IR_VERSION = 11
"""IR version that belongs to :data:`WORKING_OPSET`."""

_BEFORE_NEW_KERNELS = 21
_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
_WITHOUT_NEW_KERNEL = frozenset((*_RANDOM, "GlobalLpPool", "LpNormalization", "MaxRoiPool", "RoiAlign"))
"""Operators that got a new version in opset 22 (more dtypes, nothing else) for which onnxruntime has no kernel."""

_NEWEST_WORKING_DTYPE = int(ir.DataType.FLOAT4E2M1)


class CannotConvertError(Exception):
    """One node cannot be expressed at the wanted opset. Carries node name and reason; never leaves the frontends."""

    def __init__(self, node: ir.Node, reason: str) -> None:
        super().__init__(f"{node.op_type} {node.name!r}: {reason}")


class _Editor:
    """Inserts helper nodes before a node of one graph or function."""

    def __init__(self, graph: ir.Graph | ir.Function, version: int, taken: set[str]) -> None:
        self.graph, self.version, self._taken = graph, version, taken

    def name(self, wanted: str) -> str:
        """``wanted``, or the first free ``wanted_k``."""
        name, k = wanted, 1
        while name in self._taken:
            name, k = f"{wanted}_{k}", k + 1
        self._taken.add(name)
        return name

    def before(
        self,
        node: ir.Node,
        suffix: str,
        op_type: str,
        inputs: list[ir.Value | None],
        **attributes: int | ir.TensorProtocol | ir.Attr,
    ) -> ir.Value:
        """Insert ``op_type(inputs)`` before ``node`` and return its only output, named after the node's output."""
        name = self.name(f"{node.outputs[0].name or node.name or op_type}/{suffix}")
        out = ir.Value(name=name)
        attrs = [
            value if isinstance(value, ir.Attr) else ir.convenience.convert_attribute(key, value)
            for key, value in attributes.items()
        ]
        new = ir.Node(
            "", op_type, inputs, attrs, outputs=[out], name=name, metadata_props=dict(node.metadata_props) or None
        )
        self.graph.insert_before(node, new)
        return out

    def constant(self, node: ir.Node, suffix: str, array: np.ndarray) -> ir.Value:
        """A Constant node before ``node``."""
        out = self.before(node, suffix, "Constant", [], value=ir.tensor(array))
        out.type, out.shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape(array.shape)
        return out

    def attribute_as_input(self, node: ir.Node, name: str, index: int) -> None:
        """Move the integer-list attribute ``name`` (literal or a function's parameter) to input ``index``."""
        attr = node.attributes.pop(name, None)
        if attr is None:
            return
        if attr.is_ref():
            value_ints = ir.RefAttr("value_ints", str(attr.ref_attr_name), ir.AttributeType.INTS)
            set_input(node, index, self.before(node, name, "Constant", [], value_ints=value_ints))
        else:
            set_input(node, index, self.constant(node, name, np.asarray(attr.as_ints(), np.int64)))


def set_input(node: ir.Node, index: int, value: ir.Value | None) -> None:
    """Set input ``index``, filling the gap before it with empty inputs."""
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _literal(node: ir.Node, name: str) -> ir.Attr | None:
    attr = node.attributes.get(name)
    if attr is not None and attr.is_ref():
        raise CannotConvertError(node, f"attribute {name!r} is a parameter of the function around it")
    return attr


def _int(node: ir.Node, name: str, default: int) -> int:
    attr = _literal(node, name)
    return default if attr is None else attr.as_int()


def _str(node: ir.Node, name: str, default: str) -> str:
    attr = _literal(node, name)
    return default if attr is None else attr.as_string()


_Adapter = Callable[[ir.Node, _Editor], None]
_ADAPTERS: dict[str, list[tuple[int, _Adapter]]] = {}


def _since(version: int, *op_types: str) -> Callable[[_Adapter], _Adapter]:
    """Register how nodes older than ``version`` become nodes of ``version``; of one operator in order of versions."""

    def register(adapter: _Adapter) -> _Adapter:
        for op_type in op_types:
            _ADAPTERS.setdefault(op_type, []).append((version, adapter))
        return adapter

    return register


@_since(9, "BatchNormalization")
def _batch_norm_spatial(node: ir.Node, edit: _Editor) -> None:
    if _int(node, "spatial", 1) != 1:
        raise CannotConvertError(node, "per-activation statistics (spatial=0) are no longer in the standard")
    node.attributes.pop("spatial", None)


@_since(9, "Upsample")
def _upsample_scales(node: ir.Node, edit: _Editor) -> None:
    scales = _literal(node, "scales")
    if scales is None:
        raise CannotConvertError(node, "has no scales")
    set_input(node, 1, edit.constant(node, "scales", np.asarray(scales.as_floats(), np.float32)))
    node.attributes.pop("scales")


@_since(9, "Scan")
def _scan_batch(node: ir.Node, edit: _Editor) -> None:
    raise CannotConvertError(node, "the batched Scan of opset 8 has no equivalent")


@_since(10, "Slice")
def _slice_inputs(node: ir.Node, edit: _Editor) -> None:
    for index, name in enumerate(("starts", "ends", "axes"), start=1):
        edit.attribute_as_input(node, name, index)


@_since(10, "TopK")
def _topk_input(node: ir.Node, edit: _Editor) -> None:
    set_input(node, 1, edit.constant(node, "k", np.asarray([_int(node, "k", 1)], np.int64)))
    node.attributes.pop("k", None)


@_since(10, "Dropout")
def _dropout_mask(node: ir.Node, edit: _Editor) -> None:
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        raise CannotConvertError(node, "its mask is used, and masks became boolean")


@_since(10, "Upsample")
def _upsample_to_resize(node: ir.Node, edit: _Editor) -> None:
    node.op_type = "Resize"
    _resize(node, "floor")


@_since(11, "Resize")
def _resize_inputs(node: ir.Node, edit: _Editor) -> None:
    _resize(node, _old_nearest_mode(node) if _str(node, "mode", "nearest") == "nearest" else "")


def _resize(node: ir.Node, nearest_mode: str) -> None:
    if _str(node, "mode", "nearest") == "nearest":
        node.attributes.add(ir.AttrString("nearest_mode", nearest_mode))
    node.attributes.add(ir.AttrString("coordinate_transformation_mode", "asymmetric"))
    set_input(node, 2, node.inputs[1])
    set_input(node, 1, None)


def _old_nearest_mode(node: ir.Node) -> str:
    """Resize 10 took the pixel below when enlarging and the one above when shrinking."""
    given = node.inputs[1]
    scales = None if given is None else ir.convenience.get_const_tensor(given)
    if scales is None:
        raise CannotConvertError(node, "the rounding of its nearest mode depends on scales that are computed")
    if (scales.numpy() >= 1).all():
        return "floor"
    if (scales.numpy() <= 1).all():
        return "ceil"
    raise CannotConvertError(node, "it enlarges one axis and shrinks another in nearest mode")


@_since(11, "Clip")
def _clip_inputs(node: ir.Node, edit: _Editor) -> None:
    for index, name in ((1, "min"), (2, "max")):
        _float_as_input(node, edit, name, index)


@_since(11, "Pad")
def _pad_inputs(node: ir.Node, edit: _Editor) -> None:
    edit.attribute_as_input(node, "pads", 1)
    _float_as_input(node, edit, "value", 2)


def _float_as_input(node: ir.Node, edit: _Editor, name: str, index: int) -> None:
    """Move a float attribute to an input of the dtype of the first input (CastLike when that is unknown)."""
    attr = _literal(node, name)
    if attr is None:
        return
    x = node.inputs[0]
    dtype = x.dtype if x is not None else None
    array = np.asarray(attr.as_float(), np.float32)
    value = edit.constant(node, name, array if dtype is None else array.astype(dtype.numpy()))
    if dtype is None:
        value = edit.before(node, f"{name}_cast", "CastLike", [value, x])
    set_input(node, index, value)
    node.attributes.pop(name)


@_since(11, "Scatter")
def _scatter_name(node: ir.Node, edit: _Editor) -> None:
    node.op_type = "ScatterElements"


@_since(12, "Dropout")
def _dropout_ratio(node: ir.Node, edit: _Editor) -> None:
    attr = _literal(node, "ratio")
    if attr is not None:
        set_input(node, 1, edit.constant(node, "ratio", np.asarray(attr.as_float(), np.float32)))
        node.attributes.pop("ratio")


@_since(13, "Squeeze", "Unsqueeze", "ReduceSum")
@_since(18, *(f"Reduce{k}" for k in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")))
def _axes_input(node: ir.Node, edit: _Editor) -> None:
    edit.attribute_as_input(node, "axes", 1)


@_since(13, "Split")
def _split_input(node: ir.Node, edit: _Editor) -> None:
    edit.attribute_as_input(node, "split", 1)


@_since(13, "Softmax", "LogSoftmax", "Hardmax")
def _softmax_axis(node: ir.Node, edit: _Editor) -> None:
    """Before 13: over all axes from ``axis`` (default 1) on, flattened. From 13: over ``axis`` (default -1) alone."""
    axis, x = _int(node, "axis", 1), node.inputs[0]
    rank = None if x is None or x.shape is None else len(x.shape)
    if axis != -1 and axis + 1 != rank:
        flat = edit.before(node, "flat", "Flatten", [x], axis=axis)
        y = edit.before(node, "normalized", node.op_type, [flat], axis=-1)
        node.op_type = "Reshape"
        node.attributes.clear()
        node.attributes.add(ir.AttrInt64("allowzero", 1))
        set_input(node, 0, y)
        set_input(node, 1, edit.before(node, "shape", "Shape", [x]))
    else:
        node.attributes.add(ir.AttrInt64("axis", -1))


@_since(13, "Resize")
def _resize_mode(node: ir.Node, edit: _Editor) -> None:
    if _str(node, "coordinate_transformation_mode", "") == "tf_half_pixel_for_nn":
        raise CannotConvertError(node, "coordinate mode tf_half_pixel_for_nn is no longer in the standard")


@_since(14, "BatchNormalization")
def _batch_norm_training(node: ir.Node, edit: _Editor) -> None:
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        raise CannotConvertError(node, "its training outputs are used")
    node.resize_outputs(1)


@_since(16, "RoiAlign")
def _roi_align_mode(node: ir.Node, edit: _Editor) -> None:
    node.attributes.add(ir.AttrString("coordinate_transformation_mode", "output_half_pixel"))


@_since(18, "Split")
def _split_count(node: ir.Node, edit: _Editor) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes.add(ir.AttrInt64("num_outputs", len(node.outputs)))


@_since(20, "GridSample")
def _grid_sample_mode(node: ir.Node, edit: _Editor) -> None:
    mode = _str(node, "mode", "bilinear")
    node.attributes.add(ir.AttrString("mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)))


@_since(20, "DFT")
def _dft_axis(node: ir.Node, edit: _Editor) -> None:
    set_input(node, 2, edit.constant(node, "axis", np.asarray(_int(node, "axis", 1), np.int64)))
    node.attributes.pop("axis", None)


@_since(21, "GroupNormalization")
def _group_norm_channels(node: ir.Node, edit: _Editor) -> None:
    """Before 21 scale and bias had one element a group, from then on one a channel."""
    groups = edit.constant(node, "groups", np.asarray([_int(node, "num_groups", 1)], np.int64))
    one, column = edit.constant(node, "one", np.asarray([1])), edit.constant(node, "column", np.asarray([-1, 1]))
    channels = edit.before(node, "channels", "Shape", [node.inputs[0]], start=1, end=2)
    each = edit.before(node, "channels_per_group", "Div", [channels, groups])
    shape = edit.before(node, "repeat", "Concat", [one, each], axis=0)
    flat = edit.constant(node, "flat", np.asarray([-1]))
    for index, what in ((1, "scale"), (2, "bias")):
        rows = edit.before(node, f"{what}_rows", "Reshape", [node.inputs[index], column])
        repeated = edit.before(node, f"{what}_repeated", "Expand", [rows, shape])
        node.replace_input_with(index, edit.before(node, f"{what}_channels", "Reshape", [repeated, flat]))


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
        model, reason = _lower(model) if _newest(model) > WORKING_OPSET else _raise(model)
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
    try:
        unknown = next(_unknown_nodes(model), None)
        if unknown is not None:
            raise CannotConvertError(unknown, "no operator of this name in the standard")
        if next(_old_nodes(model), None) is not None:
            model = _converted(model)
    except CannotConvertError as error:
        return model, f"{error}; the model stays at opset {model.opset_imports['']}"
    target = (
        _BEFORE_NEW_KERNELS if _needs_older_kernels(model) and _newest(model) <= _BEFORE_NEW_KERNELS else WORKING_OPSET
    )
    _set_opset(model, target)
    return model, _explain(target)


def _needs_older_kernels(model: ir.Model) -> bool:
    return any(node.op_type in _WITHOUT_NEW_KERNEL for node, _ in _standard_nodes(model))


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
        edit = _Editor(container, version, taken)
        for since, adapter in adapters_after(node.op_type, version):
            if since > edit.version:
                edit.version = since
                adapter(node, edit)
    return copy


def adapters_after(op_type: str, version: int) -> list[tuple[int, _Adapter]]:
    """The changes that a node ``op_type`` of opset ``version`` has to go through, oldest first."""
    return [(since, adapter) for since, adapter in _ADAPTERS.get(op_type, ()) if since > version]


def _old_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, int]]:
    """Nodes of the default domain whose meaning or signature changed since the opset they were written for."""
    for node, version in _standard_nodes(model):
        if adapters_after(node.op_type, version):
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
    newest, known = _newest(model), onnx.defs.onnx_opset_version()
    floor = _BEFORE_NEW_KERNELS if _needs_older_kernels(model) else WORKING_OPSET
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
        and not _uses_new_dtype(node)
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


def _uses_new_dtype(node: ir.Node) -> bool:
    """Whether an attribute names, or holds, a dtype younger than the working opset."""
    for name in ("to", "dtype", "output_dtype"):
        attr = node.attributes.get(name)
        if attr is not None and not attr.is_ref() and attr.as_int() > _NEWEST_WORKING_DTYPE:
            return True
    value = node.attributes.get("value")
    return (
        value is not None
        and value.type == ir.AttributeType.TENSOR
        and not value.is_ref()
        and int(value.as_tensor().dtype) > _NEWEST_WORKING_DTYPE
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
    if max(dtypes, default=0) > _NEWEST_WORKING_DTYPE:
        by_opset = max(by_opset, model.ir_version)
    model.ir_version = max(by_opset, WORKING_IR_VERSION)
