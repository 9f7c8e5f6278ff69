"""The matrix product template against numpy in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import scipy.special
from onnx import helper
from tvm import tirx
from tvm.ir import Expr

from mmopt.backends.compute import Map, Source, Tensor, compute, index
from mmopt.backends.cpu.kernels.matmul import Matmul, pack_panels
from mmopt.backends.cpu.kernels.tile import Tile, choose_tile, lanes_of
from mmopt.backends.cpu.loops import static
from mmopt.backends.profile import Profile
from mmopt.lowering.ops.elementwise import broadcast_shape
from tests.kernels import PROFILES, WIDEST, Arrays, Case, check, profiles
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


def product(a: Tensor, b: Tensor, tile: Tile, *, columns: int | None = None) -> Matmul:
    """The template for ``a @ b``; ``columns`` when ``b`` is packed."""
    if columns is not None:
        return Matmul(
            a, b, batch=(), rows=a.shape[-2], columns=index(columns), depth=a.shape[-1], tile=tile, panels=True
        )
    batch = broadcast_shape([a.shape[:-2], b.shape[:-2]]) if a.ndim > 2 or b.ndim > 2 else ()
    return Matmul(a, b, batch=batch, rows=a.shape[-2], columns=b.shape[-1], depth=a.shape[-1], tile=tile, panels=False)


def tile_for(profile: Profile, a: Tensor, columns: int) -> Tile:
    return choose_tile(profile, a.dtype, static(a.shape[-2]), columns)


def constant_operand(profile: Profile) -> list[Case]:
    """A weight packed into panels."""
    cases = []
    for dtype in ("float32", "float64"):
        for rows, depth, columns in SHAPES:
            data = Arrays()
            a = data.source((rows, depth), dtype)
            b = data.data((depth, columns), dtype)
            tile = tile_for(profile, a, columns)
            nest = product(a, packed(data, b, tile.columns), tile, columns=columns)
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
            nest = product(a, b, tile_for(profile, a, columns))
            cases.append(data.case(f"{dtype} {rows}×{depth}×{columns}", nest.output, data[a] @ data[b]))
    return cases


def tiles(profile: Profile) -> list[Case]:
    """Register tiles other than the chosen one, whole and with tails."""
    lanes, cases = lanes_of(profile, "float32"), []
    for rows, vectors in [(1, 1), (3, 1), (6, 2), (14, 2), (4, 4)]:
        data = Arrays()
        a, b = data.source((19, 32)), data.data((32, 5 * lanes // 2), "float32")
        tile = Tile(rows, vectors, lanes)
        nest = product(a, packed(data, b, tile.columns), tile, columns=b.shape[1])
        cases.append(data.case(f"{rows}×{vectors} vectors", nest.output, data[a] @ b.astype(np.float64)))
        c = data.source((32, 37))
        cases.append(data.case(f"{rows}×{vectors} in place", product(a, c, tile).output, data[a] @ data[c]))
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
        nest = product(a, b, tile_for(profile, a, 19))
        cases.append(data.case(f"{left} by {right}", nest.output, data[a] @ data[b]))
    return cases


def several_axes_of_rows(profile: Profile) -> list[Case]:
    """Rows of several axes of the result, walked as one."""
    data = Arrays()
    a = data.source((12, 16))
    b = data.data((16, 21), "float32")
    tile = tile_for(profile, a, 21)
    shape = [index(d) for d in (3, 4, 21)]
    weight = packed(data, b, tile.columns)
    nest = Matmul(
        a, weight, batch=(), rows=index(12), columns=index(21), depth=index(16), tile=tile, panels=True, shape=shape
    )
    want = (data[a] @ b.astype(np.float64)).reshape(3, 4, 21)
    return [data.case("two axes of rows", nest.output, want)]


def symbolic(profile: Profile) -> list[Case]:
    """Rows, batch, columns and depth known at run time only."""
    n, m, k, j = (tirx.Var(name, "int64") for name in "nmkj")
    blank = Arrays()
    a, b = blank.source((n, 16)), blank.source((16, 19))
    tile = choose_tile(profile, "float32", None, 40)
    weight = blank.data((16, 40), "float32")
    panels = Source(pack_panels(weight, tile.columns).shape, "float32", "panels")
    rows_packed = product(a, panels, tile, columns=40).output
    rows = product(a, b, tile).output
    x, y = blank.source((n, 5, 16)), blank.source((n, 16, 19))
    batch = product(x, y, choose_tile(profile, "float32", 5, 19)).output
    left, right = blank.source((n, m, k)), blank.source((n, k, j))
    everything = product(left, right, choose_tile(profile, "float32", None, 1 << 20)).output
    cases = []
    for sizes in [(1, 1, 1, 1), (3, 7, 16, 16), (2, 29, 5, 33), (13, 70, 8, 100), (1, 300, 3, 5), (0, 4, 4, 4)]:
        named = dict(zip("nmkj", sizes, strict=True))
        data = blank.fresh(**named)
        data.feeds[panels] = np.ascontiguousarray(pack_panels(weight, tile.columns))
        wanted = {
            "packed rows": (rows_packed, data[a] @ weight.astype(np.float64)),
            "rows": (rows, data[a] @ data[b]),
            "batch": (batch, data[x] @ data[y]),
            "everything": (everything, data[left] @ data[right]),
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
        tile = tile_for(profile, a, columns)
        b = data.data((16, columns), "float32")
        weight = packed(data, b, tile.columns)
        exact = data[a] @ b.astype(np.float64)

        def nest(a: Source = a, weight: Source = weight, tile: Tile = tile, columns: int = columns) -> Tensor:
            return product(a, weight, tile, columns=columns).output

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
    constant_operand, computed_operand, tiles, batches, several_axes_of_rows, symbolic, epilogues,
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


def test_operators() -> None:
    check_models(operators(), WIDEST)


def test_panels_hold_every_column_and_zeros_behind() -> None:
    b = np.arange(3 * 5.0).reshape(3, 5)
    panels = pack_panels(b, 4)
    assert panels.shape == (2, 3, 4)
    np.testing.assert_array_equal(panels[0], b[:, :4])
    np.testing.assert_array_equal(panels[1], np.pad(b[:, 4:], ((0, 0), (0, 3))))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("rows", [None, 1, 2, 5, 13, 27, 128])
@pytest.mark.parametrize("columns", [1, 16, 40, 768])
def test_chosen_tiles_fit_the_registers(rows: int | None, columns: int, profile: str) -> None:
    target = profiles()[profile]
    tile = choose_tile(target, "float32", rows, columns)
    assert tile.rows * tile.vectors + tile.vectors + 1 <= target.registers
    assert tile.lanes * 4 == target.vector_bytes
    assert tile.columns < columns + tile.lanes
    assert rows is None or tile.rows <= rows
