"""CPU features of target profiles: their names, what they need, and which LLVM features they stand for.

Names are those of the Linux kernel, in ``/proc/cpuinfo``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from mmopt.errors import UserError, did_you_mean

_ARM_LLVM = {
    "atomics": "lse",
    "asimdrdm": "rdm",
    "asimdhp": "fullfp16",
    "asimddp": "dotprod",
    "asimdfhm": "fp16fml",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
}
"""Features that decide which instructions are generated, by LLVM's names. What a profile does not list is not used,
whatever its processor has: artifacts ask for what is listed, and for nothing else."""

_ARM_OTHERS = (
    "aes", "cpuid", "crc32", "dcpodp", "dcpop", "dit", "evtstrm", "fcma", "flagm", "flagm2", "fp", "asimd", "fphp",
    "frint", "ilrcpc", "jscvt", "lrcpc", "paca", "pacg", "pmull", "sb", "sha1", "sha2", "sha3", "sha512", "sm3", "sm4",
    "ssbs", "uscat",
)  # fmt: skip

_ARM_NEEDS = {
    "asimd": ("fp",),
    "asimdrdm": ("asimd",),
    "asimdhp": ("asimd", "fphp"),
    "asimddp": ("asimd",),
    "asimdfhm": ("asimdhp",),
    "i8mm": ("asimd",),
    "bf16": ("asimd",),
    "sve": ("asimdhp",),
    "sve2": ("sve",),
}

_X86_NEEDS = {
    "avx2": ("avx",),
    "fma": ("avx",),
    "f16c": ("avx",),
    "avx_vnni": ("avx2",),
    "avx512f": ("avx2", "fma"),
    "avx512bw": ("avx512f",),
    "avx512cd": ("avx512f",),
    "avx512dq": ("avx512f",),
    "avx512vl": ("avx512f",),
    "avx512_vnni": ("avx512bw",),
    "avx512_bf16": ("avx512bw",),
    "avx512_fp16": ("avx512bw", "avx512vl"),
    "avx512_vbmi2": ("avx512bw",),
    "avx512vbmi": ("avx512bw",),
    "amx_int8": ("amx_tile",),
    "amx_bf16": ("amx_tile",),
    "amx_fp16": ("amx_tile",),
}

_TRIPLES = {"cpu": ("x86_64", "amd64"), "arm": ("aarch64", "arm64")}
_VECTORS = {"cpu": (16, 32, 64), "arm": (16,)}
_LIKELY = 0.8
"""How much alike a name must be to one that is known to be taken for a mistyped form of it."""


def check_features(kind: str, triple: str, vector_bytes: int, features: Sequence[str], where: str) -> None:
    """Refuse what no processor is.

    Args:
        kind: ``cpu`` or ``arm``.
        triple: LLVM target triple.
        vector_bytes: Width of a vector register.
        features: Names of features.
        where: The profile's file.

    Raises:
        UserError: Another architecture than the kind's, a width it does not have, an unknown or mistyped feature, or
            one without another that it needs. Names the nearest that is valid.
    """
    if triple.split("-")[0] not in _TRIPLES[kind]:
        hint = f"did you mean {_TRIPLES[kind][0] + triple[len(triple.split('-')[0]) :]!r}?"
        raise UserError(f"triple {triple!r} is not of kind {kind!r}", where=where, hint=hint)
    widths = _VECTORS[kind]
    if vector_bytes not in widths:
        nearest = min(widths, key=lambda width: abs(width - vector_bytes))
        known = ", ".join(map(str, widths[:-1])) + f" or {widths[-1]}" if len(widths) > 1 else str(widths[0])
        raise UserError(f"vector_bytes must be {known}, not {vector_bytes}", where=where, hint=f"try {nearest}")
    for feature in features:
        _check_name(kind, feature, where)
    needs = _ARM_NEEDS if kind == "arm" else _X86_NEEDS
    for feature in features:
        missing = [other for other in needs.get(feature, ()) if other not in features]
        if missing:
            hint = f"add {missing[0]!r}, or leave out {feature!r}"
            raise UserError(f"no processor has {feature} without {missing[0]}", where=where, hint=hint)


def _check_name(kind: str, feature: str, where: str) -> None:
    """Arm's names are all known; of x86's, only those that look like a known one mistyped are refused."""
    if kind == "arm":
        known = {*_ARM_LLVM, *_ARM_OTHERS}
        if feature in known:
            return
        linux = {llvm: name for name, llvm in _ARM_LLVM.items()}.get(feature) or {"neon": "asimd"}.get(feature)
        hint = f"did you mean {linux!r}?" if linux else did_you_mean(feature, known)
        raise UserError(f"unknown feature {feature!r}", where=where, hint=hint)
    names = {*_X86_NEEDS, *(other for others in _X86_NEEDS.values() for other in others)}
    near = difflib.get_close_matches(feature.replace("-", "_"), names, n=1, cutoff=_LIKELY)
    if near and feature not in names and feature not in _X86_OTHERS:
        raise UserError(f"unknown feature {feature!r}", where=where, hint=f"did you mean {near[0]!r}?")


_X86_OTHERS = (
    "avx10_1", "avx512_bitalg", "avx512_vp2intersect", "avx512_vpopcntdq", "avx512er", "avx512ifma", "avx512pf",
    "avx512_4fmaps", "avx512_4vnniw", "avx_ifma", "avx_ne_convert", "avx_vnni_int8", "avx_vnni_int16", "amx_complex",
    "fma4", "vaes", "vpclmulqdq",
)  # fmt: skip
"""Features that look like others and are none of theirs."""


def llvm_switches(kind: str, features: Iterable[str]) -> list[str]:
    """LLVM features to switch on and off, so that code uses what ``features`` lists; nothing for x86, where the
    processor decides."""
    if kind != "arm":
        return []
    listed = set(features)
    off = [f"-{llvm}" for name, llvm in _ARM_LLVM.items() if name not in listed]
    return off + [f"+{llvm}" for name, llvm in _ARM_LLVM.items() if name in listed]
