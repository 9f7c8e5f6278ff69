"""Random small graphs through the whole canonical form: same bits, same names, nothing left to do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from mmopt.analysis.dims import evaluate as size_of
from mmopt.analysis.shapes import infer_shapes
from mmopt.errors import BackendError
from mmopt.ir.fingerprint import fingerprint
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize import Canonicalize
from tests.canonical import SIZES, check, evaluate, inputs_for
from tests.scale import GraphBuilder

_UNARY = ("Relu", "Neg", "Exp", "Identity", "Sigmoid", "Dropout", "Abs")
_BINARY = ("Add", "Sub", "Mul", "Max", "Div")


class _Graphs:
    """Draws a graph: a pool of float values with their shapes at the sizes of the test, grown node by node."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.builder = GraphBuilder(seed=data.draw(st.integers(0, 3), label="seed"))
        self.pool: list[tuple[ir.Value, tuple[int, ...]]] = []
        self.inputs: list[ir.Value] = []
        for i, dims in enumerate(data.draw(st.lists(_dims(), min_size=1, max_size=2), label="inputs")):
            value = ir.Value(name=f"x{i}", shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.FLOAT))
            self.inputs.append(value)
            self.pool.append((value, tuple(SIZES.get(d, d) for d in dims)))  # type: ignore[arg-type]
        self.condition = ir.Value(name="c", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))

    def draw(self, strategy: st.SearchStrategy[Any]) -> Any:
        return self.data.draw(strategy)

    def pick(self) -> tuple[ir.Value, tuple[int, ...]]:
        return self.pool[self.draw(st.integers(0, len(self.pool) - 1))]

    def ints(self, numbers: list[int]) -> ir.Value:
        """A vector of numbers, as a constant or computed from the shape of the first input where it says so."""
        if numbers and self.draw(st.booleans()) and all(n >= 0 for n in numbers):
            x, shape = self.pool[0]
            if shape and shape[0] in numbers:
                sizes = self.builder.op("Shape", x)
                first = self.builder.op("Gather", sizes, self.builder.constant([0]), axis=0)
                at = numbers.index(shape[0])
                parts = [self.builder.constant(p) for p in (numbers[:at], numbers[at + 1 :])]
                return self.builder.op("Concat", parts[0], first, parts[1], axis=0)
        return self.builder.constant(np.array(numbers, dtype=np.int64))

    def step(self) -> None:
        """Append one or a few nodes and put what they make into the pool."""
        kind = self.draw(st.sampled_from(sorted(_STEPS)))
        value, shape = _STEPS[kind](self, *self.pick())
        if math.prod(shape) <= 4096 and len(shape) <= 5:
            self.pool.append((value, shape))

    def module(self) -> Module:
        outputs = []
        for value, shape in self.pool[-3:]:
            producer = value.producer()
            if producer is not None and value not in outputs:
                value.type, value.shape = (
                    ir.TensorType(ir.DataType.FLOAT),
                    ir.Shape([f"d{len(outputs)}_{i}" for i in range(len(shape))]),
                )
                outputs.append(value)
        return Module(self.builder.model([*self.inputs, self.condition], outputs))


def _dims() -> st.SearchStrategy[list[int | str]]:
    return st.lists(st.sampled_from([1, 2, 3, 4, "batch", "seq"]), min_size=1, max_size=3)


def _unary(g: _Graphs, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    return g.builder.op(g.draw(st.sampled_from(_UNARY)), x), shape


def _binary(g: _Graphs, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    same = [v for v, s in g.pool if s == shape]
    other = same[g.draw(st.integers(0, len(same) - 1))]
    return g.builder.op(g.draw(st.sampled_from(_BINARY)), x, other), shape


def _with_constant(g: _Graphs, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    number = g.draw(st.sampled_from([0.0, -0.0, 1.0, 2.0]))
    operator = g.draw(st.sampled_from(["Add", "Sub", "Mul", "Div", "Pow"]))
    return g.builder.op(operator, x, g.builder.constant(number, np.float32)), shape


def _shared_weight(g: _Graphs, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    known = [w for w in g.builder.weights if w.shape == shape]
    weight = known[0] if known and g.draw(st.booleans()) else g.builder.weight(*shape)
    if g.draw(st.booleans()):
        weight = g.builder.op("Tanh", weight)
    return g.builder.op("Mul", x, weight), shape


def _casts(g: _Graphs, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    middle = g.draw(st.sampled_from([1, 11, 10, 16]))
    return g.builder.op("Cast", g.builder.op("Cast", x, to=middle), to=1), shape


def _transpose(g: _Graphs, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    perm = g.draw(st.permutations(range(len(shape))))
    return g.builder.op("Transpose", x, perm=list(perm)), tuple(shape[i] for i in perm)


def _reshape(g: _Graphs, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    cut = g.draw(st.integers(0, len(shape)))
    target = [math.prod(shape[:cut]), math.prod(shape[cut:])] if g.draw(st.booleans()) else list(reversed(shape))
    written = list(target)
    if g.draw(st.booleans()):
        written[g.draw(st.integers(0, len(target) - 1))] = -1
    if len(target) <= len(shape) and target[0] == shape[0] and g.draw(st.booleans()):
        written[0] = 0
    return g.builder.op("Reshape", x, g.ints(written)), tuple(target)


def _flatten(g: _Graphs, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    axis = g.draw(st.integers(0, len(shape)))
    return g.builder.op("Flatten", x, axis=axis), (math.prod(shape[:axis]), math.prod(shape[axis:]))


def _unsqueeze(g: _Graphs, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    axis = g.draw(st.integers(0, len(shape)))
    return g.builder.op("Unsqueeze", x, g.builder.constant([axis])), (*shape[:axis], 1, *shape[axis:])


def _squeeze(g: _Graphs, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    ones = [i for i, dim in enumerate(shape) if dim == 1]
    if not ones or len(shape) < 2:
        return _unary(g, x, shape)
    axis = g.draw(st.sampled_from(ones))
    return g.builder.op("Squeeze", x, g.builder.constant([axis])), (*shape[:axis], *shape[axis + 1 :])


def _slice(g: _Graphs, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    axis = g.draw(st.integers(0, len(shape) - 1))
    start, end, step = g.draw(st.sampled_from([(0, 2**31 - 1, 1), (0, 1, 1), (-1, -(2**31), -1), (0, 100, 2)]))
    numbers = (g.builder.constant([n]) for n in (start, end, axis, step))
    length = len(range(*slice(start, None if end < -(2**30) else end, step).indices(shape[axis])))
    return g.builder.op("Slice", x, *numbers), (*shape[:axis], length, *shape[axis + 1 :])


def _concat(g: _Graphs, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    axis, count = g.draw(st.integers(0, len(shape) - 1)), g.draw(st.integers(1, 2))
    return g.builder.op("Concat", *[x] * count, axis=axis), (*shape[:axis], shape[axis] * count, *shape[axis + 1 :])


def _expand(g: _Graphs, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    front = g.draw(st.integers(1, 2))
    return g.builder.op("Expand", x, g.ints([front, *shape])), (front, *shape)


def _branch(g: _Graphs, x: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Value, tuple[int, ...]]:
    """An If on a constant or on the model's own condition; its bodies read values of the graph around."""
    other = g.pick()[0]
    bodies = []
    for side, operator in (("then", "Neg"), ("else", g.draw(st.sampled_from(["Neg", "Identity", "Relu"])))):
        count = len(g.builder.nodes)
        used = ir.node("Identity", [x], name=f"{side}{count}a")
        dead = ir.node("Exp", [other], name=f"{side}{count}b")
        last = ir.node(operator, [used.outputs[0]], name=f"{side}{count}c")
        for i, node in enumerate((used, dead, last)):
            node.outputs[0].name = f"{side}{count}_{i}"
        last.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        bodies.append(ir.Graph([], [last.outputs[0]], nodes=[used, dead, last], name=f"{side}{count}"))
    known = g.draw(st.sampled_from([None, True, False]))
    condition = g.condition if known is None else g.builder.constant(known, np.bool_)
    return g.builder.op("If", condition, then_branch=bodies[0], else_branch=bodies[1]), shape


_STEPS = {
    "binary": _binary,
    "branch": _branch,
    "casts": _casts,
    "concat": _concat,
    "expand": _expand,
    "flatten": _flatten,
    "reshape": _reshape,
    "shared-weight": _shared_weight,
    "slice": _slice,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "unary": _unary,
    "unsqueeze": _unsqueeze,
    "with-constant": _with_constant,
}


def draw_module(data: st.DataObject, most: int) -> Module:
    """A random module of up to ``most`` + 1 steps that onnxruntime runs."""
    graphs = _Graphs(data)
    graphs.step()
    for _ in range(data.draw(st.integers(1, most), label="nodes")):
        graphs.step()
    module = graphs.module()
    try:
        evaluate(module, inputs_for(module))
    except BackendError:
        # onnxruntime (1.31) drops a Cast of which only a body reads the result, with every optimization off.
        reject()
    return module


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_canonical_form_computes_the_same_bits(data: st.DataObject) -> None:
    module = draw_module(data, 14)
    before = sum(1 for _ in module.graph.all_nodes())
    check(Canonicalize(), module, fires=_changes(module))
    assert sum(1 for _ in module.graph.all_nodes()) <= before


def _changes(module: Module) -> bool:
    """Whether the canonical form of a copy differs; what it says of itself is checked against the original's."""
    copy = module.clone()
    Canonicalize().run(copy, PassContext())
    return fingerprint(copy.model) != fingerprint(module.model)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_inferred_shapes_are_those_that_onnxruntime_makes(data: st.DataObject) -> None:
    module = draw_module(data, 14)
    facts = infer_shapes(module.model)
    results = evaluate(module, inputs_for(module))
    for value in module.graph.outputs:
        shape = facts.shape(value)
        assert shape is not None
        actual = results[str(value.name)].shape
        assert len(shape) == len(actual)
        assert [size_of(d, SIZES) for d in shape if d is not None] == [
            size for size, d in zip(actual, shape, strict=True) if d is not None
        ]
