"""Joins casts where the first loses nothing: ``Cast_C(Cast_B(x)) = Cast_C(x)`` when every value of A is one of B.

    Cast<float>(Cast<double>(x: float))    →  x
    Cast<int8>(Cast<int64>(x: int32))      →  Cast<int8>(x)
    Cast<float>(Cast<bfloat16>(x: float))  stays: it rounds, and says on purpose in which precision to compute

What is in between stays where something else reads it.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from mmopt.transforms.canonicalize.editing import integer, is_onnx
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass

_T = ir.DataType
_MANTISSA = {_T.BFLOAT16: 8, _T.FLOAT16: 11, _T.FLOAT: 24, _T.DOUBLE: 53}
_WIDER_FLOATS = {
    _T.BFLOAT16: {_T.FLOAT, _T.DOUBLE},
    _T.FLOAT16: {_T.FLOAT, _T.DOUBLE},
    _T.FLOAT: {_T.DOUBLE},
    _T.DOUBLE: set(),
}
_INTEGERS = {
    _T.BOOL: (False, 1),
    _T.UINT8: (False, 8),
    _T.UINT16: (False, 16),
    _T.UINT32: (False, 32),
    _T.UINT64: (False, 64),
    _T.INT8: (True, 7),
    _T.INT16: (True, 15),
    _T.INT32: (True, 31),
    _T.INT64: (True, 63),
}
"""Signedness and bits of magnitude."""


def loses_nothing(source: ir.DataType, target: ir.DataType) -> bool:
    """Whether every value of ``source`` is exactly a value of ``target``."""
    if source == target:
        return True
    if source in _WIDER_FLOATS:
        return target in _WIDER_FLOATS[source]
    if source not in _INTEGERS:
        return False
    signed, bits = _INTEGERS[source]
    if target in _MANTISSA:
        return bits <= _MANTISSA[target]
    if target not in _INTEGERS or target == _T.BOOL:
        return False
    target_signed, target_bits = _INTEGERS[target]
    return bits <= target_bits and (target_signed or not signed)


def _joins(source: ir.DataType, middle: ir.DataType, target: ir.DataType) -> bool:
    """Whether casting straight to ``target`` gives the same, out-of-range values included."""
    if not loses_nothing(source, middle):
        return False
    if source == target or target in _MANTISSA:
        return True
    # What a float beyond an integer's range becomes is undefined, and differs between float types.
    return source in _INTEGERS and middle in _INTEGERS and target in _INTEGERS


def _join(node: ir.Node, rewriter: Rewriter) -> bool:
    inner = node.inputs[0].producer() if node.inputs[0] is not None else None
    if inner is None or not is_onnx(inner, "Cast") or inner.inputs[0] is None:
        return False
    source, middle, to = rewriter.dtype(inner.inputs[0]), integer(inner, "to", 0), integer(node, "to", 0)
    if source is None or not middle or not to or not _joins(source, ir.DataType(middle), ir.DataType(to)):
        return False
    if source == to:
        return rewriter.replace(node, inner.inputs[0])
    rewriter.set_input(node, 0, inner.inputs[0])
    return True


RULES = (Rule("join-casts", ("Cast",), _join),)


@dataclasses.dataclass(frozen=True)
class MergeCasts(RulePass):
    """Joins adjacent casts of which the first loses nothing."""

    def rules(self) -> tuple[Rule, ...]:
        """The rules of this module."""
        return RULES
