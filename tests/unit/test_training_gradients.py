"""Gradients for criteria, against what calculus says of models small enough to do by hand, and against removal."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import mmopt  # noqa: E402
from mmopt.errors import UserError  # noqa: E402
from mmopt.ir.module import Module  # noqa: E402
from mmopt.training import gradients  # noqa: E402
from tests.small_models import two_layers, two_towers  # noqa: E402


@pytest.fixture
def module(tmp_path: pathlib.Path) -> Module:
    return mmopt.load(two_layers(tmp_path / "model.onnx", activation="Tanh"))


def _weights(module: Module) -> dict[str, np.ndarray]:
    return {name: v.const_value.numpy().astype(np.float64) for name, v in module.graph.initializers.items()}


def _batches(count: int, size: int, seed: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    return [{"x": random.standard_normal((size, 16)).astype(np.float32)} for _ in range(count)]


def test_with_labels_they_are_those_of_the_squared_error(module: Module) -> None:
    """dL/dW2 = hᵀ (y − t) · 2 / n, by numpy."""
    batches, w = _batches(3, 5), _weights(module)
    targets = [np.random.default_rng(9 + k).standard_normal((5, 4)) for k in range(3)]
    found = gradients(module, batches, labels=targets, places=[("w2", 0), ("w1", 1), ("d", 1)])
    each = []
    for batch, target in zip(batches, targets, strict=True):
        h = np.tanh(batch["x"] @ w["w1"] + w["b"])
        each.append(h.T @ (h @ w["w2"] - target) * 2 / target.size)
    np.testing.assert_allclose(found.mean["w2"], np.mean(each, 0), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.fisher["w2"], np.mean(np.square(each), 0), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(found.products["w2", 0], [(w["w2"] * g).sum(1) for g in each], rtol=1e-4, atol=1e-6)
    # What a hidden unit hands on is its value times its gradient, and that is what its row of W2 sees too.
    np.testing.assert_allclose(found.products["d", 1], found.products["w2", 0], rtol=1e-4, atol=1e-6)
    assert found.products["w1", 1].shape == (3, 32)


def test_integer_labels_mean_cross_entropy(module: Module) -> None:
    batch, labels = _batches(1, 6)[0], np.array([0, 1, 2, 3, 0, 1])
    w = _weights(module)
    h = np.tanh(batch["x"] @ w["w1"] + w["b"])
    shares = np.exp(h @ w["w2"])
    shares /= shares.sum(1, keepdims=True)
    found = gradients(module, [batch], labels=[labels])
    np.testing.assert_allclose(found.losses, -np.log(shares[np.arange(6), labels]).mean(), rtol=1e-5)
    np.testing.assert_allclose(found.mean["w2"], h.T @ (shares - np.eye(4)[labels]) / 6, rtol=1e-4, atol=1e-6)


def test_without_labels_squares_estimate_the_diagonal_of_jtj(module: Module) -> None:
    """For y = h W2, the derivative of y_j by W2[i, j] is h_i, and every output is divided by its rms."""
    batches, w = _batches(4, 1), _weights(module)
    found = gradients(module, batches, draws=400, seed=3)
    want = np.zeros((32, 4))
    for batch in batches:
        h = np.tanh(batch["x"] @ w["w1"] + w["b"])
        want += (h.T**2 @ np.ones((1, 4))) / ((h @ w["w2"]) ** 2).mean() / 4
    assert abs(np.log(found.fisher["w2"].sum() / want.sum())) < 0.1
    assert np.corrcoef(found.fisher["w2"].ravel(), want.ravel())[0, 1] > 0.98
    assert found.losses.shape == (1600,)


def test_the_same_seed_draws_the_same(module: Module) -> None:
    batches = _batches(2, 3)
    first, again, other = (gradients(module, batches, seed=seed).fisher["w1"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_taylor_predicts_what_removal_does(module: Module) -> None:
    """The sum of value times gradient of a small unit is the change of the loss when it goes, to first order."""
    w2 = module.graph.initializers["w2"]
    weights = w2.const_value.numpy().copy()
    weights[::2] *= 0.01
    w2.const_value = ir.tensor(weights)
    batch, target = _batches(1, 8)[0], np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)
    found = gradients(module, [batch], labels=[target], places=[("d", 1)])
    for unit in range(0, 8, 2):
        changed = weights.copy()
        changed[unit] = 0
        other = module.clone()
        other.graph.initializers["w2"].const_value = ir.tensor(changed)
        difference = gradients(other, [batch], labels=[target]).losses[0] - found.losses[0]
        np.testing.assert_allclose(-found.products["d", 1][0, unit], difference, rtol=0.1, atol=2e-6)


@pytest.mark.parametrize("loss", ["categorical", "norm"])
def test_other_losses_without_labels(module: Module, loss: str) -> None:
    found = gradients(module, _batches(2, 3), loss=loss)
    assert all(np.isfinite(value).all() and value.any() for value in found.fisher.values())


def test_a_function_may_be_the_loss(module: Module) -> None:
    found = gradients(module, _batches(1, 3), loss=lambda outputs, labels: outputs["y"].sum())
    w = _weights(module)
    h = np.tanh(_batches(1, 3)[0]["x"] @ w["w1"] + w["b"])
    np.testing.assert_allclose(found.mean["w2"], np.tile(h.sum(0)[:, None], 4), rtol=1e-4, atol=1e-5)


def test_every_tower_has_gradients(tmp_path: pathlib.Path) -> None:
    module = mmopt.load(two_towers(tmp_path / "model.onnx"))
    inputs = {str(v.name): np.ones([3, 6], np.float32) for v in module.graph.inputs}
    found = gradients(module, [inputs], places=[("left_b", 1), ("right_b", -1)], weights=["left_w1"])
    assert set(found.fisher) == {"left_w1"}
    assert found.products["left_b", 1].any()
    assert found.products["right_b", -1].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"places": [("nothing", 0)]}, "no tensor 'nothing'"),
        ({"places": [("w1", 2)]}, "no axis 2"),
        ({"weights": ["w3"]}, "no initializer 'w3'"),
        ({"loss": "cross"}, "no loss 'cross'"),
        ({"labels": []}, "no labels for batch 0"),
        ({"labels": [np.zeros(3, np.int64)]}, "do not fit"),
        ({"labels": [np.full(2, 7)]}, "labels reach from 7"),
        ({"output": "z", "loss": "categorical"}, "no output 'z'"),
    ],
)
def test_mistakes_are_named(module: Module, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gradients(module, _batches(1, 2), **arguments)


def test_numbers_that_are_none_name_the_batch(module: Module) -> None:
    batches = _batches(2, 2)
    batches[1]["x"][0, 0] = np.nan
    with pytest.raises(UserError, match=r"batch 1"):
        gradients(module, batches)
    with pytest.raises(UserError, match="no batch"):
        gradients(module, [])
