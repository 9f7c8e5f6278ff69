"""Criteria against independent sums, and passes that prune: what they promise, refuse and report."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import mmopt
from mmopt.analysis.axes import find_groups
from mmopt.analysis.cost import analyze_cost
from mmopt.errors import UserError
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.prune import PruneStructured, PruneWeights, RepairLeastSquares, costs, criteria
from mmopt.transforms.prune.gradient_criteria import meeting
from mmopt.transforms.prune.modalities import Blanks
from mmopt.transforms.prune.observing import batches_of
from mmopt.transforms.prune.prune_structured import liked_step
from mmopt.transforms.prune.slicing import slice_units
from tests.canonical import evaluate
from tests.prunable import convolutions, named, perceptron, samples_of, two_modalities
from tests.unit.tower_models import FLOAT, Net

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


def evidence_of(module: Module, count: int = 200) -> criteria.Evidence:
    return criteria.Evidence(module, batches_of(module, samples_of(module, count)))


def free_groups(module: Module) -> list[Any]:
    return [group for group in find_groups(module) if not group.frozen]


def weight(module: Module, name: str) -> np.ndarray:
    tensor = module.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy().astype(np.float64)


def hidden_of(module: Module, samples: dict[str, np.ndarray]) -> np.ndarray:
    return np.maximum(samples["x"] @ weight(module, "c1").T + weight(module, "c2"), 0)


def macs_of(module: Module) -> int:
    return int(str(analyze_cost(module, {"batch": 1}).macs))


def test_magnitude_is_the_sum_of_squares_of_all_weights_of_a_unit() -> None:
    module = perceptron(hidden=10)
    (group,) = free_groups(module)
    (curve,) = criteria.curves([group], "magnitude", criteria.Evidence(module, [])).values()
    want = (weight(module, "c1") ** 2).sum(1) + weight(module, "c2") ** 2 + (weight(module, "c5") ** 2).sum(0)
    np.testing.assert_array_equal(curve.order, np.argsort(want))
    np.testing.assert_allclose(curve.damage, np.concatenate([[0], np.cumsum(np.sort(want))]), rtol=1e-6)


def test_activation_is_what_the_reader_loses() -> None:
    module = perceptron(hidden=10)
    (group,) = free_groups(module)
    (curve,) = criteria.curves([group], "activation", evidence_of(module)).values()
    hidden = hidden_of(module, samples_of(module, 200))
    lost = (hidden**2).mean(0) * (weight(module, "c5") ** 2).sum(0)
    power = ((hidden @ weight(module, "c5").T) ** 2).sum(1).mean()
    np.testing.assert_array_equal(curve.order, np.argsort(lost))
    np.testing.assert_allclose(np.diff(curve.damage), np.sort(lost) / power, rtol=1e-5)


def test_second_order_is_the_error_after_the_best_fit() -> None:
    module = perceptron(hidden=16)
    (group,) = free_groups(module)
    samples = samples_of(module, 800)
    (curve,) = criteria.curves([group], "second-order", evidence_of(module, 800)).values()
    hidden, matrix = hidden_of(module, samples), weight(module, "c5").T
    wanted = hidden @ matrix
    # The same damping as the criterion has, as further rows of data.
    rows = np.concatenate([hidden, np.sqrt(800 * criteria.DAMPING * (hidden**2).mean()) * np.eye(16)])
    targets = rows @ matrix
    for gone in (1, 4, 8):
        kept = list(curve.kept(16 - gone))
        best, *_ = np.linalg.lstsq(rows[:, kept], targets, rcond=None)
        error = ((rows[:, kept] @ best - targets) ** 2).sum() / (wanted**2).sum()
        assert curve.damage[gone] == pytest.approx(error, rel=1e-3)
    singles = [
        ((rows[:, kept] @ np.linalg.lstsq(rows[:, kept], targets, rcond=None)[0] - targets) ** 2).sum()
        for kept in ([n for n in range(16) if n != gone] for gone in range(16))
    ]
    assert curve.order[0] == int(np.argmin(singles))


def test_units_that_others_can_replace_cost_nothing_in_second_order() -> None:
    module = perceptron(hidden=32, rank=8)
    (group,) = free_groups(module)
    (curve,) = criteria.curves([group], "second-order", evidence_of(module)).values()
    assert curve.damage[20] < 0.02 < 0.1 < curve.damage[30]


def test_what_reads_a_group_makes_up_for_its_loss_by_least_squares() -> None:
    """With units gone, the reader's weight is the best fit of what it gave, on the same samples."""
    module = perceptron(hidden=16)
    groups = find_groups(module)
    (group,) = (group for group in groups if not group.frozen)
    samples, kept = samples_of(module, 800), tuple(range(0, 16, 2))
    hidden, matrix = hidden_of(module, samples), weight(module, "c5").T
    rows = np.concatenate([hidden, np.sqrt(800 * criteria.DAMPING * (hidden**2).mean()) * np.eye(16)])
    best, *_ = np.linalg.lstsq(rows[:, kept], rows @ matrix, rcond=None)
    evidence, cut = evidence_of(module, 800), module.clone()
    slice_units(cut, groups, {group.name: kept})
    evidence.make_up(cut, group, kept)
    np.testing.assert_allclose(weight(cut, "c5").T, best, rtol=1e-4, atol=1e-6)
    assert weight(module, "c5").shape[1] == 16


def test_what_several_groups_are_joined_for_makes_up_with_all_of_them() -> None:
    """Channels of one tower go; the product behind the join may use those of the other as well."""
    module = two_modalities()
    samples, groups = samples_of(module, 128), find_groups(module)
    batches = batches_of(module, samples)
    evidence = criteria.Evidence(module, batches)
    wanted = evaluate(module, samples)["y0"]
    for group in (group for group in groups if not group.frozen and group.name in ("image/c5", "text/c19")):
        kept, moved = tuple(range(0, group.units, 2)), []
        for change in (lambda *given: None, evidence.make_up):
            cut = module.clone()
            slice_units(cut, groups, {group.name: kept})
            change(cut, group, kept)
            moved.append(((evaluate(cut, samples)["y0"] - wanted) ** 2).sum())
        assert moved[1] < 0.5 * moved[0], group.name


def test_curves_are_found_once_for_the_same_module_samples_and_criterion(monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = two_modalities(), []
    find = criteria.curves
    monkeypatch.setattr(criteria, "curves", lambda *given: calls.append(given) or find(*given))
    for count, options in ((64, {}), (64, {"share": "20%"}), (65, {}), (64, {"criterion": "magnitude"})):
        PruneStructured(**options).run(module.clone(), PassContext(inputs=samples_of(module, count), seed=77))
    assert len(calls) == 3


@pytest.mark.parametrize(("kind", "units", "measure", "step"), [
    ("channels", 48, "time", 16), ("channels", 48, "macs", 8), ("channels", 16, "time", 8), ("neurons", 48, "time", 8),
    ("neurons", 64, "macs", 16), ("heads", 64, "time", 1), ("channels", 3, "time", 1), ("neurons", 2048, "time", 128),
    ("neurons", 2048, "macs", 16), ("hidden units", 640, "time", 48),
])  # fmt: skip
def test_sizes_go_by_what_kernels_like(kind: str, units: int, measure: str, step: int) -> None:
    group = dataclasses.replace(free_groups(perceptron(hidden=8))[0], kind=kind, units=units)
    assert liked_step(group, measure) == step


@needs_torch
@pytest.mark.parametrize("criterion", ["taylor", "fisher", "cross-modal"])
def test_gradients_find_the_units_that_say_nothing(criterion: Any) -> None:
    module = two_modalities()
    groups = free_groups(module)
    mute = {}
    for group in groups:
        reader = next(place for place in group.weights if place.role.name == "CONSUMER")
        value = module.graph.initializers[reader.value]
        array = value.const_value.numpy().copy()
        places = [index for unit in (1, 3) for index in reader.positions[unit]]
        np.moveaxis(array, reader.axis, 0)[places] = 0
        value.const_value = ir.tensor(array, name=value.name)
        mute[group.name] = {1, 3}
    found = criteria.curves(groups, criterion, evidence_of(module, 48))
    (joined,) = meeting(module)
    for name, curve in found.items():
        scores = dict(zip(curve.order.tolist(), np.diff(curve.damage), strict=True))
        is_joined = any(place.value == joined for group in groups if group.name == name for place in group.activations)
        silent = all(scores[unit] <= 1e-9 * curve.damage[-1] for unit in mute[name])
        # What is joined has an effect there, whatever reads it afterwards.
        assert silent is not (criterion == "cross-modal" and is_joined), name
        assert curve.damage[-1] > 0


@needs_torch
def test_taylor_is_the_change_of_the_output_to_first_order() -> None:
    """For a unit that only a linear layer reads, the change is exact: compare with taking it out."""
    module = perceptron(hidden=12, results=3)
    (group,) = free_groups(module)
    (curve,) = criteria.curves([group], "taylor", evidence_of(module, 256)).values()
    feeds = samples_of(module, 256)
    hidden = hidden_of(module, feeds)
    scale = (evaluate(module, feeds)["y0"].astype(np.float64) ** 2).mean()
    exact = np.array([((hidden[:, [n]] @ weight(module, "c5")[:, n][None]) ** 2).sum() for n in range(12)]) / scale
    scores = np.empty(12)
    scores[curve.order] = np.diff(curve.damage)
    assert np.corrcoef(scores, exact)[0, 1] > 0.9


@pytest.mark.parametrize("criterion", criteria.NEEDS_SAMPLES)
def test_criteria_that_need_samples_say_so(criterion: Any) -> None:
    with pytest.raises(UserError, match="needs samples"):
        PruneStructured(criterion=criterion).run(perceptron(), PassContext())


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_budget_is_met_and_not_by_much_more(share: float) -> None:
    module = convolutions((32, 48))
    before = macs_of(module)
    assert PruneStructured(share=f"{share:.0%}", step=1).run(module, PassContext())
    assert macs_of(module) <= before * (1 - share)
    assert macs_of(module) > before * (1 - share) * 0.9


def test_parameters_as_the_measure() -> None:
    module = two_modalities()
    before = analyze_cost(module).total_parameters
    assert PruneStructured(share="40%", measure="parameters", step=1).run(module, PassContext())
    assert before * 0.5 < analyze_cost(module).total_parameters <= before * 0.6


def test_one_tower_alone_is_cut() -> None:
    module = two_modalities()
    context = PassContext(inputs=samples_of(module))
    before = {name: value.const_value for name, value in module.graph.initializers.items()}
    groups = {group.name: group.tower for group in free_groups(module)}
    assert PruneStructured(share="towers.text=50%").run(module, context)
    applied = [remark.node for remark in context.remarks if remark.kind == "applied" and remark.node]
    assert applied
    assert {groups[name] for name in applied} == {"text"}
    assert any(module.graph.initializers[name].const_value is not tensor for name, tensor in before.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": "towers.txt=10%"}, "did you mean 'text'"),
        ({"share": "99%"}, "cheaper"),
        ({"share": "a lot"}, "no share to cut"),
        ({"compare": "outputs"}, "needs samples"),
        ({"measure": "time"}, "no target predicts"),
    ],
)
def test_what_cannot_be_done_is_said(options: dict[str, Any], message: str) -> None:
    module = two_modalities()
    with pytest.raises(UserError) as error:
        PruneStructured(**options).run(module, PassContext())
    assert message in str(error.value)


def test_patterns_and_kinds_choose_groups() -> None:
    module = two_modalities()
    names = {group.name for group in free_groups(module)}
    chosen = next(name for name in names if name.startswith("text/"))
    context = PassContext()
    assert PruneStructured(share="5%", measure="parameters", include=(chosen,), step=1).run(module, context)
    assert {r.node for r in context.remarks if r.kind == "applied" and r.node} == {chosen}
    missed = {r.node: r.message for r in context.remarks if r.kind == "missed"}
    assert names - {chosen} <= set(missed)
    context = PassContext()
    PruneStructured(share="20%", kinds=("channels",)).run(two_modalities(), context)
    assert all("channels" in r.message for r in context.remarks if r.kind == "applied" and r.node)


@needs_torch
def test_a_weak_modality_is_protected_by_its_floor() -> None:
    """Units that add little go first when nothing but their scores counts, until nothing of the tower is left."""
    module = two_modalities(weak=0.02)
    evidence = PassContext(inputs=samples_of(module))
    kept = []
    for floor in (0.0, 0.9):
        work = module.clone()
        options: dict[str, Any] = {"share": "30%", "measure": "parameters", "compare": "global", "step": 1}
        assert PruneStructured(criterion="taylor", tower_floor=floor, **options).run(work, evidence)
        before, after = (costs.parameters(each, [], costs.owners(each)).total(None, "text") for each in (module, work))
        kept.append(after / before)
    assert kept[0] < 0.5
    assert kept[1] >= 0.9 * 0.7


def test_blanks_are_typical_and_leave_one_modality() -> None:
    module = two_modalities()
    feeds = samples_of(module, 64)
    blanks = Blanks(module, [feeds])
    assert set(blanks.towers) == {"image", "text"}
    alone = blanks.alone(feeds, "image")
    np.testing.assert_array_equal(alone["image"], feeds["image"])
    assert (alone["ids"] == alone["ids"][:1]).all()
    counts = [np.bincount(column, minlength=50) for column in feeds["ids"].T]
    assert all(c[v] == c.max() for c, v in zip(counts, alone["ids"][0], strict=True))
    np.testing.assert_allclose(blanks.alone(feeds, "text")["image"][3], feeds["image"].mean(0), atol=1e-6)
    assert Blanks(perceptron(), [samples_of(perceptron())]).towers == []


def test_pruned_by_the_pipeline_and_repaired() -> None:
    module = two_modalities()
    samples = samples_of(module, 128)
    passes = [PruneStructured(share="30%"), RepairLeastSquares()]
    result = mmopt.optimize(module, passes=passes, samples=samples, threads=1)
    assert not result.report.failed
    assert {record.name for record in result.report.applied} >= {"prune-structured", "repair-least-squares"}
    feeds = samples_of(module, 64, seed=5)
    want, got = evaluate(module, feeds)["y0"], evaluate(result.module, feeds)["y0"]
    assert ((want - got) ** 2).sum() < 0.1 * ((want - want.mean(0)) ** 2).sum()


def test_the_same_seed_cuts_the_same() -> None:
    module = two_modalities()
    made = []
    for _ in range(2):
        work = module.clone()
        context = PassContext(inputs=samples_of(module))
        PruneStructured(share="40%").run(work, context)
        RepairLeastSquares().run(work, context)
        made.append(evaluate(work, samples_of(module, 8, seed=3))["y0"])
    np.testing.assert_array_equal(*made)


class TestWeights:
    @pytest.mark.parametrize("criterion", ["magnitude", "activation", "second-order"])
    def test_sparsity(self, criterion: Any) -> None:
        module = perceptron(inputs=64, hidden=64, results=32)
        context = PassContext(inputs=samples_of(module))
        assert PruneWeights(sparsity=0.75, criterion=criterion).run(module, context)
        for name in ("c1", "c5"):
            assert (weight(module, name) == 0).mean() == pytest.approx(0.75, abs=0.01)
        (remark,) = [r for r in context.remarks if r.kind == "applied"]
        assert "for size only" in remark.message
        assert "no faster" in remark.message

    @pytest.mark.parametrize("criterion", ["magnitude", "activation", "second-order"])
    def test_two_of_four_along_the_depth(self, criterion: Any) -> None:
        module = perceptron(inputs=64, hidden=64, results=32)
        assert PruneWeights(pattern="2:4", criterion=criterion).run(module, PassContext(inputs=samples_of(module)))
        for name in ("c1", "c5"):
            fours = weight(module, name).reshape(-1, 4)
            assert ((fours == 0).sum(1) == 2).all()

    def test_fitting_the_others_again_is_nearer_than_leaving_them(self) -> None:
        module = convolutions((32, 32))
        feeds = samples_of(module, 64, seed=4)
        # Channels of different power, where magnitude alone goes wrong.
        samples = samples_of(module, 256)
        for arrays in (samples, feeds):
            arrays["x"] *= np.array([0.1, 1, 5], np.float32).reshape(1, 3, 1, 1)
        want = evaluate(module, feeds)["y0"]
        errors = []
        for criterion in ("magnitude", "activation", "second-order"):
            work = module.clone()
            options: dict[str, Any] = {"criterion": criterion}
            PruneWeights(sparsity=0.6, **options).run(work, PassContext(inputs=samples))
            errors.append(float(((evaluate(work, feeds)["y0"] - want) ** 2).sum()))
        assert errors[2] < 0.5 * min(errors[:2])

    def test_what_is_too_small_or_does_not_divide_stays(self) -> None:
        module = perceptron(inputs=63, hidden=64, results=4)
        context = PassContext()
        assert not PruneWeights(pattern="2:4").run(module, context)
        messages = [r.message for r in context.remarks if r.kind == "missed"]
        assert any("no multiple of 4" in message for message in messages)
        assert any("too few" in message for message in messages)

    @pytest.mark.parametrize("sparsity", [0.0, 1.0, -1.0])
    def test_no_sparsity(self, sparsity: float) -> None:
        with pytest.raises(UserError, match="makes no sense"):
            PruneWeights(sparsity=sparsity).run(perceptron(), PassContext())

    def test_zeros_outlive_repair(self) -> None:
        module = perceptron(inputs=64, hidden=64, results=32)
        context = PassContext(inputs=samples_of(module, 200))
        PruneWeights(sparsity=0.5, criterion="magnitude").run(module, context)
        zeros = {name: weight(module, name) == 0 for name in ("c1", "c5")}
        RepairLeastSquares().run(module, context)
        for name, mask in zeros.items():
            assert (weight(module, name)[mask] == 0).all()


def test_layers_that_share_the_zeros_they_start_from_are_cut_apart() -> None:
    net = Net()
    sizes = net.ints(1, 2, 8)
    zeros = net.op("ConstantOfShape", sizes)
    states = []
    for name in ("a", "b"):
        x = net.input(name, FLOAT, 5, 2, 6)
        parts = [net.weight(1, 24, 6), net.weight(1, 24, 8), net.weight(1, 48)]
        found = net.ops("GRU", x, *parts, None, zeros, outputs=2, hidden_size=8)
        states.append(net.op("Squeeze", found[1], net.ints(0)))
    module = named(net, net.op("Gemm", net.op("Concat", *states, axis=1), net.weight(3, 16), net.weight(3), transB=1))
    assert len([g for g in find_groups(module) if g.kind == "hidden units"]) == 1
    context = PassContext()
    assert PruneStructured(share="30%", step=1).run(module, context)
    assert any(remark.kind == "applied" for remark in context.remarks)
    assert len({g.name for g in find_groups(module) if g.kind == "hidden units"}) == 2
    feeds = {name: np.ones((5, 2, 6), np.float32) for name in ("a", "b")}
    assert evaluate(module, feeds)["y0"].shape == (2, 3)
