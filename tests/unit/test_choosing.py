"""How a template's parameters are chosen."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from tvm import tirx

import mmopt
from mmopt.backends.cpu.choosing import TYPICAL, UNKNOWN, Candidate, Chooser, Workload, dim, typical
from mmopt.backends.profile import load_profile
from mmopt.lowering.compiler import CompileOptions, compile_module

WORKLOAD = Workload("matmul", (("m", 3), ("n", UNKNOWN)), ("float32", "int8"), operations=18.0)
SLOW, FAST = Candidate({"rows": 4, "packed": True}, 20.0), Candidate({"rows": 8, "packed": True}, 10.0)


def test_a_workload_is_recognised_by_its_key() -> None:
    same = Workload("matmul", (("m", 3), ("n", UNKNOWN)), ("float32", "int8"), operations=36.0)
    assert WORKLOAD.key() == "matmul(m=3,n=?):float32,int8" == same.key()
    assert hash(WORKLOAD) == hash(same)
    assert same == WORKLOAD


def test_the_least_predicted_cycles_win_and_the_first_among_equals() -> None:
    also_fast = Candidate({"rows": 2, "packed": True}, 10.0)
    assert Chooser().choose(WORKLOAD, [SLOW, FAST, also_fast]) is FAST
    assert Chooser().choose(WORKLOAD, [SLOW, also_fast, FAST]) is also_fast


def test_a_measurement_beats_the_prediction() -> None:
    chooser = Chooser(lambda workload: {"packed": True, "rows": 4} if workload == WORKLOAD else None)
    assert chooser.choose(WORKLOAD, [SLOW, FAST]) is SLOW
    choice = chooser.choice(WORKLOAD)
    assert choice is not None
    assert choice.measured
    assert choice.candidates == (SLOW, FAST)
    assert json.loads(json.dumps(choice.to_json()))["choice"] == {"rows": 4, "packed": True}


def test_parameters_nobody_offers_any_more_are_ignored() -> None:
    chooser = Chooser(lambda workload: {"rows": 5, "packed": True})
    assert chooser.choose(WORKLOAD, [SLOW, FAST]) is FAST
    choice = chooser.choice(WORKLOAD)
    assert choice is not None
    assert not choice.measured


def test_every_choice_is_remembered_once() -> None:
    chooser, other = Chooser(), Workload("conv", (), ())
    for workload in (WORKLOAD, other, WORKLOAD):
        chooser.choose(workload, [FAST])
    assert [choice.workload for choice in chooser.choices()] == [WORKLOAD, other]
    assert chooser.choice(Workload("pool", (), ())) is None


def test_no_candidates_are_a_mistake_of_the_template() -> None:
    with pytest.raises(ValueError, match="matmul"):
        Chooser().choose(WORKLOAD, [])


def test_extents() -> None:
    assert dim(7) == dim(tirx.const(7, "int64")) == 7
    assert dim(tirx.Var("n", "int64")) == UNKNOWN
    assert (typical(7), typical(UNKNOWN), typical(UNKNOWN, 5)) == (7, TYPICAL, 5)


def product(weight: np.ndarray) -> mmopt.Module:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((40, weight.shape[0])))
    w = ir.Value(name="w", const_value=ir.tensor(weight, name="w"))
    node = ir.node("MatMul", [x, w], outputs=[ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT))])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 20}, name="g")
    return mmopt.Module(ir.Model(graph, ir_version=10))


def test_a_measured_choice_reaches_the_kernel_and_its_record() -> None:
    module, profile = product(np.ones((32, 64), np.float32)), load_profile("icelake")
    chooser = Chooser()
    predicted = compile_module(module, profile, options=CompileOptions(chooser=chooser)).kernels[0]
    (choice,) = chooser.choices()
    assert predicted["workload"] == choice.workload.key()
    assert predicted["workload"].startswith("matmul(batch=1,m=40,n=64,k=32")
    assert predicted["operations"] == 2 * 40 * 64 * 32
    assert predicted["choice"] == dict(min(choice.candidates, key=lambda candidate: candidate.cycles).parameters)
    assert predicted["candidates"] == len(choice.candidates)
    assert not predicted["measured"]
    wanted = max(choice.candidates, key=lambda candidate: candidate.cycles).parameters
    options = CompileOptions(chooser=Chooser(lambda workload: dict(wanted)))
    measured = compile_module(module, profile, options=options).kernels[0]
    assert measured["measured"]
    assert measured["choice"] == wanted != predicted["choice"]
    assert measured["parameters"] != predicted["parameters"]
