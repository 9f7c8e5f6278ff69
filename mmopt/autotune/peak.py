"""What this machine can do at most, measured in the same run as the kernels that are judged by it.

Arithmetic: the micro-kernels that templates are made of, on operands that stay in the first-level cache. Memory: the
sum of an array far larger than the caches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import Stmt

from mmopt.backends.cpu.dot import Dot, MicroKernel, address, configure_tiles, dot_for, importing, release_tiles
from mmopt.backends.cpu.loops import i64, loop, seq
from mmopt.backends.cpu.pipeline import code_generation, target_of
from mmopt.backends.expressions import itemsize
from mmopt.backends.profile import Profile
from mmopt.runtime.libraries import load_runtime
from mmopt.runtime.native import ThreadPoolSize
from mmopt.runtime.tensors import Converter, aligned_empty

KINDS = {"float32": ("float32", "float32"), "bfloat16": ("bfloat16", "bfloat16"), "int8": ("uint8", "int8")}
"""Kinds of arithmetic, and the operands they are measured with."""

REPEATS = 12
"""Measurements of each peak; the best one is the peak."""

_CYCLES = 3e7
"""Cycles that one measurement of arithmetic should take: long enough for threads to wake up."""

_RESIDENT = 40 << 10
"""Bytes of operands that stay in the first-level cache."""

_STREAM_BYTES = 256 << 20
_PIECES, _LANES = 256, 64


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Peaks of the machine.

    Attributes:
        operations: Operations a second by kind (a key of :data:`KINDS`), for those the target has instructions for.
        bandwidth: Bytes a second read from memory.
        cycles: Cycles a second of one core while it multiplies.
        threads: Threads they were measured with.
    """

    operations: dict[str, float]
    bandwidth: float
    cycles: float
    threads: int

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dataclasses.asdict(self)


def kind_of(dtypes: Sequence[str]) -> str:
    """The kind of arithmetic (a key of :data:`KINDS`) that products of operands of ``dtypes`` use."""
    operands = set(dtypes[:2])
    if operands and operands <= {"int8", "uint8"}:
        return "int8"
    return "bfloat16" if operands == {"bfloat16"} else "float32"


def measure_peaks(profile: Profile, threads: int, kinds: Sequence[str] = ("float32",)) -> Peaks:
    """Measure the machine this runs on, which must have what ``profile`` has.

    Args:
        profile: What to generate code for.
        threads: Threads to use, as many as the kernels that are compared with the peak.
        kinds: Kinds of arithmetic, of :data:`KINDS`; ``float32`` is always measured.
    """
    dots = {kind: dot_for(profile, *KINDS[kind]) for kind in dict.fromkeys(("float32", *kinds))}
    found = {kind: dot for kind, dot in dots.items() if dot is not None}
    with _compiled(profile, {**{k: _arithmetic(d, threads) for k, d in found.items()}, "memory": _memory()}) as library:
        pool = ThreadPoolSize(load_runtime(), threads)
        operations = {kind: _operations(library[kind], dot, threads, pool) for kind, dot in found.items()}
        bandwidth = _bandwidth(library["memory"], pool)
    rate = found["float32"].rate if "float32" in found else 1
    return Peaks(operations, bandwidth, operations.get("float32", 0.0) / (2 * rate * threads), threads)


@contextlib.contextmanager
def _compiled(profile: Profile, functions: dict[str, tirx.PrimFunc]) -> Iterator[Any]:
    target = target_of(profile)
    module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in functions.items()})
    with tempfile.TemporaryDirectory(prefix="mmopt-") as folder:
        path = pathlib.Path(folder, "peaks.so")
        with target, code_generation():
            tvm.compile(module, target=target).export_library(str(path))
        yield load_runtime().load_module(str(path))


@dataclasses.dataclass(frozen=True)
class _Block:
    """What one call of a micro-kernel multiplies."""

    dot: Dot

    @property
    def rows(self) -> int:
        return self.dot.most_rows[-1]

    @property
    def columns(self) -> int:
        return self.dot.vectors * self.dot.lanes

    @property
    def steps(self) -> int:
        each = self.dot.step * (self.rows * itemsize(self.dot.a) + self.columns * itemsize(self.dot.b))
        return _RESIDENT // each

    @property
    def depth(self) -> int:
        return self.steps * self.dot.step

    @property
    def multiply_adds(self) -> int:
        return self.rows * self.columns * self.depth

    @property
    def calls(self) -> int:
        return max(1, int(_CYCLES * self.dot.rate / self.multiply_adds))

    def sizes(self, threads: int) -> tuple[int, int, int]:
        """Bytes of the operands and of every thread's sums."""
        a, b = self.rows * itemsize(self.dot.a), self.columns * itemsize(self.dot.b)
        return a * self.depth, b * self.depth, threads * self.rows * self.columns * 4


def _arithmetic(dot: Dot, threads: int) -> tirx.PrimFunc:
    """Every thread multiplies one block by one panel, again and again. The micro-kernel takes addresses, so that its
    operands are plain bytes."""
    block = _Block(dot)
    rows, columns = block.rows, block.columns
    kernel = MicroKernel(dot, rows, dot.vectors)
    a, b, c = (tirx.decl_buffer((i64(n),), "uint8", name) for n, name in zip(block.sizes(threads), "abc", strict=True))
    stride = block.depth * itemsize(dot.a)

    def thread(t: Expr) -> Stmt:
        place = address(c[t * (rows * columns * 4)])
        call = kernel.call(place, 4 * columns, address(a[i64(0)]), stride, address(b[i64(0)]), block.steps)
        work = loop(block.calls, lambda _: call, name="again")
        return seq(configure_tiles(rows), work, release_tiles()) if dot.tiled else work

    return _function([a, b, c], importing([kernel], loop(threads, thread, "parallel", "t")))


def _operations(function: Any, dot: Dot, threads: int, pool: ThreadPoolSize) -> float:
    block = _Block(dot)
    seconds = _best(function, [aligned_empty(size) for size in block.sizes(threads)], pool)
    return 2.0 * block.multiply_adds * block.calls * threads / seconds


def _memory() -> tirx.PrimFunc:
    """The sum of a long array, in pieces that all threads share."""
    pieces, lanes, each = _PIECES, _LANES, _STREAM_BYTES // 4 // _PIECES // _LANES
    x = tirx.decl_buffer((i64(pieces), i64(each), i64(lanes)), "float32", "x")
    y = tirx.decl_buffer((i64(pieces), i64(lanes)), "float32", "y")

    def piece(p: Expr) -> Stmt:
        acc = tirx.decl_buffer((i64(lanes),), "float32", "acc")

        def vector(make: Callable[[Expr], Stmt]) -> Stmt:
            return loop(lanes, make, "vectorized", "v")

        clear = vector(lambda v: tirx.BufferStore(acc, tirx.const(0.0, "float32"), [v]))
        add = loop(each, lambda i: vector(lambda v: tirx.BufferStore(acc, acc[v] + x[p, i, v], [v])))
        return seq(tirx.AllocBuffer(acc), clear, add, vector(lambda v: tirx.BufferStore(y, acc[v], [p, v])))

    return _function([x, y], loop(pieces, piece, "parallel", "p"))


def _function(params: list[tirx.Buffer], body: Stmt) -> tirx.PrimFunc:
    attributes = {"tirx.noalias": True, "s_tir": True, "tirx.is_scheduled": True}
    return tirx.PrimFunc(params, body).with_attr(attributes)


def _bandwidth(function: Any, pool: ThreadPoolSize) -> float:
    x, y = aligned_empty(_STREAM_BYTES), aligned_empty(_PIECES * _LANES * 4)
    shaped = x.view(np.float32).reshape(_PIECES, -1, _LANES), y.view(np.float32).reshape(_PIECES, _LANES)
    return _STREAM_BYTES / _best(function, shaped, pool)


def _best(function: Any, arrays: Sequence[np.ndarray], pool: ThreadPoolSize) -> float:
    """Seconds of the quickest call."""
    convert = Converter(load_runtime())
    for array in arrays:
        array[...] = 0  # so that the memory is there
    arguments = [convert.to_tvm(array) for array in arrays]

    def timed() -> float:
        begun = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - begun

    return min(pool.call(timed) for _ in range(REPEATS))
