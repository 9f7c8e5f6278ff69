"""Random graphs: whatever groups the analysis finds, cutting them is masking them."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mmopt.ir.module import Module
from tests.axes import check_cuts
from tests.scale import GraphBuilder

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


class _Drawn:
    """Grows a graph over values ``[batch, features]`` or ``[batch, channels, height, width]`` of rank 2 and 4."""

    def __init__(self, data: st.DataObject) -> None:
        self.data, self.builder = data, GraphBuilder(seed=data.draw(st.integers(0, 9), label="seed"))
        self.pool: list[tuple[ir.Value, tuple[int, ...]]] = []

    def pick(self, label: str, rank: int | None = None) -> tuple[ir.Value, tuple[int, ...]]:
        """A value of the pool, newer ones first."""
        fitting = [entry for entry in reversed(self.pool) if rank is None or len(entry[1]) == rank]
        return self.data.draw(st.sampled_from(fitting[:4]), label=label)

    def number(self, low: int, high: int, label: str) -> int:
        return self.data.draw(st.integers(low, high), label=label)

    def add(self, value: ir.Value, shape: tuple[int, ...]) -> None:
        self.pool.append((value, shape))

    def linear(self) -> None:
        x, shape = self.pick("of")
        width = self.data.draw(st.sampled_from([4, 6, 8, 12]), label="width")
        if len(shape) == 4:
            y = self.builder.op("Conv", x, self.builder.weight(width, shape[1], 1, 1), self.builder.weight(width))
            self.add(y, (shape[0], width, *shape[2:]))
        else:
            product = self.builder.op("MatMul", x, self.builder.weight(shape[-1], width))
            self.add(self.builder.op("Add", product, self.builder.weight(width)), (*shape[:-1], width))

    def grouped(self) -> None:
        x, shape = self.pick("of", rank=4)
        groups = self.data.draw(st.sampled_from([g for g in (2, 3, 4, shape[1]) if shape[1] % g == 0]), label="groups")
        width = groups * self.number(1, 2, "each")
        weight = self.builder.weight(width, shape[1] // groups, 1, 1)
        self.add(self.builder.op("Conv", x, weight, group=groups), (shape[0], width, *shape[2:]))

    def unary(self) -> None:
        x, shape = self.pick("of")
        name = self.data.draw(st.sampled_from(["Relu", "Tanh", "Sigmoid", "Neg", "Cos"]), label="unary")
        self.add(self.builder.op(name, x), shape)

    def binary(self) -> None:
        x, shape = self.pick("left")
        same = [value for value, other in self.pool if other == shape]
        other = self.data.draw(st.sampled_from(same), label="right")
        name = self.data.draw(st.sampled_from(["Add", "Mul", "Sub", "Max"]), label="binary")
        self.add(self.builder.op(name, x, other), shape)

    def join(self) -> None:
        x, shape = self.pick("left")
        fitting = [
            e for e in self.pool if len(e[1]) == len(shape) and (*e[1][:1], *e[1][2:]) == (*shape[:1], *shape[2:])
        ]
        other, extents = self.data.draw(st.sampled_from(fitting), label="right")
        self.add(self.builder.op("Concat", x, other, axis=1), (shape[0], shape[1] + extents[1], *shape[2:]))

    def cut(self) -> None:
        x, shape = self.pick("of")
        if shape[1] == 1:
            return
        at = self.number(1, shape[1] - 1, "at")
        start, stop = self.data.draw(st.sampled_from([(0, at), (at, shape[1])]), label="side")
        numbers = [self.builder.constant([n]) for n in (start, stop, 1)]
        self.add(self.builder.op("Slice", x, *numbers), (shape[0], stop - start, *shape[2:]))

    def order(self) -> None:
        x, shape = self.pick("of")
        order = self.data.draw(st.permutations(range(shape[1])), label="order")
        self.add(self.builder.op("Gather", x, self.builder.constant(list(order)), axis=1), shape)

    def shuffle(self) -> None:
        x, shape = self.pick("of")
        factors = [f for f in range(2, shape[1]) if shape[1] % f == 0]
        if not factors:
            return
        f = self.data.draw(st.sampled_from(factors), label="factor")
        rest = list(shape[2:])
        cut = self.builder.op("Reshape", x, self.builder.constant([shape[0], f, shape[1] // f, *rest]))
        moved = self.builder.op("Transpose", cut, perm=[0, 2, 1, *range(3, 3 + len(rest))])
        self.add(self.builder.op("Reshape", moved, self.builder.constant([0, -1, *rest])), shape)

    def normalize(self) -> None:
        x, shape = self.pick("of")
        if len(shape) == 2:
            scale, bias = self.builder.weight(shape[1]), self.builder.weight(shape[1])
            self.add(self.builder.op("LayerNormalization", x, scale, bias, axis=-1), shape)
            return
        scale, bias = self.builder.weight(shape[1]), self.builder.weight(shape[1])
        self.add(self.builder.op("InstanceNormalization", x, scale, bias), shape)

    def pool_space(self) -> None:
        x, shape = self.pick("of", rank=4)
        self.add(self.builder.op("MaxPool", x, kernel_shape=[1, 1]), shape)

    def flatten(self) -> None:
        x, shape = self.pick("of", rank=4)
        self.add(self.builder.op("Flatten", x, axis=1), (shape[0], math.prod(shape[1:])))

    def gate(self) -> None:
        x, shape = self.pick("of", rank=4)
        mean = self.builder.op("GlobalAveragePool", x)
        self.add(self.builder.op("Mul", x, self.builder.op("Sigmoid", mean)), shape)

    def share(self) -> None:
        x, shape = self.pick("of")
        self.add(self.builder.op("Mul", self.builder.op("Softmax", x, axis=1), x), shape)


_STEPS = (
    "linear", "linear", "linear", "grouped", "unary", "binary", "binary", "join", "cut", "order", "shuffle",
    "normalize", "pool_space", "flatten", "gate", "share",
)  # fmt: skip
_SPATIAL = {"grouped", "pool_space", "flatten", "gate"}


def _draw_module(data: st.DataObject) -> Module:
    graph = _Drawn(data)
    shape = data.draw(st.sampled_from([(2, 5), (2, 3, 2, 2)]), label="input")
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph.add(x, shape)
    graph.linear()
    for step in data.draw(st.lists(st.sampled_from(_STEPS), min_size=3, max_size=10), label="steps"):
        spatial = any(len(extents) == 4 for _, extents in graph.pool)
        if step not in _SPATIAL or spatial:
            getattr(graph, step)()
    last, extents = graph.pool[-1]
    flat = graph.builder.op("Flatten", last, axis=1) if len(extents) == 4 else last
    y = graph.builder.op("MatMul", flat, graph.builder.weight(math.prod(extents[1:]), 2))
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([2, 2])
    return Module(graph.builder.model([x], [y]))


def _check(data: st.DataObject) -> None:
    with np.errstate(all="ignore"):
        check_cuts(_draw_module(data), seed=data.draw(st.integers(0, 3), label="units"), moves=False)


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    database=None,
    suppress_health_check=QUIET,
)
@given(st.data())
def test_slices_equal_masks_on_any_graph(data: st.DataObject) -> None:
    _check(data)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=QUIET)
@given(st.data())
def test_slices_equal_masks_on_many_graphs(data: st.DataObject) -> None:
    _check(data)
