"""What ``mmopt inspect`` says about a model."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from mmopt.analysis.cost import CostReport, analyze_cost
from mmopt.analysis.tower_report import Part, TowerReport
from mmopt.analysis.towers import analyze_towers
from mmopt.api import load, optimize
from mmopt.cli.output import Output, size_text, table
from mmopt.ir.module import Module, initializer_bytes
from mmopt.loading import parse_modalities, parse_shapes, symbol_sizes


def inspect_model(
    name: str, target: str, shapes: Sequence[str], modalities: Sequence[str], trust_code: bool, show: Output
) -> None:
    """Print and write what the model ``name`` is made of, and what of it would run natively on ``target``.

    Raises:
        LoadError: It cannot be read.
        UserError: An unknown target, input or symbol.
    """
    module = load(name, modalities=parse_modalities(modalities), trust_code=trust_code)
    binding = symbol_sizes(module, parse_shapes(shapes))
    towers = analyze_towers(module, binding)
    cost = analyze_cost(module, binding)
    operators = collections.Counter(_operator(node) for node in module.graph.all_nodes())
    native = _native(module, target)
    _header(name, module, cost, show)
    _structure(towers, show)
    show.result("")
    show.result(table(("operator", "nodes"), operators.most_common(None if show.verbose else 15)))
    show.result("")
    for line in _native_lines(native, target):
        show.result(line)
    show.json(
        {
            "model": name,
            "nodes": sum(operators.values()),
            "parameters": cost.total_parameters,
            "weight_bytes": initializer_bytes(module.model),
            "macs": _number(cost.macs),
            "flops": _number(cost.flops),
            "operators": dict(operators),
            "towers": towers.to_dict(),
            "native": native,
        }
    )


def _header(name: str, module: Module, cost: CostReport, show: Output) -> None:
    nodes = sum(1 for _ in module.graph.all_nodes())
    show.result(
        f"model {name}: opset {module.opset}, {nodes} nodes, {cost.total_parameters:,} parameters "
        f"({size_text(initializer_bytes(module.model))}), {_quantity(cost.flops)} FLOPs"
    )
    if cost.symbols:
        show.result(f"figures depend on {', '.join(cost.symbols)}; --shape gives them sizes")
    if cost.unknown:
        show.result(f"{len(cost.unknown)} nodes have unknown shapes and are not counted")


def _structure(report: TowerReport, show: Output) -> None:
    inputs = [(name, role.modality.value, role.role, role.group, role.reason) for name, role in report.inputs.items()]
    show.result("")
    show.result(table(("input", "modality", "role", "group", "why"), inputs))
    rows = [_row("tower", tower.name, tower.part, tower.reason) for tower in report.towers]
    rows += [_row("projector", projector.tower, projector.part, projector.reason) for projector in report.projectors]
    rows += [
        ("fusion", " + ".join(fusion.towers), len(fusion.nodes), "", "", f"{fusion.kind}: {fusion.reason}")
        for fusion in report.fusions
    ]
    if report.fusions:
        rows.append(_row("trunk", report.level, report.trunk, "from the first fusion to the heads"))
    rows += [_row("head", ", ".join(head.outputs), head.part, head.reason) for head in report.heads]
    show.result("")
    show.result(table(("part", "of", "nodes", "parameters", "FLOPs", "why"), rows))
    for weight in report.shared:
        show.result(
            f"shared by {' and '.join(weight.towers)}: {', '.join(weight.names)} ({weight.parameters:,} parameters)"
        )
    if report.uncut:
        show.result(f"cannot be cut into entry points: {report.uncut}")


def _row(part: str, of: str, content: Part, reason: str) -> tuple[object, ...]:
    flops = "?" if content.macs is None else _quantity(content.macs, 2)
    return (part, of, len(content.nodes), f"{content.parameters:,}", flops, reason)


def _native(module: Module, target: str) -> dict[str, Any]:
    """What the compiler would do with the model after ``-O2``, without generating code."""
    from mmopt.backends.profile import load_profile
    from mmopt.lowering.compiler import CompileOptions
    from mmopt.lowering.partition import partition
    from mmopt.lowering.program import ProgramBuilder

    optimized = optimize(module, target=target, validate="off").module
    parts = partition(optimized, "main", ProgramBuilder(load_profile(target)), CompileOptions())
    return {
        "parts": [{"name": part.name, "kind": "native" if part.model is None else "onnxruntime"} for part in parts],
        "native": all(part.model is None for part in parts),
        "reasons": [note for part in parts for note in part.notes],
    }


def _native_lines(native: dict[str, Any], target: str) -> list[str]:
    if native["native"]:
        return [f"runs fully native on {target}"]
    kinds = collections.Counter(part["kind"] for part in native["parts"])
    lines = [f"on {target}: {kinds['native']} native parts, {kinds['onnxruntime']} parts in onnxruntime, because"]
    return lines + [f"  {reason}" for reason in native["reasons"]]


def _operator(node: Any) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else str(node.op_type)


def _quantity(size: Any, factor: int = 1) -> str:
    """A count for people; an expression stays as it is."""
    if not isinstance(size, int):
        return f"{factor}*({size})" if factor != 1 else str(size)
    count = float(size * factor)
    for unit in ("", " k", " M", " G", " T"):
        if count < 1000 or unit == " T":
            return f"{count:.4g}{unit}"
        count /= 1000
    raise AssertionError("unreachable")


def _number(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)
