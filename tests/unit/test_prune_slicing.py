"""Slicing and masking: what is refused, what changes, and what stays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mmopt.analysis.axes import find_groups
from mmopt.errors import UserError
from mmopt.ir.evaluate import ReferenceRunner
from mmopt.ir.fingerprint import fingerprint
from mmopt.ir.module import Module
from mmopt.transforms.prune.masking import mask_units
from mmopt.transforms.prune.proof import difference, prove
from mmopt.transforms.prune.slicing import slice_units
from tests.axes import Case, check_cuts, feeds, free, with_weights
from tests.unit.test_axes import CASES


def _chain() -> Module:
    return CASES["linear layers"].module()


def _array(module: Module, name: str) -> np.ndarray:
    tensor = module.graph.initializers[name].const_value
    assert tensor is not None
    return np.asarray(tensor.numpy())


def test_weights_keep_their_names_and_lose_their_units() -> None:
    module = _chain()
    before = {name: _array(module, name) for name in ("w", "b", "v")}
    groups = find_groups(module)
    (group,) = free(groups)
    assert slice_units(module, groups, {group.name: [1, 4, 6]})
    np.testing.assert_array_equal(_array(module, "w"), before["w"][:, [1, 4, 6]])
    np.testing.assert_array_equal(_array(module, "b"), before["b"][[1, 4, 6]])
    np.testing.assert_array_equal(_array(module, "v"), before["v"][[1, 4, 6]])
    hidden = next(node for node in module.graph if node.op_type == "Relu").outputs[0]
    assert list(hidden.shape or ()) == [2, 5, 3]


def test_a_clone_that_shares_weights_stays_whole() -> None:
    module = _chain()
    groups = find_groups(module)
    copy = module.clone()
    slice_units(copy, groups, {free(groups)[0].name: [0]})
    mask_units(module.clone(), groups, {free(groups)[0].name: [0]})
    assert _array(module, "w").shape == (6, 8)
    assert np.count_nonzero(_array(module, "v")) == 24


@pytest.mark.parametrize("apply", [slice_units, mask_units])
def test_keeping_everything_changes_nothing(apply) -> None:  # type: ignore[no-untyped-def]
    module = _chain()
    groups = find_groups(module)
    before = fingerprint(module.model)
    assert apply(module, groups, {free(groups)[0].name: range(8)}) is False
    assert apply(module, groups, {}) is False
    assert fingerprint(module.model) == before


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([], "none are left"),
        ([3, 1], "not in ascending order"),
        ([1, 1], "not in ascending order"),
        ([-1, 2], "-1 is none of them"),
        ([2, 8], "8 is none of them"),
    ],
)
def test_units_are_checked(units: Sequence[int], message: str) -> None:
    module = _chain()
    groups = find_groups(module)
    before = fingerprint(module.model)
    with pytest.raises(UserError, match=message):
        slice_units(module, groups, {free(groups)[0].name: units})
    assert fingerprint(module.model) == before


def test_names_are_checked() -> None:
    module = _chain()
    groups = find_groups(module)
    name = free(groups)[0].name
    with pytest.raises(UserError, match="did you mean"):
        slice_units(module, groups, {f"{name}x": [0]})


def test_a_frozen_group_is_refused_with_its_reason() -> None:
    module = _chain()
    groups = find_groups(module)
    frozen = next(group for group in groups if "output" in group.frozen)
    with pytest.raises(UserError, match="the output 'y' shows it"):
        slice_units(module, groups, {frozen.name: [0]})
    assert slice_units(module, groups, {frozen.name: range(frozen.units)}) is False


def test_a_vector_of_two_layers_is_copied_where_their_cuts_differ() -> None:
    module = CASES["one bias for two layers"].module()
    groups = find_groups(module)
    first, second = free(groups)
    whole = _array(module, "b")
    slice_units(module, groups, {first.name: [0, 1], second.name: [5, 6, 7]})
    adds = [node for node in module.graph if node.op_type == "Add"]
    biases = [np.asarray(node.inputs[1].const_value.numpy()) for node in adds]
    np.testing.assert_array_equal(biases[0], whole[:2])
    np.testing.assert_array_equal(biases[1], whole[5:])


def test_a_vector_that_all_cut_alike_stays_one() -> None:
    module = CASES["one bias for two layers"].module()
    groups = find_groups(module)
    slice_units(module, groups, {group.name: [2, 3] for group in free(groups)})
    assert {str(node.inputs[1].name) for node in module.graph if node.op_type == "Add"} == {"b"}


def test_slices_of_uneven_positions_become_a_gather() -> None:
    module = CASES["slices with steps"].module()
    groups = find_groups(module)
    inputs = feeds(module)
    assert prove(module, groups, {free(groups)[0].name: [0, 1, 4]}, inputs) < 1e-6
    sliced = module.clone()
    slice_units(sliced, groups, {free(groups)[0].name: [0, 1, 4]})
    assert [node.op_type for node in sliced.graph].count("Slice") == 2


def test_attention_keeps_the_scale_it_was_trained_with() -> None:
    module = CASES["the operator, heads inside the projections"].module()
    groups = find_groups(module)
    size = next(g for g in free(groups) if g.kind == "head size" and g.units == 4)
    slice_units(module, groups, {size.name: [0, 3]})
    attention = next(node for node in module.graph if node.op_type == "Attention")
    assert attention.attributes.get_float("scale", 0.0) == pytest.approx(0.5)


def test_counts_of_heads_follow() -> None:
    module = CASES["grouped queries"].module()
    groups = find_groups(module)
    heads = {group.units: group.name for group in free(groups) if group.kind == "heads"}
    slice_units(module, groups, {heads[2]: [1], heads[3]: [0, 2]})
    attention = next(node for node in module.graph if node.op_type == "Attention")
    assert attention.attributes.get_int("q_num_heads", 0) == 2
    assert attention.attributes.get_int("kv_num_heads", 0) == 1


def test_a_wrong_cut_is_noticed() -> None:
    """A bound that nothing can miss would prove nothing: other units than those masked differ."""
    module = _chain()
    groups = find_groups(module)
    name = free(groups)[0].name
    sliced, masked, inputs = module.clone(), module.clone(), feeds(module)
    slice_units(sliced, groups, {name: [0, 1, 2, 3]})
    mask_units(masked, groups, {name: [4, 5, 6, 7]})
    with ReferenceRunner() as runner:
        got, want = runner.run(sliced, inputs)["y"], runner.run(masked, inputs)["y"]
    assert difference(got, want) > 0.01


@pytest.mark.parametrize(
    ("found", "expected", "apart"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 3.0], [1.0, 2.0], 0.5),
        ([np.nan, 2.0], [np.nan, 2.0], 0.0),
        ([np.nan, 2.0], [1.0, 2.0], np.inf),
        ([np.inf, 2.0], [-np.inf, 2.0], np.inf),
        ([1.0], [1.0, 2.0], np.inf),
    ],
)
def test_differences(found: list[float], expected: list[float], apart: float) -> None:
    assert difference(np.array(found), np.array(expected)) == apart


QUANTIZED = {
    "per channel": ("dw = DequantizeLinear<axis = 1>(w8, sw, zw)", (8,)),
    "per tensor": ("dw = DequantizeLinear(w8, sw, zw)", ()),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_lose_their_rows_scales_and_zero_points(name: str) -> None:
    node, shape = QUANTIZED[name]
    random = np.random.default_rng(0)
    arrays = {
        "w8": random.integers(-100, 100, (6, 8)).astype(np.int8),
        "sw": random.uniform(0.01, 0.02, shape).astype(np.float32),
        "zw": random.integers(-3, 3, shape).astype(np.int8),
        "v": random.standard_normal((8, 3)).astype(np.float32),
        "s": np.array(0.05, dtype=np.float32),
        "z": np.array(1, dtype=np.int8),
    }
    quantize = "q = QuantizeLinear(h, s, z) d = DequantizeLinear(q, s, z)"
    module = with_weights(
        f"g (float[2, 5, 6] x) => (float[2, 5, 3] y) {{ {node} h = MatMul(x, dw) {quantize} y = MatMul(d, v) }}", arrays
    )
    (group,) = free(check_cuts(module))
    places = {(place.value, place.axis): place.role.value for place in group.weights}
    assert places[("w8", 1)] == "producer"
    assert places[("v", 0)] == "consumer"
    assert (("sw", 0) in places) is (name == "per channel")
    assert (("zw", 0) in places) is (name == "per channel")


def test_weights_in_blocks_are_left_alone() -> None:
    arrays = {
        "w8": np.ones((6, 8), dtype=np.int8),
        "sw": np.full((6, 2), 0.5, dtype=np.float32),
        "v": np.ones((8, 3), dtype=np.float32),
    }
    text = "dw = DequantizeLinear<axis = 1, block_size = 4>(w8, sw) h = MatMul(x, dw) y = MatMul(h, v)"
    module = with_weights(f"g (float[2, 5, 6] x) => (float[2, 5, 3] y) {{ {text} }}", arrays)
    assert any(group.frozen == "blocks of it share a scale" for group in find_groups(module))


def test_half_precision_is_masked_in_its_own_type() -> None:
    case = Case(
        "c = Cast<to = 10>(x) d = Cast<to = 10>(w) h = MatMul(c, d) n = ReduceMean<keepdims = 1>(h, last)"
        " s = Sub(h, n) f = Cast<to = 1>(s) y = MatMul(f, v)",
        {"w": (6, 8), "v": (8, 3)},
        [("neurons", 8)],
        numbers={"last": [-1]},
    )
    module = case.module()
    groups = find_groups(module)
    assert prove(module, groups, {free(groups)[0].name: [0, 2, 3, 5]}, feeds(module)) < 2e-3
