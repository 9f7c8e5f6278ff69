"""Runs AArch64 code under user-mode emulation: kernels by a small driver, artifacts by the runner."""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import tvm

from mmopt.backends.cpu import intrinsics
from mmopt.backends.cpu.emit import Kernel, KernelEmitter
from mmopt.backends.cpu.pipeline import code_generation, target_of
from mmopt.backends.linking import Zig
from mmopt.backends.profile import Profile, load_profile
from mmopt.backends.runner import build_runner
from tests.kernels import UNTOUCHED, Case, compare

EMULATOR = shutil.which("qemu-aarch64") or ""
SYSTEM = pathlib.Path(os.environ.get("QEMU_LD_PREFIX", "/usr/aarch64-linux-gnu"))
"""Where the emulator finds AArch64's C and C++ libraries."""

PROCESSORS = {
    "cortex-a76": "cortex-a76",
    "armv8.0": "cortex-a53",
    "cortex-a72": "cortex-a72",
    "neoverse-n1": "neoverse-n1",
    "neoverse-v1": "max,sve=off",
}
"""The emulated processor for each target: the one itself, or the nearest that the emulator has and that has no more
features than the target, so that an instruction too many stops the program. For Neoverse V1 there is none."""


def missing() -> str:
    """Why nothing can be emulated here, or ""."""
    if importlib.util.find_spec("ziglang") is None:
        return "ziglang is not installed (pip install 'mmopt[arm]')"
    if not EMULATOR:
        return "qemu-aarch64 is not installed (Debian: apt install qemu-user)"
    if not (SYSTEM / "lib" / "libstdc++.so.6").exists():
        return f"AArch64's libraries are not in {SYSTEM} (Debian: apt install libstdc++6-arm64-cross)"
    return ""


needs_emulation = pytest.mark.skipif(bool(missing()), reason=missing())


@functools.cache
def board() -> pathlib.Path:
    """A folder with the runner, the kernel driver and their libraries, for any AArch64; built once."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "mmopt" / "board-aarch64"
    profile = load_profile("armv8.0")
    build_runner(profile, folder)
    build_runner(profile, folder, main=pathlib.Path(__file__).with_name("kernel_driver.cc"))
    return folder


def emulate(
    target: str, program: str, *arguments: str, options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a program of :func:`board` on the processor that stands for ``target``."""
    command = [EMULATOR, "-cpu", PROCESSORS[target], "-L", str(SYSTEM), *options, str(board() / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=3000)


def run_artifact(
    target: str, artifact: pathlib.Path, inputs: Mapping[str, np.ndarray], *options: str
) -> dict[str, np.ndarray]:
    """The outputs of an artifact on ``inputs``."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = pathlib.Path(folder, "in.npz"), pathlib.Path(folder, "out.npz")
        np.savez(given, **inputs)
        done = emulate(target, "mmopt-run", str(artifact), "--inputs", str(given), "-o", str(made), *options)
        assert done.returncode == 0, done.stderr
        with np.load(made) as outputs:
            return {name: outputs[name] for name in outputs.files}


def link_kernels(cases: Sequence[Case], profile: Profile, path: pathlib.Path) -> list[tuple[str, Kernel]]:
    """Compile the kernel of each case into one library; gives names and kernels."""
    intrinsics.register()
    made, functions = [], {}
    for number, case in enumerate(cases):
        emitter = KernelEmitter(case.outputs, profile)
        kernel = emitter.build()
        functions[f"kernel{number}"] = kernel.function.with_attr("global_symbol", f"kernel{number}")
        made.append((f"kernel{number}", kernel))
    target = target_of(profile)
    with target, code_generation():
        tvm.compile(tvm.IRModule(functions), target=target).export_library(str(path), fcompile=Zig(profile))
    return made


def check_kernels(cases: Sequence[Case], target: str) -> None:
    """All ``cases`` give what is expected when they are compiled for ``target``."""
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        kernels = link_kernels(cases, load_profile(target), place / "kernels.so")
        lines = []
        for number, (case, (name, kernel)) in enumerate(zip(cases, kernels, strict=True)):
            sizes = [case.sizes[str(s.name)] for s in kernel.symbols]
            lines.append(" ".join(map(str, [name, len(kernel.sources), len(sizes), len(case.want), *sizes])))
            for n, source in enumerate(kernel.sources):
                np.save(place / f"{number}.in{n}.npy", np.require(case.feeds[source], requirements="C"))
            for n, want in enumerate(case.want):
                np.save(place / f"{number}.out{n}.npy", np.full_like(want, UNTOUCHED, order="C"))
        (place / "cases.txt").write_text("\n".join(lines) + "\n")
        done = emulate(target, "kernel_driver", str(place / "kernels.so"), folder)
        assert done.returncode == 0, f"{target}: code {done.returncode}: {done.stderr}"
        wrong = []
        for number, case in enumerate(cases):
            got = [np.load(place / f"{number}.out{n}.npy") for n in range(len(case.want))]
            try:
                compare(
                    case, [g.view(w.dtype) if g.dtype.kind == "V" else g for g, w in zip(got, case.want, strict=True)]
                )
            except AssertionError as error:
                wrong.append(f"{case.name}: {error}")
        assert not wrong, f"{len(wrong)} of {len(cases)} cases on {target}:\n" + "\n".join(wrong)
