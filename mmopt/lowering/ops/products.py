"""Products of values that remember what they were: integers before dequantizing, bfloat16 before widening."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import SUM, Map, Reduction, Tensor, guarded, index
from mmopt.backends.cpu.choosing import Workload, dim, typical
from mmopt.backends.cpu.dot import Dot, dot_for, pack
from mmopt.backends.cpu.kernels.matmul_dot import Blocking, DotMatmul, candidates
from mmopt.backends.cpu.loops import i64, product, static
from mmopt.backends.expressions import simplify
from mmopt.lowering.ops.weight_only import weight_only_product
from mmopt.lowering.registry import OpNode
from mmopt.lowering.values import Quantized, Value

BYTES = ("int8", "uint8")

NARROW_FLOATS = {"bfloat16": "bf16", "float16": "fp16"}
"""Types of narrow floats, and how kernels are named after them."""


def narrow_product(node: OpNode, a: Value, b: Value) -> Value | None:
    """``a @ b`` computed in the narrow numbers that the operands were made from.

    Args:
        node: The node being lowered.
        a: ``[..., M, K]``, float32, bfloat16 or float16.
        b: ``[K, N]`` of the same type.

    Returns:
        ``[..., M, N]`` of that type; ``None`` when the operands remember nothing narrower, or there is no kernel.
    """
    if b.ndim != 2 or a.ndim < 2 or any(static(d) == 0 for d in (*a.shape, *b.shape)):
        return None
    if a.dtype == b.dtype and a.dtype in NARROW_FLOATS:
        wide = _float_product(node, a, b)
        return None if wide is None else _narrowed(node, wide, a.dtype)
    if a.dtype != "float32" or b.dtype != "float32":
        return None
    if b.quantized is not None:
        made = None if a.quantized is None else _quantized_product(node, a.quantized, b.quantized)
        return made or weight_only_product(node, a, b.quantized)
    if a.narrow is not None and b.narrow is not None and a.narrow.dtype == b.narrow.dtype:
        return _float_product(node, a.narrow, b.narrow)
    return None


def transposed_origin(origin: Value, made: Value, order: Sequence[int]) -> None:
    """Let ``made``, which is ``origin`` with its axes in ``order``, remember what ``origin`` remembers.

    Only constants do: theirs is a view.
    """
    if origin.narrow is not None and origin.narrow.constant is not None:
        made.narrow = Value(constant=origin.narrow.constant.transpose(order), name=origin.name)
    known = origin.quantized
    if known is not None and known.value.constant is not None and (known.single or known.scale.ndim == 1):
        value = Value(constant=known.value.constant.transpose(order), name=known.value.name)
        value.bits = known.value.bits
        made.quantized = dataclasses.replace(known, value=value, axis=list(order).index(known.axis))


# -- floats ----------------------------------------------------------------------------------------------------


def _float_product(node: OpNode, a: Value, b: Value) -> Value | None:
    dot = dot_for(node.context.program.profile, a.dtype, b.dtype)
    if dot is None or b.constant is None:
        return None
    return Value(_multiplied(node, a, b, dot, f"matmul_{NARROW_FLOATS[a.dtype]}"), name=node.name)


def _narrowed(node: OpNode, wide: Value, dtype: str) -> Value:
    return Value(Map(wide.shape, dtype, lambda *at: wide.tensor[at].astype(dtype), "narrow"), name=node.name)


# -- integers --------------------------------------------------------------------------------------------------


def integer_product(node: OpNode, a: Value, b: Value, a_zero: Value | None, b_zero: Value | None) -> Value | None:
    """``(a - a_zero) @ (b - b_zero)`` in 32-bit integers, exactly.

    Args:
        node: The node being lowered.
        a: 8-bit integers ``[..., M, K]``.
        b: Constant 8-bit integers ``[K, N]``.
        a_zero: One number.
        b_zero: A constant: one number, or one for each column.

    Returns:
        int32 ``[..., M, N]``; ``None`` when there is no kernel for these operands.
    """
    made = _integers(node, a, b, a_zero, b_zero)
    return None if made is None else made.value()


def _integers(node: OpNode, a: Value, b: Value, a_zero: Value | None, b_zero: Value | None) -> _Integers | None:
    if a.dtype not in BYTES or b.dtype not in BYTES or b.ndim != 2 or b.constant is None or a.ndim < 2:
        return None
    if any(static(d) == 0 for d in (*a.shape, *b.shape)):
        return None
    if (a_zero is not None and not _is_one(a_zero)) or not _per_column(b_zero, b.constant.shape[1]):
        return None
    dot = dot_for(node.context.program.profile, a.dtype, "int8")
    return None if dot is None else _Integers(node, a, b, a_zero, b_zero, dot)


def _is_one(value: Value) -> bool:
    return all(static(d) == 1 for d in value.shape)


def _per_column(zero: Value | None, columns: int) -> bool:
    return zero is None or (zero.constant is not None and zero.ndim <= 1 and zero.constant.size in (1, columns))


class _Integers:
    """An integer product with its corrections: shifted operands, zero points of both sides.

    Σ (a − za)(b − zb) = Σ a·b − za · Σb − zb · (Σa − K·za), where the sums of b are known at compile time.
    """

    def __init__(self, node: OpNode, a: Value, b: Value, a_zero: Value | None, b_zero: Value | None, dot: Dot) -> None:
        assert b.constant is not None
        self.node, self.dot, self.a_zero = node, dot, a_zero
        self.rows = simplify(product(a.shape[:-1]))
        self.depth, self.columns = b.constant.shape
        self.shape = (*a.shape[:-1], index(self.columns))
        self.a, self.b = a, b
        zero = np.zeros(1, np.int32) if b_zero is None or b_zero.constant is None else b_zero.constant
        flip = 128 if b.dtype == "uint8" else 0  # unsigned weights are multiplied as signed ones, 128 less
        self.b_zero = np.broadcast_to(zero.astype(np.int32).reshape(-1) - flip, (self.columns,))

    def value(self) -> Value:
        packed = _operand(self.node, self.a, self.depth, self.dot)
        total = _tiled(self.node, self.a, packed, self.b, self.dot, "matmul_int8")
        zero = self._zero_of_a(self.dot.shift)
        sums = self._constant(self._column_sums(), "sums")
        weighted = bool(np.any(self.b_zero))
        row_sums = self._row_sums(packed) if weighted else None
        if zero is None and row_sums is None:
            return Value(total, name=self.node.name)
        offsets = self._constant(self.b_zero, "zeros") if weighted else None

        def body(*at: Expr) -> Expr:
            value = total[at]
            if zero is not None:
                value = value - zero() * sums.tensor[at[-1]]
            if row_sums is not None and offsets is not None:
                value = value - offsets.tensor[at[-1]] * row_sums.tensor[self._row(at)]
            return value

        return Value(Map(total.shape, "int32", body, "centred"), name=self.node.name)

    def scaled(self, a: Value, b: Value) -> Value | None:
        """The product times both scales, in two instructions: the zero point becomes a constant of each column.

        Returns:
            ``None`` unless scales and zero points are known and that of the right operand is 0.
        """
        if a.constant is None or b.constant is None or bool(np.any(self.b_zero)):
            return None
        if self.a_zero is not None and self.a_zero.constant is None:
            return None
        zero = 0 if self.a_zero is None or self.a_zero.constant is None else int(self.a_zero.constant.reshape(-1)[0])
        excess = zero + self.dot.shift
        factors = a.constant.reshape(-1).astype(np.float32) * b.constant.reshape(-1).astype(np.float32)
        factors = np.ascontiguousarray(np.broadcast_to(factors, (self.columns,)))
        offsets = (-float(excess) * self._column_sums().astype(np.float64) * factors).astype(np.float32)
        factor = Value(constant=factors, name=f"{b.name}_{a.name}").tensor
        packed = _operand(self.node, self.a, self.depth, self.dot)
        total = _tiled(self.node, self.a, packed, self.b, self.dot, "matmul_int8")
        offset = Value(constant=offsets, name=f"{b.name}_{a.name}_offsets").tensor if excess else None

        def body(*at: Expr) -> Expr:
            value = total[at].astype("float32") * factor[at[-1]]
            return value if offset is None else value + offset[at[-1]]

        return Value(Map(total.shape, "float32", body, "scaled"), name=self.node.name)

    def _row(self, at: Sequence[Expr]) -> Expr:
        position: Expr = i64(0)
        for i, extent in zip(at[:-1], self.shape[:-1], strict=True):
            position = position * extent + i
        return position

    def _zero_of_a(self, shift: int) -> Callable[[], Expr] | None:
        """Gives what every element of the left operand has too much; ``None`` for nothing."""
        zero = self.a_zero
        if zero is None or zero.constant is not None:
            known = shift + (0 if zero is None or zero.constant is None else int(zero.constant.reshape(-1)[0]))
            return (lambda: tirx.const(known, "int32")) if known else None
        self.node.context.tensor(zero)
        at = tuple(i64(0) for _ in zero.shape)
        return lambda: zero.tensor[at].astype("int32") + tirx.const(shift, "int32")

    def _column_sums(self) -> np.ndarray:
        """Σ (b − zb) of each column."""
        assert self.b.constant is not None
        sums = self.b.constant.astype(np.int32).sum(axis=0, dtype=np.int32)
        if self.b.dtype == "uint8":
            sums = sums - 128 * self.depth
        return np.asarray(sums - self.depth * self.b_zero)

    def _constant(self, data: np.ndarray, what: str) -> Value:
        made = np.ascontiguousarray(data, dtype=np.int32)
        return Value(constant=made, name=f"{self.b.name}_{what}")

    def _row_sums(self, packed: Tensor) -> Value:
        """Σ a of each row, as the kernel sees it."""

        def body(row: Expr, k: Expr) -> Expr:
            return packed[row, k].astype("int32")

        made = Value(Reduction((self.rows,), (i64(self.depth),), ("int32",), body, SUM, name="row_sums"))
        self.node.context.realize([made], "row_sums")
        return made


def _quantized_product(node: OpNode, a: Quantized, b: Quantized) -> Value | None:
    """The product of two dequantized values: integers, then one scale for each column."""
    weight = b.value.constant
    if weight is None or not a.single or a.block or b.block or a.scale.dtype != "float32":
        return None
    if not b.single and b.axis != 1:
        return None
    if a.zero is not None and a.zero.dtype != a.value.dtype:
        return None
    made = _integers(node, a.value, b.value, a.zero, b.zero)
    if made is None:
        return None
    known = made.scaled(a.scale, b.scale)
    return known or _scaled(node, made.value(), a.scale, b.scale)


def _scaled(node: OpNode, total: Value, a: Value, b: Value) -> Value:
    """Sums times both scales, which are multiplied beforehand where they are known."""
    both = a.constant is not None and b.constant is not None
    if both and a.constant is not None and b.constant is not None:
        factor = a.constant.reshape(-1).astype(np.float32) * b.constant.reshape(-1).astype(np.float32)
        b = Value(constant=factor, name=f"{b.name}_{a.name}")
    node.context.tensor(a)
    node.context.tensor(b)
    zero = i64(0)

    def body(*at: Expr) -> Expr:
        column = zero if all(static(d) == 1 for d in b.shape) else at[-1]
        factor = b.tensor[(column,) * b.ndim]
        if not both:
            factor = factor * a.tensor[(zero,) * a.ndim]
        return total.tensor[at].astype("float32") * factor

    return Value(Map(total.shape, "float32", body, "scaled"), name=node.name)


# -- the kernel ------------------------------------------------------------------------------------------------


def _multiplied(node: OpNode, a: Value, b: Value, dot: Dot, name: str) -> Tensor:
    assert b.constant is not None
    return _tiled(node, a, _operand(node, a, b.constant.shape[0], dot), b, dot, name)


def _operand(node: OpNode, a: Value, depth: int, dot: Dot) -> Tensor:
    """The left operand in memory as ``dot`` wants it: ``[M, whole steps of depth]``."""
    context = node.context
    flat = context.reshape(a, (simplify(product(a.shape[:-1])), a.shape[-1]))
    context.realize([flat], "operand")
    source, full = context.tensor(flat), dot.depth(depth)
    if source.dtype == dot.a and full == depth:
        return source
    nothing = tirx.const(0, dot.a)

    def convert(x: Expr) -> Expr:
        if dot.shift:
            return (x.astype("int16") + tirx.const(dot.shift, "int16")).astype(dot.a)
        return x.astype(dot.a)

    def body(row: Expr, k: Expr) -> Expr:
        if full == depth:
            return convert(source[row, k])
        return guarded(k < depth, lambda: convert(source[row, k]), nothing)

    made = Value(Map((source.shape[0], i64(full)), dot.a, body, "operand"))
    context.realize([made], "operand")
    return made.tensor


def _tiled(node: OpNode, a: Value, operand: Tensor, b: Value, dot: Dot, name: str) -> Tensor:
    """Sums ``[..., M, N]``."""
    assert b.constant is not None
    program = node.context.program
    depth, columns = b.constant.shape
    dot = dot.stepping(depth)
    rows = dim(operand.shape[0])
    sizes = (("m", rows), ("n", columns), ("k", depth))
    work = 2.0 * typical(rows) * columns * depth
    workload = Workload(name, sizes, (dot.a, dot.b, dot.total), work)
    offered = candidates(program.profile, dot, typical(rows), columns, depth)
    best = program.chooser.choose(workload, offered)
    blocking = Blocking(*(best.number(f.name) for f in dataclasses.fields(Blocking)))
    width = blocking.vectors * dot.lanes

    def packed(weight: np.ndarray) -> np.ndarray:
        signed = (weight ^ 0x80).view(np.int8) if weight.dtype == np.uint8 else weight
        return pack(signed, dot, width)

    panels = program.packed(b, ("dot", dot.group, dot.step, width), packed)
    nest = DotMatmul(
        operand,
        panels,
        dot=dot,
        columns=columns,
        blocking=blocking,
        shape=a.shape[:-1],
        name=name,
        workload=workload,
    )
    return nest.output
