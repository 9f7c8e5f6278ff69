from __future__ import annotations

import time

import numpy as np
import onnx_ir as ir
import pytest

from mmopt.ir.fingerprint import fingerprint, structure_hash, tensor_digest
from tests.pass_models import audio_model, fused_model, text_image_model
from tests.wrong_passes import WRONG, find


@pytest.mark.parametrize("build", [text_image_model, audio_model, fused_model])
def test_equal_models_have_equal_hashes(build):
    one, other = build(), build()
    assert fingerprint(one.model) == fingerprint(other.model) == fingerprint(one.clone().model)
    assert structure_hash(one.model) == structure_hash(other.model)


def rename(module):
    for node in module.graph.all_nodes():
        node.name = f"renamed_{node.name}"
        for value in node.outputs:
            if not value.is_graph_output():
                value.name = f"renamed_{value.name}"


def annotate(module):
    find(module, "convolved").outputs[0].shape = None


def reorder(module):
    node = find(module, "convolved")
    first = next(iter(module.graph))
    module.graph.remove(node)
    module.graph.insert_before(first, node)


def add_dead_node(module):
    node = ir.node("Relu", [module.graph.inputs[2]], name="dead")
    node.outputs[0].name = "dead_out"
    module.graph.append(node)


def equal_weight_in_another_tensor(module):
    value = module.graph.initializers["head_bias"]
    value.const_value = ir.tensor(value.const_value.numpy().copy(), name="head_bias")


@pytest.mark.parametrize("edit", [rename, annotate, reorder, add_dead_node])
def test_edits_that_compute_the_same(edit):
    module, original = text_image_model(), text_image_model()
    edit(module)

    assert fingerprint(module.model) != fingerprint(original.model)
    assert structure_hash(module.model) == structure_hash(original.model)


def test_weights_count_by_content_not_by_object():
    module, original = text_image_model(), text_image_model()
    equal_weight_in_another_tensor(module)

    assert fingerprint(module.model) == fingerprint(original.model)


@pytest.mark.parametrize(
    "wrong", [wrong for wrong in WRONG if wrong.reason.startswith("output")], ids=lambda wrong: wrong.name
)
def test_edits_that_compute_something_else_change_both_hashes(wrong):
    module, original = wrong.model(), wrong.model()
    wrong.break_(module)

    assert fingerprint(module.model) != fingerprint(original.model)
    assert structure_hash(module.model) != structure_hash(original.model)


def test_inputs_of_nested_bodies_are_kept_apart():
    """An inner body that reads the outer body's input instead of its own is another computation."""

    def build(swap):
        outer, inner = (ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in ("outer", "inner"))
        leaf = ir.node("Relu", [outer if swap else inner])
        body = ir.Graph([inner], leaf.outputs, nodes=[leaf], name="inner")
        scan = ir.node("Scan", [outer], {"body": body, "num_scan_inputs": 1})
        middle = ir.Graph([outer], scan.outputs, nodes=[scan], name="outer")
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
        top = ir.node("Scan", [x], {"body": middle, "num_scan_inputs": 1})
        return ir.Model(ir.Graph([x], top.outputs, nodes=[top], opset_imports={"": 20}, name="g"), ir_version=10)

    assert structure_hash(build(False)) == structure_hash(build(False))
    assert structure_hash(build(False)) != structure_hash(build(True))


def test_tensor_digest_is_remembered_while_the_tensor_lives():
    class Counting(ir.Tensor):
        reads = 0

        def numpy(self):
            Counting.reads += 1
            return super().numpy()

    tensor = Counting(np.arange(5))
    assert tensor_digest(tensor) == tensor_digest(tensor) == tensor_digest(ir.Tensor(np.arange(5)))
    assert Counting.reads == 1
    assert tensor_digest(tensor) != tensor_digest(ir.Tensor(np.arange(5).astype(np.int32)))
    assert tensor_digest(tensor) != tensor_digest(ir.Tensor(np.arange(5).reshape(5, 1)))


def test_hashing_20000_nodes_is_quick():
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n"]))
    nodes, value = [], x
    for number in range(20_000):
        node = ir.node("Relu", [value], name=f"n{number}")
        node.outputs[0].name = f"v{number}"
        nodes.append(node)
        value = node.outputs[0]
    model = ir.Model(ir.Graph([x], [value], nodes=nodes, opset_imports={"": 20}, name="g"), ir_version=10)

    started = time.process_time()
    fingerprint(model)
    structure_hash(model)

    assert time.process_time() - started < 3
