"""Judging quantized models in the benchmark: scores, paired intervals, what counts as computed in integers."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.quantizing import judging
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.quantize import QuantizeStatic, QuantizeWeights
from tests.canonical import module_from
from tests.unit.test_rewrite import weights


def test_scores_of_classes_and_of_embeddings() -> None:
    plain = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    np.testing.assert_array_equal(judging.scores(plain, plain, np.array([1, 1, 1])), [100, 0, 100])
    embeddings = np.random.default_rng(0).standard_normal((8, 4))
    np.testing.assert_allclose(judging.scores(3 * embeddings, embeddings, None), 100)
    turned = embeddings.copy()
    turned[2] *= -1
    moved = 100 - judging.scores(turned, embeddings, None)
    similar = judging.similarities(embeddings)
    np.testing.assert_allclose(moved[2], 200 * abs(similar[2]))
    assert (moved > 1e-9).sum() == 2  # it and the one that is compared with it


def test_interval_is_that_of_the_mean_of_differences() -> None:
    random = np.random.default_rng(1)
    first = random.standard_normal(2000) + 100
    second = first - 0.2 + 0.5 * random.standard_normal(2000)
    mean, low, high = judging.interval(first, second)
    assert mean == pytest.approx((first - second).mean())
    assert (high - low) == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(2000), rel=0.1)
    assert low < 0.2 < high
    assert judging.interval(first, first) == (0, 0, 0)


def test_coverage_counts_what_reads_nothing_but_integers() -> None:
    text = """g (float[4,32] x, float[32,16] w, float[16,16] v) => (float[4,16] y) {
      a = MatMul(x, w) b = Relu(a) c = MatMul(b, v) d = Transpose(c) e = MatMul(c, d) y = MatMul(e, c) }"""

    def build() -> Module:
        return weights(module_from(text, opset=21), w=(32, 16), v=(16, 16))

    static, weight_only = build(), build()
    x = np.random.default_rng(0).standard_normal((2, 4, 32)).astype(np.float32)
    assert QuantizeStatic().run(static, PassContext(inputs={"x": x}))
    assert QuantizeWeights().run(weight_only, PassContext())
    assert judging.coverage(build().model) == (0, 0)
    assert judging.coverage(static.model) == (2, 0)
    assert judging.coverage(weight_only.model) == (0, 0)
    assert judging.nbytes(static.model) < 0.5 * judging.nbytes(build().model)


def test_ratio_is_that_of_the_sums() -> None:
    random = np.random.default_rng(2)
    second = random.random(2000) + 0.5
    first = 0.8 * second * np.exp(0.1 * random.standard_normal(2000))
    share, low, high = judging.ratio(first, second)
    assert share == pytest.approx(first.sum() / second.sum())
    assert low < share < high
    assert 0.01 > high - low > 0
    assert judging.ratio(first, first) == (1, 1, 1)


def test_losses_are_the_square_of_the_error() -> None:
    random = np.random.default_rng(3)
    plain = random.standard_normal((50, 4))
    found = plain + 0.1 * random.standard_normal((50, 4))
    assert np.sqrt(judging.losses(found, plain).mean()) == pytest.approx(judging.relative_error(found, plain))
