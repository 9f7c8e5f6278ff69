"""Small concrete sizes for the symbolic dimensions of a model's inputs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

import onnx_ir as ir

from mmopt.analysis import dims
from mmopt.ir.module import Module

_STEPS = (7, 9, 5, 11, 13, 6, 10, 12)
"""Sizes of the symbols in order of appearance: small, distinct, and none a power of two."""

_LENGTH_WORDS = re.compile("time|seq|len|step|token|frame|sample")
"""Names of sizes that are no batch even when they come first."""

_UNKNOWN_RANK = ((7,), (2, 7), (), (2, 3, 8, 8))


@dataclasses.dataclass(frozen=True)
class Regime:
    """One way to choose sizes.

    Attributes:
        length: Size of the first symbol that is no batch and no image side; None for small distinct ones.
        side: Size of both sides of images and video frames.
        batch: Size of the batch; 0 for a small one of its own in every set.
        frames: Frames of a video; 0 for a small number like any length.
    """

    length: int | None
    side: int
    batch: int = 0
    frames: int = 0


REGIMES = (
    Regime(None, 32), Regime(None, 112, frames=8), Regime(None, 112, frames=16), Regime(512, 64), Regime(256, 224),
    Regime(None, 224), Regime(16, 32, 1), Regime(1, 32, 1), Regime(64, 128), Regime(1600, 32), Regime(3000, 384),
)  # fmt: skip
"""Tried in this order until the model runs: what it accepts can hang on strides, tables and windows inside."""


def concrete_shapes(
    module: Module, regime: Regime, *, number: int = 0, sizes: Mapping[str, int] | None = None
) -> dict[str, tuple[int, ...]]:
    """Shapes of all inputs, with one size for every occurrence of a symbol.

    Args:
        module: The module.
        regime: How to choose sizes.
        number: Number of the set of inputs; sets differ in batch and, in the small regime, in lengths.
        sizes: Sizes that are given, by symbol, or by ``input.axis`` for dimensions without a name.
    """
    chosen = _choose(module, regime, number, sizes or {})
    return {str(value.name): _shape(value, chosen, number) for value in module.graph.inputs}


def _choose(module: Module, regime: Regime, number: int, sizes: Mapping[str, int]) -> dict[str, int]:
    chosen = dict(sizes)
    # Sets keep small sizes apart: 2 and 1 in the batch, neighbouring steps in the lengths.
    batch = regime.batch or 2 - number % 2
    steps = iter(_STEPS[number % 2 :] + _STEPS)
    first_length = regime.length
    for value, axis, symbol in _symbols(module):
        if symbol in chosen:
            continue
        kind = _kind(value, axis, symbol)
        if kind == "batch":
            chosen[symbol] = batch
        elif kind == "side":
            chosen[symbol] = regime.side
        elif kind == "channels":
            chosen[symbol] = 3
        elif kind == "frames" and regime.frames:
            chosen[symbol] = regime.frames
        elif first_length is not None:
            chosen[symbol] = first_length
            first_length = None if regime.length != 1 else 1
        else:
            chosen[symbol] = next(steps)
    return chosen


def _symbols(module: Module) -> Iterator[tuple[ir.Value, int, str]]:
    """Every symbol of the inputs' shapes, with a place where it occurs; unnamed dimensions as ``input.axis``."""
    for value in module.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, int):
                continue
            if dim.value is None:
                yield value, axis, _unnamed(value, axis)
                continue
            for symbol in sorted(dims.symbols(dims.parse_dim(dim.value))):
                yield value, axis, symbol


def _kind(value: ir.Value, axis: int, symbol: str) -> str:
    rank = len(value.shape or ())
    if "batch" in symbol.lower() or (axis == 0 and not _LENGTH_WORDS.search(symbol.lower())):
        return "batch"
    if rank in (4, 5) and axis >= rank - 2 and _is_float(value):
        return "side"
    if rank == 4 and axis == 1 and _is_float(value):
        return "channels"
    if rank == 5:
        return "frames"
    return "batch" if _is_state(value, axis) else "length"


def _is_state(value: ir.Value, axis: int) -> bool:
    """Whether the dimension is the batch in the state of recurrent layers: [layers, batch, hidden]."""
    if value.shape is None or len(value.shape) != 3 or axis != 1:
        return False
    layers, _, hidden = value.shape
    return isinstance(layers, int) and isinstance(hidden, int) and 1 < layers <= 8


def _shape(value: ir.Value, chosen: Mapping[str, int], number: int) -> tuple[int, ...]:
    if value.shape is None:
        return _UNKNOWN_RANK[number % len(_UNKNOWN_RANK)] if isinstance(value.type, ir.TensorType) else (2, 3)
    return tuple(
        dim if isinstance(dim, int) else _size(dim, _unnamed(value, axis), chosen)
        for axis, dim in enumerate(value.shape)
    )


def _size(dim: ir.SymbolicDim, unnamed: str, chosen: Mapping[str, int]) -> int:
    if dim.value is None:
        return chosen[unnamed]
    return max(0, dims.evaluate(dims.parse_dim(dim.value), chosen))


def _unnamed(value: ir.Value, axis: int) -> str:
    return f"{value.name}.{axis}"


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()
