"""Levels below a target: older instruction sets and GPUs that an artifact is compiled for too, to pick one at load."""

from __future__ import annotations

import dataclasses

from mmopt.backends.profile import Profile, load_profile
from mmopt.errors import UserError

LEVELS = {
    "cpu": ("icelake", "skylake-avx512", "x86-64-v3"),
    "arm": ("armv8.2", "armv8.0"),
    "cuda": ("cuda-sm80", "cuda-sm75"),
}
"""Shipped profiles that stand for a level, by kind, the richest first.

VNNI, AVX-512, AVX2; dot products, basic Arm; Ampere, whose machine code runs on Ada, and Turing.
"""


def levels_below(profile: Profile) -> list[Profile]:
    """Profiles of the levels whose features ``profile`` has all of and more, the richest first, with as many cores.

    GPUs have no features but generations, and as many multiprocessors as the level's own profile says.

    Raises:
        UserError: There is none.
    """
    levels = [level for level in map(load_profile, LEVELS.get(profile.kind, ())) if level.triple == profile.triple]
    if profile.kind == "cuda":
        found = [level for level in levels if level.sm < profile.sm]
    else:
        found = [
            dataclasses.replace(level, cores=profile.cores)
            for level in levels
            if set(level.features) < set(profile.features)
        ]
    if not found:
        raise UserError(
            f"there is no instruction-set level below target {profile.name}",
            where="--multi-isa",
            hint="leave it out, or choose a richer --target",
        )
    return found
