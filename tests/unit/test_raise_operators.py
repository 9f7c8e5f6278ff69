"""Activations, normalizations and rotary embedding: each spelling becomes its operator, near misses stay."""

from __future__ import annotations

import pytest

from mmopt.ir.module import Module
from mmopt.pipeline.base import Pass
from mmopt.transforms.raising.raise_activations import RaiseActivations
from mmopt.transforms.raising.raise_normalization import RaiseNormalization
from mmopt.transforms.raising.raise_rotary import RaiseRotary
from tests.canonical import count_ops, module_from
from tests.raising import raise_and_check

_CONSTANTS = {
    "half": 0.5, "one": 1.0, "two": 2.0, "three": 3.0, "six": 6.0, "zero": 0.0, "eps": 1e-5, "root": 1.4142135,
    "inverse": 0.70710677, "cubic": 0.044715, "pi": 0.7978846, "alpha": 1.702, "minus": -0.5, "sixth": 0.16666667,
}  # fmt: skip


def model(nodes: str, *, inputs: str = "float[batch, seq, 8] x", result: str = "float[batch, seq, 8] y") -> Module:
    """A model at the working opset with constants for every number a test may name, and weights ``g`` and ``b``."""
    scalars = ", ".join(f"float {name} = {{{value}}}" for name, value in _CONSTANTS.items())
    weights = "float[8] g = {1, 2, 3, 4, 5, 6, 7, 8}, float[8] b = {8, 7, 6, 5, 4, 3, 2, 1}"
    last = "int64[1] last = {-1}"
    return module_from(f"g ({inputs}) => ({result}) <{scalars}, {weights}, {last}> {{ {nodes} }}", opset=23)


GELU = {
    "half first": "d = Div(x, root) e = Erf(d) a = Add(e, one) h = Mul(x, half) y = Mul(h, a)",
    "half last": "d = Mul(inverse, x) e = Erf(d) a = Add(one, e) h = Mul(a, x) y = Mul(h, half)",
    "half on the other factor": "d = Div(x, root) e = Erf(d) a = Add(e, one) h = Mul(half, a) y = Mul(x, h)",
    "half spread": "d = Div(x, root) e = Erf(d) m = Mul(e, half) a = Add(m, half) y = Mul(x, a)",
    "halved by division": "d = Div(x, root) e = Erf(d) a = Add(e, one) h = Div(x, two) y = Mul(a, h)",
    "of a product": "z = Mul(x, x) d = Div(z, root) e = Erf(d) a = Add(e, one) h = Mul(z, a) y = Mul(h, half)",
}
TANH_GELU = {
    "power": "c = Pow(x, three) m = Mul(c, cubic) s = Add(x, m) i = Mul(s, pi) t = Tanh(i) a = Add(t, one) h = "
    "Mul(x, half) "
    "y = Mul(h, a)",
    "products": "q = Mul(x, x) c = Mul(q, x) m = Mul(cubic, c) s = Add(m, x) i = Mul(pi, s) t = Tanh(i) a = "
    "Add(one, t) "
    "h = Mul(half, a) y = Mul(x, h)",
    "factored": "q = Mul(x, x) m = Mul(cubic, q) s = Add(m, one) p = Mul(x, pi) i = Mul(p, s) t = Tanh(i) a = "
    "Add(t, one) "
    "h = Mul(a, half) y = Mul(h, x)",
}
OTHERS = {
    "HardSwish": {
        "clip": "s = Add(x, three) c = Clip(s, zero, six) p = Mul(x, c) y = Div(p, six)",
        "sixth": "s = Add(three, x) c = Clip(s, zero, six) p = Mul(c, sixth) y = Mul(x, p)",
        "sigmoid": "s = HardSigmoid<alpha=0.16666667, beta=0.5>(x) y = Mul(s, x)",
    },
    "Softplus": {"log": "e = Exp(x) a = Add(e, one) y = Log(a)", "left": "e = Exp(x) a = Add(one, e) y = Log(a)"},
    "Mish": {
        "softplus": "s = Softplus(x) t = Tanh(s) y = Mul(x, t)",
        "spelled": "e = Exp(x) a = Add(e, one) s = Log(a) t = Tanh(s) y = Mul(t, x)",
    },
}


def once(pass_: Pass, nodes: str, operator: str, **attributes: object) -> None:
    module, _ = raise_and_check(pass_, model(nodes))
    counts = count_ops(module)
    assert counts.get(operator) == 1, counts
    (node,) = [n for n in module.graph if n.op_type == operator]
    for name, value in attributes.items():
        assert node.attributes[name].value == value
    assert set(counts) - {operator} <= ({"Mul"} if "z = Mul(x, x)" in nodes else set())


@pytest.mark.parametrize("case", GELU)
def test_gelu(case: str) -> None:
    once(RaiseActivations(), GELU[case], "Gelu")


@pytest.mark.parametrize("case", TANH_GELU)
def test_gelu_tanh(case: str) -> None:
    once(RaiseActivations(), TANH_GELU[case], "Gelu", approximate="tanh")


@pytest.mark.parametrize(("operator", "case"), [(o, c) for o, cases in OTHERS.items() for c in cases])
def test_other_activations(operator: str, case: str) -> None:
    once(RaiseActivations(softplus=True), OTHERS[operator][case], operator)


def test_softplus_is_left_alone_unless_asked_for() -> None:
    module, _ = raise_and_check(RaiseActivations(), model(OTHERS["Softplus"]["log"]))
    assert "Softplus" not in count_ops(module)


def test_a_factor_that_is_not_a_half_stays_behind() -> None:
    module, _ = raise_and_check(
        RaiseActivations(), model("d = Div(x, root) e = Erf(d) a = Add(e, one) h = Mul(x, three) y = Mul(h, a)")
    )
    assert count_ops(module) == {"Gelu": 1, "Mul": 1}


NO_GELU = {
    "another divisor": "d = Div(x, two) e = Erf(d) a = Add(e, one) h = Mul(x, half) y = Mul(h, a)",
    "another summand": "d = Div(x, root) e = Erf(d) a = Add(e, two) h = Mul(x, half) y = Mul(h, a)",
    "another factor": "d = Div(x, root) e = Erf(d) a = Add(e, one) h = Mul(g, half) y = Mul(h, a)",
}


@pytest.mark.parametrize("case", NO_GELU)
def test_no_gelu(case: str) -> None:
    module, missed = raise_and_check(RaiseActivations(), model(NO_GELU[case]))
    assert "Gelu" not in count_ops(module)
    assert any("Gelu" in reason for _, reason in missed)


def test_what_is_inside_and_needed_elsewhere_stays() -> None:
    nodes = "d = Div(x, root) e = Erf(d) a = Add(e, one) h = Mul(x, half) y = Mul(h, a) z = Relu(a)"
    result = "float[batch, seq, 8] y, float[batch, seq, 8] z"
    module, missed = raise_and_check(RaiseActivations(), model(nodes, result=result))
    assert "Gelu" not in count_ops(module)
    assert any("needed elsewhere" in reason for _, reason in missed)


def test_swish_waits_for_its_opset() -> None:
    nodes = "a = Mul(x, alpha) s = Sigmoid(a) y = Mul(x, s)"
    module, _ = raise_and_check(RaiseActivations(), model(nodes))
    assert "Swish" not in count_ops(module)
    newer = model(nodes)
    newer.model.opset_imports[""] = newer.graph.opset_imports[""] = 24
    module, _ = raise_and_check(RaiseActivations(), newer)
    assert count_ops(module) == {"Swish": 1}


_MEAN = "m = ReduceMean(x, last) c = Sub(x, m) "
LAYER_NORM = {
    "power, root, division": _MEAN
    + "q = Pow(c, two) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) n = Div(c, s) "
    "w = Mul(n, g) y = Add(w, b)",
    "product, inverse root": _MEAN
    + "q = Mul(c, c) v = ReduceMean(q, last) e = Add(eps, v) s = Sqrt(e) r = Reciprocal(s) "
    "n = Mul(r, c) w = Mul(g, n) y = Add(b, w)",
    "power of minus a half": _MEAN
    + "q = Mul(c, c) v = ReduceMean(q, last) e = Add(v, eps) r = Pow(e, minus) n = Mul(c, r) "
    "w = Mul(n, g) y = Add(w, b)",
    "one over the root": _MEAN + "q = Pow(c, two) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) r = "
    "Div(one, s) "
    "n = Mul(c, r) w = Mul(n, g) y = Add(w, b)",
    "no scale": _MEAN
    + "q = Pow(c, two) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) n = Div(c, s) y = Add(n, b)",
    "no bias": _MEAN
    + "q = Pow(c, two) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) n = Div(c, s) y = Mul(n, g)",
    "bare": _MEAN + "q = Pow(c, two) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) y = Div(c, s)",
}
RMS_NORM = {
    "power, inverse root": "q = Pow(x, two) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) r = "
    "Reciprocal(s) n = Mul(x, r) "
    "y = Mul(g, n)",
    "division": "q = Mul(x, x) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, g)",
    "no scale": "q = Mul(x, x) v = ReduceMean(q, last) e = Add(v, eps) s = Sqrt(e) y = Div(x, s)",
}


@pytest.mark.parametrize("case", LAYER_NORM)
def test_layer_normalization(case: str) -> None:
    once(RaiseNormalization(), LAYER_NORM[case], "LayerNormalization", axis=-1)


@pytest.mark.parametrize("case", RMS_NORM)
def test_rms_normalization(case: str) -> None:
    once(RaiseNormalization(), RMS_NORM[case], "RMSNormalization", axis=-1)


def test_a_shared_scale_stays_what_it_is() -> None:
    nodes = LAYER_NORM["bare"].replace("y = Div(c, s)", "n = Div(c, s) w = Mul(n, g) y = Add(w, g)")
    module, _ = raise_and_check(RaiseNormalization(), model(nodes))
    (node,) = module.graph
    assert node.inputs[1] is node.inputs[2] is module.graph.initializers["g"]


def test_a_bias_of_the_whole_shape_stays_outside() -> None:
    nodes = LAYER_NORM["bare"].replace("y = Div(c, s)", "n = Div(c, s) y = Add(n, x)")
    module, _ = raise_and_check(RaiseNormalization(), model(nodes))
    assert count_ops(module) == {"LayerNormalization": 1, "Add": 1}


NO_NORM = {
    "the mean is over other axes": (LAYER_NORM["bare"].replace("x, last", "x, first"), ""),
    "the first axes": (LAYER_NORM["bare"].replace("last", "first"), "not over the last ones"),
    "something else is divided": (LAYER_NORM["bare"].replace("Div(c, s)", "Div(x, s)"), "something else"),
}


@pytest.mark.parametrize("case", NO_NORM)
def test_no_layer_normalization(case: str) -> None:
    nodes, reason = NO_NORM[case]
    module, missed = raise_and_check(RaiseNormalization(), model(f"first = Constant<value_ints=[1]>() {nodes}"))
    assert "LayerNormalization" not in count_ops(module)
    assert any(reason in said for _, said in missed) or not reason


def test_what_is_left_after_the_mean_and_needed_elsewhere_stays() -> None:
    result = "float[batch, seq, 8] y, float[batch, seq, 8] z"
    module, missed = raise_and_check(RaiseNormalization(), model(LAYER_NORM["bare"] + " z = Relu(c)", result=result))
    assert "LayerNormalization" not in count_ops(module)
    assert any("needed elsewhere" in reason for _, reason in missed)


# -- rotary embedding ----------------------------------------------------------------------------------------------

_HEADS = "float[2, 3, 5, 8] x"
_TABLES = _HEADS + ", float[5, 4] angle"
_COMPUTED = "t0 = Concat<axis=-1>(angle, angle) c = Cos(t0) s = Sin(t0) "
_HALVES = (
    "zero1 = Constant<value_ints=[0]>() four = Constant<value_ints=[4]>() eight = Constant<value_ints=[8]>() "
    "x1 = Slice(x, zero1, four, last) x2 = Slice(x, four, eight, last) "
)
_APART = "x1, x2 = Split<axis=-1, num_outputs=2>(x) "
_SUM = "n = Neg(x2) r = Concat<axis=-1>(n, x1) p = Mul(x, c) q = Mul(r, s) y = Add(p, q)"
ROTARY = {
    "slices": _COMPUTED + _HALVES + _SUM,
    "split": _COMPUTED + _APART + _SUM,
    "sum the other way round": _COMPUTED
    + _APART
    + "n = Neg(x2) r = Concat<axis=-1>(n, x1) p = Mul(c, x) q = Mul(s, r) "
    "y = Add(q, p)",
    "two halves": "c = Cos(angle) s = Sin(angle) "
    + _APART
    + "a = Mul(x1, c) d = Mul(x2, s) e = Mul(x2, c) f = Mul(x1, s) "
    "h = Sub(a, d) k = Add(e, f) y = Concat<axis=-1>(h, k)",
    "neighbours": "u = Constant<value_ints=[2]>() a5 = Unsqueeze(angle, last) t0 = Concat<axis=-1>(a5, a5) "
    "flat = Constant<value_ints=[5, 8]>() t1 = Reshape(t0, flat) c = Cos(t1) s = Sin(t1) "
    "z0 = Constant<value_ints=[0]>() z1 = Constant<value_ints=[1]>() z8 = Constant<value_ints=[8]>() "
    "even = Slice(x, z0, z8, last, u) odd = Slice(x, z1, z8, last, u) n = Neg(odd) n5 = Unsqueeze(n, last) "
    "e5 = Unsqueeze(even, last) r5 = Concat<axis=-1>(n5, e5) back = Constant<value_ints=[2, 3, 5, 8]>() "
    "r = Reshape(r5, back) p = Mul(x, c) q = Mul(r, s) y = Add(p, q)",
}


@pytest.mark.parametrize("case", ROTARY)
def test_rotary(case: str) -> None:
    made = model(ROTARY[case], inputs=_TABLES, result="float[2, 3, 5, 8] y")
    module, missed = raise_and_check(RaiseRotary(), made)
    assert count_ops(module).get("RotaryEmbedding") == 1, missed
    assert not {"Neg", "Add", "Sub"} & set(count_ops(module))
    (node,) = [n for n in module.graph if n.op_type == "RotaryEmbedding"]
    assert ("interleaved" in node.attributes) is (case == "neighbours")


def test_rotary_of_a_part() -> None:
    nodes = (
        "c = Cos(angle) s = Sin(angle) part, rest = Split<axis=-1>(x, sizes) x1, x2 = Split<axis=-1, "
        "num_outputs=2>(part) "
        "a = Mul(x1, c) d = Mul(x2, s) e = Mul(x2, c) f = Mul(x1, s) h = Sub(a, d) k = Add(e, f) "
        "turned = Concat<axis=-1>(h, k) y = Concat<axis=-1>(turned, rest)"
    )
    made = model(
        "sizes = Constant<value_ints=[4, 4]>() " + nodes,
        inputs=_HEADS + ", float[5, 2] angle",
        result="float[2, 3, 5, 8] y",
    )
    module, missed = raise_and_check(RaiseRotary(), made)
    (node,) = [n for n in module.graph if n.op_type == "RotaryEmbedding"]
    assert node.attributes["rotary_embedding_dim"].as_int() == 4, missed
    assert "Split" not in count_ops(module)


def test_rotary_of_a_projection() -> None:
    nodes = "h = Constant<value_ints=[2, 5, 3, 8]>() v = Reshape(z, h) x = Transpose<perm=[0, 2, 1, 3]>(v) "
    made = model(nodes + ROTARY["split"], inputs="float[2, 5, 24] z, float[5, 4] angle", result="float[2, 3, 5, 8] y")
    module, _ = raise_and_check(RaiseRotary(), made)
    (node,) = [n for n in module.graph if n.op_type == "RotaryEmbedding"]
    assert node.inputs[0] is module.graph.inputs[0]
    assert node.attributes["num_heads"].as_int() == 3


NO_ROTARY = {
    "tables that differ in their halves": (
        "t0 = Concat<axis=-1>(angle, other) c = Cos(t0) s = Sin(t0) " + _APART + _SUM, "every angle twice",
    ),
    "the second half negated": (_COMPUTED + _APART + _SUM.replace("Neg(x2)", "Neg(x1)").replace("n, x1", "n, "
    "x2"), ""),
    "halves exchanged without a sign": (_COMPUTED + _APART + _SUM.replace("Neg(x2)", "Identity(x2)"), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_ROTARY)
def test_no_rotary(case: str) -> None:
    nodes, reason = NO_ROTARY[case]
    made = model(nodes, inputs=_TABLES + ", float[5, 4] other", result="float[2, 3, 5, 8] y")
    module, missed = raise_and_check(RaiseRotary(), made)
    assert "RotaryEmbedding" not in count_ops(module)
    assert any(reason in said for _, said in missed) or not reason


_CUTS = (
    "n0 = Constant<value_ints=[0]>() n2 = Constant<value_ints=[2]>() n4 = Constant<value_ints=[4]>() "
    "n8 = Constant<value_ints=[8]>() x1 = Slice(x, n0, n2, last) x2 = Slice(x, n2, n4, last) "
    "rest = Slice(x, n4, n8, last) "
)
PARTS = {
    "two halves": "c = Cos(angle) s = Sin(angle) a = Mul(x1, c) d = Mul(x2, s) e = Mul(x2, c) f = Mul(x1, s) "
    "h = Sub(a, d) k = Add(e, f) turned = Concat<axis=-1>(h, k) ",
    "sum": "part = Slice(x, n0, n4, last) t0 = Concat<axis=-1>(angle, angle) c = Cos(t0) s = Sin(t0) n = Neg(x2) "
    "r = Concat<axis=-1>(n, x1) p = Mul(part, c) q = Mul(r, s) turned = Add(p, q) ",
}


@pytest.mark.parametrize("case", PARTS)
def test_rotary_of_a_part_in_slices_of_the_whole(case: str) -> None:
    made = model(
        _CUTS + PARTS[case] + "y = Concat<axis=-1>(turned, rest)",
        inputs=_HEADS + ", float[5, 2] angle",
        result="float[2, 3, 5, 8] y",
    )
    module, missed = raise_and_check(RaiseRotary(), made)
    (node,) = [n for n in module.graph if n.op_type == "RotaryEmbedding"]
    assert node.inputs[0] is module.graph.inputs[0], missed
    assert node.attributes["rotary_embedding_dim"].as_int() == 4
