"""Convolutions of bfloat16 and of quantized values: exact where sums are integers, on every instruction set at hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from mmopt.backends.cpu.dot import dot_for
from mmopt.backends.cpu.kernels.conv import Window
from mmopt.backends.cpu.kernels.conv_dot import (
    Cut,
    DotConvolution,
    Shape,
    Walk,
    block_of,
    candidates,
    pack_filters,
    worth_forking,
)
from mmopt.backends.profile import Profile, load_profile
from mmopt.ir.module import Module
from mmopt.pipeline.base import PassContext
from mmopt.runtime.cpu import missing_features, running_features
from mmopt.transforms.canonicalize import InferShapes
from mmopt.transforms.fuse.fuse_groups import FuseGroups
from mmopt.transforms.precision import NarrowFloats
from tests.kernels import PROFILES, WIDEST, Arrays, Case, profiles
from tests.kernels import check as check_cases
from tests.programs import Example, Programs, grouped, model_of, wrong_answers
from tests.unit import test_kernel_conv
from tests.unit.test_kernel_conv import Geometry, convolved

LEVELS = ["x86-64-v3", "skylake-avx512", "icelake", "znver4", "sapphirerapids"]
QUICK = profiles()[WIDEST].name


def level(name: str) -> Profile:
    profile = load_profile(name)
    if missing := missing_features(profile.features, running_features()):
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    return profile


ANY_LEVEL = [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in LEVELS]


def check(examples: Sequence[Example], profile: Profile, tolerance: float, prepare: object = grouped) -> None:
    wrong = wrong_answers(examples, profile, tolerance, prepare=prepare)  # type: ignore[arg-type]
    assert not wrong, f"{len(wrong)} of {len(examples)} models on {profile.name}:\n" + "\n".join(wrong)


def geometries() -> list[Geometry]:
    """Everything the float32 template is tested on, and shapes that AMX tiles, phases and segments make special."""
    made = [*test_kernel_conv.ranks(), *test_kernel_conv.channels(), *test_kernel_conv.groups()]
    known = [eval(e.name, {"Geometry": Geometry}) for e in made]
    return [
        *known,
        Geometry((1, 64, 14, 14), (64, 64, 1, 1)),
        Geometry((1, 64, 15, 13), (64, 64, 3, 3), pads=(1, 1, 1, 1)),
        Geometry((2, 64, 9, 9), (96, 64, 3, 3), strides=(2, 2), pads=(1, 1, 1, 1)),
        Geometry((1, 64, 15, 14), (128, 64, 1, 1), strides=(2, 2)),
        Geometry((1, 64, 9, 9), (32, 64, 1, 1), strides=(2, 2), pads=(1, 1, 1, 1)),
        Geometry((1, 32, 11, 12), (32, 32, 3, 3), strides=(3, 2), dilations=(2, 1), pads=(2, 1, 0, 3)),
        Geometry((2, 32, 21), (32, 32, 5), strides=(4,), dilations=(3,), pads=(3, 2)),
        Geometry((1, 64, 13, 12), (64, 16, 3, 3), strides=(2, 2), pads=(1, 1, 1, 1), groups=4),
        Geometry((1, 128, 5, 6), (128, 4, 3, 3), groups=32),
        Geometry((1, 100, 9), (10, 100, 3)),
        Geometry((1, 40, 6, 7), (72, 40, 2, 2), dilations=(2, 3)),
        Geometry((1, 3, 30, 30), (64, 3, 7, 7), strides=(2, 2), pads=(3, 3, 3, 3)),
        Geometry((1, 8, 5, 6, 7), (24, 8, 3, 3, 3), pads=(1,) * 6),
    ]


# -- bfloat16 --------------------------------------------------------------------------------------------------


FLOATS = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}


def narrowed(model: onnx.ModelProto, kind: str = "bf16") -> Module:
    """``model`` with its convolution in a narrow format, as ``--precision`` makes it."""
    module = Module(ir.from_proto(model))
    InferShapes().run(module, PassContext())
    assert NarrowFloats(format=kind).run(module, PassContext())  # type: ignore[arg-type]
    FuseGroups().run(module, PassContext())
    return module


def rounded_example(g: Geometry, kind: str = "bf16") -> Example:
    """A float32 model with the answer that rounded operands give."""
    made = test_kernel_conv.example(g)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in made.model.graph.initializer}
    x, w = (a.astype(FLOATS[kind]).astype(np.float32) for a in (made.feeds["x"], weights["w"]))
    return dataclasses.replace(made, want=[convolved(g, x, w, weights.get("bias"))])


@pytest.mark.parametrize("name", ANY_LEVEL)
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_floats_against_float64_of_the_rounded_operands(name: str, kind: str) -> None:
    # Sums of up to 800 products, each rounded to float32: some units in the last place of the largest result.
    shapes = geometries() if kind == "bf16" else geometries()[::3]
    examples = [rounded_example(g, kind) for g in shapes if g.dtype == "float32"]
    check(examples, level(name), 2e-6, lambda model: narrowed(model, kind))


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_the_template_is_used_and_weights_are_stored_narrow(kind: str) -> None:
    example = rounded_example(Geometry((1, 64, 8, 8), (64, 64, 3, 3), pads=(1, 1, 1, 1)))
    program = Programs([narrowed(example.model, kind)], level(QUICK))
    assert f"conv_{kind}" in program.templates
    assert sum(a.nbytes for a in program.weights.values()) < 64 * 64 * 9 * 2 + 1024


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_channels_by_themselves_read_halves(kind: str) -> None:
    """Halves become floats in registers: no kernel does but that, and the layout changes before the first only."""
    random = np.random.default_rng(8)
    shapes = {"wide": (96, 16, 3, 3), "each": (96, 1, 3, 3), "last": (32, 96, 1, 1)}
    weights = {n: (random.standard_normal(s) / np.prod(s[1:]) ** 0.5).astype(np.float32) for n, s in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "wide"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "each"], ["c"], pads=[1, 1, 1, 1], group=96, strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Conv", ["d", "last"], ["y"]),
    ]
    x = random.standard_normal((2, 16, 12, 13)).astype(np.float32)
    example = Example(kind, model_of(nodes, {"x": x}, ["y"], weights), {"x": x})
    program = Programs([narrowed(example.model, kind)], level(QUICK))
    (got,), (want,) = program.run(0, {"x": x}), example.expected()
    np.testing.assert_allclose(got, want, atol=0.03 * np.abs(want).max())
    assert program.templates.count("conv_depthwise") == 1
    if kind == "bf16":  # halves of the other kind are multiplied as floats
        assert [name for name in program.kernels if not name.startswith("Conv")] == ["Cast", "blocks", "copy"]


# -- integers --------------------------------------------------------------------------------------------------


def integers(g: Geometry, dtype: str, seed: int) -> np.ndarray:
    info = np.iinfo(dtype)
    shape = g.x if seed == 0 else g.w
    return np.random.default_rng(seed).integers(info.min, info.max, shape, endpoint=True).astype(dtype)


def exact(g: Geometry, x: np.ndarray, w: np.ndarray, x_zero: int, w_zero: np.ndarray | int) -> np.ndarray:
    """Σ (x − x_zero)(w − w_zero) in integers: float64 holds them all."""
    centred = w.astype(np.int64) - np.asarray(w_zero).reshape(-1, *[1] * (w.ndim - 1))
    return convolved(g, x.astype(np.int64) - x_zero, centred, None).astype(np.int64)


TYPES = {"int8": TensorProto.INT8, "uint8": TensorProto.UINT8}


def integer_model(
    g: Geometry, nodes: Sequence[onnx.NodeProto], x: np.ndarray, weights: dict[str, np.ndarray], output: int
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TYPES[str(x.dtype)], x.shape)],
        [helper.make_tensor_value_info("y", output, None)],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def conv_integer(g: Geometry, kinds: tuple[str, str], x_zero: int, w_zero: int | None) -> Example:
    x, w = integers(g, kinds[0], 0), integers(g, kinds[1], 1)
    weights = {"w": w, "xz": np.array(x_zero, kinds[0])}
    weights |= {} if w_zero is None else {"wz": np.array(w_zero, kinds[1])}
    node = helper.make_node("ConvInteger", ["x", *weights], ["y"], **g.attributes())
    model = integer_model(g, [node], x, weights, TensorProto.INT32)
    want = exact(g, x, w, x_zero, w_zero or 0).astype(np.int32)
    return Example(f"{g} {kinds} {x_zero} {w_zero}", model, {"x": x}, [want])


@pytest.mark.parametrize("name", ANY_LEVEL)
@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_sums_of_integers_are_exact(name: str, kind: str) -> None:
    """Padding counts as the zero point, so that nothing but a right correction gives the right sums at the border."""
    zero = 117 if kind == "uint8" else -39
    check([conv_integer(g, (kind, "int8"), zero, None) for g in geometries()], level(name), 0.0)


def test_zero_points_of_filters() -> None:
    g = Geometry((1, 32, 6, 7), (40, 32, 3, 3), pads=(1, 0, 1, 2))
    examples = [conv_integer(g, ("uint8", "uint8"), 3, zero) for zero in (128, 127, 0, 255)]
    check(examples, level(QUICK), 0.0)
    templates = [Programs([grouped(e.model)], level(QUICK)).templates for e in examples]
    assert ["conv_int8" in t for t in templates] == [True, False, False, False], "others do not fit into 8 bits"


def dequantized(g: Geometry, *, per_channel: bool, bias: bool) -> Example:
    """A QDQ convolution whose scales are powers of two, so that its result is exact in float32."""
    x, w = integers(g, "uint8", 0), integers(g, "int8", 1) // 8
    steps = np.float32(2.0) ** -np.random.default_rng(2).integers(3, 7, g.w[0] if per_channel else 1).astype(np.float32)
    weights = {
        "sx": np.float32(0.125),
        "zx": np.array(101, np.uint8),
        "w": w,
        "sw": steps if per_channel else steps.reshape(()),
        "zw": np.zeros_like(steps if per_channel else steps.reshape(()), np.int8),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "sx", "zx"], ["a"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["f"], axis=0),
    ]
    want = exact(g, x, w, 101, 0) * (0.125 * steps.astype(np.float64).reshape(-1, *[1] * g.rank))
    if bias:
        weights |= {"b": integers(dataclasses.replace(g, w=(g.w[0],)), "int8", 1).astype(np.int32)}
        weights |= {"sb": 0.125 * weights["sw"]}
        nodes.append(helper.make_node("DequantizeLinear", ["b", "sb"], ["c"], axis=0))
        want = want + (weights["b"] * weights["sb"].astype(np.float64)).reshape(-1, *[1] * g.rank)
    nodes.append(helper.make_node("Conv", ["a", "f", *(["c"] if bias else [])], ["y"], **g.attributes()))
    model = integer_model(g, nodes, x, weights, TensorProto.FLOAT)
    return Example(f"{g} per channel {per_channel} bias {bias}", model, {"x": x}, [want.astype(np.float32)])


@pytest.mark.parametrize("name", ANY_LEVEL)
def test_dequantized_operands(name: str) -> None:
    shapes = [
        Geometry((1, 64, 9, 9), (64, 64, 3, 3), pads=(1, 1, 1, 1)),
        Geometry((2, 3, 12, 12), (32, 3, 3, 3), strides=(2, 2), pads=(1, 1, 1, 1)),
        Geometry((1, 32, 6, 5), (32, 1, 3, 3), groups=32, pads=(1, 1, 1, 1)),
        Geometry((2, 48, 9, 35), (48, 1, 3, 3), groups=48, strides=(2, 2), pads=(1, 1, 0, 1)),
        Geometry((1, 24, 7, 40), (24, 1, 3, 5), groups=24, dilations=(1, 2), pads=(1, 3, 1, 4)),
        Geometry((1, 20, 7), (12, 20, 3), pads=(1, 0)),
    ]
    examples = [dequantized(g, per_channel=p, bias=b) for g in shapes for p in (False, True) for b in (False, True)]
    check(examples, level(name), 0.0)


def test_requantized() -> None:
    g = Geometry((1, 32, 9, 9), (48, 32, 3, 3), pads=(1, 1, 1, 1))
    x, w = integers(g, "uint8", 0), integers(g, "int8", 1)
    steps = (0.002 + 0.0001 * np.arange(48)).astype(np.float32)
    bias = np.random.default_rng(3).integers(-9000, 9000, 48).astype(np.int32)
    weights = {"sx": np.float32(0.02), "zx": np.array(90, np.uint8), "w": w, "sw": steps, "zw": np.zeros(48, np.int8)}
    weights |= {"sy": np.float32(0.31), "zy": np.array(120, np.uint8), "b": bias}
    node = helper.make_node("QLinearConv", ["x", *weights], ["y"], **g.attributes())
    model = integer_model(g, [node], x, weights, TensorProto.UINT8)
    around = (-1, 1, 1)
    scaled = (exact(g, x, w, 90, 0) + bias.reshape(around)) * (np.float32(0.02) * steps / np.float32(0.31)).reshape(
        around
    )
    want = np.clip(np.rint(scaled) + 120, 0, 255).astype(np.uint8)
    program = Programs([grouped(model)], level(QUICK))
    (got,) = program.run(0, {"x": x})
    assert "conv_int8" in program.templates
    difference = np.abs(got.astype(int) - want)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3, "only halves that round either way"


def residual_block() -> tuple[onnx.ModelProto, np.ndarray]:
    """QDQ: convolution, ReLU, convolution plus the input, ReLU, pooling, convolution."""
    scale, zero = {"s": np.float32(0.05), "z": np.array(128, np.uint8)}, np.zeros(64, np.int8)
    weights: dict[str, np.ndarray] = {**scale, "zw": zero}
    random = np.random.default_rng(5)
    nodes: list[onnx.NodeProto] = []

    def requantized(value: str) -> str:
        nodes.append(helper.make_node("QuantizeLinear", [value, "s", "z"], [f"{value}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{value}_q", "s", "z"], [f"{value}_d"]))
        return f"{value}_d"

    def convolution(value: str, name: str, kernel: int) -> str:
        weights[f"{name}_w"] = random.integers(-127, 128, (64, 64, kernel, kernel)).astype(np.int8)
        weights[f"{name}_s"] = (0.0004 + 0.00001 * np.arange(64)).astype(np.float32)
        weights[f"{name}_b"] = random.standard_normal(64).astype(np.float32)
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_w", f"{name}_s", "zw"], [f"{name}_f"], axis=0))
        inputs = [value, f"{name}_f", f"{name}_b"]
        nodes.append(helper.make_node("Conv", inputs, [name], pads=[kernel // 2] * 4, name=name))
        return name

    def relu(value: str) -> str:
        nodes.append(helper.make_node("Relu", [value], [f"{value}_r"]))
        return f"{value}_r"

    start = requantized("x")
    first = requantized(relu(convolution(start, "c0", 3)))
    second = convolution(first, "c1", 1)
    nodes.append(helper.make_node("Add", [second, start], ["sum"]))
    pooled = requantized(relu("sum"))
    nodes.append(helper.make_node("MaxPool", [pooled], ["p"], kernel_shape=[2, 2], strides=[2, 2]))
    convolution(requantized("p"), "y", 3)
    x = random.standard_normal((1, 64, 12, 12)).astype(np.float32) * 2
    return model_of(nodes, {"x": x}, ["y"], weights), x


def test_no_float_is_stored_between_quantized_neighbours() -> None:
    model, x = residual_block()
    module = grouped(model)
    program = Programs([module], level(QUICK))
    (got,) = program.run(0, {"x": x})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (want,) = session.run(None, {"x": x})
    # A value between two steps may go either way and changes what follows by a step of its weight.
    assert np.abs(got - want).max() < 0.02 * np.ptp(want)
    assert program.templates.count("conv_int8") == 3
    wide = [
        (call.op_type, value.name)
        for call in module.graph
        for value in call.outputs
        if value.dtype == ir.DataType.FLOAT and not value.is_graph_output()
    ]
    assert wide == []


def inverted_block() -> tuple[onnx.ModelProto, np.ndarray]:
    """QDQ: 3×3, each channel for itself, and 1×1, with steps in between, in channels of a whole block and of parts."""
    random, channels = np.random.default_rng(6), 96
    weights = {"s": np.float32(0.03), "z": np.array(7, np.uint8), "zw": np.zeros(channels, np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "s", "z"], ["x_d"]),
    ]

    def layer(value: str, name: str, depth: int, kernel: int, **attributes: int | list[int]) -> str:
        weights[f"{name}_w"] = random.integers(-127, 128, (channels, depth, kernel, kernel)).astype(np.int8)
        weights[f"{name}_s"] = np.full(channels, 0.02 / kernel / np.sqrt(depth), np.float32)
        pads: Any = {"pads": [kernel // 2] * 4, **attributes}
        nodes.extend([
            helper.make_node("DequantizeLinear", [f"{name}_w", f"{name}_s", "zw"], [f"{name}_f"], axis=0),
            helper.make_node("Conv", [value, f"{name}_f"], [name], **pads),
            helper.make_node("Relu", [name], [f"{name}_r"]),
            helper.make_node("QuantizeLinear", [f"{name}_r", "s", "z"], [f"{name}_q"]),
            helper.make_node("DequantizeLinear", [f"{name}_q", "s", "z"], [f"{name}_d"]),
        ])  # fmt: skip
        return f"{name}_d"

    first = layer("x_d", "wide", 16, 3)
    layer(layer(first, "each", 1, 3, group=channels, strides=[2, 2]), "last", channels, 1)
    x = random.standard_normal((1, 16, 12, 12)).astype(np.float32)
    return model_of(nodes, {"x": x}, ["last_d"], weights), x


def test_channels_by_themselves_read_and_write_bytes_in_the_layout_of_their_neighbours() -> None:
    model, x = inverted_block()
    program = Programs([grouped(model)], level(QUICK))
    (got,) = program.run(0, {"x": x})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (want,) = session.run(None, {"x": x})
    assert (np.abs(got - want) > 1e-6).mean() < 0.02, "only values between two steps may differ"
    assert np.abs(got - want).max() < 0.1
    assert program.templates.count("conv_depthwise") == 1
    assert sum(name.startswith(("blocks", "Dequantize", "operand")) for name in program.kernels) == 1, "the input's"


# -- kernels by themselves -------------------------------------------------------------------------------------


def in_phases(x: np.ndarray, shape: Shape, walk: Walk) -> np.ndarray:
    """A padded image ``[C, *space]`` in the layout of the template."""
    blocks = -(-x.shape[0] // walk.block)
    made = np.zeros((1, blocks * math.prod(shape.phases), *shape.extents, walk.block), x.dtype)
    strides = shape.window.strides if shape.split else (1,) * len(shape.extents)
    for number, phase in enumerate(itertools.product(*map(range, shape.phases))):
        part = x[(slice(None), *(slice(f, None, s) for f, s in zip(phase, strides, strict=True)))]
        part = part[(slice(None), *map(slice, shape.extents))]
        filled = np.zeros((blocks * walk.block, *part.shape[1:]), x.dtype)
        filled[: x.shape[0]] = part
        turned = np.moveaxis(filled.reshape(blocks, walk.block, *part.shape[1:]), 1, -1)
        made[(0, slice(number, None, math.prod(shape.phases)), *map(slice, part.shape[1:]))] = turned
    return made


def bare(profile: str) -> list[Case]:
    """Kernels whose input ends where the last tile of rows, segment and step end."""
    dot = dot_for(profiles()[profile], "uint8", "int8")
    assert dot is not None
    cases = []
    for c, o, padded, window in [
        (64, 64, (9, 9), Window((3, 3), (1, 1), (1, 1))),
        (128, 40, (7, 7), Window((1, 1), (1, 1), (1, 1))),
        (64, 32, (11, 9), Window((3, 3), (2, 2), (1, 1))),
        (3, 16, (17, 23), Window((7, 7), (2, 2), (1, 1))),
        (20, 33, (14,), Window((5,), (1,), (2,))),
        (32, 16, (5, 4, 6), Window((2, 2, 2), (1, 1, 1), (1, 1, 1))),
    ]:
        walk = Walk.of(dot, block_of(c, dot), window, c)
        split = not walk.joined and any(s > 1 for s in window.strides)
        filled = -(-c // walk.block) * walk.block
        shape = Shape(padded, split, filled, o, 1, window, int(walk.overlong(window)))
        g = Geometry((1, c, *padded), (o, c, *window.kernel), strides=window.strides, dilations=window.dilations)
        x, w = integers(g, "uint8", 0), integers(g, "int8", 1)
        want = exact(g, x, w, -dot.shift, 0)[0]
        taken = x[0].astype(np.int32) + dot.shift
        for candidate in candidates(profiles()[profile], dot, shape):
            cut = Cut(**{f.name: candidate.number(f.name) for f in dataclasses.fields(Cut)})
            data = Arrays()
            source = data.constant(in_phases(taken, shape, walk).astype(dot.a))
            filters = data.constant(pack_filters(w, 1, walk, cut.vectors * dot.lanes))
            nest = DotConvolution(source, filters, shape=shape, walk=walk, cut=cut, block=o, name="conv_int8")
            cases.append(data.case(f"{g} {cut}", nest.output, np.moveaxis(want, 0, -1)[None, None]))
    return cases


@pytest.mark.parametrize("profile", PROFILES)
def test_every_candidate_gives_the_same_sums(profile: str) -> None:
    check_cases(bare(profile), profile)


# -- choosing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LEVELS, "armv8.0", "cortex-a76", "neoverse-v1"])
@pytest.mark.parametrize("kinds", [("bfloat16", "bfloat16"), ("uint8", "int8"), ("int8", "int8")])
def test_segments_are_whole_steps(name: str, kinds: tuple[str, str]) -> None:
    profile = load_profile(name)
    dot = dot_for(profile, *kinds)
    assert dot is not None
    for channels in (1, 3, 4, 16, 20, 24, 32, 64, 100, 2048):
        block = block_of(channels, dot)
        assert block % dot.group == 0
        assert channels % block == 0 or block >= channels
        for kernel, dilation in ((1, 1), (3, 1), (7, 1), (3, 2)):
            window = Window((kernel, kernel), (1, 1), (dilation, dilation))
            walk = Walk.of(dot, block, window, channels)
            assert walk.length(window) % walk.dot.step == 0
            assert walk.dot.step % dot.group == 0
            assert not dot.tiled or walk.dot.step <= dot.step
            assert walk.block == block or walk.joined
            filters = pack_filters(np.ones((8, channels, kernel, kernel), np.int8), 1, walk, 8)
            assert filters.sum() == 8 * channels * kernel * kernel
            assert filters[0].shape[0] * dot.group == -(-channels // walk.block) * math.prod(
                (*walk.taps(window), walk.length(window))
            )


def test_few_channels_are_not_filled_up_where_a_row_of_taps_is_a_segment() -> None:
    """Zeros stand behind the 21 elements of three channels by seven taps, not behind each three."""
    dot = dot_for(load_profile("cortex-a76"), "uint8", "int8")
    assert dot is not None
    window = Window((7, 7), (2, 2), (1, 1))
    walk = Walk.of(dot, block_of(3, dot), window, 3)
    assert (walk.block, walk.length(window), walk.dot.step, walk.overlong(window)) == (3, 24, 24, True)
    weight = np.arange(1, 3 * 49 + 1).reshape(1, 3, 7, 7).astype(np.int16)
    packed = pack_filters(weight, 1, walk, 4)[0, :, 0].reshape(7, 24)
    np.testing.assert_array_equal(packed[:, :21], weight[0].transpose(1, 2, 0).reshape(7, 21))
    assert not packed[:, 21:].any()
    shape = Shape((229, 229), False, 3, 64, 1, window, slack=1)
    assert (shape.extents, shape.space) == ((229, 230), (112, 112))


def test_small_images_are_walked_over_the_padding_and_wide_ones_in_lines() -> None:
    profile = load_profile("sapphirerapids")
    dot = dot_for(profile, "bfloat16", "bfloat16")
    assert dot is not None
    window = Window((3, 3), (1, 1), (1, 1))
    small = candidates(profile, dot, Shape((9, 9), False, 512, 512, 1, window))
    assert small[0]["merged"] == 2
    assert {c["merged"] for c in small} == {1, 2}
    assert all(c.cycles > 0 for c in small)
    strided = Shape((16, 16), False, 512, 512, 1, Window((3, 3), (2, 2), (1, 1)))
    assert {c["merged"] for c in candidates(profile, dot, strided)} == {1}
    phased = dataclasses.replace(strided, split=True)
    assert (phased.phases, phased.extents, phased.space) == ((2, 2), (8, 8), (7, 7))
    assert candidates(profile, dot, phased)[0]["merged"] == 2


def test_what_is_multiplied_quickly_is_handed_over_by_several_threads() -> None:
    """Matrix units multiply 24 channels by 144 in a tenth of the time that storing the 144 takes."""
    dot = dot_for(load_profile("sapphirerapids"), "uint8", "int8")
    assert dot is not None
    window = Window((1, 1), (1, 1), (1, 1))
    expanding = Shape((56, 56), False, 24, 144, 1, window)
    assert expanding.depth * 144 * 56 * 56 / dot.rate < 16384
    assert worth_forking(dot, expanding, 1)
    assert not worth_forking(dot, Shape((14, 14), False, 384, 64, 1, window), 1)
    assert worth_forking(dot, Shape((14, 14), False, 384, 64, 1, window), 8)
    assert worth_forking(dot, Shape((14, 14), False, 384, 64, 1, window), None)
    assert worth_forking(dot, Shape((7, 7), False, 960, 320, 1, window), 1)  # its filters come from memory
