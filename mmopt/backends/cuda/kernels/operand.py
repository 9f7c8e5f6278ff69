"""How a matrix lies in memory: what a template reads it by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tvm import sym, tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map, Source, Tensor
from mmopt.backends.cpu.loops import i64, static
from mmopt.backends.cpu.plan import trace
from mmopt.backends.expressions import itemsize, simplify, strides

CHUNK = 16
"""Bytes that are copied at a time."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor whose elements lie at ``start + Σ index · stride`` of a source.

    Attributes:
        source: What is in memory.
        start: Offset of the first element.
        strides: Elements from one index to the next, for each axis.
    """

    source: Source
    start: Expr
    strides: tuple[Expr, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Operand | None:
        """How ``tensor`` can be read, when it is in memory or a view of what is there; else None."""
        if isinstance(tensor, Source):
            steps: list[Expr] = [i64(1)]
            for extent in reversed(tensor.shape[1:]):
                steps.append(simplify(steps[-1] * extent))
            return cls(tensor, i64(0), tuple(reversed(steps[: max(tensor.ndim, 1)])))
        if not isinstance(tensor, Map):
            return None
        inside = trace(tensor, stops=set())
        if len(inside.reads) != 1 or inside.values[0] is not inside.reads[0].leaf:
            return None
        read = inside.reads[0]
        found = strides(read.offset, inside.axes)
        if not isinstance(read.tensor, Source) or any(step is None for step in found):
            return None
        start = sym.detect_linear_equation(read.offset, list(inside.axes))[-1] if inside.axes else read.offset
        return cls(read.tensor, simplify(start), tuple(step for step in found if step is not None))

    def offset(self, indices: Sequence[Expr]) -> Expr:
        """Offset of an element; missing last indices are zero."""
        total = self.start
        for at, step in zip(indices, self.strides, strict=False):
            total = total + at * step
        return simplify(total)

    def aligned(self, axes: int, extent: Expr) -> bool:
        """Whether rows can be copied in chunks: the last axis is contiguous and everything begins at whole chunks.

        Args:
            axes: How many axes come before the last one.
            extent: Elements of the last axis.
        """
        size = itemsize(self.source.dtype)
        if static(self.strides[axes]) != 1:
            return False
        begins = (self.start, extent, *self.strides[:axes])
        return all(static(simplify(tirx.floormod(value * size, i64(CHUNK)))) == 0 for value in begins)
