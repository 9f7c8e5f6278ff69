"""Keeps one of several equal initializers.

    Add(x, a), Add(y, b) with a = b bit for bit   →   Add(x, a), Add(y, a)

Weights are read only when another one has the same type and shape, a few bytes of each first, and one at a time. A
body's initializer gives way to an equal one of a graph around it. Inputs with a default and graph outputs stay.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.ir.fingerprint import tensor_digest
from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.canonicalize import editing

_SAMPLE = 1024
"""Elements read from the front, the middle and the end of a tensor before all of it is."""

_Key = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class DeduplicateInitializers(Pass):
    """Keeps one of several equal initializers."""

    def run(self, module: Module, context: PassContext) -> bool:
        """Merge equal initializers of the main graph and of the bodies inside it."""
        merger = _Merger(module.model)
        merger.visit(module.model.graph, [])
        if merger.saved:
            self.remark(
                context, "applied", "", f"{merger.count} initializers were copies of others: {merger.saved} bytes."
            )
        return merger.count > 0


class _Merger:
    """Finds copies by ever dearer keys: type and shape, a sample, the whole contents."""

    def __init__(self, model: ir.Model) -> None:
        self.count = self.saved = 0
        self._first: dict[tuple[ir.Graph, _Key], ir.Value] = {}
        everything = [value for graph in model.graphs() for value in _candidates(graph)]
        shared = _shared({value: _kind(value) for value in everything})
        sampled = {value: (*_kind(value), _sample(value)) for value in shared}
        self._keys = {value: (*sampled[value], _contents(value)) for value in _shared(sampled)}

    def visit(self, graph: ir.Graph, around: list[ir.Graph]) -> None:
        """Merge into the first equal initializer that ``graph`` can see."""
        scope = [*around, graph]
        for value in _candidates(graph):
            key = self._keys.get(value)
            if key is None:
                continue
            kept = next((self._first[g, key] for g in scope if (g, key) in self._first), None)
            if kept is None:
                self._first[graph, key] = value
            elif not value.is_graph_output():
                self._merge(value, kept)
        for node in graph:
            for body in editing.bodies(node):
                self.visit(body, scope)

    def _merge(self, value: ir.Value, kept: ir.Value) -> None:
        self.count += 1
        self.saved += value.const_value.nbytes if value.const_value is not None else 0
        value.replace_all_uses_with(kept)
        if value.graph is not None and value.name is not None:
            del value.graph.initializers[value.name]


def _candidates(graph: ir.Graph) -> list[ir.Value]:
    return [
        value for value in graph.initializers.values() if value.const_value is not None and not value.is_graph_input()
    ]


def _shared(keys: dict[ir.Value, _Key]) -> list[ir.Value]:
    """Values whose key another value has too."""
    groups: dict[_Key, list[ir.Value]] = {}
    for value, key in keys.items():
        groups.setdefault(key, []).append(value)
    return [value for group in groups.values() if len(group) > 1 for value in group]


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise ValueError(f"initializer {value.name!r} has no data")
    return value.const_value


def _kind(value: ir.Value) -> _Key:
    tensor = _tensor(value)
    return (tensor.dtype, tuple(tensor.shape.numpy()))


def _sample(value: ir.Value) -> object:
    tensor = _tensor(value)
    if tensor.size <= 3 * _SAMPLE or tensor.dtype == ir.DataType.STRING:
        return None
    flat = np.asarray(tensor.numpy()).reshape(-1)
    middle = flat.size // 2
    parts = (flat[:_SAMPLE], flat[middle : middle + _SAMPLE], flat[-_SAMPLE:])
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).digest()


def _contents(value: ir.Value) -> object:
    return tensor_digest(_tensor(value))
