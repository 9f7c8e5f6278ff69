"""Instructions of AVX-512 that TVM has no operation for: rounding to bfloat16, and the two halves of an exponential.

Each is an operation on float32 expressions. On whole vectors it is one or two instructions, by a function of LLVM's
language that the kernel must import (:class:`Avx512`); on what is left over, and where there are no such vectors, it is
arithmetic that gives the same.

    2^x = 2^(x − ⌊x⌋) · 2^⌊x⌋          fraction(x) = x − ⌊x⌋, raised(p, x) = p · 2^⌊x⌋
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import tvm_ffi
from tvm import tirx
from tvm.ir import Call, Expr, Op, PrimType, register_op_attr

from mmopt.backends.profile import Profile

_PURE = 1
"""``CallEffectKind::kPure`` of TVM: equal calls have equal results, and unused ones can go."""

_LANES = 16

_BFLOAT16, _FRACTION, _RAISED = "tirx.mmopt_bfloat16", "tirx.mmopt_fraction", "tirx.mmopt_raised"


def has_bfloat16(profile: Profile) -> bool:
    """Whether the target has an instruction that rounds whole vectors to bfloat16."""
    return has_scaling(profile) and "avx512_bf16" in profile.features


def has_scaling(profile: Profile) -> bool:
    """Whether the target has the instructions behind :func:`fraction` and :func:`raised`."""
    return profile.vector_bytes == 64 and "avx512dq" in profile.features


def bfloat16_bits(x: Expr) -> Expr:
    """The bits of a float32 expression rounded to bfloat16, halves to even, as uint16; NaN stays NaN.

    On 16 lanes one instruction in place of seven, on 32 one for both halves; it takes numbers below 1.2e-38 for zero.
    The kernel must import :class:`Avx512`.
    """
    register()
    return Call(Op.get(_BFLOAT16), [x], ret_ty=PrimType("uint16"))


def fraction(x: Expr) -> Expr:
    """x − ⌊x⌋ of a float32 expression; 0 at ±∞. The kernel must import :class:`Avx512`."""
    register()
    return Call(Op.get(_FRACTION), [x], ret_ty=PrimType("float32"))


def raised(value: Expr, x: Expr) -> Expr:
    """``value`` · 2^⌊x⌋ of float32 expressions, for x ≤ 0 and values from 1 to 2.

    Below 2^-126 vectors give subnormal numbers, what is left over gives zero. The kernel must import :class:`Avx512`.
    """
    register()
    return Call(Op.get(_RAISED), [value, x], ret_ty=PrimType("float32"))


@dataclasses.dataclass(frozen=True)
class Avx512:
    """The functions behind this file's operations.

    Attributes:
        bfloat16: Whether to have those for rounding, which the target may lack.
    """

    bfloat16: bool = True

    def llvm(self) -> str:
        """Their text."""
        vector, rounding = "<16 x float>", "i32 4"  # as the processor is set
        reduce = f"{vector} @llvm.x86.avx512.mask.reduce.ps.512({vector}"
        scale = f"{vector} @llvm.x86.avx512.mask.scalef.ps.512({vector}"
        text = [
            f"declare {reduce}, i32 immarg, {vector}, i16, i32 immarg)",
            f"declare {scale}, {vector}, {vector}, i16, i32 immarg)",
            f"define {vector} @mmopt_fraction16({vector} %x) alwaysinline {{",
            f"  %y = call {reduce} %x, i32 1, {vector} %x, i16 -1, {rounding})",
            f"  ret {vector} %y",
            "}",
            f"define {vector} @mmopt_raised16({vector} %p, {vector} %x) alwaysinline {{",
            f"  %y = call {scale} %p, {vector} %x, {vector} %p, i16 -1, {rounding})",
            f"  ret {vector} %y",
            "}",
            *_doubled("fraction", ("x",)),
            *_doubled("raised", ("p", "x")),
        ]
        return "\n".join([*text, *(_bfloat16_functions() if self.bfloat16 else ()), ""])


def _halves(name: str) -> list[str]:
    return [
        f"  %{name}{half} = shufflevector <32 x float> %{name}, <32 x float> poison, <16 x i32> <{_indices(first, 16)}>"
        for half, first in (("low", 0), ("high", 16))
    ]


def _indices(first: int, count: int) -> str:
    return ", ".join(f"i32 {first + n}" for n in range(count))


def _doubled(name: str, operands: tuple[str, ...]) -> list[str]:
    """The same function for 32 lanes."""
    calls = []
    for half in ("low", "high"):
        given = ", ".join(f"<16 x float> %{o}{half}" for o in operands)
        calls.append(f"  %{half} = call <16 x float> @mmopt_{name}16({given})")
    return [
        f"define <32 x float> @mmopt_{name}32({', '.join(f'<32 x float> %{o}' for o in operands)}) alwaysinline {{",
        *(line for o in operands for line in _halves(o)),
        *calls,
        f"  %y = shufflevector <16 x float> %low, <16 x float> %high, <32 x i32> <{_indices(0, 32)}>",
        "  ret <32 x float> %y",
        "}",
    ]


def _bfloat16_functions() -> list[str]:
    one = "<16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>"
    two = "<32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>"
    return [
        f"declare {one})",
        f"declare {two}, <16 x float>)",
        "define <16 x i16> @mmopt_bfloat16_16(<16 x float> %x) alwaysinline {",
        f"  %y = call {one} %x)",
        "  %bits = bitcast <16 x bfloat> %y to <16 x i16>",
        "  ret <16 x i16> %bits",
        "}",
        "define <32 x i16> @mmopt_bfloat16_32(<32 x float> %x) alwaysinline {",
        *_halves("x"),
        f"  %y = call {two} %xhigh, <16 x float> %xlow)",
        "  %bits = bitcast <32 x bfloat> %y to <32 x i16>",
        "  ret <32 x i16> %bits",
        "}",
    ]


# -- lowering --------------------------------------------------------------------------------------------------


def _whole(kind: str) -> int | None:
    """Lanes of a vector that there is a function for."""
    return next((lanes for lanes in (_LANES, 2 * _LANES) if kind == f"float32x{lanes}"), None)


def _lower_bfloat16(call: Call) -> Expr:
    x = call.args[0]
    kind = str(x.ty)
    if lanes := _whole(kind):
        return tirx.call_pure_extern(f"uint16x{lanes}", f"mmopt_bfloat16_{lanes}", x)
    bits = tirx.reinterpret(kind.replace("float32", "uint32"), x)

    def number(value: int) -> Expr:
        return tirx.const(value, str(bits.ty))

    odd = tirx.bitwise_and(tirx.shift_right(bits, number(16)), number(1))
    rounded = tirx.shift_right(bits + odd + number(0x7FFF), number(16))
    return tirx.Select(x.equal(x), rounded, number(0x7FC0)).astype(kind.replace("float32", "uint16"))


def _lower_fraction(call: Call) -> Expr:
    x = call.args[0]
    kind = str(x.ty)
    if lanes := _whole(kind):
        return tirx.call_pure_extern(kind, f"mmopt_fraction{lanes}", x)
    bounded = _bounded(x)
    return bounded - tirx.floor(bounded)


def _lower_raised(call: Call) -> Expr:
    value, x = call.args
    kind = str(x.ty)
    if lanes := _whole(kind):
        return tirx.call_pure_extern(kind, f"mmopt_raised{lanes}", value, x)
    integer = kind.replace("float32", "int32")
    exponent = tirx.floor(_bounded(x)).astype(integer) + tirx.const(127, integer)
    return value * tirx.reinterpret(kind, tirx.shift_left(exponent, tirx.const(23, integer)))


def _bounded(x: Expr) -> Expr:
    """``x`` cut off where 2^x is zero; NaN stays NaN in this order."""
    return tirx.max(tirx.const(-127.0, str(x.ty)), x)


@functools.lru_cache(maxsize=1)
def register() -> None:
    """Make TVM know this file's operations. Idempotent."""
    add_operation(_BFLOAT16, _lower_bfloat16)
    add_operation(_FRACTION, _lower_fraction)
    add_operation(_RAISED, _lower_raised)


def add_operation(name: str, lower: Callable[[Call], Expr]) -> None:
    """Make an elementwise function known to TVM, and what LLVM's code generator gets in its place."""
    tvm_ffi.get_global_func("ir.RegisterOp")(name, "a function of mmopt")
    register_op_attr(name, "TCallEffectKind", _PURE)
    register_op_attr(name, "TVectorizable", True)
    tirx.op.register_intrin_lowering(name, target="llvm", f=lower, level=99)
