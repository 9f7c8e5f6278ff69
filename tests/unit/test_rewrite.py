"""Rewrites: each rule fires, must not fire on near misses, settles, and keeps the answers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mmopt.ir.module import Module
from mmopt.ir.verify import verify
from mmopt.pipeline.base import Pass, PassContext
from mmopt.transforms.rewrite import AbsorbPads, DropExpands, FoldAffine, MergeSlices, SinkTransposes
from tests.canonical import check, evaluate, inputs_for, module_from, ops


def graph(body: str, inputs: str, outputs: str, weights: str = "") -> Module:
    return module_from(f"g ({inputs}) => ({outputs}) {f'<{weights}>' if weights else ''} {{ {body} }}")


def check_rounding(pass_: Pass, module: Module, *, fires: bool = True) -> PassContext:
    """What a rewrite that may round differently owes: a valid model, answers to 1e-5 of their range, and to settle."""
    feeds = {name: np.nan_to_num(array, posinf=3, neginf=-3) for name, array in inputs_for(module).items()}
    want = evaluate(module, feeds)
    context = PassContext()
    assert pass_.run(module, context) is fires
    assert [problem for problem in verify(module) if problem.severity == "error"] == []
    for name, got in evaluate(module, feeds).items():
        scale = np.abs(want[name]).max() + 1e-30
        np.testing.assert_allclose(got / scale, want[name] / scale, atol=1e-5, err_msg=name)
    assert pass_.run(module, PassContext()) is False
    return context


def live(module: Module) -> list[str]:
    """Operators that the outputs need, in order."""
    needed: set[ir.Node] = set()
    todo = [value.producer() for value in module.graph.outputs]
    while todo:
        node = todo.pop()
        if node is not None and node not in needed:
            needed.add(node)
            todo += [value.producer() for value in node.inputs if value is not None]
    return [node.op_type for node in module.graph if node in needed]


def weights(module: Module, **shapes: tuple[int, ...]) -> Module:
    """Give initializers by name seeded values; the text form can only spell small ones."""
    random = np.random.default_rng(1)
    for name, shape in shapes.items():
        array = np.abs(random.standard_normal(shape)).astype(np.float32) + 0.1
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape, value.dtype = ir.Shape(shape), ir.DataType.FLOAT
        old = next(v for v in module.graph.inputs if v.name == name)
        old.replace_all_uses_with(value)
        module.graph.inputs.remove(old)
        module.graph.register_initializer(value)
    return module


IMAGE = "float[2,3,6,6] x"
PADS = "int64[8] p = {0, 0, 1, 2, 0, 0, 0, 1}"


class TestAbsorbPads:
    def test_conv(self) -> None:
        text = "a = Pad(x, p) y = Conv<pads = [1, 0, 1, 0]>(a, w)"
        module = weights(graph(text, f"{IMAGE}, float[4,3,3,3] w", "float[2,4,7,7] y", PADS), w=(4, 3, 3, 3))
        check_rounding(AbsorbPads(), module)
        assert live(module) == ["Conv"]
        assert list(module.graph[-1].attributes["pads"].as_ints()) == [2, 2, 1, 1]

    def test_valid_padding_is_written_out(self) -> None:
        text = 'a = Pad(x, p) y = Conv<auto_pad = "VALID">(a, w)'
        module = weights(graph(text, f"{IMAGE}, float[4,3,3,3] w", "float[2,4,5,7] y", PADS), w=(4, 3, 3, 3))
        check_rounding(AbsorbPads(), module)
        assert live(module) == ["Conv"]

    def test_axes_by_input(self) -> None:
        constants = "int64[2] p = {1, 1}, float z = {0}, int64[1] axes = {-1}"
        module = graph(
            "a = Pad(x, p, z, axes) y = Conv(a, w)", f"{IMAGE}, float[4,3,3,3] w", "float[2,4,4,6] y", constants
        )
        check_rounding(AbsorbPads(), weights(module, w=(4, 3, 3, 3)))
        assert live(module) == ["Conv"]

    @pytest.mark.parametrize("fill", ["-inf", "after-relu"])
    def test_max_pool(self, fill: str) -> None:
        text = "r = Relu(x) a = Pad(r, p, f) y = MaxPool<kernel_shape = [3, 3]>(a)"
        module = graph(text, f"{IMAGE}, float f", "float[2,3,5,7] y", PADS)
        value = ir.Value(name="f", const_value=ir.tensor(np.float32(0 if fill == "after-relu" else -np.inf), name="f"))
        value.shape, value.dtype = ir.Shape(()), ir.DataType.FLOAT
        old = module.graph.inputs[1]
        old.replace_all_uses_with(value)
        module.graph.inputs.remove(old)
        module.graph.register_initializer(value)
        check_rounding(AbsorbPads(), module)
        assert live(module) == ["Relu", "MaxPool"]

    def test_average_pool_counts_what_was_padded(self) -> None:
        text = "a = Pad(x, p) y = AveragePool<kernel_shape = [3, 3]>(a)"
        module = graph(text, IMAGE, "float[2,3,5,7] y", PADS)
        check_rounding(AbsorbPads(), module)
        assert live(module) == ["AveragePool"]

    @pytest.mark.parametrize(
        ("body", "constants", "reason"),
        [
            ('a = Pad<mode = "edge">(x, p) y = AveragePool<kernel_shape = [3, 3]>(a)', PADS, "with a constant"),
            ("a = Pad(x, p) y = MaxPool<kernel_shape = [3, 3]>(a)", PADS, "can be the largest"),
            ("a = Pad(x, p) y = MaxPool<kernel_shape = [2, 2]>(a)", PADS, "can be the largest"),
            (
                "a = Pad(x, p) y = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(a)",
                PADS,
                "leaves its own padding",
            ),
            (
                "a = Pad(x, p) y = AveragePool<kernel_shape = [2, 2]>(a)",
                "int64[8] p = {0, 0, 2, 0, 0, 0, 0, 0}",
                "whole windows",
            ),
            (
                "a = Pad(x, p) y = AveragePool<kernel_shape = [3, 3]>(a)",
                "int64[8] p = {0, 1, 0, 0, 0, 0, 0, 0}",
                "batch or channels",
            ),
            (
                "a = Pad(x, p) y = AveragePool<kernel_shape = [3, 3]>(a)",
                "int64[8] p = {0, 0, -1, 0, 0, 0, 0, 0}",
                "amounts",
            ),
        ],
    )
    def test_other_padding_stays_and_says_why(self, body: str, constants: str, reason: str) -> None:
        context = check_rounding(AbsorbPads(), graph(body, IMAGE, "float[a,b,c,d] y", constants), fires=False)
        assert any(reason in remark.message for remark in context.remarks)

    def test_padding_that_others_read_stays(self) -> None:
        text = "a = Pad(x, p) y = AveragePool<kernel_shape = [3, 3]>(a) z = Relu(a)"
        check_rounding(AbsorbPads(), graph(text, IMAGE, "float[2,3,5,7] y, float[2,3,7,9] z", PADS), fires=False)


class TestFoldAffine:
    NORM = "s, b, m, v"
    NORM_INPUTS = "float[4] s, float[4] b, float[4] m, float[4] v"
    NORM_SHAPES = {"s": (4,), "b": (4,), "m": (4,), "v": (4,)}  # noqa: RUF012

    @pytest.mark.parametrize("bias", [False, True])
    def test_batch_norm_after_conv(self, bias: bool) -> None:
        text = f"a = Conv(x, w{', c' if bias else ''}) y = BatchNormalization(a, {self.NORM})"
        inputs = f"{IMAGE}, float[4,3,3,3] w, {self.NORM_INPUTS}" + (", float[4] c" if bias else "")
        shapes = {"w": (4, 3, 3, 3), **self.NORM_SHAPES, **({"c": (4,)} if bias else {})}
        module = weights(graph(text, inputs, "float[2,4,4,4] y"), **shapes)
        check_rounding(FoldAffine(), module)
        assert live(module) == ["Conv"]

    def test_batch_norm_after_grouped_transposed_conv(self) -> None:
        text = f"a = ConvTranspose<group = 2>(x, w) y = BatchNormalization(a, {self.NORM})"
        module = graph(text, f"float[2,6,5,5] x, float[6,2,3,3] w, {self.NORM_INPUTS}", "float[2,4,7,7] y")
        check_rounding(FoldAffine(), weights(module, w=(6, 2, 3, 3), **self.NORM_SHAPES))
        assert live(module) == ["ConvTranspose"]

    @pytest.mark.parametrize("groups", [1, 2])
    def test_batch_norm_before_conv(self, groups: int) -> None:
        text = f"a = BatchNormalization(x, {self.NORM}) y = Conv<group = {groups}>(a, w)"
        module = graph(text, f"float[2,4,5,5] x, float[6,{4 // groups},3,3] w, {self.NORM_INPUTS}", "float[2,6,3,3] y")
        check_rounding(FoldAffine(), weights(module, w=(6, 4 // groups, 3, 3), **self.NORM_SHAPES))
        assert live(module) == ["Conv"]

    def test_batch_norm_before_padded_conv_stays(self) -> None:
        text = f"a = BatchNormalization(x, {self.NORM}) y = Conv<pads = [1, 1, 1, 1]>(a, w)"
        module = graph(text, f"float[2,4,5,5] x, float[6,4,3,3] w, {self.NORM_INPUTS}", "float[2,6,5,5] y")
        context = check_rounding(FoldAffine(), weights(module, w=(6, 4, 3, 3), **self.NORM_SHAPES), fires=False)
        assert any("padding is not shifted" in remark.message for remark in context.remarks)

    @pytest.mark.parametrize("transposed", [0, 1])
    def test_batch_norm_before_gemm(self, transposed: int) -> None:
        text = (
            f"a = BatchNormalization(x, {self.NORM}) y = Gemm<transB = {transposed}, alpha = 0.5, beta = 2.0>(a, w, c)"
        )
        shape = (5, 4) if transposed else (4, 5)
        module = graph(
            text, f"float[3,4] x, float[{shape[0]},{shape[1]}] w, float[5] c, {self.NORM_INPUTS}", "float[3,5] y"
        )
        module = weights(module, w=shape, c=(5,), **self.NORM_SHAPES)
        module.graph[1].attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        check_rounding(FoldAffine(), module)
        assert live(module) == ["Gemm"]

    @pytest.mark.parametrize("transposed", [0, 1])
    def test_scale_and_offset_after_gemm(self, transposed: int) -> None:
        text = f"a = Gemm<transB = {transposed}, alpha = 0.5, beta = 2.0>(x, w, c) d = Mul(a, s) y = Add(b, d)"
        shape = (4, 7) if transposed else (7, 4)
        module = graph(
            text,
            f"float[3,7] x, float[{shape[0]},{shape[1]}] w, float[4] c, float[1,4] s, float[4] b",
            "float[3,4] y",
        )
        check_rounding(FoldAffine(), weights(module, w=shape, c=(4,), s=(1, 4), b=(4,)))
        assert live(module) == ["Gemm"]

    def test_scale_after_matmul_and_offset_stays(self) -> None:
        text = "a = MatMul(x, w) d = Div(a, s) y = Add(d, b)"
        module = graph(text, "float[2,3,7] x, float[7,4] w, float s, float[4] b", "float[2,3,4] y")
        check_rounding(FoldAffine(), weights(module, w=(7, 4), s=(), b=(4,)))
        assert live(module) == ["MatMul", "Add"]

    def test_scale_and_offset_after_layer_norm(self) -> None:
        text = "a = LayerNormalization(x, g, c) d = Mul(a, s) y = Sub(d, b)"
        module = graph(text, "float[2,3,4] x, float[4] g, float[4] c, float[4] s, float b", "float[2,3,4] y")
        check_rounding(FoldAffine(), weights(module, g=(4,), c=(4,), s=(4,), b=()))
        assert live(module) == ["LayerNormalization"]

    @pytest.mark.parametrize(
        ("body", "shape"),
        [
            ("a = Conv(x, w) y = Mul(a, s)", (4,)),  # along the width, not the channels
            ("a = Conv(x, w) y = Mul(a, s)", (2, 4, 4, 4)),
            ("a = Conv(x, w) y = Div(s, a)", (4, 1, 1)),
            ("a = Conv(x, w) y = Sub(s, a)", (4, 1, 1)),
            ("a = Conv(x, w) y = Mul(a, s)", (1, 2, 4, 1, 1)),
        ],
    )
    def test_what_is_no_affine_step_per_channel_stays(self, body: str, shape: tuple[int, ...]) -> None:
        dims = ",".join(map(str, shape))
        module = graph(body, f"{IMAGE}, float[4,3,3,3] w, float[{dims}] s", "float[...] y".replace("...", "a,b,c,d"))
        if len(shape) == 5:
            module = graph(body, f"{IMAGE}, float[4,3,3,3] w, float[{dims}] s", "float[a,b,c,d,e] y")
        check_rounding(FoldAffine(), weights(module, w=(4, 3, 3, 3), s=shape), fires=False)

    def test_linear_step_that_others_read_stays(self) -> None:
        module = graph("a = Conv(x, w) y = Mul(a, s) z = Relu(a)", f"{IMAGE}, float[4,3,3,3] w, float s",
                       "float[2,4,4,4] y, float[2,4,4,4] z")  # fmt: skip
        check_rounding(FoldAffine(), weights(module, w=(4, 3, 3, 3), s=()), fires=False)

    def test_shared_weights_are_left_alone_for_the_others(self) -> None:
        text = f"a = Conv(x, w) y = BatchNormalization(a, {self.NORM}) z = Conv(x, w)"
        inputs = f"{IMAGE}, float[4,3,3,3] w, {self.NORM_INPUTS}"
        module = weights(graph(text, inputs, "float[2,4,4,4] y, float[2,4,4,4] z"), w=(4, 3, 3, 3), **self.NORM_SHAPES)
        check_rounding(FoldAffine(), module)
        assert live(module).count("Conv") == 2

    def test_infinite_weights_are_refused(self) -> None:
        module = graph(
            "a = Conv(x, w) y = Div(a, s)", f"{IMAGE}, float[4,3,3,3] w", "float[2,4,4,4] y", "float s = {0}"
        )
        assert FoldAffine().run(weights(module, w=(4, 3, 3, 3)), PassContext()) is False


PIECES = {
    "slice-of-slice": ("a = Slice(x, b, e, d) y = Slice(a, b, e, d)", ["Slice"]),
    "slice-of-split": ("a, c = Split<axis = 1, num_outputs = 2>(x) y = Slice(c, b, e, d)", ["Slice"]),
    "slice-of-concat-is-an-operand": ("r = Relu(x) a = Concat<axis = 1>(x, r) y = Slice(a, k, l, d)", ["Relu"]),
    "slice-of-concat-is-in-an-operand": (
        "r = Relu(x) a = Concat<axis = 1>(r, x) y = Slice(a, b, e, d)",
        ["Relu", "Slice"],
    ),
    "concat-of-split": ("a, c = Split<axis = 1, num_outputs = 2>(x) t = Concat<axis = -2>(a, c) y = Relu(t)", ["Relu"]),
    "concat-of-slices": ("a = Slice(x, b, e, d) c = Slice(x, e, l, d) y = Concat<axis = 1>(a, c)", ["Slice"]),
    "concat-of-concat": (
        "r = Relu(x) a = Concat<axis = 1>(x, r) y = Concat<axis = -2>(a, x)",
        ["Relu", "Concat"],
    ),
}
BOUNDS = "int64[1] b = {1}, int64[1] e = {4}, int64[1] d = {1}, int64[1] k = {8}, int64[1] l = {16}"


@pytest.mark.parametrize(("body", "left"), PIECES.values(), ids=PIECES)
def test_pieces_are_followed(body: str, left: list[str]) -> None:
    module = graph(body, "float[2,8,3] x", "float[a,b,c] y", BOUNDS)
    check(MergeSlices(), module)
    assert live(module) == left


APART = {
    "another-axis": "a = Slice(x, b, e, d) y = Slice(a, b, e, f)",
    "steps": "a = Slice(x, b, e, d, t) y = Slice(a, b, e, d, t)",
    "over-two-operands": "r = Relu(x) a = Concat<axis = 1>(x, r) y = Slice(a, b, l, d)",
    "gap": "a = Slice(x, b, e, d) c = Slice(x, k, l, d) y = Concat<axis = 1>(a, c)",
    "order": "a, c = Split<axis = 1, num_outputs = 2>(x) y = Concat<axis = 1>(c, a)",
    "other-axis-of-split": "a, c = Split<axis = 1, num_outputs = 2>(x) y = Concat<axis = 0>(a, c)",
}


@pytest.mark.parametrize("body", APART.values(), ids=APART)
def test_pieces_that_do_not_fit_stay(body: str) -> None:
    constants = BOUNDS.replace("{8}", "{5}").replace("{16}", "{12}") + ", int64[1] f = {2}, int64[1] t = {2}"
    check(MergeSlices(), graph(body, "float[2,8,3] x", "float[a,b,c] y", constants), fires=False)


EXPANDS = {
    "binary": ("a = Expand(x, s) y = Add(a, z)", ["Add"]),
    "where": ("c = Equal(z, z) a = Expand(x, s) y = Where(c, z, a)", ["Equal", "Where"]),
    "before": ("a = Expand(x, s) y = Relu(a)", ["Relu", "Expand"]),
    "chain": ("a = Expand(x, s) r = Exp(a) y = Mul(z, r)", ["Exp", "Mul"]),
}


@pytest.mark.parametrize(("body", "left"), EXPANDS.values(), ids=EXPANDS)
def test_expand_is_left_to_broadcasting(body: str, left: list[str]) -> None:
    module = graph(body, "float[3,1] x, float[2,3,4] z", "float[2,3,4] y", "int64[3] s = {2, 3, 4}")
    check(DropExpands(), module)
    assert live(module) == left


@pytest.mark.parametrize(
    "body", ["a = Expand(x, s) y = Add(a, x)", "a = Expand(x, s) t = Relu(a) y = Concat<axis = 0>(t, a)"]
)
def test_expand_that_makes_the_shape_stays(body: str) -> None:
    module = graph(body, "float[3,1] x", "float[a,b,c] y", "int64[3] s = {2, 3, 4}")
    check(DropExpands(), module, fires=False)


def test_last_reader_of_an_expand_is_met_again() -> None:
    """Relu comes first, and is alone with the Expand only once Add reads around it."""
    body = "e = Expand(r, s) y = Relu(e) z = Add(e, x)"
    module = graph(body, "float[1,3] r, float[4,3] x", "float[4,3] y, float[4,3] z", "int64[2] s = {4, 3}")
    check(DropExpands(), module)


def test_expand_to_an_unknown_shape_stays() -> None:
    check(
        DropExpands(),
        graph("a = Expand(x, s) y = Add(a, z)", "float[3,1] x, int64[3] s, float[2,3,4] z", "float[a,b,c] y"),
        fires=False,
        run=False,
    )


SINKS = {
    "unary": ("a = Transpose<perm = [0, 2, 1]>(x) b = Relu(a) y = Transpose<perm = [0, 2, 1]>(b)", ["Relu"]),
    "chain": (
        "a = Transpose<perm = [0, 2, 1]>(x) b = Relu(a) c = Mul(b, k) y = Transpose<perm = [0, 2, 1]>(c)",
        ["Relu", "Mul"],
    ),
    "two": (
        "a = Transpose<perm = [2, 0, 1]>(x) b = Transpose<perm = [2, 0, 1]>(z) y = Add(a, b)",
        ["Add", "Transpose"],
    ),
    "constant": (
        "a = Transpose<perm = [0, 2, 1]>(x) b = Add(v, a) y = Transpose<perm = [0, 2, 1]>(b)",
        ["Add"],
    ),
    "reduce": ("a = Transpose<perm = [0, 2, 1]>(x) y = ReduceMax<keepdims = 0>(a, i)", ["ReduceMax"]),
    "select": ("a = Transpose<perm = [1, 0, 2]>(x) y = Gather<axis = -2>(a, q)", ["Gather"]),
    "reduce-in-place": ("a = Transpose<perm = [0, 2, 1]>(x) y = ReduceMax(a, j)", ["ReduceMax"]),
}


@pytest.mark.parametrize(("body", "left"), SINKS.values(), ids=SINKS)
def test_transpose_goes_down(body: str, left: list[str]) -> None:
    constants = "float k = {2}, float[4] v = {1, 2, 3, 4}, int64[1] i = {1}, int64[2] j = {1, 2}, int64 q = {1}"
    output = "float[a,b] y" if "keepdims" in body or "Gather" in body else "float[a,b,c] y"
    module = graph(body, "float[2,4,3] x, float[2,4,3] z", output, constants)
    check(SinkTransposes(), module)
    assert live(module) == left


STAY = {
    "nothing-to-meet": "a = Transpose<perm = [0, 2, 1]>(x) y = Relu(a)",
    "another-reader": (
        "a = Transpose<perm = [0, 2, 1]>(x) b = Relu(a) c = Transpose<perm = [0, 2, 1]>(b) d = Add(a, a) "
        "e = Transpose<perm = [0, 2, 1]>(d) y = Concat<axis = 0>(c, e)"
    ),
    "different": "a = Transpose<perm = [0, 2, 1]>(x) b = Transpose<perm = [2, 1, 0]>(z) y = Add(a, b)",
    "select-several": "a = Transpose<perm = [1, 0, 2]>(x) y = Gather<axis = 1>(a, i)",
    "select-reorders": "a = Transpose<perm = [2, 1, 0]>(x) b = Gather<axis = 1>(a, q) y = Unsqueeze(b, i)",
    "reduce-reorders": "a = Transpose<perm = [2, 1, 0]>(x) y = ReduceMax(a, i)",
}


@pytest.mark.parametrize("body", STAY.values(), ids=STAY)
def test_transpose_that_would_not_become_fewer_stays(body: str) -> None:
    module = graph(body, "float[2,3,2] x, float[3,2,2] z", "float[a,b,c] y", "int64[1] i = {1}, int64 q = {1}")
    check(SinkTransposes(), module, fires=False)


def test_operators_left_are_counted() -> None:
    """The helper of this file sees through dead nodes."""
    assert live(graph("a = Relu(x) y = Exp(x)", IMAGE, "float[2,3,6,6] y")) == ["Exp"]
    assert ops(graph("a = Relu(x) y = Exp(x)", IMAGE, "float[2,3,6,6] y")) == ["Relu", "Exp"]
