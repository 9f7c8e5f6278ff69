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
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import tvm.ir
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.arm.dot import LANES, neon_choice, rows_that_fit
from mmopt.backends.cpu.amx_code import TILE_BYTES, TILE_ROWS, tile_functions, tile_panels, tile_phases
from mmopt.backends.cpu.dot_code import micro_kernel
from mmopt.backends.profile import Profile


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
        shift: What has to be added to elements of the left operand, because ``a`` is of the other sign.
        most_rows: Rows of the largest kernel with ``vectors`` vectors, by ``vectors`` − 1.
        rate: Multiply-adds of one core in a cycle.
        neon: Whether it is an instruction of Arm.
        deepest: The largest step that kernels may go on by instead; ``step`` where there is no other.
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
    neon: bool = False
    deepest: int = 0

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

    def stepping(self, depth: int) -> Dot:
        """The same with the largest step, if ``depth``, as it is filled up, is a multiple of it."""
        whole = self.deepest > self.step and self.depth(depth) % self.deepest == 0
        return dataclasses.replace(self, step=self.deepest) if whole else self


def dot_for(profile: Profile, a: str, b: str) -> Dot | None:
    """The best way ``profile`` has to multiply ``a`` by ``b``.

    Args:
        profile: The target.
        a: Element type of the left operand: ``uint8``, ``int8``, ``bfloat16``, ``float16`` or ``float32``.
        b: Element type of the right operand: ``int8``, ``bfloat16``, ``float16`` or ``float32``.

    Returns:
        ``None`` when there is none for this target or these types.
    """
    if profile.kind == "arm":
        return _neon_dot(profile, a, b)
    if profile.kind != "cpu" or profile.vector_bytes < 32:
        return None
    if (a, b) in (("uint8", "int8"), ("int8", "int8")):
        return _integer_dot(profile, a)
    if (a, b) == ("bfloat16", "bfloat16"):
        return _bf16_dot(profile)
    if (a, b) == ("float16", "float16"):  # sums in float16 would lose too much
        return _simple(profile, "fma", "float32", "float16", "float32", 1, 2)
    if a == "float32" and b in ("float32", "bfloat16", "int8"):
        return _simple(profile, "fma", "float32", b, "float32", 1, 1 if b == "float32" else 2)
    return None


def _neon_dot(profile: Profile, a: str, b: str) -> Dot | None:
    chosen = neon_choice(profile.features, a, b)
    if chosen is None:
        return None
    rows = tuple(rows_that_fit(chosen, profile.registers, vectors) for vectors in range(1, 5))
    rate = 2 * LANES * chosen.group
    types = (chosen.a, chosen.b, chosen.total)
    shift, deepest = chosen.shift, chosen.deepest
    return Dot(chosen.name, *types, chosen.group, LANES, chosen.step, rows, rate, shift, neon=True, deepest=deepest)


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
        return micro_kernel(self)

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


@dataclasses.dataclass(frozen=True)
class TilePhases:
    """An AMX micro-kernel in parts, so that other work can be done between its steps: the tiles keep the sums.

    Attributes:
        dot: The instruction.
        rows: Rows of the block, at most 32.
        vectors: Vectors of columns, at most 2.
        prefetch: Cache lines fetched ahead in every step.
        near: Whether every step also fetches rows of A into the first-level cache.
    """

    dot: Dot
    rows: int
    vectors: int
    prefetch: int = 0
    near: bool = False

    @property
    def whole(self) -> MicroKernel:
        """The same in one piece."""
        return MicroKernel(self.dot, self.rows, self.vectors, prefetch=self.prefetch)

    @property
    def name(self) -> str:
        """What the names of its functions start with."""
        return f"{self.whole.name}_{'near' if self.near else 'phase'}"

    def llvm(self) -> str:
        """The functions' text."""
        return tile_phases(self)

    def begin(self) -> Stmt:
        """The statement that clears the sums."""
        return tirx.Evaluate(tirx.call_extern("int32", f"{self.name}_begin"))

    def step(self, a: Expr, a_stride: int | Expr, b: Expr, ahead: Expr, near: Expr) -> Stmt:
        """The statement that goes on by ``dot.step`` elements of depth.

        Args:
            a: As for :meth:`MicroKernel.call`.
            a_stride: As there.
            b: As there.
            ahead: Address of what to fetch into the second-level cache.
            near: Address of the rows of A to fetch into the first-level cache: those of a step or two ahead.
        """
        return tirx.Evaluate(tirx.call_extern("int32", f"{self.name}_step", a, _number(a_stride), b, ahead, near))

    def end(self, c: Expr, c_stride: int | Expr) -> Stmt:
        """The statement that stores the sums."""
        return tirx.Evaluate(tirx.call_extern("int32", f"{self.name}_end", c, _number(c_stride)))


@dataclasses.dataclass(frozen=True)
class TilePanels:
    """An AMX kernel for one block of rows and panel after panel, each of 32 columns.

    A load that follows a store waits for it. So what the next products need is loaded before results are stored.

    Attributes:
        dot: The instruction.
        rows: Rows of the block, at most 32.
        steps: Steps of the depth. With one or two, all of A stays in tiles.
        accumulate: Whether the sums start from what C holds, and not from zero.
    """

    dot: Dot
    rows: int
    steps: int
    accumulate: bool = False

    @property
    def name(self) -> str:
        """Name of the function; equal for equal kernels only."""
        blocks, flag = -(-self.rows // TILE_ROWS), "_add" if self.accumulate else ""
        return f"mmopt_{self.dot.name}_panels_{blocks}x{self.steps}{flag}"

    def llvm(self) -> str:
        """The function's text."""
        return tile_panels(self)

    def call(self, c: Expr, c_stride: int, a: Expr, a_stride: int, b: Expr, b_stride: int, panels: int) -> Stmt:
        """The statement that computes all panels. Strides are in bytes.

        Args:
            c: Address of the first panel's sums; those of the next one stand beside them.
            c_stride: From one of its rows to the next.
            a: Address of the first row of A.
            a_stride: From one row of A to the next.
            b: Address of the first panel.
            b_stride: From one panel to the next.
            panels: How many.
        """
        strides = [_number(n) for n in (c_stride, a_stride, b_stride)]
        arguments = [c, strides[0], a, strides[1], b, strides[2], _number(panels)]
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


class Code(Protocol):
    """Something with functions in LLVM's language. Equal ones have equal text."""

    def llvm(self) -> str: ...


def importing(kernels: Iterable[Code], body: Stmt) -> Stmt:
    """``body`` with the code of ``kernels`` at hand."""
    wanted = list(dict.fromkeys(kernels))
    texts = [k.llvm() for k in wanted]
    if any(isinstance(k, MicroKernel | TilePhases | TilePanels) and k.dot.tiled for k in wanted):
        texts.append(tile_functions())
    for text in texts:
        body = tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", tvm.ir.StringImm(text), body)
    return body
