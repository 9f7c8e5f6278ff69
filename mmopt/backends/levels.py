"""Instruction-set levels below a target: what an artifact that picks one at load is compiled for besides."""

from __future__ import annotations

import dataclasses

from mmopt.backends.profile import Profile, load_profile
from mmopt.errors import UserError

LEVELS = {
    "cpu": ("icelake", "skylake-avx512", "x86-64-v3"),
    "arm": ("armv8.2", "armv8.0"),
}
"""Shipped profiles that stand for a level, by kind, the richest first: VNNI, AVX-512, AVX2; dot products, basic Arm."""


def levels_below(profile: Profile) -> list[Profile]:
    """Profiles of the levels whose features ``profile`` has all of and more, the richest first, with as many cores.

    Raises:
        UserError: There is none.
    """
    found = [
        dataclasses.replace(level, cores=profile.cores)
        for level in map(load_profile, LEVELS.get(profile.kind, ()))
        if set(level.features) < set(profile.features) and level.triple == profile.triple
    ]
    if not found:
        raise UserError(
            f"there is no instruction-set level below target {profile.name}",
            where="--multi-isa",
            hint="leave it out, or choose a richer --target",
        )
    return found
