"""Runs kernels for tests: many at once from one library, on memory that shows what they must not touch.

Inputs and outputs lie in memory that ends with marked bytes; a kernel that writes over an end is found out. With
``guard`` they end at a page that cannot be touched, so that a kernel that reads over an end stops the process; see
``tests/guarded_kernels.py``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import mmap
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pytest
import tvm
from tvm import tirx

from mmopt.backends.compute import Source, Tensor
from mmopt.backends.cpu import intrinsics
from mmopt.backends.cpu.emit import Kernel, KernelEmitter
from mmopt.backends.cpu.pipeline import code_generation, target_of
from mmopt.backends.profile import Profile, load_profile, native_profile

ALIGNMENT = 64
"""Bytes to whose multiples TVM wants memory aligned."""

MARK = 0xA5
UNTOUCHED = 77
"""What results hold before a kernel runs: something no kernel computes."""

TOLERANCE = {"float16": 2e-3, "float32": 2e-5, "float64": 1e-12}
"""Largest error allowed, as a fraction of the largest expected number (at least one)."""


@functools.cache
def profiles() -> dict[str, Profile]:
    """AVX2 always, the machine's own vectors when they are wider."""
    found = {"x86-64-v3": load_profile("x86-64-v3")}
    native = native_profile()
    if native.vector_bytes > found["x86-64-v3"].vector_bytes:
        found["avx512"] = native
    return found


WIDEST = max(profiles(), key=lambda name: profiles()[name].vector_bytes)
"""The profile that quick tests run on."""

PROFILES = [pytest.param(name, marks=() if name == WIDEST else pytest.mark.slow) for name in sorted(profiles())]
"""For ``parametrize``: the widest vectors always, narrower ones among the slow tests."""


@dataclasses.dataclass
class Case:
    """One kernel with what goes in and what should come out.

    Attributes:
        name: Says what the kernel is about.
        outputs: What the kernel writes.
        feeds: An array for each source.
        want: An array for each output.
        sizes: Values of symbolic extents by name.
        tolerance: Overrides :data:`TOLERANCE`.
    """

    name: str
    outputs: Sequence[Tensor]
    feeds: Mapping[Source, np.ndarray]
    want: Sequence[np.ndarray]
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    tolerance: float | None = None


class Memory:
    """Arrays that end at the end of a mapping, before a page that cannot be touched when ``guard``."""

    def __init__(self, guard: bool) -> None:
        self.guard = guard
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._kept: list[tuple[mmap.mmap, int, int]] = []

    def array(self, like: np.ndarray) -> np.ndarray:
        """A copy of ``like`` as close to the end of its pages as alignment allows."""
        page = mmap.PAGESIZE
        room = -(-max(like.nbytes, 1) // page) * page
        pages = mmap.mmap(-1, room + page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        if self.guard and self._libc.mprotect(ctypes.c_void_p(address + room), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect failed")
        start = (room - like.nbytes) // ALIGNMENT * ALIGNMENT
        ctypes.memset(address, MARK, room)
        made = np.frombuffer(pages, like.dtype, like.size, start).reshape(like.shape)
        made[...] = like
        self._kept.append((pages, start, start + like.nbytes))
        return made

    def check(self) -> None:
        """Nothing outside the arrays has changed."""
        for pages, start, end in self._kept:
            room = len(pages) - mmap.PAGESIZE
            around = pages[:start] + pages[end:room]
            assert around == bytes([MARK]) * len(around), "memory around an array was written to"


@dataclasses.dataclass
class Compiled:
    """Kernels by what they write."""

    kernels: dict[tuple[Tensor, ...], tuple[str, Kernel]]
    module: tvm.runtime.Module

    def run(self, case: Case, memory: Memory) -> list[np.ndarray]:
        """Call a kernel; results start as something no kernel computes."""
        name, kernel = self.kernels[tuple(case.outputs)]
        given = [memory.array(case.feeds[s]) for s in kernel.sources]
        before = [a.copy() for a in given]
        results = [memory.array(np.full_like(w, UNTOUCHED)) for w in case.want]
        sizes = [case.sizes[str(s.name)] for s in kernel.symbols]
        arguments = [tvm.runtime.from_dlpack(a) if a.size else tvm.runtime.tensor(a) for a in (*given, *results)]
        count = len(given)
        self.module[name](*arguments[:count], *sizes, *arguments[count:])
        memory.check()
        for now, then in zip(given, before, strict=True):
            np.testing.assert_array_equal(now, then, err_msg="an input was written to")
        return results


def compile_kernels(groups: Iterable[Sequence[Tensor]], profile: Profile) -> Compiled:
    """One library with a kernel for each group of outputs; a group that occurs twice is compiled once."""
    intrinsics.register()
    kernels = {}
    for number, outputs in enumerate(dict.fromkeys(map(tuple, groups))):
        kernels[outputs] = f"kernel{number}", KernelEmitter(outputs, profile).build()
    functions = {name: kernel.function.with_attr("global_symbol", name) for name, kernel in kernels.values()}
    with code_generation():
        return Compiled(kernels, tvm.compile(tvm.IRModule(functions), target=target_of(profile)))


def failures(
    cases: Sequence[Case], profile: str, *, guard: bool = False, tell: Callable[[str], None] = len
) -> list[str]:
    """Compile all ``cases`` at once, run them, and describe each that is wrong.

    Args:
        cases: What to run.
        profile: A key of :func:`profiles`.
        guard: Whether touching memory beyond the end of an array stops the process.
        tell: Told the name of each case before it runs.
    """
    compiled = compile_kernels([c.outputs for c in cases], profiles()[profile])
    wrong: list[str] = []
    for case in cases:
        tell(case.name)
        try:
            compare(case, compiled.run(case, Memory(guard)))
        except Exception as error:
            text = str(error).strip() or traceback.format_exc()
            wrong.append(f"{case.name}: {type(error).__name__}: {text}")
    return wrong


def compare(case: Case, got: Sequence[np.ndarray]) -> None:
    """Each result against what is expected."""
    for number, (expected, actual) in enumerate(zip(case.want, got, strict=True)):
        message = f"output {number} of {case.outputs[number].shape}"
        if expected.dtype.kind != "f":
            np.testing.assert_array_equal(actual, expected, err_msg=message)
            continue
        relative = case.tolerance or TOLERANCE[str(expected.dtype)]
        finite = np.abs(expected[np.isfinite(expected)].astype(np.float64))
        bound = relative * max(1.0, float(finite.max(initial=0)))
        wide = expected.astype(np.float64)
        np.testing.assert_allclose(actual.astype(np.float64), wide, rtol=0, atol=bound, err_msg=message)


def check(cases: Sequence[Case], profile: str) -> None:
    """All ``cases`` give what is expected."""
    wrong = failures(cases, profile)
    assert not wrong, f"{len(wrong)} of {len(cases)} cases on {profile}:\n" + "\n".join(wrong)


class Arrays:
    """Sources with seeded data."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.feeds: dict[Source, np.ndarray] = {}

    def source(self, shape: Sequence[int | tirx.Var], dtype: str = "float32", **sizes: int) -> Source:
        """A source of ``shape``, whose symbolic extents are ``sizes``."""
        made = Source(shape, dtype, f"in{len(self.feeds)}")
        extents = [d if isinstance(d, int) else sizes.get(str(d.name), 1) for d in shape]
        self.feeds[made] = self.data(extents, dtype)
        return made

    def data(self, shape: Sequence[int], dtype: str) -> np.ndarray:
        """Seeded numbers of any dtype."""
        if dtype == "bool":
            return np.asarray(self.random.random(shape) < 0.5)
        if "int" in dtype:
            low = 0 if dtype.startswith("u") else -9
            return np.asarray(self.random.integers(low, 10, shape)).astype(dtype)
        return np.asarray(self.random.standard_normal(shape)).astype(dtype)

    def fresh(self, **sizes: int) -> Arrays:
        """Other data for the same sources, with symbolic extents that are ``sizes``."""
        made = Arrays(seed=len(sizes))
        for source in self.feeds:
            extents = [int(d.value) if isinstance(d, tirx.IntImm) else sizes[str(d.name)] for d in source.shape]
            made.feeds[source] = made.data(extents, source.dtype)
        return made

    def constant(self, data: np.ndarray) -> Source:
        """A source that holds ``data``."""
        made = Source(data.shape, str(data.dtype), f"in{len(self.feeds)}")
        self.feeds[made] = np.asarray(data)
        return made

    def __getitem__(self, source: Source) -> np.ndarray:
        """Data of ``source``; floats as float64, for exact references."""
        data = self.feeds[source]
        return data.astype(np.float64) if data.dtype.kind == "f" else data

    def case(self, name: str, outputs: Sequence[Tensor] | Tensor, *want: np.ndarray, **options: object) -> Case:
        """A case whose expected arrays are brought to the dtypes of ``outputs``."""
        made = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        expected = [np.asarray(w).astype(t.dtype) for w, t in zip(want, made, strict=True)]
        return Case(name, made, dict(self.feeds), expected, **options)
