"""Presets at the same size: one scheme for all layers, by place, or by measured sensitivity."""

from __future__ import annotations

import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

import mmopt
from benchmarks.quantizing import judging
from benchmarks.quantizing.methods import by_mmopt
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass
from mmopt.transforms.quantize import CompressWeights, Quantize, QuantizeWeights
from mmopt.transforms.quantize.assignment import SCHEMES, nbytes, parameters
from mmopt.transforms.quantize.compress_weights import Store, stores
from mmopt.transforms.quantize.layers import KINDS, Layer, Selection, layers
from mmopt.transforms.quantize.quantize import by_place

BUDGETS = (0.17, 0.19, 0.21, 0.235)
"""Bytes of the layers' weights, scales included, as a share of those in float32."""

STORED = ("digits",)
"""Networks whose tables and recurrent weights take part: besides their convolutions, few products are left."""

_UNIFORM = ((8.0, 8, 0), (6.0, 4, 16), (5.0, 4, 32))
"""Bits of a weight, scales included, bits of its integer, and weights that share a scale."""
_EDGES = (0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)


def presets(module: Module, budget: float, *, storage: bool) -> Iterator[tuple[str, tuple[Pass, ...]]]:
    """The best that each preset has for a budget, weights only; with ``storage``, of tables and recurrences too."""
    bits, block = next((bits, block) for size, bits, block in _UNIFORM if size / 32 <= budget)
    few: Literal[4, 8] = 8 if bits == 8 else 4
    uniform = QuantizeWeights(bits=few, block=block, kinds=KINDS)
    yield "uniform", (uniform, CompressWeights(bits=few, block=block)) if storage else (uniform,)
    found: list[Layer | Store] = [layer for layer in layers(module) if not Selection().refusal(layer)]
    found += stores(module) if storage else []
    total = sum(parameters(layer) for layer in found)
    for edge in _EDGES:
        places = by_place(module, found, "w4", "w8", edge)
        if sum(nbytes(layer, SCHEMES[places[layer.name]]) for layer in found) <= budget * 4 * total:
            yield "hierarchical", (Quantize(preset="hierarchical", highest="w8", edge=edge, storage=storage),)
            break
    yield "mixed", (Quantize(preset="mixed", budget=budget, schemes=("w8", "w4"), storage=storage),)


def compare(name: str, folder: pathlib.Path, budgets: Sequence[float] = BUDGETS) -> list[dict[str, Any]]:
    """Quantize one network by every preset to every budget, and measure what its outputs lose."""
    source = folder / f"{name}.onnx"
    calibration, test = (dict(np.load(folder / f"{name}.{part}.npz")) for part in ("calibration", "test"))
    labels = test.pop("labels", None)
    plain = judging.outputs(source, test)
    before = judging.scores(plain, plain, labels)
    # Before fusion, as the presets see it.
    module = mmopt.optimize(mmopt.load(source), level=1, validate="off", threads=1).module
    rows: list[dict[str, Any]] = []
    for budget in budgets:
        losses: dict[str, Any] = {}
        for preset, passes in presets(module, budget, storage=name in STORED):
            spec = ", ".join(pass_.spec() for pass_ in passes)
            print(f"{name}: {budget:g} {spec} …", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="mmopt-budgets-") as scratch:
                target = pathlib.Path(scratch) / "quantized.onnx"
                by_mmopt(*passes)(source, calibration, target)
                found = judging.outputs(target, test)
            losses[preset] = judging.losses(found, plain)
            change, low, high = judging.interval(judging.scores(found, plain, labels), before)
            rows.append(
                {
                    "network": name, "budget": budget, "preset": preset, "pass": spec,
                    "error": float(np.sqrt(losses[preset].mean())), "change": change, "low": low, "high": high,
                }
            )  # fmt: skip
        for row in rows[-len(losses) :]:
            mean, low, high = judging.interval(losses["mixed"], losses[row["preset"]])
            row["less"] = [float(value / losses[row["preset"]].mean()) for value in (mean, low, high)]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows in Markdown."""
    lines = [
        "| network | budget | preset | error of the outputs | score (95 %) | squared error of mixed beside it (95 %) |",
        f"|{' --- |' * 6}",
    ]
    for row in rows:
        mean, low, high = row["less"]
        beside = "" if row["preset"] == "mixed" else f"{mean:+.0%} ({low:+.0%} … {high:+.0%})"
        lines.append(
            f"| {row['network']} | {row['budget']:g}× | `{row['pass']}` | {row['error']:.2%} "
            f"| {row['change']:+.3f} ({row['low']:+.3f} … {row['high']:+.3f}) | {beside} |"
        )
    return lines
