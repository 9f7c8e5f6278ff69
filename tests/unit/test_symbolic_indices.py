"""Kernels of sizes known at run time only compute places once, and not in every index."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tvm import tirx
from tvm.ir import Expr, TensorLoad

from mmopt.backends.compute import LoopNest, Source
from mmopt.backends.cpu.emit import KernelEmitter
from mmopt.backends.cpu.kernels.conv import Window
from mmopt.backends.cpu.kernels.conv_direct import DirectConvolution
from mmopt.backends.cpu.kernels.conv_patches import Patch
from mmopt.backends.cpu.kernels.matmul import Matmul
from mmopt.backends.cpu.kernels.matmul_blocking import Blocking
from mmopt.backends.cpu.kernels.tile import Tile
from mmopt.backends.expressions import nodes
from tests.kernels import profiles


def _convolution() -> LoopNest:
    batch, samples = tirx.Var("batch", "int64"), tirx.Var("samples", "int64")
    frames = tirx.floordiv(samples - 192, tirx.const(128, "int64")) + 3
    x, filters = Source([batch, 8, frames, 16], "float32", "x"), Source([2, 8, 3, 16, 32], "float32", "w")
    patch = Patch(height=1, width=4, vectors=2, lanes=16, parts=2)
    window = Window((3,), (2,), (1,))
    return DirectConvolution(x, filters, channels=64, groups=1, block=16, window=window, patch=patch, plain=False)


def _product() -> LoopNest:
    batch, rows = tirx.Var("batch", "int64"), tirx.Var("rows", "int64")
    a, b = Source([batch, rows, 64], "float32", "a"), Source([2, 64, 32], "float32", "b")
    blocking = Blocking(Tile(4, 2, 16), panels=1, tiles=8)
    size = tirx.const(64, "int64")
    return Matmul(a, b, batch=[batch], rows=rows, columns=size, depth=size, blocking=blocking, panels=True)


def _runtime_divisions(expression: Expr) -> int:
    divisions = (n for n in nodes(expression) if isinstance(n, tirx.FloorDiv | tirx.FloorMod))
    return sum(not isinstance(n.b, tirx.IntImm) for n in divisions)


def _indices(node: tirx.Stmt | None) -> Iterator[Expr]:
    """All places that ``node`` reads from or stores to."""
    if isinstance(node, tirx.BufferStore):
        yield from node.indices
        yield from (i for part in nodes(node.value) if isinstance(part, TensorLoad) for i in part.indices)
    elif isinstance(node, tirx.SeqStmt):
        for part in node.seq:
            yield from _indices(part)
    elif isinstance(node, tirx.IfThenElse):
        yield from _indices(node.then_case)
        yield from _indices(node.else_case)
    else:
        yield from _indices(getattr(node, "body", None)) if node is not None else ()


@pytest.mark.parametrize("nest", [_convolution, _product])
def test_no_index_divides_by_a_size(nest: Callable[[], LoopNest]) -> None:
    """Such divisions in the index of every multiply-add take TVM's simplifier a minute for a small model."""
    emitted = nest()
    function = KernelEmitter(emitted.results, profiles()["x86-64-v3"]).build().function
    found = list(_indices(function.body))
    assert len(found) > 100
    assert not any(map(_runtime_divisions, found))
