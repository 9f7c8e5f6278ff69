"""What all convolution templates share: geometry, packed filters, when threads pay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopResult
from mmopt.backends.cpu.kernels.tile import fetch
from mmopt.backends.cpu.loops import i64, product, static
from mmopt.backends.cpu.plan import trace
from mmopt.backends.expressions import same, simplify

PARALLEL_WORK = 1 << 18
"""Multiply-adds from which forking threads pays."""


@dataclasses.dataclass(frozen=True)
class Window:
    """Geometry of a convolution: one entry for each spatial axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]

    def output(self, padded: Sequence[Expr]) -> tuple[Expr, ...]:
        """Extents of the result for a padded input."""
        return tuple(
            simplify(tirx.floordiv(extent - (d * (k - 1) + 1), i64(s)) + 1)
            for extent, k, s, d in zip(padded, self.kernel, self.strides, self.dilations, strict=True)
        )

    def position(self, output: Sequence[Expr], tap: Sequence[Expr]) -> tuple[Expr, ...]:
        """Input coordinates that output coordinates see through a tap of the kernel."""
        return tuple(o * s + t * d for o, t, s, d in zip(output, tap, self.strides, self.dilations, strict=True))


LEAST_BLOCK = 4
"""Channels side by side worth a layout of their own."""


def channel_block(channels: int, lanes: int) -> int:
    """Channels side by side in memory: as many as a vector has, or a half or quarter where they are no multiple of it;
    1 where even those do not divide them."""
    blocks = (lanes, *(part for part in (lanes // 2, lanes // 4) if part >= LEAST_BLOCK))
    return next((block for block in blocks if channels % block == 0), 1)


def pack_filters(weight: np.ndarray, groups: int, block: int, columns: int) -> np.ndarray:
    """Rearrange ``[O, C/g, *kernel]`` into ``[panels, C/g/block, *kernel, block, columns]``, zero-padded columns.

    Panels do not cross groups.
    """
    out, depth, *kernel = weight.shape
    each = out // groups
    panels = -(-each // columns)
    padded = np.zeros((groups, panels * columns, depth, *kernel), weight.dtype)
    padded[:, :each] = weight.reshape(groups, each, depth, *kernel)
    split = padded.reshape(groups * panels, columns, depth // block, block, *kernel)
    space = range(4, 4 + len(kernel))
    return split.transpose(0, 2, *space, 3, 1)


def kind_for(results: Sequence[Expr], depth: Sequence[Expr]) -> str:
    """``serial`` for work known to be too little for a fork of threads to pay."""
    work = static(simplify(product([*results, *depth])))
    return "serial" if work is not None and work < PARALLEL_WORK else "parallel"


SHORT_EPILOGUE = 8
"""Operations on each result up to which they are written out for every vector of a tile."""


def long_epilogue(kernel: Any, result: LoopResult) -> bool:
    """Whether what follows ``result`` in the same kernel is so long that tiles should pass through memory."""
    return sum(trace(m, kernel.plan.stored).cost for m in kernel.plan.epilogues.get(result, [])) > SHORT_EPILOGUE


def read_with(kernel: Any, result: LoopResult) -> list[Callable[..., Expr]]:
    """How to read what lies at the place of ``result`` in each tensor of its shape and size that is read while its
    elements are consumed. What is stored needs no fetching: stores wait in a buffer of their own, not the core."""
    maps = kernel.plan.epilogues.get(result, [])
    reads = [r.tensor for m in maps for r in trace(m, kernel.plan.stored).reads if r.tensor is not result]
    alike = [
        t
        for t in dict.fromkeys(reads)
        if t.dtype == result.dtype and t in kernel.places and len(t.shape) == len(result.shape)
    ]
    return [kernel.places[t].load for t in alike if all(map(same, t.shape, result.shape))]


def spread(lines: int, rounds: Expr, number: Expr, element: Callable[[Expr], Expr]) -> list[Stmt]:
    """Fetches of ``lines`` cache lines, divided among ``rounds`` of a loop: those of round ``number``."""
    known = static(rounds)
    each = 1 if known is None else -(-lines // known)
    return [fetch(element(tirx.min(number * each + n, i64(lines - 1)))) for n in range(each)]
