"""The recurrent step's product in integers: bytes of the state by bytes of R, sums of 32 bits, gates in float32.

    h·R ≈ Σ_k round(h_k / step) · R'_k · (step · scale)        R = R' · scale, one scale for each column

A step reads all of R, whatever the batch, so at one row its time is R's bytes over the bandwidth of the cache that
holds it: bytes take a quarter of what floats take. With more rows the rate of the instruction counts, and AMX tiles are
ahead from a handful of rows on. The state is rounded where it is computed, once, and kept as floats for the gates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import Tensor
from mmopt.backends.cpu.amx_code import TILE_ROWS
from mmopt.backends.cpu.choosing import Candidate, typical
from mmopt.backends.cpu.dot import Dot, MicroKernel, address, dot_for
from mmopt.backends.cpu.loops import i64
from mmopt.backends.expressions import itemsize
from mmopt.backends.profile import Profile

STREAM = 32.0
"""Bytes a cycle from the second-level cache."""

CHAIN = 5.0
"""Cycles from one dot product to the next that adds to its sum."""

TILE_START = 70.0
"""Cycles that clearing and storing a tile of sums takes."""


@dataclasses.dataclass(frozen=True)
class Rescaling:
    """How sums of a product become floats: ``(sum − excess) · scale``.

    Attributes:
        scales: float32 ``[directions, panels, gates, B]``: step of the state times that of the weights.
        excess: int32, alike: what the shift of the state adds to each sum; None where there is none.
    """

    scales: Tensor
    excess: Tensor | None

    def value(self, total: Expr, at: tuple[Expr, ...]) -> Expr:
        """A sum as a float; ``at`` is its place in ``scales``."""
        centred = total if self.excess is None else total - self.excess[at]
        return centred.astype("float32") * self.scales[at]


@dataclasses.dataclass(frozen=True)
class IntegerProduct:
    """What a recurrence needs besides R to multiply in integers.

    Attributes:
        dot: The instruction.
        hidden: Hidden units.
        quantize: The integer of an element of the state, as ``dot`` wants its left operand.
        first: Of the first product.
        late: Of the second one, where there is one.
    """

    dot: Dot
    hidden: int
    quantize: Callable[[Expr], Expr]
    first: Rescaling
    late: Rescaling | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """What kernels read besides R."""
        both = [rescaling for rescaling in (self.first, self.late) if rescaling is not None]
        return [tensor for one in both for tensor in (one.scales, one.excess) if tensor is not None]

    def states(self, rows: Sequence[int], units: int) -> tirx.Buffer:
        """Memory for integers of the state, of which ``units`` are written, in whole steps of the depth."""
        depth = max(self.dot.depth(self.hidden), units)
        return tirx.decl_buffer((*map(i64, rows), i64(depth)), self.dot.a, "integers")

    def call(self, kernel: MicroKernel, sums: Expr, row: int, state: Expr, depth: int, weights: Expr) -> Stmt:
        """The statement that multiplies a block.

        Args:
            kernel: The micro-kernel.
            sums: First sum of the block.
            row: Elements from one row of sums to the next.
            state: First integer of the block's rows.
            depth: Integers from one row of the state to the next.
            weights: First integer of the group of gates.
        """
        c_stride, a_stride = row * itemsize(self.dot.total), depth * itemsize(self.dot.a)
        steps = self.dot.depth(self.hidden) // self.dot.step
        return kernel.call(address(sums), c_stride, address(state), a_stride, address(weights), steps)


def instructions(profile: Profile) -> list[Dot]:
    """Ways to multiply signed bytes: AMX tiles, where there are some, and vectors."""
    best = dot_for(profile, "int8", "int8")
    if best is None or not best.tiled:
        return [] if best is None else [best]
    plain = tuple(feature for feature in profile.features if not feature.startswith("amx"))
    vectors = dot_for(dataclasses.replace(profile, features=plain), "int8", "int8")
    return [best] if vectors is None else [best, vectors]


def candidates(profile: Profile, gates: int, hidden: int, batch: int | str, block: int) -> list[Candidate]:
    """Instructions and register tiles for the product of a step in integers.

    Args:
        profile: Vector width, registers and caches.
        gates: Gates of the first product.
        hidden: Hidden units.
        batch: Rows, when known.
        block: Most rows that go through a step together.
    """
    rows = min(typical(batch, block), block)
    made = []
    for dot in instructions(profile):
        for vectors in (v for v in range(min(gates, dot.vectors), 0, -1) if gates % v == 0):
            height = block if dot.tiled else dot.most_rows[vectors - 1]
            if not dot.tiled and not isinstance(batch, str):
                height = -(-rows // -(-rows // height))
            groups = gates // vectors * -(-hidden // dot.lanes)
            cycles = groups * _cycles(profile, dot, height, vectors, hidden, rows)
            made.append(Candidate({"instruction": dot.name, "rows": height, "vectors": vectors}, cycles))
    return made


def _cycles(profile: Profile, dot: Dot, height: int, vectors: int, hidden: int, rows: int) -> float:
    """Cycles of one group of gates of one panel; R comes from the second-level cache."""
    steps = dot.depth(hidden) // dot.step
    stream = vectors * dot.lanes * dot.step * itemsize(dot.b) / STREAM
    if dot.tiled:
        blocks = -(-rows // TILE_ROWS)
        return steps * max(float(TILE_ROWS * blocks * vectors), stream) + TILE_START * blocks * vectors
    heights = [height] * (rows // height) + ([rows % height] if rows % height else [])
    busy = [max(h * vectors * dot.lanes * dot.step / dot.rate, (h + vectors) / 2, CHAIN) for h in heights]
    return steps * sum(max(one, 0.0 if n else stream) for n, one in enumerate(busy))
