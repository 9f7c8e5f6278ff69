"""How long a module takes by the templates' own models, without generating code."""

from __future__ import annotations

from typing import Any

from mmopt.backends.cpu.choosing import Chooser
from mmopt.backends.profile import Profile
from mmopt.ir.fingerprint import fingerprint
from mmopt.ir.module import Module
from mmopt.lowering.compiler import CompileOptions
from mmopt.lowering.partition import partition
from mmopt.lowering.program import ProgramBuilder

_known: dict[tuple[str, str], float] = {}
"""Predictions made in this process: who searches for a size asks for the same ones again."""

_MOST = 100_000


def predicted_cycles(module: Module, profile: Profile) -> float:
    """Cycles of one core that the kernels of ``module`` take by the predictions of their templates.

    Kernels whose templates predict nothing (element by element, moving data) do not count.

    Args:
        module: The module; sizes known at run time only count as typical.
        profile: What it would be compiled for.

    Raises:
        UnsupportedError: A node runs neither natively nor in onnxruntime.
    """
    # The shapes of inputs count: the same convolution of a larger picture takes longer.
    key = (repr(profile), fingerprint(module.model))
    if key not in _known:
        if len(_known) >= _MOST:
            _known.clear()
        _known[key] = _predicted(module, profile)
    return _known[key]


def kernels_of(module: Module, profile: Profile) -> list[dict[str, Any]]:
    """Records of the kernels that ``module`` would be compiled to, as a manifest has them.

    Args:
        module: The module.
        profile: What it would be compiled for.

    Raises:
        UnsupportedError: A node runs neither natively nor in onnxruntime.
    """
    builder = ProgramBuilder(profile, Chooser())
    partition(module, "main", builder, CompileOptions())
    return list(builder.kernels.values())


def _predicted(module: Module, profile: Profile) -> float:
    return float(sum(record.get("cycles", 0.0) * record["calls"] for record in kernels_of(module, profile)))
