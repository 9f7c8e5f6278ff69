"""Operators that choose or move elements, on the integers that their operands were dequantized from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map
from mmopt.lowering.registry import OpNode
from mmopt.lowering.values import Quantized, Value

BYTES = ("int8", "uint8")


def shared_encoding(values: Sequence[Value]) -> list[Quantized] | None:
    """The integers behind ``values``, where all have been dequantized with one known step, above 0, and zero point."""
    found = [value.quantized for value in values if value.quantized is not None]
    if len(found) < len(values) or not found or not all(_is_plain(one) for one in found):
        return None
    first = found[0]
    return found if all(is_encoding(one, first.scale, first.zero, first.value.dtype) for one in found) else None


def _is_plain(known: Quantized) -> bool:
    scale, zero = known.scale.constant, known.zero
    settled = scale is not None and scale.size == 1 and scale.dtype == np.float32 and float(scale.reshape(-1)[0]) > 0
    integers = known.value.dtype in BYTES and known.value.bits is None and known.value.constant is None
    return settled and integers and not known.block and (zero is None or zero.constant is not None)


def is_encoding(known: Quantized, scale: Value, zero: Value | None, dtype: str) -> bool:
    """Whether ``known`` is what quantizing with these parameters would give."""
    if known.value.dtype != dtype or not _is_plain(known) or scale.constant is None or scale.constant.size != 1:
        return False
    if zero is not None and (zero.constant is None or zero.constant.size != 1):
        return False
    assert known.scale.constant is not None
    same = float(known.scale.constant.reshape(-1)[0]) == float(scale.constant.reshape(-1)[0])
    return same and _number(known.zero) == _number(zero)


def _number(zero: Value | None) -> int:
    return 0 if zero is None or zero.constant is None else int(zero.constant.reshape(-1)[0])


def dequantized(node: OpNode, integers: Value, like: Quantized) -> Value:
    """The floats of ``integers``, with the parameters of ``like``, which remember them."""
    assert like.scale.constant is not None
    scale = tirx.const(float(like.scale.constant.reshape(-1)[0]), "float32")
    zero = tirx.const(_number(like.zero), "int32")
    source = node.context.tensor(integers) if integers.blocked is None else integers.blocked

    def body(*at: Expr) -> Expr:
        return (source[at].astype("int32") - zero).astype("float32") * scale

    wide = Map(source.shape, "float32", body, "dequantize")
    made = Value(wide, name=node.name) if integers.blocked is None else Value.in_blocks(wide, node.name)
    made.quantized = dataclasses.replace(like, value=integers)
    return made
