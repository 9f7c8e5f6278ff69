"""Reads sums of products with constant weights, whole or some columns of them: ``x W + h R + b`` in any spelling."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import Array, integer, is_onnx, tensor_of
from mmopt.transforms.canonicalize.rewriting import Rewriter
from mmopt.transforms.raising.parts import Part, region

_MAX_TERMS = 16


@dataclasses.dataclass(frozen=True)
class Weight:
    """A block of a constant matrix.

    Attributes:
        tensor: The constant.
        transposed: Whether it is stored ``[outputs, inputs]``.
        inputs: First input and the one after the last.
        outputs: First output and the one after the last.
    """

    tensor: ir.Value
    transposed: bool
    inputs: tuple[int, int]
    outputs: tuple[int, int]

    def array(self) -> Array:
        """The block, ``[outputs, inputs]``."""
        tensor = tensor_of(self.tensor)
        if tensor is None:
            raise ValueError(f"{self.tensor.name} is no constant")
        whole = np.asarray(tensor.numpy())
        return (whole if self.transposed else whole.T)[slice(*self.outputs), slice(*self.inputs)]


@dataclasses.dataclass
class Sum:
    """``Σ value · weight + Σ bias + Σ rest``, over the last axis.

    Attributes:
        products: Weights by what they are multiplied with.
        biases: Constants.
        rest: What is neither.
    """

    products: dict[ir.Value, Weight] = dataclasses.field(default_factory=dict)
    biases: list[Part] = dataclasses.field(default_factory=list)
    rest: list[Part] = dataclasses.field(default_factory=list)

    def bias(self, width: int) -> Array | None:
        """What the constants add, ``[width]``; None where rows differ."""
        total = np.zeros(width)
        for part in self.biases:
            tensor = tensor_of(part.value)
            array = np.asarray(0.0 if tensor is None else tensor.numpy())
            rows = array.reshape(-1, array.shape[-1])[:, part.start : part.start + part.size]
            if not rows.size or (rows != rows[0]).any():
                return None
            total = total + rows[0]
        return total


def read_sum(part: Part | None, rewriter: Rewriter) -> Sum | None:
    """What ``part`` is the sum of; None when the same operand is weighted twice, or the sum is very long."""
    if part is None or part.step != 1:
        return None
    found, queue = Sum(), [part]
    while queue:
        term = queue.pop()
        operands = _addends(term, rewriter)
        if operands is not None:
            queue.extend(operands)
        elif tensor_of(term.value) is not None:
            found.biases.append(term)
        elif not _read_product(term, found, rewriter, queue):
            return None
        if len(queue) + len(found.rest) + len(found.products) > _MAX_TERMS:
            return None
    return found


def columns(value: ir.Value, start: int, size: int, rewriter: Rewriter) -> Part | None:
    """``value[..., start : start + size]`` as a part of what ``value`` itself may be a part of."""
    inner = region(value, rewriter)
    if inner is None or inner.step != 1:
        return None
    return Part(inner.value, inner.start + start, size)


def _addends(term: Part, rewriter: Rewriter) -> list[Part] | None:
    node = term.value.producer()
    if node is None or not is_onnx(node, "Add"):
        return None
    shape, parts = rewriter.shape(term.value), []
    for operand in node.inputs:
        own = rewriter.shape(operand)
        fits = own == shape or (tensor_of(operand) is not None and shape and own and own[-1] == shape[-1])
        part = columns(operand, term.start, term.size, rewriter) if operand is not None and fits else None
        if part is None:
            return None
        parts.append(part)
    return parts


def _read_product(term: Part, found: Sum, rewriter: Rewriter, queue: list[Part]) -> bool:
    node = term.value.producer()
    if node is None or not is_onnx(node, "Gemm", "MatMul") or len(rewriter.shape(node.inputs[1]) or ()) != 2:
        found.rest.append(term)
        return True
    data, weights = node.inputs[0], node.inputs[1]
    if data is None or weights is None or tensor_of(weights) is None or not _plain(node):
        found.rest.append(term)
        return True
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        offset = columns(node.inputs[2], term.start, term.size, rewriter)
        if offset is None or (rewriter.shape(node.inputs[2]) or (1,))[-1] == 1:
            return False
        queue.append(offset)
    transposed = bool(integer(node, "transB", 0)) if node.op_type == "Gemm" else False
    for value, rows in _operands(data, rewriter):
        if value in found.products:
            return False
        found.products[value] = Weight(weights, transposed, rows, (term.start, term.start + term.size))
    return True


def _plain(node: ir.Node) -> bool:
    """Whether a Gemm only multiplies and adds."""
    scales = [node.attributes[name].as_float() for name in ("alpha", "beta") if name in node.attributes]
    return all(scale == 1.0 for scale in scales) and not integer(node, "transA", 0)


def _operands(data: ir.Value, rewriter: Rewriter) -> list[tuple[ir.Value, tuple[int, int]]]:
    """What lies side by side in ``data``, with the rows of the weights that each meets."""
    node, shape = data.producer(), rewriter.shape(data) or ()
    whole = [(data, (0, width))] if shape and isinstance(width := shape[-1], int) else []
    if node is None or not is_onnx(node, "Concat") or integer(node, "axis", 0) not in (-1, len(shape) - 1):
        return whole
    parts, start = [], 0
    for value in node.inputs:
        size = (rewriter.shape(value) or (None,))[-1]
        if value is None or not isinstance(size, int):
            return whole
        parts.append((value, (start, start + size)))
        start += size
    return parts
