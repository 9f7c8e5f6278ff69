"""Passes that change what is in the graph rather than single nodes: sharing, dead code, names, bodies, functions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mmopt.ir.fingerprint import fingerprint
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize import (
    DeduplicateInitializers,
    EliminateCommonSubexpressions,
    EliminateDeadCode,
    InlineFunctions,
    LiftConstants,
    ShareSizes,
    SimplifyControlFlow,
    StabilizeNames,
)
from tests.canonical import assert_same, check, evaluate, inputs_for, module_from, ops

BRANCHES = (
    "g (float[2] x, bool c) => (float[2] y) {{ {before} y = If (c) <"
    " then_branch = t () => (float[2] p) {{ {yes} }}, else_branch = e () => (float[2] q) {{ {no} }}> }}"
)


def test_equal_nodes_are_computed_once() -> None:
    module = module_from("g (float[3] x) => (float[3] y) { a = Exp(x) b = Exp(x) c = Neg(a) d = Neg(b) y = Add(c, d) }")
    check(EliminateCommonSubexpressions(), module)
    # The run removes both pairs: the second becomes equal when the first is merged.
    assert ops(module) == ["Exp", "Neg", "Add"]


def test_equal_nodes_behind_two_outputs_keep_both_names() -> None:
    module = module_from("g (float[3] x) => (float[3] y, float[3] z) { y = Exp(x) z = Exp(x) }")
    check(EliminateCommonSubexpressions(), module, fires=False)
    module = module_from("g (float[3] x) => (float[3] y, float[3] z) { a = Exp(x) y = Exp(x) z = Neg(a) }")
    check(EliminateCommonSubexpressions(), module)
    assert ops(module) == ["Exp", "Neg"]


DIFFERENT = {
    "attribute": "a = LeakyRelu<alpha = 0.1>(x) b = LeakyRelu<alpha = 0.2>(x)",
    "sign-of-zero": "a = LeakyRelu<alpha = 0.0>(x) b = LeakyRelu<alpha = -0.0>(x)",
    "operands": "n = Neg(x) a = Sub(x, n) b = Sub(n, x)",
    "random": "a = RandomNormalLike<seed = 1.0>(x) b = RandomNormalLike<seed = 1.0>(x)",
}


@pytest.mark.parametrize("body", DIFFERENT.values(), ids=DIFFERENT)
def test_different_nodes_stay(body: str) -> None:
    module = module_from(f"g (float[3] x) => (float[3] y) {{ {body} y = Add(a, b) }}")
    check(EliminateCommonSubexpressions(), module, fires=False)


def test_a_missing_output_is_not_made_up() -> None:
    text = "g (float[1,1,4] x) => (float[a,b,c] y, int64[d,e,f] z) {{ {first} y = Relu(a) z = Neg(i) }}"
    one, both = "a = MaxPool<kernel_shape = [2]>(x)", "b, i = MaxPool<kernel_shape = [2]>(x)"
    check(EliminateCommonSubexpressions(), module_from(text.format(first=f"{one} {both}")), fires=False)


def test_a_body_reuses_the_graph_around_it_but_not_the_other_branch() -> None:
    text = BRANCHES.format(
        before="a = Exp(x) n = Neg(a)", yes="b = Exp(x) p = Add(b, n)", no="d = Exp(x) f = Tanh(x) q = Add(d, f)"
    )
    module = module_from(text)
    check(EliminateCommonSubexpressions(), module)
    assert sorted(ops(module)) == ["Add", "Add", "Exp", "If", "Neg", "Tanh"]
    siblings = BRANCHES.format(before="", yes="b = Exp(x) p = Neg(b)", no="d = Exp(x) q = Abs(d)")
    check(EliminateCommonSubexpressions(), module_from(siblings), fires=False)


IFS = (
    "g (float[2] x, bool c) => (float[2] y) { "
    " a = If (c) <then_branch = t () => (float[2] p) { h = Exp(x) p = Neg(h) },"
    "  else_branch = e () => (float[2] q) { q = Abs(x) }>"
    " b = If (c) <then_branch = u () => (float[2] r) { k = Exp(x) r = Neg(k) },"
    "  else_branch = f () => (float[2] s) { s = %s(x) }>"
    " y = Add(a, b) }"
)


def test_equal_bodies_are_equal_whatever_their_names() -> None:
    module = module_from(IFS % "Abs")
    check(EliminateCommonSubexpressions(), module)
    assert ops(module).count("If") == 1
    check(EliminateCommonSubexpressions(), module_from(IFS % "Relu"), fires=False)


def test_sizes_from_different_places_are_shared() -> None:
    module = module_from(
        "g (float[batch,seq] x) => (int64[1] y, int64[1] z) <int64[1] o = {1}> {"
        " r = Relu(x) s = Shape(x) t = Shape(r) a = Gather(s, o) b = Gather(t, o) y = Neg(a) z = Abs(b) }"
    )
    check(ShareSizes(), module)
    y, z = (value.producer() for value in module.graph.outputs)
    assert y is not None
    assert z is not None
    assert y.inputs[0] is z.inputs[0]


def test_sizes_of_another_name_or_type_are_not_shared() -> None:
    module = module_from(
        "g (float[batch,seq] x) => (int64[1] y, int32[1] z, int64 w) <int64[1] o = {1}, int64 p = {0}> {"
        " s = Shape(x) a = Gather(s, o) b = Gather(s, p) c = Cast<to = 6>(a) y = Neg(a) z = Neg(c) w = Neg(b) }"
    )
    check(ShareSizes(), module, fires=False)


def test_what_only_a_dead_body_reads_is_dead() -> None:
    """The body of the dead If reads ``a``: removing the If alone would leave Exp alive for ever."""
    text = BRANCHES.format(before="a = Exp(x)", yes="p = Neg(a)", no="q = Abs(a)").replace("float[2] y)", "float[2] z)")
    module = module_from(text.replace("q = Abs(a) }> }", "q = Abs(a) }> z = Relu(x) }"))
    check(EliminateDeadCode(), module)
    assert ops(module) == ["Relu"]


def test_dead_nodes_in_bodies_go() -> None:
    module = module_from(BRANCHES.format(before="", yes="d = Exp(x) p = Neg(x)", no="f = Exp(x) h = Abs(f) q = Abs(x)"))
    check(EliminateDeadCode(), module)
    assert sorted(ops(module)) == ["Abs", "If", "Neg"]


def test_dead_weights_go_and_outputs_and_defaults_stay() -> None:
    module = module_from(
        "g (float[2] x, float[2] d = {1.0, 2.0}) => (float[2] y, float[2] o)"
        " <float[2] o = {1.0, 2.0}, float[2] w = {3.0, 4.0}> { y = Relu(x) }"
    )
    check(EliminateDeadCode(), module)
    assert list(module.graph.initializers) == ["d", "o"]
    assert [value.name for value in module.graph.inputs] == ["x", "d"]


def test_optional_outputs_that_nobody_reads_go() -> None:
    module = module_from("g (float[1,1,4] x) => (float[a,b,c] y) { v, i = MaxPool<kernel_shape = [2]>(x) y = Relu(v) }")
    check(EliminateDeadCode(), module)
    assert len(module.graph.node(0).outputs) == 1
    module = module_from(
        "g (float[3,1,4] x) => (float[a,b,c] y) <float[1,8,4] w, float[1,8,2] r> {"
        " s, h, k = LSTM<hidden_size = 2>(x, w, r) y = Relu(k) }"
    )
    for name, shape in (("w", (1, 8, 4)), ("r", (1, 8, 2))):
        value = next(v for v in module.graph.node(0).inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(np.full(shape, 0.1, np.float32), name=name)
        module.graph.register_initializer(value)
    check(EliminateDeadCode(), module)
    assert [output.name for output in module.graph.node(0).outputs] == ["", "", "k"]


def test_outputs_that_are_not_optional_stay() -> None:
    module = module_from("g (float[4] x) => (float[2] y) { a, b = Split<num_outputs = 2>(x) y = Relu(a) }")
    check(EliminateDeadCode(), module, fires=False)


def test_dead_functions_and_opsets_go() -> None:
    module = module_from(
        "g (float[2] x) => (float[2] y) { y = Relu(x) }\n"
        '<domain: "my", opset_import: ["" : 18]>\nf (a) => (b) { b = Neg(a) }',
        domains=', "my" : 1, "other" : 2',
    )
    check(EliminateDeadCode(), module)
    assert not module.model.functions
    assert list(module.model.opset_imports) == [""]


def test_copies_of_weights_are_merged_across_bodies() -> None:
    weights = "float[2] a = {1.0, 2.0}, float[2] b = {1.0, 2.0}, float[2] c = {1.0, -2.0}, int64[1] k = {0}"
    module = module_from(
        f"g (float[2] x) => (float[2] y) <{weights}> {{"
        " r = Add(x, a) s = Add(r, b) t = Add(s, c) u = Gather(t, k) y = Add(t, u) }"
    )
    check(DeduplicateInitializers(), module)
    assert sorted(module.graph.initializers) == ["a", "c", "k"]
    module = module_from(
        BRANCHES.format(
            before="",
            yes="v = Constant<value = float[2] {1.0, 2.0}>() p = Add(x, v)",
            no="w = Constant<value = float[2] {1.0, 2.0}>() q = Sub(x, w)",
        )
    )
    LiftConstants().run(module, PassContext())
    check(DeduplicateInitializers(), module, fires=False)


def test_equal_numbers_of_another_sign_type_or_shape_are_no_copies() -> None:
    floats = "float[2] a = {0.0, 1.0}, float[2] b = {-0.0, 1.0}, float[1,2] c = {0.0, 1.0}"
    weights = f"{floats}, int32[2] d = {{0, 1}}, int64[2] e = {{0, 1}}"
    module = module_from(
        f"g (float[2] x) => (float[1,2] y, int32[2] u, int64[2] v) <{weights}> {{"
        " r = Div(x, a) s = Div(r, b) y = Add(s, c) u = Neg(d) v = Neg(e) }"
    )
    check(DeduplicateInitializers(), module, fires=False)


def test_weights_of_different_kinds_are_not_read() -> None:
    def unread() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    module = module_from(
        "g (float[4] x) => (float[4] y) <float[4] a, float[2] b>"
        " { c = Concat<axis = 0>(b, b) d = Add(x, a) y = Add(d, c) }"
    )
    for value in {v for node in module.graph for v in node.inputs if v is not None and v.name in ("a", "b")}:
        value.const_value = ir.LazyTensor(
            unread, dtype=ir.DataType.FLOAT, shape=value.shape or ir.Shape([]), name=value.name
        )
        module.graph.register_initializer(value)
    assert not DeduplicateInitializers().run(module, PassContext())


def test_long_weights_that_differ_in_the_middle_stay_apart() -> None:
    module = module_from(
        "g (float[9000] x) => (float[9000] y) <float[9000] a, float[9000] b, float[9000] c>"
        " { d = Add(x, a) e = Add(d, b) y = Add(e, c) }"
    )
    numbers = np.arange(9000, dtype=np.float32)
    other = numbers.copy()
    other[3000] = 7
    for name, array in (("a", numbers), ("b", other), ("c", numbers.copy())):
        value = next(v for node in module.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array, name=name)
        module.graph.register_initializer(value)
    check(DeduplicateInitializers(), module)
    assert sorted(module.graph.initializers) == ["a", "b"]


CONSTANTS = {
    "tensor": "c = Constant<value = float[2] {1.0, 2.0}>()",
    "float": "c = Constant<value_float = 2.5>()",
    "floats": "c = Constant<value_floats = [1.5, 2.5]>()",
}


@pytest.mark.parametrize("body", CONSTANTS.values(), ids=CONSTANTS)
def test_constants_become_initializers(body: str) -> None:
    module = module_from(f"g (float[2] x) => (float[2] y) {{ {body} y = Add(x, c) }}")
    check(LiftConstants(), module)
    assert ops(module) == ["Add"]
    assert list(module.graph.initializers) == ["c"]


def test_integer_and_string_constants_become_initializers() -> None:
    module = module_from(
        "g (int64[2] x) => (int64[2] y, bool[2] z) { c = Constant<value_ints = [1, 2]>() d = Constant<value_int = 3>()"
        " a = Add(x, c) y = Add(a, d)"
        ' s = Constant<value_strings = ["a", "b"]>() t = Constant<value_string = "b">() z = Equal(s, t) }',
        opset=19,
    )
    check(LiftConstants(), module)
    assert ops(module) == ["Add", "Add", "Equal"]


def test_constants_lift_in_bodies_and_stay_as_outputs() -> None:
    module = module_from(
        BRANCHES.format(
            before="",
            yes="k = Constant<value_float = 2.0>() p = Mul(x, k)",
            no="q = Constant<value = float[2] {1.0, 2.0}>()",
        )
    )
    check(LiftConstants(), module)
    assert sorted(ops(module)) == ["Constant", "If", "Mul"]


def test_names_are_given_in_order_and_kept() -> None:
    module = module_from("g (float[2] x) => (float[2] y) { a = Relu(x) b = Relu(a) c = Neg(b) y = Exp(c) }")
    for node, name in zip(module.graph, ("", "mine", "", "mine"), strict=True):
        node.name = name
    module.graph.node(0).outputs[0].name = None
    module.graph.node(2).outputs[0].name = None
    assert StabilizeNames().run(module, PassContext())
    check(StabilizeNames(), module, fires=False)
    assert [node.name for node in module.graph] == ["Relu_0", "mine", "Neg_0", "mine_1"]
    assert [node.outputs[0].name for node in module.graph] == ["Relu_0_output", "b", "Neg_0_output", "y"]


def test_names_are_the_same_in_every_run() -> None:
    def named() -> str:
        module = module_from("g (float[2] x) => (float[2] y) { a = Relu(x) b = Relu(a) y = Exp(b) }")
        for node in module.graph:
            node.name = None
            if not node.outputs[0].is_graph_output():
                node.outputs[0].name = None
        StabilizeNames().run(module, PassContext())
        return fingerprint(module.model)

    assert named() == named()


def test_a_name_that_hides_an_outer_one_is_changed_and_one_beside_it_is_not() -> None:
    module = module_from(
        BRANCHES.format(before="a = Exp(x) n = Neg(a)", yes="b = Exp(n) p = Neg(b)", no="b = Abs(n) q = Neg(b)")
    )
    for node in module.graph.all_nodes():
        node.name = f"{node.op_type}:{node.outputs[0].name}"
    body = next(graph for graph in module.model.graphs() if graph is not module.graph)
    before = [output.name for graph in module.model.graphs() for node in graph for output in node.outputs]
    assert before.count("b") == 2
    inner = next(iter(body)).outputs[0]
    inner.name = "a"
    assert StabilizeNames().run(module, PassContext())
    assert inner.name == "a_1"
    names = [output.name for graph in module.model.graphs() for node in graph for output in node.outputs]
    assert "b" in names
    assert not StabilizeNames().run(module, PassContext())


def _known_if(condition: int) -> Module:
    return module_from(
        f"g (float[2] x) => (float[2] y, float[2] z) <bool c = {{{condition}}}> {{ a = Exp(x) y, z = If (c) <"
        " then_branch = t () => (float[2] p, float[2] r) { w = Neg(a) p = Relu(w) r = Identity(p) },"
        " else_branch = e () => (float[2] q, float[2] s) { w = Abs(a) q = Identity(a) s = Tanh(w) }> }"
    )


@pytest.mark.parametrize(
    ("condition", "want"), [(1, ["Exp", "Neg", "Relu", "Identity"]), (0, ["Exp", "Abs", "Identity", "Tanh"])]
)
def test_branch_with_a_known_condition_is_inlined(condition: int, want: list[str]) -> None:
    module = _known_if(condition)
    check(SimplifyControlFlow(), module)
    assert ops(module) == want


def test_inlined_names_do_not_clash() -> None:
    yes, no = "t () => (float[2] p) { w = Neg(x) p = Exp(w) }", "e () => (float[2] q) { q = Abs(x) }"
    one = f"If (c) <then_branch = {yes}, else_branch = {no}>"
    module = module_from(f"g (float[2] x) => (float[2] y) <bool c = {{1}}> {{ a = {one} b = {one} y = Add(a, b) }}")
    check(SimplifyControlFlow(), module)
    names = [output.name for node in module.graph for output in node.outputs]
    assert len(names) == len(set(names)) == 5


def test_condition_may_come_from_known_sizes() -> None:
    module = module_from(
        "g (float[batch,4] x) => (float[batch,4] y) <int64 o = {1}, int64 f = {4}> {"
        " s = Shape(x) n = Gather(s, o) c = Equal(n, f) y = If (c) <"
        " then_branch = t () => (float[u,v] p) { p = Neg(x) }, else_branch = e () => (float[k,l] q) { q = Abs(x) }> }"
    )
    check(SimplifyControlFlow(), module)
    assert ops(module)[-1] == "Neg"


def test_unknown_condition_stays() -> None:
    check(
        SimplifyControlFlow(), module_from(BRANCHES.format(before="", yes="p = Neg(x)", no="q = Abs(x)")), fires=False
    )


LOOPS = {
    "no-trip": ("int64 n = {0}, bool t = {1}", True),
    "condition-off": ("int64 n = {5}, bool t = {0}", True),
    "one-trip": ("int64 n = {1}, bool t = {1}", False),
}


@pytest.mark.parametrize(("weights", "fires"), LOOPS.values(), ids=LOOPS)
def test_loop_without_a_trip_goes(weights: str, fires: bool) -> None:
    module = module_from(
        f"g (float[2] x) => (float[2] y, float[a,2] z) <{weights}> {{ y, z = Loop(n, t, x) <body = b"
        " (int64 i, bool c, float[2] h) => (bool d, float[2] k, float[2] o)"
        " { d = Identity(c) k = Neg(h) o = Relu(h) }> }"
    )
    check(SimplifyControlFlow(), module, fires=fires)
    if fires:
        assert ops(module) == ["Identity", "Identity"]


FUNCTIONS = (
    "g (float[2] x) => (float[2] y, float[2] z) {"
    " a = my.scale<by = 3.0>(x) y = my.scale<by = 2.0>(a) z = my.both(x) }\n"
    '<domain: "my", opset_import: ["" : 18, "my" : 1]>\n'
    "scale<by>(a) => (b) { c = Constant<value_float : float = @by>() b = my.mul(a, c) }\n"
    '<domain: "my", opset_import: ["" : 18]>\nmul (a, b) => (c) { c = Mul(a, b) }\n'
    '<domain: "my", opset_import: ["my" : 1]>\nboth (a) => (b) { b = my.mul(a, a) }'
)


def test_functions_are_inlined_with_their_attributes() -> None:
    module = module_from(FUNCTIONS, domains=', "my" : 1')
    check(InlineFunctions(), module)
    assert not module.model.functions
    assert ops(module) == ["Constant", "Mul", "Constant", "Mul", "Mul"]


def test_function_that_returns_its_argument_leaves_the_input_its_name() -> None:
    module = module_from(
        "g (float[2] x) => (float[2] y) { y = my.same(x) }\n"
        '<domain: "my", opset_import: ["" : 18]>\nsame (a) => (a) { d = Neg(a) }',
        domains=', "my" : 1',
    )
    assert InlineFunctions().run(module, PassContext())
    assert (module.graph.inputs[0].name, module.graph.outputs[0].name) == ("x", "y")
    array = np.array([1.0, -2.0], np.float32)
    np.testing.assert_array_equal(evaluate(module, {"x": array})["y"], array)


def test_fusion_groups_and_foreign_opsets_stay() -> None:
    module = module_from(
        "g (float[2] x) => (float[2] y) { y = mmopt.fused.act(x) }\n"
        '<domain: "mmopt.fused", opset_import: ["" : 18]>\nact (a) => (b) { b = Neg(a) }',
        domains=', "mmopt.fused" : 1',
    )
    check(InlineFunctions(), module, fires=False)
    module = module_from(
        "g (float[2] x) => (float[2] y) { y = my.act(x) }\n"
        '<domain: "my", opset_import: ["" : 17]>\nact (a) => (b) { b = Neg(a) }',
        domains=', "my" : 1',
    )
    context = check(InlineFunctions(), module, fires=False)
    assert "opset 17" in context.remarks[0].message


def test_clone_is_not_touched_by_changes_to_the_original() -> None:
    module = _known_if(1)
    copy = module.clone()
    feeds = inputs_for(copy)
    want, before = evaluate(copy, feeds), fingerprint(copy.model)
    SimplifyControlFlow().run(module, PassContext())
    EliminateDeadCode().run(module, PassContext())
    assert fingerprint(copy.model) == before
    assert_same(want, evaluate(copy, feeds))
