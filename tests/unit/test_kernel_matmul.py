"""The matrix product template against numpy in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import scipy.special
from onnx import helper
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map, Source, Tensor, compute, index
from mmopt.backends.cpu.choosing import Chooser, Workload, dim
from mmopt.backends.cpu.kernels.matmul import Matmul, pack_panels
from mmopt.backends.cpu.kernels.matmul_blocking import Blocking, choose_blocking
from mmopt.backends.cpu.kernels.tile import Tile, lanes_of
from mmopt.backends.profile import Profile
from mmopt.ir.module import Module
from mmopt.lowering.compiler import compile_module
from mmopt.lowering.ops.elementwise import broadcast_shape
from tests.kernels import PROFILES, WIDEST, Arrays, Case, Memory, check, compile_kernels, profiles
from tests.programs import Example, model_of
from tests.programs import check as check_models

SHAPES = [
    (1, 1, 1),
    (1, 16, 33),
    (2, 3, 1),
    (5, 48, 17),
    (7, 1, 16),
    (13, 16, 35),
    (14, 32, 64),
    (16, 19, 8),
    (29, 7, 70),
    (130, 16, 20),
]
"""Rows, depth, columns: single ones, whole tiles, tails in each direction."""


def packed(data: Arrays, b: np.ndarray, columns: int) -> Source:
    """``b`` as the template wants a constant."""
    return data.constant(np.ascontiguousarray(pack_panels(b, columns)))


def product(a: Tensor, b: Tensor, blocking: Blocking, *, columns: int | None = None) -> Matmul:
    """The template for ``a @ b``; ``columns`` when ``b`` is packed."""
    rows, depth = a.shape[-2], a.shape[-1]
    if columns is not None:
        wide = index(columns)
        return Matmul(a, b, batch=(), rows=rows, columns=wide, depth=depth, blocking=blocking, panels=True)
    batch = broadcast_shape([a.shape[:-2], b.shape[:-2]]) if a.ndim > 2 or b.ndim > 2 else ()
    return Matmul(a, b, batch=batch, rows=rows, columns=b.shape[-1], depth=depth, blocking=blocking, panels=False)


def turned_of(x: Tensor) -> Map:
    """``x`` with its last two axes exchanged, read where it lies."""
    return compute((*x.shape[:-2], x.shape[-1], x.shape[-2]), x.dtype, lambda *at: x[(*at[:-2], at[-1], at[-2])])


def blocking_for(profile: Profile, a: Tensor, columns: int | Expr, b: str = "packed") -> Blocking:
    """What the template itself would choose."""
    dims = {"batch": dim(a.shape[0]) if a.ndim > 2 else 1, "m": dim(a.shape[-2]), "n": dim(columns)}
    workload = Workload("matmul", (*dims.items(), ("k", dim(a.shape[-1])), ("b", b)), (a.dtype,))
    return choose_blocking(profile, Chooser(), workload)


def constant_operand(profile: Profile) -> list[Case]:
    """A weight packed into panels."""
    cases = []
    for dtype in ("float32", "float64"):
        for rows, depth, columns in SHAPES:
            data = Arrays()
            a = data.source((rows, depth), dtype)
            b = data.data((depth, columns), dtype)
            blocking = blocking_for(profile, a, columns)
            nest = product(a, packed(data, b, blocking.tile.columns), blocking, columns=columns)
            want = data[a] @ b.astype(np.float64)
            cases.append(data.case(f"{dtype} {rows}×{depth}×{columns}", nest.output, want))
    return cases


def computed_operand(profile: Profile) -> list[Case]:
    """A second operand read where it lies."""
    cases = []
    for dtype in ("float32", "float64"):
        for rows, depth, columns in SHAPES:
            data = Arrays()
            a, b = data.source((rows, depth), dtype), data.source((depth, columns), dtype)
            nest = product(a, b, blocking_for(profile, a, columns, "in-place"))
            cases.append(data.case(f"{dtype} {rows}×{depth}×{columns}", nest.output, data[a] @ data[b]))
    return cases


def tiles(profile: Profile) -> list[Case]:
    """Register tiles other than the chosen one, whole and with tails, over every kind of second operand."""
    lanes, cases = lanes_of(profile, "float32"), []
    for rows, vectors in [(1, 1), (3, 1), (6, 2), (14, 2), (4, 4)]:
        tile = Tile(rows, vectors, lanes)
        for height in (19, 28):
            data = Arrays()
            a, b = data.source((height, 32)), data.data((32, 5 * lanes // 2), "float32")
            nest = product(a, packed(data, b, tile.columns), Blocking(tile), columns=b.shape[1])
            label = f"{height} by {rows}×{vectors} vectors"
            cases.append(data.case(label, nest.output, data[a] @ b.astype(np.float64)))
        for width in (37, 64):
            data = Arrays()
            a, c, turned = data.source((19, 32)), data.source((32, width)), data.source((width, 32))
            label = f"{width} by {rows}×{vectors} vectors"
            cases.append(data.case(f"{label} in place", product(a, c, Blocking(tile)).output, data[a] @ data[c]))
            copied = Blocking(tile, copy=True)
            cases.append(data.case(f"{label} copied", product(a, c, copied).output, data[a] @ data[c]))
            nest = product(a, turned_of(turned), copied)
            cases.append(data.case(f"{label} transposed", nest.output, data[a] @ data[turned].T))
    return cases


def blocks(profile: Profile) -> list[Case]:
    """Chunks of rows, groups of panels and blocks of the depth that divide their extent, and that do not."""
    lanes, cases = lanes_of(profile, "float32"), []
    m = tirx.Var("m", "int64")
    tile = Tile(4, 2, lanes)
    for rows, depth, columns in [(24, 64, 8 * lanes), (23, 50, 7 * lanes + 3), (3, 50, 8 * lanes), (m, 50, 6 * lanes)]:
        for tiles_, panels, step in [(2, 1, 0), (2, 2, 16), (3, 4, 32), (4, 3, 48), (6, 2, 24)]:
            data, sizes = Arrays(), {"m": 29}
            a, b = data.source((rows, depth), **sizes), data.data((depth, columns), "float32")
            blocking = Blocking(tile, tiles_, panels, step)
            relu = _each(
                product(a, packed(data, b, tile.columns), blocking, columns=columns).output,
                lambda v: tirx.max(v, tirx.const(0, "float32")),
            )
            want = np.maximum(data[a] @ b.astype(np.float64), 0)
            label = f"{rows}×{depth}×{columns} in {tiles_} tiles, {panels} panels, {step} steps"
            cases.append(data.case(label, relu, want, sizes=sizes))
    return cases


def large(profile: Profile) -> list[Case]:
    """Sizes at which the chosen blocking has chunks of rows and blocks of the depth."""
    cases = []
    for rows, depth, columns in [(300, 384, 100), (70, 1600, 130), (41, 2048, 96), (700, 768, 33)]:
        data = Arrays()
        a, b = data.source((rows, depth)), data.data((depth, columns), "float32")
        blocking = blocking_for(profile, a, columns)
        nest = product(a, packed(data, b, blocking.tile.columns), blocking, columns=columns)
        label = f"{rows}×{depth}×{columns} {blocking.parameters()}"
        cases.append(data.case(label, nest.output, data[a] @ b.astype(np.float64)))
    return cases


def batches(profile: Profile) -> list[Case]:
    """Stacks of matrices, equal and broadcast."""
    cases = []
    pairs: list[tuple[Sequence[int], Sequence[int]]] = [
        ((4,), (4,)), ((2, 3), (2, 3)), ((2, 3), (3,)), ((3,), (2, 3)), ((2, 1), (1, 3)), ((1,), (5,)), ((), (3,)),
        ((2, 3), ()), ((9,), (9,)),
    ]  # fmt: skip
    for left, right in pairs:
        data = Arrays()
        a, b = data.source((*left, 5, 16)), data.source((*right, 16, 19))
        nest = product(a, b, blocking_for(profile, a, 19, "in-place"))
        cases.append(data.case(f"{left} by {right}", nest.output, data[a] @ data[b]))
        copied = Blocking(Tile(3, 1, lanes_of(profile, "float32")), copy=True)
        nest = product(a, b, copied)
        cases.append(data.case(f"{left} by {right} copied", nest.output, data[a] @ data[b]))
    return cases


def several_axes_of_rows(profile: Profile) -> list[Case]:
    """Rows of several axes of the result, walked as one."""
    data = Arrays()
    a = data.source((12, 16))
    b = data.data((16, 21), "float32")
    blocking = blocking_for(profile, a, 21)
    weight = packed(data, b, blocking.tile.columns)
    nest = Matmul(
        a,
        weight,
        batch=(),
        rows=index(12),
        columns=index(21),
        depth=index(16),
        blocking=blocking,
        panels=True,
        shape=[index(d) for d in (3, 4, 21)],
    )
    want = (data[a] @ b.astype(np.float64)).reshape(3, 4, 21)
    return [data.case("two axes of rows", nest.output, want)]


def symbolic(profile: Profile) -> list[Case]:
    """Rows, batch, columns and depth known at run time only."""
    n, m, k, j = (tirx.Var(name, "int64") for name in "nmkj")
    blank = Arrays()
    a, b = blank.source((n, 16)), blank.source((16, 19))
    blocking = blocking_for(profile, a, 40)
    width = blocking.tile.columns
    weight = blank.data((16, 40), "float32")
    panels = Source(pack_panels(weight, width).shape, "float32", "panels")
    rows_packed = product(a, panels, blocking, columns=40).output
    rows = product(a, b, blocking_for(profile, a, 19, "in-place")).output
    x, y = blank.source((n, 5, 16)), blank.source((n, 16, 19))
    batch = product(x, y, blocking_for(profile, x, 19, "in-place")).output
    left, right, turned = blank.source((n, m, k)), blank.source((n, k, j)), blank.source((n, j, k))
    everything = product(left, right, blocking_for(profile, left, j, "in-place")).output
    flipped = product(left, turned_of(turned), blocking_for(profile, left, j, "view")).output
    cases = []
    for sizes in [(1, 1, 1, 1), (3, 7, 16, 16), (2, 29, 5, 33), (13, 70, 8, 100), (1, 300, 3, 5), (0, 4, 4, 4)]:
        named = dict(zip("nmkj", sizes, strict=True))
        data = blank.fresh(**named)
        data.feeds[panels] = np.ascontiguousarray(pack_panels(weight, width))
        wanted = {
            "packed rows": (rows_packed, data[a] @ weight.astype(np.float64)),
            "rows": (rows, data[a] @ data[b]),
            "batch": (batch, data[x] @ data[y]),
            "everything": (everything, data[left] @ data[right]),
            "transposed": (flipped, data[left] @ data[turned].swapaxes(1, 2)),
        }
        cases += [data.case(f"{name} of {sizes}", t, want, sizes=named) for name, (t, want) in wanted.items()]
    return cases + [c for more in [(2, 0, 4, 4), (2, 4, 0, 4), (2, 4, 4, 0)] for c in _none(blank, everything, more)]


def _none(blank: Arrays, output: Tensor, sizes: Sequence[int]) -> list[Case]:
    """Nothing to compute, or nothing to sum up."""
    named = dict(zip("nmkj", sizes, strict=True))
    data = blank.fresh(**named)
    left, right = output.nest.inputs  # type: ignore[attr-defined]
    return [data.case(f"everything of {sizes}", output, data[left] @ data[right], sizes=named)]


def epilogues(profile: Profile) -> list[Case]:
    """Bias, activation and residual while the tile is at hand, with tails, symbolic rows, several results."""
    cases = []
    n = tirx.Var("n", "int64")
    for rows, columns in [(1, 40), (5, 33), (n, 35)]:
        height = 23 if rows is n else rows
        data, sizes = Arrays(), {"n": 23}
        a, bias = data.source((rows, 16), **sizes), data.source((columns,))
        residual = data.source((rows, columns), **sizes)
        blocking = blocking_for(profile, a, columns)
        b = data.data((16, columns), "float32")
        weight = packed(data, b, blocking.tile.columns)
        exact = data[a] @ b.astype(np.float64)

        def nest(a: Source = a, weight: Source = weight, cut: Blocking = blocking, columns: int = columns) -> Tensor:
            return product(a, weight, cut, columns=columns).output

        label, options = f"{height}×{columns}", {"sizes": sizes}
        biased = _biased(nest(), bias)
        cases.append(data.case(f"bias {label}", biased, exact + data[bias], **options))
        relu = _each(_biased(nest(), bias), lambda v: tirx.max(v, tirx.const(0, "float32")))
        cases.append(data.case(f"relu {label}", relu, np.maximum(exact + data[bias], 0), **options))
        smooth = _each(_biased(nest(), bias), _gelu)
        z = exact + data[bias]
        cases.append(data.case(f"gelu {label}", smooth, z * scipy.special.ndtr(z), **options))
        before = _biased(nest(), bias)
        summed = compute(before.shape, "float32", lambda i, j, t=before, r=residual: t[i, j] + r[i, j])
        cases.append(data.case(f"residual {label}", [summed, before], z + data[residual], z, **options))
        whole = nest()
        doubled = _each(whole, lambda v: v + v)
        cases.append(data.case(f"product and epilogue {label}", [doubled, whole], exact * 2, exact, **options))
    return cases


def _biased(x: Tensor, bias: Tensor) -> Map:
    return compute(x.shape, "float32", lambda i, j: x[i, j] + bias[j])


def _each(x: Tensor, rule: Callable[[Expr], Expr]) -> Map:
    return compute(x.shape, x.dtype, lambda *at: rule(x[at]))


def _gelu(v: Expr) -> Expr:
    return v * (tirx.const(1, "float32") + tirx.erf(v * tirx.const(0.5**0.5, "float32"))) * tirx.const(0.5, "float32")


FAMILIES: list[Callable[[Profile], list[Case]]] = [
    constant_operand, computed_operand, tiles, blocks, large, batches, several_axes_of_rows, symbolic, epilogues,
]  # fmt: skip


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_products(family: Callable[[Profile], list[Case]], profile: str) -> None:
    check(family(profiles()[profile]), profile)


def operators() -> list[Example]:
    """MatMul and Gemm of every form: vectors, stacks, transposed, scaled, broadcast addends, other element types."""
    random = np.random.default_rng(0)

    def data(*shape: int, dtype: str = "float32") -> np.ndarray:
        numbers = random.standard_normal(shape) if "float" in dtype else random.integers(-9, 9, shape)
        return np.asarray(numbers).astype(dtype)

    made = []
    pairs = [
        ((16,), (16,)),
        ((16,), (16, 5)),
        ((3, 16), (16,)),
        ((2, 3, 16), (16,)),
        ((16,), (4, 16, 5)),
        ((0, 4), (4, 3)),
    ]
    pairs += [((2, 3, 16), (16, 21)), ((2, 1, 3, 16), (4, 16, 5)), ((3, 0), (0, 4))]
    for left, right in pairs:
        a, b = data(*left), data(*right)
        node = helper.make_node("MatMul", ["a", "b"], ["y"])
        want = [a.astype(np.float64) @ b.astype(np.float64)]
        made.append(Example(f"{left} @ {right}", model_of([node], {"a": a, "b": b}, ["y"], {}), {"a": a, "b": b}, want))
        made.append(Example(f"{left} @ weight {right}", model_of([node], {"a": a}, ["y"], {"b": b}), {"a": a}, want))
    for dtype in ("float16", "float64", "int32", "int64"):
        a, b = data(3, 16, dtype=dtype), data(16, 5, dtype=dtype)
        node = helper.make_node("MatMul", ["a", "b"], ["y"])
        want = [a.astype(np.float64) @ b.astype(np.float64)]
        want = [want[0] if "float" in dtype else want[0].astype(dtype)]
        made.append(Example(f"{dtype}", model_of([node], {"a": a}, ["y"], {"b": b}), {"a": a}, want))
    for across, down in itertools.product((0, 1), repeat=2):
        for addend in ((), (1,), (21,), (3, 1), (3, 21), None):
            a, b = data(*((16, 3) if across else (3, 16))), data(*((21, 16) if down else (16, 21)))
            c = {} if addend is None else {"c": data(*addend)}
            node = helper.make_node("Gemm", ["a", "b", *c], ["y"], transA=across, transB=down, alpha=0.5, beta=1.5)
            constant = addend == (21,)
            feeds = {"a": a} | ({} if constant else {"b": b, **c})
            model = model_of([node], feeds, ["y"], {"b": b, **c} if constant else {})
            made.append(Example(f"Gemm {across} {down} {addend}", model, feeds))
    return made


@pytest.mark.parametrize(
    ("nodes", "kernels"),
    [
        ([helper.make_node("Gemm", ["a", "b"], ["y"], transB=1)], 1),
        ([helper.make_node("Gemm", ["a", "b"], ["y"], transA=1, transB=1)], 2),
        ([helper.make_node("Einsum", ["a", "b"], ["y"], equation="ik,jk->ij")], 1),
    ],
)
def test_transposed_operands_need_no_kernel_of_their_own(nodes: list[onnx.NodeProto], kernels: int) -> None:
    """Of the left operand only where its rows stay contiguous."""
    random = np.random.default_rng(0)
    across = any(attribute.name == "transA" for attribute in nodes[0].attribute)
    a = random.standard_normal((30, 20) if across else (20, 30)).astype(np.float32)
    b = random.standard_normal((40, 30)).astype(np.float32)
    model = model_of(nodes, {"a": a, "b": b}, ["y"], {})
    example = Example("transposed", model, {"a": a, "b": b}, [(a.T if across else a).astype(np.float64) @ b.T])
    check_models([example], WIDEST)
    assert len(compile_module(Module(ir.from_proto(model)), profiles()[WIDEST]).kernels) == kernels


def test_operators() -> None:
    check_models(operators(), WIDEST)


def test_panels_hold_every_column_and_zeros_behind() -> None:
    b = np.arange(3 * 5.0).reshape(3, 5)
    panels = pack_panels(b, 4)
    assert panels.shape == (2, 3, 4)
    np.testing.assert_array_equal(panels[0], b[:, :4])
    np.testing.assert_array_equal(panels[1], np.pad(b[:, 4:], ((0, 0), (0, 3))))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("rows", ["?", 1, 2, 5, 13, 27, 128, 1500])
@pytest.mark.parametrize(("columns", "depth"), [(1, 16), (16, 768), (40, 3000), (768, 768), (512, 4096), ("?", "?")])
@pytest.mark.parametrize("b", ["packed", "in-place", "view"])
def test_candidates_fit_the_machine(
    rows: int | str, columns: int | str, depth: int | str, b: str, profile: str
) -> None:
    target, chooser = profiles()[profile], Chooser()
    workload = Workload("matmul", (("batch", 1), ("m", rows), ("n", columns), ("k", depth), ("b", b)), ("float32",))
    chosen = choose_blocking(target, chooser, workload)
    (choice,) = chooser.choices()
    assert chosen.parameters() == choice.chosen.parameters
    assert len({tuple(c.parameters.values()) for c in choice.candidates}) == len(choice.candidates) <= 32
    for candidate in choice.candidates:
        height, vectors = candidate.number("rows"), candidate.number("vectors")
        assert height * vectors + vectors + 1 <= target.registers
        assert candidate.cycles > 0
        if isinstance(rows, int):
            assert height <= rows
        if isinstance(columns, int):
            assert vectors * lanes_of(target, "float32") < columns + lanes_of(target, "float32")
        if b == "view" or (b == "in-place" and columns == "?"):
            assert candidate["copy"]
        if candidate["depth"]:
            sums = (
                (candidate.number("tiles") or -(-int(rows) // height)) * height * candidate.number("panels") * vectors
            )
            assert sums * target.vector_bytes <= target.l2_bytes // 2


def test_the_prediction_prefers_what_a_core_is_good_at() -> None:
    """Blocks of the depth where rows and weights overflow the cache, not where they fit; balanced cores."""
    target = profiles()[WIDEST]

    def chosen(m: int, n: int, k: int, b: str = "packed") -> Blocking:
        dims = (("batch", 1), ("m", m), ("n", n), ("k", k), ("b", b))
        return choose_blocking(target, Chooser(), Workload("matmul", dims, ("float32",)))

    assert chosen(128, 768, 256).depth == 0
    assert 0 < chosen(512, 768, 8192).depth < 8192
    assert chosen(2, 256, 256, "in-place").copy is False
    assert chosen(512, 256, 256, "in-place").copy is True
    grid = chosen(4096, 64, 64)
    assert grid.tiles > 0, "one panel or two cannot keep the cores busy: rows are divided"


def test_an_operand_of_unknown_width_must_be_copied() -> None:
    data = Arrays()
    a, b = data.source((4, 8)), data.source((8, tirx.Var("n", "int64")))
    with pytest.raises(ValueError, match="copied"):
        product(a, b, Blocking(Tile(4, 1, 8)))


@pytest.mark.parametrize("depth", [16, 50, 257])
def test_equal_columns_give_equal_sums_and_blocks_do_not_change_them(depth: int) -> None:
    """Bit for bit: whole panels, the narrow last one, every block of the depth."""
    profile = profiles()[WIDEST]
    lanes = lanes_of(profile, "float32")
    columns = 5 * lanes + 3
    data = Arrays()
    a = data.source((11, depth))
    b = np.repeat(data.data((depth, 1), "float32"), columns, axis=1)
    kinds = [Blocking(Tile(4, 2, lanes)), Blocking(Tile(4, 2, lanes), 2, 2, 16), Blocking(Tile(4, 2, lanes), 1, 1, 48)]
    outputs = [product(a, packed(data, b, 2 * lanes), kind, columns=columns).output for kind in kinds]
    compiled = compile_kernels([[o] for o in outputs], profile)
    want = data[a] @ b.astype(np.float64)
    results = [compiled.run(data.case("sums", o, want), Memory(guard=False))[0] for o in outputs]
    for result in results:
        np.testing.assert_array_equal(result, np.repeat(result[:, :1], columns, axis=1))
        np.testing.assert_array_equal(result, results[0])
