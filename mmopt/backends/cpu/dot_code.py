"""The text of micro-kernels in LLVM's language; see :mod:`mmopt.backends.cpu.dot`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmopt.backends.arm.dot import MATRICES
from mmopt.backends.expressions import itemsize

if TYPE_CHECKING:
    from mmopt.backends.cpu.dot import MicroKernel

_HEADER = (
    "define i32 @{name}(ptr %c, i32 %cs32, ptr %a, i32 %as32, ptr %b, i32 %steps32, i32 %segments32, ptr %offsets, "
    "ptr %ahead) alwaysinline {{"
)

TYPES = {"int8": "i8", "uint8": "i8", "int16": "i16", "bfloat16": "i16", "int32": "i32", "float32": "float"}
TYPES["float16"] = "half"
"""LLVM's names of element types; bfloat16 is stored as integers."""


_ROLLED = ("!0 = distinct !{!0, !2}", "!1 = distinct !{!1, !2}", '!2 = !{!"llvm.loop.unroll.disable"}')


class Writer:
    """Lines of a function, with fresh names."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.declared: dict[str, None] = {}
        self._count = 0

    def line(self, text: str) -> None:
        self.lines.append(text)

    def let(self, text: str) -> str:
        """A fresh name for the value of ``text``."""
        self._count += 1
        name = f"%t{self._count}"
        self.lines.append(f"  {name} = {text}")
        return name

    def at(self, base: str, offset: str | int) -> str:
        return self.let(f"getelementptr i8, ptr {base}, i64 {offset}")

    def declare(self, text: str) -> None:
        self.declared[f"declare {text}"] = None


@functools.cache
def micro_kernel(kernel: MicroKernel) -> str:
    """A function of c, stride of c, a, stride of a, b, steps, segments, offsets, ahead."""
    w = Writer()
    writer = _writer(kernel)
    writer(kernel, w).write()
    return "\n".join(
        [_HEADER.format(name=kernel.name), *w.lines, "}", *w.declared, *(_ROLLED if writer.rolled else ()), ""]
    )


def _writer(kernel: MicroKernel) -> type[KernelText]:
    if kernel.dot.neon:  # Arm's are made of what is below
        from mmopt.backends.arm.dot_code import NeonVectors
        from mmopt.backends.arm.matrix_code import NeonMatrices
        from mmopt.backends.arm.sdot_code import NeonDots

        if kernel.dot.name == "sdot":
            return NeonDots
        return NeonMatrices if kernel.dot.name in MATRICES else NeonVectors
    if kernel.dot.tiled:
        from mmopt.backends.cpu.amx_code import Tiles

        return Tiles
    return Vectors


class KernelText:
    """Loops over segments and steps around what one step does. Sums are loop-carried values named by ``carried``.

    Attributes:
        rolled: Whether both loops are left as they are. Unrolled where the number of rounds is known, LLVM loads
            more ahead than there are registers for.
    """

    rolled = False

    def __init__(self, kernel: MicroKernel, writer: Writer) -> None:
        self.kernel, self.dot, self.w = kernel, kernel.dot, writer
        self.step_bytes = self.dot.step * itemsize(self.dot.a)
        self.panel_bytes = kernel.columns * self.dot.step * itemsize(self.dot.b)

    def start(self) -> list[tuple[str, str]]:
        """Values (type, name) of the sums at the beginning."""
        raise NotImplementedError

    def enter(self, a: str) -> list[tuple[str, str]]:
        """Values (type, name) that are carried from step to step besides, and begin anew in each segment of A.

        Args:
            a: Where the segment starts.
        """
        return []

    def step(self, a: str, b: str, sums: Sequence[str]) -> list[str]:
        """Code of one step; gives the new sums, and what else is carried."""
        raise NotImplementedError

    def finish(self, sums: Sequence[str]) -> None:
        """Store the sums."""
        raise NotImplementedError

    def write(self) -> None:
        w, indexed = self.w, self.kernel.indexed
        w.line("entry:")
        for name in ("cs", "as", "steps", "segments"):
            w.line(f"  %{name} = sext i32 %{name}32 to i64")
        first = self.start()
        if indexed:
            w.line("  br label %segment")
            self._segment_head(first)
            entry = "segment"
            before = [f"%s{n}" for n in range(len(first))]
            a, b, ahead = "%a0", "%b0", "%p0"
        else:
            entry, before, a, b, ahead = "entry", [v for _, v in first], "%a", "%b", "%ahead"
        fresh = self.enter(a)
        types = [t for t, _ in (*first, *fresh)]
        before += [v for _, v in fresh]
        w.line("  br label %step")
        w.line("step:")
        w.line(f"  %k = phi i64 [ 0, %{entry} ], [ %k1, %step ]")
        for pointer, base in (("ak", a), ("bk", b), ("pk", ahead)):
            w.line(f"  %{pointer} = phi ptr [ {base}, %{entry} ], [ %{pointer}1, %step ]")
        for n, (kind, value) in enumerate(zip(types, before, strict=True)):
            w.line(f"  %x{n} = phi {kind} [ {value}, %{entry} ], [ %y{n}, %step ]")
        self._prefetch()
        after = self.step("%ak", "%bk", [f"%x{n}" for n in range(len(types))])
        for n, (kind, value) in enumerate(zip(types, after, strict=True)):
            w.line(f"  %y{n} = bitcast {kind} {value} to {kind}")
        w.line(f"  %ak1 = getelementptr i8, ptr %ak, i64 {self.step_bytes}")
        w.line(f"  %bk1 = getelementptr i8, ptr %bk, i64 {self.panel_bytes}")
        w.line(f"  %pk1 = getelementptr i8, ptr %pk, i64 {64 * self.kernel.prefetch}")
        w.line("  %k1 = add i64 %k, 1")
        w.line("  %more = icmp ult i64 %k1, %steps")
        mark = ", !llvm.loop !0" if self.rolled else ""
        w.line(f"  br i1 %more, label %step, label %{'next' if indexed else 'done'}{mark}")
        if indexed:
            self._segment_tail()
        w.line("done:")
        self.finish([f"%y{n}" for n in range(len(first))])
        w.line("  ret i32 0")

    def _segment_head(self, first: Sequence[tuple[str, str]]) -> None:
        w = self.w
        w.line("segment:")
        w.line("  %s = phi i64 [ 0, %entry ], [ %s_next, %next ]")
        w.line("  %b0 = phi ptr [ %b, %entry ], [ %bk1, %next ]")
        w.line("  %p0 = phi ptr [ %ahead, %entry ], [ %pk1, %next ]")
        for n, (kind, value) in enumerate(first):
            w.line(f"  %s{n} = phi {kind} [ {value}, %entry ], [ %y{n}, %next ]")
        w.line("  %slot = getelementptr i64, ptr %offsets, i64 %s")
        w.line("  %offset = load i64, ptr %slot, align 8")
        w.line("  %a0 = getelementptr i8, ptr %a, i64 %offset")

    def _segment_tail(self) -> None:
        self.w.line("next:")
        self.w.line("  %s_next = add i64 %s, 1")
        self.w.line("  %again = icmp ult i64 %s_next, %segments")
        mark = ", !llvm.loop !1" if self.rolled else ""
        self.w.line(f"  br i1 %again, label %segment, label %done{mark}")

    def _prefetch(self) -> None:
        for n in range(self.kernel.prefetch):
            self.w.declare("void @llvm.prefetch.p0(ptr, i32, i32, i32)")
            where = self.w.at("%pk", 64 * n)
            self.w.line(f"  call void @llvm.prefetch.p0(ptr {where}, i32 0, i32 2, i32 1)")


class Vectors(KernelText):
    """Sums in vector registers; A is broadcast, one group at a time."""

    def __init__(self, kernel: MicroKernel, writer: Writer) -> None:
        super().__init__(kernel, writer)
        self.lanes = self.dot.lanes
        self.sum_type = f"<{self.lanes} x {TYPES[self.dot.total]}>"

    def start(self) -> list[tuple[str, str]]:
        zero = [(self.sum_type, "zeroinitializer")] * (self.kernel.rows * self.kernel.vectors)
        if not self.kernel.accumulate:
            return zero
        return [(self.sum_type, self.w.let(f"load {self.sum_type}, ptr {place}, align 4")) for place in self._places()]

    def _places(self) -> list[str]:
        """Where the sums lie in C."""
        found = []
        for row in self._rows("%c", "%cs"):
            found += [self.w.at(row, v * self.lanes * 4) for v in range(self.kernel.vectors)]
        return found

    def _rows(self, base: str, stride: str) -> list[str]:
        found = [base]
        for _ in range(1, self.kernel.rows):
            found.append(self.w.at(found[-1], stride))
        return found

    def step(self, a: str, b: str, sums: Sequence[str]) -> list[str]:
        vectors = self.kernel.vectors
        width = self.lanes * self.dot.group * itemsize(self.dot.b)
        columns = [self._column(self.w.at(b, v * width)) for v in range(vectors)]
        after = []
        for r, row in enumerate(self._rows(a, "%as")):
            value = self._broadcast(row)
            after += [self._dot(sums[r * vectors + v], value, columns[v]) for v in range(vectors)]
        return after

    def finish(self, sums: Sequence[str]) -> None:
        for place, value in zip(self._places(), sums, strict=True):
            self.w.line(f"  store {self.sum_type} {value}, ptr {place}, align 4")

    def _column(self, place: str) -> str:
        """A vector of B in the form the instruction takes it."""
        w, dot, lanes = self.w, self.dot, self.lanes
        count, kind = lanes * dot.group, TYPES[dot.b]
        loaded = w.let(f"load <{count} x {kind}>, ptr {place}, align 1")
        if dot.name == "vpmaddwd":
            return w.let(f"sext <{count} x i8> {loaded} to <{count} x i16>")
        if dot.name == "fma" and dot.b == "int8":
            wide = w.let(f"sext <{lanes} x i8> {loaded} to <{lanes} x i32>")
            return w.let(f"sitofp <{lanes} x i32> {wide} to <{lanes} x float>")
        if dot.name == "fma" and dot.b == "float16":
            return w.let(f"fpext <{lanes} x half> {loaded} to <{lanes} x float>")
        if dot.name == "fma" and dot.b == "bfloat16":
            wide = w.let(f"zext <{lanes} x i16> {loaded} to <{lanes} x i32>")
            high = w.let(f"shl <{lanes} x i32> {wide}, splat (i32 16)")
            return w.let(f"bitcast <{lanes} x i32> {high} to <{lanes} x float>")
        return loaded

    def _broadcast(self, place: str) -> str:
        """One group of A in every lane."""
        w, dot, lanes = self.w, self.dot, self.lanes
        if dot.name == "fma":
            return self._splat(w.let(f"load float, ptr {place}, align 1"), "float")
        value = self._splat(w.let(f"load i32, ptr {place}, align 1"), "i32")
        kind = {"vpdpbusd": "i8", "vpmaddwd": "i16", "vdpbf16ps": "bfloat"}[dot.name]
        return w.let(f"bitcast <{lanes} x i32> {value} to <{lanes * dot.group} x {kind}>")

    def _splat(self, value: str, kind: str) -> str:
        one = self.w.let(f"insertelement <{self.lanes} x {kind}> poison, {kind} {value}, i64 0")
        shuffle = f"shufflevector <{self.lanes} x {kind}> {one}, <{self.lanes} x {kind}> poison"
        return self.w.let(f"{shuffle}, <{self.lanes} x i32> zeroinitializer")

    def _dot(self, total: str, a: str, b: str) -> str:
        w, lanes, bits = self.w, self.lanes, self.lanes * 32
        vector = f"<{lanes * self.dot.group} x "
        if self.dot.name == "fma":
            kind = f"<{lanes} x float>"
            w.declare(f"{kind} @llvm.fma.v{lanes}f32({kind}, {kind}, {kind})")
            return w.let(f"call {kind} @llvm.fma.v{lanes}f32({kind} {a}, {kind} {b}, {kind} {total})")
        if self.dot.name == "vpmaddwd":
            name = "llvm.x86.avx512.pmaddw.d.512" if bits == 512 else "llvm.x86.avx2.pmadd.wd"
            w.declare(f"<{lanes} x i32> @{name}({vector}i16>, {vector}i16>)")
            products = w.let(f"call <{lanes} x i32> @{name}({vector}i16> {a}, {vector}i16> {b})")
            return w.let(f"add <{lanes} x i32> {total}, {products}")
        name, kind = f"llvm.x86.avx512.vpdpbusd.{bits}", "i8>"
        if self.dot.name == "vdpbf16ps":
            name, kind = f"llvm.x86.avx512bf16.dpbf16ps.{bits}", "bfloat>"
            b = w.let(f"bitcast {vector}i16> {b} to {vector}bfloat>")
        result = self.sum_type
        w.declare(f"{result} @{name}({result}, {vector}{kind}, {vector}{kind})")
        return w.let(f"call {result} @{name}({result} {total}, {vector}{kind} {a}, {vector}{kind} {b})")
