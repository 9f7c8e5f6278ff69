"""From an IRModule of Relax functions and scheduled kernels to a shared library."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Sequence

import tvm
from tvm import relax
from tvm.tirx import compilation_pipeline

from mmopt.backends.cpu import intrinsics
from mmopt.backends.cpu.avx512 import SCALING, has_scaling
from mmopt.backends.cpu.joined_run import settle
from mmopt.backends.cpu.joining import Joined, join_kernels
from mmopt.backends.features import llvm_switches
from mmopt.backends.linking import Library, linker_for
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
    features = [_WIDE] if profile.vector_bytes == 64 else llvm_switches(profile.kind, profile.features)
    if has_scaling(profile):
        features.append(SCALING)
    if features or profile.llvm_features:
        spec["mattr"] = [*features, *profile.llvm_features]
    return tvm.target.Target(spec)


def plain(module: tvm.IRModule) -> tvm.IRModule:
    """``module`` with its Relax functions in the form that :func:`~.joining.join_kernels` takes."""
    steps = relax.transform
    return tvm.transform.Sequential([steps.Normalize(), steps.ToNonDataflow(), steps.RemovePurityChecking()])(module)


def join(module: tvm.IRModule, kernels: Sequence[str]) -> Joined:
    """Bring Relax functions into plain form and join their kernels; see :func:`~.joining.join_kernels`."""
    return join_kernels(plain(module), {name: position for position, name in enumerate(kernels)})


def legalize() -> tvm.transform.Pass:
    """Relax passes from calls of kernels to instructions of the virtual machine, with memory planned."""
    steps = relax.transform
    return tvm.transform.Sequential(
        [
            steps.Normalize(),
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


_LOWERING = "mmopt"


def _lowering() -> tuple[tvm.transform.Pass, object, object]:
    """TVM's own lowering of kernels, with :func:`~.joining.settle` behind it."""
    usual, host, device = compilation_pipeline.get_tir_pipeline("s_tir")
    settled = tvm.tirx.transform.prim_func_pass(lambda function, module, context: settle(function), opt_level=0)
    return tvm.transform.Sequential([usual, settled]), host, device


compilation_pipeline.register_tir_pipeline(_LOWERING, _lowering)


def _private(module: tvm.IRModule, names: set[str]) -> tvm.IRModule:
    """``module`` with the functions called ``names`` known inside the library only."""
    functions = {
        handle: function.without_attr("global_symbol") if str(handle.name_hint) in names else function
        for handle, function in module.functions.items()
    }
    return tvm.IRModule(functions, attrs=module.attrs)


def build_library(module: tvm.IRModule, profile: Profile, kernels: Sequence[str]) -> Library:
    """Compile ``module`` and link it.

    Args:
        module: Relax functions and the kernels they call.
        profile: A ``cpu`` or ``arm`` profile.
        kernels: Names of the kernels, in the order of their slots in the clock.

    Returns:
        The shared library, and the bytes of workspace that a call needs.

    Raises:
        UserError: There is no linker for the profile.
        BackendError: Code generation or linking failed.
    """
    intrinsics.register()
    target, linker = target_of(profile), linker_for(profile)
    try:
        with target, code_generation():
            joined = join(module, kernels)
            lowered = _private(legalize()(joined.module), joined.bare)
            nothing = tvm.transform.Sequential([])
            executable = relax.build(lowered, target=target, relax_pipeline=nothing, tir_pipeline=_LOWERING)
        with tempfile.TemporaryDirectory(prefix="mmopt-") as folder:
            path = pathlib.Path(folder, "lib.so")
            executable.export_library(str(path), fcompile=linker)
            return Library(path.read_bytes(), joined.workspace)
    except (RuntimeError, ValueError, TypeError) as error:
        raise BackendError(f"code generation failed: {error}", where=f"target {profile.name}") from error
