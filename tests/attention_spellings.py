"""Attention in the spellings of many exporters, from one description: for tests of the pass that recognises it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from mmopt.ir.module import Module
from tests.scale import GraphBuilder

FLOAT, BOOL = ir.DataType.FLOAT, ir.DataType.BOOL


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How one attention is written.

    Attributes:
        heads: Heads of the queries.
        kept: Heads of keys and values, each repeated.
        size: Size of a head.
        keys: Number of keys; as many as queries, and from the same input, when 0.
        dynamic: Whether batch and sequence are named sizes.
        layout: ``heads``, ``bmm``, ``split``, ``gather`` (both from one projection), ``einsum``
            or ``keras`` (keys before queries).
        scale: Where the scale stands: ``scores-mul``, ``scores-div``, ``query``, ``key``, ``both``, ``none``.
        mask: ``none``, ``added`` (an input [batch, 1, 1, keys]), ``chosen`` (a boolean input), ``bert``
            ((1 - m) · -10000), ``causal-added``, ``causal-chosen``, ``bias`` (a weight), ``scaled`` (added
            before the scale).
        softcap: Bound of the scores, 0 for none.
        guard: Whether NaN weights become 0.
        merged: Whether the heads are merged afterwards.
        split_transpose: Whether keys are transposed by a node of their own.
    """

    heads: int = 2
    kept: int = 2
    size: int = 4
    keys: int = 0
    dynamic: bool = False
    layout: str = "heads"
    scale: str = "scores-mul"
    mask: str = "none"
    softcap: float = 0.0
    guard: bool = False
    merged: bool = True
    split_transpose: bool = True

    @property
    def count(self) -> int:
        """Number of keys."""
        return self.keys or 5


LAYOUTS = ("heads", "bmm", "split", "gather", "einsum", "keras")
EINSUMS = ("einsum", "keras")
SCALES = ("scores-mul", "scores-div", "query", "key", "both", "none")
MASKS = ("none", "added", "chosen", "bert", "causal-added", "causal-chosen", "bias", "scaled")


def build(spelling: Spelling, seed: int = 0) -> Module:
    """A model ``y = attention(x)`` (with ``memory`` and ``mask`` where the spelling needs them)."""
    return _Writer(spelling, seed).module()


class _Writer:
    def __init__(self, spelling: Spelling, seed: int) -> None:
        self.s, self.b = spelling, GraphBuilder(seed)
        self.batch: Any = "batch" if spelling.dynamic else 2
        self.seq: Any = "seq" if spelling.dynamic else 5
        self.total: Any = spelling.keys or self.seq
        hidden = spelling.heads * spelling.size
        self.x = _input("x", [self.batch, self.seq, hidden])
        self.inputs = [self.x]

    def module(self) -> Module:
        query, key, value = self._operands()
        scores = self._scaled(self._scores(query, key))
        weights = self._weights(self._masked(self._capped(scores)))
        mixed = self._mixed(weights, value)
        out = self._merged(mixed) if self.s.merged else self.b.op("Tanh", mixed)
        out.name, out.type = "y", ir.TensorType(FLOAT)
        out.shape = ir.Shape([f"y{n}" for n in range(3 if self.s.merged or self.s.layout == "bmm" else 4)])
        return Module(self.b.model(self.inputs, [out]))

    # -- operands --------------------------------------------------------------------------------------------------

    def _operands(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        b, s = self.b, self.s
        hidden, narrow = s.heads * s.size, s.kept * s.size
        memory = self.x
        if s.keys:
            memory = _input("memory", [self.batch, s.keys, hidden])
            self.inputs.append(memory)
        if s.layout in ("split", "gather") and not s.keys and s.kept == s.heads:
            return self._packed(hidden)
        projected = [b.op("Add", b.op("MatMul", self.x, b.weight(hidden, hidden)), b.weight(hidden))]
        projected += [b.op("MatMul", memory, b.weight(hidden, narrow)) for _ in range(2)]
        counts = (s.heads, s.kept, s.kept)
        query, key, value = (self._heads(x, n) for x, n in zip(projected, counts, strict=True))
        return query, self._repeated(key), self._repeated(value)

    def _packed(self, hidden: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        b, s = self.b, self.s
        whole = b.op("MatMul", self.x, b.weight(hidden, 3 * hidden))
        if s.layout == "split":
            parts = ir.node("Split", [whole], {"axis": -1, "num_outputs": 3}, num_outputs=3, name="parts")
            for n, output in enumerate(parts.outputs):
                output.name = f"part{n}"
            b.nodes.append(parts)
            first, second, third = (self._heads(part, s.heads) for part in parts.outputs)
            return first, second, third
        cut = b.op("Reshape", whole, b.constant([0, 0, 3, s.heads, s.size]))
        cut = b.op("Transpose", cut, perm=[2, 0, 3, 1, 4])
        first, second, third = (b.op("Gather", cut, b.constant(n), axis=0) for n in range(3))
        return first, second, third

    def _heads(self, x: ir.Value, count: int) -> ir.Value:
        cut = self.b.op("Reshape", x, self.b.constant([0, 0, count, self.s.size]))
        return cut if self.s.layout in EINSUMS else self.b.op("Transpose", cut, perm=[0, 2, 1, 3])

    def _repeated(self, x: ir.Value) -> ir.Value:
        s, b = self.s, self.b
        if s.kept == s.heads:
            return x
        axis = 3 if s.layout in EINSUMS else 2
        shape = [1, 1, 1, 1, 1]
        shape[axis] = s.heads // s.kept
        wide = b.op("Expand", b.op("Unsqueeze", x, b.constant([axis])), b.constant(shape))
        return b.op("Reshape", wide, b.constant([0, 0, s.heads, s.size] if axis == 3 else [0, s.heads, -1, s.size]))

    # -- scores ----------------------------------------------------------------------------------------------------

    def _scores(self, query: ir.Value, key: ir.Value) -> ir.Value:
        b, s = self.b, self.s
        root = b.constant(s.size**-0.25, np.float32)
        if s.scale in ("query", "both"):
            query = b.op("Mul", query, root if s.scale == "both" else b.constant(s.size**-0.5, np.float32))
        if s.layout == "bmm":
            query, key = self._flat(query), self._flat(key)
        if s.scale in ("key", "both"):
            key = b.op("Mul", b.constant([s.size**-0.5], np.float32) if s.scale == "key" else root, key)
        if s.layout == "einsum":
            return b.op("Einsum", query, key, equation="bihd,bjhd->bhij")
        if s.layout == "keras":
            return b.op("Einsum", key, query, equation="aecd,abcd->acbe")
        rank = 3 if s.layout == "bmm" else 4
        return b.op("MatMul", query, b.op("Transpose", key, perm=[*range(rank - 2), rank - 1, rank - 2]))

    def _flat(self, x: ir.Value) -> ir.Value:
        length = self.b.op("Shape", x, start=2)
        return self.b.op("Reshape", x, self.b.op("Concat", self.b.constant([-1]), length, axis=0))

    def _scaled(self, scores: ir.Value) -> ir.Value:
        b, s = self.b, self.s
        if s.mask == "scaled":
            scores = b.op("Add", scores, b.op("Mul", self._input_mask(FLOAT), b.constant(-3.0, np.float32)))
        if s.scale == "scores-mul":
            return b.op("Mul", scores, b.constant(s.size**-0.5, np.float32))
        if s.scale == "scores-div":
            return b.op("Div", scores, b.op("Sqrt", b.constant(float(s.size), np.float32)))
        return scores

    def _capped(self, scores: ir.Value) -> ir.Value:
        if not self.s.softcap or self.s.mask == "scaled":
            return scores
        cap = self.b.constant(self.s.softcap, np.float32)
        return self.b.op("Mul", self.b.op("Tanh", self.b.op("Div", scores, cap)), cap)

    def _input_mask(self, dtype: ir.DataType) -> ir.Value:
        mask = _input("mask", [self.batch, 1, 1, self.total], dtype)
        self.inputs.append(mask)
        return self._on_bmm(mask)

    def _on_bmm(self, mask: ir.Value) -> ir.Value:
        """On flattened heads a mask of the batch has to be written out for every head."""
        if self.s.layout != "bmm":
            return mask
        wide = self.b.op("Expand", mask, self.b.constant([1, self.s.heads, 1, 1]))
        return self.b.op("Reshape", wide, self.b.constant([-1, 1, self.s.count]))

    def _masked(self, scores: ir.Value) -> ir.Value:
        b, s = self.b, self.s
        lowest = b.constant(float(np.finfo(np.float32).min), np.float32)
        if s.mask == "added":
            return b.op("Add", self._input_mask(FLOAT), scores)
        if s.mask == "bert":
            gone = b.op("Sub", b.constant(1.0, np.float32), self._input_mask(FLOAT))
            return b.op("Add", scores, b.op("Mul", gone, b.constant(-10000.0, np.float32)))
        if s.mask == "chosen":
            return b.op("Where", self._input_mask(BOOL), scores, lowest)
        triangle = np.tril(np.ones((5, s.count), dtype=bool))
        if s.mask == "causal-added":
            return b.op("Add", scores, b.constant(np.where(triangle, 0, -np.inf)[None], np.float32))
        if s.mask == "causal-chosen":
            return b.op("Where", b.constant(~triangle, np.bool_), lowest, scores)
        if s.mask == "bias":
            return b.op("Add", scores, b.weight(*([] if s.layout == "bmm" else [s.heads]), 5, s.count))
        return scores

    # -- weights ---------------------------------------------------------------------------------------------------

    def _weights(self, scores: ir.Value) -> ir.Value:
        weights = self.b.op("Softmax", scores, axis=-1)
        if not self.s.guard:
            return weights
        return self.b.op("Where", self.b.op("IsNaN", weights), self.b.constant(0.0, np.float32), weights)

    def _mixed(self, weights: ir.Value, value: ir.Value) -> ir.Value:
        if self.s.layout in EINSUMS:
            return self.b.op("Einsum", weights, value, equation="bhij,bjhd->bihd")
        return self.b.op("MatMul", weights, self._flat(value) if self.s.layout == "bmm" else value)

    def _merged(self, mixed: ir.Value) -> ir.Value:
        b, s = self.b, self.s
        if s.layout == "bmm":
            mixed = b.op("Reshape", mixed, b.constant([-1, s.heads, 5, s.size]))
        if s.layout not in EINSUMS:
            mixed = b.op("Transpose", mixed, perm=[0, 2, 1, 3])
        return b.op("Reshape", mixed, b.constant([0, 0, -1]))


def _input(name: str, shape: list[Any], dtype: ir.DataType = FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def feeds_for(module: Module, seed: int = 0) -> dict[str, Any]:
    """Seeded inputs; masks keep at least the first key of every row."""
    random, feeds = np.random.default_rng(seed), {}
    for value in module.graph.inputs:
        shape = [dim if isinstance(dim, int) else {"batch": 2, "seq": 5}[str(dim)] for dim in value.shape or ()]
        if value.name == "mask":
            keep = random.random(shape) < 0.6
            keep[..., 0] = True
            feeds["mask"] = keep if value.dtype == BOOL else keep.astype(np.float32)
        else:
            feeds[str(value.name)] = random.standard_normal(shape).astype(np.float32) * 2
    return feeds
