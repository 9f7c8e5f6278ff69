"""Cutting a multimodal model at its towers: ``encode_image``, ``encode_text``, … and ``fuse``.

Every entry point is a standalone model that shares the weight tensors. ``fuse(encode_a(…), encode_b(…), …)`` computes
what the model computes. Sizes get special care: exporters like to take the batch size of all streams from whatever
input comes first, so that a text encoder asks for the shape of the image. Such a question is answered from a dimension
of the same name that the entry point does have.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from mmopt.analysis.shape_rules.types import to_ir_shape
from mmopt.analysis.shapes import Fact, ShapeFacts, infer_shapes
from mmopt.analysis.slicing import Selection, Slicer, placed
from mmopt.analysis.tower_report import Tower, TowerReport
from mmopt.errors import UnsupportedError, UserError
from mmopt.ir.module import Module

_LEARNED = frozenset({"Conv", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "ConvTranspose", "Attention", "Einsum"})


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What to take for each entry point.

    Attributes:
        encoders: Selection of nodes for each tower.
        fuse: Selection for what is left.
        cuts: Values each tower ends at.
    """

    encoders: list[Selection]
    fuse: Selection
    cuts: list[list[ir.Value]]


class _Unclean(Exception):
    """The model cannot be cut; the message says why."""


def extract_entry_points(module: Module, report: TowerReport) -> dict[str, Module]:
    """Cut a model at its towers.

    Args:
        module: The module.
        report: What :func:`mmopt.analysis.towers.analyze_towers` found in this very module.

    Returns:
        ``encode_<tower>`` for each tower, with the tower's inputs and outputs named ``encoded_<tower>`` (numbered when
        there are several), and ``fuse``, whose inputs are those outputs and what else it needs, and whose outputs are
        the model's. Spaces in names of towers become underscores. Weight tensors are shared.

    Raises:
        UnsupportedError: The model cannot be cut (``report.uncut`` says why).
        UserError: The report is about another module.
    """
    if report.uncut:
        raise UnsupportedError(f"the model cannot be cut into entry points: {report.uncut}")
    facts = infer_shapes(module.model)
    try:
        plan = _make_plan(module, report.towers, facts)
    except (_Unclean, IndexError) as error:
        raise UserError(f"the report does not fit the module: {error}", hint="analyze this module again") from error
    entries = {}
    names: list[list[str]] = []
    taken = {v.name for node in module.graph for v in node.outputs} | {v.name for v in module.graph.inputs}
    for tower, cut, selection in zip(report.towers, plan.cuts, plan.encoders, strict=True):
        names.append(_output_names(tower, len(cut), taken))
        built = _build(module, selection, [], cut, facts)
        for value, name in zip(built.outputs, names[-1], strict=True):
            value.name = name
        entries[f"encode_{identifier(tower.name)}"] = _finish(module, built, f"cut out the tower {tower.name!r}")
    stops = [value for cut in plan.cuts for value in cut]
    built = _build(module, plan.fuse, stops, list(module.graph.outputs), facts)
    _name_inputs(built, [name for group in names for name in group], list(module.graph.outputs))
    entries["fuse"] = _finish(module, built, "cut off the towers")
    return entries


def why_uncut(module: Module, towers: Sequence[Tower], facts: ShapeFacts) -> str:
    """Why a model with these towers cannot be cut; "" when it can."""
    try:
        _make_plan(module, towers, facts)
    except _Unclean as error:
        return str(error)
    return ""


def identifier(name: str) -> str:
    """A tower's name as an identifier: ``image 2`` → ``image_2``."""
    return re.sub(r"\W+", "_", name)


def _make_plan(module: Module, towers: Sequence[Tower], facts: ShapeFacts) -> _Plan:
    graph = module.graph
    slicer = Slicer(graph, facts)
    owned = {name for tower in towers for name in (*tower.inputs, *tower.auxiliary)}
    common = {v for v in graph.inputs if v.name not in owned}
    cuts = [[placed(graph, place) for place in tower.cut] for tower in towers]
    encoders = []
    for tower, cut in zip(towers, cuts, strict=True):
        own = {v for v in graph.inputs if v.name in (*tower.inputs, *tower.auxiliary)}
        selection = slicer.select(cut, (), own | common)
        if selection.refused:
            raise _Unclean(f"the tower {tower.name!r} needs {selection.refused}")
        encoders.append(selection)
    stops = {value for cut in cuts for value in cut}
    fuse = slicer.select(graph.outputs, stops, set(graph.inputs))
    if fuse.refused:
        raise _Unclean(f"the fusion needs {fuse.refused}")
    inside = {node for selection in encoders for node in selection.nodes}
    for node in fuse.nodes:
        if node in inside and node.op_type in _LEARNED:
            raise _Unclean(f"the fusion steers by what a tower computes at {node.name or node.op_type!r}")
    return _Plan(encoders, fuse, cuts)


def _output_names(tower: Tower, count: int, taken: set[str | None]) -> list[str]:
    base = f"encoded_{identifier(tower.name)}"
    names = []
    for name in [base] if count == 1 else [f"{base}_{k}" for k in range(count)]:
        while name in taken:
            name += "_"
        taken.add(name)
        names.append(name)
    return names


def _build(
    module: Module, selection: Selection, stops: list[ir.Value], outputs: Sequence[ir.Value], facts: ShapeFacts
) -> ir.Graph:
    """A graph of the selected nodes: inputs are the stops, then the model's inputs that are used."""
    original = module.graph
    asked = [question.value for question in selection.questions]
    used = [v for v in original.inputs if v in selection.inputs]
    view = ir.GraphView(
        [*stops, *used, *asked],
        outputs,
        nodes=[node for node in original if node in selection.nodes],
        initializers=[v for v in original.initializers.values() if v in selection.values],
        opset_imports=dict(original.opset_imports),
        name=original.name,
    )
    graph = view.clone()
    for value, source in (*zip(graph.inputs, view.inputs, strict=True), *zip(graph.outputs, outputs, strict=True)):
        if not source.is_graph_input() and not source.is_graph_output():
            _annotate(value, facts.fact(source))
    sources = dict(zip([*stops, *used], graph.inputs, strict=False))
    placeholders = list(graph.inputs[len(stops) + len(used) :])
    for question, placeholder in zip(selection.questions, placeholders, strict=True):
        answer = _answer(graph, question.dims, lambda v: sources[v], f"{placeholder.name}_sizes")
        placeholder.replace_all_uses_with(answer)
        graph.inputs.remove(placeholder)
    return graph


def _annotate(value: ir.Value, fact: Fact) -> None:
    """Give a value that becomes a border the inferred type and shape; annotations inside a model may be wrong."""
    if fact.type is not None:
        value.type = fact.type
    if fact.shape is not None:
        value.shape = to_ir_shape(fact.shape)


def _answer(
    graph: ir.Graph, dims: Sequence[int | tuple[ir.Value, int]], source: Callable[[ir.Value], ir.Value], name: str
) -> ir.Value:
    """Nodes that make the vector of sizes a Shape node would have given."""
    nodes: list[ir.Node] = []
    parts: list[ir.Value] = []

    def emit(op: str, inputs: Sequence[ir.Value], attributes: Iterable[ir.Attr] = ()) -> ir.Value:
        label = f"{name}_{len(nodes)}"
        node = ir.Node("", op, inputs, attributes, name=label)
        node.outputs[0].name, node.outputs[0].type = label, ir.TensorType(ir.DataType.INT64)
        nodes.append(node)
        return node.outputs[0]

    def vector(numbers: Sequence[int], label: str) -> ir.Value:
        tensor = ir.tensor(np.array(numbers, np.int64), name=label)
        return emit("Constant", (), [ir.AttrTensor("value", tensor)])

    for position, dim in enumerate(dims):
        if isinstance(dim, int):
            parts.append(vector([dim], f"{name}_c{position}"))
        else:
            value, axis = dim
            index = vector([axis], f"{name}_i{position}")
            parts.append(emit("Gather", [emit("Shape", [source(value)]), index], [ir.AttrInt64("axis", 0)]))
    answer = parts[0] if len(parts) == 1 else emit("Concat", parts, [ir.AttrInt64("axis", 0)])
    first = next(iter(graph), None)
    if first is None:
        graph.extend(nodes)
    else:
        graph.insert_before(first, nodes)
    return answer


def _name_inputs(graph: ir.Graph, names: Sequence[str], outputs: Sequence[ir.Value]) -> None:
    """Name the inputs of ``fuse``; an output that is one of them passes through an Identity under its own name."""
    for value, name in zip(list(graph.inputs), names, strict=False):
        value.name = name
    inputs = set(graph.inputs)
    for position, output in enumerate(list(graph.outputs)):
        if output in inputs:
            node = ir.Node("", "Identity", [output], name=f"{output.name}_through")
            node.outputs[0].type, node.outputs[0].shape = output.type, output.shape
            graph.append(node)
            graph.outputs[position] = node.outputs[0]
            node.outputs[0].name = outputs[position].name


def _finish(module: Module, graph: ir.Graph, what: str) -> Module:
    model = ir.Model(
        graph,
        ir_version=module.model.ir_version,
        producer_name=module.model.producer_name,
        producer_version=module.model.producer_version,
        functions=[function.clone() for function in module.model.functions.values()],
    )
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    names = {v.name for v in graph.inputs}
    kept = {name: modality for name, modality in module.modalities.items() if name in names}
    return Module(model, kept, [], [*module.provenance, what]).clone()
