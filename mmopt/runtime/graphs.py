"""CUDA graphs: what a function launches is recorded once and repeated as a whole, which takes one call of the driver.

Recording sees launches in a row. Where the artifact says which of them have to wait for which, the row is taken apart
accordingly, so that kernels of different towers, or of branches within one, may run at the same time.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from mmopt.errors import BackendError
from mmopt.runtime.artifact import Order

_RELAXED = 2  # cudaStreamCaptureModeRelaxed: memory may be allocated meanwhile
_Handle = ctypes.c_void_p

T = TypeVar("T")


class GraphRuntime:
    """The functions of NVIDIA's runtime that record what is launched, and a stream to do it on.

    Args:
        library: ``libcudart``, of CUDA 13.

    Raises:
        BackendError: There is no stream to be had.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self._stream = _Handle()
        self._call("cudaStreamCreate", ctypes.byref(self._stream))
        weakref.finalize(self, library.cudaStreamDestroy, self._stream).atexit = False

    @property
    def stream(self) -> int:
        """Where to launch what is to be recorded."""
        return self._stream.value or 0

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            why = self._library.cudaGetErrorString(code)
            raise BackendError(f"{name} failed: {why.decode() if why else code}")

    def record(self, work: Callable[[], T], order: Order = ()) -> tuple[Recording, T]:
        """Record what ``work`` launches on :attr:`stream`. Nothing runs meanwhile.

        Args:
            work: Launches kernels.
            order: What waits for what; as launched when empty, or when it does not tell of as many launches.

        Returns:
            The recording, and what ``work`` gave.

        Raises:
            BackendError: Something cannot be recorded.
        """
        with self._captured() as graph:
            result = work()
        try:
            row = self._row(graph)
            if order and len(row) == sum(count for count, _ in order):
                self._rearrange(graph, row, order)
            runnable = _Handle()
            self._call("cudaGraphInstantiate", ctypes.byref(runnable), graph, ctypes.c_ulonglong(0))
        finally:
            self._library.cudaGraphDestroy(graph)
        return Recording(self, runnable), result

    @contextlib.contextmanager
    def _captured(self) -> Iterator[ctypes.c_void_p]:
        graph = _Handle()
        self._call("cudaStreamBeginCapture", self._stream, _RELAXED)
        try:
            yield graph
        except BaseException:
            if not self._library.cudaStreamEndCapture(self._stream, ctypes.byref(graph)) and graph:
                self._library.cudaGraphDestroy(graph)
            raise
        self._call("cudaStreamEndCapture", self._stream, ctypes.byref(graph))

    def _row(self, graph: ctypes.c_void_p) -> list[int]:
        """The nodes of ``graph`` in the order in which they were recorded; none when they are not a row."""
        count = ctypes.c_size_t()
        self._call("cudaGraphGetEdges", graph, None, None, None, ctypes.byref(count))
        sources, targets = (_Handle * count.value)(), (_Handle * count.value)()
        if count.value:
            self._call("cudaGraphGetEdges", graph, sources, targets, None, ctypes.byref(count))
        number = ctypes.c_size_t(1)
        first = (_Handle * 1)()
        self._call("cudaGraphGetRootNodes", graph, first, ctypes.byref(number))
        follows = dict(zip(sources, targets, strict=True))
        row = [first[0]] if number.value == 1 and first[0] else []
        while row and row[-1] in follows:
            row.append(follows.pop(row[-1]))
        return [node for node in row if node is not None] if not follows else []

    def _rearrange(self, graph: ctypes.c_void_p, row: Sequence[int], order: Order) -> None:
        """Replace the edges between steps by those that ``order`` asks for; those within steps stay."""
        cut, added = edges(order)
        for name, pairs in (("cudaGraphRemoveDependencies", cut), ("cudaGraphAddDependencies", added)):
            if pairs:
                sources, targets = ((_Handle * len(pairs))(*(row[p[side]] for p in pairs)) for side in (0, 1))
                self._call(name, graph, sources, targets, None, ctypes.c_size_t(len(pairs)))

    def launch(self, runnable: ctypes.c_void_p) -> None:
        """Do once more what was recorded."""
        self._call("cudaGraphLaunch", runnable, self._stream)

    def destroyer(self) -> Callable[[ctypes.c_void_p], int]:
        """What frees a recording."""
        return self._library.cudaGraphExecDestroy


class Recording:
    """Launches that can be repeated."""

    def __init__(self, runtime: GraphRuntime, runnable: ctypes.c_void_p) -> None:
        self._runtime, self._runnable = runtime, runnable
        weakref.finalize(self, runtime.destroyer(), runnable).atexit = False

    def run(self) -> None:
        """Start all of it; returns at once."""
        self._runtime.launch(self._runnable)


def edges(order: Order) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What to change in a row of launches so that they keep ``order`` and no more.

    Returns:
        Pairs of neighbours in the row that need not follow each other, and pairs that have to instead.
    """
    needed: set[tuple[int, int]] = set()
    between: set[tuple[int, int]] = set()
    ends: list[tuple[int, ...]] = []  # of each step the launches to wait for
    start = 0
    for count, after in order:
        before = tuple(dict.fromkeys(end for step in after for end in ends[step]))
        if count:
            needed.update((end, start) for end in before)
            if start:
                between.add((start - 1, start))
        ends.append((start + count - 1,) if count else before)
        start += count
    return sorted(between - needed), sorted(needed - between)
