"""The text of NEON micro-kernels; see :mod:`mmopt.backends.cpu.dot_code`."""

from __future__ import annotations

from collections.abc import Sequence

from mmopt.backends.arm.dot import LANES
from mmopt.backends.cpu.dot_code import Vectors
from mmopt.backends.expressions import itemsize

_GROUPS = {"fma": "float", "smlal": "i16"}
"""What one lane takes of the left operand; 32 bits as an integer where nothing is said."""

_BYTES = "<16 x i8>"


class NeonVectors(Vectors):
    """Sums in vector registers; of each row of A, a vector is loaded, and one group of it multiplied by every lane."""

    rolled = True

    def step(self, a: str, b: str, sums: Sequence[str]) -> list[str]:
        dot, vectors = self.dot, self.kernel.vectors
        width = self.kernel.columns * dot.group * itemsize(dot.b)
        groups = dot.step // dot.group
        rows = [self._load_row(row, groups) for row in self._rows(a, "%as")]
        after = list(sums)
        for g in range(groups):
            columns = self._columns(self.w.at(b, g * width))
            for r, row in enumerate(rows):
                value = self._one_group(row, groups, g)
                for v in range(vectors):
                    after[r * vectors + v] = self._dot(after[r * vectors + v], value, columns[v])
        return after

    @property
    def _bytes(self) -> bool:
        """Whether the instruction takes vectors of bytes."""
        return self.dot.name == "sdot"

    @property
    def _group(self) -> str:
        return _GROUPS.get(self.dot.name, "i32")

    def _load_row(self, place: str, groups: int) -> str:
        return self.w.let(f"load <{groups} x {self._group}>, ptr {place}, align 1")

    def _one_group(self, row: str, groups: int, number: int) -> str:
        """Group ``number`` of a row in every lane, as the instruction takes it."""
        kind = f"<{groups} x {self._group}>"
        lanes = ", ".join([f"i32 {number}"] * LANES)
        value = self.w.let(f"shufflevector {kind} {row}, {kind} poison, <{LANES} x i32> <{lanes}>")
        return self.w.let(f"bitcast <{LANES} x i32> {value} to {_BYTES}") if self._bytes else value

    def _columns(self, place: str) -> list[str]:
        """One group of depth of all columns, vector by vector."""
        size = LANES * self.dot.group * itemsize(self.dot.b)
        vectors = self.kernel.vectors
        if self.dot.name != "smlal":
            return [self._column(self.w.at(place, v * size)) for v in range(vectors)]
        found: list[str] = []
        for v in range(0, vectors - 1, 2):
            found += self._pair(self.w.at(place, v * size))
        if vectors % 2:
            loaded = self.w.let(f"load <4 x i8>, ptr {self.w.at(place, (vectors - 1) * size)}, align 1")
            found.append(self.w.let(f"sext <4 x i8> {loaded} to <4 x i16>"))
        return found

    def _pair(self, place: str) -> list[str]:
        """Two vectors of columns, widened together: the instruction takes either half of a register."""
        loaded = self.w.let(f"load <8 x i8>, ptr {place}, align 1")
        wide = self.w.let(f"sext <8 x i8> {loaded} to <8 x i16>")
        halves = ("i32 0, i32 1, i32 2, i32 3", "i32 4, i32 5, i32 6, i32 7")
        return [self.w.let(f"shufflevector <8 x i16> {wide}, <8 x i16> poison, <4 x i32> <{half}>") for half in halves]

    def _column(self, place: str) -> str:
        return self.w.let(f"load {_BYTES}, ptr {place}, align 1") if self._bytes else super()._column(place)

    def _dot(self, total: str, a: str, b: str) -> str:
        name = self.dot.name
        if name == "fma":
            return super()._dot(total, a, b)
        return self._widened(total, a, b) if name == "smlal" else self._bytes_dot(total, a, b)

    def _bytes_dot(self, total: str, a: str, b: str) -> str:
        result, function = self.sum_type, "llvm.aarch64.neon.sdot.v4i32.v16i8"
        self.w.declare(f"{result} @{function}({result}, {_BYTES}, {_BYTES})")
        return self.w.let(f"call {result} @{function}({result} {total}, {_BYTES} {b}, {_BYTES} {a})")

    def _widened(self, total: str, a: str, b: str) -> str:
        self.w.declare("<4 x i32> @llvm.aarch64.neon.smull.v4i32(<4 x i16>, <4 x i16>)")
        product = self.w.let(f"call <4 x i32> @llvm.aarch64.neon.smull.v4i32(<4 x i16> {b}, <4 x i16> {a})")
        return self.w.let(f"add <4 x i32> {total}, {product}")
