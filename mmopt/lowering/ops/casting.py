"""Conversions between element types."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from tvm import tirx
from tvm.ir import Expr

from mmopt.lowering.ops.elementwise import HALF_DTYPES, elementwise, follow, is_float, truth
from mmopt.lowering.registry import OpNode, lowers
from mmopt.lowering.values import MAX_ELEMENTS, NotLowered, Value, dtype_name, narrow_bits

_FOLLOWED = frozenset({"int64", "int32", "bool"})


@lowers("Cast")
def cast(node: OpNode) -> Value:
    """Elements as another type."""
    to = ir.DataType(node.attr("to"))
    return narrowed(node, converted(node, node.input(0), dtype_name(to)), narrow_bits(to))


@lowers("CastLike")
def cast_like(node: OpNode) -> Value:
    """Elements as the type of the second operand."""
    return narrowed(node, converted(node, node.input(0), node.input(1).dtype), node.input(1).bits)


def narrowed(node: OpNode, value: Value, bits: int | None) -> Value:
    """Only the lowest ``bits`` of every byte, with their sign; all of them when ``None``."""
    if bits is None:
        return value if value.bits is None else elementwise(node, [value], lambda x: x, name="widen")
    unused = tirx.const(8 - bits, value.dtype)
    made = elementwise(node, [value], lambda x: tirx.shift_right(tirx.shift_left(x, unused), unused), name="narrow")
    made.bits = bits
    return made


def converted(node: OpNode, value: Value, dtype: str) -> Value:
    """``value`` as ``dtype``."""
    if value.dtype == dtype:
        return value
    if value.constant is not None and value.dtype == "float32" and dtype == "bfloat16":
        with np.errstate(all="ignore"):
            return node.context.constant(value.constant.astype(ml_dtypes.bfloat16), value.name)
    if value.constant is not None and value.constant.size <= MAX_ELEMENTS and "bfloat16" not in (value.dtype, dtype):
        with np.errstate(all="ignore"):
            return node.context.constant(value.constant.astype(dtype), value.name)
    if dtype in _FOLLOWED and value.dtype in _FOLLOWED:
        followed = follow([value], truth if dtype == "bool" else lambda e: e.astype("int64"), dtype)
        if followed is not None:
            return followed
    made = elementwise(node, [value], lambda x: cast_expr(x, dtype), dtype, "cast")
    if value.dtype in HALF_DTYPES and dtype == "float32":
        made.narrow = value
    if value.dtype == "float32" and dtype in HALF_DTYPES:
        made.rounded = value
    return made


def cast_expr(x: Expr, dtype: str) -> Expr:
    """``x`` as ``dtype``: floats to integers are cut off and wrap, anything but zero is true, halves go by float32."""
    source = str(x.ty)
    if source == dtype:
        return x
    if dtype == "bool":
        return truth(x.astype("float32") if source in HALF_DTYPES else x)
    if source in HALF_DTYPES:
        return cast_expr(x.astype("float32"), dtype)
    if is_float(source) and not is_float(dtype):
        return _to_integer(x, dtype)
    if dtype in HALF_DTYPES and source != "float32":
        return x.astype("float32").astype(dtype)
    return x.astype(dtype)


def _to_integer(x: Expr, dtype: str) -> Expr:
    """Through a signed type wide enough that values below zero wrap as in C on common processors."""
    if dtype in ("int32", "int64", "uint64"):
        return x.astype(dtype)
    return x.astype("int64" if dtype == "uint32" else "int32").astype(dtype)


def saturated(x: Expr, dtype: str, bits: int | None = None) -> Expr:
    """A float rounded already, bounded to the range of an integer type (of ``bits``, when less) and converted."""
    info = np.iinfo(dtype)
    drop = 0 if bits is None else info.bits - bits
    low, high = (tirx.const(float(limit >> drop), str(x.ty)) for limit in (int(info.min), int(info.max)))
    return _to_integer(tirx.max(tirx.min(x, high), low), dtype)


@lowers("BitCast")
def bit_cast(node: OpNode) -> Value:
    """The same bits as another type of the same width."""
    value, dtype = node.input(0), dtype_name(ir.DataType(node.attr("to")))
    if dtype == "bool" or "bfloat16" in (value.dtype, dtype):
        raise NotLowered(f"reinterpreting {value.dtype} as {dtype}")
    if value.dtype == "bool":
        return elementwise(node, [value], lambda x: x.astype(dtype), dtype)
    return elementwise(node, [value], lambda x: tirx.reinterpret(dtype, x), dtype)
