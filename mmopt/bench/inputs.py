"""Inputs to measure with, made up from the model's structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmopt.analysis.probes import probe_inputs
from mmopt.errors import BackendError
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.loading import symbol_sizes


def made_up_inputs(module: Module, shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, Any]:
    """One set of legal inputs, of batch 1 where the model takes that.

    Args:
        module: The model.
        shapes: Shapes by input name, for inputs with symbolic sizes.
        seed: Seed of the values.

    Raises:
        UserError: ``shapes`` does not fit the inputs.
        BackendError: No inputs were found that the model runs on.
    """
    sizes = symbol_sizes(module, shapes)
    single = {**dict.fromkeys(_batch_symbols(module), 1), **sizes}
    with ReferenceRunner() as runner:
        try:
            return probe_inputs(module, seeds=(seed,), sizes=single, runner=runner)[0]
        except BackendError:
            return probe_inputs(module, seeds=(seed,), sizes=sizes, runner=runner)[0]


def _batch_symbols(module: Module) -> list[str]:
    """Names of the first dimensions of all inputs, where they have one."""
    firsts = [value.shape[0] for value in module.graph.inputs if value.shape is not None and len(value.shape)]
    return [dim.value for dim in firsts if not isinstance(dim, int) and dim.value is not None]
