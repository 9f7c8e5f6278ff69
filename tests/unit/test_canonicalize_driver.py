"""The rule driver and the fixpoint driver: they settle, stop what does not, and stay near-linear."""

from __future__ import annotations

import dataclasses
import pathlib
import tracemalloc

import onnx_ir as ir
import pytest

from mmopt.errors import PassError
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.transforms.canonicalize import Canonicalize, MergeReshapes
from mmopt.transforms.canonicalize.rewriting import Rewriter, Rule, RulePass
from tests.canonical import assert_same, check, evaluate, inputs_for, module_from, ops
from tests.scale import GraphBuilder, scale_model


def _swap(to: str) -> Rule:
    def apply(node: ir.Node, rewriter: Rewriter) -> bool:
        return rewriter.replace(node, rewriter.emit(to, node.inputs, node, like=node.outputs[0]).outputs[0])

    return Rule(f"make-{to.lower()}", ("Neg" if to == "Abs" else "Abs",), apply)


@dataclasses.dataclass(frozen=True)
class _GoesInCircles(RulePass):
    def rules(self) -> tuple[Rule, ...]:
        return (_swap("Abs"), _swap("Neg"))


def test_rules_that_undo_each_other_are_stopped_by_name() -> None:
    module = module_from("g (float[2] x) => (float[2] y) { a = Neg(x) y = Relu(a) }")
    with pytest.raises(PassError, match=r"does not settle: rule 'make-(abs|neg)' fired"):
        _GoesInCircles().run(module, PassContext())


def test_rounds_are_bounded_and_name_what_still_fires() -> None:
    module = module_from("g (float[2] x) => (float[2] y) { a = Exp(x) b = Identity(a) y = Relu(b) }")
    with pytest.raises(PassError, match="not reached in 1 rounds: identity still fires"):
        Canonicalize(max_rounds=1).run(module, PassContext())


def test_one_finding_leads_to_the_next() -> None:
    """A known size decides a branch, the branch holds a no-op, without it two nodes are equal, and one is dead."""
    module = module_from(
        "g (float[batch,4] x) => (float[batch,4] y) <int64 o = {1}, int64 f = {4}> {"
        " s = Shape(x) n = Gather(s, o) c = Equal(n, f) b = If (c) <"
        "  then_branch = t () => (float[u,v] p) { r = Transpose<perm = [0, 1]>(x) p = Exp(r) },"
        "  else_branch = e () => (float[k,l] q) { q = Abs(x) }>"
        " d = Exp(x) y = Add(b, d) }"
    )
    context = check(Canonicalize(), module)
    assert ops(module) == ["Exp", "Add"]
    assert {"simplify-control-flow", "eliminate-common-subexpressions"} <= {remark.source for remark in context.remarks}


def test_the_only_user_left_is_looked_at_again() -> None:
    """Of two that read r, the second goes; the first, which was seen before that, can then join r."""
    module = module_from(
        "g (float[2,3] x) => (float[1,6] y, float[2,3] z)"
        " <int64[1] flat = {6}, int64[2] back = {2, 3}, int64[1] zero = {0}> {"
        " r = Reshape(x, flat) u = Unsqueeze(r, zero) y = Relu(u) c = Reshape(r, back) z = Exp(c) }"
    )
    check(MergeReshapes(), module)
    assert "Unsqueeze" not in ops(module)


def test_generated_model_loses_what_an_exporter_left_and_no_bit() -> None:
    module = module_from("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    module.model = scale_model(130, seed=3)
    before = ops(module)
    check(Canonicalize(), module)
    after = set(ops(module))
    assert {"Shape", "Gather", "Unsqueeze", "Concat", "Cast", "Identity", "Dropout", "Constant"} <= set(before)
    assert not {"Shape", "Gather", "Unsqueeze", "Concat", "Cast", "Identity", "Dropout", "Constant"} & after


def test_canonical_form_does_not_depend_on_the_sizes_fed() -> None:
    module = module_from("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    module.model = scale_model(70)
    feeds = [inputs_for(module, sizes={"batch": batch, "seq": seq}) for batch, seq in ((1, 1), (3, 7), (2, 1))]
    want = [evaluate(module, feed) for feed in feeds]
    Canonicalize().run(module, PassContext())
    for feed, expected in zip(feeds, want, strict=True):
        assert_same(expected, evaluate(module, feed))


def test_work_grows_in_proportion_to_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts rule trials instead of seconds: time on a shared machine says little."""
    trials = 0
    visit = Rewriter._visit

    def counted(self: Rewriter, node: ir.Node) -> None:
        nonlocal trials
        trials += 1
        visit(self, node)

    monkeypatch.setattr(Rewriter, "_visit", counted)
    counts = []
    for size in (300, 1200):
        trials = 0
        module = module_from("g (float[2] x) => (float[2] y) { y = Relu(x) }")
        module.model = scale_model(size)
        Canonicalize().run(module, PassContext())
        counts.append(trials)
    assert counts[1] < 4.5 * counts[0]


def test_weights_are_not_brought_into_memory(tmp_path: pathlib.Path) -> None:
    """Sixteen external weights of 4 MB, every second one transposed: an eighth of them in memory is too much."""
    side, count = 1024, 16
    builder = GraphBuilder()
    x = ir.Value(name="x", shape=ir.Shape(["batch", side]), type=ir.TensorType(ir.DataType.FLOAT))
    y = x
    for i in range(count):
        weight = builder.weight(side, side)
        y = builder.op("MatMul", y, builder.op("Transpose", weight, perm=[1, 0]) if i % 2 else weight)
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", side])
    ir.save(builder.model([x], [y]), tmp_path / "model.onnx", external_data="model.data")
    module = Module(ir.load(tmp_path / "model.onnx"))
    tracemalloc.start()
    try:
        assert Canonicalize().run(module, PassContext())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ops(module) == ["MatMul"] * count
    assert peak < count * side * side * 4 // 8
