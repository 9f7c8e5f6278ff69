"""Products on tensor cores: which operands, in which numbers, and how they lie in memory."""

from __future__ import annotations

import dataclasses

import numpy as np
from tvm.ir import Expr

from mmopt.backends.compute import Map, Tensor, index
from mmopt.backends.cpu.choosing import dim
from mmopt.backends.cpu.loops import product, static
from mmopt.backends.cuda.kernels.operand import Operand
from mmopt.backends.cuda.kernels.product import OLDEST, TensorProduct, reading
from mmopt.backends.expressions import simplify
from mmopt.lowering.cuda.operands import batched_operand, in_memory, turned
from mmopt.lowering.cuda.tiles import chosen_tile, workload_of
from mmopt.lowering.cuda.weights import FLOATS, few_rows, float_rows, weight_only_product
from mmopt.lowering.ops.elementwise import broadcast_shape
from mmopt.lowering.registry import OpNode
from mmopt.lowering.values import Quantized, Value

_INTEGERS = ("int8", "uint8")


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Operands in the numbers that they are multiplied in."""

    a: Value
    b: Value

    def fits(self, sm: int) -> bool:
        """Whether tensor cores of ``sm`` multiply them."""
        alike = self.a.dtype == self.b.dtype or (self.a.dtype in _INTEGERS and self.b.dtype == "int8")
        empty = any(static(d) == 0 for d in (*self.a.shape, *self.b.shape))
        return alike and not empty and sm >= OLDEST.get(self.a.dtype, 1000)


def tensor_product(node: OpNode, a: Value, b: Value) -> Value | None:
    """``a @ b`` on tensor cores.

    Args:
        node: The node being lowered.
        a: ``[..., M, K]``.
        b: ``[..., K, N]``.

    Returns:
        ``[..., M, N]`` of the operands' type; ``None`` when tensor cores do not have it.
    """
    sm = node.context.program.profile.sm
    quantized = a.quantized, b.quantized
    made = None
    if quantized[0] is not None and quantized[1] is not None:
        made = _quantized(node, quantized[0], quantized[1], sm)
    if (made := made or weight_only_product(node, a, b)) is not None:
        return made
    pair = _Pair(a, b)
    if a.narrow is not None and b.narrow is not None and _Pair(a.narrow, b.narrow).fits(sm):
        pair = _Pair(a.narrow, b.narrow)
    if not pair.fits(sm) or pair.a.dtype in _INTEGERS:
        return None
    total = _total(node, pair.a, pair.b)
    if a.dtype == "float32":
        return Value(total, name=node.name)
    return Value(Map(total.shape, a.dtype, lambda *at: total[at].astype(a.dtype), "narrow"), name=node.name)


def _total(node: OpNode, a: Value, b: Value) -> Tensor:
    """Sums of products, in float32 or int32."""
    context = node.context
    flat = b.ndim == 2 and in_memory(node, a)
    rows = simplify(product(a.shape[:-1])) if flat else a.shape[-2]
    batch = () if flat else broadcast_shape([a.shape[:-2], b.shape[:-2]])
    left = batched_operand(node, context.reshape(a, (rows, a.shape[-1])) if flat else a, batch)
    if b.constant is not None and b.ndim == 2:
        weights = float_rows(node, b)
        made = few_rows(node, left, weights, a.shape, b.constant.shape[1]) if flat and a.dtype in FLOATS else None
        if made is not None:
            return made
        right = Operand.of(weights.data)
        assert right is not None
    else:
        right = turned(batched_operand(node, b, batch))
    sizes = rows, b.shape[-1], a.shape[-1]
    m, n, k, count = map(dim, (*sizes, simplify(product(batch))))
    read = reading(left, right, len(batch), a.shape[-1])
    dims = {"batch": count, "m": m, "n": n, "k": k, "read": read}
    workload = workload_of("tensor_product", dims, (left.source.dtype, right.source.dtype), (count, m, n, k))
    tile = chosen_tile(context.program, workload, (m, n, k), count, a.dtype)
    nest = TensorProduct(left, right, batch=batch, sizes=sizes, tile=tile, shape=a.shape[:-1] if flat else None)
    nest.workload = workload
    return nest.output


# -- integers ----------------------------------------------------------------------------------------------------


def _quantized(node: OpNode, a: Quantized, b: Quantized, sm: int) -> Value | None:
    """``(a - za) sa @ (b - zb) sb`` with the sum in integers, exactly, for constant weights.

    Σ (a − za)(b − zb) = Σ a·b − za · Σb − zb · Σa + K·za·zb; weights with zero points are left to floats.
    """
    pair = _Pair(a.value, b.value)
    weight, scale = b.value.constant, b.scale.constant
    if not pair.fits(sm) or weight is None or weight.ndim != 2 or scale is None or a.value.bits or b.value.bits:
        return None
    if not a.single or b.block or not (b.single or b.axis == 1) or not no_zero(b.zero):
        return None
    total = _total(node, a.value, b.value)
    columns = weight.shape[1]
    sums = Value(constant=weight.astype(np.int32).sum(axis=0, dtype=np.int32), name=f"{b.value.name}.sums")
    factors = Value(constant=np.broadcast_to(scale.reshape(-1), (columns,)).copy(), name=f"{b.value.name}.scales")
    a_zero = None if no_zero(a.zero) else a.zero

    def body(*at: Expr) -> Expr:
        value = total[at]
        if a_zero is not None:
            value = value - single(a_zero).astype("int32") * sums.tensor[at[-1]]
        return value.astype("float32") * (single(a.scale) * factors.tensor[at[-1]])

    return Value(Map(total.shape, "float32", body, "scaled"), name=node.name)


def no_zero(zero: Value | None) -> bool:
    """Whether a zero point is known to be zero."""
    return zero is None or (zero.constant is not None and not np.any(zero.constant))


def single(value: Value) -> Expr:
    """The one element of ``value``."""
    return value.tensor[tuple(index(0) for _ in value.shape)]
