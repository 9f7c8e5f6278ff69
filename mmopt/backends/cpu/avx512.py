"""Instructions of AVX-512 that TVM has no operation for: rounding to bfloat16, and the two halves of an exponential.

    2^x = 2^(x − ⌊x⌋) · 2^⌊x⌋          fraction(x) = x − ⌊x⌋, raised(p, x) = p · 2^⌊x⌋

Each is an operation on float32 expressions. On whole vectors it is one instruction; on what is left over, and for
targets without it, arithmetic that gives the same. Targets say that they scale by :data:`SCALING` among their switches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import Call, Expr, Op, PrimType, register_op_attr

from mmopt.backends.profile import Profile

_PURE = 1
"""``CallEffectKind::kPure`` of TVM: equal calls have equal results, and unused ones can go."""

_LANES = 16

SCALING = "+avx512dq"
"""Switch of LLVM for targets that take numbers apart and scale them, whole vectors at a time."""

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
    The kernel must import :class:`Rounding`.
    """
    register()
    return Call(Op.get(_BFLOAT16), [x], ret_ty=PrimType("uint16"))


def fraction(x: Expr) -> Expr:
    """x − ⌊x⌋ of a float32 expression; 0 at ±∞."""
    register()
    return Call(Op.get(_FRACTION), [x], ret_ty=PrimType("float32"))


def raised(value: Expr, x: Expr) -> Expr:
    """``value`` · 2^⌊x⌋ of float32 expressions, for x ≤ 0 and values from 1 to 2.

    Below 2^-126 vectors give subnormal numbers, what is left over gives zero.
    """
    register()
    return Call(Op.get(_RAISED), [value, x], ret_ty=PrimType("float32"))


@dataclasses.dataclass(frozen=True)
class Rounding:
    """The functions behind :func:`bfloat16_bits`."""

    def llvm(self) -> str:
        """Their text."""
        one = "<16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>"
        two = "<32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>"
        lines = [
            f"declare {one})",
            f"declare {two}, <16 x float>)",
            "define <16 x i16> @mmopt_bfloat16_16(<16 x float> %x) alwaysinline {",
            f"  %y = call {one} %x)",
            "  %bits = bitcast <16 x bfloat> %y to <16 x i16>",
            "  ret <16 x i16> %bits",
            "}",
            "define <32 x i16> @mmopt_bfloat16_32(<32 x float> %x) alwaysinline {",
            *_halves(),
            f"  %y = call {two} %xhigh, <16 x float> %xlow)",
            "  %bits = bitcast <32 x bfloat> %y to <32 x i16>",
            "  ret <32 x i16> %bits",
            "}",
        ]
        return "\n".join([*lines, ""])


def _halves() -> list[str]:
    return [
        f"  %x{half} = shufflevector <32 x float> %x, <32 x float> poison, <16 x i32> <{_indices(first)}>"
        for half, first in (("low", 0), ("high", 16))
    ]


def _indices(first: int) -> str:
    return ", ".join(f"i32 {first + n}" for n in range(_LANES))


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
    if has_vectors(x):
        return part(x)
    bounded = _bounded(x)
    return bounded - tirx.floor(bounded)


def _lower_raised(call: Call) -> Expr:
    value, x = call.args
    if has_vectors(x):
        return scaled(value, x)
    kind = str(x.ty)
    integer = kind.replace("float32", "int32")
    exponent = tirx.floor(_bounded(x)).astype(integer) + tirx.const(127, integer)
    return value * tirx.reinterpret(kind, tirx.shift_left(exponent, tirx.const(23, integer)))


def has_vectors(x: Expr) -> bool:
    """Whether an expression that is being lowered is made of whole vectors of a target that scales them."""
    target = tvm.target.Target.current(allow_none=True)
    switches = () if target is None else target.attrs.get("mattr", ())
    return _whole(str(x.ty)) is not None and SCALING in map(str, switches)


def part(x: Expr) -> Expr:
    """x − ⌊x⌋ where :func:`has_vectors` says so."""
    return _by_vector(lambda x: _masked("reduce", x, tirx.const(1, "int32"), x), x)


def scaled(value: Expr, x: Expr) -> Expr:
    """``value`` · 2^⌊x⌋ where :func:`has_vectors` says so, over the whole range."""
    return _by_vector(lambda value, x: _masked("scalef", value, x, value), value, x)


def _masked(name: str, first: Expr, *others: Expr) -> Expr:
    """An instruction on all lanes of one vector, rounding as the processor is set."""
    every, rounding = tirx.const(-1, "int16"), tirx.const(4, "int32")
    intrinsic = f"llvm.x86.avx512.mask.{name}.ps.512"
    return tirx.call_llvm_pure_intrin(str(first.ty), intrinsic, first, *others, every, rounding)


def _by_vector(make: Callable[..., Expr], *operands: Expr) -> Expr:
    """``make`` of each vector of 16 lanes."""
    if _whole(str(operands[0].ty)) == _LANES:
        return make(*operands)
    both = [tirx.const(n, "int32") for n in range(2 * _LANES)]
    low, high = (make(*(tirx.Shuffle([x], half) for x in operands)) for half in (both[:_LANES], both[_LANES:]))
    return tirx.Shuffle([low, high], both)


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
