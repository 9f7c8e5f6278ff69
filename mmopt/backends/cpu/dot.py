"""Dot-product instructions, and the micro-kernels of matrix products and convolutions made of them.

    C[r, n] (+)= Σ_s Σ_k A[r · stride + offset_s + k] · B[s, k, n]        r < rows, n < vectors × lanes

Processors multiply narrow numbers in groups: one lane of 32 bits takes four neighbours in depth of eight bits (VNNI,
AMX) or two of sixteen (AVX512-BF16, AMX), and adds all products to a sum of 32 bits. So the right operand is packed
``[N / NR][K / group][NR][group]``, whatever the instruction, and the left one is read from plain rows that lie a stride
apart. Where a processor lacks the instruction, widening to 16-bit integers or to float32 takes its place: sums of
integers are exact in any case.

A micro-kernel is a small function in LLVM's language, inlined where it is called. Its sums go through memory, where the
caller's epilogue picks them up. AMX kernels work in tiles that have to be given a shape first: see
:func:`configure_tiles`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np
import tvm.ir
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.expressions import itemsize
from mmopt.backends.profile import Profile

TILE_ROWS = 16
"""Rows of an AMX tile."""

TILE_BYTES = 64
"""Bytes in a row of an AMX tile."""


@dataclasses.dataclass(frozen=True)
class Dot:
    """An instruction, or a short sequence of them, that sums products of ``group`` neighbours in depth in each lane.

    Attributes:
        name: Its mnemonic.
        a: Element type of the left operand in memory; it may be wider than what was asked for.
        b: Element type of the right operand in memory.
        total: Type of the sums.
        group: Neighbours in depth that one lane takes.
        lanes: Columns in a vector of sums.
        step: Elements of depth a kernel goes on by: depths are filled with zeros to a multiple of it.
        shift: What has to be added to elements of a left operand in ``int8``, because ``a`` is ``uint8``.
        most_rows: Rows of the largest kernel with ``vectors`` vectors, by ``vectors`` − 1.
        rate: Multiply-adds of one core in a cycle.
    """

    name: str
    a: str
    b: str
    total: str
    group: int
    lanes: int
    step: int
    most_rows: tuple[int, ...]
    rate: int
    shift: int = 0

    @property
    def tiled(self) -> bool:
        """Whether it works on AMX tiles."""
        return self.name.startswith("tdp")

    @property
    def vectors(self) -> int:
        """Vectors of columns in the preferred kernel."""
        return len(self.most_rows)

    def depth(self, elements: int) -> int:
        """``elements`` of depth, filled up to whole steps."""
        return -(-elements // self.step) * self.step


def dot_for(profile: Profile, a: str, b: str) -> Dot | None:
    """The best way ``profile`` has to multiply ``a`` by ``b``.

    Args:
        profile: The target.
        a: Element type of the left operand: ``uint8``, ``int8``, ``bfloat16`` or ``float32``.
        b: Element type of the right operand: ``int8``, ``bfloat16`` or ``float32``.

    Returns:
        ``None`` when there is none for this target or these types.
    """
    if profile.kind != "cpu" or profile.vector_bytes < 32:
        return None
    if (a, b) in (("uint8", "int8"), ("int8", "int8")):
        return _integer_dot(profile, a)
    if (a, b) == ("bfloat16", "bfloat16"):
        return _bf16_dot(profile)
    if a == "float32" and b in ("float32", "bfloat16", "int8"):
        return _simple(profile, "fma", "float32", b, "float32", 1, 1 if b == "float32" else 2)
    return None


def _integer_dot(profile: Profile, a: str) -> Dot:
    has = frozenset(profile.features)
    if "amx_int8" in has:
        sign = "u" if a == "uint8" else "s"
        return Dot(f"tdpb{sign}sd", a, "int8", "int32", 4, 16, 64, (32, 32), 1024)
    shift = 0 if a == "uint8" else 128
    if _vnni(profile):
        return _simple(profile, "vpdpbusd", "uint8", "int8", "int32", 4, 1, shift)
    return _simple(profile, "vpmaddwd", "int16", "int8", "int32", 2, 2)


def _vnni(profile: Profile) -> bool:
    return ("avx512_vnni" if profile.vector_bytes == 64 else "avx_vnni") in profile.features


def _bf16_dot(profile: Profile) -> Dot:
    has = frozenset(profile.features)
    if "amx_bf16" in has:
        return Dot("tdpbf16ps", "bfloat16", "bfloat16", "float32", 2, 16, 32, (32, 32), 512)
    if "avx512_bf16" in has and profile.vector_bytes == 64:
        return _simple(profile, "vdpbf16ps", "bfloat16", "bfloat16", "float32", 2, 1)
    return _simple(profile, "fma", "float32", "bfloat16", "float32", 1, 2)


def _simple(
    profile: Profile, name: str, a: str, b: str, total: str, group: int, temporaries: int, shift: int = 0
) -> Dot:
    """An instruction on vectors: as many rows as there are registers for sums."""
    lanes = profile.vector_bytes // 4
    widest = 4 if profile.registers >= 32 else 2
    free = [(profile.registers - v - temporaries) // v for v in range(1, widest + 1)]
    rows = tuple(min(14, count) for count in free)
    per_cycle = {"vpmaddwd": 1, "vdpbf16ps": 1}.get(name, 2)
    return Dot(name, a, b, total, group, lanes, group, rows, per_cycle * lanes * group, shift)


def pack(b: np.ndarray, dot: Dot, columns: int) -> np.ndarray:
    """Rearrange a right operand for micro-kernels of ``columns`` columns.

    Args:
        b: ``[K, N]`` of type ``dot.b``.
        dot: What it is multiplied with.
        columns: Columns of a panel, a multiple of ``dot.lanes``.

    Returns:
        ``[ceil(N / columns), depth / group, columns, group]``, zeros where ``b`` ends; ``depth`` is K filled up to
        whole steps.
    """
    depth, width = b.shape
    panels, full = -(-width // columns), dot.depth(depth)
    padded = np.zeros((full, panels * columns), b.dtype)
    padded[:depth, :width] = b
    split = padded.reshape(full // dot.group, dot.group, panels, columns)
    return np.ascontiguousarray(split.transpose(2, 0, 3, 1))


# -- calling ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MicroKernel:
    """Code for one block of sums.

    Attributes:
        dot: The instruction.
        rows: Rows of the block; with AMX the kernel computes as many as the tiles were configured for.
        vectors: Vectors of columns; the panel of B has as many.
        accumulate: Whether the block starts from what C holds, and not from zero.
        indexed: Whether A is read in segments that start at given offsets; otherwise it is one segment.
        prefetch: Cache lines fetched ahead in every step of the depth.
    """

    dot: Dot
    rows: int
    vectors: int
    accumulate: bool = False
    indexed: bool = False
    prefetch: int = 0

    @property
    def columns(self) -> int:
        return self.vectors * self.dot.lanes

    @property
    def name(self) -> str:
        """Name of the function; equal for equal kernels only."""
        dot = self.dot
        flags = ("_add" if self.accumulate else "") + ("_indexed" if self.indexed else "")
        rows = -(-self.rows // TILE_ROWS) if dot.tiled else self.rows
        return f"mmopt_{dot.name}_{dot.a}_{dot.b}_{rows}x{self.columns}x{dot.step}_p{self.prefetch}{flags}"

    def llvm(self) -> str:
        """The function's text. Parameters: c, stride of c, a, stride of a, b, steps, segments, offsets, ahead."""
        return _write(self)

    def call(
        self,
        c: Expr,
        c_stride: int | Expr,
        a: Expr,
        a_stride: int | Expr,
        b: Expr,
        steps: int | Expr,
        *,
        segments: int | Expr = 1,
        offsets: Expr | None = None,
        ahead: Expr | None = None,
    ) -> Stmt:
        """The statement that computes one block. All strides and offsets are in bytes.

        Args:
            c: Address (see :func:`address`) of the block of sums.
            c_stride: From one of its rows to the next.
            a: Address of the first row of A.
            a_stride: From one row of A to the next.
            b: Address of the panel: segment after segment without gaps.
            steps: Steps (of ``dot.step`` elements) of the depth in each segment.
            segments: Number of segments, for ``indexed`` kernels.
            offsets: Address of an int64 array: where in A each segment starts.
            ahead: Address of what to fetch ahead; ``b`` when absent.
        """
        extra = [_number(segments), offsets if offsets is not None else b, ahead if ahead is not None else b]
        arguments = [c, _number(c_stride), a, _number(a_stride), b, _number(steps), *extra]
        return tirx.Evaluate(tirx.call_extern("int32", self.name, *arguments))


def address(load: Expr) -> Expr:
    """Address of the element that ``load`` would read."""
    return tirx.address_of(load)


def _number(value: int | Expr) -> Expr:
    """An argument of a micro-kernel. Of 64 bits it would not do: TVM narrows such expressions where it can."""
    return tirx.const(value, "int32") if isinstance(value, int) else value.astype("int32")


def configure_tiles(rows: int | Expr, step_bytes: int | Expr = TILE_BYTES) -> Stmt:
    """The statement that shapes the AMX tiles of this thread; :func:`release_tiles` must follow the last use.

    Args:
        rows: Rows the next kernels compute, at most 32.
        step_bytes: Bytes of A's rows in a step of the depth, a multiple of 4; less than 64 where segments are short.
    """
    return tirx.Evaluate(tirx.call_extern("int32", "mmopt_configure_tiles", _number(rows), _number(step_bytes)))


def release_tiles() -> Stmt:
    """The statement that ends the use of AMX tiles in this thread."""
    return tirx.Evaluate(tirx.call_extern("int32", "mmopt_release_tiles"))


def importing(kernels: Iterable[MicroKernel], body: Stmt) -> Stmt:
    """``body`` with the code of ``kernels`` at hand."""
    wanted = list(dict.fromkeys(kernels))
    texts = [k.llvm() for k in wanted]
    if any(k.dot.tiled for k in wanted):
        texts.append(_tile_functions())
    for text in texts:
        body = tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", tvm.ir.StringImm(text), body)
    return body


# -- LLVM text -------------------------------------------------------------------------------------------------

_HEADER = (
    "define i32 @{name}(ptr %c, i32 %cs32, ptr %a, i32 %as32, ptr %b, i32 %steps32, i32 %segments32, ptr %offsets, "
    "ptr %ahead) alwaysinline {{"
)

_TYPES = {"int8": "i8", "uint8": "i8", "int16": "i16", "bfloat16": "i16", "int32": "i32", "float32": "float"}


class _Writer:
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
def _write(kernel: MicroKernel) -> str:
    w = _Writer()
    (_Tiles if kernel.dot.tiled else _Vectors)(kernel, w).write()
    return "\n".join([_HEADER.format(name=kernel.name), *w.lines, "}", *w.declared, ""])


class _Kernel:
    """Loops over segments and steps around what one step does. Sums are loop-carried values named by ``carried``."""

    def __init__(self, kernel: MicroKernel, writer: _Writer) -> None:
        self.kernel, self.dot, self.w = kernel, kernel.dot, writer
        self.step_bytes = self.dot.step * itemsize(self.dot.a)
        self.panel_bytes = kernel.columns * self.dot.step * itemsize(self.dot.b)

    def start(self) -> list[tuple[str, str]]:
        """Values (type, name) of the sums at the beginning."""
        raise NotImplementedError

    def step(self, a: str, b: str, sums: Sequence[str]) -> list[str]:
        """Code of one step; gives the new sums."""
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
        types = [t for t, _ in first]
        w.line("  br label %segment" if indexed else "  br label %step")
        if indexed:
            self._segment_head(first)
            entry = "segment"
            before = [f"%s{n}" for n in range(len(first))]
            a, b, ahead = "%a0", "%b0", "%p0"
        else:
            entry, before, a, b, ahead = "entry", [v for _, v in first], "%a", "%b", "%ahead"
        w.line("step:")
        w.line(f"  %k = phi i64 [ 0, %{entry} ], [ %k1, %step ]")
        for pointer, base in (("ak", a), ("bk", b), ("pk", ahead)):
            w.line(f"  %{pointer} = phi ptr [ {base}, %{entry} ], [ %{pointer}1, %step ]")
        for n, (kind, value) in enumerate(zip(types, before, strict=True)):
            w.line(f"  %x{n} = phi {kind} [ {value}, %{entry} ], [ %y{n}, %step ]")
        self._prefetch()
        after = self.step("%ak", "%bk", [f"%x{n}" for n in range(len(first))])
        for n, (kind, value) in enumerate(zip(types, after, strict=True)):
            w.line(f"  %y{n} = bitcast {kind} {value} to {kind}")
        w.line(f"  %ak1 = getelementptr i8, ptr %ak, i64 {self.step_bytes}")
        w.line(f"  %bk1 = getelementptr i8, ptr %bk, i64 {self.panel_bytes}")
        w.line(f"  %pk1 = getelementptr i8, ptr %pk, i64 {64 * self.kernel.prefetch}")
        w.line("  %k1 = add i64 %k, 1")
        w.line("  %more = icmp ult i64 %k1, %steps")
        w.line(f"  br i1 %more, label %step, label %{'next' if indexed else 'done'}")
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
        w.line("  br label %step")

    def _segment_tail(self) -> None:
        self.w.line("next:")
        self.w.line("  %s_next = add i64 %s, 1")
        self.w.line("  %again = icmp ult i64 %s_next, %segments")
        self.w.line("  br i1 %again, label %segment, label %done")

    def _prefetch(self) -> None:
        for n in range(self.kernel.prefetch):
            self.w.declare("void @llvm.prefetch.p0(ptr, i32, i32, i32)")
            where = self.w.at("%pk", 64 * n)
            self.w.line(f"  call void @llvm.prefetch.p0(ptr {where}, i32 0, i32 2, i32 1)")


class _Vectors(_Kernel):
    """Sums in vector registers; A is broadcast, one group at a time."""

    def __init__(self, kernel: MicroKernel, writer: _Writer) -> None:
        super().__init__(kernel, writer)
        self.lanes = self.dot.lanes
        self.sum_type = f"<{self.lanes} x {_TYPES[self.dot.total]}>"

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
        count, kind = lanes * dot.group, _TYPES[dot.b]
        loaded = w.let(f"load <{count} x {kind}>, ptr {place}, align 1")
        if dot.name == "vpmaddwd":
            return w.let(f"sext <{count} x i8> {loaded} to <{count} x i16>")
        if dot.name == "fma" and dot.b == "int8":
            wide = w.let(f"sext <{lanes} x i8> {loaded} to <{lanes} x i32>")
            return w.let(f"sitofp <{lanes} x i32> {wide} to <{lanes} x float>")
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


class _Tiles(_Kernel):
    """Sums in AMX tiles 0 to 3, two rows of tiles by two columns; 4 and 5 hold A, 6 and 7 hold B."""

    def __init__(self, kernel: MicroKernel, writer: _Writer) -> None:
        super().__init__(kernel, writer)
        self.blocks = -(-kernel.rows // TILE_ROWS)
        for name, arguments in (("tilezero", "i8 immarg"), ("tileloadd64", "i8 immarg, ptr, i64")):
            writer.declare(f"void @llvm.x86.{name}({arguments})")
        writer.declare("void @llvm.x86.tilestored64(i8 immarg, ptr, i64)")
        writer.declare(f"void @llvm.x86.{self.dot.name}(i8 immarg, i8 immarg, i8 immarg)")

    def _each(self) -> list[tuple[int, int]]:
        return [(r, v) for r in range(self.blocks) for v in range(self.kernel.vectors)]

    def _below(self, base: str, stride: str, block: int) -> str:
        """Address of the first row of a block of rows."""
        if not block:
            return base
        return self.w.at(base, self.w.let(f"mul i64 {stride}, {TILE_ROWS * block}"))

    def start(self) -> list[tuple[str, str]]:
        for r, v in self._each():
            if self.kernel.accumulate:
                place = self.w.at(self._below("%c", "%cs", r), v * TILE_BYTES)
                self.w.line(f"  call void @llvm.x86.tileloadd64(i8 {2 * r + v}, ptr {place}, i64 %cs)")
            else:
                self.w.line(f"  call void @llvm.x86.tilezero(i8 {2 * r + v})")
        return []

    def step(self, a: str, b: str, sums: Sequence[str]) -> list[str]:
        w, row = self.w, self.kernel.vectors * TILE_BYTES
        for v in range(self.kernel.vectors):
            w.line(f"  call void @llvm.x86.tileloadd64(i8 {6 + v}, ptr {w.at(b, v * TILE_BYTES)}, i64 {row})")
        for r in range(self.blocks):
            w.line(f"  call void @llvm.x86.tileloadd64(i8 {4 + r}, ptr {self._below(a, '%as', r)}, i64 %as)")
            for v in range(self.kernel.vectors):
                w.line(f"  call void @llvm.x86.{self.dot.name}(i8 {2 * r + v}, i8 {4 + r}, i8 {6 + v})")
        return []

    def finish(self, sums: Sequence[str]) -> None:
        for r, v in self._each():
            place = self.w.at(self._below("%c", "%cs", r), v * TILE_BYTES)
            self.w.line(f"  call void @llvm.x86.tilestored64(i8 {2 * r + v}, ptr {place}, i64 %cs)")


@functools.cache
def _tile_functions() -> str:
    """Functions that shape and release tiles: palette 1, rows at byte 48 + n, bytes of a row at 16 + 2n."""
    w = _Writer()
    w.line("define i32 @mmopt_configure_tiles(i32 %rows, i32 %step) alwaysinline {")
    w.line("  %m = alloca [64 x i8], align 64")
    w.line("  store <64 x i8> zeroinitializer, ptr %m, align 64")
    w.line("  store i8 1, ptr %m")
    w.line("  %first = call i32 @llvm.umin.i32(i32 %rows, i32 16)")
    w.line("  %left = sub i32 %rows, %first")
    w.line("  %second = call i32 @llvm.umax.i32(i32 %left, i32 1)")
    w.line("  %depth = udiv i32 %step, 4")
    for name in ("first", "second", "depth"):
        w.line(f"  %{name}8 = trunc i32 %{name} to i8")
    w.line("  %step16 = trunc i32 %step to i16")
    for tile in range(8):
        rows = "%depth8" if tile >= 6 else "%second8" if tile in (2, 3, 5) else "%first8"
        width = "%step16" if tile in (4, 5) else str(TILE_BYTES)
        w.line(f"  store i8 {rows}, ptr {w.at('%m', 48 + tile)}")
        w.line(f"  store i16 {width}, ptr {w.at('%m', 16 + 2 * tile)}")
    w.line("  call void @llvm.x86.ldtilecfg(ptr %m)")
    w.line("  ret i32 0")
    w.line("}")
    w.line("define i32 @mmopt_release_tiles() alwaysinline {")
    w.line("  call void @llvm.x86.tilerelease()")
    w.line("  ret i32 0")
    w.line("}")
    for declared in ("i32 @llvm.umin.i32(i32, i32)", "i32 @llvm.umax.i32(i32, i32)"):
        w.line(f"declare {declared}")
    w.line("declare void @llvm.x86.ldtilecfg(ptr)")
    w.line("declare void @llvm.x86.tilerelease()")
    return "\n".join([*w.lines, ""])
