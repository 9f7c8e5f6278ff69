"""Vector polynomials in place of scalar calls to the C library's mathematical functions.

Every function here takes a scalar or vector float32 expression and gives one built from arithmetic, comparisons and
integer shifts only, so that LLVM keeps it in vector registers. Other types go to LLVM's own intrinsics. Errors against
float64 are at most 2 units in the last place over all finite inputs; infinities and NaN give what the C library gives.

The polynomials were fitted for this file; ``benchmarks/fit_intrinsics.py`` recomputes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Call, Expr, Op

from mmopt.backends.cpu import avx512
from mmopt.backends.cpu.avx512 import add_operation, fraction, raised

_EXP = (
    0.5,
    0.1666666716337204,
    0.041666269302368164,
    0.008333263918757439,
    0.0013946177205070853,
    0.000199185247765854,
)
_TANH = (
    -0.3333333134651184,
    0.13333210349082947,
    -0.05394720286130905,
    0.021702969446778297,
    -0.008182677440345287,
    0.0021475397516041994,
)
_ERF_SMALL = (
    0.12837916612625122,
    -0.37612637877464294,
    0.11283782869577408,
    -0.02686544507741928,
    0.005221074912697077,
    -0.0008484711870551109,
    0.00011270545655861497,
    -9.68013955571223e-06,
)
_ERF_LARGE = (
    0.0001966603595064953,
    -1.129621982574463,
    -0.6331250667572021,
    -0.10853427648544312,
    0.0252948310226202,
    -0.00424523139372468,
    0.0004530447185970843,
    -2.357490848226007e-05,
    1.3053957559350238e-07,
)
_LOG = (
    0.3333331346511841,
    -0.25000008940696716,
    0.2000211924314499,
    -0.1666799634695053,
    0.14219552278518677,
    -0.1240558922290802,
    0.11888162791728973,
    -0.11675651371479034,
    0.0674663856625557,
)

Keep = Callable[[Expr], Expr]
"""Stores a value for repeated use and gives the expression that reads it."""

_EXP2 = (
    1.0,
    0.6931470036506653,
    0.24022242426872253,
    0.05550733581185341,
    0.009671512991189957,
    0.0013264730805531144,
)

EXP2_COARSE = (1.0, 0.6932829022407532, 0.24221095442771912, 0.05500892922282219)
"""Within 1.1e-4 of 2^r: a twentieth of what rounding to bfloat16 costs."""

_EXP2_FRACTION = (
    1.0,
    0.6931470036506653,
    0.24022983014583588,
    0.055483341217041016,
    0.009678840637207031,
    0.0012439688434824347,
    0.00021702254889532924,
)

EXP2_FRACTION_COARSE = (0.9999251961708069, 0.6958335638046265, 0.22606715559959412, 0.07802452147006989)
"""Within 7.5e-5 of 2^r for r from 0 to 1."""

_NORMAL = (
    -0.9999999403953552,
    -1.1511070728302002,
    -0.45919889211654663,
    -0.05250272527337074,
    0.00703067984431982,
    -6.296185893006623e-05,
    -0.0002518976980354637,
    6.908900832058862e-05,
    -9.80481127044186e-06,
    7.573246989522886e-07,
    -2.4990853830786364e-08,
)
"""log2 Φ(−a), Φ being the normal distribution."""

_NORMAL_COARSE = (
    -1.0002697706222534,
    -1.147290825843811,
    -0.46783900260925293,
    -0.045723896473646164,
    0.00514486338943243,
    -0.000256449420703575,
)

_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.428606765330187e-06
"""ln 2 in two parts; the first has few bits, so that its product with a small integer is exact."""

_SQRT_HALF_BITS = 0x3F3504F3


def _c(like: Expr, value: float) -> Expr:
    """``value`` in the type (and with the lanes) of ``like``."""
    return tirx.const(value, str(like.ty))


def _int(like: Expr, value: int) -> Expr:
    return tirx.const(value, _integer(like))


def _integer(like: Expr) -> str:
    return str(like.ty).replace("float32", "int32")


def _polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Horner's scheme, constant term first."""
    value = _c(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + _c(x, coefficient)
    return value


def _power_of_two(n: Expr, like: Expr) -> Expr:
    """2^n for an integer vector within the exponent's range."""
    return tirx.reinterpret(str(like.ty), tirx.shift_left(n + _int(like, 127), _int(like, 23)))


def _let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """``body`` of ``value``, computed once however often ``body`` uses it."""
    if isinstance(value, tirx.Var):
        return body(value)
    var = tirx.Var("x", str(value.ty))
    return tirx.Let(var, value, body(var))


def _magnitude(x: Expr) -> Expr:
    return tirx.max(x, _c(x, 0.0) - x)


def _unless_nan(x: Expr, value: Expr) -> Expr:
    return tirx.Select(x.equal(x), value, x)


def exp(x: Expr) -> Expr:
    """e^x = 2^n · e^r with |r| ≤ ln2/2. Where the target cannot scale by 2^n it is applied in two steps, which keeps
    overflow and subnormals right."""

    def near_one(r: Expr) -> Expr:
        return _polynomial(r, _EXP) * (r * r) + r + _c(r, 1.0)

    def in_two_steps(r: Expr, n: Expr) -> Expr:
        half = tirx.shift_right(n, _int(r, 1))
        return near_one(r) * _power_of_two(half, r) * _power_of_two(n - half, r)

    def times_power(r: Expr, n: Expr) -> Expr:
        if avx512.has_vectors(x):
            return avx512.scaled(near_one(r), n)
        return _let(n.astype(_integer(r)), lambda n: in_two_steps(r, n))

    def reduced(bounded: Expr) -> Expr:
        n = tirx.nearbyint(bounded * _c(bounded, 1.4426950408889634))
        return _let(n, lambda n: _let(_rest(bounded, n), lambda r: times_power(r, n)))

    def whole(x: Expr) -> Expr:
        bounded = tirx.max(tirx.min(x, _c(x, 89.0)), _c(x, -104.0))
        return _unless_nan(x, _let(bounded, reduced))

    return _let(x, whole)


def exp2_below_zero(x: Expr, keep: Keep, *, coarse: bool = False, scaling: bool = False) -> Expr:
    """2^x for x ≤ 0, the exponential of a softmax: within 2 units in the last place down to 2^-126, 0 from 2^-150 on.

    Half the instructions of :func:`exp`: adding 1.5 · 2^23 leaves round(x) in the last bits of the sum, from where a
    shift puts it into the exponent. At −127, where smaller numbers are cut off, that gives the bits of zero.

    Args:
        x: A float32 expression.
        keep: Stores a value for repeated use and gives the expression that reads it.
        coarse: Whether a relative error of 1.1e-4 will do: a twentieth of what rounding to bfloat16 costs.
        scaling: Whether the target takes numbers apart and puts them together in one instruction each
            (:func:`mmopt.backends.cpu.avx512.has_scaling`).
    """
    if scaling:
        x = keep(x)
        return raised(_polynomial(keep(fraction(x)), _near(coarse)), x)
    magic = _c(x, 12582912.0)
    x = keep(tirx.max(_c(x, -127.0), x))  # in this order NaN stays NaN
    rounded = keep(x + magic)
    rest = keep(x - (rounded - magic))
    return _with_exponent(keep(_polynomial(rest, EXP2_COARSE if coarse else _EXP2)), rounded)


def _near(coarse: bool) -> Sequence[float]:
    """Coefficients of a polynomial near 2^r for r from 0 to 1."""
    return EXP2_FRACTION_COARSE if coarse else _EXP2_FRACTION


def _power(x: Expr, body: Callable[[Expr], Expr], *, coarse: bool) -> Expr:
    """``body`` of what :func:`exp2_below_zero` gives, within an expression that is being lowered."""
    magic = _c(x, 12582912.0)

    def shifted(r: Expr, rounded: Expr) -> Expr:
        return _let(_with_exponent(_polynomial(r, EXP2_COARSE if coarse else _EXP2), rounded), body)

    def bounded(x: Expr) -> Expr:
        return _let(x + magic, lambda rounded: _let(x - (rounded - magic), lambda r: shifted(r, rounded)))

    def scaled(r: Expr, x: Expr) -> Expr:
        return _let(avx512.scaled(_polynomial(r, _near(coarse)), x), body)

    if avx512.has_vectors(x):
        return _let(x, lambda x: _let(avx512.part(x), lambda r: scaled(r, x)))
    return _let(tirx.max(_c(x, -127.0), x), bounded)


def _with_exponent(value: Expr, rounded: Expr) -> Expr:
    """``value`` · 2^n, n standing in the last bits of ``rounded``."""
    shifted = tirx.shift_left(tirx.reinterpret(_integer(value), rounded), _int(value, 23))
    return tirx.reinterpret(str(value.ty), tirx.reinterpret(_integer(value), value) + shifted)


def _gelu(x: Expr, *, coarse: bool) -> Expr:
    """x · Φ(x), Φ being the normal distribution, as x · (1 − s) above zero and x · s below, with s = Φ(−|x|)."""

    def product(x: Expr, share: Expr) -> Expr:
        return x * tirx.Select(x > _c(x, 0.0), _c(x, 1.0) - share, share)

    def whole(x: Expr) -> Expr:
        tail = _NORMAL_COARSE if coarse else _NORMAL
        return _let(_magnitude(x), lambda a: _power(_polynomial(a, tail), functools.partial(product, x), coarse=coarse))

    return _let(x, whole)


def _exponent(x: Expr, keep: Keep) -> tuple[Expr, Expr]:
    """``(n, r)`` with e^x = 2^n · e^r and |r| ≤ ln2/2, for |x| ≤ 88; n is left in the last bits of a float."""
    magic = _c(x, 12582912.0)
    rounded = keep(x * _c(x, 1.4426950408889634) + magic)
    return rounded, keep(_rest(x, keep(rounded - magic)))


def _within(x: Expr, bound: float) -> Expr:
    """``x`` cut off at ± ``bound``; NaN stays NaN in this order."""
    return tirx.max(_c(x, -bound), tirx.min(_c(x, bound), x))


def sigmoid_quotient(x: Expr, keep: Keep) -> tuple[Expr, Expr]:
    """1 and 1 + e^-x: the sigmoid as a quotient, within 3 units in the last place down to 1e-38.

    A third of the instructions of :func:`sigmoid`, and a product of several quotients needs but one division.

    Args:
        x: A float32 expression.
        keep: Stores a value for repeated use and gives the expression that reads it.
    """
    bounded = keep(_within(_c(x, 0.0) - x, 88.0))
    rounded, r = _exponent(bounded, keep)
    value = keep(_polynomial(r, _EXP) * (r * r) + r + _c(x, 1.0))
    return _c(x, 1.0), keep(_with_exponent(value, rounded) + _c(x, 1.0))


def tanh_quotient(x: Expr, keep: Keep) -> tuple[Expr, Expr]:
    """1 − e^-2x and 1 + e^-2x through e^-2x − 1: tanh as a quotient, within 4 units in the last place.

    Args:
        x: A float32 expression.
        keep: Stores a value for repeated use and gives the expression that reads it.
    """
    bounded = keep(_within(x * _c(x, -2.0), 18.5))
    rounded, r = _exponent(bounded, keep)
    bits = tirx.shift_left(tirx.reinterpret(_integer(x), rounded), _int(x, 23)) + _int(x, 127 << 23)
    power = keep(tirx.reinterpret(str(x.ty), bits))
    less_one = keep((_polynomial(r, _EXP) * (r * r) + r) * power + (power - _c(x, 1.0)))
    return _c(x, 0.0) - less_one, less_one + _c(x, 2.0)


def _rest(x: Expr, n: Expr) -> Expr:
    return (x - n * _c(x, _LN2_HIGH)) - n * _c(x, _LN2_LOW)


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e^-x), through e^-|x| so that neither side loses digits; the rounding of the sum is corrected."""

    def corrected(x: Expr, small: Expr, total: Expr, value: Expr) -> Expr:
        one = _c(x, 1.0)
        lost = small - (total - one)
        return value - value * lost * tirx.Select(x >= _c(x, 0.0), value, one - value)

    def divided(x: Expr, small: Expr, total: Expr) -> Expr:
        value = tirx.Select(x >= _c(x, 0.0), _c(x, 1.0), small) / total
        return _let(value, lambda value: corrected(x, small, total, value))

    def whole(x: Expr) -> Expr:
        small = exp(_c(x, 0.0) - _magnitude(x))
        value = _let(small, lambda e: _let(_c(x, 1.0) + e, lambda total: divided(x, e, total)))
        return _unless_nan(x, value)

    return _let(x, whole)


def _odd(x: Expr, coefficients: Sequence[float]) -> Expr:
    """x + x · p(x²)."""
    return _let(x * x, lambda square: x * _polynomial(square, coefficients) + x)


def _signed(x: Expr, magnitude: Expr) -> Expr:
    return _let(magnitude, lambda m: tirx.Select(x < _c(x, 0.0), _c(x, 0.0) - m, m))


def tanh(x: Expr) -> Expr:
    """Odd polynomial up to 0.625, 1 − 2 / (e^2|x| + 1) beyond."""

    def whole(x: Expr) -> Expr:
        large = _c(x, 1.0) - _c(x, 2.0) / (exp(_c(x, 2.0) * _magnitude(x)) + _c(x, 1.0))
        small = _odd(x, (0.0, *_TANH))
        return tirx.Select(_magnitude(x) <= _c(x, 0.625), small, _unless_nan(x, _signed(x, large)))

    return _let(x, whole)


def erf(x: Expr) -> Expr:
    """Odd polynomial up to 1, 1 − e^q(|x|) beyond."""

    def whole(x: Expr) -> Expr:
        bounded = tirx.min(_magnitude(x), _c(x, 4.0))
        large = _c(x, 1.0) - exp(_let(bounded, lambda m: _polynomial(m, _ERF_LARGE)))
        small = _odd(x, _ERF_SMALL)
        return tirx.Select(_magnitude(x) <= _c(x, 1.0), small, _unless_nan(x, _signed(x, large)))

    return _let(x, whole)


def log(x: Expr) -> Expr:
    """ln(2^e · m) = e·ln2 + ln(m) with m in [√½, √2)."""

    def series(e: Expr, f: Expr) -> Expr:
        def sum_up(square: Expr) -> Expr:
            tail = f * square * _polynomial(f, _LOG) + e * _c(f, _LN2_LOW) - square * _c(f, 0.5)
            return f + tail + e * _c(f, _LN2_HIGH)

        return _let(f * f, sum_up)

    def split(x: Expr, bits: Expr) -> Expr:
        def parts(exponent: Expr) -> Expr:
            mantissa = tirx.reinterpret(str(x.ty), bits - tirx.shift_left(exponent, _int(x, 23)))
            e = exponent.astype(str(x.ty)) - tirx.Select(_is_tiny(x), _c(x, 23.0), _c(x, 0.0))
            return _let(e, lambda e: _let(mantissa - _c(x, 1.0), lambda f: series(e, f)))

        return _let(tirx.shift_right(bits - _int(x, _SQRT_HALF_BITS), _int(x, 23)), parts)

    def whole(x: Expr) -> Expr:
        scaled = tirx.Select(_is_tiny(x), x * _c(x, 8388608.0), x)
        value = _let(tirx.reinterpret(_integer(x), scaled), lambda bits: split(x, bits))
        special = tirx.Select(x.equal(_c(x, 0.0)), _c(x, float("-inf")), _c(x, float("nan")))
        value = tirx.Select(x > _c(x, 0.0), value, special)
        return _unless_nan(x, tirx.Select(x.equal(_c(x, float("inf"))), x, value))

    return _let(x, whole)


def _is_tiny(x: Expr) -> Expr:
    """Whether ``x`` is subnormal (or negative, which is dealt with elsewhere)."""
    return x < _c(x, 1.1754943508222875e-38)


_FLOAT32: dict[str, Callable[[Expr], Expr]] = {"exp": exp, "sigmoid": sigmoid, "tanh": tanh, "erf": erf, "log": log}

_GELU: dict[str, Callable[[Expr], Expr]] = {
    "tirx.mmopt_gelu": functools.partial(_gelu, coarse=False),
    "tirx.mmopt_gelu_coarse": functools.partial(_gelu, coarse=True),
}
"""Functions that TVM has no name for."""


def gelu(x: Expr, coarse: bool = False) -> Expr:
    """Gelu by one exponential: half the instructions of the formula with erf. For targets of LLVM only.

    Within 4 units in the last place above zero; 14 down to −3, and a relative error of 3e-4 down to −5.5, where
    ½ + ½ erf loses its digits. Zero at −10³⁰, NaN at −∞.

    Args:
        x: A float32 expression.
        coarse: Whether a relative error of 3e-4 down to −4 will do: a twelfth of what rounding to bfloat16 costs.
    """
    register()
    return Call(Op.get("tirx.mmopt_gelu_coarse" if coarse else "tirx.mmopt_gelu"), [x], ret_ty=x.ty)


def _lower(name: str, call: Call) -> Expr:
    x = call.args[0]
    if str(x.ty).startswith("float32"):
        return _FLOAT32[name](x)
    return _by_library(name, x)


def _by_library(name: str, x: Expr) -> Expr:
    dtype = str(x.ty)
    if name == "sigmoid":
        one = tirx.const(1.0, dtype)
        return one / (one + _by_library("exp", tirx.const(0.0, dtype) - x))
    if name == "erf":
        return tirx.call_pure_extern(dtype, "erf" if dtype == "float64" else "erff", x)
    return tirx.call_llvm_pure_intrin(dtype, f"llvm.{name}", x)


@functools.lru_cache(maxsize=1)
def register() -> None:
    """Make TVM's LLVM backend use the functions of this file, and know those of AVX-512. Idempotent."""
    avx512.register()
    for name in _FLOAT32:
        tirx.op.register_intrin_lowering(f"tirx.{name}", target="llvm", f=functools.partial(_lower, name), level=99)
    for name, function in _GELU.items():
        add_operation(name, lambda call, made=function: made(call.args[0]))  # type: ignore[misc]
