"""Fusion groups: what is put together, what is not and why, and that the model means the same.

After a wanted change: ``python -m tests.unit.test_fuse_groups`` writes the second half of the golden text anew.
"""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from mmopt.ir.module import FUSED_DOMAIN, Module
from mmopt.ir.text import to_text
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize import InferShapes
from mmopt.transforms.fuse.fuse_groups import FuseGroups
from tests import programs
from tests.canonical import check, evaluate, inputs_for, module_from
from tests.kernels import WIDEST

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "fuse-groups.txt"
SEPARATOR = "---\n"
OPSET = 20


def shaped(text: str) -> Module:
    """A module whose shapes are inferred, as the pass finds it."""
    module = module_from(text, opset=OPSET)
    InferShapes().run(module, PassContext())
    return module


def grouped(text: str, **options: int) -> list[list[str]]:
    """Operators of each group after the pass has been checked."""
    module = shaped(text)
    check(FuseGroups(**options), module)
    return groups_of(module)


def groups_of(module: Module) -> list[list[str]]:
    calls = [node.op_identifier() for node in module.graph if node.domain == FUSED_DOMAIN]
    return [[node.op_type for node in module.model.functions[call]] for call in calls]


def left_alone(text: str) -> set[str]:
    """Reasons given where the pass does nothing."""
    return reasons(check(FuseGroups(), shaped(text), fires=False))


def reasons(context: PassContext) -> set[str]:
    return {remark.message for remark in context.remarks if remark.kind == "missed"}


def test_golden() -> None:
    before, _, after = GOLDEN.read_text().partition(SEPARATOR)
    module = shaped(before)
    check(FuseGroups(), module)
    assert to_text(module) == after


# -- fires -----------------------------------------------------------------------------------------------------


def test_convolution_bias_residual_relu() -> None:
    text = """g (float[1,4,5,5] x, float[4,4,1,1] w, float[4,1,1] b, float[1,4,5,5] r) => (float[1,4,5,5] y) {
        c = Conv(x, w)
        d = Add(c, b)
        e = Add(r, d)
        y = Relu(e)
    }"""
    assert grouped(text) == [["Conv", "Add", "Add", "Relu"]]


def test_paths_that_meet_again() -> None:
    text = """g (float[3,4] x, float[4,6] w, float[6] b, float c) => (float[3,6] y) {
        m = MatMul(x, w)
        n = Add(m, b)
        s = Mul(n, c)
        g = Sigmoid(s)
        y = Mul(n, g)
    }"""
    assert grouped(text) == [["MatMul", "Add", "Mul", "Sigmoid", "Mul"]]
    assert grouped(text, max_nodes=4) == [["MatMul", "Add"], ["Mul", "Sigmoid", "Mul"]]


@pytest.mark.parametrize(
    "after",
    [
        "y = Mul(n, g) z = Neg(s)",  # what stands between is needed elsewhere
        "z = Transpose(n) y = Mul(n, g)",  # one path moves elements
        "y = Mul(n, g) k = Mul(y, g) z = ReduceSum(n)",  # one path does not come back
    ],
)
def test_paths_that_do_not_all_meet_stay_outside(after: str) -> None:
    z = {"Neg": "3,6", "Tra": "6,3", "Red": "1,1"}[after.split("z = ")[1][:3]]
    text = f"""g (float[3,4] x, float[4,6] w) => (float[3,6] y, float[{z}] z) {{
        n = MatMul(x, w)
        s = Neg(n)
        g = Sigmoid(s)
        {after}
    }}"""
    assert not any("MatMul" in group for group in grouped(text))


@pytest.mark.parametrize("product", ["MatMul(x, w)", "Gemm(x, w)"])
def test_product_bias_activation(product: str) -> None:
    text = f"""g (float[3,4] x, float[4,6] w, float[6] b) => (float[3,6] y) {{
        m = {product}
        n = Add(m, b)
        y = Gelu(n)
    }}"""
    assert grouped(text)[0][1:] == ["Add", "Gelu"]


def test_softmax_with_what_stands_before_and_behind() -> None:
    text = """g (float[2,batch,5] x, float[1,5] m) => (float[2,batch,5] y) {
        s = Mul(x, x)
        t = Add(s, m)
        u = Softmax(t)
        y = Mul(u, x)
    }"""
    assert grouped(text) == [["Mul", "Add", "Softmax", "Mul"]]


def test_normalization_whose_residual_is_needed_later_gives_both() -> None:
    text = """g (float[batch,8] x, float[batch,8] r, float[8] w) => (float[batch,8] y) {
        a = Add(x, r)
        n = LayerNormalization(a, w)
        e = Exp(n)
        f = ReduceMax<keepdims=1>(e)
        y = Div(a, f)
    }"""
    module = shaped(text)
    check(FuseGroups(), module)
    assert groups_of(module) == [["Add", "LayerNormalization", "Exp"]]
    (call,) = (node for node in module.graph if node.domain == FUSED_DOMAIN)
    assert [o.name for o in call.outputs] == ["a", "e"]


def test_branches_of_islands_join_the_younger_one() -> None:
    text = """g (float[3,4] x) => (float[3,4] y) {
        a = Sigmoid(x)
        b = Mul(a, x)
        c = Tanh(x)
        y = Add(b, c)
    }"""
    assert grouped(text) == [["Sigmoid", "Mul"], ["Tanh", "Add"]]


def test_two_products_and_their_gate() -> None:
    text = """g (float[3,4] x, float[4,4] v, float[4,4] w) => (float[3,4] y) {
        a = MatMul(x, v)
        b = MatMul(x, w)
        c = Sigmoid(b)
        y = Mul(a, c)
    }"""
    assert grouped(text) == [["MatMul", "Sigmoid", "Mul"]]


def test_equal_groups_share_a_function() -> None:
    text = """g (float[3,4] x, float[3,4] z) => (float[3,4] u, float[3,4] v, float[3,4] w) {
        a = LeakyRelu<alpha=0.5>(x)
        u = Neg(a)
        b = LeakyRelu<alpha=0.5>(z)
        v = Neg(b)
        s = Transpose(x)
        t = Transpose(s)
        c = LeakyRelu<alpha=0.25>(t)
        w = Neg(c)
    }"""
    module = shaped(text)
    context = check(FuseGroups(), module)
    assert len(groups_of(module)) == 3
    assert len(module.model.functions) == 2
    assert [r.message for r in context.remarks if r.kind == "applied"] == ["2 operators in one kernel"] * 3


def test_a_group_ends_when_it_is_full() -> None:
    lines = "\n".join(f"v{n + 1} = {'Tanh' if n % 2 else 'Neg'}(v{n})" for n in range(7))
    text = f"g (float[3,4] v0) => (float[3,4] v7) {{ {lines} }}"
    assert [len(group) for group in grouped(text, max_nodes=3)] == [3, 3]
    assert any(reason.endswith(" is full") for reason in reasons(check(FuseGroups(max_nodes=3), shaped(text))))


def test_results_that_bodies_of_control_flow_use_stay_available() -> None:
    text = """g (float[3,4] x, bool c) => (float[3,4] y) {
        a = Exp(x)
        b = Neg(a)
        d = Tanh(b)
        y = If(c) <
          then_branch = t () => (float[3,4] p) { p = Add(b, d) },
          else_branch = e () => (float[3,4] q) { q = Identity(a) }
        >
    }"""
    assert grouped(text) == [["Exp", "Neg", "Tanh"]]


# -- does not fire ---------------------------------------------------------------------------------------------


def test_an_anchor_whose_result_is_needed_elsewhere_too() -> None:
    text = """g (float[3,4] x, float[4,4] w) => (float[3,4] y, float[4,3] z) {
        m = MatMul(x, w)
        y = Relu(m)
        z = Transpose(m)
    }"""
    assert any("is needed elsewhere too" in reason for reason in left_alone(text))


NARROW = """g (bfloat16[1,8,6,6] a, bfloat16[8,8,1,1] v, bfloat16[8,8,1,1] w)
    => (bfloat16[1,8,6,6] b, bfloat16[1,8,6,6] y) {
    x = Cast<to = 1>(a)
    f = Cast<to = 1>(v)
    c = Conv(x, f)
    r = Relu(c)
    b = Cast<to = 16>(r)
    z = Cast<to = 1>(b)
    g0 = Cast<to = 1>(w)
    d = Conv(z, g0)
    e = Add(d, x)
    y = Cast<to = 16>(e)
}"""


def test_narrow_values_stay_narrow_between_groups() -> None:
    groups = grouped(NARROW)
    assert [[op for op in group if op != "Cast"] for group in groups] == [["Conv", "Relu"], ["Conv", "Add"]]
    assert [group.count("Cast") for group in groups] == [3, 4], "what two groups read is widened in both"


def test_quantized_values_stay_integers_between_groups() -> None:
    text = """g (int8[1,8,6,6] a, float s, int8 z, int8[8,8,1,1] w, float[8] t, int8[8] o) => (int8[1,8,3,3] y) {
        x = DequantizeLinear(a, s, z)
        f = DequantizeLinear<axis = 0>(w, t, o)
        c = Conv(x, f)
        r = Relu(c)
        b = QuantizeLinear(r, s, z)
        d = DequantizeLinear(b, s, z)
        p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(d)
        q = QuantizeLinear(p, s, z)
        h = DequantizeLinear(q, s, z)
        k = Softmax(h)
        y = QuantizeLinear(k, s, z)
    }"""
    assert grouped(text) == [
        ["DequantizeLinear", "DequantizeLinear", "Conv", "Relu", "QuantizeLinear"],
        ["DequantizeLinear", "MaxPool", "QuantizeLinear"],
        ["DequantizeLinear", "Softmax", "QuantizeLinear"],
    ]


def test_a_result_that_is_needed_wide_and_narrow() -> None:
    text = """g (float[3,4] x, float[4,4] w) => (float[3,4] m, bfloat16[3,4] y) {
        m = MatMul(x, w)
        y = Cast<to = 16>(m)
    }"""
    assert grouped(text) == [["MatMul", "Cast"]]


def test_pooling_takes_nothing_along_but_conversions() -> None:
    text = """g (float[1,8,6,6] x) => (float[1,8,3,3] y) {
        p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)
        y = Relu(p)
    }"""
    assert any("cannot follow MaxPool" in reason for reason in left_alone(text))


def test_conversions_do_not_count_as_operators_of_a_group() -> None:
    assert len(grouped(NARROW, max_nodes=3)) == 2


def test_an_anchor_whose_result_leaves_the_model() -> None:
    text = """g (float[3,4] x, float[4,4] w) => (float[3,4] m, float[3,4] y) {
        m = MatMul(x, w)
        y = Relu(m)
    }"""
    assert any("is needed elsewhere too" in reason for reason in left_alone(text))


def test_another_input_depends_on_the_group() -> None:
    text = """g (float[3,4] x) => (float[3,4] y) {
        a = Exp(x)
        m = ReduceMax<keepdims=1>(a)
        y = Sub(a, m)
    }"""
    assert any("stands before it, needs a result of the group" in reason for reason in left_alone(text))


def test_groups_that_would_need_each_other() -> None:
    text = """g (float[3,4] x, float[3,4] y) => (float[3,4] s, float[3,4] n) {
        r = Exp(x)
        p = ReduceMean<keepdims=1>(r)
        g1 = Exp(y)
        r2 = Neg(r)
        s = Add(r2, g1)
        n = Add(g1, p)
    }"""
    assert grouped(text) == [["Neg", "Add"]]


def test_a_result_that_a_body_of_control_flow_needs_before() -> None:
    text = """g (float[3,4] x, bool c) => (float[3,4] y) {
        a = Exp(x)
        m = If(c) <
          then_branch = t () => (float[3,4] p) { p = Neg(a) },
          else_branch = e () => (float[3,4] q) { q = Identity(a) }
        >
        y = Sub(a, m)
    }"""
    assert any("stands before it" in reason for reason in left_alone(text))


@pytest.mark.parametrize(
    ("signature", "operators"),
    [
        ("float[3,4] x, float[2,3,4] z) => (float[2,3,4] y", "a = Exp(x)\ny = Add(a, z)"),
        ("float[3,1] x, float[3,4] z) => (float[3,4] y", "a = Exp(x)\ny = Add(a, z)"),
        ("float[n,4] x, float[m,4] z) => (float[?,4] y", "a = Exp(x)\ny = Add(a, z)"),
    ],
)
def test_extents_that_differ(signature: str, operators: str) -> None:
    module = shaped(f"g ({signature}) {{ {operators} }}")
    context = PassContext()
    assert not FuseGroups().run(module, context)
    assert any("differs from that of" in reason for reason in reasons(context))


def test_extents_nobody_knows_leave_operators_of_one_operand_only() -> None:
    text = """g (float[3,4] x, float[2,2] k) => (float[?,?] y) {
        i = NonZero(x)
        f = Cast<to=1>(i)
        e = Tanh(f)
        h = Neg(e)
        y = Add(h, k)
    }"""
    module = module_from(text, opset=OPSET)
    FuseGroups().run(module, PassContext())
    assert groups_of(module) == [["Tanh", "Neg"]]


def test_a_row_operator_on_another_axis_and_behind_a_product() -> None:
    text = """g (float[3,4] x, float[4,4] w) => (float[3,4] y, float[3,4] z) {
        a = Exp(x)
        y = Softmax<axis=0>(a)
        m = MatMul(x, w)
        z = Softmax(m)
    }"""
    assert "Softmax cannot follow anchor operators in one kernel" in left_alone(text)


def test_what_nobody_needs_may_stand_beside_a_product() -> None:
    text = """g (float[3,5] x, float[5,5] w) => (float[3,5] y) {
        p = MatMul(x, w)
        a = Neg(p)
        b = Neg(p)
        c = Neg(a)
        y = Neg(x)
    }"""
    assert grouped(text, max_nodes=2) == [["Neg", "Neg"]]


def test_sizes_are_left_to_the_compiler() -> None:
    text = """g (float[n,4] x, int64[2] one) => (float[n,4] y) {
        s = Shape(x)
        a = Mul(s, one)
        b = Add(a, one)
        c = Sub(b, one)
        y = Reshape(x, c)
    }"""
    module = shaped(text)
    assert not FuseGroups().run(module, PassContext())


# -- compiled --------------------------------------------------------------------------------------------------


def test_each_group_is_one_kernel_and_gives_the_same() -> None:
    """The golden model natively, grouped, against onnxruntime without."""
    text = GOLDEN.read_text().partition(SEPARATOR)[0]
    plain, module = shaped(text), shaped(text)
    random = np.random.default_rng(0)
    feeds = {
        name: array if array.dtype == bool else random.standard_normal(array.shape).astype(array.dtype)
        for name, array in inputs_for(plain).items()
    }
    check(FuseGroups(), module)
    compiled = programs.Programs([module], WIDEST)
    for actual, expected in zip(compiled.run(0, feeds), evaluate(plain, feeds).values(), strict=True):
        programs.assert_close(actual, expected)
    groups = {
        name for name in compiled.kernels if not name.startswith(("operand", "plain", "blocks", "copy", "Transpose"))
    }
    assert len(groups) == len(list(module.graph)) - 1, compiled.kernels


if __name__ == "__main__":
    half = GOLDEN.read_text().partition(SEPARATOR)[0]
    made = shaped(half)
    check(FuseGroups(), made)
    GOLDEN.write_text(half + SEPARATOR + to_text(made))
