"""Spellings for other runtimes: each pass fires, leaves near misses alone, settles, and keeps the answers."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import pytest

from mmopt.cli.main import run
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.pipeline.recipe import load_recipe
from mmopt.transforms.canonicalize.eliminate_dead_code import EliminateDeadCode
from mmopt.transforms.portable import (
    BatchBranches,
    FlattenRows,
    JoinStacks,
    MergeLinears,
    OwnBiases,
    PadChannels,
    WriteGemm,
)
from mmopt.transforms.rewrite import ReassociateConstants
from tests.canonical import check, module_from
from tests.small_models import two_layers
from tests.unit.test_rewrite import check_rounding, live, weights


def model(body: str, inputs: str, outputs: str, constants: str = "", **shapes: tuple[int, ...]) -> Module:
    """A module whose inputs named in ``shapes`` become weights."""
    text = f"g ({inputs}) => ({outputs}) {f'<{constants}>' if constants else ''} {{ {body} }}"
    return weights(module_from(text, opset=23), **shapes)


def reasons(context: PassContext) -> str:
    return " ".join(remark.message for remark in context.remarks if remark.kind == "missed")


LAYER = "m = MatMul(x, w) a = Add(m, b) h = Gelu(a) n = MatMul(h, v) y = Add(n, x)"
WIDTHS = {"w": (8, 16), "b": (16,), "v": (16, 8)}
SEQUENCE = "float[2,5,8] x, float[8,16] w, float[16] b, float[16,8] v"


class TestFlattenRows:
    def test_a_block_becomes_rows(self) -> None:
        module = model(LAYER, SEQUENCE, "float[2,5,8] y", **WIDTHS)
        check_rounding(FlattenRows(), module)
        assert live(module) == ["Reshape", "Gemm", "Gelu", "MatMul", "Add", "Reshape"]

    def test_one_named_size(self) -> None:
        module = model(LAYER, SEQUENCE.replace("2,5,8", "batch,5,8"), "float[batch,5,8] y", **WIDTHS)
        check_rounding(FlattenRows(), module)
        assert live(module).count("Reshape") == 2

    def test_two_named_sizes_cannot_be_told_apart_again(self) -> None:
        module = model(LAYER, SEQUENCE.replace("2,5,8", "batch,seq,8"), "float[batch,seq,8] y", **WIDTHS)
        check_rounding(FlattenRows(), module, fires=False)

    def test_a_single_layer_stays(self) -> None:
        module = model("y = MatMul(x, w)", "float[2,5,8] x, float[8,16] w", "float[2,5,16] y", w=(8, 16))
        check_rounding(FlattenRows(), module, fires=False)

    def test_normalization_over_features(self) -> None:
        text = "m = MatMul(x, w) n = LayerNormalization<axis = -1>(m, b, b) y = MatMul(n, v)"
        module = model(text, SEQUENCE, "float[2,5,8] y", **WIDTHS)
        check_rounding(FlattenRows(), module)
        assert live(module) == ["Reshape", "MatMul", "LayerNormalization", "MatMul", "Reshape"]

    def test_what_mixes_rows_is_outside(self) -> None:
        text = "m = MatMul(x, w) s = Softmax<axis = 1>(m) n = MatMul(s, v) y = MatMul(n, w)"
        module = model(text, SEQUENCE, "float[2,5,16] y", **WIDTHS)
        check_rounding(FlattenRows(), module)
        assert live(module) == ["MatMul", "Softmax", "Reshape", "MatMul", "MatMul", "Reshape"]

    def test_a_mask_by_position_is_outside(self) -> None:
        text = "m = MatMul(x, w) k = Mul(m, p) n = MatMul(k, v) o = MatMul(n, w) y = MatMul(o, v)"
        shapes = {"p": (5, 1), **WIDTHS}
        module = model(text, f"{SEQUENCE}, float[5,1] p", "float[2,5,8] y", **shapes)
        check_rounding(FlattenRows(), module)
        assert live(module)[:3] == ["MatMul", "Mul", "Reshape"]

    def test_results_inside_that_are_outputs_too(self) -> None:
        module = model(LAYER, SEQUENCE, "float[2,5,8] y, float[2,5,16] h", **WIDTHS)
        check_rounding(FlattenRows(), module)
        assert live(module).count("Reshape") == 3

    def test_a_sum_at_the_border_reads_sequences(self) -> None:
        text = "s = Add(x, z) m = MatMul(s, w) h = Gelu(m) y = MatMul(h, v)"
        module = model(text, f"{SEQUENCE}, float[2,5,8] z", "float[2,5,8] y", **WIDTHS)
        check_rounding(FlattenRows(), module)
        assert live(module)[:2] == ["Add", "Reshape"]


class TestWriteGemm:
    def test_bias(self) -> None:
        module = model("m = MatMul(x, w) y = Add(b, m)", "float[5,8] x, float[8,16] w, float[16] b", "float[5,16] y")
        check_rounding(WriteGemm(), weights(module, w=(8, 16), b=(16,)))
        assert live(module) == ["Gemm"]

    @pytest.mark.parametrize(
        ("text", "outputs"),
        [
            ("m = MatMul(x, w) y = Add(m, c)", "float[5,16] y"),
            ("m = MatMul(x, w) y = Add(m, b)", "float[5,16] y, float[5,16] m"),
            ("m = MatMul(x, w) y = Add(m, m)", "float[5,16] y"),
        ],
        ids=["bias of another shape", "product needed elsewhere", "no bias"],
    )
    def test_stays(self, text: str, outputs: str) -> None:
        inputs = "float[5,8] x, float[8,16] w, float[16] b, float[1] c"
        check_rounding(WriteGemm(), model(text, inputs, outputs, w=(8, 16), b=(16,), c=(1,)), fires=False)


class TestMergeLinears:
    PAIR = "float[5,8] x, float[5,4] z, float[8,6] w, float[6] b, float[4,6] v, float[6] c"
    SHAPES = {"w": (8, 6), "b": (6,), "v": (4, 6), "c": (6,)}  # noqa: RUF012

    def test_sum(self) -> None:
        module = model("p = Gemm(x, w, b) q = Gemm(z, v, c) y = Add(p, q)", self.PAIR, "float[5,6] y", **self.SHAPES)
        check_rounding(MergeLinears(), module)
        assert live(module) == ["Concat", "Gemm"]

    def test_three_in_a_sum_are_joined_once(self) -> None:
        text = "p = Gemm(x, w, b) q = Gemm(z, v, c) r = Gemm(z, u) s = Add(p, q) y = Add(r, s)"
        module = model(text, f"{self.PAIR}, float[4,6] u", "float[5,6] y", u=(4, 6), **self.SHAPES)
        check_rounding(MergeLinears(), module)
        assert live(module) == ["Concat", "Gemm"]
        assert len(next(node for node in module.graph if node.op_type == "Concat").inputs) == 3

    def test_same_input_needs_no_joining(self) -> None:
        module = model("p = Gemm(x, w, b) q = Gemm(x, u) y = Add(p, q)", f"{self.PAIR}, float[8,6] u", "float[5,6] y")
        check_rounding(MergeLinears(), weights(module, u=(8, 6), **self.SHAPES))
        assert live(module) == ["Gemm"]

    def test_factors_and_transposed_weights(self) -> None:
        text = "p = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(x, w, b) q = Gemm(z, v, c) y = Add(p, q)"
        shapes = {**self.SHAPES, "w": (6, 8)}
        module = model(text, self.PAIR.replace("float[8,6] w", "float[6,8] w"), "float[5,6] y", **shapes)
        check_rounding(MergeLinears(), module)
        assert live(module) == ["Concat", "Gemm"]

    def test_chain(self) -> None:
        text, inputs = "p = Gemm(x, w, b) y = Gemm(p, u, c)", "float[5,4] x, float[4,9] w, float[9] b, float[9,6] u"
        module = model(text, f"{inputs}, float[6] c", "float[5,6] y", w=(4, 9), b=(9,), u=(9, 6), c=(6,))
        check_rounding(MergeLinears(), module)
        assert live(module) == ["Gemm"]

    def test_a_narrow_middle_saves_products(self) -> None:
        module = model("p = Gemm(x, w) y = Gemm(p, u)", "float[5,8] x, float[8,2] w, float[2,8] u", "float[5,8] y")
        context = check_rounding(MergeLinears(), weights(module, w=(8, 2), u=(2, 8)), fires=False)
        assert "more products" in reasons(context)

    def test_wide_inputs_are_not_copied(self) -> None:
        inputs = "float[64,600] x, float[64,600] z, float[600,6] w, float[600,6] v"
        module = model("p = Gemm(x, w) q = Gemm(z, v) y = Add(p, q)", inputs, "float[64,6] y", w=(600, 6), v=(600, 6))
        assert "costs more" in reasons(check_rounding(MergeLinears(), module, fires=False))

    @pytest.mark.parametrize(
        ("text", "outputs"),
        [
            ("p = Gemm(x, w, b) q = Gemm(z, v, c) y = Add(p, q)", "float[5,6] y, float[5,6] q"),
            ("p = Gemm(x, w, b) q = Gemm(x, w, c) y = Add(p, q)", "float[5,6] y"),
            ("p = Gemm(x, w, b) r = Relu(p) q = Gemm(z, v, c) y = Add(r, q)", "float[5,6] y"),
        ],
        ids=["an output", "shared weights", "an activation"],
    )
    def test_stays(self, text: str, outputs: str) -> None:
        check_rounding(MergeLinears(), model(text, self.PAIR, outputs, **self.SHAPES), fires=False)

    def test_rows_that_are_broadcast_stay(self) -> None:
        text = "p = Gemm(x, w, b) q = Gemm(z, v, c) y = Add(p, q)"
        module = model(text, self.PAIR.replace("5,4", "1,4"), "float[5,6] y", **self.SHAPES)
        check_rounding(MergeLinears(), module, fires=False)


class TestJoinStacks:
    PARTS = "float[2,4] a, float[2,4] b"

    def _text(self, axis: int, rest: str = "") -> tuple[str, str]:
        body = f"p = Unsqueeze(a, i) q = Unsqueeze(b, i) s = Concat<axis = {axis}>(p, q) {rest}"
        return body, f"int64[1] i = {{{axis}}}, int64[1] k = {{1}}"

    @pytest.mark.parametrize(("axis", "shape"), [(0, "2,2,4"), (1, "2,2,4")])
    def test_stack(self, axis: int, shape: str) -> None:
        body, constants = self._text(axis, "y = Relu(s)")
        module = model(body, self.PARTS, f"float[{shape}] y", constants)
        check(JoinStacks(), module)
        assert live(module) == ["Concat", "Reshape", "Relu"]

    @pytest.mark.parametrize(("reduction", "result"), [("ReduceMean", "Mean"), ("ReduceMax", "Max")])
    def test_reduction(self, reduction: str, result: str) -> None:
        body, constants = self._text(1, f"y = {reduction}<keepdims = 0>(s, k)")
        module = model(body, self.PARTS, "float[2,4] y", constants)
        check_rounding(JoinStacks(), module)
        assert live(module) == [result]

    def test_new_last_axis(self) -> None:
        body, constants = self._text(2, "y = Relu(s)")
        context = check(JoinStacks(), model(body, self.PARTS, "float[2,4,2] y", constants), fires=False)
        assert "nothing to join" in reasons(context)

    def test_other_axes_are_no_stack(self) -> None:
        body = "p = Unsqueeze(a, i) q = Unsqueeze(b, i) s = Concat<axis = 1>(p, q) y = Relu(s)"
        check(JoinStacks(), model(body, self.PARTS, "float[1,4,4] y", "int64[1] i = {0}"), fires=False)


TWO = "float[1,3,8,8] x, float[8,3,3,3] w, float[8] b, float[5,8,3,3] v, float[5] c"
CONVS = {"w": (8, 3, 3, 3), "b": (8,), "v": (5, 8, 3, 3), "c": (5,)}


class TestPadChannels:
    def test_between_convolutions(self) -> None:
        text = "p = Conv(x, w, b) r = Relu(p) m = MaxPool<kernel_shape = [2, 2]>(r) y = Conv(m, v, c)"
        module = model(text, TWO, "float[1,5,3,3] y", **CONVS)
        check_rounding(PadChannels(), module)
        first, _, _, second = module.graph
        assert [list(node.inputs[1].shape.numpy()) for node in (first, second)] == [[16, 3, 3, 3], [5, 16, 3, 3]]  # type: ignore[union-attr]
        assert first.outputs[0].shape == [1, 16, 6, 6]

    def test_into_a_linear_layer_beside_others(self) -> None:
        image = "p = Conv(x, w, b) r = Sigmoid(p) m = ReduceMean<keepdims = 0>(r, k)"
        text = f"{image} j = Concat<axis = -1>(z, m, z) y = Gemm<transB = 1>(j, u)"
        inputs = "float[1,3,8,8] x, float[1,3] z, float[8,3,3,3] w, float[8] b, float[4,14] u"
        module = model(text, inputs, "float[1,4] y", "int64[2] k = {2, 3}", w=(8, 3, 3, 3), b=(8,), u=(4, 14))
        check_rounding(PadChannels(), module)
        weight = np.asarray(module.graph[-1].inputs[1].const_value.numpy())  # type: ignore[union-attr]
        assert weight.shape == (4, 22)
        assert not weight[:, 11:19].any()
        assert weight[:, 19:].all()

    @pytest.mark.parametrize(
        ("text", "outputs", "reason"),
        [
            ("p = Conv(x, w, b) y = Conv(p, v, c)", "float[1,5,4,4] y, float[1,8,6,6] p", "an output"),
            ("p = Conv(x, w, b) r = Log(p) y = Conv(r, v, c)", "float[1,5,4,4] y", "Log"),
            ("p = Conv(x, w, b) r = Add(p, p) y = Conv(r, v, c)", "float[1,5,4,4] y", "Add"),
            (
                "p = Conv(x, w, b) q = Conv(p, v, c) r = Conv(p, v) y = Add(q, r)",
                "float[1,5,4,4] y",
                "cannot be changed",
            ),
        ],
        ids=["output", "infinite at zero", "two operands", "shared weights"],
    )
    def test_stays(self, text: str, outputs: str, reason: str) -> None:
        context = check_rounding(PadChannels(), model(text, TWO, outputs, **CONVS), fires=False)
        assert reason in reasons(context)

    def test_large_images_stay(self) -> None:
        text = "p = Conv(x, w, b) y = Conv(p, v, c)"
        module = model(text, TWO.replace("8,8] x", "99,99] x"), "float[1,5,95,95] y", **CONVS)
        assert "would cost" in reasons(check_rounding(PadChannels(), module, fires=False))


class TestOwnBiases:
    def test_shared_bias(self) -> None:
        text = "p = Conv(x, w, b) q = Conv(z, w, b) y = Add(p, q)"
        module = model(text, f"{TWO}, float[1,3,8,8] z", "float[1,8,6,6] y", **CONVS)
        check(OwnBiases(), module)
        first, second = [node for node in module.graph if node.op_type == "Conv"]
        assert first.inputs[1] is second.inputs[1]
        assert first.inputs[2] is not second.inputs[2]

    def test_a_bias_of_ones_own_stays(self) -> None:
        module = model("p = Conv(x, w, b) y = Conv(p, v, c)", TWO, "float[1,5,4,4] y", **CONVS)
        check(OwnBiases(), module, fires=False)


TOWER = "{o} = Conv({i}, w, b) r{o} = Relu({o}) m{o} = ReduceMean<keepdims = 0>(r{o}, k) {o}z = Gemm(m{o}, u)"
TOWERS = "float[2,3,8,8] a, float[2,3,8,8] b2, float[8,3,3,3] w, float[8] b, float[8,4] u"
AXES = "int64[2] k = {2, 3}"
SHARED = {"w": (8, 3, 3, 3), "b": (8,), "u": (8, 4)}


class TestBatchBranches:
    def test_two_towers(self) -> None:
        text = f"{TOWER.format(i='a', o='p')} {TOWER.format(i='b2', o='q')} y = Sub(pz, qz)"
        module = model(text, TOWERS, "float[2,4] y", AXES, **SHARED)
        check_rounding(BatchBranches(), module)
        assert live(module) == ["Concat", "Conv", "Relu", "ReduceMean", "Gemm", "Split", "Sub"]

    def test_three_towers_with_results_on_the_way(self) -> None:
        towers = " ".join(TOWER.format(i=i, o=o) for i, o in (("a", "p"), ("b2", "q"), ("c", "s")))
        module = model(
            f"{towers} y = Max(pz, qz, sz)",
            f"{TOWERS}, float[2,3,8,8] c",
            "float[2,4] y, float[2,8] mq",
            AXES,
            **SHARED,
        )
        check_rounding(BatchBranches(), module)
        assert live(module).count("Conv") == 1
        assert live(module).count("Split") == 2

    def test_named_batch(self) -> None:
        text = f"{TOWER.format(i='a', o='p')} {TOWER.format(i='b2', o='q')} y = Sub(pz, qz)"
        module = model(text, TOWERS.replace("2,3,8,8", "n,3,8,8"), "float[n,4] y", AXES, **SHARED)
        check_rounding(BatchBranches(), module)
        assert live(module).count("Conv") == 1

    def test_reshape_keeps_samples(self) -> None:
        tower = "{o} = Conv({i}, w, b) f{o} = Reshape({o}, t) {o}z = Gemm(f{o}, u)"
        text = f"{tower.format(i='a', o='p')} {tower.format(i='b2', o='q')} y = Sub(pz, qz)"
        shapes = {**SHARED, "u": (288, 4)}
        module = model(text, TOWERS.replace("8,4] u", "288,4] u"), "float[2,4] y", "int64[2] t = {2, 288}", **shapes)
        check_rounding(BatchBranches(), module)
        assert live(module).count("Reshape") == 1

    @pytest.mark.parametrize(
        "text",
        [
            # one branch reads the other
            "p = Gemm(a, w) q = Relu(p) r = Gemm(q, w) s = Relu(r) y = Add(s, q)",
            # other weights
            "p = Gemm(a, w) q = Relu(p) r = Gemm(b, v) s = Relu(r) y = Add(q, s)",
            # the same input
            "p = Gemm(a, w) q = Relu(p) r = Gemm(a, w) s = Relu(r) y = Add(q, s)",
            # too short to pay
            "p = Gemm(a, w) r = Gemm(b, w) y = Add(p, r)",
            # samples are mixed
            "p = Gemm<transA = 1>(a, w) q = Relu(p) r = Gemm<transA = 1>(b, w) s = Relu(r) y = Add(q, s)",
        ],
    )
    def test_stays(self, text: str) -> None:
        inputs = "float[4,4] a, float[4,4] b, float[4,4] w, float[4,4] v"
        module = model(text, inputs, "float[4,4] y", w=(4, 4), v=(4, 4))
        check_rounding(BatchBranches(), module, fires=False)

    def test_what_mixes_samples_is_outside(self) -> None:
        tower = "{o} = Gemm({i}, w) r{o} = Relu({o}) g{o} = Gelu(r{o}) s{o} = Softmax<axis = 0>(g{o})"
        text = f"{tower.format(i='a', o='p')} {tower.format(i='b', o='q')} y = Add(sp, sq)"
        module = model(text, "float[4,4] a, float[4,4] b, float[4,4] w", "float[4,4] y", w=(4, 4))
        check_rounding(BatchBranches(), module)
        assert live(module).count("Softmax") == 2
        assert live(module).count("Gemm") == 1


class TestReassociateConstants:
    @pytest.mark.parametrize("op", ["Add", "Mul"])
    def test_two_constants(self, op: str) -> None:
        module = model(f"p = {op}(x, b) y = {op}(c, p)", "float[2,5,8] x, float[8] b, float[5,8] c", "float[2,5,8] y")
        check_rounding(ReassociateConstants(), weights(module, b=(8,), c=(5, 8)))
        assert live(module) == [op]

    @pytest.mark.parametrize(
        ("text", "outputs"),
        [
            ("p = Add(x, b) y = Mul(p, c)", "float[5,8] y"),
            ("p = Add(x, b) y = Add(p, c)", "float[5,8] y, float[5,8] p"),
            ("p = Add(x, b) y = Add(p, d)", "float[5,8] y"),
        ],
        ids=["two operators", "needed elsewhere", "column and row"],
    )
    def test_stays(self, text: str, outputs: str) -> None:
        module = model(text, "float[5,8] x, float[8] b, float[8] c, float[5,1] d", outputs, b=(8,), c=(8,), d=(5, 1))
        check_rounding(ReassociateConstants(), module, fires=False)

    def test_numbers_too_small_for_the_format_stay(self) -> None:
        constants = "float b = {1e-30}, float c = {1e-30}"
        module = model("p = Mul(x, b) y = Mul(p, c)", "float[5,8] x", "float[5,8] y", constants)
        assert "leaves the range" in reasons(check_rounding(ReassociateConstants(), module, fires=False))


def test_emitted_onnx_is_spelled_for_other_runtimes(tmp_path: pathlib.Path) -> None:
    two_layers(tmp_path / "m.onnx")
    out = tmp_path / "out.onnx"
    assert run(["optimize", str(tmp_path / "m.onnx"), "--emit", "onnx", "-o", str(out), "-q"]) == 0
    found = onnx.load(out)
    assert not found.functions
    assert {node.domain for node in found.graph.node} == {""}
    assert [node.op_type for node in found.graph.node].count("Gemm") == 1


def test_the_recipe_ends_with_what_runtimes_like() -> None:
    recipe = load_recipe("portable", extra=["compose-transposes", "merge-projections"])
    assert [phase.name for phase in recipe.phases][-2:] == ["command line", "portable"]
    module = model("m = MatMul(x, w) y = Add(m, b)", "float[2,8] x, float[8,4] w, float[4] b", "float[2,4] y")
    weights(module, w=(8, 4), b=(4,))
    for pass_ in recipe.phases[-1].passes:
        pass_.run(module, PassContext())
    assert live(module) == ["Gemm"]
    assert EliminateDeadCode().run(module, PassContext()) is False
