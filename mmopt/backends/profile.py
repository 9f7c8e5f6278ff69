"""Target profiles: what the hardware has, as data."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Profile:
    """A target.

    Attributes:
        name: Profile name.
        kind: ``cpu``, ``cuda`` or ``arm``.
        triple: LLVM target triple.
        mcpu: LLVM processor name.
        features: Required CPU features by their Linux names, for the manifest and the load-time check.
        llvm_features: Further LLVM features (``+amx-int8``) beyond what ``mcpu`` implies.
        vector_bytes: Width of a vector register.
        registers: Number of vector registers.
        cores: Cores assumed for choices made at compile time.
        l1_bytes: Data cache of one core.
        l2_bytes: Second-level cache of one core.
    """

    name: str
    kind: str = "cpu"
    triple: str = "x86_64-linux-gnu"
    mcpu: str = "x86-64-v3"
    features: tuple[str, ...] = ()
    llvm_features: tuple[str, ...] = ()
    vector_bytes: int = 64
    registers: int = 32
    cores: int = 2
    l1_bytes: int = 32 << 10
    l2_bytes: int = 1 << 20

    def to_dict(self) -> dict[str, object]:
        """What the manifest says about the target."""
        return {"name": self.name, "kind": self.kind, "triple": self.triple, "cpu": self.mcpu, "features": list(self.features)}
