"""Products with weights that are stored in integers, and products with few rows, which only read their weights."""

from __future__ import annotations

import dataclasses

import numpy as np
from tvm.ir import Expr

from mmopt.backends.compute import Map, Source, Tensor
from mmopt.backends.cpu.choosing import Workload, dim
from mmopt.backends.cpu.loops import i64, product, static
from mmopt.backends.cuda.kernels.operand import CHUNK, Operand
from mmopt.backends.cuda.kernels.product import OLDEST
from mmopt.backends.cuda.kernels.weights import DequantizedProduct, FewRows, WeightRows, columns_candidates, few
from mmopt.backends.expressions import itemsize, simplify
from mmopt.lowering.cuda.operands import in_memory, stored_operand
from mmopt.lowering.cuda.tiles import chosen_tile, workload_of
from mmopt.lowering.ops.weight_only import Parts, taken_apart
from mmopt.lowering.registry import OpNode
from mmopt.lowering.values import Quantized, Value

CHUNK_NUMBERS = 32
"""Numbers whose multiples rows of weights are filled up to: a chunk of four bits each."""

LEAST_GROUP = 8
"""Numbers that share a scale at least, as many as are dequantized at a time."""

FLOATS = ("float32", "float16", "bfloat16")


def weight_only_product(node: OpNode, a: Value, b: Value) -> Value | None:
    """``a`` times a constant that was dequantized from 8 or 4 bits, and is so in the kernel again.

    Args:
        node: The node being lowered.
        a: Floats ``[..., M, K]``.
        b: ``[K, N]`` of the same type.

    Returns:
        ``[..., M, N]`` of that type; ``None`` when there is no kernel for these operands.
    """
    given = _operands(a, b)
    if given is None or any(static(d) == 0 for d in (*a.shape, *b.shape)):
        return None
    left, known = given
    parts = taken_apart(known)
    group = 0 if parts is None or len(parts.scale) == 1 else parts.group
    if parts is None or group % LEAST_GROUP:
        return None
    total = _total(node, left, _rows_of(node, known, parts, group), parts.q.shape)
    if total is None:
        return None
    if a.dtype == "float32":
        return Value(total, name=node.name)
    return Value(Map(total.shape, a.dtype, lambda *at: total[at].astype(a.dtype), "narrow"), name=node.name)


def _operands(a: Value, b: Value) -> tuple[Value, Quantized] | None:
    """The left operand in the type of the product, and what the right one was: narrow when both were rounded to it."""
    if b.ndim != 2 or a.ndim < 2 or a.dtype not in FLOATS or a.dtype != b.dtype:
        return None
    narrow = b.narrow.rounded if b.narrow is not None else None
    if a.narrow is not None and b.narrow is not None and narrow is not None and a.narrow.dtype == b.narrow.dtype:
        return None if narrow.quantized is None else (a.narrow, narrow.quantized)
    known = b.quantized
    if known is None or known.scale.constant is None:
        return None
    if known.scale.dtype != "float32":  # the product of number and scale is rounded to the type in the kernel
        wide = Value(constant=known.scale.constant.astype(np.float32), name=known.scale.name)
        known = dataclasses.replace(known, scale=wide)
    return a, known


def _total(node: OpNode, a: Value, weights: WeightRows, extents: tuple[int, ...]) -> Tensor | None:
    context = node.context
    depth, columns = extents
    rows = simplify(product(a.shape[:-1]))
    flat = context.reshape(a, (rows, a.shape[-1])) if in_memory(node, a) or a.ndim == 2 else None
    if flat is None:
        context.realize([a], "operand")
        flat = context.reshape(a, (rows, a.shape[-1]))
    left = stored_operand(node, flat)
    found = few_rows(node, left, weights, a.shape, columns)
    if found is not None:
        return found
    profile = context.program.profile
    if profile.sm < OLDEST[a.dtype]:
        return None
    sizes = dim(rows), columns, depth
    read = "rows" if left.aligned(1, i64(depth)) else "any"
    workload = _workload("dequantized_product", sizes, left, weights, read)
    tile = chosen_tile(context.program, workload, sizes, 1, a.dtype)
    extents = rows, i64(columns), i64(depth)
    nest = DequantizedProduct(left, weights, sizes=extents, tile=tile, shape=a.shape[:-1])
    nest.workload = workload
    return nest.output


def _workload(
    template: str, sizes: tuple[int | str, ...], left: Operand, weights: WeightRows, read: str = "rows"
) -> Workload:
    m, n, k = sizes
    zeros = "none" if weights.bits == 0 else "one" if weights.zeros is None else "many"
    dims = {"m": m, "n": n, "k": k, "bits": weights.bits, "group": weights.group, "zeros": zeros, "read": read}
    return workload_of(template, dims, (left.source.dtype, weights.data.dtype), sizes)


def few_rows(node: OpNode, left: Operand, weights: WeightRows, shape: tuple[Expr, ...], columns: int) -> Tensor | None:
    """The product of few rows in memory by weights.

    Args:
        node: The node being lowered.
        left: ``[M, K]``.
        weights: ``[N, K]``.
        shape: Of the left operand, with the axes that its rows come from.
        columns: N.

    Returns:
        float32 ``[..., N]``; ``None`` when there are more rows, or they do not lie in whole chunks.
    """
    count, depth, kind = few(shape[:-1]), shape[-1], left.source.dtype
    profile = node.context.program.profile
    if count is None or not left.aligned(1, depth) or weights.group % weights.step(kind):
        return None
    if kind == "bfloat16" and profile.sm < OLDEST[kind]:
        return None
    extents = count, columns, dim(depth)
    workload = _workload("few_rows", extents, left, weights)
    offered = columns_candidates(count, extents[1:], weights.bits or itemsize(kind) * 8, profile)
    best = node.context.program.chooser.choose(workload, offered)
    sizes = columns, depth
    nest = FewRows(left, weights, rows=count, sizes=sizes, shape=shape[:-1], columns=best.number("columns"))
    nest.workload = workload
    return nest.output


def _rows_of(node: OpNode, known: Quantized, parts: Parts, group: int) -> WeightRows:
    """The weights as a kernel reads them, rearranged at compile time."""
    padded = -(-parts.q.shape[0] // CHUNK_NUMBERS) * CHUNK_NUMBERS
    alike = bool(np.all(parts.zero == parts.zero.flat[0]))

    def packed(what: str, data: np.ndarray) -> Source:
        key = ("number rows", what, parts.bits, group, known.axis)
        return node.context.program.packed(known.value, key, lambda _: data)

    numbers = np.zeros((parts.q.shape[1], padded), parts.q.dtype)
    numbers[:, : parts.q.shape[0]] = parts.q.T
    if parts.bits == 4:
        numbers = numbers[:, ::2] | numbers[:, 1::2] << 4
    return WeightRows(
        packed("numbers", numbers),
        parts.bits,
        packed("scales", parts.scale.T.astype(np.float32)),
        None if alike else packed("zeros", parts.zero.T.astype(np.float32)),
        float(parts.zero.flat[0]) if alike else 0.0,
        group,
    )


def float_rows(node: OpNode, b: Value) -> WeightRows:
    """A constant ``[K, N]`` as ``[N, K]``, with zeros behind each row up to whole chunks."""
    each = CHUNK // itemsize(b.dtype)

    def pack(weight: np.ndarray) -> np.ndarray:
        rows = np.zeros((weight.shape[1], -(-weight.shape[0] // each) * each), weight.dtype)
        rows[:, : weight.shape[0]] = weight.T
        return rows

    return WeightRows(node.context.program.packed(b, ("rows", each), pack))
