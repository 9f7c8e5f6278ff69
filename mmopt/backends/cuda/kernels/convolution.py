"""Convolutions on tensor cores: filters times windows, which are put together as they are loaded ("implicit GEMM")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.compute import LoopNest, Sink, Source
from mmopt.backends.cpu.kernels.conv import Window
from mmopt.backends.cpu.loops import i64, product, split_index, when
from mmopt.backends.cuda.kernels.product import Tile, as_int, call, tile_statement
from mmopt.backends.cuda.launching import unless_empty
from mmopt.backends.cuda.threads import launch
from mmopt.backends.expressions import itemsize, simplify


class TensorConvolution(LoopNest):
    """``y[n, o, p…] = Σ w[o, c, t…] · x[n, c, window(p, t)…]`` over one or two axes, without groups.

    Args:
        x: ``[N, C, space…]``.
        filters: ``[O, padded]``: C · taps of each filter, with zeros behind.
        depth: C · taps.
        window: Taps, strides, dilations.
        before: Padding in front of each axis.
        space: Extents of the result.
        tile: What a block computes: filters times pixels.
        fill: What padding is, of 8-bit integers.
    """

    name = "tensor_convolution"

    def __init__(
        self,
        x: Source,
        filters: Source,
        *,
        depth: int,
        window: Window,
        before: Sequence[Expr],
        space: Sequence[Expr],
        tile: Tile,
        fill: Expr | None = None,
    ) -> None:
        super().__init__()
        self.x, self.filters, self.inputs = x, filters, (x, filters)
        self.depth, self.window, self.before, self.tile = depth, window, tuple(before), tile
        self.fill = i64(0) if fill is None else fill
        self.total = "int32" if itemsize(x.dtype) == 1 else "float32"
        self.output = self.result((x.shape[0], filters.shape[0], *space), self.total, "conv")

    def parameters(self) -> dict[str, object]:
        """Template parameters, for reports."""
        return {
            "channels": self.tile.rows,
            "pixels": self.tile.columns,
            "stages": self.tile.stages,
            "type": self.x.dtype,
        }

    def emit(self, kernel: Any, sinks: Sequence[Sink]) -> Stmt:
        tile, channels = self.tile, self.output.shape[1]
        grid = (self.output.shape[0], *self.output.shape[2:])
        pixels = simplify(product(grid))
        across = simplify(tirx.floordiv(pixels + (tile.columns - 1), i64(tile.columns)))
        down = simplify(tirx.floordiv(channels + (tile.rows - 1), i64(tile.rows)))

        def block(number: Expr, thread: Expr) -> Stmt:
            row = tirx.floordiv(number, across) * tile.rows
            column = tirx.floormod(number, across) * tile.columns

            def store(r: Expr, c: Expr, value: Expr) -> Stmt:
                image, *at = split_index(column + c, grid)
                write = sinks[0]((image, row + r, *at), value)
                return when(tirx.all(row + r < channels, column + c < pixels), write)

            def multiply(total: Expr, memory: Expr) -> Stmt:
                return self._multiply(kernel, total, memory, row, column, pixels)

            return tile_statement(tile, self.total, thread, multiply, store)

        count = simplify(across * down)
        return unless_empty(count, launch([count], tile.threads, block))

    def _multiply(self, kernel: Any, total: Expr, memory: Expr, row: Expr, column: Expr, pixels: Expr) -> Stmt:
        padded = self.filters.shape[1]
        filters = kernel.places[self.filters].buffer.data
        left = tirx.handle_add_byte_offset(filters, row * padded * itemsize(self.filters.dtype))
        data = kernel.places[self.x].buffer.data
        image = simplify(product(self.x.shape[1:]))
        taps = ", ".join(map(str, _plane(self.window.kernel, 1)))
        function = f"mmopt_rows_by_windows<{self.tile.parameters(self.filters.dtype, self.x.dtype)}, {taps}>"
        sizes = [self.filters.shape[0] - row, i64(self.depth), padded, column, pixels]
        extents = [*_plane(self.x.shape[2:], i64(1)), *_plane(self.output.shape[2:], i64(1))]
        steps = [*_plane(self.window.strides, 1), *_plane(self.window.dilations, 1)]
        given = [*sizes, *extents, *map(i64, steps), *_plane(self.before, i64(0)), self.fill]
        return call(function, total, memory, left, data, padded, image, *map(as_int, given))


def _plane(values: Sequence[Any], missing: Any) -> tuple[Any, Any]:
    """One or two values as two: an axis that is not there comes first."""
    return (missing, values[0]) if len(values) == 1 else (values[0], values[1])
