"""Builds ``mmopt-run``, the program that runs artifacts where there is no Python, together with the libraries it needs.

Everything comes from wheels: the compiler from ``ziglang``, TVM's runtime from those of ``apache-tvm`` and
``apache-tvm-ffi`` for the target's architecture, which pip downloads where they are not the installed ones.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence

from mmopt.backends.linking import architecture, is_apple, run_zig, zig_target
from mmopt.backends.profile import Profile
from mmopt.errors import BackendError, UnsupportedError, UserError
from mmopt.runtime.cpu import machine

PROGRAM = "mmopt-run"
LIBRARIES = {
    "apache-tvm": ("tvm/lib/libtvm_runtime.so", "tvm/lib/libtvm_runtime_extra.so"),
    "apache-tvm-ffi": ("tvm_ffi/lib/libtvm_ffi.so",),
}
"""Shared libraries the program needs, by the wheel they come from."""

_GLIBC_TAGS = ("2_17", "2_24", "2_27", "2_28")


def sources_folder() -> pathlib.Path:
    """Where the program's source is: package data, or the source tree of a checkout."""
    package = pathlib.Path(__file__).resolve().parent.parent
    packaged = package / "data" / "runner"
    return packaged if packaged.is_dir() else package.parent / "runner"


def build_runner(profile: Profile, output: pathlib.Path, *, main: pathlib.Path | None = None) -> pathlib.Path:
    """Build the program for ``profile`` in the folder ``output``, with its libraries in ``output/lib``.

    Args:
        profile: What to build for.
        output: Folder; it is made when it is not there.
        main: Another main program to build with the same parts, under its own name.

    Returns:
        The program.

    Raises:
        UserError: ``ziglang`` is not installed.
        UnsupportedError: The target does not run Linux.
        BackendError: Downloading or compiling failed.
    """
    if importlib.util.find_spec("ziglang") is None:
        raise UserError("building the runner needs a compiler", hint="run: pip install 'mmopt[arm]'")
    if is_apple(profile) or profile.kind == "cuda":
        raise UnsupportedError(f"{PROGRAM} is built for Linux on CPUs only", where=profile.name)
    folder = output / "lib"
    folder.mkdir(parents=True, exist_ok=True)
    _place_libraries(architecture(profile), folder)
    program = output / (PROGRAM if main is None else main.stem)
    parts = sorted(path for path in sources_folder().glob("*.cc") if main is None or path.name != "main.cc")
    _compile(profile, [*parts, *([] if main is None else [main])], folder, program)
    return program


def _compile(profile: Profile, sources: Sequence[pathlib.Path], folder: pathlib.Path, program: pathlib.Path) -> None:
    names = [pathlib.PurePath(name).name for files in LIBRARIES.values() for name in files]
    fresh = program.with_name(f".{program.name}-{os.getpid()}")  # what is there may be running
    run_zig(
        "c++",
        *("-target", zig_target(profile), "-std=c++17", "-O2", "-Wall", "-Wextra"),
        *("-isystem", str(_package_folder("tvm_ffi") / "include"), "-I", str(sources_folder())),
        *map(str, sources),
        *(
            "-L",
            str(folder),
            "-Wl,--no-as-needed",
            *(f"-l{name.removeprefix('lib').removesuffix('.so')}" for name in names),
        ),
        *("-Wl,-rpath,$ORIGIN/lib", "-Wl,--allow-shlib-undefined", "-Wl,--strip-all", "-o", str(fresh)),
    )
    fresh.replace(program)


def _package_folder(name: str) -> pathlib.Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise BackendError(f"the package {name} is not installed")
    return pathlib.Path(spec.submodule_search_locations[0])


def _place_libraries(arch: str, folder: pathlib.Path) -> None:
    """Put the runtime's libraries for ``arch`` into ``folder``."""
    if arch == machine() and platform.system() == "Linux":
        for names in LIBRARIES.values():
            for name in names:
                package, _, inside = name.partition("/")
                shutil.copy2(_package_folder(package) / inside, folder)
        return
    for distribution, names in LIBRARIES.items():
        if not all((folder / pathlib.PurePath(name).name).exists() for name in names):
            with zipfile.ZipFile(_wheel(distribution, arch)) as archive:
                for name in names:
                    (folder / pathlib.PurePath(name).name).write_bytes(archive.read(name))


def _wheel(distribution: str, arch: str) -> pathlib.Path:
    """The wheel of ``distribution`` for ``arch``, in the version that is installed here; downloaded once."""
    version = importlib.metadata.version(distribution)
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmopt" / "wheels"
    pattern = f"{distribution.replace('-', '_')}-{version}-*{arch}*.whl"
    if not list(cache.glob(pattern)):
        cache.mkdir(parents=True, exist_ok=True)
        platforms = [word for tag in _GLIBC_TAGS for word in ("--platform", f"manylinux_{tag}_{arch}")]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
        done = subprocess.run(
            [*command, "--dest", str(cache), f"{distribution}=={version}"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            hint = "it is needed once, and needs the package index"
            raise BackendError(f"cannot download {distribution} {version} for {arch}: {done.stderr.strip()}", hint=hint)
    return next(iter(cache.glob(pattern)))
