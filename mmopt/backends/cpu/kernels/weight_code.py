"""The micro-kernel of products with 8-bit and 4-bit weights: weights become floats in registers.

    C[r, n] = Σ_g Σ_k A[r, k] · (q[k, n] · scale[g, n] + shift[g, n])        k in group g

Weights of eight bits lie ``[K][columns]``, of four bits ``[K / 8][columns]`` with eight neighbours in depth in 32 bits,
lowest first. Where vectors have sixteen lanes, four bits index a table of floats in a register.
"""

from __future__ import annotations

import dataclasses
import functools

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.cpu.dot_code import Writer

NIBBLES = 8
"""Weights of four bits in 32 bits."""

AHEAD = 2048
"""Bytes by which weights are fetched ahead."""

CHAINS = 8
"""Sums that keep both multipliers busy."""


@dataclasses.dataclass(frozen=True)
class WeightKernel:
    """Code for one block of results.

    Attributes:
        rows: Rows of the block.
        vectors: Vectors of columns in it and in a panel.
        lanes: Columns in a vector.
        bits: 8 or 4 for each weight.
        group: Depth of a group that shares scales, a multiple of :attr:`step`.
        scaled: Whether weights are multiplied by ``scale`` and moved by ``shift``; otherwise ``zero`` is subtracted.
        zero: What to subtract from all four-bit weights that are not scaled.
    """

    rows: int
    vectors: int
    lanes: int
    bits: int
    group: int
    scaled: bool
    zero: int = 0

    @property
    def step(self) -> int:
        """Depth that code goes on by at once."""
        return NIBBLES if self.bits == 4 else 4 if self.group % 4 == 0 else 1

    @property
    def columns(self) -> int:
        return self.vectors * self.lanes

    @property
    def name(self) -> str:
        """Name of the function; equal for equal kernels only."""
        how = "scaled" if self.scaled else f"less{self.zero}"
        return f"mmopt_weights{self.bits}_{self.rows}x{self.vectors}x{self.lanes}_by{self.group}_{how}"

    def llvm(self) -> str:
        """The function's text."""
        return _Code(self).text()

    def call(
        self, c: Expr, c_stride: int, a: Expr, a_stride: int, b: Expr, groups: int, scales: Expr, shifts: Expr
    ) -> Stmt:
        """The statement that computes one block; strides in bytes, the rest addresses.

        Args:
            c: The block of results.
            c_stride: From one of its rows to the next.
            a: First row of A.
            a_stride: From one row of A to the next.
            b: The panel of weights.
            groups: Number of groups.
            scales: ``[groups][columns]`` of the panel; any address when not scaled.
            shifts: As ``scales``.
        """
        numbers = [tirx.const(n, "int32") for n in (c_stride, a_stride, groups)]
        return tirx.Evaluate(
            tirx.call_extern("int32", self.name, c, numbers[0], a, numbers[1], b, numbers[2], scales, shifts)
        )


class _Code:
    """Writes the function."""

    def __init__(self, kernel: WeightKernel) -> None:
        self.kernel, self.w = kernel, Writer()
        lanes = kernel.lanes
        self.floats, self.ints = f"<{lanes} x float>", f"<{lanes} x i32>"
        self.copies = 1 if kernel.rows * kernel.vectors >= CHAINS else 2
        self.count = kernel.rows * kernel.vectors * self.copies
        self.table = ", ".join(f"float {n - kernel.zero}.0" for n in range(16))
        self.by_table = kernel.bits == 4 and lanes == 16

    @functools.cached_property
    def stride(self) -> int:
        """Bytes of a panel's weights in one step."""
        return self.kernel.columns * (4 if self.kernel.bits == 4 else self.kernel.step)

    def text(self) -> str:
        kernel, w = self.kernel, self.w
        parameters = "ptr %c, i32 %cs32, ptr %a, i32 %as32, ptr %b, i32 %groups, ptr %scales, ptr %shifts"
        w.line(f"define i32 @{kernel.name}({parameters}) alwaysinline {{")
        w.line("entry:")
        for name in ("cs", "as"):
            w.line(f"  %{name} = sext i32 %{name}32 to i64")
        w.line("  br label %group")
        self._group_head()
        factors = self._factors()
        w.line("  br label %step")
        self._step(factors)
        self._group_tail()
        self._finish()
        return "\n".join([*w.lines, "}", *w.declared, ""])

    def _group_head(self) -> None:
        w = self.w
        w.line("group:")
        w.line("  %g = phi i32 [ 0, %entry ], [ %g1, %next ]")
        for name, base in (("ag", "%a"), ("bg", "%b")):
            w.line(f"  %{name} = phi ptr [ {base}, %entry ], [ %{name[0]}k1, %next ]")
        for name, base in (("sg", "%scales"), ("zg", "%shifts")):
            w.line(f"  %{name} = phi ptr [ {base}, %entry ], [ %{name}1, %next ]")
        for n in range(self.count):
            w.line(f"  %s{n} = phi {self.floats} [ zeroinitializer, %entry ], [ %y{n}, %next ]")

    def _factors(self) -> list[tuple[str, str]]:
        """Scale and shift of each vector of the group."""
        if not self.kernel.scaled:
            return []
        found = []
        for v in range(self.kernel.vectors):
            places = [self.w.at(base, v * self.kernel.lanes * 4) for base in ("%sg", "%zg")]
            scale, shift = (self.w.let(f"load {self.floats}, ptr {place}, align 4") for place in places)
            found.append((scale, shift))
        return found

    def _step(self, factors: list[tuple[str, str]]) -> None:
        w, kernel = self.w, self.kernel
        w.line("step:")
        w.line("  %k = phi i32 [ 0, %group ], [ %k1, %step ]")
        for name in ("a", "b"):
            w.line(f"  %{name}k = phi ptr [ %{name}g, %group ], [ %{name}k1, %step ]")
        for n in range(self.count):
            w.line(f"  %x{n} = phi {self.floats} [ %s{n}, %group ], [ %y{n}, %step ]")
        w.declare("void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        for line in range(0, self.stride, 64):
            w.line(f"  call void @llvm.prefetch.p0(ptr {w.at('%bk', AHEAD + line)}, i32 0, i32 3, i32 1)")
        sums = [f"%x{n}" for n in range(self.count)]
        packed = self._packed()
        for j in range(kernel.step):
            weights = [self._weight(packed, v, j, factors) for v in range(kernel.vectors)]
            self._multiply(sums, weights, j)
        for n, value in enumerate(sums):
            w.line(f"  %y{n} = bitcast {self.floats} {value} to {self.floats}")
        w.line(f"  %ak1 = getelementptr i8, ptr %ak, i64 {4 * kernel.step}")
        w.line(f"  %bk1 = getelementptr i8, ptr %bk, i64 {self.stride}")
        w.line("  %k1 = add i32 %k, 1")
        w.line(f"  %more = icmp ult i32 %k1, {kernel.group // kernel.step}")
        w.line("  br i1 %more, label %step, label %next")

    def _packed(self) -> list[str]:
        """Four-bit weights of all vectors, eight neighbours each."""
        if self.kernel.bits != 4:
            return []
        places = [self.w.at("%bk", v * self.kernel.lanes * 4) for v in range(self.kernel.vectors)]
        return [self.w.let(f"load {self.ints}, ptr {place}, align 4") for place in places]

    def _weight(self, packed: list[str], v: int, j: int, factors: list[tuple[str, str]]) -> str:
        """A vector of weights as floats: those ``j`` deep in the step."""
        w, lanes = self.w, self.kernel.lanes
        if self.kernel.bits == 4:
            value = self._nibble(packed[v], j)
        else:
            place = w.at("%bk", j * self.kernel.columns + v * lanes)
            loaded = w.let(f"load <{lanes} x i8>, ptr {place}, align 1")
            wide = w.let(f"sext <{lanes} x i8> {loaded} to {self.ints}")
            value = w.let(f"sitofp {self.ints} {wide} to {self.floats}")
        if not factors:
            return value
        return self._fma(value, *factors[v])

    def _nibble(self, packed: str, j: int) -> str:
        w = self.w
        moved = w.let(f"lshr {self.ints} {packed}, splat (i32 {4 * j})") if j else packed
        if self.by_table:
            w.declare("<16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float>, <16 x i32>)")
            call = "call <16 x float> @llvm.x86.avx512.permvar.sf.512"
            return w.let(f"{call}(<16 x float> <{self.table}>, <16 x i32> {moved})")
        low = w.let(f"and {self.ints} {moved}, splat (i32 15)")
        if self.kernel.zero:
            low = w.let(f"sub {self.ints} {low}, splat (i32 {self.kernel.zero})")
        return w.let(f"sitofp {self.ints} {low} to {self.floats}")

    def _multiply(self, sums: list[str], weights: list[str], j: int) -> None:
        w, lanes = self.w, self.kernel.lanes
        row = w.at("%ak", 4 * j)
        for r in range(self.kernel.rows):
            one = w.let(f"load float, ptr {row}, align 4")
            first = w.let(f"insertelement {self.floats} poison, float {one}, i64 0")
            spread = f"shufflevector {self.floats} {first}, {self.floats} poison, <{lanes} x i32> zeroinitializer"
            value = w.let(spread)
            for v, weight in enumerate(weights):
                n = (j % self.copies * self.kernel.rows + r) * self.kernel.vectors + v
                sums[n] = self._fma(value, weight, sums[n])
            if r + 1 < self.kernel.rows:
                row = w.at(row, "%as")

    def _fma(self, a: str, b: str, c: str) -> str:
        name, kind = f"llvm.fma.v{self.kernel.lanes}f32", self.floats
        self.w.declare(f"{kind} @{name}({kind}, {kind}, {kind})")
        return self.w.let(f"call {kind} @{name}({kind} {a}, {kind} {b}, {kind} {c})")

    def _group_tail(self) -> None:
        w, size = self.w, self.kernel.columns * 4
        w.line("next:")
        w.line(f"  %sg1 = getelementptr i8, ptr %sg, i64 {size}")
        w.line(f"  %zg1 = getelementptr i8, ptr %zg, i64 {size}")
        w.line("  %g1 = add i32 %g, 1")
        w.line("  %again = icmp ult i32 %g1, %groups")
        w.line("  br i1 %again, label %group, label %done")
        w.line("done:")

    def _finish(self) -> None:
        w, kernel = self.w, self.kernel
        one, row = kernel.rows * kernel.vectors, "%c"
        for r in range(kernel.rows):
            for v in range(kernel.vectors):
                n = r * kernel.vectors + v
                value = f"%y{n}"
                for copy in range(1, self.copies):
                    value = w.let(f"fadd {self.floats} {value}, %y{copy * one + n}")
                w.line(f"  store {self.floats} {value}, ptr {w.at(row, v * kernel.lanes * 4)}, align 4")
            row = w.at(row, "%cs")
        w.line("  ret i32 0")
