"""The emitter: lazy tensors of every form become one kernel each, compared with numpy in float64."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import scipy.special
from tvm import tirx

from mmopt.backends.compute import (
    MAXIMUM,
    MINIMUM,
    PRODUCT,
    SUM,
    Combiner,
    LoopNest,
    Map,
    Reduction,
    Sink,
    Source,
    Tensor,
    compute,
    guarded,
)
from mmopt.backends.cpu.emit import KernelEmitter
from mmopt.backends.cpu.loops import i64, loops
from tests.kernels import PROFILES, WIDEST, Arrays, Case, check, profiles


def const(value: float, dtype: str) -> tirx.Expr:
    return tirx.const(value, dtype)


def elementwise(x: Tensor, rule: Callable, dtype: str | None = None) -> Map:
    """``rule`` at every element."""
    return compute(x.shape, dtype or x.dtype, lambda *at: rule(x[at]))


def reduced(x: Tensor, axes: Sequence[int], combiner: Combiner = SUM, *, keep: bool = False) -> Reduction:
    """``x`` combined over ``axes``."""
    kept = [a for a in range(x.ndim) if a not in axes]
    shape = [1 if a in axes else x.shape[a] for a in range(x.ndim)] if keep else [x.shape[a] for a in kept]

    def body(*at: tirx.Expr) -> tirx.Expr:
        outer, inner = at[: len(shape)], at[len(shape) :]
        places = dict(zip(axes, inner, strict=True))
        places |= {a: outer[a] if keep else outer[kept.index(a)] for a in kept}
        return x[tuple(places[a] for a in range(x.ndim))]

    return Reduction(shape, [x.shape[a] for a in axes], (x.dtype,), body, combiner)


# -- maps ------------------------------------------------------------------------------------------------------


def lengths() -> list[Case]:
    """Every length around the widths of vectors and pieces, and two axes that collapse into one."""
    cases = []
    for shape in [(n,) for n in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 1000, 4096)] + [
        (3, 5),
        (2, 3, 16),
        (1, 1),
        (4, 1),
    ]:
        data = Arrays()
        x = data.source(shape)
        cases.append(data.case(f"square of {shape}", elementwise(x, lambda v: v * v), data[x] ** 2))
    return cases


def parallel_pieces() -> list[Case]:
    """Enough work for several threads: one long axis with and without a ragged last piece, few rows, many rows."""
    cases = []
    for shape in [(1 << 16,), ((1 << 16) + 5,), (3, 20_001), (2, 1 << 15), (300, 120), (7, 6000)]:
        data = Arrays()
        x = data.source(shape)
        cases.append(data.case(f"exp of {shape}", elementwise(x, tirx.exp), np.exp(data[x])))
    return cases


def empty() -> list[Case]:
    """No elements to compute, or nothing to reduce."""
    cases = []
    for shape in [(0,), (0, 7), (7, 0), (3, 0, 5)]:
        data = Arrays()
        x = data.source(shape)
        cases.append(data.case(f"exp of {shape}", elementwise(x, tirx.exp), np.exp(data[x])))
        for axis in range(len(shape)):
            if len(shape) > 1:
                total = data[x].sum(axis)
                cases.append(data.case(f"sum of {shape} over {axis}", reduced(x, [axis]), total))
    data = Arrays()
    x = data.source((4, 0))
    cases.append(data.case("product of nothing", reduced(x, [1], PRODUCT), np.ones(4)))
    lowest = np.full(4, np.finfo(np.float32).min)
    cases.append(data.case("maximum of nothing", reduced(x, [1], MAXIMUM), lowest))
    return cases


def scalars() -> list[Case]:
    """Tensors without axes, in and out."""
    data = Arrays()
    x, v = data.source(()), data.source((19,))
    whole = reduced(v, [0])
    return [
        data.case("scalar to scalar", compute((), "float32", lambda: tirx.exp(x[()])), np.exp(data[x])),
        data.case("scalar to vector", compute((19,), "float32", lambda i: v[i] * x[()]), data[v] * data[x]),
        data.case("vector to scalar", whole, data[v].sum()),
        data.case("after the sum", compute((), "float32", lambda: tirx.exp(whole[()])), np.exp(data[v].sum())),
        data.case("literal", Map((), "int64", lambda: const(7, "int64")), np.array(7)),
        data.case("filled", Map((5, 3), "float32", lambda i, j: const(2.5, "float32")), np.full((5, 3), 2.5)),
    ]


def dtypes() -> list[Case]:
    """Arithmetic, comparison and conversion of every dtype; booleans in and out of memory."""
    cases = []
    for dtype in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32"):
        data = Arrays()
        x, y = data.source((5, 37), dtype), data.source((5, 37), dtype)
        a, b = data[x], data[y]
        cases.append(data.case(f"{dtype} sum", compute(x.shape, dtype, lambda *at, x=x, y=y: x[at] + y[at]), a + b))
        less = compute(x.shape, "bool", lambda *at, x=x, y=y: x[at] < y[at])
        cases.append(data.case(f"{dtype} less", less, a < b))
        cases.append(data.case(f"{dtype} to float32", elementwise(x, lambda v: v.astype("float32"), "float32"), a))
        cases.append(data.case(f"{dtype} maximum", reduced(x, [1], MAXIMUM), a.max(1)))
    data = Arrays()
    p, q, z = data.source((3, 21), "bool"), data.source((3, 21), "bool"), data.source((3, 21))
    both = compute(p.shape, "bool", lambda *at: tirx.all(p[at], tirx.Not(q[at])))
    cases.append(data.case("and not", both, data[p] & ~data[q]))
    chosen = compute(p.shape, "float32", lambda *at: tirx.Select(both[at], z[at], const(0, "float32")))
    cases.append(data.case("select", chosen, np.where(data[p] & ~data[q], data[z], 0)))
    cases.append(data.case("bool to int", elementwise(p, lambda v: v.astype("int64"), "int64"), data[p]))
    exact = elementwise(z, tirx.exp, "float32")
    wide = data.source((3, 21), "float64")
    cases.append(
        data.case("two vector widths", [exact, elementwise(wide, tirx.exp)], np.exp(data[z]), np.exp(data[wide]))
    )
    return cases


def stored_flags() -> list[Case]:
    """A temporary of booleans between two stages."""
    data = Arrays()
    x = data.source((6, 33))
    over = elementwise(x, lambda v: tirx.exp(v) * v + v > const(0.5, "float32"), "bool")
    count = Reduction((6,), (33,), ("int32",), lambda i, k: over[i, k].astype("int32"), SUM)
    kept = compute(x.shape, "float32", lambda i, j: tirx.Select(over[i, j], x[i, j], count[i].astype("float32")))
    flag = np.exp(data[x]) * data[x] + data[x] > 0.5
    return [data.case("flags", [kept, over], np.where(flag, data[x], flag.sum(1, keepdims=True)), flag)]


def broadcasts() -> list[Case]:
    """Every pattern of one-sided extents over three axes."""
    cases = []
    full = (4, 5, 18)
    for mask in itertools.product((False, True), repeat=3):
        data = Arrays()
        small = tuple(1 if m else d for m, d in zip(mask, full, strict=True))
        x, y = data.source(full), data.source(small)

        def body(*at: tirx.Expr, x: Source = x, y: Source = y, mask: Sequence[bool] = mask) -> tirx.Expr:
            return x[at] - y[tuple(i64(0) if m else i for i, m in zip(at, mask, strict=True))]

        cases.append(data.case(f"minus {small}", compute(full, "float32", body), data[x] - data[y]))
    data = Arrays()
    column, row = data.source((9, 1)), data.source((23,))
    outer = compute((9, 23), "float32", lambda i, j: column[i, 0] * row[j])
    cases.append(data.case("outer product", outer, data[column] * data[row]))
    return cases


def transposes() -> list[Case]:
    """All orders of four axes, and a reversed axis."""
    cases = []
    data = Arrays()
    x = data.source((3, 4, 5, 17))
    for order in itertools.permutations(range(4)):
        inverse = np.argsort(order)
        moved = Map(
            [x.shape[a] for a in order], "float32", lambda *at, inverse=inverse: x[tuple(at[int(n)] for n in inverse)]
        )
        cases.append(data.case(f"transpose {order}", moved, data[x].transpose(order)))
    back = compute(x.shape, "float32", lambda a, b, c, d: x[a, b, c, 16 - d])
    cases.append(data.case("reversed", back, data[x][..., ::-1]))
    strided = compute((3, 2, 5, 6), "float32", lambda a, b, c, d: x[a, b * 2, c, d * 3])
    cases.append(data.case("strided", strided, data[x][:, ::2, :, ::3]))
    return cases


def gathers() -> list[Case]:
    """Indices read from memory; the same rows gathered twice in one kernel."""
    data = Arrays()
    table = data.source((11, 20))
    rows = data.constant(np.array([3, 0, 10, 3, 7], np.int64))
    gathered = compute((5, 20), "float32", lambda i, j: table[rows[i], j])
    doubled = elementwise(gathered, lambda v: v + v)
    squared = compute((5, 20), "float32", lambda i, j: doubled[i, j] * gathered[4 - i, j])
    picked = data[table][data[rows]]
    narrow = data.constant(np.array([[1, 2], [0, 10]], np.int32))
    nested = compute((2, 2, 20), "float32", lambda a, b, j: table[narrow[a, b], j])
    return [
        data.case("rows", gathered, picked),
        data.case("rows twice", squared, picked * 2 * picked[::-1]),
        data.case("32-bit indices", nested, data[table][data[narrow]]),
        data.case("sum of rows", reduced(gathered, [0]), picked.sum(0)),
    ]


def guards() -> list[Case]:
    """Reads legal only under a condition; where it fails the index may lie far outside."""
    data = Arrays()
    x = data.source((4, 16))

    def padded(value: Tensor, fill: float) -> Map:
        def body(i: tirx.Expr, j: tirx.Expr) -> tirx.Expr:
            inside = tirx.all(i >= 1, i < 5, j >= 2, j < 18)
            return guarded(inside, lambda: value[i - 1, j - 2], const(fill, "float32"))

        return compute((7, 23), "float32", body)

    heavy = elementwise(x, lambda v: tirx.exp(v) + tirx.tanh(v))
    pad = lambda a, fill: np.pad(a, ((1, 2), (2, 5)), constant_values=fill)  # noqa: E731
    twice = compute((7, 23), "float32", lambda i, j: padded(x, 0)[i, j] * 2 + padded(x, 1)[i, j])
    after = np.exp(data[x]) + np.tanh(data[x])
    first = compute((40, 16), "float32", lambda i, j: guarded(i < 1, lambda: x[i * 100_000, j], const(-1, "float32")))
    alone = np.full((40, 16), -1.0)
    alone[0] = data[x][0]
    return [
        data.case("padding", padded(x, 0), pad(data[x], 0)),
        data.case("computed, then padded", padded(heavy, 3), pad(after, 3)),
        data.case("two paddings", twice, pad(data[x], 0) * 2 + pad(data[x], 1)),
        data.case("sum of padding", reduced(padded(x, 1), [0]), pad(data[x], 1).sum(0)),
        data.case("far outside", first, alone),
    ]


def chains() -> list[Case]:
    """Values used several times along a chain, one with a use outside of it."""
    data = Arrays()
    x, y = data.source((3, 50)), data.source((50,))
    first = compute(x.shape, "float32", lambda i, j: tirx.tanh(x[i, j]) + y[j])
    second = elementwise(first, lambda v: v * tirx.sigmoid(v))
    third = compute(x.shape, "float32", lambda i, j: second[i, j] + first[i, j])
    a = np.tanh(data[x]) + data[y]
    b = a * scipy.special.expit(a)
    turned = compute((50, 3), "float32", lambda j, i: second[i, j] + const(1, "float32"))
    return [
        data.case("chain", third, a + b),
        data.case("three outputs", [third, first, second], a + b, a, b),
        data.case("output read transposed", [second, turned], b, b.T + 1),
    ]


# -- reductions ------------------------------------------------------------------------------------------------


def reductions() -> list[Case]:
    """Sums over every set of axes, with tails and without, kept and dropped."""
    cases = []
    for shape in [(5, 7, 19), (3, 16, 64), (2, 130, 3), (70, 1, 5)]:
        data = Arrays()
        x = data.source(shape)
        for count in (1, 2, 3):
            for axes in itertools.combinations(range(3), count):
                cases.append(data.case(f"{shape} over {axes}", reduced(x, axes), data[x].sum(axes)))
        kept = reduced(x, [1], keep=True)
        cases.append(data.case(f"{shape} kept", kept, data[x].sum(1, keepdims=True)))
    return cases


def row_lengths() -> list[Case]:
    """Reduced rows and reduced columns of every length around the vector widths."""
    cases = []
    for length in (1, 7, 8, 9, 16, 17, 31, 33, 64, 65, 129):
        data = Arrays()
        x, y = data.source((6, length)), data.source((length, 6))
        cases.append(data.case(f"{length} in a row", reduced(x, [1]), data[x].sum(1)))
        cases.append(data.case(f"{length} columns", reduced(x, [0]), data[x].sum(0)))
        cases.append(data.case(f"{length} in a column", reduced(y, [0]), data[y].sum(0)))
    return cases


def combiners() -> list[Case]:
    """Each combiner along both directions of vector lanes; states of two components."""
    data = Arrays()
    x = data.source((9, 70))
    cases = [
        data.case(f"{name} over {axis}", reduced(x, [axis], combiner), want(data[x], axis=axis))
        for axis in (0, 1)
        for name, combiner, want in (("max", MAXIMUM, np.max), ("min", MINIMUM, np.min), ("product", PRODUCT, np.prod))
    ]
    integers = data.source((9, 70), "int32")
    cases.append(data.case("integers", reduced(integers, [1]), data[integers].sum(1)))
    ties = data.source((9, 70), "int8")
    for name, table in (("floats", x), ("ties", ties)):
        for axis in (0, 1):
            cases.append(data.case(f"argmax of {name} over {axis}", largest(table, axis), data[table].argmax(axis)))
    mean = Reduction((9,), (70,), ("float32",), lambda i, k: x[i, k], SUM, lambda s: s[0] / const(70, "float32"))
    cases.append(data.case("mean", mean, data[x].mean(1)))
    narrow = lambda s: s[0].astype("float32")  # noqa: E731
    wide = Reduction((9,), (70,), ("float64",), lambda i, k: x[i, k].astype("float64"), SUM, narrow, "float32")
    cases.append(data.case("wide sum", wide, data[x].sum(1)))
    return cases


def largest(x: Tensor, axis: int) -> Reduction:
    """Position of the first largest element along an axis of a matrix."""

    def body(i: tirx.Expr, k: tirx.Expr) -> tuple[tirx.Expr, ...]:
        return x[(k, i) if axis == 0 else (i, k)], k

    def combine(a: tuple[tirx.Expr, ...], b: tuple[tirx.Expr, ...]) -> tuple[tirx.Expr, ...]:
        take = tirx.any(b[0] > a[0], tirx.all(b[0].equal(a[0]), b[1] < a[1]))
        return tirx.Select(take, b[0], a[0]), tirx.Select(take, b[1], a[1])

    none = lambda dtypes: (tirx.min_value(dtypes[0]), tirx.max_value(dtypes[1]))  # noqa: E731
    combiner = Combiner(none, combine, simple=False)
    return Reduction(
        (x.shape[1 - axis],), (x.shape[axis],), (x.dtype, "int64"), body, combiner, lambda s: s[1], "int64", "argmax"
    )


def products() -> list[Case]:
    """Reductions over several reads: a matrix product, one of a broadcast, one over a computed operand."""
    data = Arrays()
    a, b = data.source((6, 37)), data.source((37, 21))
    matmul = Reduction((6, 21), (37,), ("float32",), lambda i, j, k: a[i, k] * b[k, j], SUM)
    transposed = Reduction((21, 6), (37,), ("float32",), lambda j, i, k: a[i, k] * b[k, j], SUM)
    soft = elementwise(a, tirx.exp)
    heavy = Reduction((6, 21), (37,), ("float32",), lambda i, j, k: soft[i, k] * b[k, j], SUM)
    norm = Reduction((6,), (37,), ("float32",), lambda i, k: a[i, k] * a[i, k], SUM, lambda s: tirx.sqrt(s[0]))
    return [
        data.case("product", matmul, data[a] @ data[b]),
        data.case("transposed", transposed, (data[a] @ data[b]).T),
        data.case("of exponentials", heavy, np.exp(data[a]) @ data[b]),
        data.case("norm", norm, np.linalg.norm(data[a], axis=1)),
    ]


# -- chains over rows ------------------------------------------------------------------------------------------


def softmax_of(x: Tensor) -> Map:
    """Over the last axis."""
    highest = reduced(x, [x.ndim - 1], MAXIMUM)
    shifted = compute(x.shape, "float32", lambda *at: tirx.exp(x[at] - highest[at[:-1]]))
    total = reduced(shifted, [x.ndim - 1])
    return compute(x.shape, "float32", lambda *at: shifted[at] / total[at[:-1]])


def layer_norm_of(x: Tensor, scale: Tensor, bias: Tensor) -> Map:
    """Over the last axis."""
    width = x.shape[-1].astype("float32")
    mean = elementwise(reduced(x, [x.ndim - 1]), lambda v: v / width)
    centered = compute(x.shape, "float32", lambda *at: x[at] - mean[at[:-1]])
    variance = reduced(elementwise(centered, lambda v: v * v), [x.ndim - 1])
    root = elementwise(variance, lambda v: tirx.sqrt(v / width + const(1e-5, "float32")))
    return compute(x.shape, "float32", lambda *at: centered[at] / root[at[:-1]] * scale[at[-1]] + bias[at[-1]])


def layer_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def row_chains() -> list[Case]:
    """Softmax and layer norm as one kernel, with operators before and after, over several ranks and lengths."""
    cases = []
    for shape in [(7,), (4, 1), (5, 19), (2, 3, 64), (64, 600), (1, 9000)]:
        data = Arrays()
        x, mask = data.source(shape), data.source(shape[-1:])
        scale, bias = data.source(shape[-1:]), data.source(shape[-1:])
        a, m, s, b = (data[t] for t in (x, mask, scale, bias))
        masked = compute(x.shape, "float32", lambda *at, x=x, mask=mask: x[at] * const(0.5, "float32") + mask[at[-1]])
        soft = scipy.special.softmax(a, -1)
        cases.append(data.case(f"softmax of {shape}", softmax_of(x), soft))
        cases.append(
            data.case(f"masked softmax of {shape}", softmax_of(masked), scipy.special.softmax(a * 0.5 + m, -1))
        )
        cases.append(data.case(f"norm of {shape}", layer_norm_of(x, scale, bias), layer_norm(a, s, b)))
        summed = compute(x.shape, "float32", lambda *at, x=x, mask=mask: x[at] + tirx.tanh(mask[at[-1]]))
        normed = layer_norm_of(summed, scale, bias)
        both = elementwise(normed, lambda v: tirx.max(v, const(0, "float32")))
        t = a + np.tanh(m)
        after = np.maximum(layer_norm(t, s, b), 0)
        cases.append(data.case(f"residual norm relu of {shape}", [both, summed], after, t))
    return cases


def row_prefixes() -> list[Case]:
    """Stages of different ranks share what they can; a stage that reads another row shares nothing."""
    data = Arrays()
    x = data.source((6, 4, 35))
    inner = reduced(x, [2])
    outer = Reduction((6,), (4,), ("float32",), lambda i, k: inner[i, k] * inner[i, k], SUM)
    spread = compute(x.shape, "float32", lambda i, j, k: x[i, j, k] * outer[i] + inner[i, j])
    s = data[x].sum(2)
    want = data[x] * (s**2).sum(1)[:, None, None] + s[:, :, None]
    upside = compute((6, 4), "float32", lambda i, j: tirx.exp(inner[5 - i, j] * const(0.1, "float32")) + inner[i, j])
    cumulated = compute((6, 4), "float32", lambda i, j: inner[tirx.max(i - 1, i64(0)), j] + inner[i, j])
    behind = s[np.maximum(np.arange(6) - 1, 0)]
    column = reduced(x, [0])
    crossed = compute(x.shape, "float32", lambda i, j, k: x[i, j, k] - column[j, k])
    return [
        data.case("two levels", [spread, outer], want, (s**2).sum(1)),
        data.case("rows from the other end", [upside, inner], np.exp(s[::-1] * 0.1) + s, s),
        data.case("rows before", [cumulated, inner], behind + s, s),
        data.case("another axis", crossed, data[x] - data[x].sum(0)),
        data.case("two independent", [inner, column], s, data[x].sum(0)),
    ]


# -- loop nests ------------------------------------------------------------------------------------------------


class Stencil(LoopNest):
    """Sums and differences of neighbours in a row: two results, made in an order of its own."""

    name = "stencil"

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.inputs = (x,)
        self.x = x
        shape = (x.shape[0], x.shape[1] - 1)
        self.total, self.difference = self.result(shape, x.dtype), self.result(shape, x.dtype)

    def emit(self, kernel: object, sinks: Sequence[Sink]) -> tirx.Stmt:
        def each(j: tirx.Expr, i: tirx.Expr) -> tirx.Stmt:
            a, b = self.x[i, j], self.x[i, j + 1]
            return tirx.SeqStmt([sinks[0]((i, j), a + b), sinks[1]((i, j), b - a)])

        rows, columns = self.total.shape
        return loops([columns, rows], each)


def nests() -> list[Case]:
    """Hand-written loops with maps before them and epilogues behind them."""
    data = Arrays()
    x, r = data.source((5, 20)), data.source((5, 19))
    a, res = data[x], data[r]
    total, difference = a[:, 1:] + a[:, :-1], np.diff(a)

    def nest(source: Tensor = x) -> Stencil:
        return Stencil(source)

    plain, only_second, both, later, read = nest(), nest(), nest(), nest(), nest(elementwise(x, tirx.exp))
    relu = elementwise(both.total, lambda v: tirx.max(v, const(0, "float32")))
    added = compute(r.shape, "float32", lambda i, j: both.difference[i, j] + r[i, j])
    twice = elementwise(relu, lambda v: v * const(2, "float32"))
    row = reduced(later.total, [1])
    scaled = compute(r.shape, "float32", lambda i, j: later.total[i, j] * row[i])
    e = np.exp(a)
    crossing = nest()
    mixed = compute(r.shape, "float32", lambda i, j: crossing.total[i, j] * crossing.difference[i, j])
    shifted_nest = nest()
    shifted = compute((5, 18), "float32", lambda i, j: shifted_nest.total[i, j + 1] + const(1, "float32"))
    return [
        data.case("two results", [plain.total, plain.difference], total, difference),
        data.case("one result of two", only_second.difference, difference),
        data.case("epilogues", [relu, added], np.maximum(total, 0), difference + res),
        data.case(
            "chain of epilogues, all stored",
            [relu, twice, both.total],
            np.maximum(total, 0),
            np.maximum(total, 0) * 2,
            total,
        ),
        data.case("reduction behind", scaled, total * total.sum(1, keepdims=True)),
        data.case("map before", [read.total, read.difference], e[:, 1:] + e[:, :-1], np.diff(e)),
        data.case("both results in one map", mixed, total * difference),
        data.case("result read at another place", shifted, total[:, 1:] + 1),
    ]


# -- symbolic extents ------------------------------------------------------------------------------------------


def symbolic() -> list[Case]:
    """One kernel for all sizes: rows, columns and both symbolic, at sizes with and without tails, and none at all."""
    n, m = tirx.Var("n", "int64"), tirx.Var("m", "int64")
    blank = Arrays()
    x, y = blank.source((n, m)), blank.source((m,))
    added = compute(x.shape, "float32", lambda i, j: tirx.exp(x[i, j]) + y[j])
    rows, columns, everything = reduced(x, [1]), reduced(x, [0]), reduced(x, [0, 1])
    turned = compute((m, n), "float32", lambda j, i: x[i, j])
    flat = compute((n * m,), "float32", lambda i: x[tirx.floordiv(i, m), tirx.floormod(i, m)])
    sized = compute((n,), "int64", lambda i: i * m + n)
    soft, best = softmax_of(x), largest(x, 1)
    cases = []
    for height, width in [(1, 1), (3, 16), (5, 37), (0, 8), (4, 0), (130, 70)]:
        sizes = {"n": height, "m": width}
        data = blank.fresh(**sizes)
        a = data[x]
        wanted = {
            "broadcast": (added, np.exp(a) + data[y]),
            "rows": (rows, a.sum(1)),
            "columns": (columns, a.sum(0)),
            "all": (everything, a.sum()),
            "transpose": (turned, a.T),
            "flattened": (flat, a.reshape(-1)),
            "sizes": (sized, np.arange(height) * width + height),
        }
        if width:
            wanted |= {"softmax": (soft, scipy.special.softmax(a, -1)), "argmax": (best, a.argmax(1))}
        for name, (output, want) in wanted.items():
            cases.append(data.case(f"{name} of {height} × {width}", output, want, sizes=sizes))
    return cases


FAMILIES: list[Callable[[], list[Case]]] = [
    lengths, parallel_pieces, empty, scalars, dtypes, stored_flags, broadcasts, transposes, gathers, guards, chains,
    reductions, row_lengths, combiners, products, row_chains, row_prefixes, nests, symbolic,
]  # fmt: skip


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_kernels(family: Callable[[], list[Case]], profile: str) -> None:
    check(family(), profile)


# -- the form of kernels ---------------------------------------------------------------------------------------


def count(output: Tensor | Sequence[Tensor], profile: str = WIDEST) -> dict[str, int]:
    """How often loops of each kind occur in a kernel."""
    outputs = [output] if isinstance(output, Tensor) else output
    text = KernelEmitter(outputs, profiles()[profile]).build().function.script()
    return {kind: text.count(f"T.{kind}(") for kind in ("parallel", "vectorized")}


def test_a_softmax_is_one_parallel_loop_over_rows() -> None:
    x = Source((512, 384), "float32", "x")
    found = count(softmax_of(x))
    assert found["parallel"] == 1
    assert found["vectorized"] > 3


def test_small_kernels_stay_on_one_thread_and_large_ones_do_not() -> None:
    small, large = Source((4, 16), "float32", "x"), Source((4000, 16), "float32", "x")
    assert count(elementwise(small, lambda v: v * v))["parallel"] == 0
    assert count(elementwise(large, lambda v: v * v))["parallel"] == 1


def test_every_reduction_runs_in_vector_lanes() -> None:
    x = Source((64, 96, 128), "float32", "x")
    for axes in ([0], [1], [2], [0, 1], [1, 2], [0, 2], [0, 1, 2]):
        assert count(reduced(x, axes))["vectorized"] > 0, axes


def test_cheap_values_are_computed_again_and_dear_ones_stored() -> None:
    x = Source((64, 64), "float32", "x")
    cheap = elementwise(x, lambda v: v + v)
    dear = elementwise(x, lambda v: tirx.exp(v) * v)
    kernels = {name: KernelEmitter([reduced(t, [1]), t], profiles()[WIDEST]) for name, t in (("a", cheap), ("b", dear))}
    assert kernels["a"].plan.shared == kernels["b"].plan.shared == 1
    spread = Map((64, 64, 64), "float32", lambda i, j, k: cheap[i, k] * cheap[j, k])
    assert cheap not in KernelEmitter([spread], profiles()[WIDEST]).plan.stored
    spread = Map((64, 64, 64), "float32", lambda i, j, k: dear[i, k] * dear[j, k])
    assert dear in KernelEmitter([spread], profiles()[WIDEST]).plan.stored


def gelu(v: tirx.Expr) -> tirx.Expr:
    return v * (const(1, "float32") + tirx.erf(v * const(0.7071067811865476, "float32"))) * const(0.5, "float32")


def mish(v: tirx.Expr) -> tirx.Expr:
    return v * tirx.tanh(tirx.log(const(1, "float32") + tirx.exp(v)))


def swish(v: tirx.Expr) -> tirx.Expr:
    return v * tirx.sigmoid(v)


def test_long_chains_of_transcendental_functions_compile_quickly() -> None:
    """Chains of thirty before a softmax and behind a loop nest, and a nest in one rule: exponential time would show."""
    data = Arrays()
    x = data.source((3, 18))
    chain: Tensor = x
    behind: Tensor = Stencil(x).total
    one, two = data[x], data[x][:, 1:] + data[x][:, :-1]
    for number in range(30):
        rule, exact = [(gelu, exact_gelu), (mish, exact_mish), (swish, exact_swish)][number % 3]
        chain, one = elementwise(chain, rule), exact(one)
        behind, two = elementwise(behind, rule), exact(two)
    tower = elementwise(x, lambda v: mish(swish(gelu(mish(v)))))
    three = exact_mish(exact_swish(exact_gelu(exact_mish(data[x]))))
    cases = [
        data.case("before a softmax", softmax_of(chain), scipy.special.softmax(one, -1)),
        data.case("behind a loop nest", behind, two),
        data.case("within a rule", tower, three),
    ]
    start = time.process_time()
    check(cases, WIDEST)
    assert time.process_time() - start < 30


def exact_gelu(v: np.ndarray) -> np.ndarray:
    return v * scipy.special.ndtr(v)


def exact_mish(v: np.ndarray) -> np.ndarray:
    return v * np.tanh(np.log1p(np.exp(v)))


def exact_swish(v: np.ndarray) -> np.ndarray:
    return v * scipy.special.expit(v)
