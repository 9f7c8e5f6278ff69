from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from mmopt.errors import PassError
from mmopt.pipeline.base import Fidelity, FxPass, Pass, PassContext
from mmopt.pipeline.decorators import fx_pass, graphsurgeon_pass, module_pass
from mmopt.pipeline.manager import PassManager
from mmopt.pipeline.registry import resolve
from mmopt.testing import check_pass
from tests.pass_models import serialized, text_image_model
from tests.wrong_passes import find

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from mmopt.ir.module import Module


@module_pass
def rename_nodes(module: Module, context: PassContext, *, prefix: str = "n", limit: int | None = None) -> bool:
    """Gives nodes a prefix.

    More is said below.
    """
    changed = False
    for node in list(module.graph)[:limit]:
        if not node.name.startswith(prefix):
            node.name = f"{prefix}{node.name}"
            changed = True
    return changed


@graphsurgeon_pass(name="gs-drop", fidelity=Fidelity.LOSSY)
def drop_ops(graph: gs.Graph, *, op: str) -> bool:
    """Drops one-input nodes."""
    hits = [node for node in graph.nodes if node.op == op]
    for node in hits:
        source, target = node.inputs[0], node.outputs[0]
        for user in list(target.outputs):
            user.inputs = [source if tensor is target else tensor for tensor in user.inputs]
    graph.cleanup().toposort()
    return bool(hits)


@fx_pass
def no_result(graph_module: object, *, times: int = 1) -> object:
    return None if times == 1 else graph_module


def test_function_becomes_a_pass_class_with_options():
    assert issubclass(rename_nodes, Pass)
    assert dataclasses.is_dataclass(rename_nodes)
    assert (rename_nodes.name, rename_nodes.fidelity) == ("rename-nodes", Fidelity.EXACT)
    assert rename_nodes.__doc__.startswith("Gives nodes a prefix.")
    assert rename_nodes(prefix="q").spec() == "rename-nodes{prefix=q}"
    with pytest.raises(dataclasses.FrozenInstanceError):
        rename_nodes().prefix = "z"


def test_module_form_runs_and_resolves_from_its_file():
    checked = check_pass(resolve(f"{__file__}:rename_nodes{{prefix=q_,limit=2}}"), text_image_model())
    assert sum(node.name.startswith("q_") for node in checked.module.graph) == 2


def test_graphsurgeon_form_runs_and_keeps_what_it_did_not_touch():
    module = text_image_model()
    report = PassManager([drop_ops(op="Relu")], threads=1).run(module)

    assert (drop_ops.name, drop_ops.fidelity) == ("gs-drop", Fidelity.LOSSY)
    assert report.ok, report.failed
    assert "Relu" not in [node.op_type for node in module.graph]
    assert str(find(module, "convolved").outputs[0].shape) == str(
        find(text_image_model(), "convolved").outputs[0].shape
    )


def test_graphsurgeon_form_that_finds_nothing_leaves_the_module_as_it_is():
    module = text_image_model()
    before = serialized(module)
    report = PassManager([drop_ops(op="Tan")], threads=1).run(module)

    assert [record.status for record in report.passes] == ["unchanged"]
    assert serialized(module) == before


def test_graphsurgeon_pass_that_claims_to_be_exact_and_is_not():
    wrong = graphsurgeon_pass(lambda graph, *, op="Relu": drop_function(graph, op), name="drop-relu")
    assert not PassManager([wrong()], threads=1).run(text_image_model()).ok


def drop_function(graph, op):
    for node in [node for node in graph.nodes if node.op == op]:
        for user in list(node.outputs[0].outputs):
            user.inputs = [node.inputs[0] if tensor is node.outputs[0] else tensor for tensor in user.inputs]
    graph.cleanup().toposort()
    return True


def test_fx_form_returns_a_graph_module_or_says_what_is_missing():
    assert issubclass(no_result, FxPass)
    marker = object()
    assert no_result(times=2).run_fx(marker) is marker
    with pytest.raises(PassError, match="end the function with `return graph_module`"):
        no_result().run_fx(marker)
