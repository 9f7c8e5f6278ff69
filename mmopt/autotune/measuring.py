"""Times compiled kernels with nothing but numpy, tvm_ffi and TVM's runtime libraries.

This file stands alone: `mmopt tune --export` copies it into the exported folder as ``measure.py``, and a machine
without a compiler runs it there (``python measure.py``); mmopt itself runs it in a process of its own, so that a kernel
that crashes takes nothing else along.

A *task* is a dict: ``candidates``, each with ``kernels`` (``library``, ``function``, ``calls``, ``arguments``),
``threads``, and ``device``, which is ``cpu`` or ``cuda``. An argument is
``{"symbol": 7}`` or ``{"role": "input"|"weight"|"output", "dtype": …, "shape": […]}``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import itertools
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Task = Mapping[str, Any]
Result = dict[str, Any]

TURN_SECONDS = 0.01
"""Length of one turn of one candidate."""

TURNS = 10
"""Turns of every candidate."""

HOPELESS = 1.3
"""A candidate this much slower than the best after :data:`FIRST_TURNS` turns gets no more of them."""

FIRST_TURNS = 3

TIMEOUT = 120.0
"""Seconds without a word after which a candidate counts as hung."""

RESULTS = "results.jsonl"

_SPECIAL_THREADS = -3  # ThreadGroup::kSpecifyThreadShareAllCore of TVM: no thread is bound to one core
_MOST_COPIES = 512


def cold_bytes() -> int:
    """Bytes of weights to cycle through, so that none is in a cache when its turn comes."""
    sizes = [64 << 20]
    for folder in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        with contextlib.suppress(OSError, ValueError):
            text = (folder / "size").read_text().strip()
            sizes.append(2 * int(text.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return min(max(sizes), 512 << 20)


class Gpu:
    """The first NVIDIA GPU of this machine, as the driver knows it.

    Attributes:
        sm: Compute capability, as 10 · major + minor; 0 where there is no GPU, or no driver.
        name: What it is called.
        l2_bytes: Size of its cache.
    """

    def __init__(self) -> None:
        self.sm, self.name, self.l2_bytes = 0, "", 0
        device = ctypes.c_int()
        try:
            self._driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        except OSError:
            return
        if self._driver.cuInit(0) or self._driver.cuDeviceGet(ctypes.byref(device), 0):
            return
        text = ctypes.create_string_buffer(256)
        self._driver.cuDeviceGetName(text, len(text), device)
        self.sm = 10 * self._fact(75, device) + self._fact(76, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
        self.name, self.l2_bytes = text.value.decode(errors="replace"), self._fact(38, device)  # …_L2_CACHE_SIZE

    def _fact(self, attribute: int, device: ctypes.c_int) -> int:
        value = ctypes.c_int()
        self._driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        return value.value


def refusal(target: Task) -> str:
    """Why candidates for ``target`` cannot be measured here, or ""."""
    if target.get("kind") != "cuda":
        return ""
    gpu, wanted = Gpu(), int(target["sm"])
    if not gpu.sm:
        return f"these candidates are for {target['name']}; there is no NVIDIA GPU here, or no driver for it"
    if gpu.sm < wanted:
        return f"these candidates are for {target['name']} (sm_{wanted}); the GPU here, {gpu.name}, is sm_{gpu.sm}"
    return ""


def machine_name(device: str = "cpu") -> str:
    """The processor, as the system calls it; with ``cuda`` the GPU, as its driver does."""
    if device == "cuda":
        return Gpu().name
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def load_runtime(folder: str | os.PathLike[str] | None = None) -> Any:
    """``tvm_ffi`` with TVM's runtime libraries, from ``folder`` or the installed wheel. Torch is not imported."""
    missing: Any = None
    hidden = sys.modules.setdefault("torch", missing) is None
    import tvm_ffi

    if hidden:
        del sys.modules["torch"]
    if tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True) is None:
        for path in _runtime_libraries(folder):
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    if sys.platform == "linux" and platform.machine() == "x86_64":
        ctypes.CDLL(None).syscall(158, 0x1023, 18)  # asks for AMX tiles; refused where there are none
    return tvm_ffi


def load_cuda_runtime(ffi: Any, folder: str | os.PathLike[str] | None = None) -> None:
    """TVM's runtime for GPUs and NVIDIA's, beside what :func:`load_runtime` has loaded."""
    if ffi.get_global_func("ffi.Module.load_from_bytes.cuda", allow_missing=True) is not None:
        return
    library = next(iter(_runtime_libraries(folder))).with_name("libtvm_runtime_cuda.so")
    if not library.exists():
        raise SystemExit(f"{library} is not there: install apache-tvm, or give its folder with --runtime")
    spec = importlib.util.find_spec("nvidia")
    places = [pathlib.Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    for dependency in [path for place in places for path in sorted(place.glob("cu*/lib/libcudart.so.*"))[:1]]:
        ctypes.CDLL(str(dependency), ctypes.RTLD_GLOBAL)
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise SystemExit(f"{error}: install nvidia-cuda-runtime and NVIDIA's driver") from error


def _runtime_libraries(folder: str | os.PathLike[str] | None) -> list[pathlib.Path]:
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    names = ["libtvm_runtime" + suffix, "libtvm_runtime_extra" + suffix]
    folders = [pathlib.Path(folder)] if folder else []
    spec = importlib.util.find_spec("tvm")
    folders += [pathlib.Path(place, "lib") for place in (spec.submodule_search_locations or ())] if spec else []
    for place in folders:
        if (place / names[0]).exists():
            return [place / name for name in names if (place / name).exists()]
    raise SystemExit(f"{names[0]} is not there: install apache-tvm, or give its folder with --runtime")


class Memory:
    """Arguments of kernels. Weights are pieces of one large area; every call gets the next ones.

    Attributes:
        sticky: Whether an error of one kernel makes all that come later fail, and rows of calls are recorded: a GPU.
    """

    sticky = False

    def __init__(self, ffi: Any) -> None:
        self.ffi = ffi
        self.view = ffi.get_global_func("runtime.TVMTensorCreateView")
        self.area = self._aligned(cold_bytes())
        self.fill(self.area)

    def wait(self) -> None:
        """Until all kernels that were called are done."""

    def row(self, function: Any, lists: Iterator[list[Any]], repeats: int) -> Callable[[], None]:
        """What calls ``function`` so often, with the next arguments each time."""
        todo = list(itertools.islice(lists, repeats))

        def run() -> None:
            for arguments in todo:
                function(*arguments)

        return run

    @staticmethod
    def _aligned(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        raw = np.empty(nbytes + 128, np.uint8)
        start = -raw.__array_interface__["data"][0] % 64
        return raw[start : start + max(nbytes, 1)]

    @staticmethod
    def fill(area: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Numbers that are of ordinary size in every floating-point format: 0x3f in every second byte."""
        halves = area[: len(area) // 2 * 2].view(np.uint16)
        low = np.random.default_rng(0).integers(0, 256, 1 << 16, np.uint16)
        pattern = low | np.uint16(0x3F00)
        whole = len(halves) // len(pattern) * len(pattern)
        halves[:whole].reshape(-1, len(pattern))[...] = pattern
        halves[whole:] = pattern[: len(halves) - whole]

    def tensor(self, area: np.ndarray[Any, np.dtype[np.uint8]], argument: Task) -> Any:
        return self.view(self.ffi.from_dlpack(area), tuple(argument["shape"]), self.ffi.dtype(argument["dtype"]), 0)

    def alone(self, argument: Task) -> Any:
        """A tensor of its own: small integers (indices, masks) are zero or one, other inputs ordinary numbers."""
        area = self._aligned(nbytes_of(argument))
        if argument["role"] == "output" or argument["dtype"] in ("int32", "int64", "uint32", "uint64"):
            area[...] = 0
        elif argument["dtype"] == "bool":
            area[...] = 1
        else:
            self.fill(area)
        return self.tensor(area, argument)

    def calls(self, arguments: Sequence[Task]) -> Iterator[list[Any]]:
        """An endless row of argument lists whose weights lie in ever different places."""
        fixed = [None if a.get("role") == "weight" else self._fixed(a) for a in arguments]
        weights = [(n, a, -(-nbytes_of(a) // 64) * 64) for n, a in enumerate(arguments) if a.get("role") == "weight"]
        total = sum(size for _, _, size in weights)
        if not total:
            return itertools.repeat(fixed)
        if total > len(self.area):
            self.area = self._aligned(total)
            self.fill(self.area)
        lists = []
        for copy in range(min(_MOST_COPIES, len(self.area) // total)):
            made, place = list(fixed), copy * total
            for position, argument, size in weights:
                made[position] = self.tensor(self.area[place : place + max(nbytes_of(argument), 1)], argument)
                place += size
            lists.append(made)
        return itertools.cycle(lists)

    def _fixed(self, argument: Task) -> Any:
        return argument["symbol"] if "symbol" in argument else self.alone(argument)


class Recorder:
    """Records what is launched on a stream of its own, to repeat it by one call of the driver.

    Args:
        library: ``libcudart``.
    """

    def __init__(self, library: Any) -> None:
        self.library = library
        library.cudaGetErrorString.restype = ctypes.c_char_p
        stream = ctypes.c_void_p()
        self.call("cudaStreamCreate", ctypes.byref(stream))
        self.stream = stream.value or 0

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} failed: {self.library.cudaGetErrorString(code).decode()}")

    def record(self, launch: Callable[[], None]) -> ctypes.c_void_p:
        """A graph, ready to run, of what ``launch`` launches; nothing runs meanwhile."""
        graph, runnable = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cudaStreamBeginCapture", ctypes.c_void_p(self.stream), 2)  # cudaStreamCaptureModeRelaxed
        try:
            launch()
        finally:
            self.call("cudaStreamEndCapture", ctypes.c_void_p(self.stream), ctypes.byref(graph))
        try:
            self.call("cudaGraphInstantiate", ctypes.byref(runnable), graph, ctypes.c_ulonglong(0))
        finally:
            self.library.cudaGraphDestroy(graph)
        return runnable

    def run(self, runnable: ctypes.c_void_p) -> None:
        self.call("cudaGraphLaunch", runnable, ctypes.c_void_p(self.stream))


class DeviceMemory(Memory):
    """As :class:`Memory`, on a GPU. Copies of weights together are twice as large as its cache.

    Rows of calls are recorded and repeated, so that a short kernel does not seem to take as long as launching it.

    Args:
        ffi: ``tvm_ffi``.
        library: ``libcudart``.
        device: The GPU.
    """

    sticky = True

    def __init__(self, ffi: Any, library: Any, device: Any) -> None:
        self.ffi, self.device = ffi, device
        self.view = ffi.get_global_func("runtime.TVMTensorCreateView")
        self.allocate = ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self.copy = ffi.get_global_func("runtime.TVMTensorCopyFromTo")
        self.synchronize = ffi.get_global_func("runtime.Device_StreamSync")
        self.cold = min(max(2 * Gpu().l2_bytes, 64 << 20), 512 << 20)
        self.recorder: Recorder | None = Recorder(library)

    def wait(self) -> None:
        self.synchronize(self.device, 0)
        if self.recorder is not None:
            self.synchronize(self.device, self.recorder.stream)

    def row(self, function: Any, lists: Iterator[list[Any]], repeats: int) -> Callable[[], None]:
        launch = super().row(function, lists, repeats)
        recorder = self.recorder
        if recorder is None or repeats == 1:
            return launch
        try:
            with self.ffi.use_raw_stream(self.device, recorder.stream):
                runnable = recorder.record(launch)
        except RuntimeError as error:
            print(f"calls are launched one by one: {error}", file=sys.stderr, flush=True)
            self.recorder = None
            return launch

        def run(arguments: Any = launch) -> None:  # which keeps the memory that was recorded
            recorder.run(runnable)

        weakref.finalize(run, recorder.library.cudaGraphExecDestroy, runnable).atexit = False
        return run

    def alone(self, argument: Task) -> Any:
        """As on a CPU, copied to the GPU."""
        return self._there(super().alone(argument))

    def _there(self, here: Any) -> Any:
        there = self.allocate(self.ffi.Shape([int(d) for d in here.shape]), here.dtype, self.device, None)
        if 0 not in tuple(here.shape):
            self.copy(here, there)
            self.wait()  # the memory it was in may not be kept
        return there

    def calls(self, arguments: Sequence[Task]) -> Iterator[list[Any]]:
        weights = {n: Memory.alone(self, a) for n, a in enumerate(arguments) if a.get("role") == "weight"}
        total = sum(nbytes_of(arguments[n]) for n in weights)
        fixed = [None if n in weights else self._fixed(a) for n, a in enumerate(arguments)]
        copies = max(1, min(_MOST_COPIES, self.cold // total)) if total else 1
        lists = [[self._there(weights[n]) if n in weights else v for n, v in enumerate(fixed)] for _ in range(copies)]
        return itertools.cycle(lists)


def nbytes_of(argument: Task) -> int:
    """Bytes of a tensor."""
    digits = "".join(c for c in argument["dtype"].split("_")[0] if c.isdigit())
    return math.prod(argument["shape"]) * (max(1, int(digits) // 8) if digits else 1)


class Candidate:
    """Kernels that together are one candidate, ready to be called."""

    def __init__(self, memory: Memory, folder: str | os.PathLike[str], kernels: Sequence[Task]) -> None:
        self.memory = memory
        self.rows: dict[tuple[int, int], Callable[[], None]] = {}
        self.kernels: list[tuple[Any, Iterator[list[Any]], int]] = []
        for kernel in kernels:
            function = memory.ffi.load_module(str(pathlib.Path(folder, kernel["library"])))[kernel["function"]]
            self.kernels.append((function, memory.calls(kernel["arguments"]), kernel["calls"]))
        self.means: list[float] = []
        self.repeats = 1

    def warm_up(self) -> None:
        spent = 0.0
        for _ in range(3):
            spent = sum(self._mean(number, 1) for number in range(len(self.kernels)))
        self.repeats = max(1, min(2000, int(TURN_SECONDS / max(spent, 1e-7))))

    def turn(self) -> None:
        """Mean seconds of a call, kernels weighted by their number of calls in the model."""
        total = sum(calls for _, _, calls in self.kernels)
        spent = sum(calls * self._mean(n, self.repeats) for n, (_, _, calls) in enumerate(self.kernels))
        self.means.append(spent / total)

    def _mean(self, number: int, repeats: int) -> float:
        function, lists, _ = self.kernels[number]
        run = self.rows.get((number, repeats)) or self.memory.row(function, lists, repeats)
        if self.memory.sticky:  # what is recorded is kept
            self.rows[number, repeats] = run
        self.memory.wait()
        begun = time.perf_counter()
        run()
        self.memory.wait()
        return (time.perf_counter() - begun) / repeats

    def result(self) -> Result:
        middle = statistics.median(self.means)
        spread = statistics.median(abs(mean - middle) for mean in self.means)
        return {"seconds": middle, "spread": spread / middle, "turns": len(self.means)}


class Measurer:
    """Measures tasks in this process."""

    def __init__(self, folder: str | os.PathLike[str] = ".", runtime: str | os.PathLike[str] | None = None) -> None:
        self.folder, self.runtime = folder, runtime
        self.ffi = load_runtime(runtime)
        self.memories: dict[str, Memory] = {}
        self.threads = 0

    def memory(self, device: str) -> Memory:
        """Memory of a device, which is got ready when it is first asked for."""
        if device not in self.memories:
            if device == "cuda":
                load_cuda_runtime(self.ffi, self.runtime)
                made: Memory = DeviceMemory(self.ffi, ctypes.CDLL("libcudart.so.13"), self.ffi.device("cuda", 0))
            else:
                made = Memory(self.ffi)
            self.memories[device] = made
        return self.memories[device]

    def measure(self, task: Task, tell: Callable[[int], None]) -> list[Result]:
        """One result for every candidate of ``task``; ``tell(index)`` is called before a candidate first runs."""
        self._use(task["threads"])
        memory = self.memory(task.get("device", "cpu"))
        ready: dict[int, Candidate] = {}
        results: dict[int, Result] = {}
        for index, candidate in enumerate(task["candidates"]):
            tell(index)
            try:
                made = Candidate(memory, self.folder, candidate["kernels"])
                made.warm_up()
                ready[index] = made
            except Exception as error:  # whatever a kernel's own checks raise
                if memory.sticky:
                    raise  # who supervises notes it, and goes on with a process where the GPU works
                results[index] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        for turn in range(TURNS):
            order = sorted(ready)
            order = order[turn % len(order) :] + order[: turn % len(order)] if order else []
            fastest = min((min(ready[i].means) for i in order if ready[i].means), default=0.0)
            for index in order:
                if turn < FIRST_TURNS or min(ready[index].means) <= HOPELESS * fastest:
                    tell(index)
                    ready[index].turn()
        results.update({index: candidate.result() for index, candidate in ready.items()})
        return [results[index] for index in range(len(task["candidates"]))]

    def _use(self, threads: int) -> None:
        if threads == self.threads:
            return
        configure = self.ffi.get_global_func("runtime.config_threadpool")
        available: Any = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
        cpus = [str(cpu) for cpu in sorted(available(0))]
        repeated = cpus * -(-threads // len(cpus))
        configure(_SPECIAL_THREADS, threads, repeated[:threads])  # the length of the list is the pool's largest size
        configure(_SPECIAL_THREADS, threads, repeated[: max(threads, len(cpus))])
        self.threads = threads


def serve(folder: pathlib.Path, runtime: pathlib.Path | None) -> None:
    """Measure the tasks that come line by line on stdin; answer on stdout."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing a library prints gets between the answers
    measurer = Measurer(folder, runtime)
    for line in sys.stdin:
        results = measurer.measure(json.loads(line), lambda index: _say(out, {"at": index}))
        _say(out, {"results": results})


def _say(out: Any, answer: Task) -> None:
    out.write(json.dumps(answer) + "\n")


class Supervisor:
    """Measures tasks in a process of its own, and goes on when a candidate kills or hangs it."""

    def __init__(
        self,
        folder: str | os.PathLike[str] = ".",
        runtime: str | os.PathLike[str] | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self.command = [sys.executable, os.path.abspath(__file__), "--serve", "--folder", str(folder)]
        self.command += ["--runtime", str(runtime)] if runtime else []
        self.timeout = timeout
        self.process: subprocess.Popen[str] | None = None

    def measure(self, task: Task) -> list[Result]:
        """One result for every candidate: ``seconds``, ``spread`` and ``turns``, or ``error``."""
        left = dict(enumerate(task["candidates"]))
        done: dict[int, Result] = {}
        while left:
            order = list(left)
            results, at, why = self._ask({**task, "candidates": [left[index] for index in order]})
            if results is not None:
                done.update(zip(order, results, strict=True))
                break
            culprit = order[at]
            done[culprit] = {"error": why}
            del left[culprit]
        return [done[index] for index in range(len(task["candidates"]))]

    def _ask(self, task: Task) -> tuple[list[Result] | None, int, str]:
        """Results; or None, the index of the candidate the process stopped at, and what happened."""
        process = self._running()
        at = 0
        hung = threading.Event()

        def stop() -> None:
            hung.set()
            process.kill()

        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
        while True:
            clock = threading.Timer(self.timeout, stop)
            clock.start()
            line = process.stdout.readline()
            clock.cancel()
            if not line:
                break
            answer = json.loads(line)
            if "results" in answer:
                return answer["results"], 0, ""
            at = answer["at"]
        code = process.wait()
        self.close()
        if hung.is_set():
            return None, at, f"no answer for {self.timeout:.0f} s"
        return None, at, f"the process died (exit status {code})"

    def _running(self) -> subprocess.Popen[str]:
        if self.process is None:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self.process

    def close(self) -> None:
        """End the process."""
        process, self.process = self.process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError, AttributeError):
                pipe.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


def measure_folder(folder: pathlib.Path, runtime: pathlib.Path | None, output: pathlib.Path, threads: int) -> None:
    """Measure the tasks of an exported folder and append a line for each to ``output``; those there are left out."""
    tasks = [json.loads(line) for line in (folder / "tasks.jsonl").read_text(encoding="utf-8").splitlines()]
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if why := refusal(meta["target"]):
        raise SystemExit(why)
    device = "cuda" if meta["target"].get("kind") == "cuda" else "cpu"
    if device == "cuda":
        threads = 0
        load_cuda_runtime(load_runtime(runtime), runtime)  # what is missing here would look like bad candidates later
    done: set[int] = set()
    if output.exists():
        for line in output.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError):
                done.add(json.loads(line)["task"])
    supervisor = Supervisor(folder, runtime)
    try:
        for number, task in enumerate(tasks):
            if task["task"] in done:
                continue
            print(f"[{number + 1}/{len(tasks)}] {task['workload']}", file=sys.stderr, flush=True)
            results = supervisor.measure({**task, "threads": threads or task["threads"]})
            found = {
                **{key: meta[key] for key in ("format", "scope", "target")},
                "task": task["task"],
                "workload": task["workload"],
                "threads": threads or task["threads"],
                "machine": machine_name(device),
                "results": [
                    {"parameters": candidate["parameters"], **result}
                    for candidate, result in zip(task["candidates"], results, strict=True)
                ],
            }
            append_line(output, json.dumps(found))
    finally:
        supervisor.close()
    print(f"results: {output}")


def append_line(path: str | os.PathLike[str], text: str) -> None:
    """Add one whole line, behind a newline where a killed run left half a line."""
    with open(path, "ab+") as file:
        file.seek(0, os.SEEK_END)
        torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write((("\n" if torn else "") + text + "\n").encode("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the compiled candidates in this folder.")
    here = pathlib.Path(__file__).resolve().parent
    parser.add_argument("--folder", type=pathlib.Path, default=here, help="where tasks.jsonl is (%(default)s)")
    parser.add_argument("--runtime", type=pathlib.Path, help="folder of TVM's runtime libraries")
    parser.add_argument("--output", type=pathlib.Path, help=f"results; default: {RESULTS} in the folder")
    parser.add_argument("--threads", type=int, default=0, help="threads; default: as exported")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    runtime = options.runtime
    if runtime is None and (options.folder / "runtime").is_dir():
        runtime = options.folder / "runtime"
    if options.serve:
        serve(options.folder, runtime)
    else:
        measure_folder(options.folder, runtime, options.output or options.folder / RESULTS, options.threads)


if __name__ == "__main__":
    main()
