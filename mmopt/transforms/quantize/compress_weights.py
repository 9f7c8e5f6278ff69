"""Embedding tables and recurrent weights in 8 or 4 bits.

    y = Gather(t, i)    →    y = Gather(Dequantize(t'), i)        t' = t in int8, one scale a row
    y = LSTM(x, w, r)   →    y = LSTM(x, Dequantize(w'), Dequantize(r'))

Looking up reads only the rows it needs, and widens those. A recurrence computes in float: its weights are widened once,
when an artifact is loaded, and are small until then.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from mmopt.errors import UserError
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext
from mmopt.transforms.canonicalize.editing import Array, integer, is_onnx, tensor_of
from mmopt.transforms.quantize.encoding import Encoding, encode_weight, squared_error
from mmopt.transforms.quantize.qdq import BLOCKED_OPSET, Quantizer

RECURRENT = ("LSTM", "GRU", "RNN")

SMALLEST = 1024
"""Elements from which a table is worth an operator."""

_RATIOS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.8)
"""Parts of the extremes that are tried: clipping the largest weights leaves finer steps for the rest."""

_DTYPES = {8: ir.DataType.INT8, 4: ir.DataType.INT4}


@dataclasses.dataclass(frozen=True)
class Store:
    """An operator whose constants are only stored in integers.

    Attributes:
        node: The operator.
        weights: The constants, which nothing else reads.
    """

    node: ir.Node
    weights: tuple[ir.Value, ...]

    @property
    def name(self) -> str:
        """Name of the node."""
        return str(self.node.name)


def stores(module: Module) -> list[Store]:
    """Tables and recurrences of the main graph whose weights nothing else reads."""
    found: dict[ir.Node, list[ir.Value]] = {}
    for node, weight in _weights(module, ("Gather", *RECURRENT)):
        if len(weight.uses()) == 1:
            found.setdefault(node, []).append(weight)
    return [Store(node, tuple(weights)) for node, weights in found.items()]


@dataclasses.dataclass(frozen=True)
class CompressWeights(Pass):
    """Store embedding tables and recurrent weights in 4 or 8 bits, and compute in float.

    Attributes:
        bits: Bits of a weight.
        block: Weights of a row that share a scale; 0 for whole rows.
        kinds: Operators whose weights are stored so.
        include: Patterns of names of nodes to compress; all when empty.
        exclude: Patterns of names of nodes to leave alone.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    bits: Literal[4, 8] = 8
    block: int = 0
    kinds: tuple[str, ...] = ("Gather", *RECURRENT)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def run(self, module: Module, context: PassContext) -> bool:
        """Compress what is selected.

        Raises:
            UserError: One of ``kinds`` keeps no such weights.
        """
        if odd := set(self.kinds) - {"Gather", *RECURRENT}:
            raise UserError(f"{sorted(odd)[0]} keeps no table or recurrent weights", where=self.name)
        if module.opset < BLOCKED_OPSET:
            self.remark(context, "missed", "", f"opset {module.opset} is too old; it must be {BLOCKED_OPSET}")
            return False
        users: dict[ir.Value, list[ir.Node]] = {}
        for node, weight in _weights(module, self.kinds):
            if self._is_selected(node):
                users.setdefault(weight, []).append(node)
        quantizer = Quantizer(module.model)
        before = after = 0
        for weight, nodes in users.items():
            data = _data(weight)
            encoding = self.encoding(data)
            quantizer.constant(weight, encoding.quantize(data), encoding, nodes)
            before += data.nbytes
            after += data.size * self.bits // 8 + encoding.scale.size * 5
        if users:
            message = f"{len(users)} weights in int{self.bits}: {before / 1e6:.1f} MB → {after / 1e6:.1f} MB"
            self.remark(context, "applied", "", message)
        return bool(users)

    def _is_selected(self, node: ir.Node) -> bool:
        def among(patterns: tuple[str, ...]) -> bool:
            return any(fnmatch.fnmatchcase(str(node.name), pattern) for pattern in patterns)

        return (not self.include or among(self.include)) and not among(self.exclude)

    def encoding(self, weight: Array) -> Encoding:
        """How ``weight`` is quantized: blocks along its last axis, symmetric, with the least squared error."""
        length = weight.shape[-1]
        block = self.block if 0 < self.block < length else length
        tried = (
            encode_weight(weight, _DTYPES[self.bits], weight.ndim - 1, block=block, ratio=ratio) for ratio in _RATIOS
        )
        return min(tried, key=lambda encoding: squared_error(weight, encoding))


def _weights(module: Module, kinds: tuple[str, ...]) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Tables that are looked up by row, and the weights of recurrences, with the operators that read them."""
    for node in module.graph:
        if not is_onnx(node, *kinds):
            continue
        positions = (0,) if is_onnx(node, "Gather") else (1, 2)
        for value in (node.inputs[n] for n in positions):
            tensor = tensor_of(value)
            if value is None or tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST:
                continue
            if not is_onnx(node, "Gather") or (len(tensor.shape) == 2 and integer(node, "axis", 0) == 0):
                yield node, value


def _data(weight: ir.Value) -> Array:
    tensor = tensor_of(weight)
    assert tensor is not None
    return np.asarray(tensor.numpy())
