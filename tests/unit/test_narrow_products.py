"""Products in narrow numbers against exact oracles: quantized, bfloat16, weight-only; on every instruction set."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import onnx
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tvm import tirx

from mmopt.backends.cpu.dot import dot_for
from mmopt.backends.cpu.kernels import matmul_dot, matmul_weight_only
from mmopt.backends.cpu.kernels.matmul_weight_only import Weights, pack_factors, pack_weights
from mmopt.backends.cpu.pipeline import code_generation, target_of
from mmopt.backends.profile import load_profile
from mmopt.lowering.compiler import CompileOptions
from mmopt.lowering.partition import partition
from mmopt.lowering.program import ProgramBuilder
from mmopt.runtime.cpu import missing_features, running_features
from tests.kernels import WIDEST
from tests.programs import Example, Programs, check, grouped, model_of, wrong_answers

SHAPES = [
    (1, 1, 1),
    (1, 64, 33),
    (2, 7, 16),
    (5, 48, 17),
    (16, 64, 32),
    (19, 100, 70),
    (33, 128, 64),
    (67, 36, 5),
    (801, 20, 170),
]
"""Rows, depth, columns: single ones, whole tiles, tails in each direction, several chunks of rows."""

LEVELS = ["x86-64-v3", "skylake-avx512", "icelake", "znver4", "sapphirerapids"]


def levels() -> list[object]:
    """Every instruction set this machine has; only the richest among the quick tests."""
    available = running_features()
    here = [level for level in LEVELS if not missing_features(load_profile(level).features, available)]
    absent = pytest.mark.skip(reason="this machine lacks its features")
    return [
        pytest.param(level, marks=absent if level not in here else () if level == here[-1] else pytest.mark.slow)
        for level in LEVELS
    ]


def whole(random: np.random.Generator, dtype: str, shape: Sequence[int]) -> np.ndarray:
    """Integers over the whole range of a type."""
    info = ml_dtypes.iinfo(dtype)
    return random.integers(int(info.min), int(info.max) + 1, tuple(shape)).astype(dtype)


def steps(random: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Scales that are powers of two, so that float32 arithmetic on small integers is exact."""
    return np.asarray(2.0 ** random.integers(-9, -5, tuple(shape)), np.float32)


@dataclasses.dataclass(frozen=True)
class Dense:
    """A quantized layer: dequantize both operands, multiply, add a bias, rectify, quantize.

    Attributes:
        a: Type of the activations.
        w: Type of the weights.
        single: One scale for all weights instead of one for each column.
        centred: Whether weights have no zero point.
        turned: The weight is stored transposed: by a Gemm (``gemm``) or before a MatMul (``transpose``).
        result: Type of the result; float32 leaves out the last quantization.
    """

    a: str = "uint8"
    w: str = "int8"
    single: bool = False
    centred: bool = True
    turned: str = ""
    result: str = "uint8"

    def example(self, sizes: tuple[int, int, int], *, symbolic: bool = False) -> Example:
        rows, depth, columns = sizes
        random = np.random.default_rng(rows + depth + columns)
        x, w = whole(random, self.a, (rows, depth)), whole(random, self.w, (depth, columns))
        per = () if self.single else (columns,)
        scales = {"sx": np.float32(2.0**-7), "sw": steps(random, per), "sy": np.float32(2.0**-2)}
        zx, zy = whole(random, self.a, ()), whole(random, self.result if self.result != "float32" else "int8", ())
        zw = np.zeros(per, self.w) if self.centred else whole(random, self.w, per)
        bias = (random.integers(-64, 64, columns) / 8).astype(np.float32)
        weights = {"w": w.T if self.turned else w, "zx": np.asarray(zx), "zw": np.asarray(zw), "zy": np.asarray(zy)}
        weights |= {"b": bias} | {name: np.asarray(s) for name, s in scales.items()}
        made = self._model(x, weights, [["rows", depth]] if symbolic else [list(x.shape)])
        total = (x.astype(np.int64) - int(zx)) @ (w.astype(np.int64) - zw.astype(np.int64))
        y = np.maximum(total * (np.float64(scales["sx"]) * scales["sw"].astype(np.float64)) + bias, 0)
        if self.result != "float32":
            info = np.iinfo(self.result)
            y = np.clip(np.rint(y / scales["sy"]) + int(zy), info.min, info.max)
        return Example(f"{self} {sizes}", made, {"x": x}, [y.astype(self.result)])

    def _model(self, x: np.ndarray, weights: dict[str, np.ndarray], shapes: list[list[object]]) -> onnx.ModelProto:
        axis = 0 if self.turned else 1
        nodes = [
            helper.make_node("DequantizeLinear", ["x", "sx", "zx"], ["xf"]),
            helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wf"], axis=axis),
        ]
        if self.turned == "gemm":
            nodes.append(helper.make_node("Gemm", ["xf", "wf", "b"], ["sum"], transB=1))
        else:
            second = "wf"
            if self.turned:
                nodes.append(helper.make_node("Transpose", ["wf"], ["wt"], perm=[1, 0]))
                second = "wt"
            nodes.append(helper.make_node("MatMul", ["xf", second], ["product"]))
            nodes.append(helper.make_node("Add", ["product", "b"], ["sum"]))
        nodes.append(helper.make_node("Relu", ["sum"], ["rest"]))
        if self.result != "float32":
            nodes.append(helper.make_node("QuantizeLinear", ["rest", "sy", "zy"], ["y"]))
        else:
            nodes[-1].output[0] = "y"
        return model_of(nodes, {"x": x}, ["y"], weights, symbolic={"x": shapes[0]}, opset=21)


def quantized() -> list[Example]:
    """Every combination of types on a few shapes, and every shape with the commonest types."""
    made = [Dense().example(sizes) for sizes in SHAPES]
    made += [Dense().example(sizes, symbolic=True) for sizes in ((1, 64, 33), (19, 100, 70), (37, 64, 64))]
    for a, w, single, centred in itertools.product(("uint8", "int8"), ("int8", "uint8"), (False, True), (False, True)):
        made.append(Dense(a, w, single, centred, result=a).example((19, 36, 40)))
        made.append(Dense(a, w, single, centred, result="float32").example((3, 128, 32)))
    made += [Dense(turned=how, single=one).example((9, 64, 48)) for how in ("gemm", "transpose") for one in (0, 1)]
    return made


def integer_operators() -> list[Example]:
    """MatMulInteger, QLinearMatMul and dynamic quantization with constant weights."""
    made = []
    random = np.random.default_rng(1)
    for (rows, depth, columns), (a, b) in itertools.product(
        [(1, 64, 16), (7, 33, 19), (40, 128, 65)], [("uint8", "int8"), ("int8", "int8"), ("uint8", "uint8")]
    ):
        x, w = whole(random, a, (2, rows, depth)), whole(random, b, (depth, columns))
        zx, zw = whole(random, a, ()), whole(random, b, (columns,))
        total = (x.astype(np.int64) - int(zx)) @ (w.astype(np.int64) - zw)
        node = helper.make_node("MatMulInteger", ["x", "w", "zx", "zw"], ["y"])
        held = {"w": w, "zx": np.asarray(zx), "zw": zw}
        model = model_of([node], {"x": x}, ["y"], held, opset=21)
        made.append(Example(f"MatMulInteger {a} {b}", model, {"x": x}, [total.astype(np.int32)]))
        held |= {"sx": np.float32(0.5), "sw": np.float32(0.25), "sy": np.float32(64), "zy": np.asarray(zx)}
        held["zw"] = np.asarray(zw[0])
        names = ["x", "sx", "zx", "w", "sw", "zw", "sy", "zy"]
        node = helper.make_node("QLinearMatMul", names, ["y"])
        total = (x.astype(np.int64) - int(zx)) @ (w.astype(np.int64) - int(zw[0]))
        info = np.iinfo(a)
        y = np.clip(np.rint(total * 0.125 / 64) + int(zx), info.min, info.max).astype(a)
        made.append(Example(f"QLinearMatMul {a} {b}", model_of([node], {"x": x}, ["y"], held, opset=21), {"x": x}, [y]))
    return [*made, dynamic((5, 64, 33)), dynamic((33, 100, 16))]


def dynamic(sizes: tuple[int, int, int]) -> Example:
    """Activations quantized by their own range, multiplied and scaled back."""
    rows, depth, columns = sizes
    random = np.random.default_rng(2)
    x, w = random.standard_normal((rows, depth)).astype(np.float32), whole(random, "int8", (depth, columns))
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["total"]),
        helper.make_node("Cast", ["total"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "sw"], ["scale"]),
        helper.make_node("Mul", ["float", "scale"], ["y"]),
    ]
    scale = random.uniform(0.001, 0.01, columns).astype(np.float32)
    return Example(f"dynamic {sizes}", model_of(nodes, {"x": x}, ["y"], {"w": w, "sw": scale}, opset=21), {"x": x})


def rounded(data: np.ndarray) -> np.ndarray:
    return data.astype(ml_dtypes.bfloat16).astype(np.float64)


def halves() -> list[Example]:
    """Both operands rounded to bfloat16 and widened again around a product; the oracle sums in float64."""
    made = []
    random = np.random.default_rng(3)
    down, up = TensorProto.BFLOAT16, TensorProto.FLOAT
    for rows, depth, columns in SHAPES:
        x = random.standard_normal((rows, depth)).astype(np.float32)
        w = random.standard_normal((depth, columns)).astype(np.float32)
        b = random.standard_normal(columns).astype(np.float32)
        nodes = [
            helper.make_node("Cast", ["x"], ["xb"], to=down),
            helper.make_node("Cast", ["xb"], ["xf"], to=up),
            helper.make_node("Cast", ["w"], ["wf"], to=up),
            helper.make_node("MatMul", ["xf", "wf"], ["product"]),
            helper.make_node("Add", ["product", "b"], ["y"]),
        ]
        want = rounded(x) @ rounded(w) + b
        for known in (rows, "rows"):
            model = model_of(
                nodes, {"x": x}, ["y"], {"w": w.astype(ml_dtypes.bfloat16), "b": b}, symbolic={"x": [known, depth]}
            )
            made.append(
                Example(f"bfloat16 {known} {(rows, depth, columns)}", model, {"x": x}, [want.astype("float32")])
            )
    return made


@dataclasses.dataclass(frozen=True)
class Stored:
    """A float product with a quantized weight.

    Attributes:
        dtype: Type of the weight.
        block: Depth that shares scales; 0 for scales by column, −1 for one scale.
        moved: Whether there are zero points.
    """

    dtype: str
    block: int = 0
    moved: bool = False

    def example(self, sizes: tuple[int, int, int], *, symbolic: bool = False) -> Example:
        rows, depth, columns = sizes
        random = np.random.default_rng(depth)
        x, q = random.standard_normal((rows, depth)).astype(np.float32), whole(random, self.dtype, (depth, columns))
        shape = {0: (columns,), -1: ()}.get(self.block, (-(-depth // max(self.block, 1)), columns))
        scale = random.uniform(0.01, 0.02, shape).astype(np.float32)
        zero = whole(random, self.dtype, shape) if self.moved else np.zeros(shape, self.dtype)
        options = {"axis": 0, "block_size": self.block} if self.block > 0 else {"axis": 1}
        nodes = [
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], **options),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ]
        held = {"q": np.asarray(q), "s": np.asarray(scale), "z": np.asarray(zero)}
        shapes = {"x": ["rows" if symbolic else rows, depth]}
        model = model_of(nodes, {"x": x}, ["y"], held, symbolic=shapes, opset=21)
        wide = [np.asarray(v).astype(np.float64) for v in (scale, zero)]
        if self.block > 0:
            wide = [np.repeat(v, self.block, 0)[:depth] for v in wide]
        y = x.astype(np.float64) @ ((q.astype(np.float64) - wide[1]) * wide[0])
        return Example(f"{self} {sizes}", model, {"x": x}, [y.astype(np.float32)])


def stored() -> list[Example]:
    """Weights of eight and four bits, scales of each form, rows few and many."""
    made = []
    for dtype, block, moved in itertools.product(("int8", "uint8", "int4", "uint4"), (0, -1, 32), (False, True)):
        made += [Stored(dtype, block, moved).example(sizes) for sizes in ((1, 96, 70), (13, 75, 33))]
    made += [Stored("int4").example(sizes) for sizes in SHAPES]
    made += [Stored("int8", 16).example(sizes) for sizes in SHAPES if sizes[1] >= 16]
    return [*made, Stored("int4", 32).example((21, 64, 40), symbolic=True)]


FAMILIES: list[Callable[[], list[Example]]] = [quantized, integer_operators, halves, stored]


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_products(family: Callable[[], list[Example]], level: str) -> None:
    profile = load_profile(level)
    wrong = wrong_answers(family(), profile, prepare=grouped)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_products_outside_of_groups(family: Callable[[], list[Example]]) -> None:
    """Each operator by itself: what was dequantized or widened is remembered between kernels."""
    check(family()[::4], WIDEST)


# -- which kernels -----------------------------------------------------------------------------------------------


def templates(example: Example) -> list[str]:
    return Programs([grouped(example.model)], WIDEST).templates


def test_a_quantized_layer_is_one_kernel() -> None:
    example = Dense().example((32, 64, 64))
    programs = Programs([grouped(example.model)], WIDEST)
    assert programs.templates == ["matmul_int8"]
    (got,) = programs.run(0, example.feeds)
    np.testing.assert_array_equal(got, example.expected()[0])


def test_quantizing_works_on_whole_registers() -> None:
    """LLVM would split these vectors of 64 bytes into halves for some processors."""
    profile = load_profile("sapphirerapids")
    builder = ProgramBuilder(profile)
    model = Dense().example((32, 64, 64)).model
    (scale,) = [i for i in model.graph.initializer if i.name == "sy"]
    scale.CopyFrom(numpy_helper.from_array(np.float32(0.3), "sy"))  # no power of two
    partition(grouped(model), "main", builder, CompileOptions(allow_fallback=False))
    (kernel,) = [f for f in builder.module().functions.values() if isinstance(f, tirx.PrimFunc)]
    with code_generation():
        module = tvm.compile(tvm.IRModule({"f": kernel.with_attr("global_symbol", "f")}), target=target_of(profile))
    text = module.mod.inspect_source("asm")
    assert re.search(r"vminps\b.*%zmm", text)
    assert not re.search(r"v(min|max|mul|round|rndscale)ps\b.*%ymm", text)
    assert not re.search(r"v(round|rndscale|cvttps2dq)", text)  # a sum rounds and converts what a product gives


def test_weights_stay_packed() -> None:
    example = Stored("int4").example((1, 256, 256))
    programs = Programs([grouped(example.model)], WIDEST)
    assert programs.templates == ["matmul_weight_only"]
    assert sum(w.nbytes for w in programs.weights.values()) <= 256 * 256 // 2 + 2048
    assert templates(Stored("int8").example((4, 64, 64))) == ["matmul_weight_only"]


def test_halves_are_multiplied_as_such() -> None:
    assert "matmul_bf16" in templates(halves()[12])


def test_what_is_dequantized_can_be_used_otherwise_too() -> None:
    """By a product, an addition, a gather, and as a result of the model."""
    random = np.random.default_rng(4)
    x, w = whole(random, "uint8", (8, 64)), whole(random, "int8", (64, 64))
    held = {"w": w, "s": np.asarray(np.float32(0.25)), "z": np.asarray(np.uint8(7)), "rows": np.array([3, 0])}
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "s", "z"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["wf"]),
        helper.make_node("MatMul", ["xf", "wf"], ["product"]),
        helper.make_node("Add", ["product", "xf"], ["sum"]),
        helper.make_node("Gather", ["xf", "rows"], ["some"]),
        helper.make_node("Gather", ["wf", "rows"], ["others"]),
    ]
    model = model_of(nodes, {"x": x}, ["sum", "some", "others", "xf"], held, opset=21)
    xf, wf = (x.astype(np.float64) - 7) / 4, w / 4.0
    want = [xf @ wf + xf, xf[[3, 0]], wf[[3, 0]], xf]
    example = Example("shared", model, {"x": x}, [w.astype(np.float32) for w in want])
    check([example], WIDEST)
    assert "matmul_int8" in Programs([grouped(model)], WIDEST).templates


# -- rounding ----------------------------------------------------------------------------------------------------


def quantizer(scale: float, count: int) -> onnx.ModelProto:
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    held = {"s": np.asarray(np.float32(scale)), "z": np.asarray(np.int8(-3))}
    return model_of([node], {"x": np.zeros(count, np.float32)}, ["y"], held, opset=21)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.floats(2.0**-20, 2.0**13, width=32), min_size=4, max_size=4))
def test_quantizing_rounds_as_a_division_would(scales: list[float]) -> None:
    """At every half step, its neighbours, far beyond the range, at infinities."""
    examples = []
    for value in scales:
        scale = np.float32(value)
        half = (np.arange(-140, 140).astype(np.float32) + np.float32(0.5)) * scale
        x = np.concatenate([half, np.nextafter(half, np.float32(np.inf)), np.nextafter(half, np.float32(-np.inf))])
        ends = np.array([0, -0.0, 3e38, -3e38, np.inf, -np.inf, 1e-45, 1e30, -1e30], np.float32)
        x = np.concatenate([x, np.nextafter(x, x * 2), ends])
        with np.errstate(over="ignore"):
            want = np.clip(np.rint(x / scale) - 3, -128, 127).astype(np.int8)
        examples.append(Example(f"by {scale}", quantizer(float(scale), len(x)), {"x": x}, [want]))
    check(examples, WIDEST)


# -- packing and choice ------------------------------------------------------------------------------------------


def test_four_bits_lie_eight_in_a_word() -> None:
    q = np.arange(16 * 5).reshape(16, 5).astype(np.uint8) % 16
    packed = pack_weights(q, Weights(4, 16, 1, scaled=False), 4).view(np.uint32)
    assert packed.shape == (2, 2, 4, 1)
    for k, n in itertools.product(range(16), range(8)):
        nibble = int(packed[n // 4, k // 8, n % 4, 0]) >> 4 * (k % 8) & 15
        assert nibble == (q[k, n] if n < 5 else 0)


def test_factors_follow_the_panels() -> None:
    factors = np.arange(2 * 5, dtype=np.float32).reshape(2, 5)
    packed = pack_factors(factors, 4)
    np.testing.assert_array_equal(packed[1], [[4, 0, 0, 0], [9, 0, 0, 0]])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sizes", SHAPES)
def test_candidates_fit_the_registers(level: str, sizes: tuple[int, int, int]) -> None:
    profile, (rows, depth, columns) = load_profile(level), sizes
    for a in ("uint8", "bfloat16"):
        dot = dot_for(profile, a, "int8" if a == "uint8" else a)
        assert dot is not None
        offered = matmul_dot.candidates(profile, dot, rows, columns, depth)
        assert len({tuple(c.parameters.items()) for c in offered}) == len(offered) > 0
        for candidate in offered:
            height, vectors = candidate.number("rows"), candidate.number("vectors")
            assert height <= dot.most_rows[vectors - 1]
            assert candidate.number("chunk") % height == 0
            assert candidate.cycles > 0
    for bits, scaled in itertools.product((4, 8), (False, True)):
        weights = Weights(bits, 32, 2, scaled)
        for candidate in matmul_weight_only.candidates(profile, weights, rows, columns):
            height, vectors = candidate.number("rows"), candidate.number("vectors")
            assert height * vectors + vectors * (1 + 2 * scaled) + 1 <= profile.registers
            assert candidate.number("chunk") % height == 0


@pytest.mark.parametrize("a", ["uint8", "bfloat16"])
@pytest.mark.parametrize("sizes", [(1500, 384, 1536), (1600, 3072, 768), (400, 64, 64)])
def test_chunks_of_rows_stay_in_the_second_level_cache_with_what_they_meet(a: str, sizes: tuple[int, int, int]) -> None:
    profile, (rows, depth, columns) = load_profile("sapphirerapids"), sizes
    dot = dot_for(profile, a, "int8" if a == "uint8" else a)
    assert dot is not None
    item = 1 if a == "uint8" else 2
    weights = columns * depth * item
    for candidate in matmul_dot.candidates(profile, dot, rows, columns, depth):
        chunk = candidate.number("chunk")
        assert chunk <= matmul_dot.ROWS_AT_ONCE
        assert chunk * depth * item <= profile.l2_bytes // (4 if weights <= profile.l2_bytes else 2)
        assert -(-rows // chunk) * chunk - rows < chunk // 2 + candidate.number("rows"), "the last chunk is too small"


def test_one_sum_at_a_time_waits_for_itself() -> None:
    """Steps on one tile of sums follow each other after 52 cycles: four tiles are four times as fast."""
    profile = load_profile("sapphirerapids")
    dot = dot_for(profile, "uint8", "int8")
    assert dot is not None
    best = min(matmul_dot.candidates(profile, dot, 512, 4096, 1024), key=lambda candidate: candidate.cycles)
    assert best.number("vectors") == 2
