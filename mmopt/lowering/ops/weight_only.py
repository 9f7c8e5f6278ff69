"""Products of float32 activations and quantized constants."""

from __future__ import annotations

import dataclasses

import numpy as np
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map, Tensor, guarded, index
from mmopt.backends.cpu.choosing import Workload, dim, typical
from mmopt.backends.cpu.kernels.matmul_dot import Blocking
from mmopt.backends.cpu.kernels.matmul_weight_only import (
    WeightOnlyMatmul,
    Weights,
    candidates,
    pack_factors,
    pack_weights,
)
from mmopt.backends.cpu.kernels.weight_code import NIBBLES
from mmopt.backends.cpu.loops import i64, product
from mmopt.backends.expressions import simplify
from mmopt.lowering.registry import OpNode
from mmopt.lowering.values import Quantized, Value


@dataclasses.dataclass(frozen=True)
class Parts:
    """A quantized constant ``[K, N]`` taken apart.

    Attributes:
        q: ``[K, N]``: int8, or uint8 from 0 to 15 for four bits.
        scale: ``[groups, N]``.
        zero: ``[groups, N]``, of the integers as they are in ``q``.
        bits: 8 or 4.
        group: Depth that shares scales.
    """

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    bits: int
    group: int

    @property
    def plain(self) -> bool:
        """Whether the kernel may multiply by the integers themselves, and scales be applied to its results."""
        alike = len(self.scale) == 1 and bool(np.all(self.zero == self.zero.flat[0]))
        return alike and (self.bits == 4 or not self.zero.any())


def weight_only_product(node: OpNode, a: Value, b: Quantized) -> Value | None:
    """``a`` times a dequantized constant.

    Args:
        node: The node being lowered.
        a: float32 ``[..., M, K]``.
        b: ``[K, N]`` of 8 or 4 bits; scales for all, for each column, or for blocks of K.

    Returns:
        float32 ``[..., M, N]``; ``None`` when there is no kernel for these operands.
    """
    profile = node.context.program.profile
    parts = taken_apart(b)
    if parts is None or profile.kind != "cpu" or profile.vector_bytes < 32:
        return None
    depth = parts.q.shape[0]
    step = NIBBLES if parts.bits == 4 else 1
    group = parts.group if len(parts.scale) > 1 else -(-depth // step) * step
    if group % step:
        return None
    groups = -(-depth // group)
    plain = parts.plain
    zero = int(parts.zero.flat[0]) if plain else 0
    weights = Weights(parts.bits, group, groups, scaled=not plain, zero=zero)
    total = _Product(node, a, b, parts, weights).total()
    if not plain:
        return Value(total, name=node.name)
    factor = np.broadcast_to(parts.scale[0], (parts.q.shape[1],))
    scale = Value(constant=np.ascontiguousarray(factor, np.float32), name=b.scale.name)

    def body(*at: Expr) -> Expr:
        return total[at] * scale.tensor[at[-1]]

    return Value(Map(total.shape, "float32", body, "scaled"), name=node.name)


def taken_apart(b: Quantized) -> Parts | None:
    """Numbers, scales and zero points of a constant ``[K, N]``; None when they are not known or of other kinds."""
    data, scale = b.value.constant, b.scale.constant
    if data is None or scale is None or scale.dtype != np.float32 or str(data.dtype) not in ("int8", "uint8"):
        return None
    if b.value.bits not in (None, 4) or (b.zero is not None and b.zero.constant is None):
        return None
    zero = np.zeros(scale.shape, np.int32) if b.zero is None or b.zero.constant is None else b.zero.constant
    depth, columns = data.shape
    if b.single:
        scale, zero, group = scale.reshape(1, 1), zero.reshape(1, 1), depth
    elif scale.ndim == 1 and b.axis == 1:
        scale, zero, group = scale.reshape(1, columns), zero.reshape(1, columns), depth
    elif scale.ndim == 2 and b.axis == 0 and b.block:
        group = b.block
    else:
        return None
    bits = b.value.bits or 8
    moved = 128 if data.dtype == np.uint8 and bits == 8 else 0
    biased = 8 if data.dtype == np.int8 and bits == 4 else 0
    zero = np.broadcast_to(zero.astype(np.int32) - moved + biased, (len(scale), columns))
    q = (data.astype(np.int16) - moved + biased).astype(np.uint8 if bits == 4 else np.int8)
    return Parts(q, np.broadcast_to(scale, (len(scale), columns)), zero, bits, group)


class _Product:
    """Builds the kernel of one product."""

    def __init__(self, node: OpNode, a: Value, b: Quantized, parts: Parts, weights: Weights) -> None:
        self.node, self.a, self.b, self.parts, self.weights = node, a, b, parts, weights

    def total(self) -> Tensor:
        """float32 ``[..., M, N]``."""
        program, parts, weights = self.node.context.program, self.parts, self.weights
        operand = self._operand()
        rows, columns = dim(operand.shape[0]), parts.q.shape[1]
        sizes = (("m", rows), ("n", columns), ("k", parts.q.shape[0]), ("group", weights.group))
        work = 2.0 * typical(rows) * columns * parts.q.shape[0]
        workload = Workload("matmul_weight_only", sizes, ("float32", f"int{weights.bits}"), work)
        offered = candidates(program.profile, weights, typical(rows), columns)
        best = program.chooser.choose(workload, offered)
        cut = Blocking(*(best.number(f.name) for f in dataclasses.fields(Blocking)))
        lanes = program.profile.vector_bytes // 4
        width = cut.vectors * lanes
        panels = self._packed("weights", width, pack_weights(parts.q, weights, width))
        scales = shifts = None
        if weights.scaled:
            scales = self._packed("scales", width, pack_factors(parts.scale, width))
            shifts = self._packed("shifts", width, pack_factors(-parts.zero.astype(np.float32) * parts.scale, width))
        nest = WeightOnlyMatmul(
            operand,
            panels,
            scales,
            shifts,
            weights=weights,
            columns=columns,
            blocking=cut,
            shape=self.a.shape[:-1],
            lanes=lanes,
            workload=workload,
        )
        return nest.output

    def _packed(self, what: str, width: int, data: np.ndarray) -> Tensor:
        key = ("weight only", what, self.weights, width, self.b.axis)
        return self.node.context.program.packed(self.b.value, key, lambda _: data)

    def _operand(self) -> Tensor:
        """The left operand ``[M, depth]``, zeros where the padded depth goes beyond K."""
        context, depth = self.node.context, self.parts.q.shape[0]
        flat = context.reshape(self.a, (simplify(product(self.a.shape[:-1])), index(depth)))
        context.realize([flat], "operand")
        source = context.tensor(flat)
        if self.weights.depth == depth:
            return source
        nothing = tirx.const(0, "float32")

        def body(row: Expr, k: Expr) -> Expr:
            return guarded(k < depth, lambda: source[row, k], nothing)

        made = Value(Map((source.shape[0], i64(self.weights.depth)), "float32", body, "operand"))
        context.realize([made], "operand")
        return made.tensor
