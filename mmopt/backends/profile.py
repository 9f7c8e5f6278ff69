"""Target profiles: what the hardware has, as data."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

from mmopt.backends.features import check_features
from mmopt.errors import UserError, did_you_mean
from mmopt.runtime.cpu import allowed_cpus, machine, missing_features, running_features
from mmopt.runtime.gpu import present_gpu

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = ("cpu", "arm", "cuda")

NATIVE = {"x86_64": "cpu", "aarch64": "arm"}

ALIASES = {"arm": "armv8.2"}
"""Other names of shipped profiles."""

GPU_ASSUMED = "cuda-sm80"
"""What ``cuda`` stands for on a machine without a GPU."""

OLDEST_SM = 75


@dataclasses.dataclass(frozen=True)
class Profile:
    """A target.

    Attributes:
        name: Profile name.
        kind: ``cpu``, ``arm`` or ``cuda``: which backend compiles for it.
        triple: LLVM target triple.
        mcpu: LLVM processor name.
        features: CPU features an artifact requires, by their Linux names; checked before its library is loaded.
        llvm_features: Further LLVM features (``+amx-int8``) beyond what ``mcpu`` implies.
        vector_bytes: Width of a vector register.
        registers: Number of vector registers.
        cores: Cores assumed for choices made at compile time; on a GPU its multiprocessors.
        l1_bytes: Data cache of one core.
        l2_bytes: Second-level cache of one core.
        sm: CUDA: compute capability, as 10 · major + minor.
        shared_bytes: CUDA: shared memory one block may take.
        multiprocessor_shared_bytes: CUDA: shared memory of a multiprocessor.
        multiprocessor_registers: CUDA: 32-bit registers of a multiprocessor.
        multiprocessor_threads: CUDA: threads that fit on a multiprocessor.
    """

    name: str
    kind: str = "cpu"
    triple: str = "x86_64-linux-gnu"
    mcpu: str = "x86-64-v3"
    features: tuple[str, ...] = ()
    llvm_features: tuple[str, ...] = ()
    vector_bytes: int = 32
    registers: int = 16
    cores: int = 2
    l1_bytes: int = 32 << 10
    l2_bytes: int = 256 << 10
    sm: int = 80
    shared_bytes: int = 48 << 10
    multiprocessor_shared_bytes: int = 64 << 10
    multiprocessor_registers: int = 64 << 10
    multiprocessor_threads: int = 1024

    def to_dict(self) -> dict[str, Any]:
        """What the manifest says about the target."""
        said: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "triple": self.triple,
            "cpu": self.mcpu,
            "features": list(self.features),
            "vector_bytes": self.vector_bytes,
            "cores": self.cores,
        }
        return said | {"sm": self.sm} if self.kind == "cuda" else said


def targets_folder() -> pathlib.Path:
    """Where the profiles that ship with mmopt are: package data, or the source tree of a checkout."""
    package = pathlib.Path(__file__).resolve().parent.parent
    packaged = package / "data" / "targets"
    return packaged if packaged.is_dir() else package.parent / "targets"


def profile_names() -> list[str]:
    """Names ``--target`` accepts."""
    return sorted(["cpu", "cuda", *ALIASES, *(path.stem for path in targets_folder().glob("*.toml"))])


def load_profile(target: str) -> Profile:
    """The profile called ``target``, or read from a TOML file.

    Args:
        target: ``cpu`` for the machine this runs on, ``cuda`` for the GPU in it (:data:`GPU_ASSUMED` where there is
            none), a name from :func:`profile_names`, or the path of a TOML file.

    Raises:
        UserError: No such profile, or its file is wrong.
    """
    if target == "cpu":
        return native_profile()
    if target == "cuda":
        return cuda_profile(present_gpu())
    name = ALIASES.get(target, target)
    path = pathlib.Path(target) if target.endswith(".toml") else targets_folder() / f"{name}.toml"
    if not path.is_file():
        hint = did_you_mean(target, profile_names()) if not target.endswith(".toml") else "give the path of a profile"
        raise UserError(f"there is no target {target!r}", hint=hint)
    return read_profile(path)


def read_profile(path: pathlib.Path) -> Profile:
    """Read one TOML profile.

    Raises:
        UserError: Not TOML, an unknown key, a value of the wrong type or out of range.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the target profile: {error}", where=str(path)) from error
    fields = {f.name: f for f in dataclasses.fields(Profile)}
    for key, value in data.items():
        if key not in fields:
            raise UserError(f"unknown key {key!r}", where=str(path), hint=did_you_mean(key, fields))
        _check_type(path, key, value, fields[key].default)
        if isinstance(value, list):
            data[key] = tuple(value)
    profile = Profile(**{"name": path.stem, **data})
    _check(path, profile)
    return profile


def _check_type(path: pathlib.Path, key: str, value: object, default: object) -> None:
    wanted = list if isinstance(default, tuple) else str if default is dataclasses.MISSING else type(default)
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise UserError(f"{key} must be a {wanted.__name__}, not {value!r}", where=str(path))
    if isinstance(value, list) and not all(isinstance(item, str) for item in value):
        raise UserError(f"{key} must be a list of strings", where=str(path))
    if isinstance(value, int) and value <= 0:
        raise UserError(f"{key} must be positive, not {value}", where=str(path))


def _check(path: pathlib.Path, profile: Profile) -> None:
    if profile.kind not in KINDS:
        raise UserError(f"unknown kind {profile.kind!r}", where=str(path), hint=did_you_mean(profile.kind, KINDS))
    if profile.kind == "cuda":
        _check_cuda(path, profile)
        return
    check_features(profile.kind, profile.triple, profile.vector_bytes, profile.features, str(path))
    wide = profile.vector_bytes == 64 and profile.kind == "cpu"
    if wide and not any(f.startswith("avx512") for f in profile.features):
        raise UserError("64-byte vectors need avx512f among the features", where=str(path), hint="add it or use 32")


def _check_cuda(path: pathlib.Path, profile: Profile) -> None:
    if profile.sm < OLDEST_SM:
        hint = f"the oldest that NVIDIA's compiler knows is {OLDEST_SM}"
        raise UserError(f"sm is {profile.sm}", where=str(path), hint=hint)
    if profile.shared_bytes >= profile.multiprocessor_shared_bytes:
        hint = "a block may take 1 KiB less than the multiprocessor has"
        raise UserError("shared_bytes must be below multiprocessor_shared_bytes", where=str(path), hint=hint)


def cuda_profile(sm: int | None) -> Profile:
    """The shipped profile for a GPU of compute capability ``sm``: the newest that is not newer.

    Args:
        sm: As 10 · major + minor; None when there is no GPU.

    Raises:
        UserError: The GPU is older than every profile.
    """
    if sm is None:
        return load_profile(GPU_ASSUMED)
    profiles = [read_profile(path) for path in sorted(targets_folder().glob("cuda-*.toml"))]
    fitting = [profile for profile in profiles if profile.sm <= sm]
    if not fitting:
        raise UserError(f"the GPU here is sm_{sm}, older than every target", hint=f"the oldest is sm_{OLDEST_SM}")
    return max(fitting, key=lambda profile: profile.sm)


def native_profile() -> Profile:
    """The richest shipped profile whose features this machine has, with this machine's cores and caches.

    Raises:
        UserError: No shipped profile fits this machine.
    """
    kind = NATIVE.get(machine())
    available = running_features()
    fitting = [
        profile
        for path in sorted(targets_folder().glob("*.toml"))
        if (profile := read_profile(path)).kind == kind and not missing_features(profile.features, available)
    ]
    if not fitting:
        raise UserError(
            f"no shipped target fits this machine ({machine()})",
            hint="describe it in a TOML file and pass that as --target",
        )
    best = max(fitting, key=lambda p: len(p.features))
    return dataclasses.replace(
        best,
        cores=max(1, len(allowed_cpus())),
        l1_bytes=_cache_bytes(1) or best.l1_bytes,
        l2_bytes=_cache_bytes(2) or best.l2_bytes,
    )


def _cache_bytes(level: int) -> int | None:
    """Data cache of one core at ``level``, as Linux tells it."""
    for index in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if (index / "level").read_text().strip() != str(level):
                continue
            if (index / "type").read_text().strip() == "Instruction":
                continue
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        scale = {"K": 1 << 10, "M": 1 << 20}.get(size[-1:], 1)
        digits = size.rstrip("KM")
        return int(digits) * scale if digits.isdigit() else None
    return None
