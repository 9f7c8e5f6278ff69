"""Links compiled kernels into one library: by the system's compiler for this machine, by zig for any other.

The wheel ``ziglang`` holds a linker for every target, and what a C library exports there, so that nothing but pip is
needed to compile for a machine one does not have.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmopt.backends.profile import Profile
from mmopt.errors import BackendError, UserError
from mmopt.runtime.artifact import Order
from mmopt.runtime.cpu import machine

GLIBC = "2.28"
"""Oldest C library that linked code runs with: that of the wheels of TVM's runtime."""

_COMPILERS = ("g++", "clang++", "c++")
_ARCHITECTURES = {"arm64": "aarch64", "amd64": "x86_64"}


@dataclasses.dataclass(frozen=True)
class Library:
    """What a backend makes of a program.

    Attributes:
        data: The shared library.
        workspace: Bytes of memory that a call needs.
        facts: What the backend says of kernels in reports, by name.
        repeatable: Functions that do the same on a device whatever their inputs hold, with the order in which it has
            to be done, as in :class:`mmopt.runtime.artifact.Segment`.
    """

    data: bytes
    workspace: int
    facts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    repeatable: Mapping[str, Order] = dataclasses.field(default_factory=dict)


Linker = Callable[..., None]
"""What TVM calls with the name of the library, those of its parts, and options."""


def architecture(profile: Profile) -> str:
    """``x86_64``, ``aarch64``: what ``profile`` compiles for."""
    name = profile.triple.split("-")[0]
    return _ARCHITECTURES.get(name, name)


def is_apple(profile: Profile) -> bool:
    """Whether libraries for ``profile`` are Mach-O files."""
    return "-apple-" in profile.triple


def linker_for(profile: Profile) -> Linker | None:
    """How libraries for ``profile`` are linked.

    Returns:
        None for TVM's own way, with the system's compiler.

    Raises:
        UserError: Nothing here can link for it; says what to install.
    """
    if _is_here(profile) and (os.environ.get("CXX") or any(map(shutil.which, _COMPILERS))):
        return None
    if importlib.util.find_spec("ziglang") is None:
        raise _no_linker(profile)
    return Zig(profile)


def _is_here(profile: Profile) -> bool:
    return architecture(profile) == machine() and is_apple(profile) == (platform.system() == "Darwin")


def _no_linker(profile: Profile) -> UserError:
    what = f"nothing here can link a library for {profile.triple}"
    if _is_here(profile):
        return UserError(what, where=profile.name, hint="install g++, or run: pip install 'mmopt[arm]'")
    return UserError(what, where=profile.name, hint="run: pip install 'mmopt[arm]'  (it brings ziglang, a linker)")


def zig_target(profile: Profile) -> str:
    """Zig's name of what ``profile`` compiles for."""
    system = "macos.11.0" if is_apple(profile) else f"linux-gnu.{GLIBC}"
    return f"{architecture(profile)}-{system}"


class Zig:
    """Links with the compiler of the ``ziglang`` wheel.

    Args:
        profile: What to link for.
    """

    object_format = "o"

    def __init__(self, profile: Profile) -> None:
        self._target = zig_target(profile)
        self._options = ["-shared", "-fPIC", "-Wl,--strip-debug"]
        if is_apple(profile):
            self._options = ["-dynamiclib", "-Wl,-undefined,dynamic_lookup"]

    def __call__(self, output: str, objects: Sequence[str], options: Sequence[str] = (), **_: Any) -> None:
        """Link ``objects`` into the library ``output``.

        Raises:
            BackendError: Zig cannot.
        """
        run_zig("cc", "-target", self._target, *self._options, "-o", output, *objects, *options, "-lm")


def run_zig(*arguments: str) -> None:
    """Run ``zig`` with ``arguments``.

    Raises:
        BackendError: It fails; with what it says.
    """
    done = subprocess.run([sys.executable, "-m", "ziglang", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise BackendError(f"zig {arguments[0]} failed: {said[-2000:]}")
