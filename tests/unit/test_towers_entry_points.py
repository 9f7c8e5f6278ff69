"""Models cut at their towers compute what the whole model computes, on the same weight tensors."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mmopt.analysis.towers import analyze_towers, extract_entry_points
from mmopt.errors import UnsupportedError, UserError
from mmopt.ir.module import Module
from tests.unit import test_towers as models
from tests.unit.tower_models import FLOAT, INT64, WIDTH, Net, run, sample


def check_cut(module: Module, **sizes: int) -> dict[str, Module]:
    """Cut, run the parts and the whole, compare bit by bit; returns the entry points."""
    entries = extract_entry_points(module, analyze_towers(module))
    feeds = sample(module, **sizes)
    between = dict(feeds)
    for name, entry in entries.items():
        onnx.checker.check_model(ir.to_proto(entry.model))
        if name != "fuse":
            between.update(run(entry, feeds))
    whole, parts = run(module, feeds), run(entries["fuse"], between)
    assert list(parts) == list(whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[name], array, err_msg=name)
    return entries


def names(values: object) -> list[str]:
    return [v.name for v in values]  # type: ignore[attr-defined]


def test_dual_encoder() -> None:
    module = models.clip(bias=True)
    entries = check_cut(module, captions=4, seq=5, images=2)
    assert {k: (names(e.graph.inputs), names(e.graph.outputs)) for k, e in entries.items()} == {
        "encode_text": (["ids", "mask"], ["encoded_text"]),
        "encode_image": (["pixels"], ["encoded_image"]),
        "fuse": (["encoded_text", "encoded_image"], ["logits", "text_embeds", "image_embeds"]),
    }
    assert not any(n.op_type == "Conv" for k in ("encode_text", "fuse") for n in entries[k].graph)


@pytest.mark.parametrize(
    ("join", "tokens"),
    [
        (models.concat, False),
        (models.gate_over_stack, False),
        (models.gate_over_concat, False),
        (models.weighted, False),
        (models.cosine, False),
        (models.modulation, False),
        (models.initial_state, True),
        (models.two_layers_of_cross_attention, True),
        (models.in_sequence, True),
    ],
)
def test_every_kind_of_fusion(join: models.Build, tokens: bool) -> None:
    entries = check_cut(models.two_streams(join, tokens=tokens), batch=1 if join is models.cosine else 2, seq=6)
    if join is models.two_layers_of_cross_attention:
        # Keys and values of both layers are projections of one value, so that value is where the image ends.
        assert names(entries["encode_image"].graph.outputs) == ["encoded_image"]


@pytest.mark.parametrize("op", ["Where", "ScatterND"])
def test_ids_that_also_choose_places(op: str) -> None:
    entries = check_cut(models.scattered(op))
    assert names(entries["fuse"].graph.inputs) == ["encoded_text", "encoded_image", "ids"]


@pytest.mark.parametrize("kind", ["probabilities", "logits"])
def test_votes(kind: str) -> None:
    assert set(check_cut(models.voted(kind), b=2, s=5, t=6)) == {"encode_text", "encode_image", "encode_audio", "fuse"}


def test_twins_share_their_weights_with_the_model() -> None:
    module = models.siamese(False)
    entries = check_cut(module, b=2)
    assert list(entries) == ["encode_image", "encode_image_2", "fuse"]
    mine = {id(v.const_value) for v in module.graph.initializers.values()}
    for entry in entries.values():
        assert {id(v.const_value) for v in entry.graph.initializers.values()} <= mine
    assert entries["encode_image"].graph[0] is not module.graph[0]


def borrowed_batch(known: bool) -> Module:
    """The text's initial state is sized by the batch of the image, as exporters write it."""
    net = Net()
    ids = net.input("ids", INT64, "batch" if known else "other", "seq")
    pixels = net.input("pixels", FLOAT, "batch", 3, 16, 16)
    batch = net.op("Gather", net.op("Shape", pixels), net.ints(0), axis=0)
    zeros = net.op("Expand", net.constant(np.float32(0)), net.op("Concat", net.ints(1), batch, net.ints(WIDTH), axis=0))
    text = net.last_state(net.embed(ids), WIDTH, initial=zeros)
    scaled = net.op("Div", text, net.op("Cast", net.op("Gather", net.op("Shape", pixels), net.ints(1)), to=1))
    net.output(models.concat(net, scaled, net.pooled_image(pixels)), "joined")
    return net.module()


def test_a_batch_size_borrowed_from_another_stream() -> None:
    entries = check_cut(borrowed_batch(known=True), batch=3, seq=4)
    assert names(entries["encode_text"].graph.inputs) == ["ids"]


def test_a_size_that_only_the_other_stream_has() -> None:
    module = borrowed_batch(known=False)
    report = analyze_towers(module)
    assert "the shape of 'pixels'" in report.uncut
    with pytest.raises(UnsupportedError, match="pixels"):
        extract_entry_points(module, report)


def test_local_functions_are_kept_where_they_are_used() -> None:
    module = models.two_streams(lambda net, a, b: net.op("Joined", a, b, domain="own"))
    module.model.opset_imports["own"] = 1
    module.graph.outputs[0].shape = ir.Shape(["batch", 4])
    a, b = ir.Value(name="a"), ir.Value(name="b")
    add = ir.Node("", "Add", [a, b])
    add.outputs[0].name = "sum"
    body = ir.Graph([a, b], add.outputs, nodes=[add], opset_imports={"": 18})
    function = ir.Function("own", "Joined", graph=body, attributes=[])
    module.model.functions[function.identifier()] = function
    entries = check_cut(module)
    assert {name: len(e.model.functions) for name, e in entries.items()} == {
        "encode_text": 0, "encode_image": 0, "fuse": 1,
    }  # fmt: skip


def test_a_body_of_control_flow_that_captures_what_a_tower_made() -> None:
    net = Net()
    ids, pixels = net.input("ids", INT64, "b", "s"), net.input("pixels", FLOAT, "b", 3, 16, 16)
    text = net.op("ReduceMean", net.text(ids), net.ints(1), keepdims=0)
    image = net.pooled_image(pixels)
    then, other = Net(seed=1), Net(seed=2)
    then.output(then.op("Add", text, image), "sum")
    other.output(other.op("Mul", text, image), "product")
    net.output(net.op("If", net.input("flag", ir.DataType.BOOL), then_branch=then.graph, else_branch=other.graph))
    entries = check_cut(net.module(), b=2)
    assert names(entries["fuse"].graph.inputs) == ["encoded_text", "encoded_image", "flag"]


def test_names_that_are_taken() -> None:
    def join(net: Net, a: ir.Value, b: ir.Value) -> ir.Value:
        joined = models.concat(net, a, b)
        joined.name = "encoded_text"
        return joined

    entries = check_cut(models.two_streams(join))
    assert names(entries["encode_text"].graph.outputs) == ["encoded_text_"]


def test_one_tower_has_no_entry_points() -> None:
    net = Net()
    net.output(net.pooled_image(net.input("x", FLOAT, "b", 3, 16, 16)))
    module = net.module()
    with pytest.raises(UnsupportedError, match="fewer than two"):
        extract_entry_points(module, analyze_towers(module))


def test_report_of_another_module() -> None:
    report = analyze_towers(models.clip())
    tower = dataclasses.replace(report.towers[0], cut=((10_000, 0),))
    with pytest.raises(UserError, match="does not fit"):
        extract_entry_points(models.clip(), dataclasses.replace(report, towers=(tower, *report.towers[1:])))


def test_the_module_is_not_changed() -> None:
    module = models.clip()
    before = ir.to_proto(module.model).SerializeToString(deterministic=True)
    check_cut(module)
    assert ir.to_proto(module.model).SerializeToString(deterministic=True) == before
