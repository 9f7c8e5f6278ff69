"""Products with constant weights, whatever operator they are in, in one form: rows of data times a matrix.

    y = x · M        x: [blocks, rows, depth]        M: [blocks, depth, results]

A ``MatMul`` or ``Gemm`` has one block. A convolution reads patches, and has a block for each of its groups. A recurrent
layer has two maps: its input (one block, the results of all gates and directions side by side), and its state, with a
block for each direction. What a normalization gives, times one number for each channel, is the least of them: each
channel is a block of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import integer, is_onnx, tensor_of

Array = np.ndarray[Any, Any]

RECURRENT = ("LSTM", "GRU", "RNN")
NORMS = {"LayerNormalization": -1, "RMSNormalization": -1, "InstanceNormalization": 1, "GroupNormalization": 1}
"""Normalizations with a scale for each channel, and the axis of these."""

Kind = Literal["product", "convolution", "input", "state", "norm"]


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """One product of data with a constant weight.

    Attributes:
        node: The operator it is in.
        kind: How the operator reads its data.
        weight: The constant.
        data: The tensor it multiplies; for a state, the states that the layer gives; for a normalization, its result,
            which the matrix (ones before a fit) multiplies once more.
        bias: The constant added to its results, or None.
    """

    node: ir.Node
    kind: Kind
    weight: ir.Value
    data: ir.Value
    bias: ir.Value | None

    @property
    def name(self) -> str:
        """Name of the operator, and which of its products this is."""
        return f"{self.node.name} (state)" if self.kind == "state" else str(self.node.name)

    @property
    def out_axis(self) -> int:
        """Axis of the weight that results go along."""
        if self.kind == "product":
            return 0 if _is_transposed(self.node) else 1
        return 0 if self.kind in ("convolution", "norm") else 1

    @property
    def depth_axis(self) -> int:
        """Axis of the weight that is summed over; of a convolution, the one of the channels."""
        if self.kind == "product":
            return 1 if _is_transposed(self.node) else 0
        return 1 if self.kind == "convolution" else 2

    @property
    def channel_axis(self) -> int:
        """Axis of the data that the depth goes along, from the end when negative."""
        if self.kind == "norm":
            return NORMS[self.node.op_type]
        return 1 if self.kind == "convolution" else -1

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 elsewhere."""
        return (integer(self.node, "group", 1) or 1) if self.kind == "convolution" else 1

    def matrix(self, weight: Array) -> Array:
        """``weight`` as ``[blocks, depth, results]``."""
        if self.kind == "norm":
            return np.ones((len(weight), 1, 1), weight.dtype)
        if self.kind == "product":
            return (weight.T if _is_transposed(self.node) else weight)[None]
        if self.kind == "convolution":
            return weight.reshape(self.groups, len(weight) // self.groups, -1).transpose(0, 2, 1)
        if self.kind == "input":
            return weight.reshape(-1, weight.shape[2]).T[None]
        return weight.transpose(0, 2, 1)

    def weight_of(self, matrix: Array, shape: Sequence[int]) -> Array:
        """The inverse of :meth:`matrix` for a weight of ``shape``."""
        if self.kind == "product":
            return np.asarray(matrix[0].T if _is_transposed(self.node) else matrix[0])
        if self.kind == "input":
            return np.asarray(matrix[0].T.reshape(shape))
        turned = matrix.transpose(0, 2, 1)
        return np.asarray(turned.reshape(shape) if self.kind == "convolution" else turned)

    def rows(self, data: Array, weight: Array, choose: Callable[[int], Array]) -> Array:
        """Rows of data that the product reads.

        Args:
            data: The tensor.
            weight: The weight, for its shape.
            choose: Picks some of so many places.

        Returns:
            ``[blocks, rows, depth]``.
        """
        if self.kind == "convolution":
            return _patches(self.node, data, weight, self.groups, choose)
        if self.kind == "norm":
            flat = np.moveaxis(data, self.channel_axis, -1).reshape(-1, data.shape[self.channel_axis])
            return flat[choose(len(flat))].T[:, :, None]
        if self.kind != "state":
            flat = data.reshape(-1, data.shape[-1])
            return flat[choose(len(flat))][None]
        places = choose((data.shape[0] - 1) * data.shape[2])
        blocks = []
        for number, is_reverse in enumerate(_reverses(self.node)):
            before = data[1:, number] if is_reverse else data[:-1, number]
            blocks.append(before.reshape(-1, data.shape[3])[places])
        return np.stack(blocks)

    def add_bias(self, bias: Array, offset: Array) -> Array:
        """``bias`` with ``offset``, ``[blocks, results]``, added to what this product contributes."""
        if self.kind in ("product", "convolution"):
            return np.asarray(bias + offset.reshape(bias.shape))
        gates = bias.shape[1] // 2
        result = bias.copy()
        part = slice(0, gates) if self.kind == "input" else slice(gates, None)
        result[:, part] += offset.reshape(len(bias), gates)
        return result


def linear_maps(graph: ir.Graph) -> list[LinearMap]:
    """Every product with a constant float32 weight in ``graph``, in order of execution."""
    return [found for node in graph for found in _maps_of(node)]


def norm_maps(graph: ir.Graph) -> list[LinearMap]:
    """Every normalization with a constant float32 scale for each channel that not only products with weights read.

    These products make up for what its scale and shift could.
    """
    return [found for node in graph if (found := _norm_map(node)) is not None]


def _norm_map(node: ir.Node) -> LinearMap | None:
    if not is_onnx(node, *NORMS) or len(node.inputs) < 2:
        return None
    scale, result = _constant_input(node, 1), node.outputs[0]
    shift = _constant_input(node, 2)
    readers = [use.node for use in result.uses()]
    if scale is None or (shift is None and len(node.inputs) > 2) or len(list(scale.uses())) > 1:
        return None
    if shift is not None and len(list(shift.uses())) > 1:
        return None
    if readers and not result.is_graph_output() and all(any(_maps_of(reader)) for reader in readers):
        return None
    return LinearMap(node, "norm", scale, result, shift)


def _maps_of(node: ir.Node) -> Iterator[LinearMap]:
    if is_onnx(node, "MatMul", "Gemm", "Conv"):
        yield from _plain(node)
    elif is_onnx(node, *RECURRENT) and _is_plain_recurrence(node):
        bias = node.inputs[3] if len(node.inputs) > 3 and _is_weight(node.inputs[3]) else None
        weight, state, data, states = node.inputs[1], node.inputs[2], node.inputs[0], node.outputs[0]
        if weight is not None and data is not None and _is_weight(weight) and tensor_of(data) is None:
            yield LinearMap(node, "input", weight, data, bias)
        if state is not None and _is_weight(state) and states.name and not _mixes_before_reset(node):
            yield LinearMap(node, "state", state, states, bias)


def _plain(node: ir.Node) -> Iterator[LinearMap]:
    data, weight = node.inputs[0], node.inputs[1]
    if data is None or weight is None or not _is_weight(weight) or tensor_of(data) is not None:
        return
    rank = len(weight.shape or ())
    if is_onnx(node, "Conv"):
        yield LinearMap(node, "convolution", weight, data, _constant_input(node, 2))
    elif is_onnx(node, "MatMul") and rank == 2:
        yield LinearMap(node, "product", weight, data, _added_constant(node, weight))
    elif is_onnx(node, "Gemm") and not integer(node, "transA", 0) and _is_unscaled(node):
        yield LinearMap(node, "product", weight, data, _constant_input(node, 2))


def _is_weight(value: ir.Value | None) -> bool:
    tensor = tensor_of(value)
    return tensor is not None and value is not None and value.is_initializer() and tensor.dtype == ir.DataType.FLOAT


def _constant_input(node: ir.Node, index: int) -> ir.Value | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    return value if _is_weight(value) and value is not None and len(value.shape or ()) == 1 else None


def _added_constant(node: ir.Node, weight: ir.Value) -> ir.Value | None:
    """The vector that a following Add adds to the product, if that is all that becomes of it."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output() or not is_onnx(uses[0].node, "Add"):
        return None
    value = _constant_input(uses[0].node, 1 - uses[0].idx)
    tensor, shape = tensor_of(value), weight.shape
    return value if tensor is not None and shape is not None and tensor.shape[0] == shape[1] else None


def _is_transposed(node: ir.Node) -> bool:
    return is_onnx(node, "Gemm") and bool(integer(node, "transB", 0))


def _is_unscaled(node: ir.Node) -> bool:
    factors = (node.attributes.get(name) for name in ("alpha", "beta"))
    return all(factor is None or factor.as_float() == 1.0 for factor in factors)


def _is_plain_recurrence(node: ir.Node) -> bool:
    # Sequences of their own lengths have steps after the last, whose states are not what the next step reads.
    lengths = node.inputs[4] if len(node.inputs) > 4 else None
    return not integer(node, "layout", 0) and lengths is None


def _mixes_before_reset(node: ir.Node) -> bool:
    """Whether a GRU multiplies its state with the weight only after the gate has changed it."""
    return is_onnx(node, "GRU") and not integer(node, "linear_before_reset", 0)


def _reverses(node: ir.Node) -> tuple[bool, ...]:
    attribute = node.attributes.get("direction")
    direction = "forward" if attribute is None else attribute.as_string()
    return (False, True) if direction == "bidirectional" else (direction == "reverse",)


def _patches(node: ir.Node, data: Array, weight: Array, groups: int, choose: Callable[[int], Array]) -> Array:
    """Patches of ``[batch, channels, …]`` under the kernel at chosen places, ``[groups, places, depth]``."""
    kernel, sizes = weight.shape[2:], data.shape[2:]
    strides, dilations, before, after = _geometry(node, kernel, sizes)
    results = [
        (size + low + high - (taps - 1) * dilation - 1) // stride + 1
        for size, low, high, taps, dilation, stride in zip(
            sizes, before, after, kernel, dilations, strides, strict=True
        )
    ]
    places = np.unravel_index(choose(data.shape[0] * int(np.prod(results))), (data.shape[0], *results))
    padded = np.pad(data, [(0, 0), (0, 0), *zip(before, after, strict=True)])
    taps = []
    for offsets in itertools.product(*(range(size) for size in kernel)):
        where = [
            place * stride + offset * dilation
            for place, stride, offset, dilation in zip(places[1:], strides, offsets, dilations, strict=True)
        ]
        index: tuple[Any, ...] = (places[0], slice(None), *where)
        taps.append(padded[index])
    found = np.stack(taps, axis=-1)  # [places, channels, taps]
    return np.ascontiguousarray(found.reshape(len(found), groups, -1).transpose(1, 0, 2))


def _geometry(
    node: ir.Node, kernel: Sequence[int], sizes: Sequence[int]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Strides, dilations, and the padding before and after."""
    rank = len(kernel)

    def listed(name: str, default: list[int]) -> list[int]:
        attribute = node.attributes.get(name)
        return default if attribute is None else list(attribute.as_ints())

    strides, dilations = listed("strides", [1] * rank), listed("dilations", [1] * rank)
    attribute = node.attributes.get("auto_pad")
    mode = "NOTSET" if attribute is None else attribute.as_string()
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [
            max((-(-size // stride) - 1) * stride + (taps - 1) * dilation + 1 - size, 0)
            for size, stride, taps, dilation in zip(sizes, strides, kernel, dilations, strict=True)
        ]
        less = [pad // 2 for pad in wanted]
        more = [pad - low for pad, low in zip(wanted, less, strict=True)]
        return (strides, dilations, less, more) if mode == "SAME_UPPER" else (strides, dilations, more, less)
    pads = [0] * (2 * rank) if mode == "VALID" else listed("pads", [0] * (2 * rank))
    return strides, dilations, pads[:rank], pads[rank:]
