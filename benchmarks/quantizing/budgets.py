"""Presets at the same size: one scheme for all layers, by place, or by measured sensitivity."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import mmopt
from benchmarks.quantizing import judging
from benchmarks.quantizing.methods import by_mmopt
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass
from mmopt.transforms.quantize import Quantize, QuantizeWeights
from mmopt.transforms.quantize.assignment import SCHEMES, escaped, parameters
from mmopt.transforms.quantize.layers import Selection, layers
from mmopt.transforms.quantize.quantize import by_place

BUDGETS = (0.17, 0.19, 0.21, 0.235)
"""Bytes of the layers' weights, scales included, as a share of those in float32."""

_UNIFORM = (
    (8.0, QuantizeWeights(bits=8)),
    (6.0, QuantizeWeights(bits=4, block=16)),
    (5.0, QuantizeWeights(bits=4, block=32)),
)
_EDGES = (0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)


def presets(module: Module, budget: float) -> Iterator[tuple[str, Pass]]:
    """The best that each preset has for a budget, weights only."""
    yield "uniform", next(pass_ for bits, pass_ in _UNIFORM if bits / 32 <= budget)
    chosen = [layer for layer in layers(module) if not Selection().refusal(layer)]
    found = [layer for layer in chosen if SCHEMES["w4"].fits(layer)]
    # Convolutions have no kernels for weights alone.
    floats = tuple(f"{escaped(layer.name)}=fp32" for layer in chosen if layer not in found)
    total = sum(parameters(layer) for layer in found)
    for edge in _EDGES:
        places = by_place(module, found, "w4", "w8", edge)
        bits = sum(SCHEMES[places[layer.name]].bits * parameters(layer) for layer in found)
        if bits / (32 * total) <= budget:
            yield "hierarchical", Quantize(preset="hierarchical", highest="w8", edge=edge, table=floats)
            break
    yield "mixed", Quantize(preset="mixed", budget=budget, schemes=("w8", "w4"))


def compare(name: str, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Quantize one network by every preset to every budget, and measure what its outputs lose."""
    source = folder / f"{name}.onnx"
    calibration, test = (dict(np.load(folder / f"{name}.{part}.npz")) for part in ("calibration", "test"))
    labels = test.pop("labels", None)
    plain = judging.outputs(source, test)
    before = judging.scores(plain, plain, labels)
    # Before fusion, as the presets see it.
    module = mmopt.optimize(mmopt.load(source), level=1, validate="off", threads=1).module
    rows: list[dict[str, Any]] = []
    for budget in BUDGETS:
        losses: dict[str, Any] = {}
        for preset, pass_ in presets(module, budget):
            print(f"{name}: {budget:g} {pass_.spec()} …", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="mmopt-budgets-") as scratch:
                target = pathlib.Path(scratch) / "quantized.onnx"
                by_mmopt(pass_)(source, calibration, target)
                found = judging.outputs(target, test)
            losses[preset] = judging.losses(found, plain)
            change, low, high = judging.interval(judging.scores(found, plain, labels), before)
            rows.append(
                {
                    "network": name, "budget": budget, "preset": preset, "pass": _short(pass_),
                    "error": float(np.sqrt(losses[preset].mean())), "change": change, "low": low, "high": high,
                }
            )  # fmt: skip
        for row in rows[-len(losses) :]:
            mean, low, high = judging.interval(losses["mixed"], losses[row["preset"]])
            row["less"] = [float(value / losses[row["preset"]].mean()) for value in (mean, low, high)]
    return rows


def _short(pass_: Pass) -> str:
    """A pass without the names of layers that no preset here takes."""
    return dataclasses.replace(pass_, table=()).spec() if isinstance(pass_, Quantize) else pass_.spec()


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
