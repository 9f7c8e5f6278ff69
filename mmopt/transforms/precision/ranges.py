"""The largest magnitudes that values take on inputs: what decides whether they fit into a narrow float."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.analysis.probes import find_probes
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize.editing import Names

_SETS = 2
"""Sets of inputs that are tried."""


def largest_magnitudes(module: Module, values: Collection[ir.Value], context: PassContext) -> dict[ir.Value, float]:
    """Run ``module`` and find the largest magnitude of each of ``values``.

    Args:
        module: The module; it is unchanged afterwards.
        values: Float values of its main graph that are computed.
        context: Holds samples of inputs, if there are any, and the seed for others.

    Returns:
        The magnitudes, infinite where NaN or infinity occur.

    Raises:
        BackendError: The module runs on no inputs.
    """
    wanted = {str(value.name): value for value in values}
    with ReferenceRunner(seed=context.seed) as runner:
        batches = _batches(module, context, runner)
        probe, outputs = _with_maxima(module, list(wanted))
        found = [{n: float(np.asarray(run[o])) for n, o in outputs.items()} for run in runner.run_all(probe, batches)]
    return {wanted[name]: _largest([run[name] for run in found]) for name in wanted}


def _batches(module: Module, context: PassContext, runner: ReferenceRunner) -> Sequence[Mapping[str, Any]]:
    if context.inputs:
        count = min(len(array) for array in context.inputs.values())
        return [{name: array[n] for name, array in context.inputs.items()} for n in range(min(count, _SETS))]
    return find_probes(module, runner, seeds=range(context.seed, context.seed + _SETS))[0]


def _with_maxima(module: Module, names: Sequence[str]) -> tuple[Module, dict[str, str]]:
    """A copy of ``module`` whose outputs are the largest magnitudes of values, and the output for each value."""
    copy = module.clone()
    known = {str(v.name): v for v in (*copy.graph.inputs, *(o for node in copy.graph for o in node.outputs))}
    fresh = Names(copy.model)
    outputs: dict[str, str] = {}
    made: list[ir.Value] = []
    for name in names:
        magnitude = ir.node("Abs", [known[name]], name=fresh.fresh("magnitude"))
        magnitude.outputs[0].name = fresh.fresh("magnitude")
        largest = ir.node("ReduceMax", magnitude.outputs, {"keepdims": 0}, name=fresh.fresh("largest"))
        largest.outputs[0].name = fresh.fresh("largest")
        largest.outputs[0].type, largest.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        copy.graph.extend([magnitude, largest])
        made.append(largest.outputs[0])
        outputs[name] = str(largest.outputs[0].name)
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(made)
    return copy, outputs


def _largest(found: Sequence[float]) -> float:
    return max(found) if all(np.isfinite(found)) else float("inf")
