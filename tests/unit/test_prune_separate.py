"""Zeros that layers share couple their units; separated they do not, and nothing changes."""

from __future__ import annotations

import numpy as np

from mmopt.analysis.axes import find_groups
from mmopt.ir.module import Module
from mmopt.transforms.prune.separate_fills import separate_fills
from tests.axes import check_cuts, free, with_weights
from tests.canonical import evaluate


def _stack(start: str) -> Module:
    random = np.random.default_rng(0)
    shapes = {"w": (1, 16, 6), "r": (1, 16, 4), "u": (1, 16, 4), "q": (1, 16, 4), "v": (4, 3)}
    arrays = {name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    arrays |= {"one": np.array([1]), "zero": np.array([0]), "two": np.array([2]), "four": np.array([4])}  # type: ignore[dict-item]
    arrays["nil"] = np.array(0, dtype=np.float32)
    text = (
        "t = Transpose<perm = [1, 0, 2]>(x) s = Shape(x) b = Slice(s, zero, one) n = Concat<axis = 0>(one, b, four)"
        f" {start} h = LSTM<hidden_size = 4>(t, w, r, , , z, z) a = Squeeze(h, one)"
        " k = LSTM<hidden_size = 4>(a, u, q, , , z, z) c = Squeeze(k, one)"
        " m = Transpose<perm = [1, 0, 2]>(c) y = MatMul(m, v)"
    )
    return with_weights(f"g (float[batch, 5, 6] x) => (float[batch, 5, 3] y) {{ {text} }}", arrays)


def _check(module: Module, copies: int) -> None:
    assert [group.units for group in free(find_groups(module)) if group.kind == "hidden units"] == [4]
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 5, 6)).astype(np.float32)}
    before, nodes = evaluate(module, feeds)["y"], len(module.graph)
    assert separate_fills(module)
    assert len(module.graph) == nodes + copies
    np.testing.assert_array_equal(evaluate(module, feeds)["y"], before)
    assert not separate_fills(module)
    groups = check_cuts(module)
    assert [group.units for group in free(groups) if group.kind == "hidden units"] == [4, 4]


def test_zeros_of_a_computed_shape() -> None:
    _check(_stack("z = ConstantOfShape(n)"), copies=1)


def test_a_number_that_is_expanded_and_sliced() -> None:
    _check(_stack("e = Expand(nil, n) z = Slice(e, zero, one, zero)"), copies=2)


def test_data_that_layers_share_stay_shared() -> None:
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal((6, 6)).astype(np.float32) for name in ("w", "v")}
    text = "h = MatMul(x, w) a = Relu(h) b = Transpose<perm = [0, 1]>(h) c = Add(a, b) y = MatMul(c, v)"
    assert not separate_fills(with_weights(f"g (float[2, 6] x) => (float[2, 6] y) {{ {text} }}", arrays))
