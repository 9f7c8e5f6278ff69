"""Matrix products of float32 activations and weights of eight or four bits.

    C[r, j] = Σ_k A[r, k] · (q[k, j] − zero[g, j]) · scale[g, j]        k in group g of the depth

Few rows only stream the weights through: the fewer bytes, the faster. Weights are packed at compile time, two of four
bits in a byte, and become floats in registers; more rows share the conversion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import Sink, Tensor
from mmopt.backends.cpu.choosing import Candidate, Workload
from mmopt.backends.cpu.dot import Dot, address
from mmopt.backends.cpu.kernels.matmul_dot import Blocking, DotMatmul, Emitter
from mmopt.backends.cpu.kernels.weight_code import NIBBLES, WeightKernel
from mmopt.backends.cpu.loops import i64
from mmopt.backends.profile import Profile

STREAM = 6
"""Bytes of weights a core reads in a cycle."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """How quantized weights are stored.

    Attributes:
        bits: 8 or 4.
        group: Depth that shares scales.
        groups: Number of groups; their depth together is the padded K.
        scaled: Whether scales and zero points are applied to weights one by one; otherwise the caller scales results.
        zero: What to subtract from all four-bit weights that are not scaled.
    """

    bits: int
    group: int
    groups: int
    scaled: bool
    zero: int = 0

    @property
    def depth(self) -> int:
        return self.group * self.groups

    def kernel(self, rows: int, vectors: int, lanes: int) -> WeightKernel:
        """The micro-kernel of a block."""
        return WeightKernel(rows, vectors, lanes, self.bits, self.group, self.scaled, self.zero)


def pack_weights(q: np.ndarray, weights: Weights, columns: int) -> np.ndarray:
    """Rearrange integers into panels.

    Args:
        q: ``[K, N]``: int8, or for four bits uint8 from 0 to 15.
        weights: How they are stored.
        columns: Columns of a panel.

    Returns:
        ``[panels, depth, columns, 1]`` int8, or ``[panels, depth / 8, columns, 1]`` int32.
    """
    panels = -(-q.shape[1] // columns)
    padded = np.zeros((weights.depth, panels * columns), q.dtype)
    padded[: q.shape[0], : q.shape[1]] = q
    if weights.bits == 4:
        split = padded.reshape(-1, NIBBLES, padded.shape[1]).astype(np.uint32)
        places = (4 * np.arange(NIBBLES, dtype=np.uint32))[:, None]
        padded = np.bitwise_or.reduce(split << places, axis=1).view(np.int32)
    return np.ascontiguousarray(padded.reshape(-1, panels, columns).transpose(1, 0, 2)[..., None])


def pack_factors(factors: np.ndarray, columns: int) -> np.ndarray:
    """``[groups, N]`` floats as ``[panels, groups, columns]``."""
    groups, width = factors.shape
    panels = -(-width // columns)
    padded = np.zeros((groups, panels * columns), np.float32)
    padded[:, :width] = factors
    return np.ascontiguousarray(padded.reshape(groups, panels, columns).transpose(1, 0, 2))


def candidates(profile: Profile, weights: Weights, rows: int, columns: int) -> list[Candidate]:
    """Blocks that fit the registers, with the cycles they should take on one core.

    Args:
        profile: Registers and caches.
        weights: How weights are stored.
        rows: M, or a typical one.
        columns: N.
    """
    found = []
    lanes = profile.vector_bytes // 4
    for vectors in (4, 2, 1) if profile.registers >= 32 else (2, 1):
        if vectors > 1 and (vectors - 1) * lanes >= columns:
            continue
        held = vectors * (3 if weights.scaled else 1) + 3
        most = (profile.registers - held) // vectors
        if most < 1:
            continue
        tiles = -(-rows // min(most, 12))
        height = -(-rows // tiles)
        chunk = max(1, profile.l2_bytes // 2 // (4 * weights.depth) // height) * height
        cycles = _cycles(weights, (rows, columns), (height, vectors), lanes)
        found.append(Candidate(Blocking(height, vectors, min(chunk, tiles * height), 0).parameters(), cycles))
    return found


def _cycles(weights: Weights, sizes: tuple[int, int], block: tuple[int, int], lanes: int) -> float:
    """The larger of reading weights and multiplying, with the conversion of weights in each tile of rows."""
    (rows, columns), (height, vectors) = sizes, block
    convert = (2.0 if weights.bits == 4 else 2.5) + (1.0 if weights.scaled else 0.0)
    one = max((height + convert) / 2, 4 / vectors, (height + vectors) / vectors / 2)
    tiles, across = -(-rows // height), -(-columns // (vectors * lanes)) * vectors
    work = tiles * across * weights.depth * one
    return max(work, columns * weights.depth * weights.bits / 8 / STREAM) + tiles * across * height * 3


class WeightOnlyMatmul(DotMatmul):
    """A product with packed integers.

    Args:
        a: float32 ``[M, depth]``.
        b: Panels as :func:`pack_weights` makes them.
        scales: As :func:`pack_factors` makes them, when scaled.
        shifts: As ``scales``: ``−zero · scale``.
        weights: How the weights are stored.
        columns: N.
        blocking: How it is cut.
        shape: Extents of the result without the last.
        lanes: Columns in a vector.
    """

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        scales: Tensor | None,
        shifts: Tensor | None,
        *,
        weights: Weights,
        columns: int,
        blocking: Blocking,
        shape: Sequence[Expr],
        lanes: int,
        workload: Workload | None = None,
    ) -> None:
        dot = Dot("weights", "float32", b.dtype, "float32", 1, lanes, 1, (1,), 2 * lanes)
        super().__init__(
            a, b, dot=dot, columns=columns, blocking=blocking, shape=shape, name="matmul_weight_only", workload=workload
        )
        self.weights, self.scales, self.shifts = weights, scales, shifts
        self.inputs = tuple(t for t in (a, b, scales, shifts) if t is not None)

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return {"bits": self.weights.bits, "group": self.weights.group, **self.blocking.parameters()}

    def emit(self, kernel: object, sinks: Sequence[Sink]) -> Stmt:
        """One parallel loop over chunks of rows × blocks of panels."""
        return _WeightEmitter(self, sinks[0]).emit()


class _WeightEmitter(Emitter):
    nest: WeightOnlyMatmul

    def multiply(self, start: Expr, number: Expr, panel: Expr, height: int) -> Stmt:
        """Code of one tile."""
        nest, zero = self.nest, i64(0)
        kernel = nest.weights.kernel(height, self.cut.vectors, self.dot.lanes)
        self.kernels.append(kernel)
        here = address(nest.b[panel, zero, zero, zero])
        scales, shifts = (here if t is None else address(t[panel, zero, zero]) for t in (nest.scales, nest.shifts))
        c = address(self.sums[zero])
        groups = nest.weights.groups
        return kernel.call(c, self.width * 4, start, nest.depth * 4, here, groups, scales, shifts)
