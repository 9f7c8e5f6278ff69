"""Finds what constant folding may compute, before anything is computed or changed."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from mmopt.analysis.shape_rules import ONNX_DOMAINS
from mmopt.analysis.shapes import ShapeFacts
from mmopt.transforms.canonicalize import editing
from mmopt.transforms.canonicalize.editing import is_onnx

Tensors = dict[ir.Value, ir.TensorProtocol]

_KEPT = ("Constant", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Dropout")
_NARROW_FLOATS = frozenset(
    dtype for dtype in ir.DataType if dtype.name in ("FLOAT16", "BFLOAT16") or "FLOAT8" in dtype.name
)
_WHOLE = {ir.DataType.INT64: np.int64, ir.DataType.INT32: np.int32, ir.DataType.BOOL: np.bool_}
_LENGTH_FROM_DATA = ("NonZero", "Unique", "Compress")
"""Operators whose result is as long as the data says: one number per element and axis at most."""


class ConstantRegion:
    """The nodes that depend on no input, graph by graph, outer graphs first.

    Args:
        facts: Shapes and small integers of all values.
        max_bytes: Largest result that may be larger than the constants it replaces.
        max_total_bytes: Largest sum of results.

    Attributes:
        known: Results that inference has found, mostly shape arithmetic.
        lazy: Large transposed weights, as tensors that are computed on demand.
        nodes: Nodes that must be run, each after those it reads.
        missed: Nodes that had to be left, with the reason.
    """

    def __init__(self, facts: ShapeFacts, max_bytes: int, max_total_bytes: int) -> None:
        self._facts, self._max_bytes, self._budget = facts, max_bytes, float(max_total_bytes)
        self.known: Tensors = {}
        self.lazy: Tensors = {}
        self.nodes: list[ir.Node] = []
        self.missed: list[tuple[ir.Node, str]] = []
        self._candidates: set[ir.Node] = set()
        self._constant: set[ir.Value] = set()
        self._computed: set[ir.Value] = set()

    def add(self, graph: ir.Graph) -> None:
        """Look at the nodes of one graph: first what depends on no input, then whether its size allows folding."""
        candidates = []
        for node in graph:
            if is_onnx(node, "Constant") or any(output.is_graph_output() for output in node.outputs):
                continue
            tensor = self._inferred(node)
            if tensor is not None:
                self.known[node.outputs[0]] = tensor
            elif self._is_foldable(node):
                candidates.append(node)
                self._constant.update(node.outputs)
        self._candidates.update(candidates)
        for node in candidates:
            if all(
                value not in self._constant or value in self._computed for value in node.inputs if value is not None
            ):
                self._add_node(node)

    def _inferred(self, node: ir.Node) -> ir.TensorProtocol | None:
        """The result as far as shape inference knows it. Floats are left out: inference does not tell 0.0 from -0.0."""
        if len(node.outputs) != 1 or not node.outputs[0].name:
            return None
        fact = self._facts.fact(node.outputs[0])
        if fact.elements is None or fact.shape is None or not isinstance(fact.type, ir.TensorType):
            return None
        numbers = [element for element in fact.elements if isinstance(element, int)]
        if len(numbers) != len(fact.elements) or fact.type.dtype not in _WHOLE:
            return None
        return ir.tensor(np.array(numbers, dtype=_WHOLE[fact.type.dtype]).reshape([len(numbers)] * len(fact.shape)))

    def _is_foldable(self, node: ir.Node) -> bool:
        if node.domain not in ONNX_DOMAINS or is_onnx(node, *_KEPT) or not node.inputs:
            return False
        if not all(map(self._is_constant, node.inputs)) or editing.is_random(node) or any(editing.bodies(node)):
            return False
        kinds = [self._facts.type(output) for output in node.outputs if output.name]
        if not all(isinstance(kind, ir.TensorType) and kind.dtype != ir.DataType.STRING for kind in kinds):
            return False
        return not (is_onnx(node, "Cast", "CastLike") and self._is_storage_cast(node))

    def _is_constant(self, value: ir.Value | None) -> bool:
        return value is None or value in self.known or value in self._constant or editing.tensor_of(value) is not None

    def _is_storage_cast(self, node: ir.Node) -> bool:
        """Whether a cast says how a weight is stored: up from a narrow float, or down to one that others cast up."""
        source, target = (self._facts.dtype(v) for v in (node.inputs[0], node.outputs[0]) if v is not None)
        shape = self._facts.shape(node.outputs[0])
        if shape is not None and all(dim == 1 for dim in shape):
            return False
        if source in _NARROW_FLOATS:
            return target not in _NARROW_FLOATS
        users = node.outputs[0].consumers()
        return target in _NARROW_FLOATS and bool(users) and all(is_onnx(user, "Cast") for user in users)

    def _add_node(self, node: ir.Node) -> None:
        size, reclaimed, lazy = self._result_nbytes(node), 0.0, None
        if size > self._max_bytes:
            released = self._released(node, size)
            # Shares are quotients; a byte in a billion is rounding.
            if size > sum(released.values()) * (1 + 1e-9):
                reason = "its size depends on data" if math.isinf(size) else f"it would take {size:.0f} bytes"
                self.missed.append((node, f"{node.op_type} of constants is not computed: {reason}."))
                return
            reclaimed = sum(share for value, share in released.items() if value in self._computed)
            lazy = self._lazy_transpose(node)
        if size - reclaimed > self._budget:
            self.missed.append((node, f"{node.op_type} of constants is not computed: max_total_bytes is reached."))
            return
        self._budget -= size - reclaimed
        if lazy is not None:
            self.lazy[node.outputs[0]] = lazy
            return
        self._computed.update(node.outputs)
        self.nodes.append(node)

    def _released(self, node: ir.Node, size: float) -> dict[ir.Value, float]:
        """Bytes of constants that nothing needs once ``node`` and all other readers of them are folded.

        A constant that several nodes read, such as a weight cut into slices, is shared out in proportion to the sizes
        of their results, so that together they take no more than there was.
        """
        shares = {}
        for value in {value for value in node.inputs if value is not None and not value.is_graph_output()}:
            readers = set(value.consumers())
            if math.isfinite(size) and readers <= self._candidates:
                shares[value] = self._constant_nbytes(value) * size / sum(map(self._result_nbytes, readers))
        return shares

    def _constant_nbytes(self, value: ir.Value) -> float:
        producer = value.producer()
        if value in self._computed and producer is not None:
            return self._nbytes(producer, value)
        tensor = editing.tensor_of(value)
        return 0.0 if tensor is None else tensor.nbytes

    def _result_nbytes(self, node: ir.Node) -> float:
        return sum(self._nbytes(node, output) for output in node.outputs if output.name)

    def _nbytes(self, node: ir.Node, output: ir.Value) -> float:
        """Size of a result; infinite when it cannot be told before it is computed."""
        shape, dtype = self._facts.shape(output), self._facts.dtype(output)
        width = max(1.0, dtype.itemsize) if dtype is not None else math.inf
        if is_onnx(node, *_LENGTH_FROM_DATA) and node.inputs[0] is not None:
            shape = self._facts.shape(node.inputs[0])
            width = 8.0 * max(1, len(shape or ()))
        if shape is None:
            return math.inf
        return math.prod((float(dim) if isinstance(dim, int) else math.inf for dim in shape), start=width)

    def _lazy_transpose(self, node: ir.Node) -> ir.TensorProtocol | None:
        """The result of a Transpose of an initializer, as a tensor that is computed when it is read."""
        tensor = editing.tensor_of(node.inputs[0])
        if not is_onnx(node, "Transpose") or tensor is None or tensor.dtype.bitwidth < 8:
            return None
        perm = node.attributes.get("perm")
        order = tuple(perm.as_ints()) if perm is not None else tuple(reversed(range(len(tensor.shape))))
        shape = ir.Shape([tensor.shape.numpy()[axis] for axis in order])

        def transposed() -> ir.TensorProtocol:
            return ir.Tensor(np.transpose(tensor.numpy(), order), dtype=tensor.dtype)

        return ir.LazyTensor(transposed, dtype=tensor.dtype, shape=shape)
