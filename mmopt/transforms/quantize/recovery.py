"""Layers with quantized weights, one after the other, made to give what they gave in float: on what they read now.

    min ‖Xq Q + b − Y‖²        Xq: what the layer reads in the quantized model, Y: what it gives in the float one

so that each layer also makes up for what those before it lost. The best weights in float follow from XqᵀXq and XqᵀY;
Q is their rounding by AdaRound's objective, within the scales that the layer has; b is the mean that is left. An eighth
of the samples is held out: a layer that is not better there stays as it is. Needs no labels and no gradients. Layers
that read integers are left alone: what they lose by rounding what they read is no matter of their weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from mmopt.analysis.calibration.collect import Batches, Padding
from mmopt.errors import UserError
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.canonicalize.editing import Array, Names, integer, is_onnx, tensor_of
from mmopt.transforms.quantize.adaround import adaround
from mmopt.transforms.quantize.bias import add_to_bias
from mmopt.transforms.quantize.encoding import Encoding
from mmopt.transforms.quantize.layers import Layer

HELD_OUT = 8
"""Every so many-th sample judges instead of teaching."""

_DAMPING = 0.2
"""Part of the mean diagonal of XqᵀXq that holds weights where they are."""


@dataclasses.dataclass(frozen=True)
class Recovered:
    """How it went with a layer.

    Attributes:
        name: Name of the node.
        before: Squared error on the samples held out, as a part of the square of what it aims at.
        after: The same with the new integers and bias.
    """

    name: str
    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether the new integers are in the model."""
        return self.after < self.before


def recover(module: Module, reference: Module, samples: Mapping[str, Array]) -> list[Recovered]:
    """Choose integers and biases of products with quantized weights again, in place.

    Args:
        module: The quantized module.
        reference: What it was quantized from, with the same names.
        samples: Arrays by input name with a leading axis of samples.

    Returns:
        One result for each layer, in order of execution.

    Raises:
        BackendError: One of the two does not run on the samples.
    """
    batches = Batches(module, samples)
    there = {str(value.name): value for node in reference.graph for value in node.outputs}
    padding = Padding(reference, there.values())
    names, results = Names(module.model), []
    for group in _groups(module, there):
        sums = _observe(module, reference, group, batches, padding)
        for layer, found in zip(group, sums, strict=True):
            results.append(_recover_layer(layer, found, names))
    return results


def recover_quantized(pass_: Pass, module: Module, reference: Module, context: PassContext) -> None:
    """What a pass does that has quantized ``reference`` to ``module`` and is to recover it; leaves remarks.

    Raises:
        UserError: There are no samples.
    """
    if context.inputs is None:
        raise UserError("recovering needs samples, not statistics alone", where=pass_.name, hint="give --calib")
    found = recover(module, reference, context.inputs)
    for one in found:
        kept = "" if one.kept else "; left as it was"
        message = f"error of what it gives {one.before**0.5:.2%} → {one.after**0.5:.2%}{kept}"
        pass_.remark(context, "note", one.name, message)
    count = sum(one.kept for one in found)
    pass_.remark(context, "note", "", f"{count} of {len(found)} layers give more nearly what they gave in float")


@dataclasses.dataclass(frozen=True)
class _Quantized:
    """A product of a tensor and a constant in integers.

    Attributes:
        layer: The layer; its weight is what DequantizeLinear gives.
        integers: The constant.
        encoding: What it stands for.
        bias: Bias of the operator itself, ``[columns]``.
        may_shift: Whether its bias can be changed.
    """

    layer: Layer
    integers: ir.Value
    encoding: Encoding
    bias: Array
    may_shift: bool

    @property
    def weight(self) -> Array:
        """What the integers stand for, ``[depth, columns]``."""
        tensor = tensor_of(self.integers)
        assert tensor is not None
        found = self.encoding.dequantize(np.asarray(tensor.numpy()).astype(np.int32)).astype(np.float64)
        return found if self.layer.depth_axis == 0 else found.T


def _groups(module: Module, there: Mapping[str, ir.Value]) -> Iterator[list[_Quantized]]:
    """Quantized products that read the same tensor, in order of execution."""
    found: dict[ir.Value, list[_Quantized]] = {}
    for node in module.graph:
        quantized = _quantized(node)
        if quantized is not None and str(node.outputs[0].name) in there:
            found.setdefault(quantized.layer.data, []).append(quantized)
    yield from found.values()


def _quantized(node: ir.Node) -> _Quantized | None:
    if not is_onnx(node, "MatMul", "Gemm") or node.inputs[0] is None or node.inputs[1] is None:
        return None
    source = node.inputs[0].producer()
    if source is not None and is_onnx(source, "DequantizeLinear"):
        return None
    wide = node.inputs[1].producer()
    if wide is None or not is_onnx(wide, "DequantizeLinear") or len(node.inputs[1].uses()) != 1:
        return None
    parts = [tensor_of(value) for value in wide.inputs]
    if len(parts) != 3 or any(part is None for part in parts) or len(wide.inputs[0].uses()) != 1:  # type: ignore[union-attr]
        return None
    integers, scale, zero = (np.asarray(part.numpy()) for part in parts if part is not None)
    plain = is_onnx(node, "MatMul") or _is_plain(node)
    if integers.ndim != 2 or not plain:
        return None
    assert wide.inputs[0] is not None
    dtype = wide.inputs[0].dtype
    assert dtype is not None
    encoding = Encoding(dtype, scale, zero, integer(wide, "axis", 1) or 0, integer(wide, "block_size", 0) or 0)
    turned = is_onnx(node, "Gemm") and bool(integer(node, "transB", 0))
    layer = Layer(node, node.inputs[0], node.inputs[1], *((0, 1) if turned else (1, 0)))
    columns = integers.shape[layer.out_axis]
    bias = tensor_of(node.inputs[2]) if len(node.inputs) > 2 else None
    held = np.zeros(columns) if bias is None else np.broadcast_to(bias.numpy().astype(np.float64).reshape(-1), columns)
    shifts = not (is_onnx(node, "MatMul") and node.outputs[0].is_graph_output())
    return _Quantized(layer, wide.inputs[0], encoding, held, shifts)


def _is_plain(node: ir.Node) -> bool:
    """Whether a Gemm is a product and a constant bias, nothing else."""
    factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    constant = len(node.inputs) < 3 or node.inputs[2] is None or tensor_of(node.inputs[2]) is not None
    return factors == [1.0, 1.0] and not integer(node, "transA", 0) and constant


@dataclasses.dataclass
class _Sums:
    """Of rows x, with a 1 at the end, and of what they should give: XᵀX, XᵀY and ‖Y‖²."""

    square: Array
    cross: Array
    power: float = 0.0

    def add(self, rows: Array, wanted: Array) -> None:
        wide = np.concatenate([rows, np.ones((len(rows), 1))], axis=1, dtype=np.float64)
        self.square += wide.T @ wide
        self.cross += wide.T @ wanted.astype(np.float64)
        self.power += float((wanted.astype(np.float64) ** 2).sum())

    def error(self, weight: Array, bias: Array) -> float:
        """``‖X W + b − Y‖²``, of ``‖Y‖²``."""
        both = np.concatenate([weight, bias[None]])
        total = float((both * (self.square @ both)).sum() - 2 * (both * self.cross).sum()) + self.power
        return max(total, 0.0) / max(self.power, np.finfo(np.float64).tiny)


def _observe(
    module: Module, reference: Module, group: Sequence[_Quantized], batches: Batches, padding: Padding
) -> list[tuple[_Sums, _Sums]]:
    """Sums to learn from and sums to judge by, for each layer of a group that reads one tensor."""
    data = str(group[0].layer.data.name)
    outputs = [str(one.layer.node.outputs[0].name) for one in group]
    found = []
    for one in group:
        depth, columns = one.weight.shape
        pair = [_Sums(np.zeros((depth + 1, depth + 1)), np.zeros((depth + 1, columns))) for _ in range(2)]
        found.append((pair[0], pair[1]))
    with ReferenceRunner() as runner:
        read = runner.stream(up_to(module, [data]), iter(batches))
        given = runner.stream(up_to(reference, outputs), iter(batches))
        for number, (now, wanted) in enumerate(zip(read, given, strict=True)):
            feeds = batches[number]
            held = len(batches) > 1 and number % HELD_OUT == HELD_OUT - 1 if len(batches) >= HELD_OUT else False
            for sums, output in zip(found, outputs, strict=True):
                x, y = now[data], wanted[output]
                axis = padding.axis(output, y, feeds)
                if axis is not None:
                    x, y = (padding.valid(output, array, feeds, axis) for array in (x, y))
                sums[held].add(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))
    return found


def up_to(module: Module, names: Sequence[str]) -> Module:
    """A copy of ``module`` that computes these tensors and nothing else."""
    copy = module.clone()
    values = {str(value.name): value for node in copy.graph for value in node.outputs}
    values |= {str(value.name): value for value in copy.graph.inputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[name] for name in names)
    for node in reversed(list(copy.graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            copy.graph.remove(node, safe=True)
    return copy


def _recover_layer(one: _Quantized, sums: tuple[_Sums, _Sums], names: Names) -> Recovered:
    teach, judge = sums[0], sums[1] if sums[1].power else sums[0]
    old = one.weight
    before = judge.error(old, one.bias)
    integers, weight, bias = _best(one, teach, old)
    after = judge.error(weight, bias)
    found = Recovered(one.layer.name, before, after)
    if found.kept:
        data = integers if one.layer.depth_axis == 0 else integers.T
        dtype = one.encoding.dtype
        tensor = ir.Tensor(np.ascontiguousarray(data).astype(dtype.numpy()), dtype=dtype, name=one.integers.name)
        one.integers.const_value = tensor
        if one.may_shift:
            add_to_bias(one.layer, bias - one.bias, names)
    return found


def _best(one: _Quantized, teach: _Sums, old: Array) -> tuple[Array, Array, Array]:
    """Integers, what they stand for, and the bias."""
    count = teach.square[-1, -1]
    square, cross, mean = teach.square[:-1, :-1], teach.cross[:-1], teach.square[:-1, -1] / max(count, 1)
    wanted = teach.cross[-1] / max(count, 1)
    if one.may_shift:
        square = square - count * np.outer(mean, mean)
        cross = cross - count * np.outer(mean, wanted)
    else:
        cross = cross - np.outer(mean * count, one.bias)
    damping = _DAMPING * max(float(np.diag(square).mean()), np.finfo(np.float64).tiny)
    held = square + damping * np.eye(len(square))
    target = old + np.linalg.solve(held, cross - square @ old)
    encoding = one.encoding if one.layer.depth_axis == 0 else one.encoding.transposed()
    integers = adaround(target, held, encoding)
    weight = encoding.dequantize(integers).astype(np.float64)
    return integers, weight, wanted - mean @ weight if one.may_shift else one.bias
