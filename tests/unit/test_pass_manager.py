from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from mmopt.errors import LoadError, PassError, UserError
from mmopt.ir.module import Module
from mmopt.pipeline.base import Fidelity, Pass, PassContext, Phase
from mmopt.pipeline.manager import PassManager
from tests.pass_models import FLOAT, audio_model, fused_model, make_module, serialized, text_image_model
from tests.wrong_passes import WRONG, find, insert_after, set_weight, skip, weight


def pass_from(function, *, name="my-pass", fidelity=Fidelity.EXACT, **extra) -> Pass:
    def run(self, module, context):
        return function(module, context)

    namespace = {"run": run, "name": name, "fidelity": fidelity, **extra}
    return dataclasses.make_dataclass("Made", [], bases=(Pass,), namespace=namespace, frozen=True)()


def wrong(name: str) -> Pass:
    return next(entry for entry in WRONG if entry.name == name).make()


def rename_first(module, context):
    node = next(iter(module.graph))
    if node.name == "renamed":
        return False
    node.name = "renamed"
    context.remarks.append(Remarked("renamed"))
    return True


def Remarked(text):
    from mmopt.ir.module import Remark

    return Remark("my-pass", "applied", "", text)


def run(passes, module, **options):
    return PassManager(passes, threads=1, **options).run(module)


def test_report_says_what_happened():
    module = text_image_model()
    report = run([pass_from(rename_first), pass_from(rename_first)], module, seed=3, target="cpu")

    assert [record.status for record in report.passes] == ["applied", "unchanged"]
    assert report.ok
    assert report.engine == "onnxruntime"
    assert report.inputs == "probes"
    assert [found.ok for found in report.outputs] == [True, True, True]
    assert module.provenance == ["pass my-pass"]
    assert [remark.message for remark in module.remarks] == ["renamed"]
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["schema_version"] == 1
    assert data["passes"][0]["nodes_before"] == data["nodes_after"] == 36
    assert data["passes"][0]["remarks"][0]["message"] == "renamed"
    assert data["seed"] == 3


def test_remarks_of_a_rejected_pass_are_kept():
    def complain(module, context):
        context.remarks.append(Remarked("in the context"))
        module.remark("my-pass", "note", "", "on the module")
        skip(module, "activated")
        raise RuntimeError("no")

    module = text_image_model()
    module.remark("before", "note", "", "was there")
    run([pass_from(complain)], module)

    messages = [remark.message for remark in module.remarks]
    assert messages == ["was there", "in the context", "on the module", "rolled back: raised RuntimeError: no"]


def test_rounding_passes_may_round_and_exact_ones_may_not():
    def nudge(module, context):
        set_weight(module, "head_weight", weight(module, "head_weight") * np.float32(1 + 2e-5))
        return True

    assert not run([pass_from(nudge)], text_image_model()).ok
    assert run([pass_from(nudge, fidelity=Fidelity.ROUNDING)], text_image_model()).ok


def test_lossy_pass_is_held_to_its_bound():
    def halve(module, context):
        set_weight(module, "norm_scale", weight(module, "norm_scale") * np.float32(0.5))
        return True

    def lossy(bound):
        return pass_from(halve, fidelity=Fidelity.LOSSY, error_bound=lambda self: bound)

    assert run([lossy(None)], text_image_model()).ok
    assert not run([lossy(1e-4)], text_image_model()).ok


def test_tolerance_follows_the_format_that_an_earlier_pass_brought():
    """After a lossy pass to bfloat16, a rounding pass may move outputs by roundings of that format."""

    def to_bfloat(module, context):
        insert_after(module, find(module, "normed").outputs[0], ("Cast", {"to": 16}), ("Cast", {"to": 1}))
        return True

    def nudge(module, context):
        set_weight(module, "norm_scale", weight(module, "norm_scale") * np.float32(1.001))
        return True

    nudging = pass_from(nudge, fidelity=Fidelity.ROUNDING)
    assert not run([nudging], text_image_model()).ok
    assert run([pass_from(to_bfloat, fidelity=Fidelity.LOSSY), nudging], text_image_model()).ok


def test_phases_repeat_until_nothing_changes():
    def count_up(module, context):
        number = int(module.model.doc_string or 0)
        if number == 3:
            return False
        module.model.doc_string = str(number + 1)
        return True

    module = fused_model()
    report = run([Phase("count", (pass_from(count_up),), max_rounds=10)], module)
    assert module.model.doc_string == "3"
    assert [record.round for record in report.passes] == [1, 2, 3, 4]
    assert report.notes == []

    short = run([Phase("count", (pass_from(count_up),), max_rounds=2)], fused_model())
    assert short.notes == ["phase 'count' still changed the module in its last round (2): my-pass"]


def test_given_inputs_replace_probes():
    inputs = {"x": np.zeros((2, 4), np.float32)}
    seen = []

    def look(module, context):
        seen.append(context.inputs["x"].shape)
        # On zeros the weight does not matter: the given inputs cannot tell.
        set_weight(module, "w", weight(module, "w") * 2)
        return True

    report = run([pass_from(look)], fused_model(), inputs=inputs)
    assert report.inputs == "given"
    assert report.ok
    assert seen == [(1, 2, 4)]
    assert not run([pass_from(look)], fused_model(), inputs=[inputs, {"x": np.ones((2, 4), np.float32)}]).ok


def test_given_inputs_that_do_not_run_are_a_users_error():
    with pytest.raises(UserError, match="the given inputs do not run"):
        run([], fused_model(), inputs={"x": np.zeros((2, 5), np.float32)})


def test_module_that_is_invalid_to_begin_with():
    module = text_image_model()
    find(module, "activated").op_type = "Rellu"
    with pytest.raises(LoadError, match="unknown-operator"):
        run([], module)


def test_warnings_that_were_there_before_do_not_count():
    module = text_image_model()
    find(module, "convolved").name = find(module, "embedded").name
    assert run([pass_from(rename_first)], module).ok


def test_validation_off_trusts_but_rolls_back_what_raises():
    module = text_image_model()
    report = run([wrong("remove-relu"), wrong("raise-half-way"), pass_from(rename_first)], module, validate="off")

    assert [record.status for record in report.passes] == ["applied", "failed", "applied"]
    assert report.inputs == "none"
    assert "Relu" not in [node.op_type for node in module.graph]


def test_validation_off_names_who_broke_the_graph():
    passes = [wrong("node-moved-behind-its-user"), pass_from(rename_first)]
    with pytest.raises(PassError, match="a pass before it broke the module"):
        run(passes, text_image_model(), validate="off")


def test_validation_at_the_end_accepts_good_passes_without_running_each():
    report = run([pass_from(rename_first)], text_image_model(), validate="end")
    assert report.ok
    assert report.passes[0].comparisons == []
    assert [found.ok for found in report.outputs] == [True, True, True]


def test_slow_models_are_checked_on_one_set_a_pass_and_on_all_at_the_end(monkeypatch):
    """The first set runs the then branch, the second the else branch: only the end can see the fault there."""
    monkeypatch.setattr("mmopt.pipeline.manager._SLOW", 0.0)

    def fault(module, context):
        node = next(iter(find(module, "chosen").attributes["else_branch"].as_graph()))
        if node.op_type == "Add":
            return False
        node.op_type = "Add"
        return True

    module = audio_model()
    report = run([pass_from(rename_first, name="good"), pass_from(fault, name="bad")], module)

    assert [record.name for record in report.failed] == ["bad"]
    assert next(iter(module.graph)).name == "renamed"


def test_module_that_no_probe_runs_on_is_checked_for_structure(caplog):
    """The sizes of two inputs must be 17 and 19, which nothing in the model says."""
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["a"], name="fold"),
        helper.make_node("Relu", ["a"], ["y"], name="relu"),
    ]
    weights = {"shape": np.array([17, 19], np.int64)}
    module = make_module(nodes, [("x", FLOAT, ["n"])], [("y", FLOAT, [17, 19])], weights)

    report = run([pass_from(rename_first), wrong("dangling-value")], module)

    assert report.inputs == "none"
    assert "give some with --inputs" in report.notes[0]
    assert [record.status for record in report.passes] == ["applied", "failed"]


def test_outputs_that_check_nothing_are_named():
    nodes = [helper.make_node("Log", ["a"], ["y"], name="log"), helper.make_node("Neg", ["b"], ["a"], name="neg")]
    nodes = [helper.make_node("Exp", ["x"], ["b"], name="exp"), *reversed(nodes)]
    module = make_module(nodes, [("x", FLOAT, ["n"])], [("y", FLOAT, ["n"])], {})

    assert run([], module).notes == [
        "output 'y' is NaN or infinite throughout on these inputs, so its values check nothing"
    ]


def test_random_outputs_are_not_compared_but_the_others_are():
    def build():
        nodes = [
            helper.make_node("RandomNormalLike", ["x"], ["noise"], name="draw"),
            helper.make_node("Add", ["x", "noise"], ["noisy"], name="add"),
            helper.make_node("Relu", ["x"], ["clean"], name="relu"),
        ]
        return make_module(
            nodes, [("x", FLOAT, ["n", 3])], [("noisy", FLOAT, ["n", 3]), ("clean", FLOAT, ["n", 3])], {}
        )

    def break_clean(module, context):
        find(module, "clean").op_type = "Neg"
        return True

    assert run([pass_from(rename_first)], build()).ok
    assert not run([pass_from(break_clean)], build()).ok


def test_passes_work_on_read_only_weights_and_users_arrays_stay_writable():
    array = np.ones(3, np.float32)
    module = fused_model()
    module.graph.initializers["b"].const_value = ir.Tensor(array, name="b")

    run([pass_from(rename_first)], module)

    array[0] = 2
    assert array[0] == 2


def test_clones_share_weights():
    module = fused_model()
    set_weight(module, "w", weight(module, "w"))
    tensors = []

    def look(module, context):
        tensors.append(module.graph.initializers["w"].const_value.numpy())
        return False

    run([pass_from(look), pass_from(look)], module)
    assert all(np.shares_memory(array, weight(module, "w")) for array in tensors)


def test_dump_has_the_module_before_and_after_every_change(tmp_path):
    folder = tmp_path / "dump"
    passes = [pass_from(rename_first), pass_from(rename_first), wrong("remove-relu"), wrong("dangling-value")]
    run(passes, text_image_model(), dump_dir=folder)

    names = sorted(path.name for path in folder.iterdir())
    assert names == ["000-input.txt", "001-my-pass.txt", "002-remove-relu.failed.txt", "003-dangling-value.failed.txt"]
    assert "Relu" in (folder / "001-my-pass.txt").read_text()
    assert "Relu" not in (folder / "002-remove-relu.failed.txt").read_text()


def test_progress_tells_every_pass_twice():
    told = []
    run([pass_from(rename_first), wrong("remove-relu")], text_image_model(), progress=told.append)

    assert [(one.index, one.total, one.record is not None) for one in told] == [
        (0, 2, False), (0, 2, True), (1, 2, False), (1, 2, True),
    ]  # fmt: skip
    assert [one.record.status for one in told if one.record] == ["applied", "failed"]


def test_plan_lists_what_would_run():
    @dataclasses.dataclass(frozen=True)
    class WithOption(Pass):
        rate: float = 1.0

        def run(self, module: Module, context: PassContext) -> bool:
            raise AssertionError("a plan runs nothing")

    plan = PassManager([Phase("first", (WithOption(2.0),), 3), WithOption()]).plan()
    assert plan == [
        {"pass": "with-option{rate=2.0}", "phase": "first", "max_rounds": 3, "fidelity": "exact"},
        {"pass": "with-option", "phase": "", "max_rounds": 1, "fidelity": "exact"},
    ]


def test_unknown_mode_is_an_error_with_a_suggestion():
    with pytest.raises(UserError, match="did you mean 'each'"):
        PassManager([], validate="eachh")


def test_strict_run_keeps_what_came_before():
    module = text_image_model()
    with pytest.raises(PassError, match="pass remove-relu: output"):
        run([pass_from(rename_first), wrong("remove-relu")], module, strict=True)
    expected = text_image_model()
    next(iter(expected.graph)).name = "renamed"
    assert serialized(module) == serialized(expected)


def test_interrupt_leaves_the_module_whole():
    def interrupt(module, context):
        skip(module, "activated")
        raise KeyboardInterrupt

    module = text_image_model()
    before = serialized(module)
    with pytest.raises(KeyboardInterrupt):
        run([pass_from(interrupt)], module)
    assert serialized(module) == before


def test_checking_a_large_graph_grows_linearly():
    def chain(count):
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n"]))
        nodes, value = [], x
        for number in range(count):
            node = ir.node("Relu", [value], name=f"n{number}")
            node.outputs[0].name = f"v{number}"
            nodes.append(node)
            value = node.outputs[0]
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n"])
        graph = ir.Graph([x], [value], nodes=nodes, opset_imports={"": 20}, name="g")
        return Module(ir.Model(graph, ir_version=10))

    def seconds(count):
        module = chain(count)
        started = time.process_time()
        report = run([pass_from(rename_first)], module, validate="off")
        assert report.ok
        return time.process_time() - started

    seconds(100)
    # Quadratic growth would be 64 times; processor time on a busy machine varies by a factor of two.
    assert seconds(8000) < 30 * max(seconds(1000), 0.02)
