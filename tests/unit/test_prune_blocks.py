"""Whole residual branches: which ones there are, that the right ones go, and what is left in their place."""

from __future__ import annotations

import numpy as np
import pytest

import mmopt
from mmopt.analysis import dims
from mmopt.analysis.cost import analyze_cost
from mmopt.errors import UserError
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.prune import PruneBlocks, RepairLeastSquares
from mmopt.transforms.prune.prune_blocks import residual_branches
from tests.prunable import named
from tests.unit.tower_models import FLOAT, Net, run

WIDTH = 16


def perceptrons(*scales: float, seed: int = 0, peek: bool = False) -> Module:
    """x + scale · f(x), one after the other; with ``peek``, what is inside the first one is an output as well."""
    net = Net(seed=seed)
    value = net.input("x", FLOAT, "batch", WIDTH)
    inner = []
    for scale in scales:
        hidden = net.op("Relu", net.op("Gemm", value, net.weight(WIDTH, WIDTH), net.weight(WIDTH)))
        down = net.constant((scale * net.rng.normal(0, 0.3, (WIDTH, WIDTH))).astype(np.float32))
        inner.append(hidden)
        value = net.op("Add", value, net.op("Gemm", hidden, down, net.weight(WIDTH)))
    return named(net, net.op("Gemm", value, net.weight(WIDTH, 4)), *inner[:peek])


def samples(count: int = 64, seed: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)}


def cut(module: Module, share: str) -> tuple[Module, PassContext]:
    result, context = module.clone(), PassContext(inputs=samples())
    assert PruneBlocks(share=share).run(result, context)
    return result, context


def test_branches_are_found_in_order_with_what_only_they_need() -> None:
    module = perceptrons(1.0, 1.0, 1.0)
    branches = residual_branches(module)
    assert len(branches) == 3
    assert all(len(branch.nodes) == 3 and branch.axis == 1 for branch in branches)
    assert len({name for branch in branches for name in branch.nodes}) == 9


def test_what_is_needed_elsewhere_is_not_part_of_a_branch() -> None:
    first, second = residual_branches(perceptrons(1.0, 1.0, peek=True))
    assert len(first.nodes) == 1  # the last product; what is in front of it is an output
    assert len(second.nodes) == 3


def test_a_sum_of_two_things_side_by_side_is_no_residual_branch() -> None:
    net = Net(seed=0)
    x = net.input("x", FLOAT, "batch", WIDTH)
    both = net.op("Add", net.op("Gemm", x, net.weight(WIDTH, 8)), net.op("Gemm", x, net.weight(WIDTH, 8)))
    assert residual_branches(named(net, both)) == []


def test_the_branch_that_is_missed_least_goes_and_leaves_its_mean() -> None:
    module = perceptrons(1.0, 0.05, 1.0)
    result, context = cut(module, "35%")
    assert [remark.node for remark in context.remarks if remark.node] == [residual_branches(module)[1].value]
    feeds = samples(50, seed=2)
    (before,), (after,) = (run(m, feeds).values() for m in (module, result))
    spread = before.std()
    assert 0 < np.abs(after - before).max() < 0.3 * spread
    assert len(residual_branches(result)) == 2
    macs = [dims.evaluate(analyze_cost(m).macs, {"batch": 1}) for m in (module, result)]
    assert macs[1] < 0.7 * macs[0]


def test_what_is_left_is_the_mean_over_the_samples() -> None:
    module = perceptrons(1.0)
    (branch,) = residual_branches(module)
    result, _ = cut(module, "90%")
    assert residual_branches(result) == []
    feeds = samples()
    whole = module.clone()
    value = next(v for node in whole.graph for v in node.outputs if v.name == branch.value)
    whole.graph.outputs.append(value)
    mean = run(whole, feeds)[branch.value].mean(axis=0)
    head = next(v for v in reversed(list(whole.graph.initializers.values())) if tuple(v.shape) == (WIDTH, 4))
    expected = (feeds["x"] + mean) @ head.const_value.numpy()
    np.testing.assert_allclose(run(result, feeds)["y0"], expected, rtol=1e-4, atol=1e-4)


def test_of_convolutions_each_channel_keeps_its_mean() -> None:
    net = Net(seed=0)
    x = net.input("x", FLOAT, "batch", 6, 5, 5)
    branch = net.op("Conv", net.op("Relu", x), net.weight(6, 6, 3, 3), net.weight(6), pads=[1, 1, 1, 1])
    module = named(net, net.op("Relu", net.op("Add", branch, x)))
    (found,) = residual_branches(module)
    assert (found.operand, found.axis) == (0, 1)
    result, feeds = module.clone(), {"x": np.random.default_rng(0).normal(size=(8, 6, 5, 5)).astype(np.float32)}
    assert PruneBlocks(share="99%").run(result, PassContext(inputs=feeds)) is False  # all of the arithmetic is in it
    assert PruneBlocks(share="0.9999999999").run(result, PassContext(inputs=feeds))
    assert tuple(result.graph.initializers[f"{found.value}_mean"].shape) == (1, 6, 1, 1)
    assert "Conv" not in {node.op_type for node in result.graph}


def test_products_behind_are_repaired() -> None:
    module = perceptrons(1.0, 0.6, 1.0)
    result, context = cut(module, "35%")
    feeds = samples(80, seed=3)
    wanted, broken = run(module, feeds)["y0"], run(result, feeds)["y0"]
    assert RepairLeastSquares().run(result, context)
    assert np.square(run(result, feeds)["y0"] - wanted).mean() < 0.7 * np.square(broken - wanted).mean()


def test_what_cannot_be_done_is_said() -> None:
    module = perceptrons(1.0, 1.0)
    with pytest.raises(UserError, match="samples"):
        PruneBlocks().run(module.clone(), PassContext())
    context = PassContext(inputs=samples())
    assert not PruneBlocks(share="5%").run(module.clone(), context)
    assert "more than 5%" in context.remarks[-1].message
    result = mmopt.optimize(module, passes=["prune-blocks{share=50%}"], samples=samples(), validate="off", threads=1)
    assert any(remark.source == "prune-blocks" for remark in result.module.remarks)
