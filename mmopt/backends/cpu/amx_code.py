"""The text of AMX kernels in LLVM's language; see :mod:`mmopt.backends.cpu.dot`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmopt.backends.cpu.dot_code import KernelText, Writer

if TYPE_CHECKING:
    from mmopt.backends.cpu.dot import MicroKernel, TilePanels, TilePhases

TILE_ROWS = 16
"""Rows of an AMX tile."""

TILE_BYTES = 64
"""Bytes in a row of an AMX tile."""


class Tiles(KernelText):
    """Sums in AMX tiles 0 to 3, two rows of tiles by two columns; 4 and 5 hold A, 6 and 7 hold B."""

    def __init__(self, kernel: MicroKernel, writer: Writer) -> None:
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

    def one_step(self, near: bool) -> None:
        """A step by itself."""
        self._prefetch()
        if near:
            self._fetch_rows("%near")
        self.step("%ak", "%bk", [])

    def _fetch_rows(self, row: str) -> None:
        self.w.declare("void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        for _ in range(self.blocks * TILE_ROWS):
            self.w.line(f"  call void @llvm.prefetch.p0(ptr {row}, i32 0, i32 3, i32 1)")
            row = self.w.at(row, "%as")

    def finish(self, sums: Sequence[str]) -> None:
        for r, v in self._each():
            place = self.w.at(self._below("%c", "%cs", r), v * TILE_BYTES)
            self.w.line(f"  call void @llvm.x86.tilestored64(i8 {2 * r + v}, ptr {place}, i64 %cs)")


@functools.cache
def tile_phases(kernel: TilePhases) -> str:
    """Three functions: ``begin()``, ``step(a, stride of a, b, ahead, near)`` and ``end(c, stride of c)``."""
    w = Writer()
    whole = kernel.whole
    tiles = Tiles(whole, w)
    parts = (
        ("begin", "", lambda: tiles.start()),
        ("step", "ptr %ak, i32 %as32, ptr %bk, ptr %pk, ptr %near", lambda: tiles.one_step(kernel.near)),
        ("end", "ptr %c, i32 %cs32", lambda: tiles.finish([])),
    )
    for name, parameters, body in parts:
        w.line(f"define i32 @{kernel.name}_{name}({parameters}) alwaysinline {{")
        for stride in ("as", "cs"):
            if f"%{stride}32" in parameters:
                w.line(f"  %{stride} = sext i32 %{stride}32 to i64")
        body()
        w.line("  ret i32 0")
        w.line("}")
    return "\n".join([*w.lines, *w.declared, ""])


class _Panels:
    """The loop over panels of :func:`tile_panels`. B is in tiles 6 and 7, the sums of the first rows in 0, those of the
    second in 2; the others hold more of them, or of A."""

    def __init__(self, kernel: TilePanels) -> None:
        self.kernel, self.w = kernel, Writer()
        self.blocks = range(-(-kernel.rows // TILE_ROWS))
        self.name = kernel.dot.name

    def write(self) -> str:
        w = self.w
        w.line(
            f"define i32 @{self.kernel.name}(ptr %c, i32 %cs32, ptr %a, i32 %as32, ptr %b, i32 %bs32, i32 %panels32) "
            "alwaysinline {"
        )
        w.line("entry:")
        for name in ("cs", "as", "bs", "panels"):
            w.line(f"  %{name} = sext i32 %{name}32 to i64")
        self.enter()
        w.line("  br label %panel")
        w.line("panel:")
        w.line("  %p = phi i64 [ 0, %entry ], [ %p1, %panel ]")
        w.line("  %bk = phi ptr [ %b, %entry ], [ %bnext, %panel ]")
        w.line("  %ck = phi ptr [ %c, %entry ], [ %c1, %panel ]")
        w.line("  %p1 = add i64 %p, 1")
        w.line("  %more = icmp ult i64 %p1, %panels")
        w.line("  %bahead = getelementptr i8, ptr %bk, i64 %bs")
        w.line("  %bnext = select i1 %more, ptr %bahead, ptr %bk")
        self.panel()
        w.line(f"  %c1 = getelementptr i8, ptr %ck, i64 {2 * TILE_BYTES}")
        w.line("  br i1 %more, label %panel, label %done")
        w.line("done:")
        w.line("  ret i32 0")
        w.line("}")
        for name, arguments in (("tilezero", "i8 immarg"), ("tileloadd64", "i8 immarg, ptr, i64")):
            w.declare(f"void @llvm.x86.{name}({arguments})")
        w.declare("void @llvm.x86.tilestored64(i8 immarg, ptr, i64)")
        w.declare(f"void @llvm.x86.{self.name}(i8 immarg, i8 immarg, i8 immarg)")
        return "\n".join([*w.lines, *w.declared, ""])

    def enter(self) -> None:
        """What is loaded before the first panel."""
        raise NotImplementedError

    def panel(self) -> None:
        """The products of a panel, and the first loads of the next."""
        raise NotImplementedError

    def load(self, tile: int, place: str, stride: str | int) -> None:
        self.w.line(f"  call void @llvm.x86.tileloadd64(i8 {tile}, ptr {place}, i64 {stride})")

    def load_b(self, tile: int, panel: str, step: int, column: int) -> None:
        offset = step * TILE_ROWS * 2 * TILE_BYTES + column * TILE_BYTES
        self.load(tile, self.w.at(panel, offset), 2 * TILE_BYTES)

    def load_a(self, tile: int, block: int, step: int) -> None:
        self.load(tile, self.w.at(self.below("%a", "%as", block), step * TILE_BYTES), "%as")

    def place(self, block: int, column: int) -> str:
        """Where the sums of a tile belong."""
        return self.w.at(self.below("%ck", "%cs", block), column * TILE_BYTES)

    def below(self, base: str, stride: str, block: int) -> str:
        return self.w.at(base, self.w.let(f"mul i64 {stride}, {TILE_ROWS * block}")) if block else base

    def begin(self, tile: int, block: int, column: int) -> None:
        if self.kernel.accumulate:
            self.load(tile, self.place(block, column), "%cs")
        else:
            self.w.line(f"  call void @llvm.x86.tilezero(i8 {tile})")

    def multiply(self, total: int, a: int, b: int) -> None:
        self.w.line(f"  call void @llvm.x86.{self.name}(i8 {total}, i8 {a}, i8 {b})")

    def store(self, tile: int, block: int, column: int) -> None:
        self.w.line(f"  call void @llvm.x86.tilestored64(i8 {tile}, ptr {self.place(block, column)}, i64 %cs)")


class _ShallowPanels(_Panels):
    """All of A in tiles: 1 and 4 hold the first rows, 3 and 5 the second; half a panel at a time."""

    held = ((1, 4), (3, 5))

    def enter(self) -> None:
        for block in self.blocks:
            for step in range(self.kernel.steps):
                self.load_a(self.held[block][step], block, step)
        self._fetch("%b", 0)

    def panel(self) -> None:
        for column in (0, 1):
            for block in self.blocks:
                self.begin(2 * block, block, column)
            for step in range(self.kernel.steps):
                for block in self.blocks:
                    self.multiply(2 * block, self.held[block][step], 6 + step)
            self._fetch("%bk", 1) if column == 0 else self._fetch("%bnext", 0)
            for block in self.blocks:
                self.store(2 * block, block, column)

    def _fetch(self, panel: str, column: int) -> None:
        for step in range(self.kernel.steps):
            self.load_b(6 + step, panel, step, column)


class _DeepPanels(_Panels):
    """Sums in tiles 0 to 3, two rows of tiles by two columns; 4 and 5 hold A."""

    def enter(self) -> None:
        self._fetch("%b", 0)

    def panel(self) -> None:
        tiles = [(block, column) for block in self.blocks for column in (0, 1)]
        for block, column in tiles:
            self.begin(2 * block + column, block, column)
        for step in range(self.kernel.steps):
            for block, column in tiles:
                self.multiply(2 * block + column, 4 + block, 6 + column)
            following = step + 1
            self._fetch("%bk", following) if following < self.kernel.steps else self._fetch("%bnext", 0)
        for block, column in tiles:
            self.store(2 * block + column, block, column)

    def _fetch(self, panel: str, step: int) -> None:
        for column in (0, 1):
            self.load_b(6 + column, panel, step, column)
        for block in self.blocks:
            self.load_a(4 + block, block, step)


@functools.cache
def tile_panels(kernel: TilePanels) -> str:
    """A function of c, stride of c, a, stride of a, b, stride of b, panels."""
    shallow = kernel.steps <= 2 and not kernel.accumulate
    return (_ShallowPanels if shallow else _DeepPanels)(kernel).write()


@functools.cache
def tile_functions() -> str:
    """Functions that shape and release tiles: palette 1, rows at byte 48 + n, bytes of a row at 16 + 2n."""
    w = Writer()
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
