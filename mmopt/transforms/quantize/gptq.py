"""Rounding weights one row of the depth after the other, each making up for what those before it lost.

    min ‖X W − X Q‖²        H = XᵀX

Row k is rounded, and its error e, over the k-th diagonal of the upper Cholesky factor U of H⁻¹, is taken out of the
rows below: W[j] −= U[k, j] · e / U[k, k] (GPTQ: Frantar et al., 2023). Rows come in the order of their weight in H.
"""

from __future__ import annotations

import numpy as np

from mmopt.transforms.quantize.encoding import Array, Encoding

DAMPING = 0.01
"""Part of the mean diagonal added to H, which few samples leave singular."""

_PANEL = 128
"""Rows whose corrections of the rest are put off and done as one product."""


def gptq(weight: Array, gram: Array, encoding: Encoding) -> Array:
    """Integers of ``weight``, ``[depth, columns]``, chosen for the outputs rather than for the weights.

    Args:
        weight: The weights.
        gram: ``XᵀX`` of what the layer reads, ``[depth, depth]``.
        encoding: Scales and zero points: one for each column, or for each block of the depth and column.

    Returns:
        int32 ``[depth, columns]``.
    """
    depth = len(weight)
    factor, order = _factor(gram)
    rest = weight.astype(np.float64)[order]
    scale, zero = (np.broadcast_to(part, weight.shape)[order] for part in encoding.spread(weight.shape))
    low, high = encoding.bounds
    integers = np.zeros(weight.shape, np.int32)
    for start in range(0, depth, _PANEL):
        stop = min(start + _PANEL, depth)
        errors = np.zeros((stop - start, weight.shape[1]))
        for k in range(start, stop):
            chosen = np.clip(np.rint(rest[k] / scale[k]) + zero[k], low, high)
            integers[order[k]] = chosen
            error = (rest[k] - (chosen - zero[k]) * scale[k]) / factor[k, k]
            rest[k + 1 : stop] -= factor[k, k + 1 : stop, None] * error
            errors[k - start] = error
        rest[stop:] -= factor[start:stop, stop:].T @ errors
    return integers


def _factor(gram: Array) -> tuple[Array, Array]:
    """Upper Cholesky factor of the damped inverse, and the order of its rows: the heaviest first."""
    diagonal = np.diag(gram).copy()
    order = np.argsort(-diagonal, kind="stable")
    damped = gram[np.ix_(order, order)].astype(np.float64)
    damped[np.diag_indices_from(damped)] += DAMPING * max(float(diagonal.mean()), np.finfo(np.float64).tiny)
    inverse = np.linalg.inv(damped)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T, order


def output_error(weight: Array, rounded: Array, gram: Array) -> float:
    """``‖X (W − Q)‖²`` from the Gram matrix alone."""
    difference = weight.astype(np.float64) - rounded
    return float(np.einsum("kn,kn->", difference, gram @ difference))
