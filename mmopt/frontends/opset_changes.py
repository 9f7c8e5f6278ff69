"""How nodes of older opsets become nodes of newer ones: one small function for each change of the standard.

The list of such changes up to opset 23 is closed: every other new version of an operator only added types, or inputs
and attributes whose default is the old behaviour (a test compares the list with the schemas of the ``onnx`` package).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir


class CannotConvertError(Exception):
    """One node cannot be expressed at the wanted opset. Carries node name and reason; never leaves the frontends."""

    def __init__(self, node: ir.Node, reason: str) -> None:
        super().__init__(f"{node.op_type} {node.name!r}: {reason}")


class Editor:
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


Adapter = Callable[[ir.Node, Editor], None]
_CHANGES: dict[str, list[tuple[int, Adapter]]] = {}


def _since(version: int, *op_types: str) -> Callable[[Adapter], Adapter]:
    """Register how nodes older than ``version`` become nodes of ``version``; of one operator in order of versions."""

    def register(adapter: Adapter) -> Adapter:
        for op_type in op_types:
            _CHANGES.setdefault(op_type, []).append((version, adapter))
        return adapter

    return register


@_since(9, "BatchNormalization")
def _batch_norm_spatial(node: ir.Node, edit: Editor) -> None:
    if _int(node, "spatial", 1) != 1:
        raise CannotConvertError(node, "per-activation statistics (spatial=0) are no longer in the standard")
    node.attributes.pop("spatial", None)


@_since(9, "Upsample")
def _upsample_scales(node: ir.Node, edit: Editor) -> None:
    scales = _literal(node, "scales")
    if scales is None:
        raise CannotConvertError(node, "has no scales")
    set_input(node, 1, edit.constant(node, "scales", np.asarray(scales.as_floats(), np.float32)))
    node.attributes.pop("scales")


@_since(9, "Scan")
def _scan_batch(node: ir.Node, edit: Editor) -> None:
    raise CannotConvertError(node, "the batched Scan of opset 8 has no equivalent")


@_since(10, "Slice")
def _slice_inputs(node: ir.Node, edit: Editor) -> None:
    for index, name in enumerate(("starts", "ends", "axes"), start=1):
        edit.attribute_as_input(node, name, index)


@_since(10, "TopK")
def _topk_input(node: ir.Node, edit: Editor) -> None:
    set_input(node, 1, edit.constant(node, "k", np.asarray([_int(node, "k", 1)], np.int64)))
    node.attributes.pop("k", None)


@_since(10, "Dropout")
def _dropout_mask(node: ir.Node, edit: Editor) -> None:
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        raise CannotConvertError(node, "its mask is used, and masks became boolean")


@_since(10, "Upsample")
def _upsample_to_resize(node: ir.Node, edit: Editor) -> None:
    node.op_type = "Resize"
    _resize(node, "floor")


@_since(11, "Resize")
def _resize_inputs(node: ir.Node, edit: Editor) -> None:
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
def _clip_inputs(node: ir.Node, edit: Editor) -> None:
    for index, name in ((1, "min"), (2, "max")):
        _float_as_input(node, edit, name, index)


@_since(11, "Pad")
def _pad_inputs(node: ir.Node, edit: Editor) -> None:
    edit.attribute_as_input(node, "pads", 1)
    _float_as_input(node, edit, "value", 2)


def _float_as_input(node: ir.Node, edit: Editor, name: str, index: int) -> None:
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
def _scatter_name(node: ir.Node, edit: Editor) -> None:
    node.op_type = "ScatterElements"


@_since(12, "Dropout")
def _dropout_ratio(node: ir.Node, edit: Editor) -> None:
    attr = _literal(node, "ratio")
    if attr is not None:
        set_input(node, 1, edit.constant(node, "ratio", np.asarray(attr.as_float(), np.float32)))
        node.attributes.pop("ratio")


@_since(13, "Squeeze", "Unsqueeze", "ReduceSum")
@_since(18, *(f"Reduce{k}" for k in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")))
def _axes_input(node: ir.Node, edit: Editor) -> None:
    edit.attribute_as_input(node, "axes", 1)


@_since(13, "Split")
def _split_input(node: ir.Node, edit: Editor) -> None:
    edit.attribute_as_input(node, "split", 1)


@_since(13, "Softmax", "LogSoftmax", "Hardmax")
def _softmax_axis(node: ir.Node, edit: Editor) -> None:
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
def _resize_mode(node: ir.Node, edit: Editor) -> None:
    if _str(node, "coordinate_transformation_mode", "") == "tf_half_pixel_for_nn":
        raise CannotConvertError(node, "coordinate mode tf_half_pixel_for_nn is no longer in the standard")


@_since(14, "BatchNormalization")
def _batch_norm_training(node: ir.Node, edit: Editor) -> None:
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        raise CannotConvertError(node, "its training outputs are used")
    node.resize_outputs(1)


@_since(16, "RoiAlign")
def _roi_align_mode(node: ir.Node, edit: Editor) -> None:
    node.attributes.add(ir.AttrString("coordinate_transformation_mode", "output_half_pixel"))


@_since(18, "Split")
def _split_count(node: ir.Node, edit: Editor) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes.add(ir.AttrInt64("num_outputs", len(node.outputs)))


@_since(20, "GridSample")
def _grid_sample_mode(node: ir.Node, edit: Editor) -> None:
    mode = _str(node, "mode", "bilinear")
    node.attributes.add(ir.AttrString("mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)))


@_since(20, "DFT")
def _dft_axis(node: ir.Node, edit: Editor) -> None:
    set_input(node, 2, edit.constant(node, "axis", np.asarray(_int(node, "axis", 1), np.int64)))
    node.attributes.pop("axis", None)


@_since(21, "GroupNormalization")
def _group_norm_channels(node: ir.Node, edit: Editor) -> None:
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


def changes_after(op_type: str, version: int) -> list[tuple[int, Adapter]]:
    """The changes that a node ``op_type`` of opset ``version`` has to go through, oldest first."""
    return [(since, adapter) for since, adapter in _CHANGES.get(op_type, ()) if since > version]
