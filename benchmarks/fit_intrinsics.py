"""Recomputes the polynomial coefficients of ``mmopt/backends/cpu/intrinsics.py`` and ``mmopt/lowering/ops/coarse.py``.

Each fit minimizes the relative error of the whole function by weighted least squares on Chebyshev nodes, with
iteratively re-weighted nodes (Lawson's algorithm), which converges to the minimax polynomial.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

Function = Callable[[np.ndarray], np.ndarray]


def fit(target: Function, low: float, high: float, degree: int, weight: Function, rounds: int = 200) -> np.ndarray:
    """Coefficients, constant term first, of the polynomial nearest to ``target`` in the weighted maximum norm."""
    nodes = np.cos(np.pi * (np.arange(4000) + 0.5) / 4000)
    x = (low + high) / 2 + nodes * (high - low) / 2
    scale = max(abs(low), abs(high))
    basis = np.vander(x / scale, degree + 1, increasing=True)
    y, w = target(x), np.abs(weight(x))
    lawson = np.ones_like(x) / len(x)
    best, best_error = np.zeros(degree + 1), np.inf
    for _ in range(rounds):
        root = np.sqrt(lawson) * w
        solution = np.linalg.lstsq(basis * root[:, None], y * root, rcond=None)[0]
        error = np.abs((basis @ solution - y) * w)
        if error.max() < best_error:
            best, best_error = solution, error.max()
        lawson = lawson * error
        lawson /= lawson.sum()
    return best / scale ** np.arange(degree + 1)


def erf_series(x: np.ndarray) -> np.ndarray:
    """erf from its library implementation in float64."""
    from scipy.special import erf

    return erf(x)


def tail_weight(floor: float, a: np.ndarray) -> np.ndarray:
    """How much an error of log Φ(−a) matters to a·Φ(−a), relative to that or to ``floor`` · min(a, 1)."""
    from scipy.special import ndtr

    tail = a * ndtr(-a)
    return tail / np.maximum(tail, floor * np.minimum(a, 1)) + 1e-6


def coarse_gelu(degree: int, bound: float, reach: float = 20.0) -> tuple[float, np.ndarray]:
    """The odd polynomial t·p(t²), t being x cut off at ± ``bound``, for which x·(½ + t·p) is nearest to Gelu.

    Returns:
        Its largest error over ``|x| <= reach`` in float32 arithmetic, and the coefficients of p, constant term first.
    """
    from scipy.optimize import linprog

    inner = bound * np.sin(np.linspace(0, np.pi / 2, 600))[1:]
    x = np.concatenate([inner, np.linspace(bound, reach, 60)])
    t = np.minimum(x, bound)
    basis = np.stack([t ** (2 * k + 1) for k in range(degree + 1)], 1) * x[:, None]
    scale, target = np.abs(basis).max(0), x * erf_series(x / np.sqrt(2)) / 2
    basis, ones = basis / scale, np.ones((len(x), 1))
    bounds = [(None, None)] * (degree + 1) + [(0, None)]
    found = linprog(
        np.eye(degree + 2)[-1],
        A_ub=np.block([[basis, -ones], [-basis, -ones]]),
        b_ub=np.concatenate([target, -target]),
        bounds=bounds,
    )
    coefficients = (found.x[:-1] / scale).astype(np.float32)
    grid = np.linspace(-reach, reach, 400_001).astype(np.float32)
    low = np.maximum(grid, np.float32(-bound))
    cut = np.minimum(low, np.float32(bound))
    value = np.polynomial.polynomial.polyval(cut * cut, coefficients).astype(np.float32)
    exact = grid * (1 + erf_series(grid.astype(np.float64) / np.sqrt(2))) / 2
    return float(np.abs(low * (cut * value + np.float32(0.5)) - exact).max()), coefficients


def fit_gelu(show: Callable[[str, np.ndarray], None]) -> None:
    """Print the tables for Gelu: of the normal distribution's tail, and for what is quantized."""
    from scipy.special import log_ndtr

    # log2 Φ(-a) on 0 <= a <= 8: relative error of a·Φ(-a), as far as it is not below a thousandth, or a millionth
    def tail(a: np.ndarray) -> np.ndarray:
        return log_ndtr(-a) / np.log(2)

    for name, degree, floor in (("NORMAL", 10, 1e-3), ("NORMAL_COARSE", 5, 1e-6)):
        show(name, fit(tail, 0.0, 8.0, degree, functools.partial(tail_weight, floor), rounds=100))

    # Φ(x) - ½ for Gelu before quantizing, coarse to fine
    for degree in range(4, 9):
        error, bound = min((coarse_gelu(degree, b / 10)[0], b / 10) for b in range(30, 48))
        print("GELU", error, bound, tuple(float(c) for c in coarse_gelu(degree, bound)[1]))


def main() -> None:
    """Print all coefficient tables."""
    from scipy.special import erfcx

    ln2 = np.log(2)

    def show(name: str, coefficients: np.ndarray) -> None:
        print(name, "=", tuple(float(np.float32(c)) for c in coefficients))

    # exp(r) = 1 + r + r² p(r) on |r| <= ln2/2
    def exp_tail(r: np.ndarray) -> np.ndarray:
        safe = np.where(np.abs(r) < 1e-3, 1.0, r)
        series = 0.5 + r / 6 + r**2 / 24 + r**3 / 120
        return np.where(np.abs(r) < 1e-3, series, (np.expm1(safe) - safe) / safe**2)

    show("EXP", fit(exp_tail, -ln2 / 2 * 1.001, ln2 / 2 * 1.001, 5, lambda r: r**2 + 1e-9))

    # 2^r = 1 + r p(r) on |r| <= ½, before rounding to bfloat16
    def exp2_tail(r: np.ndarray) -> np.ndarray:
        safe = np.where(np.abs(r) < 1e-4, 1.0, r)
        return np.where(np.abs(r) < 1e-4, ln2 + r * ln2**2 / 2, (2.0**safe - 1) / safe)

    show("EXP2_COARSE", fit(exp2_tail, -0.5, 0.5, 2, lambda r: np.abs(r) * 2.0**-r + 1e-9))

    # 2^r on 0 <= r < 1, fine and before rounding to bfloat16
    for name, degree in (("EXP2_FRACTION", 6), ("EXP2_FRACTION_COARSE", 3)):
        show(name, fit(lambda r: 2.0**r, 0.0, 1.0, degree, lambda r: 2.0**-r, rounds=400))

    # tanh(x) = x + x³ p(x²) on |x| <= 0.625
    def tanh_tail(s: np.ndarray) -> np.ndarray:
        x = np.sqrt(s)
        safe = np.where(x < 1e-2, 1.0, x)
        series = -1 / 3 + 2 * s / 15 - 17 * s**2 / 315
        return np.where(x < 1e-2, series, (np.tanh(safe) - safe) / safe**3)

    show("TANH", fit(tanh_tail, 0.0, 0.625**2, 5, lambda s: s + 1e-9))

    # erf(x) = x + x p(x²) on |x| <= 1
    def erf_tail(s: np.ndarray) -> np.ndarray:
        x = np.sqrt(np.maximum(s, 1e-30))
        return erf_series(x) / x - 1

    show("ERF_SMALL", fit(erf_tail, 0.0, 1.0, 7, lambda s: np.ones_like(s)))

    # erf(x) = 1 - exp(q(x)) on 1 <= x <= 4: q(x) = log(erfc(x))
    def log_erfc(x: np.ndarray) -> np.ndarray:
        return np.log(erfcx(x)) - x**2

    show("ERF_LARGE", fit(log_erfc, 0.99, 4.0, 8, lambda x: np.exp(log_erfc(x)) / erf_series(x)))

    # log(1+f) = f - f²/2 + f³ p(f) on sqrt(1/2)-1 <= f <= sqrt(2)-1
    def log_tail(f: np.ndarray) -> np.ndarray:
        safe = np.where(np.abs(f) < 1e-3, 1.0, f)
        series = 1 / 3 - f / 4 + f**2 / 5 - f**3 / 6
        return np.where(np.abs(f) < 1e-3, series, (np.log1p(safe) - safe + safe**2 / 2) / safe**3)

    def log_weight(f: np.ndarray) -> np.ndarray:
        return f**3 / np.log1p(np.where(f == 0, 1e-9, f))

    show("LOG", fit(log_tail, np.sqrt(0.5) - 1, np.sqrt(2) - 1, 8, log_weight))

    fit_gelu(show)


if __name__ == "__main__":
    main()
