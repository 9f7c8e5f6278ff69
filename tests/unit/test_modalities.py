"""What inputs are, told from hand-built graphs of every kind that exporters write."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mmopt.analysis.modalities import classify_inputs
from mmopt.errors import UserError
from mmopt.ir.modality import Modality
from tests.unit.tower_models import BOOL, FLOAT, INT64, VOCAB, WIDTH, Net

INT32, FLOAT16, UINT8, STRING = ir.DataType.INT32, ir.DataType.FLOAT16, ir.DataType.UINT8, ir.DataType.STRING


def roles(net: Net, **overrides: Modality) -> dict[str, tuple[str, str, str]]:
    module = net.module()
    module.modalities.update(overrides)
    return {name: (r.modality.value, r.role, r.group) for name, r in classify_inputs(module).items()}


def only(net: Net) -> tuple[str, str, str]:
    return next(iter(roles(net).values()))


TEXT, IMAGE, UNKNOWN = ("text", "ids", "text"), ("image", "image", "image"), ("unknown", "features", "modality 1")
WAVE, MEL = ("audio", "waveform", "audio"), ("audio", "spectrogram", "audio")
VIDEO, TABLE = ("video", "frames", "video"), ("tabular", "features", "tabular")


def test_ids_mask_positions_and_token_types_are_one_text() -> None:
    net = Net()
    ids, mask = net.input("a", INT64, "b", "s"), net.input("b", INT64, "b", "s")
    types, places = net.input("c", INT64, "b", "s"), net.input("d", INT64, "b", "s")
    x = net.op("Add", net.op("Add", net.embed(ids, 500), net.embed(types, 2)), net.embed(places, 64))
    net.output(net.op("Add", x, net.attention(x, x, net.mask_bias(mask))))
    found = classify_inputs(net.module())
    assert [(r.role, r.group) for r in found.values()] == [
        ("ids", "text"), ("mask", "text"), ("token-types", "text"), ("positions", "text"),
    ]  # fmt: skip
    assert [r.bound for r in found.values()] == [500, None, 2, 64]
    assert {r.modality for r in found.values()} == {Modality.TEXT}
    assert all(r.reason for r in found.values())


@pytest.mark.parametrize("dtype", [INT32, FLOAT])
def test_ids_of_any_type_through_casts(dtype: ir.DataType) -> None:
    net = Net()
    ids = net.op("Cast", net.input("x", dtype, "b", "s"), to=7)
    net.output(net.op("ReduceMean", net.embed(ids), net.ints(1)))
    assert only(net) == TEXT


def test_one_hot_times_a_matrix_is_a_look_up() -> None:
    net = Net()
    ids = net.input("x", INT64, "b", "s")
    hot = net.op("OneHot", ids, net.ints(30), net.constant(np.array([0, 1], np.float32)))
    net.output(net.linear(hot, 30, WIDTH))
    assert classify_inputs(net.module())["x"].bound == 30
    net = Net()
    ids = net.op("Unsqueeze", net.input("x", INT64, "b", "s"), net.ints(-1))
    hot = net.op("Cast", net.op("Equal", ids, net.constant(np.arange(30))), to=1)
    net.output(net.linear(hot, 30, WIDTH))
    found = classify_inputs(net.module())["x"]
    assert (found.role, found.bound, found.modality) == ("ids", 30, Modality.TEXT)


def test_bound_accounts_for_an_offset() -> None:
    net = Net()
    shifted = net.op("Add", net.input("x", INT64, "b", "s"), net.ints(2))
    net.output(net.op("ReduceMean", net.embed(shifted, 40), net.ints(1)))
    assert classify_inputs(net.module())["x"].bound == 38


def test_quantized_table() -> None:
    net = Net()
    table = net.constant(np.zeros((VOCAB, WIDTH), np.uint8) + np.arange(WIDTH, dtype=np.uint8))
    rows = net.op("Gather", table, net.input("x", INT64, "b", "s"))
    net.output(net.op("DequantizeLinear", rows, net.constant(np.float32(0.1)), net.constant(np.uint8(3))))
    assert only(net) == TEXT


def test_rotary_positions_are_no_second_text() -> None:
    net = Net()
    ids, places = net.input("x", INT64, "b", "s"), net.input("y", INT64, "b", "s")
    x = net.embed(ids)
    q, k = net.linear(x, WIDTH, WIDTH), net.linear(x, WIDTH, WIDTH)
    cosine, sine = net.embed(places, 100), net.embed(places, 100)
    q = net.op("Add", net.op("Mul", q, cosine), net.op("Mul", net.op("Neg", q), sine))
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1]))
    net.output(net.op("MatMul", net.op("Softmax", scores, axis=-1), x))
    assert roles(net)["y"] == ("text", "positions", "text")
    net = Net()
    x, places = net.embed(net.input("x", INT64, "b", "s")), net.input("y", INT64, "b", "s")
    angles = net.op("Mul", net.op("Unsqueeze", net.op("Cast", places, to=1), net.ints(-1)), net.weight(WIDTH))
    net.output(net.op("Mul", net.linear(x, WIDTH, WIDTH), net.op("Cos", angles)))
    assert roles(net)["y"] == ("text", "positions", "text")


def test_lengths_of_sequences() -> None:
    net = Net()
    ids, lengths = net.input("x", INT64, "b", "s"), net.input("y", INT32, "b")
    net.output(net.last_state(net.embed(ids), WIDTH, lengths=lengths))
    assert roles(net) == {"x": TEXT, "y": ("text", "lengths", "text")}


def test_masks_in_all_their_forms() -> None:
    def build(kind: str) -> Net:
        net = Net()
        x = net.embed(net.input("x", INT64, "b", "s"))
        dtype = {"bool": BOOL, "bias": FLOAT, "pool": FLOAT, "where": INT64}[kind]
        mask = net.input("y", dtype, "b", "s")
        if kind == "bias":
            x = net.attention(x, x, net.op("Unsqueeze", mask, net.ints(1)))
        elif kind == "pool":
            weight = net.op("Unsqueeze", mask, net.ints(-1))
            x = net.op("ReduceSum", net.op("Mul", net.linear(x, WIDTH, WIDTH), weight), net.ints(1))
        else:
            chosen = net.op("Cast", mask, to=9) if kind == "where" else mask
            lowest = net.constant(np.float32(-1e9))
            bias = net.op("Where", net.op("Unsqueeze", chosen, net.ints(1)), net.constant(np.float32(0)), lowest)
            x = net.attention(x, x, bias)
        net.output(x)
        return net

    for kind in ("bool", "bias", "pool", "where"):
        assert roles(build(kind))["y"] == ("text", "mask", "text"), kind


def test_mask_of_cross_attention_belongs_to_what_is_looked_at() -> None:
    net = Net()
    text, image = net.text(net.input("x", INT64, "b", "s")), net.patches(net.input("y", FLOAT, "b", 3, 16, 16))
    net.output(net.op("Add", text, net.attention(text, image, net.mask_bias(net.input("z", INT64, "b", 16)))))
    assert roles(net)["z"] == ("image", "mask", "image")


def test_two_texts_through_one_encoder_stay_two() -> None:
    net = Net()
    table = net.weight(VOCAB, WIDTH)
    a, b = (net.op("ReduceMean", net.op("Gather", table, net.input(n, INT64, "b", "s")), net.ints(1)) for n in "ab")
    net.output(net.op("ReduceSum", net.op("Mul", a, b), net.ints(1)))
    assert roles(net) == {"a": TEXT, "b": ("text", "ids", "text 2")}


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [
        (("b", 3, "h", "w"), 3, IMAGE),
        (("b", 4, 8, 8), 4, IMAGE),
        (("b", 1, 28, 28), 1, IMAGE),
        (("b", 1, 64, 200), 1, UNKNOWN),  # a line of text or a spectrogram
        (("b", 2, 64, 64), 2, UNKNOWN),
        (("b", 1, "h", "w"), 1, UNKNOWN),
    ],
)
def test_convolved_over_two_axes(shape: tuple[int | str, ...], channels: int, expected: tuple[str, str, str]) -> None:
    net = Net()
    net.output(net.pooled_image(net.input("x", FLOAT, *shape), channels))
    assert only(net) == expected


def test_pixels_behind_casts_scaling_and_nhwc() -> None:
    net = Net()
    pixels = net.op("Cast", net.input("x", UINT8, "b", 32, 32, 3), to=1)
    pixels = net.op("Div", net.op("Sub", pixels, net.weight(3)), net.constant(np.float32(255)))
    net.output(net.pooled_image(net.op("Transpose", pixels, perm=[0, 3, 1, 2])))
    assert only(net) == IMAGE
    net = Net()
    net.output(net.pooled_image(net.op("Cast", net.input("x", FLOAT16, "b", 3, 32, 32), to=1)))
    assert only(net) == IMAGE


def test_quantized_convolution() -> None:
    net = Net()
    scale, zero = net.constant(np.float32(0.1)), net.constant(np.uint8(0))
    pixels = net.op("QuantizeLinear", net.input("x", FLOAT, "b", 3, 16, 16), scale, zero)
    pixels = net.op("DequantizeLinear", pixels, scale, zero)
    kernel = net.op("DequantizeLinear", net.constant(np.ones((4, 3, 3, 3), np.int8)), scale)
    net.output(net.op("Conv", pixels, kernel))
    assert only(net) == IMAGE


def test_patches_cut_by_reshape_and_transpose() -> None:
    net = Net()
    x = net.op("Reshape", net.input("x", FLOAT, "b", 3, 16, 16), net.ints(0, 3, 4, 4, 4, 4))
    x = net.op("Reshape", net.op("Transpose", x, perm=[0, 2, 4, 3, 5, 1]), net.ints(0, 16, 48))
    net.output(net.linear(x, 48, WIDTH))
    assert only(net) == IMAGE


@pytest.mark.parametrize(
    ("shape", "expected"), [(("b", 80, "t"), MEL), (("b", 1, "t"), WAVE), (("b", 6, "t"), UNKNOWN)]
)
def test_convolved_over_time(shape: tuple[int | str, ...], expected: tuple[str, str, str]) -> None:
    net = Net()
    net.output(net.op("Conv", net.input("x", FLOAT, *shape), net.weight(4, int(shape[1]), 3)))
    assert only(net) == expected


def test_convolution_over_time_written_over_two_axes() -> None:
    net = Net()
    x = net.op("Unsqueeze", net.input("x", FLOAT, "b", 40, "t"), net.ints(2))
    net.output(net.op("Conv", x, net.weight(4, 40, 1, 3)))
    assert only(net) == MEL


def test_short_series_are_no_waveform() -> None:
    net = Net()
    net.output(net.op("Conv", net.op("Unsqueeze", net.input("x", FLOAT, "b", 24), net.ints(1)), net.weight(4, 1, 3)))
    assert only(net) == UNKNOWN


def test_waveform_by_spectrum_and_by_framing() -> None:
    net = Net()
    signal = net.op("Unsqueeze", net.input("x", FLOAT, "b", "n"), net.ints(-1))
    net.output(net.op("STFT", signal, net.constant(160), net.weight(400), net.constant(400)))
    assert only(net) == WAVE
    net = Net()
    index = net.constant(np.arange(5)[:, None] * 16 + np.arange(32)[None])
    frames = net.op("Mul", net.op("Gather", net.input("x", FLOAT, "b", 400), index, axis=1), net.weight(32))
    net.output(net.linear(frames, 32, 20))
    assert only(net) == WAVE


@pytest.mark.parametrize(("features", "expected"), [(40, MEL), (512, UNKNOWN), (3, UNKNOWN)])
def test_recurrence_over_frames(features: int, expected: tuple[str, str, str]) -> None:
    net = Net()
    net.output(net.last_state(net.input("x", FLOAT, "b", "t", features), features))
    assert only(net) == expected


def test_video_by_reshape_and_by_three_axes() -> None:
    net = Net()
    frames = net.op("Reshape", net.input("x", FLOAT, 2, 4, 3, 16, 16), net.ints(-1, 3, 16, 16))
    features = net.op("Reshape", net.pooled_image(frames), net.ints(2, 4, WIDTH))
    net.output(net.last_state(features, WIDTH))
    assert only(net) == VIDEO
    for channels, expected in ((3, VIDEO), (1, UNKNOWN)):  # one channel may as well be a scan of a body
        net = Net()
        net.output(net.op("Conv", net.input("x", FLOAT, "b", channels, 8, 16, 16), net.weight(4, channels, 2, 4, 4)))
        assert only(net) == expected


def test_video_by_a_loop_over_frames() -> None:
    inner = Net()
    frame = inner.input("frame", FLOAT, 3, 16, 16)
    pooled = inner.pooled_image(inner.op("Unsqueeze", frame, inner.ints(0)))
    inner.output(inner.op("Squeeze", pooled, inner.ints(0)), "feature")
    net = Net()
    clip = net.input("x", FLOAT, 4, 3, 16, 16)
    net.output(net.op("Scan", clip, body=inner.graph, num_scan_inputs=1))
    assert only(net) == VIDEO


def test_tables() -> None:
    net = Net()
    net.output(net.linear(net.op("BatchNormalization", net.input("x", FLOAT, "b", 12), *[net.weight(12)] * 4), 12, 2))
    assert only(net) == TABLE
    net = Net()
    columns = [net.embed(net.input(f"c{k}", INT64, "b"), 9) for k in range(3)]
    dense = net.input("d", FLOAT, "b", 5)
    net.output(net.linear(net.op("Concat", *columns, dense, axis=1), 3 * WIDTH + 5, 2))
    assert {r[2] for r in roles(net).values()} == {"tabular"}
    assert [r[1] for r in roles(net).values()] == ["ids", "ids", "ids", "features"]


def test_columns_of_one_input() -> None:
    net = Net()
    ids = net.input("x", INT64, "b", 2)
    columns = [net.embed(net.op("Gather", ids, net.constant(k), axis=1), 9) for k in range(2)]
    net.output(net.linear(net.op("Concat", *columns, axis=1), 2 * WIDTH, 2))
    assert only(net) == ("tabular", "ids", "tabular")


def test_unknown_inputs_are_numbered() -> None:
    net = Net()
    a, b = net.input("a", FLOAT, "b", "s", 300), net.input("b", FLOAT, "b", "s", 300)
    net.output(net.op("Add", net.linear(a, 300, 4), net.linear(b, 300, 4)))
    assert [r[2] for r in roles(net).values()] == ["modality 1", "modality 2"]


def test_states_of_recurrence_and_caches() -> None:
    net = Net()
    x, state = net.input("x", FLOAT, "b", "t", 40), net.input("h", FLOAT, 1, "b", WIDTH)
    net.output(net.last_state(x, 40, initial=state))
    assert roles(net)["h"] == ("unknown", "state", "audio")
    net = Net()
    ids, past = net.input("x", INT64, "b", "s"), net.input("past", FLOAT, "b", "p", WIDTH)
    x = net.embed(ids)
    keys = net.op("Concat", past, net.linear(x, WIDTH, WIDTH), axis=1)
    scores = net.op("Softmax", net.op("MatMul", x, net.op("Transpose", keys, perm=[0, 2, 1])), axis=-1)
    net.output(net.op("MatMul", scores, keys))
    net.output(keys, "present")
    assert roles(net)["past"] == ("unknown", "state", "text")


def test_scalars_that_steer_one_or_all() -> None:
    net = Net()
    text = net.op("ReduceMean", net.embed(net.input("x", INT64, "b", "s")), net.ints(1))
    image = net.pooled_image(net.input("y", FLOAT, "b", 3, 16, 16))
    image = net.op("Mul", image, net.input("gain", FLOAT))
    logits = net.op("MatMul", text, net.op("Transpose", image, perm=[1, 0]))
    net.output(net.op("Mul", logits, net.input("temperature", FLOAT)))
    found = roles(net)
    assert found["gain"] == ("unknown", "scalar", "image")
    assert found["temperature"] == ("unknown", "scalar", "common")


def test_unused_input() -> None:
    net = Net()
    net.input("nothing", FLOAT, "b", 3)
    net.output(net.linear(net.input("x", FLOAT, "b", 5), 5, 2))
    assert roles(net)["nothing"][2] == "unused"


def test_initializers_listed_as_inputs_are_weights() -> None:
    """As in models from before IR version 4."""
    net = Net()
    net.output(net.pooled_image(net.input("x", FLOAT, "b", 3, 16, 16)))
    net.graph.inputs.extend(net.graph.initializers.values())
    assert roles(net) == {"x": IMAGE}


def test_strings() -> None:
    net = Net()
    net.output(net.op("StringNormalizer", net.input("x", STRING, 4)), dtype=STRING)
    assert only(net)[0] == "text"


def test_the_user_has_the_last_word() -> None:
    net = Net()
    net.output(net.pooled_image(net.input("x", FLOAT, "b", 1, 64, 200), 1))
    assert roles(net, x=Modality.AUDIO)["x"] == MEL
    assert roles(net, x=Modality.IMAGE)["x"] == IMAGE


def test_override_of_a_name_that_is_not_there() -> None:
    net = Net()
    net.output(net.pooled_image(net.input("pixels", FLOAT, "b", 3, 64, 64)))
    with pytest.raises(UserError, match="pixels"):
        roles(net, pixel=Modality.IMAGE)
