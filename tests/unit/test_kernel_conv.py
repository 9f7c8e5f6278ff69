"""Convolution templates against numpy in float64: models with one convolution, and with operators around it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto, helper

from mmopt.backends.compute import Map, Source, Tensor
from mmopt.backends.cpu.choosing import Chooser
from mmopt.backends.cpu.emit import KernelEmitter
from mmopt.backends.cpu.kernels.conv import Window, channel_block, pack_filters
from mmopt.backends.cpu.kernels.conv_direct import DirectConvolution
from mmopt.backends.cpu.kernels.conv_patches import Convolved, Patch, direct_candidates, patch_of
from mmopt.backends.cpu.kernels.tile import lanes_of
from mmopt.backends.profile import Profile, load_profile
from mmopt.ir.module import Module
from tests.kernels import PROFILES, UNTOUCHED, WIDEST, Arrays, Case, profiles
from tests.kernels import check as check_kernels
from tests.programs import Example, Programs, check, grouped, model_of, wrong_answers


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A convolution: ``x`` is ``[N, C, *space]``, ``w`` is ``[O, C/groups, *kernel]``."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    groups: int = 1
    auto_pad: str = ""
    bias: bool = True
    dtype: str = "float32"

    @property
    def rank(self) -> int:
        return len(self.x) - 2

    def attributes(self) -> dict[str, object]:
        """As ONNX has them; what is not given is left out."""
        given = {"strides": self.strides, "dilations": self.dilations, "pads": self.pads, "auto_pad": self.auto_pad}
        return {"group": self.groups, **{name: value for name, value in given.items() if value}}

    def padding(self) -> list[tuple[int, int]]:
        """Elements before and after each spatial axis."""
        if not self.auto_pad.startswith("SAME"):
            pads = self.pads or (0,) * (2 * self.rank)
            return list(zip(pads[: self.rank], pads[self.rank :], strict=True))
        made = []
        strides, dilations = self.strides or (1,) * self.rank, self.dilations or (1,) * self.rank
        for extent, kernel, stride, dilation in zip(self.x[2:], self.w[2:], strides, dilations, strict=True):
            total = max(0, (-(-extent // stride) - 1) * stride + dilation * (kernel - 1) + 1 - extent)
            less, more = total // 2, total - total // 2
            made.append((less, more) if self.auto_pad == "SAME_UPPER" else (more, less))
        return made


def convolved(g: Geometry, x: np.ndarray, w: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """The definition, in float64."""
    strides, dilations = g.strides or (1,) * g.rank, g.dilations or (1,) * g.rank
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *g.padding()])
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, w.shape[2:], strict=True)]
    windows = sliding_window_view(padded, reach, tuple(range(2, 2 + g.rank)))
    steps = (
        slice(None),
        slice(None),
        *(slice(None, None, s) for s in strides),
        *(slice(None, None, d) for d in dilations),
    )
    windows = windows[steps]
    n, c = x.shape[:2]
    split = windows.reshape(n, g.groups, c // g.groups, *windows.shape[2:])
    filters = w.astype(np.float64).reshape(g.groups, w.shape[0] // g.groups, *w.shape[1:])
    space, taps = list(range(10, 10 + g.rank)), list(range(20, 20 + g.rank))
    y = np.einsum(split, [0, 1, 2, *space, *taps], filters, [1, 3, 2, *taps], [0, 1, 3, *space])
    y = y.reshape(n, w.shape[0], *y.shape[3:])
    return y if bias is None else y + bias.astype(np.float64).reshape(-1, *[1] * g.rank)


def example(g: Geometry, *, computed_filter: bool = False, symbolic: Sequence[int | str] | None = None) -> Example:
    """A model with one convolution; its filter is a weight unless ``computed_filter``."""
    random = np.random.default_rng(0)
    bias = random.standard_normal(g.w[0]).astype(g.dtype) if g.bias else None
    w, x = (random.standard_normal(s).astype(g.dtype) for s in (g.w, g.x))
    weights = {"w": w} | ({} if bias is None else {"bias": bias})
    feeds = {"x": x} | (weights if computed_filter else {})
    node = helper.make_node("Conv", ["x", *weights], ["y"], **g.attributes())
    kept = {} if computed_filter else weights
    model = model_of([node], feeds, ["y"], kept, symbolic={"x": symbolic} if symbolic else None)
    text = f"{g}{' computed filter' if computed_filter else ''}{f' {symbolic}' if symbolic else ''}"
    return Example(text, model, feeds, [convolved(g, x, w, bias)])


def ranks() -> list[Example]:
    """One to three spatial axes, 1×1 and larger, strided, dilated, padded on one side more than on the other."""
    return [example(g) for g in [
        Geometry((2, 16, 37), (32, 16, 3), pads=(1, 1)),
        Geometry((1, 3, 50), (16, 3, 5), strides=(2,), pads=(2, 1), bias=False),
        Geometry((3, 16, 9), (16, 16, 1)),
        Geometry((1, 16, 20), (16, 16, 4), strides=(4,)),
        Geometry((2, 32, 7, 9), (32, 32, 3, 3), pads=(1, 1, 1, 1)),
        Geometry((1, 16, 11, 10), (16, 16, 3, 2), strides=(2, 3), pads=(0, 1, 2, 1), bias=False),
        Geometry((1, 16, 12, 13), (16, 16, 3, 3), dilations=(2, 3), pads=(2, 3, 2, 3)),
        Geometry((2, 32, 5, 7), (48, 32, 1, 1)),
        Geometry((1, 16, 8, 8), (32, 16, 1, 1), strides=(2, 2)),
        Geometry((1, 3, 20, 20), (16, 3, 7, 7), strides=(2, 2), pads=(3, 3, 3, 3)),
        Geometry((1, 16, 4, 5, 6), (16, 16, 3, 3, 3), pads=(1,) * 6),
        Geometry((1, 2, 4, 5, 6), (16, 2, 2, 1, 3), strides=(1, 2, 2), pads=(1, 0, 0, 0, 1, 2)),
    ]]  # fmt: skip


def channels() -> list[Example]:
    """Channels that do not fill vectors, blocks or panels, on either side; a single row, column, image."""
    pairs = [(1, 1), (16, 1), (1, 16), (5, 7), (16, 20), (20, 16), (8, 24), (24, 40), (32, 70), (17, 33)]
    pairs += [(12, 36), (24, 4)]
    made = [example(Geometry((1, c, 5, 6), (o, c, 3, 3), pads=(1, 1, 1, 1))) for c, o in pairs]
    made += [
        example(Geometry((1, 16, 1, 1), (16, 16, 1, 1))),
        example(Geometry((1, 16, 3, 3), (16, 16, 3, 3))),
        example(Geometry((1, 16, 1, 40), (16, 16, 1, 3))),
        example(Geometry((1, 16, 40, 1), (16, 16, 3, 1))),
    ]
    return made


def groups() -> list[Example]:
    """Groups whose channels fill blocks and groups whose channels do not; depthwise with and without multiplier."""
    return [example(g) for g in [
        Geometry((2, 32, 6, 7), (32, 16, 3, 3), groups=2, pads=(1, 1, 1, 1)),
        Geometry((1, 32, 6, 7), (64, 8, 3, 3), groups=4, pads=(1, 1, 1, 1)),
        Geometry((1, 6, 6, 7), (32, 3, 3, 3), groups=2, pads=(1, 0, 1, 0)),
        Geometry((1, 6, 6, 7), (9, 2, 3, 3), groups=3, pads=(1, 0, 1, 0)),
        Geometry((1, 48, 5, 5), (96, 16, 1, 1), groups=3),
        Geometry((2, 32, 9, 17), (32, 1, 3, 3), groups=32, pads=(1, 1, 1, 1)),
        Geometry((1, 16, 30), (16, 1, 5), groups=16, strides=(2,), pads=(2, 2), bias=False),
        Geometry((1, 16, 5, 30), (16, 1, 5, 5), groups=16, pads=(4, 4, 1, 0)),
        Geometry((1, 16, 3, 2), (16, 1, 5, 5), groups=16, pads=(2, 2, 2, 2)),
        Geometry((1, 16, 9, 40), (16, 1, 3, 3), groups=16, strides=(2, 2), dilations=(1, 3), pads=(1, 3, 1, 3)),
        Geometry((1, 16, 4, 4, 5), (16, 1, 2, 2, 2), groups=16, dilations=(2, 1, 1)),
        Geometry((1, 20, 9, 5), (20, 1, 3, 3), groups=20, pads=(1, 1, 1, 1)),
        Geometry((2, 24, 9, 17), (24, 1, 5, 5), groups=24, strides=(2, 2), pads=(2, 2, 2, 2)),
        Geometry((1, 10, 9, 5), (10, 1, 3, 3), groups=10, pads=(1, 1, 1, 1)),
        Geometry((1, 48, 6, 7), (48, 24, 3, 3), groups=2, pads=(1, 1, 1, 1)),
        Geometry((1, 64, 6, 7), (64, 8, 3, 3), groups=8, pads=(1, 1, 1, 1)),
        Geometry((1, 16, 9, 5), (32, 1, 3, 3), groups=16, pads=(1, 1, 1, 1)),
        Geometry((1, 5, 9, 5), (10, 1, 3, 3), groups=5),
    ]]  # fmt: skip


def automatic_padding() -> list[Example]:
    """The three modes, over extents that do not divide by the stride, sides of unequal padding, dilation."""
    made = []
    for mode in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        made += [
            example(Geometry((1, 16, 7, 8), (16, 16, 3, 4), strides=(2, 3), auto_pad=mode)),
            example(Geometry((1, 16, 9, 12), (16, 16, 2, 3), dilations=(3, 2), auto_pad=mode)),
            example(Geometry((1, 16, 8), (16, 1, 4), groups=16, auto_pad=mode)),
            example(Geometry((1, 16, 3), (16, 16, 1), strides=(2,), auto_pad=mode)),
        ]
    return made


def other_types() -> list[Example]:
    """Double precision by the templates, half precision and computed filters by the generic loops."""
    plain = Geometry((2, 16, 6, 7), (20, 16, 3, 3), pads=(1, 0, 1, 2))
    deep = Geometry((1, 16, 6, 7), (16, 1, 3, 3), groups=16, pads=(1, 1, 1, 1))
    return [
        example(dataclasses.replace(plain, dtype="float64")),
        example(dataclasses.replace(deep, dtype="float64")),
        example(dataclasses.replace(plain, dtype="float16")),
        example(dataclasses.replace(plain, bias=False), computed_filter=True),
        example(deep, computed_filter=True),
        example(dataclasses.replace(plain, x=(2, 16, 6, 7), w=(4, 4, 1, 2), groups=4, pads=()), computed_filter=True),
    ]


def symbolic() -> list[Example]:
    """Batch and spatial extents known at run time only."""
    made = []
    for n, h, w in [(1, 5, 7), (2, 9, 3), (3, 16, 33)]:
        plain = Geometry((n, 16, h, w), (20, 16, 3, 3), pads=(1, 1, 1, 1))
        made += [
            example(plain, symbolic=["n", 16, "h", "w"]),
            example(
                dataclasses.replace(plain, strides=(2, 2), auto_pad="SAME_UPPER", pads=()), symbolic=["n", 16, "h", "w"]
            ),
            example(Geometry((n, 32, h, w), (32, 32, 1, 1)), symbolic=["n", 32, "h", "w"]),
            example(Geometry((n, 32, h, w), (32, 1, 3, 3), groups=32, pads=(1, 1, 1, 1)), symbolic=["n", 32, "h", "w"]),
            example(Geometry((n, 6, h, w), (9, 2, 3, 3), groups=3), symbolic=["n", 6, "h", "w"]),
        ]
    return made


def surroundings() -> list[Example]:
    """Convolutions one after another and operators between them: what a blocked layout must survive."""
    return [
        _chain("relu, pool, conv", [
            ("Conv", {"pads": [1, 1, 1, 1]}, (32, 16, 3, 3)), ("Relu", {}, None),
            ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, None),
            ("Conv", {}, (16, 32, 1, 1)),
        ]),
        _chain("average with padding", [
            ("Conv", {}, (16, 16, 1, 1)), ("AveragePool", {"kernel_shape": [2, 3], "pads": [1, 1, 0, 1]}, None),
        ]),
        _chain("average that counts padding, rounded up", [
            ("Conv", {}, (16, 16, 1, 1)),
            ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1, "strides": [2, 2],
                             "ceil_mode": 1}, None),
        ]),
        _chain("global average", [("Conv", {}, (32, 16, 3, 3)), ("GlobalAveragePool", {}, None)]),
        _chain("lp pool", [("Conv", {}, (16, 16, 1, 1)), ("LpPool", {"kernel_shape": [2, 2], "p": 2}, None)]),
        _chain("dilated pool", [
            ("Conv", {}, (16, 16, 1, 1)), ("MaxPool", {"kernel_shape": [2, 2], "dilations": [2, 3]}, None),
            ("Sigmoid", {}, None),
        ]),
        _chain("channels in the middle that fill no block", [
            ("Conv", {}, (20, 16, 1, 1)), ("Tanh", {}, None), ("Conv", {"pads": [1, 0, 1, 0]}, (16, 20, 3, 1)),
        ]),
        _chain("transposed", [("Conv", {}, (16, 16, 1, 1)), ("Transpose", {"perm": [0, 2, 3, 1]}, None)]),
        _chain("reduced over channels", [("Conv", {}, (32, 16, 1, 1)), ("ReduceMean", {"keepdims": 1}, [1])]),
        _chain("flattened", [("Conv", {}, (32, 16, 3, 3)), ("Relu", {}, None), ("Flatten", {}, None)]),
        _chain("other widths of element in between", [
            ("Conv", {}, (32, 16, 1, 1)), ("Cast", {"to": TensorProto.DOUBLE}, None), ("Conv", {}, (16, 32, 3, 3)),
            ("Cast", {"to": TensorProto.FLOAT}, None), ("Conv", {}, (16, 16, 1, 1)),
        ]),
        _chain("half precision in between", [
            ("Conv", {}, (32, 16, 1, 1)), ("Cast", {"to": TensorProto.FLOAT16}, None),
            ("Cast", {"to": TensorProto.FLOAT}, None), ("Conv", {}, (16, 32, 1, 1)),
        ]),
        *_operands(),
    ]  # fmt: skip


Step = tuple[str, dict[str, object], "Sequence[int] | None"]
"""Operator, attributes, and a filter's shape or axes."""


def _chain(name: str, steps: Sequence[Step]) -> Example:
    """Operators one after another. Where onnxruntime lacks double precision it is asked for single precision."""
    random = np.random.default_rng(0)
    feeds = {"x": random.standard_normal((2, 16, 7, 6)).astype(np.float32)}
    extras = [None if s is None else random.standard_normal(s) / 4 if o == "Conv" else np.array(s) for o, _, s in steps]
    model = _chained(steps, extras, feeds)
    casts = [a["to"] for o, a, _ in steps if o == "Cast"]
    if TensorProto.DOUBLE not in casts:
        return Example(name, model, feeds)
    kept = [n for n, (op, _, _) in enumerate(steps) if op != "Cast"]
    single = _chained([steps[n] for n in kept], [extras[n] for n in kept], feeds)
    return Example(name, model, feeds, Example(name, single, feeds).expected())


def _chained(
    steps: Sequence[Step], extras: Sequence[np.ndarray | None], feeds: dict[str, np.ndarray]
) -> onnx.ModelProto:
    value, dtype = "x", np.dtype(np.float32)
    weights: dict[str, np.ndarray] = {}
    nodes = []
    for number, ((op, attributes, _), extra) in enumerate(zip(steps, extras, strict=True)):
        inputs = [value]
        if op == "Cast":
            dtype = helper.tensor_dtype_to_np_dtype(attributes["to"])
        if extra is not None:
            inputs.append(f"extra{number}")
            weights[inputs[-1]] = extra.astype(dtype) if op == "Conv" else extra
        value = f"value{number}"
        nodes.append(helper.make_node(op, inputs, [value], **attributes))
    return model_of(nodes, feeds, [value], weights)


def _operands() -> list[Example]:
    """Elementwise operators whose other operand is a weight, a scalar, a channel, a plain tensor, a blocked one."""
    random = np.random.default_rng(0)

    def data(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    feeds = {"x": data(2, 16, 5, 6), "r": data(2, 32, 5, 6), "s": data(1, 32, 1, 1), "t": data(6)}
    weights = {"w": data(32, 16, 1, 1), "v": data(32, 32, 1, 1), "c": data(32, 1, 1), "full": data(2, 32, 5, 6)}
    weights |= {"one": np.array(0.5, np.float32), "slope": data(32, 1, 1), "image": data(1, 32, 5, 6)}
    made = []
    for other in ("r", "s", "t", "c", "full", "one", "image", "z"):
        used = ["y", "z"] if other == "z" else ["y", other]
        for pair in (used, used[::-1]):
            nodes = [
                helper.make_node("Conv", ["x", "w"], ["y"]),
                helper.make_node("Conv", ["y", "v"], ["z"]),
                helper.make_node("Sub", pair, ["a"]),
                helper.make_node("PRelu", ["a", "slope"], ["b"]),
                helper.make_node("Conv", ["b", "v"], ["d"]),
            ]
            made.append(Example(f"{pair}", model_of(nodes, feeds, ["b", "d"], weights), feeds))
    return made


def _symbolic_operands() -> list[Example]:
    """A residual block of symbolic batch and size: bias, sum, activation, and a second use of the sum."""
    random = np.random.default_rng(0)
    weights = {"w": random.standard_normal((16, 16, 3, 3)).astype(np.float32) / 8}
    weights["b"] = random.standard_normal(16).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "x"], ["d"]),
        helper.make_node("Relu", ["d"], ["e"]),
        helper.make_node("Conv", ["e", "w"], ["f"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["e", "f"], ["g"]),
        helper.make_node("Clip", ["g"], ["y"]),
    ]
    made = []
    for n, h, w in [(1, 4, 5), (3, 7, 16)]:
        feeds = {"x": random.standard_normal((n, 16, h, w)).astype(np.float32)}
        model = model_of(nodes, feeds, ["y", "e"], weights, symbolic={"x": ["n", 16, "h", "w"]})
        made.append(Example(f"residual block {n}×{h}×{w}", model, feeds))
    return made


def _random_geometry(random: np.random.Generator, lanes: int) -> Geometry:
    """Channels in whole blocks or a few, extents up to a little more than a tile's, any taps and steps."""
    rank, groups = int(random.integers(1, 4)), int(random.choice([1, 1, 2]))
    half = channel_block(lanes // 2, lanes)
    depth = int(random.choice([lanes, 2 * lanes, half, 3 * half, 3])) if groups == 1 else lanes
    whole = groups > 1 or random.random() < 0.4
    out = groups * half * int(random.integers(1, 7)) if whole else int(random.integers(1, 4 * lanes))
    taps = tuple(int(k) for k in random.integers(1, 4, rank))
    strides = tuple(int(s) for s in random.integers(1, 3, rank))
    space = tuple(int(k + e) for k, e in zip(taps, random.integers(0, 34 if rank == 1 else 9, rank), strict=True))
    return Geometry((int(random.integers(1, 3)), depth * groups, *space), (out, depth, *taps), strides, groups=groups)


def cut_up(profile: Profile, count: int) -> list[Case]:
    """Random convolutions, each cut in a random one of the ways that tuning may try, with a residual and without."""
    random, lanes = np.random.default_rng(7), lanes_of(profile, "float32")
    made = []
    for number in range(count):
        g = _random_geometry(random, lanes)
        block = channel_block(g.w[1], lanes)
        flat = block > 1 and set(g.w[2:]) == set(g.strides) == {1}
        space = tuple((x - k) // s + 1 for x, k, s in zip(g.x[2:], g.w[2:], g.strides, strict=True))
        walked = (int(np.prod(space)),) if flat else space
        work = Convolved(g.x[0], g.w[1], g.w[0] // g.groups, g.groups, g.w[2:], g.strides, walked, "float32")
        patch = patch_of(direct_candidates(profile, work)[int(random.integers(len(direct_candidates(profile, work))))])
        patch = dataclasses.replace(patch, parts=int(random.choice([1, 2, 3, 50])), ahead=True, inputs=number % 2 == 0)
        made.append(_cut_case(g, block, patch, flat=flat, residual=number % 3 == 0))
    return made


def _cut_case(g: Geometry, block: int, patch: Patch, *, flat: bool, residual: bool) -> Case:
    data = Arrays()
    x, w = data.data(g.x, "float32"), data.data(g.w, "float32")
    want = convolved(g, x, w, None)
    source = data.constant(_in_blocks(x, block) if block > 1 else x)
    filters = data.constant(np.ascontiguousarray(pack_filters(w, g.groups, block, patch.columns)))
    window = Window(g.w[2:], g.strides, (1,) * g.rank)
    fitting = channel_block(g.w[0] // g.groups, patch.lanes)
    together = fitting if fitting > 1 else patch.lanes
    nest = DirectConvolution(
        source, filters, channels=g.w[0], groups=g.groups, block=block, window=window, patch=patch,
        plain=block == 1, result_block=together, flat=flat,
    )  # fmt: skip
    result: Tensor = nest.output
    blocks = np.zeros((g.x[0], -(-g.w[0] // together) * together, *want.shape[2:]))
    blocks[:, : g.w[0]] = want
    expected = _in_blocks(blocks, together)
    if residual:
        other = data.constant(np.random.default_rng(1).standard_normal(expected.shape).astype(np.float32))
        result = Map(result.shape, "float32", lambda *at: nest.output[at] + other[at], "sum")
        expected = expected + data[other]
    # Lanes of channels that are not there keep what was in memory.
    there = np.arange(expected.shape[1])[:, None] * together + np.arange(together) < g.w[0]
    there = there.reshape(1, expected.shape[1], *[1] * g.rank, together)
    return data.case(f"{g} {patch}", result, np.where(there, expected, UNTOUCHED))


def _in_blocks(x: np.ndarray, lanes: int) -> np.ndarray:
    n, c, *space = x.shape
    split = x.reshape(n, c // lanes, lanes, *space)
    return np.ascontiguousarray(np.moveaxis(split, 2, -1))


@pytest.mark.parametrize("profile", PROFILES)
def test_any_cut_is_right(profile: str) -> None:
    check_kernels(cut_up(profiles()[profile], 24), profile)


def test_large_layers_are_cut_into_tall_tiles() -> None:
    """The first layers of ResNet-50 and its last: as many rows as registers hold, and weights that come ahead."""
    profile = profiles()[WIDEST]
    early = Convolved(1, 64, 256, 1, (1, 1), (1, 1), (3136,), "float32")
    late = Convolved(1, 512, 512, 1, (3, 3), (2, 2), (7, 7), "float32")
    chosen = [patch_of(Chooser().choose(w.workload(), direct_candidates(profile, w))) for w in (early, late)]
    if profile.vector_bytes == 64:
        assert [(p.height, p.width, p.vectors) for p in chosen] == [(1, 14, 2), (2, 7, 2)]
    assert all(p.ahead for p in chosen)
    assert chosen[0].parts > 1
    assert chosen[1].parts == 1


def branches() -> list[Example]:
    """Branches that split off, and come together by joining and adding: what DenseNets, U-Nets and their like do."""
    random = np.random.default_rng(0)

    def filters(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) / 8).astype(np.float32)

    weights = {"w": filters(32, 16, 3, 3), "v": filters(16, 32, 1, 1), "u": filters(16, 48, 3, 3)}
    weights |= {"halves": np.array([16, 16]), "uneven": np.array([8, 24]), "t": filters(16, 16, 1, 1)}
    weights |= {"narrow": filters(24, 16, 3, 3), "wide": filters(72, 24, 1, 1), "each": filters(72, 1, 3, 3)}
    weights |= {"back": filters(24, 72, 1, 1), "end": filters(16, 24, 1, 1)}
    conv = {name: {"pads": [1, 1, 1, 1]} if weights[name].shape[-1] == 3 else {} for name in "wvut"}

    def apply(name: str, x: str, y: str) -> onnx.NodeProto:
        return helper.make_node("Conv", [x, name], [y], **conv[name])

    feeds = {"x": random.standard_normal((2, 16, 6, 5)).astype(np.float32)}
    dense = [apply("w", "x", "a"), apply("v", "a", "b"), helper.make_node("Concat", ["a", "b"], ["c"], axis=1)]
    dense += [helper.make_node("Relu", ["c"], ["d"]), apply("u", "d", "y")]
    wide = [apply("w", "x", "a"), helper.make_node("Concat", ["a", "a"], ["b"], axis=3), apply("v", "b", "y")]
    mixed = [apply("v", "a", "b"), helper.make_node("Concat", ["x", "b"], ["c"], axis=1), apply("v", "c", "y")]

    def inverted() -> list[onnx.NodeProto]:
        """As MobileNet has them: a few channels, many, each for itself, few again; none of them in whole vectors."""
        each: dict[str, Any] = {"group": 72, "pads": [1, 1, 1, 1]}
        return [
            helper.make_node("Conv", ["x", "narrow"], ["a"], pads=[1, 1, 1, 1]),
            helper.make_node("Conv", ["a", "wide"], ["b"]),
            helper.make_node("Clip", ["b"], ["c"]), helper.make_node("Conv", ["c", "each"], ["d"], **each),
            helper.make_node("Relu", ["d"], ["e"]), helper.make_node("Conv", ["e", "back"], ["f"]),
            helper.make_node("Add", ["f", "a"], ["g"]), helper.make_node("Conv", ["g", "end"], ["y"]),
        ]  # fmt: skip

    def halved(sizes: str) -> list[onnx.NodeProto]:
        made = [apply("w", "x", "a"), helper.make_node("Split", ["a", sizes], ["b", "c"], axis=1)]
        return [*made, helper.make_node("Concat", ["c", "b"], ["d"], axis=1), apply("v", "d", "y")]

    return [
        Example("dense", model_of(dense, feeds, ["y"], weights), feeds),
        Example("joined along a line", model_of(wide, feeds, ["y"], weights), feeds),
        Example("joined with another layout", model_of([apply("w", "x", "a"), *mixed], feeds, ["y"], weights), feeds),
        Example("halves", model_of(halved("halves"), feeds, ["y"], weights), feeds),
        Example("pieces that are not whole blocks", model_of(halved("uneven"), feeds, ["y"], weights), feeds),
        Example("inverted, of half vectors", model_of(inverted(), feeds, ["y"], weights), feeds),
    ]


def test_layouts_change_at_borders_only() -> None:
    """Between the first convolution and the last nothing is brought into another layout."""
    for example in branches():
        kernels = Programs([Module(ir.from_proto(example.model))], WIDEST).kernels
        changes = [name for name in kernels if name.startswith(("blocks", "plain"))]
        expected = ["blocks"] if "another layout" in example.name or "not whole" in example.name else []
        assert changes == expected, (example.name, kernels)


FAMILIES: list[Callable[[], list[Example]]] = [
    ranks, channels, groups, automatic_padding, other_types, symbolic, surroundings, branches,
]  # fmt: skip


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_convolutions(family: Callable[[], list[Example]], profile: str) -> None:
    check(family(), profile)


@pytest.mark.parametrize("profile", PROFILES)
def test_convolutions_in_fusion_groups(profile: str) -> None:
    """Operators of a group stay computations until the whole group is one kernel."""
    wrong = wrong_answers([*surroundings(), *branches(), *_symbolic_operands()], profile, prepare=grouped)
    assert not wrong, "\n".join(wrong)


def test_channels_lie_in_the_largest_blocks_that_divide_them() -> None:
    assert [channel_block(c, 16) for c in (32, 24, 20, 18, 3)] == [16, 8, 4, 1, 1]
    assert [channel_block(c, 8) for c in (32, 24, 20, 18, 3)] == [8, 8, 4, 1, 1]
    assert [channel_block(c, 4) for c in (24, 18, 3)] == [4, 1, 1]
    assert [channel_block(c, 2) for c in (24, 18, 3)] == [2, 2, 1]  # a vector of two doubles


def test_what_is_added_is_fetched_and_what_is_stored_is_not() -> None:
    """Fetching the places of results costs a cache line's time without saving any."""
    patch = Patch(1, 14, 2, 16, ahead=True)
    x, w = Source((1, 4, 28, 28, 16), "float32", "x"), Source((1, 4, 1, 1, 16, 32), "float32", "w")
    other = Source((1, 2, 28, 28, 16), "float32", "other")
    window = Window((1, 1), (1, 1), (1, 1))
    nest = DirectConvolution(x, w, channels=32, groups=1, block=16, window=window, patch=patch, plain=False, flat=True)
    total = Map(nest.output.shape, "float32", lambda *at: nest.output[at] + other[at], "total")

    def fetched(result: Tensor) -> set[str]:
        text = str(KernelEmitter([result], load_profile("sapphirerapids")).build().function)
        return set(re.findall(r"llvm.prefetch\D+address_of\((\w+)", text))

    assert fetched(nest.output) == {"w"}
    assert fetched(total) == {"w", "other"}


def test_window_extents_and_positions() -> None:
    window = Window((3, 2), (2, 1), (1, 4))
    assert [int(e) for e in window.output((11, 9))] == [5, 5]


def test_packed_filters_hold_each_group_apart() -> None:
    w = np.arange(6 * 4 * 3.0).reshape(6, 4, 3)
    filters = pack_filters(w, groups=2, block=2, columns=2)
    assert filters.shape == (4, 2, 3, 2, 2)
    for panel, first in enumerate((0, 2, 3, 5)):
        np.testing.assert_array_equal(filters[panel, 1, 2, 1, 0], w[first, 3, 2])
    np.testing.assert_array_equal(filters[1, ..., 1], 0)
