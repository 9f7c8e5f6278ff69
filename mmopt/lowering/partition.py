"""Splits a graph into parts that run natively and parts that onnxruntime runs inside the same artifact."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from mmopt.errors import UnsupportedError
from mmopt.ir.module import Module, save_model
from mmopt.lowering.function import FunctionLowering
from mmopt.lowering.program import ProgramBuilder
from mmopt.lowering.values import ConstantSource, NotLowered

if TYPE_CHECKING:
    from mmopt.lowering.compiler import CompileOptions


@dataclasses.dataclass
class Part:
    """A run of nodes one engine executes.

    Attributes:
        name: Function name, or stem of the fallback model's file.
        inputs: Names of values it reads.
        outputs: Names of values it makes.
        params: Weights of a native part.
        model: Writes the fallback model to a path; ``None`` for a native part.
        notes: Why nodes fell back.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: list[ConstantSource] = dataclasses.field(default_factory=list)
    model: Callable[[pathlib.Path], None] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)


def partition(module: Module, entry: str, builder: ProgramBuilder, options: CompileOptions) -> list[Part]:
    """Split ``module`` and lower its native parts into ``builder``.

    Raises:
        UnsupportedError: A node cannot run and fallback is not allowed.
    """
    graph = module.graph
    name = builder.unique(f"{entry}_0")
    inputs = [v for v in graph.inputs if v.name not in graph.initializers]
    try:
        params = lower_part(module, name, inputs, list(graph), list(graph.outputs), builder)
        return [Part(name, _names(inputs), _names(graph.outputs), params)]
    except NotLowered as missing:
        if not options.allow_fallback:
            raise UnsupportedError(missing.reason, where=entry) from missing
        notes = [f"{entry}: runs in onnxruntime: {missing.reason}"]
    return [Part(name, _names(inputs), _names(graph.outputs), model=_writer(module.model), notes=notes)]


def lower_part(
    module: Module,
    name: str,
    inputs: list[ir.Value],
    nodes: list[ir.Node],
    outputs: list[ir.Value],
    builder: ProgramBuilder,
) -> list[ConstantSource]:
    """Lower ``nodes`` into the function ``name``.

    Returns:
        The weights the function takes, in order.

    Raises:
        NotLowered: A node has no lowering.
    """
    lowering = FunctionLowering(builder, name, dict(module.model.opset_imports), dict(module.model.functions))
    with lowering.body() as body:
        for value in inputs:
            lowering.argument(value)
        lowering.run(nodes, outputs)
        body.finish([lowering.value(o) for o in outputs])
    assert body.function is not None
    function = body.function
    if not lowering.params.sources:
        function = _without_params(function)
    builder.add_entry(function, name)
    return lowering.params.sources


def _without_params(function: Any) -> Any:
    """``function`` less its last parameter, the weights, of which there are none."""
    from tvm import relax

    *params, weights = function.params
    none = relax.BindingBlock([relax.VarBinding(weights, relax.Tuple([]))])
    body = relax.SeqExpr([none, *function.body.blocks], function.body.body)
    return relax.Function(params, body, function.ret_ty, function.is_pure, function.attrs)


def _names(values: Any) -> tuple[str, ...]:
    return tuple(str(v.name) for v in values)


def _writer(model: ir.Model) -> Callable[[pathlib.Path], None]:
    return lambda path: save_model(model, path)
