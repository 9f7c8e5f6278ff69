"""The text of micro-kernels of NEON's matrix instructions: ``smmla``, ``usmmla`` and ``bfmmla``.

One instruction adds to a block of 2 × 2 sums the product of two rows of A and two columns of B, each of eight bytes in
depth. A register of A is made of the same eight bytes of two rows, one of B lies in memory as it is needed. Sums are
brought into rows when they are loaded and stored; where the number of rows is odd, the last is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmopt.backends.arm.dot import LANES
from mmopt.backends.cpu.dot_code import Vectors
from mmopt.backends.expressions import itemsize

_BLOCKS = LANES // 2
"""Blocks of sums that make up a vector of columns of two rows."""

_FRONT, _BACK = "i32 0, i32 1, i32 4, i32 5", "i32 2, i32 3, i32 6, i32 7"

_WORDS = "<2 x i64>"


class NeonMatrices(Vectors):
    """Sums in blocks of two rows by two columns."""

    rolled = True

    @property
    def _pairs(self) -> list[tuple[int, int]]:
        """Rows that share registers."""
        last = self.kernel.rows - 1
        return [(row, min(row + 1, last)) for row in range(0, self.kernel.rows, 2)]

    def start(self) -> list[tuple[str, str]]:
        if not self.kernel.accumulate:
            return [(self.sum_type, "zeroinitializer")] * (len(self._pairs) * self.kernel.vectors * _BLOCKS)
        vectors, rows = self.kernel.vectors, [value for _, value in super().start()]
        found = []
        for upper, lower in self._pairs:
            for v in range(vectors):
                found += self._exchanged(rows[upper * vectors + v], rows[lower * vectors + v])
        return [(self.sum_type, value) for value in found]

    def finish(self, sums: Sequence[str]) -> None:
        vectors = self.kernel.vectors
        rows = [""] * (self.kernel.rows * vectors)
        for p, (upper, lower) in enumerate(self._pairs):
            for v in range(vectors):
                first = (p * vectors + v) * _BLOCKS
                above, below = self._exchanged(sums[first], sums[first + 1])
                rows[lower * vectors + v] = below
                rows[upper * vectors + v] = above
        super().finish(rows)

    def _exchanged(self, one: str, other: str) -> list[str]:
        """From two rows to two blocks, or from two blocks to two rows."""
        kind = self.sum_type
        return [
            self.w.let(f"shufflevector {kind} {one}, {kind} {other}, <{LANES} x i32> <{half}>")
            for half in (_FRONT, _BACK)
        ]

    def step(self, a: str, b: str, sums: Sequence[str]) -> list[str]:
        width = self.lanes * self.dot.group * itemsize(self.dot.b)
        words = self.dot.step // self.dot.group
        pairs = self._loaded(a, words)
        after = list(sums)
        for word in range(words):
            for block in range(self.kernel.vectors * _BLOCKS):
                place = self.w.at(b, word * self.kernel.vectors * width + block * 16)
                column = self.w.let(f"load {self._operand}, ptr {place}, align 1")
                for p, pair in enumerate(pairs):
                    at = p * self.kernel.vectors * _BLOCKS + block
                    after[at] = self._product(after[at], pair[word], column)
        return after

    def _loaded(self, a: str, words: int) -> list[list[str]]:
        """Of each pair of rows, a register for each word of eight bytes."""
        places = self._rows(a, "%as")
        return [self._paired(places[upper], places[lower], words) for upper, lower in self._pairs]

    def _paired(self, upper: str, lower: str, words: int) -> list[str]:
        if words == 1:
            first, second = (self.w.let(f"load i64, ptr {place}, align 1") for place in (upper, lower))
            half = self.w.let(f"insertelement {_WORDS} poison, i64 {first}, i64 0")
            made = [self.w.let(f"insertelement {_WORDS} {half}, i64 {second}, i64 1")]
        else:
            rows = [self.w.let(f"load {_WORDS}, ptr {place}, align 1") for place in (upper, lower)]
            shuffle = f"shufflevector {_WORDS} {rows[0]}, {_WORDS} {rows[1]}, <2 x i32>"
            made = [self.w.let(f"{shuffle} <i32 {word}, i32 {word + 2}>") for word in range(words)]
        return [self.w.let(f"bitcast {_WORDS} {value} to {self._operand}") for value in made]

    @property
    def _operand(self) -> str:
        return "<8 x bfloat>" if self.dot.name == "bfmmla" else "<16 x i8>"

    def _product(self, total: str, a: str, b: str) -> str:
        result, operand = self.sum_type, self._operand
        function = f"llvm.aarch64.neon.{self.dot.name}" + ("" if operand == "<8 x bfloat>" else ".v4i32.v16i8")
        self.w.declare(f"{result} @{function}({result}, {operand}, {operand})")
        return self.w.let(f"call {result} @{function}({result} {total}, {operand} {a}, {operand} {b})")
