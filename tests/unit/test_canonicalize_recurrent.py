"""Weights of recurrent layers: gates cut out of one weight and put in another order become one initializer."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize import Canonicalize, FoldConstants
from tests.canonical import check, module_from, ops

GATES = "float[8,30] w = {" + ", ".join(str(value) for value in range(240)) + "}"
CUTS = "int64[1] o = {0}, int64[1] a = {2}, int64[1] b = {4}, int64[1] c = {6}, int64[1] e = {8}"
NBYTES = 8 * 30 * 4


def _reordered(last: str = "Slice(w, c, e, o)", rest: str = "y = MatMul(x, r)", width: int = 8) -> Module:
    """``x · reordered(w)`` with the gates of ``w`` in the order 0, 3, 1, 2, each 2 rows."""
    return module_from(
        f"g (float[2,{width}] x) => (float[p,q] y) <{GATES}, {CUTS}> {{ i = Slice(w, o, a, o) f = Slice(w, a, b, o)"
        f" g = Slice(w, b, c, o) h = {last} r = Concat<axis = 0>(i, h, f, g) {rest} }}"
    )


def test_gates_in_another_order_are_one_weight_of_the_same_size() -> None:
    module = _reordered()
    check(FoldConstants(max_bytes=200), module)
    assert ops(module) == ["MatMul"]
    weight = module.graph.initializers["r"].const_value
    assert weight is not None
    np.testing.assert_array_equal(weight.numpy()[:, 0], [0, 30, 180, 210, 60, 90, 120, 150])


def test_what_is_read_elsewhere_is_not_doubled() -> None:
    module = _reordered(rest="m = MatMul(x, r) n = MatMul(x, w) y = Add(m, n)")
    context = check(FoldConstants(max_bytes=200), module, fires=False)
    assert [remark.message for remark in context.remarks] == [
        "Slice of constants is not computed: it would take 240 bytes."
    ] * 4


def test_slices_that_overlap_beyond_their_source_stay() -> None:
    check(FoldConstants(max_bytes=200), _reordered("Slice(w, o, e, o)", width=14), fires=False)


def test_what_is_made_on_the_way_does_not_count_towards_the_total() -> None:
    chain = "u = Unsqueeze(r, o) s = Squeeze(u, o) y = MatMul(x, s)"
    module = _reordered(rest=chain)
    check(FoldConstants(max_bytes=200, max_total_bytes=NBYTES), module)
    assert ops(module) == ["MatMul"]
    check(FoldConstants(max_bytes=200, max_total_bytes=NBYTES // 8), _reordered(rest=chain), fires=False)


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize("bidirectional", [False, True])
def test_exported_layers_have_constant_weights_of_the_size_torch_has(bidirectional: bool) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from mmopt.frontends.torch import load_torch

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options = {"batch_first": True, "bidirectional": bidirectional}
            width = 16 * (2 if bidirectional else 1)
            self.lstm, self.gru = torch.nn.LSTM(6, 16, **options), torch.nn.GRU(width, 16, **options)
            self.rnn = torch.nn.RNN(width, 16, **options)

        def forward(self, x: object) -> object:
            return self.rnn(self.gru(self.lstm(x)[0])[0])[0]

    model = Stack().eval()
    module = load_torch(model, (torch.zeros(2, 4, 6),), dynamic_shapes={"x": {0: "batch", 1: "steps"}})
    Canonicalize(max_bytes=256).run(module, PassContext())
    layers = [node for node in module.graph if node.op_type in ("LSTM", "GRU", "RNN")]
    assert len(layers) == 3
    weights = [value for node in layers for value in node.inputs[1:4]]
    assert all(value is not None and value.const_value is not None for value in weights)
    size = sum(math.prod(value.shape.numpy()) for value in weights if value is not None and value.shape is not None)
    assert size == sum(parameter.numel() for parameter in model.parameters())
