"""Loops: what is the same on every trip leaves them, and short ones are written out."""

from __future__ import annotations

import numpy as np
import pytest

from mmopt.ir.module import Module
from mmopt.ir.verify import verify
from mmopt.pipeline.base import PassContext
from mmopt.transforms.rewrite import HoistInvariants, StackSequences, UnrollLoops
from tests.canonical import check, count_ops, evaluate, module_from

CONSTANTS = "int64 three = {3}, int64 zero = {0}, int64 many = {9}, bool yes = {1}, float two = {2.0}, int64[1] o = {0}"


def loop(body: str, *, trips: str = "three", condition: str = "", after: str = "go", scan: str = "") -> Module:
    """A loop that carries ``x`` to ``z`` and stacks ``scan``."""
    stacked, results = (f", float[2, 3] {scan}", ", s") if scan else ("", "")
    outputs = "float[2, 3] y" + (", float[n, 2, 3] s" if scan else "")
    return module_from(
        f"""g (float[2, 3] x, float[2, 3] v, int64 i) => ({outputs}) <{CONSTANTS}> {{
            y{results} = Loop ({trips}, {condition}, x) <body = b (int64 t, bool go, float[2, 3] h)
                => (bool {"done" if after == "go" else after}, float[2, 3] z{stacked}) {{
                {"done = Identity(go)" if after == "go" else ""}
                {body}
            }}>
        }}""",
        opset=23,
    )


def in_bodies(module: Module) -> list[str]:
    return [n.op_type for node in module.graph if node.op_type == "Loop" for n in node.attributes["body"].as_graph()]


class TestHoist:
    def test_chains_leave(self) -> None:
        module = loop("e = Exp(v) w = Mul(e, two) z = Mul(h, w)")
        check(HoistInvariants(), module)
        assert [node.op_type for node in module.graph] == ["Exp", "Mul", "Loop"]
        assert in_bodies(module) == ["Identity", "Mul"]

    def test_constants_of_the_body_leave_with_what_reads_them(self) -> None:
        module = loop("e = Add(v, inner) z = Mul(h, e)")
        body = next(iter(module.graph)).attributes["body"].as_graph()
        extra = module_from(
            "g (float[1] x) => (float[1] y) <float[3] inner = {1, 2, 3}> { y = Add(x, inner) }", opset=23
        )
        value = extra.graph.initializers.pop("inner")
        adder = next(node for node in body if node.op_type == "Add")
        adder.replace_input_with(1, value)
        body.register_initializer(value)
        module.graph.initializers.pop("inner", None)
        check(HoistInvariants(), module)
        assert "inner" in module.graph.initializers
        assert not body.initializers

    @pytest.mark.parametrize("body", ["e = Exp(h) z = Mul(h, e)", "c = Cast<to=1>(t) z = Mul(h, c)"])
    def test_what_changes_stays(self, body: str) -> None:
        check(HoistInvariants(), loop(body), fires=False)

    def test_results_stay(self) -> None:
        check(HoistInvariants(), loop("z = Exp(v)"), fires=False)

    def test_random_numbers_stay(self) -> None:
        module = loop("r = RandomNormalLike(v) z = Add(h, r)")
        check(HoistInvariants(), module, fires=False, run=False)

    def test_what_may_fail_stays_where_no_trip_is_certain(self) -> None:
        check(HoistInvariants(), loop("e = Gather<axis=0>(v, i) z = Mul(h, e)", trips="i"), fires=False)
        module = loop("e = Gather<axis=0>(v, zero) z = Mul(h, e)")
        check(HoistInvariants(), module)

    def test_scan(self) -> None:
        module = module_from(
            f"""g (float[2, 3] x, float[3] v) => (float[3] y, float[2, 3] s) <{CONSTANTS}> {{
                first = Gather<axis=0>(x, zero)
                y, s = Scan<num_scan_inputs=1, body = b (float[3] h, float[3] r) => (float[3] z, float[3] q) {{
                    e = Exp(v) p = Mul(r, e) z = Add(h, p) q = Identity(z)
                }}>(first, x)
            }}""",
            opset=23,
        )
        check(HoistInvariants(), module)
        assert "Exp" in [node.op_type for node in module.graph]


class TestUnroll:
    def test_trips_are_written_out(self) -> None:
        module = loop("c = Cast<to=1>(t) a = Mul(h, two) z = Add(a, c)")
        context = check(UnrollLoops(), module)
        assert count_ops(module) == {"Identity": 3, "Cast": 3, "Mul": 3, "Add": 3}
        assert "3 trips" in context.remarks[0].message

    @pytest.mark.parametrize("scan", ["z", "h", "q"])
    def test_stacked_results(self, scan: str) -> None:
        extra = "q = Exp(v)" if scan == "q" else ""
        if scan != "q":
            extra, scan = f"copy = Identity({scan})" if scan == "z" else "copy = Neg(h)", "copy"
        body = f"z = Mul(h, two) {extra}"
        module = loop(body, scan=scan)
        check(UnrollLoops(), module)
        assert count_ops(module)["Concat"] == 1

    def test_condition_that_is_always_true(self) -> None:
        module = loop("z = Mul(h, two)", condition="yes")
        check(UnrollLoops(), module)

    def test_loops_inside_loops(self) -> None:
        module = module_from(
            f"""g (float[2] x) => (float[2] y) <{CONSTANTS}> {{
                y = Loop (three, , x) <body = b (int64 t, bool go, float[2] h) => (bool done, float[2] z) {{
                    done = Identity(go)
                    z = Loop (three, , h) <body = c (int64 u, bool gone, float[2] k) => (bool over, float[2] q) {{
                        over = Identity(gone) f = Cast<to=1>(t) q = Add(k, f)
                    }}>
                }}>
            }}""",
            opset=23,
        )
        check(UnrollLoops(), module)
        assert count_ops(module)["Add"] == 9

    @pytest.mark.parametrize(
        "module",
        [
            loop("z = Mul(h, two)", trips="many"),
            loop("z = Mul(h, two)", trips="i"),
            loop("z = Mul(h, two) f = Cast<to=9>(t) stop = Not(f)", after="stop"),
        ],
        ids=["many trips", "unknown trips", "may stop"],
    )
    def test_other_loops_stay(self, module: Module) -> None:
        check(UnrollLoops(), module, fires=False)

    def test_limits(self) -> None:
        assert not UnrollLoops(max_nodes=5).run(loop("z = Mul(h, two)"), PassContext())
        assert UnrollLoops(max_trips=9).run(loop("z = Mul(h, two)", trips="many"), PassContext())


def collected(
    body: str = "z = Mul(h, two) out = SequenceInsert(q, z)", *, join: str = "axis=0, new_axis=1", start: str = ""
) -> Module:
    """A loop that appends to a sequence on every trip."""
    return module_from(
        f"""g (float[2, 3] x, int64 i) => (float[a, b, c] y, float[2, 3] last) <{CONSTANTS}> {{
            {start or "s = SequenceEmpty<dtype=1>()"}
            last, l = Loop (i, , x, s) <body = body (int64 t, bool go, float[2, 3] h, seq(float[2, 3]) q)
                => (bool done, float[2, 3] z, seq(float[2, 3]) out) {{ done = Identity(go) {body} }}>
            y = ConcatFromSequence<{join}>(l)
        }}""",
        opset=23,
    )


class TestStackSequences:
    @pytest.mark.parametrize("axis", [0, 1, 2, -1])
    def test_sequence_becomes_a_stacked_result(self, axis: int) -> None:
        module = collected(join=f"axis={axis}, new_axis=1")
        feeds = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "i": np.array(3)}
        want = evaluate(module, feeds)
        assert StackSequences().run(module, PassContext())
        assert [problem for problem in verify(module) if problem.severity == "error"] == []
        assert not {"ConcatFromSequence", "SequenceInsert"} & set(count_ops(module))
        assert count_ops(module).get("Transpose", 0) == int(axis != 0)
        for name, value in evaluate(module, feeds).items():
            np.testing.assert_array_equal(value, want[name])
        assert not StackSequences().run(module, PassContext())

    @pytest.mark.parametrize(
        ("module", "reason"),
        [
            (collected(join="axis=0, new_axis=0"), "have already"),
            (collected("z = Mul(h, two) out = SequenceInsert(q, z, zero)"), "something else"),
            (collected(start="s = SequenceConstruct(x)"), "does not start empty"),
            (
                collected("z = Mul(h, two) e = Unsqueeze(t, o) k = Slice(h, o, e) out = SequenceInsert(q, k)"),
                "may differ",
            ),
        ],
        ids=["joined", "inserted", "begun", "sizes"],
    )
    def test_other_sequences_stay(self, module: Module, reason: str) -> None:
        context = PassContext()
        assert not StackSequences().run(module, context)
        assert any(reason in remark.message for remark in context.remarks)
