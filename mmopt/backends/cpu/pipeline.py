"""From an IRModule of Relax functions and scheduled kernels to a shared library."""

from __future__ import annotations

import pathlib
import tempfile

import tvm
from tvm import relax

from mmopt.backends.cpu import intrinsics
from mmopt.backends.profile import Profile
from mmopt.errors import BackendError

_SKIPPED = ["s_tir.CompactBufferAllocation"]
"""Passes that do harm. This one shrinks temporaries to what it sees used; ours fit exactly, and where extents are
symbolic it puts loop variables into the size."""


_WIDE = "-prefer-256-bit"
"""LLVM splits vectors of 64 bytes on some processors unless told not to."""


def code_generation() -> tvm.transform.PassContext:
    """Context in which kernels are compiled."""
    return tvm.transform.PassContext(opt_level=3, disabled_pass=_SKIPPED)


def target_of(profile: Profile) -> tvm.target.Target:
    """TVM's form of a CPU profile."""
    spec: dict[str, object] = {
        "kind": "llvm",
        "mtriple": profile.triple,
        "mcpu": profile.mcpu,
        "num-cores": profile.cores,
    }
    features = [_WIDE] if profile.vector_bytes == 64 else []
    if features or profile.llvm_features:
        spec["mattr"] = [*features, *profile.llvm_features]
    return tvm.target.Target(spec)


def legalize() -> tvm.transform.Pass:
    """Relax passes from calls of kernels to instructions of the virtual machine, with memory planned."""
    steps = relax.transform
    return tvm.transform.Sequential(
        [
            steps.Normalize(),
            steps.ToNonDataflow(),
            steps.RemovePurityChecking(),
            steps.CallTIRRewrite(),
            steps.StaticPlanBlockMemory(),
            steps.LowerAllocTensor(),
            steps.KillAfterLastUse(),
            steps.LowerRuntimeBuiltin(),
            steps.ComputePrimValue(),
            steps.VMShapeLower(),
            steps.AttachGlobalSymbol(),
        ]
    )


def build_library(module: tvm.IRModule, profile: Profile) -> bytes:
    """Compile ``module`` and link it.

    Args:
        module: Relax functions and the kernels they call.
        profile: A ``cpu`` or ``arm`` profile.

    Returns:
        The shared library.

    Raises:
        BackendError: Code generation or linking failed.
    """
    intrinsics.register()
    target = target_of(profile)
    try:
        with target, code_generation():
            lowered = legalize()(module)
            executable = relax.build(lowered, target=target, relax_pipeline=tvm.transform.Sequential([]))
        with tempfile.TemporaryDirectory(prefix="mmopt-") as folder:
            path = pathlib.Path(folder, "lib.so")
            executable.export_library(str(path))
            return path.read_bytes()
    except (RuntimeError, ValueError, TypeError) as error:
        raise BackendError(f"code generation failed: {error}", where=f"target {profile.name}") from error
