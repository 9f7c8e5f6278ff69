"""Repair: rows of every kind of product are what the operator reads, and the fit is the least-squares one."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mmopt.analysis.axes import find_groups
from mmopt.errors import UserError
from mmopt.ir.module import Module, save_model
from mmopt.pipeline.base import PassContext
from mmopt.transforms.prune import PruneStructured, RepairLeastSquares
from mmopt.transforms.prune.choice import plan_cut
from mmopt.transforms.prune.linear_maps import linear_maps, norm_maps
from mmopt.transforms.prune.reference import reference_of, remember
from mmopt.transforms.prune.repair_least_squares import STRENGTHS
from mmopt.transforms.prune.slicing import slice_units
from tests.canonical import evaluate
from tests.prunable import convolutions, named, perceptron, samples_of, two_modalities
from tests.unit.tower_models import FLOAT, Net

CONVOLUTIONS: list[dict[str, Any]] = [
    {"pads": [1, 1, 1, 1]},
    {"strides": [2, 1], "pads": [0, 2, 1, 0]},
    {"dilations": [2, 2], "pads": [2, 2, 2, 2], "group": 2},
    {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    {"auto_pad": "SAME_LOWER", "strides": [3, 2]},
    {"auto_pad": "VALID", "group": 4},
]


def everything(count: int) -> np.ndarray:
    return np.arange(count)


def array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


@pytest.mark.parametrize("attributes", CONVOLUTIONS)
def test_patches_times_the_matrix_is_the_convolution(attributes: dict[str, Any]) -> None:
    net = Net()
    x = net.input("x", FLOAT, 2, 4, 9, 8)
    weight = net.weight(8, 4 // attributes.get("group", 1), 3, 3)
    module = named(net, net.op("Conv", x, weight, **attributes))
    (found,) = linear_maps(module.graph)
    data = np.random.default_rng(0).standard_normal((2, 4, 9, 8)).astype(np.float32)
    want = evaluate(module, {"x": data})["y0"]
    got = found.rows(data, array(weight), everything) @ found.matrix(array(weight))
    by_row = np.moveaxis(want, 1, -1).reshape(-1, want.shape[1])
    np.testing.assert_allclose(np.concatenate(list(got), axis=1), by_row, atol=1e-4)
    np.testing.assert_array_equal(
        found.weight_of(found.matrix(array(weight)), weight.const_value.shape.numpy()), array(weight)
    )


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_a_recurrent_layer_is_two_products(op: str, gates: int, direction: str) -> None:
    """One step by numpy, from the rows and matrices, is the layer's own step."""
    net, ways, hidden = Net(), 2 if direction == "bidirectional" else 1, 5
    x = net.input("x", FLOAT, 4, 3, 6)
    parts = [net.weight(ways, gates * hidden, 6), net.weight(ways, gates * hidden, hidden)]
    bias = net.weight(ways, 2 * gates * hidden)
    more = {"linear_before_reset": 1} if op == "GRU" else {}
    states = net.op(op, x, *parts, bias, hidden_size=hidden, direction=direction, **more)
    module = named(net, states)
    maps = {found.kind: found for found in linear_maps(module.graph)}
    data = np.random.default_rng(0).standard_normal((4, 3, 6)).astype(np.float32)
    given = evaluate(module, {"x": data})["y0"]
    read = (maps["input"].rows(data, array(parts[0]), everything) @ maps["input"].matrix(array(parts[0])))[0]
    read = read.reshape(4, 3, ways, gates * hidden) + array(bias)[:, : gates * hidden]
    kept = maps["state"].rows(given, array(parts[1]), everything) @ maps["state"].matrix(array(parts[1]))
    for way in range(ways):
        is_reverse = direction == "reverse" or way == 1
        steps = range(3) if is_reverse else range(1, 4)
        state = kept[way].reshape(3, 3, -1) + array(bias)[way, gates * hidden :]
        for row, step in enumerate(steps):
            if op == "RNN":
                np.testing.assert_allclose(np.tanh(read[step, :, way] + state[row]), given[step, way], atol=1e-5)
        if op != "RNN":
            assert state.shape == (3, 3, gates * hidden)
            first = np.broadcast_to(array(bias)[way, gates * hidden :], state[:1].shape)
            along = [-1, *range(-2, -5, -1)] if is_reverse else range(4)
            by_step = np.concatenate([first, state[::-1] if is_reverse else state])
            check = _lstm if op == "LSTM" else _gru
            check(read[list(along), :, way], by_step, given[list(along), way], hidden)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def _gru(read: np.ndarray, state: np.ndarray, given: np.ndarray, hidden: int) -> None:
    before = np.zeros_like(given[0])
    for step, want in enumerate(given):
        update, reset, _ = (_sigmoid(part) for part in np.split(read[step] + state[step], 3, axis=1))
        fresh = np.tanh(read[step, :, 2 * hidden :] + reset * state[step, :, 2 * hidden :])
        np.testing.assert_allclose((1 - update) * fresh + update * before, want, atol=1e-5)
        before = want


def _lstm(read: np.ndarray, state: np.ndarray, given: np.ndarray, hidden: int) -> None:
    cell = np.zeros_like(given[0])
    for step, want in enumerate(given):
        into, out, forget, fresh = np.split(read[step] + state[step], 4, axis=1)
        cell = _sigmoid(forget) * cell + _sigmoid(into) * np.tanh(fresh)
        np.testing.assert_allclose(_sigmoid(out) * np.tanh(cell), want, atol=1e-5)


def cut(module: Module, share: float) -> Module:
    """The module with the last units of every group gone."""
    groups = [group for group in find_groups(module) if not group.frozen]
    keep = {group.name: range(max(1, int(group.units * (1 - share)))) for group in groups}
    result = module.clone()
    plan = plan_cut(result, groups, keep)
    slice_units(result, groups, keep)
    remember(result, module, plan)
    return result


def moved(module: Module, other: Module, feeds: dict[str, np.ndarray]) -> float:
    want, got = evaluate(module, feeds)["y0"], evaluate(other, feeds)["y0"]
    return float(((want - got) ** 2).sum() / ((want - want.mean(0)) ** 2).sum())


def test_units_that_others_can_replace_are_replaced() -> None:
    """Cut units are multiples of kept ones, so that the fit finds the model as it was, on data it has not seen."""
    module = perceptron(hidden=32, rank=8)
    small = cut(module, 0.75)
    assert array(small.graph.initializers["c1"]).shape == (8, 12)
    feeds = samples_of(module, 50, seed=9)
    before = moved(module, small, feeds)
    assert before > 0.1
    context = PassContext(inputs=samples_of(module, 400))
    assert RepairLeastSquares().run(small, context)
    assert moved(module, small, feeds) < 1e-6


def test_the_fit_is_that_of_numpy() -> None:
    module = perceptron(hidden=24)
    small = cut(module, 0.5)
    samples = samples_of(module, 600)
    context = PassContext(inputs=samples)
    assert RepairLeastSquares().run(small, context)
    (down,) = [found for found in linear_maps(small.graph) if found.weight.name == "c5"]
    first, offset = array(module.graph.initializers["c1"]), array(module.graph.initializers["c2"])
    hidden = np.maximum(samples["x"] @ first.T + offset, 0)
    wanted = hidden @ array(module.graph.initializers["c5"]).T + array(module.graph.initializers["c6"])
    design = np.concatenate([hidden[:, :12], np.ones((600, 1), np.float32)], axis=1)
    best, *_ = np.linalg.lstsq(design, wanted, rcond=None)
    found = design @ np.concatenate([array(down.weight).T, array(down.bias)[None]])
    least = ((design @ best - wanted) ** 2).sum()
    assert ((found - wanted) ** 2).sum() < least * 1.02


@pytest.mark.parametrize("make", [convolutions, two_modalities])
def test_a_cut_model_comes_nearer_on_other_samples(make: Any) -> None:
    module = make()
    small = cut(module, 0.4)
    repaired = small.clone()
    context = PassContext(inputs=samples_of(module, 256))
    assert RepairLeastSquares().run(repaired, context)
    feeds = samples_of(module, 64, seed=7)
    assert moved(module, repaired, feeds) < 0.5 * moved(module, small, feeds)
    assert any(remark.kind == "applied" and "products repaired" in remark.message for remark in context.remarks)


def test_biases_alone_put_means_right() -> None:
    module = perceptron(hidden=24)
    small = cut(module, 0.5)
    context = PassContext(inputs=samples_of(module, 400))
    weight = array(small.graph.initializers["c5"]).copy()
    assert RepairLeastSquares(mode="bias").run(small, context)
    np.testing.assert_array_equal(array(small.graph.initializers["c5"]), weight)
    feeds = samples_of(module, 400)
    want, got = evaluate(module, feeds)["y0"], evaluate(small, feeds)["y0"]
    np.testing.assert_allclose(got.mean(0), want.mean(0), atol=1e-4)


def test_tied_weights_are_fitted_together() -> None:
    net = Net()
    x, z = net.input("x", FLOAT, "batch", 10), net.input("z", FLOAT, "batch", 10)
    up, offset, down, last = net.weight(20, 10), net.weight(20), net.weight(4, 20), net.weight(4)
    sides = [
        net.op("Gemm", net.op("Relu", net.op("Gemm", v, up, offset, transB=1)), down, last, transB=1) for v in (x, z)
    ]
    module = named(net, net.op("Concat", *sides, axis=1))
    small = cut(module, 0.5)
    before = small.clone()
    assert RepairLeastSquares().run(small, PassContext(inputs=samples_of(module, 300)))
    assert sum(1 for value in small.graph.initializers.values() if value.const_value.shape.numpy() == (4, 10)) == 1
    feeds = samples_of(module, 100, seed=5)
    assert moved(module, small, feeds) < 0.6 * moved(module, before, feeds)


def test_a_product_between_two_matmuls_and_an_added_bias() -> None:
    net = Net()
    x = net.input("x", FLOAT, "batch", 5, 8)
    up = net.op("Relu", net.op("Add", net.op("MatMul", x, net.weight(8, 24)), net.weight(24)))
    module = named(net, net.op("Add", net.op("MatMul", up, net.weight(24, 4)), net.weight(4)))
    small = cut(module, 0.5)
    before = small.clone()
    assert RepairLeastSquares().run(small, PassContext(inputs=samples_of(module, 200)))
    feeds = samples_of(module, 100, seed=5)
    assert moved(module, small, feeds) < 0.6 * moved(module, before, feeds)


def test_nothing_to_repair() -> None:
    module = perceptron()
    context = PassContext(inputs=samples_of(module))
    assert not RepairLeastSquares().run(module, context)
    assert "nothing was cut" in context.remarks[0].message
    same = module.clone()
    remember(same, module)
    assert not RepairLeastSquares().run(same, context)


def test_repair_needs_samples() -> None:
    module = cut(perceptron(), 0.5)
    with pytest.raises(UserError, match="nothing to repair on"):
        RepairLeastSquares().run(module, PassContext())


def test_a_reference_from_a_file(tmp_path: pathlib.Path) -> None:
    module = perceptron(hidden=24)
    save_model(module.model, tmp_path / "model.onnx")
    other = module.clone()
    weight = array(module.graph.initializers["c1"]).copy()
    weight[::2] += 0.1
    other.graph.initializers["c1"].const_value = ir.tensor(weight, name="c1")
    feeds = samples_of(module, 100, seed=3)
    before = moved(module, other, feeds)
    assert RepairLeastSquares(reference=str(tmp_path / "model.onnx")).run(
        other, PassContext(inputs=samples_of(module, 300))
    )
    assert moved(module, other, feeds) < 0.2 * before


def test_two_cuts_are_repaired_against_the_first_model() -> None:
    module = convolutions((32, 32))
    context = PassContext(inputs=samples_of(module, 128))
    small = module.clone()
    for _ in range(2):
        assert PruneStructured(share="25%", compare="scores", floor=0.05).run(small, context)
    reference = reference_of(small)
    assert reference is not None
    assert len(reference.removed) == 2
    before = small.clone()
    assert RepairLeastSquares().run(small, context)
    feeds = samples_of(module, 64, seed=7)
    assert moved(module, small, feeds) < 0.5 * moved(module, before, feeds)


@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
def test_scale_and_shift_of_a_normalization_are_fitted_again(op: str) -> None:
    """Channel by channel, what it gives is multiplied (and moved, where it has a shift) by numpy's damped best fit."""
    net = Net(seed=3, opset=23)
    x = net.input("x", FLOAT, "batch", 12)
    hidden = net.op("Relu", net.op("Gemm", x, net.weight(12, 32), net.weight(32)))
    scale, shift = (net.constant(net.rng.uniform(0.5, 2, 12).astype(np.float32)) for _ in range(2))
    inputs = [scale, shift] if op == "LayerNormalization" else [scale]
    module = named(
        net, net.op(op, net.op("Add", x, net.op("Gemm", hidden, net.weight(32, 12), net.weight(12))), *inputs)
    )
    (norm,) = norm_maps(module.graph)
    assert (norm.kind, norm.bias is None) == ("norm", op == "RMSNormalization")
    small = cut(module, 0.6)
    context = PassContext(inputs=samples_of(module, 600))
    assert RepairLeastSquares().run(small, context)
    want, got = (evaluate(m, samples_of(module, 600))["y0"].astype(np.float64) for m in (module, small))
    fitted = [array(small.graph.initializers[str(value.name)]) for value in (scale, shift)[: len(inputs)]]
    factor = fitted[0] / array(scale)
    offset = fitted[1] - factor * array(shift) if len(inputs) == 2 else np.zeros(12)
    was = (got - offset) / factor
    assert np.abs(factor - 1).max() > 0.1
    fits = (damped(was, want, strength, has_shift=len(inputs) == 2) for strength in STRENGTHS)
    assert any(np.allclose(np.stack([factor, offset]), fit, atol=1e-3) for fit in fits)


def damped(read: np.ndarray, want: np.ndarray, strength: float, *, has_shift: bool) -> np.ndarray:
    """Factor and offset of each column with the least error and ``strength`` for each unit away from factor 1."""
    result = np.zeros((2, read.shape[1]))
    for channel, (x, y) in enumerate(zip(read.T, want.T, strict=True)):
        weight = np.sqrt(strength * (x @ x))
        rows = np.stack([np.append(x, weight), np.append(np.ones(len(x)), 0)], axis=1)[:, : 1 + has_shift]
        best, *_ = np.linalg.lstsq(rows, np.append(y, weight), rcond=None)
        result[: len(best), channel] = best
    return result


def test_a_normalization_that_products_alone_read_is_left_to_them() -> None:
    net = Net(seed=0)
    x = net.input("x", FLOAT, "batch", 12)
    normed = net.op("LayerNormalization", x, net.weight(12), net.weight(12))
    assert norm_maps(named(net, net.op("Gemm", normed, net.weight(12, 4))).graph) == []
