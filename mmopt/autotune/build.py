"""Compiles candidates in processes of their own, several at a time."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import pathlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

from mmopt.backends.profile import Profile

TIMEOUT = 120.0
"""Seconds after which the compilation of one kernel is given up."""


def compile_kernel(function: str, profile: Profile, path: str, spills: bool = False) -> None:
    """Compile one TIR function, given as JSON, to a shared library. Runs in a process of its own.

    Args:
        function: The function.
        profile: What to compile for.
        path: Where the library goes.
        spills: A kernel of a GPU may spill registers.
    """
    import tvm

    if profile.kind == "cuda":
        from mmopt.backends.cuda.pipeline import build_kernel

        pathlib.Path(path).write_bytes(build_kernel(tvm.ir.load_json(function), profile, spills=spills))
        return
    from mmopt.backends.cpu import intrinsics
    from mmopt.backends.cpu.pipeline import code_generation, target_of

    intrinsics.register()
    target = target_of(profile)
    with target, code_generation():
        built = tvm.compile(tvm.IRModule({"kernel": tvm.ir.load_json(function)}), target=target)
    built.export_library(path)


def _prepare() -> None:
    """Import the compiler without torch, and leave one core's worth of threads to it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from mmopt.runtime.libraries import without_torch

    with without_torch():
        import tvm  # noqa: F401


class Builders:
    """A pool of compiling processes. A context manager.

    Args:
        profile: What to compile for.
        folder: Where libraries go.
        jobs: Processes.
    """

    def __init__(self, profile: Profile, folder: pathlib.Path, jobs: int) -> None:
        self._profile, self._folder, self._jobs = profile, folder, jobs
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._count = 0
        self._spilling: Collection[int] = ()

    def __enter__(self) -> Builders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def build(self, functions: Sequence[str], spilling: Collection[int] = ()) -> list[tuple[str, str]]:
        """For every function the name of its library, or "" and why there is none.

        Args:
            functions: TIR functions as JSON.
            spilling: Numbers of those that may spill registers of a GPU.
        """
        self._spilling = spilling
        names = [f"{self._count + n}.so" for n in range(len(functions))]
        self._count += len(functions)
        results: dict[int, str] = {}
        waiting = list(range(len(functions)))
        together = True
        while waiting:
            batch = waiting if together else waiting[:1]
            for index, why in self._attempt(batch, functions, names):
                results[index] = why
            lost = [index for index in batch if index not in results]
            if lost and not together:
                results[lost[0]] = "the compiler crashed"
            together = not lost
            waiting = [index for index in waiting if index not in results]
        return [("" if results[index] else names[index], results[index]) for index in range(len(functions))]

    def _attempt(
        self, batch: Sequence[int], functions: Sequence[str], names: Sequence[str]
    ) -> Iterator[tuple[int, str]]:
        """Index and error ("" when there is none) of those that came to an end before a process crashed."""
        pool = self._running()
        paths = {index: str(self._folder / names[index]) for index in batch}
        jobs = {
            n: pool.submit(compile_kernel, functions[n], self._profile, path, n in self._spilling)
            for n, path in paths.items()
        }
        for index, job in jobs.items():
            try:
                job.result(TIMEOUT)
                yield index, ""
            except BrokenProcessPool:
                self._stop()
                return
            except concurrent.futures.TimeoutError:
                yield index, f"compiling took more than {TIMEOUT:.0f} s"
                self._stop()
                return
            except Exception as error:  # TVM raises all sorts; the candidate is out either way
                yield index, f"{type(error).__name__}: {error}".splitlines()[0]

    def _running(self) -> concurrent.futures.ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(self._jobs, context, _prepare)
        return self._pool

    def _stop(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
