"""Towers, projectors, fusion points and heads of hand-built models, one of every kind."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mmopt.analysis.towers import TowerReport, analyze_towers
from mmopt.errors import UserError
from mmopt.ir.modality import Modality
from mmopt.ir.module import Module
from tests.unit.tower_models import FLOAT, INT64, WIDTH, Net

Build = Callable[[Net, ir.Value, ir.Value], ir.Value]


def two_streams(join: Build, *, tokens: bool = False, opset: int = 18) -> Module:
    """A text and an image, joined by ``join`` and classified; vectors ``[B, WIDTH]``, or tokens ``[B, S, WIDTH]``."""
    net = Net(opset)
    ids, mask = net.input("ids", INT64, "batch", "seq"), net.input("mask", INT64, "batch", "seq")
    pixels = net.input("pixels", FLOAT, "batch", 3, 16, 16)
    text = net.text(ids, mask)
    if tokens:
        image = net.patches(pixels)
    else:
        text, image = net.op("ReduceMean", text, net.ints(1), keepdims=0), net.pooled_image(pixels)
        text, image = net.linear(text, WIDTH, WIDTH), net.linear(image, WIDTH, WIDTH)
    joined = join(net, text, image)
    net.output(net.linear(net.op("Relu", joined), WIDTH, 4), "logits")
    return net.module()


def stack(net: Net, *streams: ir.Value) -> ir.Value:
    return net.op("Concat", *(net.op("Unsqueeze", x, net.ints(1)) for x in streams), axis=1)


def gate_over_stack(net: Net, a: ir.Value, b: ir.Value) -> ir.Value:
    both = stack(net, a, b)
    shares = net.op("Softmax", net.linear(net.op("Tanh", net.linear(both, WIDTH, 4)), 4, 1), axis=1)
    return net.op("ReduceSum", net.op("Mul", shares, both), net.ints(1), keepdims=0)


def gate_over_concat(net: Net, a: ir.Value, b: ir.Value) -> ir.Value:
    gate = net.op("Sigmoid", net.linear(net.op("Concat", a, b, axis=-1), 2 * WIDTH, WIDTH))
    other = net.op("Sub", net.constant(np.float32(1)), gate)
    return net.op("Add", net.op("Mul", gate, a), net.op("Mul", other, b))


def weighted(net: Net, a: ir.Value, b: ir.Value) -> ir.Value:
    shares = net.op("Softmax", net.weight(2), axis=0)
    parts = [net.op("Mul", x, net.op("Gather", shares, net.constant(k))) for k, x in enumerate((a, b))]
    return net.op("Add", *parts)


def weighted_stack(net: Net, a: ir.Value, b: ir.Value) -> ir.Value:
    return net.op("ReduceSum", net.op("Mul", stack(net, a, b), net.weight(1, 2, 1)), net.ints(1), keepdims=0)


def concat(net: Net, a: ir.Value, b: ir.Value) -> ir.Value:
    return net.linear(net.op("Concat", a, b, axis=-1), 2 * WIDTH, WIDTH)


def concat_with_product(net: Net, a: ir.Value, b: ir.Value) -> ir.Value:
    return net.linear(net.op("Concat", a, b, net.op("Mul", a, b), net.op("Sub", a, b), axis=-1), 4 * WIDTH, WIDTH)


def outer(net: Net, a: ir.Value, b: ir.Value) -> ir.Value:
    square = net.op("MatMul", net.op("Unsqueeze", a, net.ints(2)), net.op("Unsqueeze", b, net.ints(1)))
    return net.linear(net.op("Flatten", square), WIDTH * WIDTH, WIDTH)


def modulation(net: Net, a: ir.Value, b: ir.Value) -> ir.Value:
    return net.op("Add", net.op("Mul", net.linear(a, WIDTH, WIDTH), b), net.linear(a, WIDTH, WIDTH))


def cosine(net: Net, a: ir.Value, b: ir.Value) -> ir.Value:
    """``a·b / (|a| |b|)``, the norms multiplied on their own."""
    dot = net.op("ReduceSum", net.op("Mul", a, b), net.ints(-1), keepdims=1)
    norms = net.op("Mul", net.op("ReduceL2", a, net.ints(-1)), net.op("ReduceL2", b, net.ints(-1)))
    return net.op("Expand", net.op("Div", dot, norms), net.ints(1, WIDTH))


def initial_state(net: Net, a: ir.Value, b: ir.Value) -> ir.Value:
    """Tokens through an LSTM that starts at the pooled image."""
    start = net.op("Unsqueeze", net.op("ReduceMean", b, net.ints(1), keepdims=0), net.ints(0))
    return net.last_state(a, WIDTH, initial=start)


def cross_attention(net: Net, a: ir.Value, b: ir.Value) -> ir.Value:
    return net.op("Add", a, net.attention(a, b))


def two_layers_of_cross_attention(net: Net, a: ir.Value, b: ir.Value) -> ir.Value:
    return cross_attention(net, cross_attention(net, a, b), b)


def joint_attention(net: Net, a: ir.Value, b: ir.Value) -> ir.Value:
    """Queries, keys and values of both streams, each projected by weights of its own, put side by side."""
    q, k, v = (net.op("Concat", net.linear(a, WIDTH, WIDTH), net.linear(b, WIDTH, WIDTH), axis=1) for _ in range(3))
    scores = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1])), axis=-1)
    return net.op("MatMul", scores, v)


def in_sequence(net: Net, a: ir.Value, b: ir.Value) -> ir.Value:
    both = net.op("Concat", b, a, axis=1)
    return net.op("Add", both, net.attention(both, both))


@pytest.mark.parametrize(
    ("join", "tokens", "kinds", "level"),
    [
        (concat, False, ["concat"], "feature"),
        (concat_with_product, False, ["concat"], "feature"),
        (lambda net, a, b: net.op("Add", a, b), False, ["add"], "feature"),
        (lambda net, a, b: net.op("ReduceMean", stack(net, a, b), net.ints(1), keepdims=0), False, ["add"], "feature"),
        (weighted, False, ["weighted"], "feature"),
        (weighted_stack, False, ["weighted"], "feature"),
        (lambda net, a, b: net.op("Mul", net.op("Tanh", a), net.op("Tanh", b)), False, ["product"], "feature"),
        (outer, False, ["product"], "feature"),
        (cosine, False, ["similarity"], "feature"),
        (lambda net, a, b: net.op("Max", a, b), False, ["max"], "feature"),
        (modulation, False, ["modulation"], "feature"),
        (gate_over_stack, False, ["attention"], "feature"),
        (gate_over_concat, False, ["attention"], "feature"),
        (lambda net, a, b: net.op("Mul", net.op("Sigmoid", a), b), False, ["attention"], "feature"),
        (initial_state, True, ["state"], "feature"),
        (cross_attention, True, ["attention"], "feature"),
        (two_layers_of_cross_attention, True, ["attention", "attention"], "deep"),
        (joint_attention, True, ["attention"], "feature"),
        (in_sequence, True, ["concat"], "feature"),
    ],
)
def test_kinds_of_fusion(join: Build, tokens: bool, kinds: list[str], level: str) -> None:
    report = analyze_towers(two_streams(join, tokens=tokens))
    assert [f.kind for f in report.fusions] == kinds
    assert all(f.towers == ("text", "image") and f.reason for f in report.fusions)
    assert [f.depth for f in report.fusions] == list(range(len(kinds)))
    assert report.level == level
    assert [(t.name, t.inputs) for t in report.towers] == [("text", ("ids", "mask")), ("image", ("pixels",))]
    assert report.uncut == ""


def clip(bias: bool = False) -> Module:
    net = Net()
    text = net.text(net.input("ids", INT64, "captions", "seq"), net.input("mask", INT64, "captions", "seq"))
    text = net.op("Squeeze", net.op("Slice", text, net.ints(0), net.ints(1), net.ints(1)), net.ints(1))
    image = net.pooled_image(net.input("pixels", FLOAT, "images", 3, 16, 16))
    text, image = (net.normalized(net.op("MatMul", x, net.weight(WIDTH, 6))) for x in (text, image))
    logits = net.op("Mul", net.op("MatMul", image, net.op("Transpose", text, perm=[1, 0])), net.weight(1))
    net.output(net.op("Add", logits, net.weight(1)) if bias else logits, "logits")
    net.output(text, "text_embeds")
    net.output(image, "image_embeds")
    return net.module()


@pytest.mark.parametrize("bias", [False, True])
def test_dual_encoder(bias: bool) -> None:
    report = analyze_towers(clip(bias))
    assert [f.kind for f in report.fusions] == ["similarity"]
    assert [(p.tower, p.part.parameters) for p in report.projectors] == [("text", 6 * WIDTH), ("image", 6 * WIDTH)]
    assert [t.outputs for t in report.towers] == [("text_embeds",), ("image_embeds",)]
    assert [(h.outputs, h.towers) for h in report.heads] == [
        (("logits",), ("text", "image")), (("text_embeds",), ("text",)), (("image_embeds",), ("image",)),
    ]  # fmt: skip


def scattered(op: str) -> Module:
    """Image features take the places of a special token, then everything is one stream."""
    net = Net(opset=20)
    ids = net.input("ids", INT64, 2, 20)
    image = net.linear(net.op("Gelu", net.linear(net.patches(net.input("pixels", FLOAT, 2, 3, 16, 16)), 8, 8)), 8, 8)
    text, flat = net.embed(ids), net.op("Reshape", image, net.ints(-1, WIDTH))
    places = net.op("Equal", ids, net.constant(7))
    if op == "Where":
        order = net.op("Sub", net.op("CumSum", net.op("Cast", net.op("Reshape", places, net.ints(-1)), to=7),
                                     net.constant(0)), net.constant(1))  # fmt: skip
        order = net.op("Clip", order, net.constant(0), net.constant(31))
        rows = net.op("Reshape", net.op("Gather", flat, order), net.ints(2, 20, WIDTH))
        joined = net.op("Where", net.op("Unsqueeze", places, net.ints(-1)), rows, text)
    else:
        index = net.op("Transpose", net.op("NonZero", places), perm=[1, 0])
        count = net.op("Shape", index, start=0, end=1)
        joined = net.op("ScatterND", text, index, net.op("Slice", flat, net.ints(0), count))
    joined = net.op("Add", joined, net.attention(joined, joined))
    net.output(net.linear(joined, WIDTH, 50), "logits")
    return net.module()


@pytest.mark.parametrize("op", ["Where", "ScatterND"])
def test_image_features_among_tokens(op: str) -> None:
    report = analyze_towers(scattered(op))
    assert [(f.kind, f.towers) for f in report.fusions] == [("scatter", ("text", "image"))]
    assert [p.tower for p in report.projectors] == ["image"]
    assert report.projectors[0].part.parameters == 2 * (64 + 8)
    assert report.uncut == ""


def voted(kind: str) -> Module:
    net = Net()
    text = net.last_state(net.embed(net.input("ids", INT64, "b", "s")), WIDTH)
    image = net.pooled_image(net.input("pixels", FLOAT, "b", 3, 16, 16))
    sound = net.last_state(net.input("sound", FLOAT, "b", "t", 20), 20)
    votes = [net.linear(x, WIDTH, 4) for x in (text, image, sound)]
    if kind == "probabilities":
        votes = [net.op("Softmax", x, axis=-1) for x in votes]
        net.output(net.op("ReduceMean", stack(net, *votes), net.ints(1), keepdims=0), "class")
    else:
        net.output(net.op("Add", net.op("Add", *votes[:2]), votes[2]), "class")
    return net.module()


@pytest.mark.parametrize("kind", ["probabilities", "logits"])
def test_decisions_are_merged(kind: str) -> None:
    report = analyze_towers(voted(kind))
    assert (report.level, [f.kind for f in report.fusions]) == ("decision", ["add"])
    own = [h for h in report.heads if len(h.towers) == 1]
    assert [h.towers for h in own] == [("text",), ("image",), ("audio",)]
    assert all(h.outputs == ("class",) and h.part.parameters == WIDTH * 4 + 4 for h in own)
    assert report.projectors == ()


def test_joined_at_two_depths_with_that_result() -> None:
    net = Net()
    x, y = net.embed(net.input("ids", INT64, "b", "s")), net.input("pixels", FLOAT, "b", 3, 16, 16)
    early = net.op("Conv", y, net.weight(WIDTH, 3, 3, 3))
    shallow = net.op("Concat", net.op("ReduceMean", x, net.ints(1), keepdims=0),
                     net.op("Flatten", net.op("GlobalAveragePool", early)), axis=1)  # fmt: skip
    half = net.linear(shallow, 2 * WIDTH, WIDTH)
    late = net.op("Flatten", net.op("GlobalAveragePool", net.op("Conv", early, net.weight(WIDTH, WIDTH, 3, 3))))
    net.output(net.linear(net.op("Concat", half, net.last_state(x, WIDTH), late, axis=1), 3 * WIDTH, 3))
    report = analyze_towers(net.module())
    assert [(f.kind, f.depth) for f in report.fusions] == [("concat", 0), ("concat", 1)]
    assert report.level == "deep"
    assert [len(t.outputs) for t in report.towers] == [2, 2]
    assert report.trunk.parameters == 2 * WIDTH * WIDTH + WIDTH


def test_tasks_have_heads_of_their_own() -> None:
    def join(net: Net, a: ir.Value, b: ir.Value) -> ir.Value:
        joined = concat(net, a, b)
        net.output(net.linear(joined, WIDTH, 2), "mood")
        return joined

    report = analyze_towers(two_streams(join))
    heads = {h.outputs: h.part.parameters for h in report.heads}
    assert heads == {
        ("mood",): 2 * WIDTH + 2,
        ("logits",): 4 * WIDTH + 4,
        ("mood", "logits"): 2 * WIDTH * WIDTH + WIDTH,
    }


def test_one_tower() -> None:
    net = Net()
    net.output(net.linear(net.pooled_image(net.input("x", FLOAT, "b", 3, 16, 16)), WIDTH, 5), "logits")
    report = analyze_towers(net.module())
    assert ([t.name for t in report.towers], report.fusions, report.level) == (["image"], (), "")
    assert report.towers[0].part.parameters == WIDTH * 27 + WIDTH * WIDTH * 9
    assert [(h.outputs, h.part.parameters) for h in report.heads] == [(("logits",), 5 * WIDTH + 5)]
    assert "fewer than two" in report.uncut


def test_parts_add_up_to_the_model() -> None:
    module = two_streams(concat)
    report = analyze_towers(module, {"batch": 2, "seq": 5})
    parts = [*(t.part for t in report.towers), *(p.part for p in report.projectors), report.trunk]
    parts += [h.part for h in report.heads]
    names = [name for part in parts for name in part.nodes]
    assert sorted(names) == sorted(node.name for node in module.graph)
    floats = [v.const_value for v in module.graph.initializers.values() if v.const_value.dtype == FLOAT]
    assert sum(p.parameters for p in parts) == sum(t.size for t in floats if t.size > 1)


def test_macs_with_a_binding() -> None:
    module = two_streams(concat)
    text = analyze_towers(module, {"batch": 2, "seq": 5}).towers[0].part
    assert text.macs == 2 * (4 * 5 * WIDTH * WIDTH + 2 * 5 * 5 * WIDTH)
    assert str(analyze_towers(module).towers[0].part.macs) == "16*batch*seq*seq + 256*batch*seq"
    with pytest.raises(UserError, match="batch"):
        analyze_towers(module, {"bach": 2})


def siamese(copies: bool) -> Module:
    net = Net()
    weights = [net.weight(WIDTH, 3, 3, 3), net.weight(WIDTH, 4), net.constant(np.zeros(4, np.float32))]
    streams = []
    for name in ("left", "right"):
        if copies and name == "right":
            weights = [net.constant(w.const_value.numpy().copy()) for w in weights]
        x = net.op("Conv", net.input(name, FLOAT, "b", 3, 16, 16), weights[0])
        x = net.op("Flatten", net.op("GlobalAveragePool", x))
        streams.append(net.op("Add", net.op("MatMul", x, weights[1]), weights[2]))
    net.output(net.op("ReduceSum", net.op("Mul", *streams), net.ints(1)))
    return net.module()


@pytest.mark.parametrize("copies", [False, True])
def test_weights_of_two_towers(copies: bool) -> None:
    report = analyze_towers(siamese(copies))
    assert [(s.parameters, s.towers, len(s.names)) for s in report.shared] == [
        (WIDTH * 27, ("image", "image 2"), 1 + copies), (WIDTH * 4, ("image", "image 2"), 1 + copies),
    ]  # fmt: skip
    assert analyze_towers(two_streams(concat)).shared == ()


def test_sizes_and_masks_are_no_fusion() -> None:
    """The text takes its batch from the image, and masks of both are put side by side: neither joins the streams."""

    def join(net: Net, a: ir.Value, b: ir.Value) -> ir.Value:
        mask = net.op("Cast", net.graph.inputs[1], to=1)
        ones = net.op(
            "Expand", net.constant(np.float32(1)), net.op("Concat", net.op("Shape", b, start=0, end=2), axis=0)
        )
        both = net.op("Concat", ones, mask, axis=1)
        tokens = net.op("Concat", b, a, axis=1)
        return net.op("Add", tokens, net.attention(tokens, tokens, net.mask_bias(net.op("Cast", both, to=7))))

    report = analyze_towers(two_streams(join, tokens=True))
    assert [f.kind for f in report.fusions] == ["concat"]
    assert report.inputs["mask"].group == "text"


def test_a_local_function_is_seen_through() -> None:
    """The fusion lies inside a call; the towers end at what the call takes."""
    module = two_streams(lambda net, a, b: net.op("Joined", a, b, domain="mmopt.fused"))
    module.model.opset_imports["mmopt.fused"] = 1
    a, b = ir.Value(name="a"), ir.Value(name="b")
    add = ir.Node("", "Add", [a, b], name="inner")
    add.outputs[0].name = "sum"
    body = ir.Graph([a, b], add.outputs, nodes=[add], opset_imports={"": 18})
    function = ir.Function("mmopt.fused", "Joined", graph=body, attributes=[])
    module.model.functions[function.identifier()] = function
    before = [node.op_type for node in module.graph]
    report = analyze_towers(module)
    assert [node.op_type for node in module.graph] == before
    assert [f.kind for f in report.fusions] == ["add"]
    assert next(n for n in module.graph if n.op_type == "Joined").name == report.fusions[0].node
    assert report.uncut == ""


def test_fusion_inside_a_body_is_found_but_not_cut() -> None:
    inner = Net()
    net = Net()
    ids, pixels = net.input("ids", INT64, "b", "s"), net.input("pixels", FLOAT, "b", 3, 16, 16)
    flag = net.input("flag", ir.DataType.BOOL)
    table, kernel = net.weight(20, WIDTH), net.weight(WIDTH, 3, 3, 3)
    text = inner.op("ReduceMean", inner.op("Gather", table, ids), inner.ints(1), keepdims=0)
    image = inner.op("Flatten", inner.op("GlobalAveragePool", inner.op("Conv", pixels, kernel)))
    inner.output(inner.op("Add", text, image), "inside")
    other = Net(seed=1)
    other.output(other.op("Expand", other.weight(1, WIDTH), other.ints(3, WIDTH)), "fallback")
    net.output(net.op("If", flag, then_branch=inner.graph, else_branch=other.graph))
    report = analyze_towers(net.module())
    assert [(f.kind, f.towers) for f in report.fusions] == [("add", ("text", "image"))]
    assert report.fusions[0].node.startswith(net.graph[-1].name + "/")
    assert "body" in report.uncut


def test_inputs_that_are_joined_as_they_are_cannot_be_cut() -> None:
    net = Net()
    a, b = net.input("a", FLOAT, "x", "s", 300), net.input("b", FLOAT, "x", "s", 200)
    net.output(net.linear(net.op("Concat", a, b, axis=2), 500, 4))
    report = analyze_towers(net.module())
    assert ([f.kind for f in report.fusions], len(report.towers)) == (["concat"], 2)
    assert "as it is" in report.uncut


def test_override_names_the_tower() -> None:
    net = Net()
    lines = net.pooled_image(net.input("x", FLOAT, "b", 1, 64, 200), 1)
    text = net.op("ReduceMean", net.embed(net.input("ids", INT64, "b", "s")), net.ints(1), keepdims=0)
    net.output(concat(net, lines, text))
    module = net.module()
    assert [t.name for t in analyze_towers(module).towers] == ["modality 1", "text"]
    module.modalities["x"] = Modality.AUDIO
    assert [(t.name, t.modality) for t in analyze_towers(module).towers[:1]] == [("audio", Modality.AUDIO)]


def test_report_as_data() -> None:
    data = analyze_towers(clip()).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["schema_version"] == 1
    assert data["inputs"]["ids"]["modality"] == "text"
    assert data["fusions"][0]["kind"] == "similarity"
    assert all(t["reason"] for t in data["towers"])


def rename(module: Module, seed: int) -> tuple[Module, dict[str, str]]:
    """The same module with random names everywhere; also the old name of every new one."""
    rng, copy, old = random.Random(seed), module.clone(), {}

    def fresh(name: str | None) -> str:
        label = f"{rng.choice(['image', 'ids', 'mask', 'audio', 'q'])}_{rng.randrange(1 << 40)}"
        old[label] = name or ""
        return label

    for value in [*copy.graph.inputs, *list(copy.graph.initializers.values())]:
        value.name = fresh(value.name)
    for node in copy.graph:
        node.name = fresh(node.name)
        for output in node.outputs:
            output.name = fresh(output.name)
    return copy, old


def original_names(value: Any, old: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {old.get(k, k): original_names(v, old) for k, v in value.items() if k != "reason"}
    if isinstance(value, list):
        return [original_names(v, old) for v in value]
    return old.get(value, value) if isinstance(value, str) else value


@pytest.mark.parametrize("build", [clip, lambda: scattered("Where"), lambda: voted("logits"), lambda: siamese(True)])
@pytest.mark.parametrize("seed", [0, 1])
def test_names_decide_nothing(build: Callable[[], Module], seed: int) -> None:
    module = build()
    renamed, old = rename(module, seed)
    found = original_names(analyze_towers(renamed).to_dict(), old)
    assert found == original_names(analyze_towers(module).to_dict(), {})


def test_same_module_same_report() -> None:
    assert analyze_towers(two_streams(concat)) == analyze_towers(two_streams(concat))


def deep_model(layers: int) -> Module:
    def join(net: Net, a: ir.Value, b: ir.Value) -> ir.Value:
        for _ in range(layers):
            a, b = net.op("Add", a, net.attention(a, a)), net.op("Add", b, net.attention(b, b))
        return cross_attention(net, a, b)

    return two_streams(join, tokens=True)


def seconds(module: Module) -> float:
    start = time.process_time()
    analyze_towers(module)
    return time.process_time() - start


def test_time_is_linear() -> None:
    small, large = deep_model(25), deep_model(250)
    base = min(seconds(small) for _ in range(3))
    assert seconds(large) < 25 * base


@pytest.mark.slow
def test_twenty_thousand_nodes() -> None:
    module = deep_model(720)
    assert len(list(module.graph)) > 20_000
    assert seconds(module) < 15


def test_old_operator_sets() -> None:
    """Axes as attributes, as before opset 13."""
    net = Net(opset=11)
    text = net.op("ReduceMean", net.embed(net.input("ids", INT64, "b", "s")), axes=[1], keepdims=0)
    image = net.pooled_image(net.input("pixels", FLOAT, "b", 3, 16, 16))
    both = net.op("Concat", *(net.op("Unsqueeze", net.linear(x, 8, 8), axes=[1]) for x in (text, image)), axis=1)
    net.output(net.op("ReduceSum", both, axes=[1]))
    report = analyze_towers(net.module())
    assert [(f.kind, f.towers) for f in report.fusions] == [("add", ("text", "image"))]


def test_reports_are_frozen() -> None:
    report: TowerReport = analyze_towers(clip())
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.level = "deep"  # type: ignore[misc]
